"""Text for Hugging Face models, as batches of input_ids, attention_mask and labels."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_recipes.datamodules.base import DataModule, check_shares, find, require
from lightning_recipes.datamodules.splits import cut

# Names that a file may use for a split.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}


def descriptions() -> dict[str, str]:
    """Embedded English: the descriptions of the data sets that come with scikit-learn, by name."""
    import sklearn.datasets  # only here: importing the recipes imports this file

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    return {name: getattr(sklearn.datasets, f"load_{name}")().DESCR for name in names}


def open_text(path: str) -> Any:
    """A UTF-8 text file, through gzip where its name ends in ``.gz``."""
    full = find(path)
    return gzip.open(full, "rt", encoding="utf-8") if full.endswith(".gz") else open(full, encoding="utf-8")


class ByteTokenizer:
    """UTF-8 bytes as tokens, called as Hugging Face's tokenizers are; needs no download.

    Ids: 0 padding, 1 beginning (put before every text), 2 end (not put, there for models that ask for one), byte + 3.
    """

    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    vocab_size = 259

    def __call__(
        self, texts: Sequence[str], truncation: bool = True, max_length: int | None = None
    ) -> dict[str, list[list[int]]]:
        ids = [[self.bos_token_id, *(byte + 3 for byte in text.encode())] for text in texts]
        return {"input_ids": [row[:max_length] if truncation else row for row in ids]}

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - 3 for i in ids if int(i) >= 3).decode(errors="replace")


class TokenisedTexts(Dataset):
    """Items (token ids, label); ``labels`` is int64 (N,)."""

    def __init__(self, ids: Sequence[list[int]], labels: Tensor | np.ndarray) -> None:
        self.ids = list(ids)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def select(self, indices: np.ndarray) -> TokenisedTexts:
        return TokenisedTexts([self.ids[i] for i in indices], self.labels[torch.as_tensor(indices)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[list[int], Tensor]:
        return self.ids[index], self.labels[index]


class TextDataModule(DataModule):
    """Labelled texts from a file of JSON lines, one object a line with fields for the text, the label and the split.

    Batches are dicts: input_ids and attention_mask int64 (N,L), padded on the right to the longest text of the batch,
    and labels int64 (N,). Labels are numbered in sorted order where they are not 0 to C-1 already. Rows without a split
    field are training rows; validation and test sets that the file does not have are split off.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``; None for a small embedded task (lines of the descriptions that come with
            scikit-learn, by the data set that they describe), to try things offline.
        tokenizer: "bytes" (`ByteTokenizer`), a name or folder for ``transformers.AutoTokenizer``, or any callable
            ``tokenizer(texts, truncation=True, max_length=n)`` that returns ``input_ids`` as lists.
        max_length: most tokens of a text; the rest is cut off.
        text_field, label_field, split_field: names of the fields; split is one of train, val (dev, valid, validation),
            test.
        val_fraction, test_fraction, fraction: as in `PreparedImages`.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ...
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | Callable = "bytes",
        max_length: int = 128,
        text_field: str = "text",
        label_field: str = "label",
        split_field: str = "split",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(max_length >= 1, "max_length", max_length, "an integer of at least 1")
        check_shares(val_fraction, test_fraction, fraction)
        self.path = path
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.text_field, self.label_field, self.split_field = text_field, label_field, split_field
        self.val_fraction, self.test_fraction, self.fraction = val_fraction, test_fraction, fraction
        self.collate = self.pad
        self._tokenize: Callable | None = None

    @property
    def pad_token_id(self) -> int:
        return getattr(self._tokenize, "pad_token_id", None) or 0

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        rows = self._rows()
        self._tokenize = self._load_tokenizer()
        values = sorted({row["label"] for row in rows})
        numbered = values == list(range(len(values)))
        self.class_names = [str(value) for value in values]
        label = {value: (value if numbered else i) for i, value in enumerate(values)}
        encoded = self._tokenize([row["text"] for row in rows], truncation=True, max_length=self.max_length)
        everything = TokenisedTexts(encoded["input_ids"], np.array([label[row["label"]] for row in rows]))
        sets = {}
        for name, aliases in SPLITS.items():
            members = [i for i, row in enumerate(rows) if row["split"] in aliases]
            sets[name] = everything.select(np.array(members)) if members else None
        train, val, test = sets["train"], sets["val"], sets["test"]
        if train is None:
            raise ValueError(f"path={self.path!r}: has no training row ({self.split_field}='train')")
        shares = self.val_fraction, self.test_fraction, self.fraction
        train, val, test = cut(train, val, test, *shares, seed=self.seed)
        self.train_set, self.val_set, self.test_set = train, val, test

    def pad(self, samples: Sequence[tuple[list[int], Tensor]]) -> dict[str, Tensor]:
        """Items to one batch, padded on the right."""
        longest = max(len(ids) for ids, _ in samples)
        input_ids = torch.full((len(samples), longest), self.pad_token_id)
        attention_mask = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, (ids, _) in enumerate(samples):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        labels = torch.stack([label for _, label in samples])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _rows(self) -> list[dict[str, Any]]:
        """Rows with the keys text, label and split."""
        if self.path is None:
            lines = ((name, line.strip()) for name, text in descriptions().items() for line in text.splitlines())
            return [
                {"text": t, "label": name, "split": "train"}
                for name, t in lines
                if len(re.findall(r"[a-z]{2,}", t)) > 3
            ]
        rows = []
        with open_text(self.path) as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                for field in (self.text_field, self.label_field):
                    if field not in row:
                        raise ValueError(
                            f"path={self.path!r}, line {number}: has no field {field!r}; it has {sorted(row)}"
                        )
                split = row.get(self.split_field, "train")
                rows.append({"text": row[self.text_field], "label": row[self.label_field], "split": split})
        known = [alias for aliases in SPLITS.values() for alias in aliases]
        if strange := sorted({str(row["split"]) for row in rows} - set(known)):
            raise ValueError(f"path={self.path!r}: {self.split_field} is {strange}, must be one of {', '.join(known)}")
        return rows

    def _load_tokenizer(self) -> Callable:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"tokenizer={self.tokenizer!r} needs transformers: pip install 'lightning_recipes[language]'"
            ) from error
        return AutoTokenizer.from_pretrained(self.tokenizer)


class Blocks(Dataset):
    """Items {input_ids, attention_mask, labels}, int64 (L,): non-overlapping blocks of one long text."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.blocks = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        ids = self.blocks[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class CharDataModule(DataModule):
    """One text, character by character, for next-token prediction.

    Batches are dicts: input_ids, attention_mask and labels, int64 (N, block_length). Labels equal input_ids: Hugging
    Face's causal models shift them by one themselves. The text is cut in the order training, validation, test.

    Args:
        path: a UTF-8 text, ``.gz`` or not; None for the embedded one (`descriptions`), to try things offline.
        block_length: characters of a sample.
        val_fraction, test_fraction: shares of the text, from its end.
        fraction: share of the training text that is used, from its beginning.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ...

    After ``setup``, ``characters`` is the vocabulary in order (of the whole text) and ``vocab_size`` its length.
    """

    def __init__(
        self,
        path: str | None = None,
        block_length: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(block_length >= 2, "block_length", block_length, "an integer of at least 2")
        check_shares(val_fraction, test_fraction, fraction)
        require(
            val_fraction + test_fraction < 1, "val_fraction + test_fraction", val_fraction + test_fraction, "below 1"
        )
        self.path = path
        self.block_length = block_length
        self.val_fraction, self.test_fraction, self.fraction = val_fraction, test_fraction, fraction
        self.characters = ""

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        if self.path is None:
            text = "\n".join(descriptions().values())
        else:
            with open_text(self.path) as file:
                text = file.read()
        self.characters = "".join(sorted(set(text)))
        self.class_names = list(self.characters)
        ids = self.encode(text)
        val_end = len(ids) - round(len(ids) * self.test_fraction)
        train_end = val_end - round(len(ids) * self.val_fraction)
        train = ids[: max(1, round(train_end * self.fraction))]
        if len(train) < self.block_length:
            raise ValueError(f"block_length={self.block_length}: the training text has only {len(train)} characters")
        self.train_set = Blocks(train, self.block_length)
        self.val_set = Blocks(ids[train_end:val_end], self.block_length)
        self.test_set = Blocks(ids[val_end:], self.block_length)

    def encode(self, text: str) -> Tensor:
        """int64 ids (len(text),); a character that the text does not have is a KeyError."""
        number = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([number[character] for character in text])

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return "".join(self.characters[int(i)] for i in ids)

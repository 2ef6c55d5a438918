"""Public image data sets by name, through torchvision."""

from __future__ import annotations

import os
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lightning_recipes.datamodules.base import require
from lightning_recipes.datamodules.images import ImageDataModule, ImageSets, LabelledImages, as_nchw

_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}

# Constructor arguments of each official part; a data set without a test part is split by this module.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "MNIST": _BY_FLAG,
    "FashionMNIST": _BY_FLAG,
    "KMNIST": _BY_FLAG,
    "USPS": _BY_FLAG,
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "SVHN": _TWO,
    "STL10": _TWO,
    "GTSRB": _TWO,
    "Food101": _TWO,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "DTD": _THREE,
    "Flowers102": _THREE,
    "FGVCAircraft": _THREE,
    "RenderedSST2": _THREE,
    "Country211": {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    "Imagenette": {"train": {"split": "train"}, "test": {"split": "val"}},
    "EuroSAT": _WHOLE,
    "Caltech101": _WHOLE,
    "SUN397": _WHOLE,
}


class TorchvisionDataModule(ImageDataModule):
    """A torchvision data set by name, in its official parts; downloaded only when asked to.

    Args:
        name: a name in `SETS`, spelt as in torchvision.
        root: the folder that torchvision keeps its data in; ``~`` and ``$VARIABLES`` are expanded.
        download: fetch what is missing (on one process of each machine, in ``prepare_data``).
        size: edge length that the images are resized to; needed where they differ in size and no transform crops them.
        **kwargs: those of `PreparedImages`: val_fraction, test_fraction, fraction, transform, batch_size, seed, ...

    Raises:
        FileNotFoundError: the data are not under ``root``, or could not be downloaded.
    """

    def __init__(
        self, name: str, root: str = "data", download: bool = False, size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        require(name in SETS, "name", name, "one of " + ", ".join(SETS))
        require(size is None or size >= 1, "size", size, "None or at least 1")
        self.name = name
        self.root = root
        self.download = download
        self.size = size

    @property
    def folder(self) -> str:
        return os.path.abspath(os.path.expandvars(os.path.expanduser(self.root)))

    def prepare_data(self) -> None:
        if self.download:
            for part in SETS[self.name]:
                self._open(part, download=True)

    def load(self) -> ImageSets:
        opened = {part: self._open(part, download=False) for part in SETS[self.name]}
        labels = {part: _labels(dataset) for part, dataset in opened.items()}
        count = 1 + max(int(part.max()) for part in labels.values())
        names = getattr(opened["train"], "classes", None) or getattr(opened["train"], "categories", None)
        if names is None or len(names) != count:
            names = range(count)
        # Some classes of torchvision are known by several words.
        names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        parts = {part: LabelledImages(_images(data), labels[part], self.size) for part, data in opened.items()}
        return ImageSets(names, parts["train"], parts.get("val"), parts.get("test"))

    def _open(self, part: str, download: bool) -> Any:
        try:
            return getattr(datasets, self.name)(self.folder, download=download, **SETS[self.name][part])
        except (RuntimeError, FileNotFoundError, URLError) as error:
            if download:
                what = f"could not be downloaded to {self.folder} ({error})"
            else:
                what = f"is not there, or not whole (looked in {self.folder})"
            raise FileNotFoundError(
                f"name={self.name!r}, root={self.root!r}: the {part} part {what}. Give download=True on a machine with "
                f"a network, or copy to this folder what torchvision.datasets.{self.name} keeps in its own."
            ) from error


def _labels(dataset: Any) -> Tensor:
    """The labels without decoding an image; torchvision has no one name for them."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if (labels := getattr(dataset, attribute, None)) is not None:
            return torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return torch.tensor([label for _, label in dataset._samples], dtype=torch.int64)


def _images(dataset: Any) -> Any:
    """The images as one uint8 tensor where the data set holds them in memory, else the data set, which decodes them."""
    data = getattr(dataset, "data", None)
    if isinstance(data, np.ndarray | Tensor) and data.dtype in (np.uint8, torch.uint8):
        return as_nchw(data)
    return dataset

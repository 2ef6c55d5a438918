"""Splits, orders and batches of the data modules."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_recipes.datamodules import (
    ArrayDataModule,
    ByteTokenizer,
    CharDataModule,
    DigitsDataModule,
    DomainDataModule,
    FewShotDataModule,
    ImageFolderDataModule,
    RotatedDigitsDataModule,
    TextDataModule,
    TorchvisionDataModule,
)
from lightning_recipes.datamodules.images import as_nchw
from lightning_recipes.datamodules.samplers import DomainBalancedSampler, EpochShuffle
from lightning_recipes.datamodules.splits import balanced_share, few_shots, stratified_split

DATA = os.environ.get("LIGHTNING_RECIPES_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LIGHTNING_RECIPES_DATA is not set")


@pytest.fixture(autouse=True)
def _no_global_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def arrays(seed: int, n: int, classes: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % classes


# ---------------------------------------------------------------------------------------------------- splits


def test_stratified_split_is_right_to_one_sample_and_by_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    kept, cut = stratified_split(labels, 0.2, seed=0)
    assert np.bincount(labels[cut]).tolist() == [10, 6, 4]
    assert sorted([*kept, *cut]) == list(range(100))
    assert np.array_equal(cut, stratified_split(labels, 0.2, seed=0)[1])
    assert not np.array_equal(cut, stratified_split(labels, 0.2, seed=1)[1])


def test_stratified_split_of_classes_too_small_for_a_share():
    labels = np.repeat(np.arange(30), 3)  # 0.1 of 3 samples is no sample, but 0.1 of 90 is 9
    kept, cut = stratified_split(labels, 0.1, seed=0)
    assert len(cut) == 9
    assert set(labels[kept]) == set(range(30))
    assert len(stratified_split(np.array([0, 1]), 0.5, seed=0)[0]) == 2  # a class keeps its only sample


def test_balanced_share_is_balanced_nested_and_never_empty():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    small, large = (balanced_share(labels, f, seed=0) for f in (0.1, 0.5))
    assert np.bincount(labels[small]).tolist() == [10, 5, 1]
    assert np.bincount(labels[large]).tolist() == [50, 25, 2]
    assert set(small) <= set(large)


def test_splits_leave_the_global_random_state_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    ready(DigitsDataModule(fraction=0.5))
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_few_shots():
    labels = np.repeat([0, 1, 2], [10, 2, 10])
    chosen = few_shots(labels, 4, seed=0, classes=[0, 1])
    assert np.bincount(labels[chosen]).tolist() == [4, 2]


# ---------------------------------------------------------------------------------------------------- samplers


def test_two_ranks_see_what_one_process_sees():
    dataset = list(range(40))
    one = list(EpochShuffle(dataset, num_replicas=1, rank=0, seed=3))
    two = [list(EpochShuffle(dataset, num_replicas=2, rank=r, seed=3)) for r in (0, 1)]
    for step in range(5):
        together = {*two[0][4 * step : 4 * step + 4], *two[1][4 * step : 4 * step + 4]}
        assert together == set(one[8 * step : 8 * step + 8])
    assert sorted(one) == dataset


def test_shuffle_by_epoch_also_without_a_trainer():
    sampler = EpochShuffle(list(range(40)), num_replicas=1, rank=0)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("sizes", [(12, 12, 12), (9, 20, 13)])
def test_domain_batches_are_balanced_and_disjoint_over_ranks(sizes):
    ends = np.cumsum(sizes)
    domains = np.split(np.arange(ends[-1]), ends[:-1])

    def batches(per_domain, **kwargs):
        sampler = DomainBalancedSampler(list(range(ends[-1])), domains, per_domain, seed=1, **kwargs)
        order = list(sampler)
        assert len(order) == len(sampler)
        return [order[i : i + 3 * per_domain] for i in range(0, len(order), 3 * per_domain)]

    one = batches(4)
    ranks = [batches(2, num_replicas=2, rank=r) for r in (0, 1)]
    assert len(one) == len(ranks[0]) == max(sizes) // 4
    for step, batch in enumerate(one):
        for d, (low, high) in enumerate(zip([0, *ends], ends, strict=False)):
            block = batch[4 * d : 4 * d + 4]
            assert all(low <= i < high for i in block) and len(set(block)) == 4
            assert [i for rank in ranks for i in rank[step][2 * d : 2 * d + 2]] == block
    # one pass over the largest domain repeats none of its samples
    largest = int(np.argmax(sizes))
    seen = [i for batch in one for i in batch if i in domains[largest]]
    assert len(seen) == len(set(seen))


def test_domain_sampler_changes_with_the_epoch_and_refuses_too_many():
    domains = [np.arange(10), np.arange(10, 20)]
    sampler = DomainBalancedSampler(list(range(20)), domains, 2)
    first = list(sampler)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    with pytest.raises(ValueError, match=r"per_domain=8 on 2 process.*smallest has 10; per_domain may be at most 5"):
        DomainBalancedSampler(list(range(20)), domains, 8, num_replicas=2)


# ---------------------------------------------------------------------------------------------------- images


def test_digits():
    data = ready(DigitsDataModule(size=16, batch_size=32))
    assert data.num_classes == 10 and data.class_names[3] == "3"
    assert len(data.train_set) + len(data.val_set) + len(data.test_set) == 1797
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 16, 16) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1 and labels.dtype == torch.int64
    assert torch.equal(images[..., ::2, ::2], images[..., 1::2, 1::2])
    assert data.train_set.source.dtype == torch.uint8


def test_digits_sets_are_disjoint_and_keep_image_and_label_together():
    data = ready(DigitsDataModule())
    indices = [set(s.indices.tolist()) for s in (data.train_set, data.val_set, data.test_set)]
    assert sum(map(len, indices)) == len(set.union(*indices))
    from sklearn.datasets import load_digits

    truth = load_digits()
    for dataset in (data.train_set, data.val_set, data.test_set):
        image, label = dataset[5]
        position = dataset.indices[5]
        assert label == truth.target[position]
        assert torch.allclose(image[0], torch.from_numpy(truth.images[position]).float() / 16, atol=0.5 / 255)


def test_fraction_touches_training_only():
    whole, part = ready(DigitsDataModule()), ready(DigitsDataModule(fraction=0.1))
    counts = torch.bincount(part.train_set.labels)
    assert (counts - torch.bincount(whole.train_set.labels) * 0.1).abs().max() <= 0.5
    assert np.array_equal(whole.test_set.indices, part.test_set.indices)
    assert set(part.train_set.indices) <= set(whole.train_set.indices)


def test_batches_equal_items_and_normalise():
    data = ready(DigitsDataModule(mean=[0.25], std=[0.5]))
    plain = ready(DigitsDataModule())
    batch = data.train_set.__getitems__([3, 7])
    for (image, label), i in zip(batch, (3, 7), strict=True):
        assert torch.equal(image, data.train_set[i][0]) and label == data.train_set[i][1]
        assert torch.allclose(image, (plain.train_set[i][0] - 0.25) / 0.5)


def test_transforms():
    data = ready(DigitsDataModule(transform=lambda x: x.flip(-1), train_transform=lambda x: 255 - x, batch_size=2000))
    plain = ready(DigitsDataModule())
    assert torch.allclose(data.train_set[0][0], 1 - plain.train_set[0][0], atol=1e-6)
    assert torch.equal(data.test_set[0][0], plain.test_set[0][0].flip(-1))
    (images, _), *_ = data.val_dataloader()
    assert torch.equal(images[0], plain.val_set[0][0].flip(-1))
    seen = data.plain_train_set  # the same samples as an evaluation sees them
    assert len(seen) == len(data.train_set)
    assert torch.equal(seen[5][0], plain.train_set[5][0].flip(-1)) and seen[5][1] == data.train_set[5][1]


def test_array(tmp_path):
    path = str(tmp_path / "set.npz")
    x, y = arrays(0, 60, 3, (12, 12, 3))
    x_test, y_test = arrays(1, 12, 3, (12, 12, 3))
    names = np.array(["ant", "bee", "cat"])
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test, class_names=names)
    data = ready(ArrayDataModule(path, batch_size=8, val_fraction=0.25))
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (45, 15, 12)
    assert data.class_names == ["ant", "bee", "cat"]
    images, labels = next(iter(data.test_dataloader()))
    assert torch.equal(images, torch.from_numpy(x_test[:8]).permute(0, 3, 1, 2) / 255)
    assert labels.tolist() == y_test[:8].tolist()
    assert ready(ArrayDataModule(path, size=6)).train_set[0][0].shape == (3, 6, 6)


def test_array_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='nowhere.npz'.*looked for /"):
        ready(ArrayDataModule("nowhere.npz"))
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"has no array x_train, y_train; it has x"):
        ready(ArrayDataModule(str(tmp_path / "a.npz")))
    np.savez(tmp_path / "b.npz", x_train=np.zeros((4, 8, 8)), y_train=np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match=r"x_train: dtype torch.float64, must be uint8"):
        ready(ArrayDataModule(str(tmp_path / "b.npz")))
    np.savez(tmp_path / "c.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        ready(ArrayDataModule(str(tmp_path / "c.npz")))


def test_as_nchw():
    assert as_nchw(np.zeros((5, 8, 8), np.uint8)).shape == (5, 1, 8, 8)
    assert as_nchw(np.zeros((5, 8, 9, 3), np.uint8)).shape == (5, 3, 8, 9)
    assert as_nchw(np.zeros((5, 3, 8, 9), np.uint8)).shape == (5, 3, 8, 9)
    with pytest.raises(ValueError, match=r"images: shape \(5, 8, 8, 2\)"):
        as_nchw(np.zeros((5, 8, 8, 2), np.uint8))


def save_images(root, counts: dict[str, int], side: int = 10, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (side + i % 2, side, 3), dtype=np.uint8)).save(
                root / name / f"{i}.png"
            )


def test_image_folder_in_parts_and_whole(tmp_path):
    save_images(tmp_path / "parts" / "train", {"cat": 6, "dog": 8})
    save_images(tmp_path / "parts" / "test", {"cat": 2, "dog": 2})
    data = ready(ImageFolderDataModule(str(tmp_path / "parts"), size=8, batch_size=4, val_fraction=0.5))
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (7, 7, 4)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 0, 1, 1] and images.max() <= 1
    whole = ready(ImageFolderDataModule(str(tmp_path / "parts" / "train"), size=8))
    assert whole.class_names == ["cat", "dog"] and len(whole.test_set) == 3
    save_images(tmp_path / "parts" / "val", {"cat": 1, "cow": 1})
    with pytest.raises(ValueError, match=r"class folders are \['cat', 'cow'\], expected \['cat', 'dog'\]"):
        ready(ImageFolderDataModule(str(tmp_path / "parts")))


def write_idx(path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_set(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 100), ("t10k", 20)):
        x, y = arrays(0, n, 10, (28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", x)
        write_idx(raw / f"{part}-labels-idx1-ubyte", y)
    data = ready(TorchvisionDataModule("MNIST", root=str(tmp_path), batch_size=10))
    assert data.num_classes == 10 and data.class_names[0] == "0 - zero"
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (90, 10, 20)
    assert isinstance(data.train_set.source, torch.Tensor)
    images, labels = next(iter(data.test_dataloader()))
    assert torch.equal(images[:, 0], torch.from_numpy(arrays(0, 20, 10, (28, 28))[0][:10]) / 255)
    assert labels.tolist() == list(range(10))


def test_torchvision_set_of_files(tmp_path):
    save_images(tmp_path / "eurosat" / "2750", {"Forest": 10, "River": 10})
    data = ready(TorchvisionDataModule("EuroSAT", root=str(tmp_path), size=8))
    assert data.class_names == ["Forest", "River"] and len(data.test_set) == 4
    assert data.train_set[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN", "EuroSAT", "Flowers102"])
def test_absent_set_says_where_it_looked(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        ready(TorchvisionDataModule(name, root=str(tmp_path / "empty")))
    assert name in str(error.value) and str(tmp_path / "empty") in str(error.value)
    assert "download=True" in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitsDataModule(size=12), "size=12: must be a multiple of 8"),
        (lambda: DigitsDataModule(batch_size=0), "batch_size=0: must be"),
        (lambda: DigitsDataModule(fraction=0), "fraction=0: must be above 0 and at most 1"),
        (lambda: DigitsDataModule(val_fraction=1.0), "val_fraction=1.0: must be at least 0 and below 1"),
        (lambda: DigitsDataModule(mean=[0.5]), "must be given together"),
        (lambda: TorchvisionDataModule("MNITS"), "name='MNITS': must be one of MNIST, "),
        (lambda: RotatedDigitsDataModule(test_angles=[15]), "an angle stands there twice"),
        (lambda: RotatedDigitsDataModule(per_domain=0), "per_domain=0: must be"),
        (lambda: FewShotDataModule(DigitsDataModule(), shots=0), "shots=0: must be"),
        (lambda: CharDataModule(block_length=1), "block_length=1: must be"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_class_names_before_setup():
    with pytest.raises(RuntimeError, match="DigitsDataModule: class_names and num_classes are known after setup"):
        _ = DigitsDataModule().num_classes


def test_no_batch_is_an_error():
    data = ready(DigitsDataModule(batch_size=5000, drop_last=True))
    with pytest.raises(ValueError, match="batch_size=5000, drop_last=True: not one batch in the 1294 training samples"):
        data.train_dataloader()


# ---------------------------------------------------------------------------------------------------- domains


def test_rotated_digits():
    data = ready(RotatedDigitsDataModule([0, 30], [60, 90], per_domain=5, target_val=True))
    assert data.train_domains == ["0", "30"] and data.held_out_domains == ["60", "90"]
    loader = data.train_dataloader()
    batch_domain = np.repeat([0, 1], 5)
    sampler = list(loader.sampler)
    for start in range(0, len(sampler), 10):
        positions = np.array(sampler[start : start + 10])
        assert np.array_equal(positions >= len(data._train_indices[0]), batch_domain)
    images, labels = next(iter(loader))
    assert images.shape == (10, 1, 16, 16) and labels.shape == (10,)
    assert len(data.val_dataloader()) == 3 and len(data.test_dataloader()) == 2
    everything = [data.train_set, data.val_set, *data.target_sets.values()]
    used = np.concatenate([dataset.indices for dataset in everything])
    assert len(used) == len(set(used)) == 1797
    assert abs(len(data.val_set) / (len(data.train_set) + len(data.val_set)) - 0.2) < 0.01


def test_rotation_is_by_the_angle():
    upright = ready(RotatedDigitsDataModule([0], [90], size=8))
    original = ready(DigitsDataModule())
    i = int(upright.target_sets["90"].indices[0])
    assert torch.equal(upright.target_sets["90"].source[i], original.train_set.source[i].rot90(1, (1, 2)))


def test_fraction_is_by_domain_and_class():
    data = ready(RotatedDigitsDataModule([0, 30], [60], fraction=0.1, per_domain=2))
    for index in data._train_indices:
        counts = torch.bincount(data.train_set.labels[torch.from_numpy(index)], minlength=10)
        assert counts.min() >= 4 and counts.max() <= 6


def pacs_like(tmp_path):
    for d, name in enumerate(("art", "cartoon", "sketch")):
        save_images(tmp_path / "pacs" / name, {"dog": 10, "horse": 10}, seed=d)
    return str(tmp_path / "pacs")


def test_domain_folders(tmp_path):
    data = ready(DomainDataModule(pacs_like(tmp_path), "cartoon", size=8, per_domain=2, batch_size=4))
    assert data.train_domains == ["art", "sketch"] and data.class_names == ["dog", "horse"]
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (32, 8, 20)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8) and labels.max() <= 1
    assert len(data.train_dataloader()) == 8
    files = [data.test_set.source.datasets[1].samples[i - 20][0] for i in data.test_set.indices]
    assert all("cartoon" in file for file in files)
    with pytest.raises(ValueError, match="held_out='photo': must be one of art, cartoon, sketch"):
        ready(DomainDataModule(pacs_like(tmp_path / "again"), "photo"))


@needs_data
def test_real_pacs():
    data = ready(DomainDataModule(f"{DATA}/pacs64_subset.npz", "sketch", per_domain=8, num_workers=0))
    assert data.train_domains == ["art_painting", "cartoon", "photo"] and data.num_classes == 6
    assert len(data.train_set) + len(data.val_set) + len(data.test_set) == 1880 + 480
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (24, 3, 64, 64) and len(labels) == 24
    # sketches are grey, white and black
    sketches, _ = next(iter(data.test_dataloader()))
    assert (sketches[:, 0] - sketches[:, 1]).abs().mean() < 0.01


# ---------------------------------------------------------------------------------------------------- few-shot


def test_few_shot():
    digits = DigitsDataModule(train_transform=lambda x: x // 2)
    data = ready(FewShotDataModule(digits, shots=3, batch_size=5))
    assert data.num_classes == 10 and data.num_base == 5
    assert torch.bincount(data.train_set.labels).tolist() == [3] * 5
    assert torch.bincount(data.val_set.labels).tolist() == [3] * 5
    base, novel = data.test_dataloader()
    assert base.dataset.labels.max() == 4 and novel.dataset.labels.min() == 5 and novel.dataset.labels.max() == 9
    assert len(base.dataset) + len(novel.dataset) == len(digits.test_set)
    assert data.train_set[0][0].max() <= 0.5 < data.plain_train_set[0][0].max()
    other = ready(FewShotDataModule(DigitsDataModule(), shots=3, seed=1))
    assert not np.array_equal(other.train_set.indices, data.train_set.indices)
    with pytest.raises(ValueError, match="data=3: must be a data module"):
        FewShotDataModule(3)
    with pytest.raises(ValueError, match="data=CharDataModule: has no labelled train_set"):
        ready(FewShotDataModule(CharDataModule()))


def test_few_shot_of_texts():
    data = ready(FewShotDataModule(TextDataModule(), shots=2, batch_size=6))
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2] and batch["input_ids"].ndim == 2


# ---------------------------------------------------------------------------------------------------- text


def write_rows(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def test_text(tmp_path):
    rows = [
        {"split": s, "label": label, "text": "é" * n} for s in ("train", "dev", "test") for label, n in ((1, 1), (0, 3))
    ]
    data = ready(TextDataModule(write_rows(tmp_path / "a.jsonl.gz", rows), batch_size=2))
    assert data.class_names == ["0", "1"] and len(data.train_set) == len(data.val_set) == 2
    batch = next(iter(data.val_dataloader()))
    byte = [b + 3 for b in "é".encode()]
    assert batch["input_ids"].tolist() == [[1, *byte, 0, 0, 0, 0], [1, *byte, *byte, *byte]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 7] and batch["labels"].tolist() == [1, 0]
    short = ready(TextDataModule(str(tmp_path / "a.jsonl.gz"), max_length=2))
    assert max(map(len, short.train_set.ids)) == 2


def test_text_with_names_for_labels_own_tokenizer_and_no_splits(tmp_path):
    rows = [{"sentence": "a b", "kind": "no"}, {"sentence": "c", "kind": "yes"}] * 20

    def tokenizer(texts, truncation, max_length):
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}

    data = ready(
        TextDataModule(write_rows(tmp_path / "a.jsonl.gz", rows), tokenizer, text_field="sentence", label_field="kind")
    )
    assert data.class_names == ["no", "yes"]
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (29, 3, 8)
    for ids, label in zip(data.train_set.ids, data.train_set.labels, strict=True):
        assert len(ids) == (2 if label == 0 else 1)


def test_text_refuses_rows_it_does_not_understand(tmp_path):
    path = write_rows(tmp_path / "a.jsonl.gz", [{"text": "a", "label": 0, "split": "extra"}])
    with pytest.raises(ValueError, match=r"split is \['extra'\], must be one of train"):
        ready(TextDataModule(path))
    with pytest.raises(ValueError, match=r"line 1: has no field 'target'; it has \['label', 'split', 'text'\]"):
        ready(TextDataModule(path, label_field="target"))


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    ids = tokenizer(["naïve"])["input_ids"][0]
    assert ids[0] == 1 and tokenizer.decode(ids) == "naïve" and max(ids) < tokenizer.vocab_size


def test_char(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 100, encoding="utf-8")
    data = ready(CharDataModule(str(tmp_path / "a.txt"), block_length=10, batch_size=4))
    assert data.characters == "abcd" and data.vocab_size == 4
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (32, 4, 4)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 10) and batch["attention_mask"].all()
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert data.decode(data.val_set[0]["input_ids"]) == "abcdabcdab"
    assert ready(CharDataModule()).vocab_size < 128  # the embedded text
    with pytest.raises(ValueError, match="block_length=500: the training text has only 320 characters"):
        ready(CharDataModule(str(tmp_path / "a.txt"), block_length=500))


@needs_data
def test_real_texts():
    data = ready(TextDataModule(f"{DATA}/trec6.jsonl.gz"))
    assert data.num_classes == 6 and len(data.test_set) == 500 and len(data.train_set) + len(data.val_set) == 5452
    assert ready(CharDataModule(f"{DATA}/tiny_shakespeare.txt.gz")).vocab_size == 65


# ---------------------------------------------------------------------------------------------------- in a Trainer


class Recorder(LightningModule):
    """Writes down which images each step saw, by their sums (into a file a rank, where there is a folder)."""

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(1, 10)
        self.folder = folder
        self.seen: dict[int, list[list[float]]] = {}

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append(images.flatten(1).sum(1).tolist())
        return F.cross_entropy(self.net(images.flatten(1).mean(1, keepdim=True)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_end(self):
        if self.folder is not None:
            torch.save(self.seen, os.path.join(self.folder, f"{self.global_rank}.pt"))


def fit(module, data, ckpt_path=None, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", **(quiet | {"devices": 1} | kwargs))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("workers", [0, 1])
def test_order_depends_on_epoch_and_global_seed_not_on_workers(workers):
    def orders():
        module = Recorder()
        fit(module, DigitsDataModule(fraction=0.05, batch_size=16, val_fraction=0, num_workers=workers), max_epochs=2)
        return module.seen

    seen = orders()
    assert seen[0] != seen[1]
    first, second = (sorted(itertools.chain(*seen[epoch])) for epoch in (0, 1))
    assert first == pytest.approx(second)
    data = ready(DigitsDataModule(fraction=0.05, batch_size=16, val_fraction=0))
    by_hand = data.train_dataloader()
    for epoch in (0, 1):
        by_hand.sampler.set_epoch(epoch)
        assert [x.flatten(1).sum(1).tolist() for x, _ in by_hand] == seen[epoch]
    seed_everything(5)
    assert orders()[0] != seen[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_epoch_has_its_own_order(tmp_path, workers):
    def data():
        return DigitsDataModule(fraction=0.05, batch_size=16, num_workers=workers)

    whole, module = Recorder(), Recorder()
    fit(whole, data(), max_epochs=3)
    trainer = fit(Recorder(), data(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    resumed.fit(module, datamodule=data(), ckpt_path=tmp_path / "a.ckpt")
    assert module.seen == {2: whole.seen[2]}


def rotated(**kwargs):
    return RotatedDigitsDataModule([0, 30], [60], **kwargs)


def two_sets(per_rank: int):
    return {
        "domains": rotated(per_domain=per_rank, steps_per_epoch=3),
        "digits": DigitsDataModule(batch_size=2 * per_rank, fraction=0.05),
    }


def fit_as_one_of_two(rank: int, folder: str, port: int) -> None:
    """What each process of `test_ddp` runs; both sets in one, since starting a process takes longest."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    for name, data in two_sets(4).items():
        fit(Recorder(os.path.join(folder, name)), data, max_epochs=2, devices=2, strategy="ddp")


@pytest.mark.ddp
def test_ddp(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in two_sets(4):
        (tmp_path / name).mkdir()
    torch.multiprocessing.start_processes(fit_as_one_of_two, (str(tmp_path), port), nprocs=2, start_method="spawn")
    for name, data in two_sets(8).items():
        ranks = [torch.load(tmp_path / name / f"{r}.pt") for r in (0, 1)]
        one = Recorder()
        fit(one, data, max_epochs=2)
        for epoch in (0, 1):
            steps = len(one.seen[epoch]) - (name == "digits")  # the last batch of an uneven set is padded under DDP
            assert steps >= 3
            for step in range(steps):
                together = ranks[0][epoch][step] + ranks[1][epoch][step]
                assert sorted(together) == pytest.approx(sorted(one.seen[epoch][step]))


def test_lightning_leaves_the_sampler_in_place():
    loader = ready(rotated(per_domain=4)).train_dataloader()
    assert isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler)
    assert loader.batch_size == 8 and loader.drop_last


def test_loader_settings():
    data = ready(DigitsDataModule(num_workers=2, pin_memory=False))
    loader = data.train_dataloader()
    assert loader.num_workers == 2 and loader.persistent_workers and not loader.pin_memory
    assert ready(DigitsDataModule()).train_dataloader().pin_memory == torch.cuda.is_available()
    assert ready(DigitsDataModule(val_fraction=0)).val_dataloader() == []

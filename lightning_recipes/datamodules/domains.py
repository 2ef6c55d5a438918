"""Leave-one-domain-out: train on some image domains, test on one that was never seen (DomainBed's protocol)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_recipes.datamodules.arrays import read_npz
from lightning_recipes.datamodules.base import find, require
from lightning_recipes.datamodules.digits import DIGIT_NAMES, digit_images
from lightning_recipes.datamodules.images import LabelledImages, PreparedImages, as_nchw
from lightning_recipes.datamodules.samplers import DomainBalancedSampler
from lightning_recipes.datamodules.splits import balanced_share, keyed_permutation, stratified_split


@dataclass
class Domains:
    """Images of several domains: ``domain`` (N,) holds for each image an index into ``names``."""

    names: list[str]
    class_names: list[str]
    images: LabelledImages
    domain: np.ndarray


class LeaveDomainsOut(PreparedImages, ABC):
    """Trains on all domains but the held-out ones, with equal numbers of each in every batch.

    A training batch is ``per_domain`` images of each training domain, concatenated in the order of ``train_domains``,
    so ``images.chunk(len(train_domains))`` gives the domains back. Like ``batch_size`` elsewhere ``per_domain`` counts
    for one process: under DDP the ranks take disjoint images, and W ranks see together what one process sees with
    ``W * per_domain``. (``Trainer(overfit_batches=...)`` puts its own order in place of this one.)
    Validation is the part held out of every training domain, in one loader; test is the held-out domain, in one loader
    each where there are several.

    Args:
        held_out: names of the domains to test on.
        per_domain: training images of each domain in a batch of one process.
        steps_per_epoch: training batches in an epoch; None for one pass over the largest training domain.
        target_val: validate on the held-out domains too, in further loaders: to watch, never to choose by.
        val_fraction: share of each training domain held out for validation, by class.
        **kwargs: those of `PreparedImages` (``batch_size`` is that of validation and test).
    """

    def __init__(
        self,
        held_out: Sequence[str],
        per_domain: int = 32,
        steps_per_epoch: int | None = None,
        target_val: bool = False,
        val_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=0, **kwargs)
        require(per_domain >= 1, "per_domain", per_domain, "an integer of at least 1")
        require(
            steps_per_epoch is None or steps_per_epoch >= 1, "steps_per_epoch", steps_per_epoch, "None or at least 1"
        )
        self.held_out_domains = list(held_out)
        self.per_domain = per_domain
        self.steps_per_epoch = steps_per_epoch
        self.target_val = target_val
        self.train_domains: list[str] = []
        self.target_sets: dict[str, LabelledImages] = {}
        self._train_indices: list[np.ndarray] = []

    @abstractmethod
    def load_domains(self) -> Domains:
        """Reads the source; called once, in ``setup``, on every rank."""

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        source = self.load_domains()
        for name in self.held_out_domains:
            require(name in source.names, "held_out", name, "one of " + ", ".join(source.names))
        members = {name: np.flatnonzero(source.domain == d) for d, name in enumerate(source.names)}
        self.train_domains = [name for name in source.names if name not in self.held_out_domains]
        if not self.train_domains:
            raise ValueError(f"held_out={self.held_out_domains!r}: leaves no domain to train on")
        train, val = [], []
        for name in self.train_domains:
            kept, held = np.arange(len(members[name])), np.empty(0, dtype=int)
            labels = source.images.labels[torch.from_numpy(members[name])]
            if self.val_fraction > 0:
                kept, held = stratified_split(labels, self.val_fraction, self.seed, "val")
            if self.fraction < 1:
                kept = kept[balanced_share(labels[torch.from_numpy(kept)], self.fraction, self.seed)]
            train.append(members[name][kept])
            val.append(members[name][held])
        ends = np.cumsum([len(index) for index in train])
        self._train_indices = np.split(np.arange(ends[-1]), ends[:-1])
        self.class_names = source.class_names
        self.train_set = self.for_training(source.images.select(np.concatenate(train)))
        self.val_set = self.plain(source.images.select(np.concatenate(val)))
        targets = {name: members[name] for name in self.held_out_domains}
        self.target_sets = {name: self.plain(source.images.select(index)) for name, index in targets.items()}
        self.test_set = self.plain(source.images.select(np.concatenate(list(targets.values()))))

    def train_dataloader(self) -> DataLoader:
        sampler = DomainBalancedSampler(
            self.train_set,
            self._train_indices,
            self.per_domain,
            self.steps_per_epoch,
            seed=self.order_seed,
            **self.shard,
        )
        return self.training_loader(sampler, self.per_domain * len(self._train_indices), drop_last=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        source = self.evaluation_loader(self.val_set)
        if not self.target_val:
            return source
        return [*(source if isinstance(source, list) else [source]), *self._target_loaders()]

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        loaders = self._target_loaders()
        return loaders[0] if len(loaders) == 1 else loaders

    def _target_loaders(self) -> list[DataLoader]:
        return [self.evaluation_loader(self.target_sets[name]) for name in self.held_out_domains]


class DomainDataModule(LeaveDomainsOut):
    """Image domains from folders ``path/DOMAIN/CLASS/`` (PACS, VLCS, OfficeHome, ...) or from one ``.npz``.

    The ``.npz`` has x_train, y_train, domain_train (indices into domain_names), domain_names and class_names, and may
    have x_test, y_test, domain_test. Its own split is not used: the protocol cuts each domain anew.

    Args:
        path: the folder or file; ``~`` and ``$VARIABLES`` are expanded.
        held_out: name of the domain to test on.
        size: edge length that the images are resized to; None for as they are.
        **kwargs: those of `LeaveDomainsOut`: per_domain, steps_per_epoch, target_val, val_fraction, fraction, ...
    """

    def __init__(self, path: str, held_out: str, size: int | None = None, **kwargs: Any) -> None:
        super().__init__([held_out], **kwargs)
        require(size is None or size >= 1, "size", size, "None or at least 1")
        self.path = path
        self.size = size

    def load_domains(self) -> Domains:
        full = find(self.path)
        return self._from_folders(full) if os.path.isdir(full) else self._from_npz()

    def _from_npz(self) -> Domains:
        arrays = read_npz(self.path, ("x_train", "y_train", "domain_train", "domain_names", "class_names"))
        parts = ["train", *(["test"] if "x_test" in arrays else [])]
        pooled = {key: np.concatenate([arrays[f"{key}_{part}"] for part in parts]) for key in ("x", "y", "domain")}
        images = LabelledImages(as_nchw(pooled["x"], "x_train"), pooled["y"], self.size)
        names = [str(name) for name in arrays["domain_names"]]
        return Domains(names, [str(name) for name in arrays["class_names"]], images, pooled["domain"])

    def _from_folders(self, root: str) -> Domains:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise ValueError(f"path={self.path!r}: must hold a folder for each of at least two domains; it has {names}")
        domains = [ImageFolder(os.path.join(root, name)) for name in names]
        for name, domain in zip(names, domains, strict=True):
            if domain.classes != domains[0].classes:
                raise ValueError(
                    f"path={self.path!r}: domain {name} has the classes {domain.classes}, "
                    f"domain {names[0]} has {domains[0].classes}"
                )
        labels = np.concatenate([domain.targets for domain in domains])
        index = np.repeat(np.arange(len(domains)), [len(domain) for domain in domains])
        return Domains(names, domains[0].classes, LabelledImages(ConcatDataset(domains), labels, self.size), index)


class RotatedDigitsDataModule(LeaveDomainsOut):
    """scikit-learn's digits, each turned by the angle of one domain: domain generalisation without a download.

    As in DomainBed's RotatedMNIST every image belongs to one domain only: a test image was never seen at another angle.

    Args:
        train_angles: degrees, counter-clockwise, of the domains to train on.
        test_angles: degrees of the held-out domains; one test loader each.
        size: edge length that the 8x8 images are enlarged to (bilinear) before they are turned.
        **kwargs: those of `LeaveDomainsOut`: per_domain, steps_per_epoch, target_val, val_fraction, fraction, ...
    """

    def __init__(
        self,
        train_angles: Sequence[float] = (0, 15, 30, 45, 60),
        test_angles: Sequence[float] = (75,),
        size: int = 16,
        **kwargs: Any,
    ) -> None:
        names = [f"{angle:g}" for angle in test_angles]
        super().__init__(names, **kwargs)
        angles = [*train_angles, *test_angles]
        require(len(train_angles) >= 1, "train_angles", train_angles, "at least one angle")
        require(len(test_angles) >= 1, "test_angles", test_angles, "at least one angle")
        if len({f"{angle:g}" for angle in angles}) < len(angles):
            raise ValueError(f"train_angles={train_angles!r}, test_angles={test_angles!r}: an angle stands there twice")
        require(size >= 8, "size", size, "at least 8")
        self.angles = angles
        self.size = size

    def load_domains(self) -> Domains:
        images, labels = digit_images()
        images = F.resize(images, [self.size, self.size])
        domain = np.empty(len(labels), dtype=int)
        for digit in range(10):  # dealt out in turn, so that the domains have the same classes
            members = np.flatnonzero(labels.numpy() == digit)
            order = keyed_permutation(len(members), self.seed, "angle", digit)
            domain[members[order]] = (np.arange(len(members)) + digit) % len(self.angles)
        for d, angle in enumerate(self.angles):
            turned = torch.from_numpy(domain == d)
            images[turned] = F.rotate(images[turned], angle, interpolation=InterpolationMode.BILINEAR)
        return Domains([f"{angle:g}" for angle in self.angles], DIGIT_NAMES, LabelledImages(images, labels), domain)

"""Labelled images, and the data module that splits and serves them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from lightning_recipes.datamodules.base import DataModule, check_shares, require
from lightning_recipes.datamodules.splits import cut


def as_nchw(images: np.ndarray | Tensor, name: str = "images") -> Tensor:
    """uint8 images (N,H,W), (N,H,W,C) or (N,C,H,W), C being 1 or 3, as one contiguous uint8 tensor (N,C,H,W)."""
    images = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
    if images.dtype != torch.uint8:
        raise ValueError(f"{name}: dtype {images.dtype}, must be uint8 (0 to 255, not normalised)")
    if images.ndim == 3:
        return images[:, None].contiguous()
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        return images.permute(0, 3, 1, 2).contiguous()
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.contiguous()
    raise ValueError(f"{name}: shape {tuple(images.shape)}, must be (N,H,W), (N,H,W,C) or (N,C,H,W) with C 1 or 3")


class LabelledImages(Dataset):
    """Items (image, label): float32 (C,H,W) in [0,1], unless normalised, and int64.

    Args:
        source: a uint8 tensor (N,C,H,W), kept as it is and converted when read, or a map-style data set of (image,
            anything), the image a PIL image or uint8 tensor.
        labels: int64 (N,).
        size: resize to ``size`` x ``size`` (bilinear, antialiased).
        indices: the samples of ``source`` that belong to this set; None for all.
    """

    def __init__(
        self,
        source: Tensor | Dataset,
        labels: Tensor | np.ndarray | Sequence[int],
        size: int | None = None,
        indices: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if len(self.labels) != len(source):
            raise ValueError(f"labels: {len(self.labels)} labels for {len(source)} images")
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        self.labels = self.labels[torch.from_numpy(self.indices)]
        self.size = size
        self.transform: Callable | None = None
        self.mean: Tensor | None = None
        self.std: Tensor | None = None

    def select(self, indices: np.ndarray) -> LabelledImages:
        """The samples at ``indices`` of this set, on the same images in memory."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[indices]
        chosen.labels = self.labels[torch.as_tensor(indices)]
        return chosen

    def prepared(
        self, transform: Callable | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> LabelledImages:
        """This set with a transform of each uint8 (C,H,W) image and a normalisation after it."""
        chosen = copy.copy(self)
        chosen.transform = transform
        chosen.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        chosen.std = None if std is None else torch.tensor(std).view(-1, 1, 1)
        return chosen

    def pixels(self) -> Tensor:
        """All images as they are before the transform, uint8 (N,C,H,W).

        Raises:
            ValueError: for images of several sizes, or that are read as something else than uint8.
        """
        if isinstance(self.source, Tensor):
            images = self._resize(self.source[torch.from_numpy(self.indices)])
        else:
            each = [self._read(int(position)) for position in self.indices]
            if len({image.shape for image in each}) > 1:
                raise ValueError("the images differ in size; have the data module resize them (size=)")
            images = torch.stack(each)
        if images.dtype != torch.uint8:
            raise ValueError(
                f"the images are read as {str(images.dtype)[6:]}; they must be uint8 pixels, with transforms, mean and"
                " std given to the data module"
            )
        return images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._read(int(self.indices[index]))
        return self._finish(image if self.transform is None else self.transform(image)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch at once, which a DataLoader asks for: one conversion instead of one a sample."""
        if self.transform is not None or not isinstance(self.source, Tensor):
            return [self[i] for i in indices]
        images = self._finish(self._resize(self.source[torch.from_numpy(self.indices[indices])]))
        return list(zip(images, self.labels[indices], strict=True))

    def _read(self, position: int) -> Tensor:
        image = self.source[position] if isinstance(self.source, Tensor) else self.source[position][0]
        return self._resize(image if isinstance(image, Tensor) else F.pil_to_tensor(image))

    def _resize(self, images: Tensor) -> Tensor:
        if self.size is None or tuple(images.shape[-2:]) == (self.size, self.size):
            return images
        return F.resize(images, [self.size, self.size], antialias=True)

    def _finish(self, images: Any) -> Tensor:
        images = images if isinstance(images, Tensor) else F.pil_to_tensor(images)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
        return images if self.mean is None else (images - self.mean) / self.std


@dataclass
class ImageSets:
    """What a source of images offers; a missing validation or test set is split off the training set."""

    class_names: list[str]
    train: LabelledImages
    val: LabelledImages | None = None
    test: LabelledImages | None = None


class PreparedImages(DataModule):
    """Transforms and normalisation of images, and the shares of them that are used; a subclass sets them up.

    Batches are ``(images, labels)``: float32 (N,C,H,W) in [0,1] (unless ``mean`` and ``std`` are given) and int64 (N,).

    Args:
        val_fraction: share of the training images held out for validation, by class, where the source has no
            validation set; 0 for no validation.
        test_fraction: the same for the test set.
        fraction: class-balanced share of the training images that is used, at least one a class; a smaller share is
            part of a larger one. Validation and test stay whole.
        transform: applied to every uint8 (C,H,W) image, for example torchvision.transforms.v2.
        train_transform: used in the place of ``transform`` on training images.
        mean: channel means, of images in [0,1]; given together with ``std``.
        std: channel standard deviations.
        **kwargs: those of `DataModule`: batch_size, num_workers, pin_memory, persistent_workers, drop_last, seed.
    """

    def __init__(
        self,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        fraction: float = 1.0,
        transform: Callable | None = None,
        train_transform: Callable | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_shares(val_fraction, test_fraction, fraction)
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise ValueError(f"mean={mean!r}, std={std!r}: must be given together, one number a channel")
        require(std is None or min(std) > 0, "std", std, "above 0 in every channel")
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.fraction = fraction
        self.transform = transform
        self.train_transform = train_transform
        self.mean = mean
        self.std = std

    def for_training(self, images: LabelledImages) -> LabelledImages:
        return images.prepared(self.train_transform or self.transform, self.mean, self.std)

    def plain(self, images: LabelledImages | None) -> LabelledImages | None:
        return None if images is None else images.prepared(self.transform, self.mean, self.std)


class ImageDataModule(PreparedImages, ABC):
    """Splits, class-balanced shares, transforms and normalisation over a source of images.

    A subclass says in ``load`` where the images are. Arguments are those of `PreparedImages`.
    """

    @abstractmethod
    def load(self) -> ImageSets:
        """Reads the source; called once, in ``setup``, on every rank."""

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        sets = self.load()
        shares = self.val_fraction, self.test_fraction, self.fraction
        train, val, test = cut(sets.train, sets.val, sets.test, *shares, seed=self.seed)
        self.class_names = sets.class_names
        self.train_set, self.val_set, self.test_set = self.for_training(train), self.plain(val), self.plain(test)

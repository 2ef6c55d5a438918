"""scikit-learn's handwritten digits: real data that is there without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_recipes.datamodules.base import require
from lightning_recipes.datamodules.images import ImageDataModule, ImageSets, LabelledImages

DIGIT_NAMES = [str(digit) for digit in range(10)]


def digit_images() -> tuple[Tensor, Tensor]:
    """The 1,797 digits: uint8 (1797,1,8,8), 16 grey levels spread over 0 to 255, and int64 labels (1797,)."""
    from sklearn.datasets import load_digits  # only here: importing the recipes imports this file

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return images[:, None], torch.from_numpy(digits.target).long()


class DigitsDataModule(ImageDataModule):
    """scikit-learn's 1,797 grey 8x8 digits in 10 classes (UCI optical digits), split into train, validation and test.

    Args:
        size: edge length that the images are enlarged to, by repeating pixels; a multiple of 8.
        **kwargs: those of `PreparedImages`: val_fraction, test_fraction, fraction, transform, batch_size, seed, ...
    """

    def __init__(self, size: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(size >= 8 and size % 8 == 0, "size", size, "a multiple of 8")
        self.size = size

    def load(self) -> ImageSets:
        images, labels = digit_images()
        if self.size != 8:
            images = interpolate(images, scale_factor=self.size // 8, mode="nearest")
        return ImageSets(DIGIT_NAMES, LabelledImages(images, labels))

"""Images in folders, one a class."""

from __future__ import annotations

import os
from typing import Any

from torchvision.datasets import ImageFolder

from lightning_recipes.datamodules.base import find, require
from lightning_recipes.datamodules.images import ImageDataModule, ImageSets, LabelledImages


def labelled_folder(
    folder: str, size: int | None, classes: list[str] | None = None
) -> tuple[LabelledImages, list[str]]:
    """The RGB images under ``folder/CLASS/`` and the names of the classes, which must be ``classes`` where given."""
    images = ImageFolder(folder)
    if classes is not None and images.classes != classes:
        raise ValueError(f"{folder}: its class folders are {images.classes}, expected {classes}")
    return LabelledImages(images, images.targets, size), images.classes


class ImageFolderDataModule(ImageDataModule):
    """Images in ``root/train/CLASS/``, and ``root/val``, ``root/test`` where they exist; or in ``root/CLASS/``, split.

    Args:
        root: the folder; ``~`` and ``$VARIABLES`` are expanded.
        size: edge length that the images are resized to, without regard to their shape; None where all have one size
            or a transform crops them.
        **kwargs: those of `PreparedImages`: val_fraction, test_fraction, fraction, transform, batch_size, seed, ...
    """

    def __init__(self, root: str, size: int | None = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(size is None or size >= 1, "size", size, "None or at least 1")
        self.root = root
        self.size = size

    def load(self) -> ImageSets:
        root = find(self.root, "root")
        if not os.path.isdir(os.path.join(root, "train")):
            train, classes = labelled_folder(root, self.size)
            return ImageSets(classes, train)
        train, classes = labelled_folder(os.path.join(root, "train"), self.size)
        others = {
            name: labelled_folder(os.path.join(root, name), self.size, classes)[0]
            for name in ("val", "test")
            if os.path.isdir(os.path.join(root, name))
        }
        return ImageSets(classes, train, others.get("val"), others.get("test"))

"""Images from one ``.npz`` file."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_recipes.datamodules.base import find, require
from lightning_recipes.datamodules.images import ImageDataModule, ImageSets, LabelledImages, as_nchw


def read_npz(path: str, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, without unpickling; one error names the keys that are not there."""
    full = find(path)
    with np.load(full, allow_pickle=False) as file:
        missing = [key for key in needed if key not in file.files]
        if missing:
            raise ValueError(f"path={path!r}: has no array {', '.join(missing)}; it has {', '.join(file.files)}")
        return {key: file[key] for key in file.files}


class ArrayDataModule(ImageDataModule):
    """Images from an ``.npz`` with x_train, y_train and, if they are there, x_val, y_val, x_test, y_test, class_names.

    Images are uint8 (N,H,W) or (N,H,W,C), kept as uint8 and converted when read; labels are integers from 0.

    Args:
        path: the file; ``~`` and ``$VARIABLES`` are expanded.
        size: edge length that the images are resized to; None for as they are.
        **kwargs: those of `PreparedImages`: val_fraction, test_fraction, fraction, transform, batch_size, seed, ...
    """

    def __init__(self, path: str, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(size is None or size >= 1, "size", size, "None or at least 1")
        self.path = path
        self.size = size

    def load(self) -> ImageSets:
        arrays = read_npz(self.path, ("x_train", "y_train"))

        def part(name: str) -> LabelledImages | None:
            if f"x_{name}" not in arrays:
                return None
            if f"y_{name}" not in arrays:
                raise ValueError(f"path={self.path!r}: has x_{name} but no y_{name}")
            return LabelledImages(as_nchw(arrays[f"x_{name}"], f"x_{name}"), arrays[f"y_{name}"], self.size)

        names = arrays.get("class_names", np.arange(int(arrays["y_train"].max()) + 1))
        return ImageSets([str(name) for name in names], part("train"), part("val"), part("test"))

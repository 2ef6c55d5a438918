"""A fully connected net for images, deep or wide, of the kind that is hard to train on its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class DeepMLP(nn.Sequential):
    """Flattened images through layers of [linear, batch norm, ReLU, dropout], and a linear head.

    Args:
        num_classes: outputs.
        in_chans: channels of the input (N,C,H,W).
        image_size: H and W.
        widths: of the hidden layers.
        dropout: after every hidden layer; 0 for none.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        image_size: int = 8,
        widths: Sequence[int] = (64,) * 24,
        dropout: float = 0.1,
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"widths={widths!r}: must hold a positive width for every hidden layer")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise([in_chans * image_size**2, *widths]):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) to logits (N,num_classes)."""
        return super().forward(images)

"""A plain multi-layer perceptron, as deep as one likes and as badly initialised."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn


class MLP(nn.Module):
    """``depth`` hidden ReLU layers of ``width`` on flattened images, and a linear head.

    The defaults are the network of the gradient-noise paper (Neelakantan et al. 2015) in its worst row but one: 20
    layers of 50 whose weights begin as N(0, 0.1^2). ``depth=0`` is a linear classifier.

    Args:
        num_classes: outputs.
        in_chans: channels of the input (N,C,size,size).
        size: edge length of the images.
        width: units of a hidden layer.
        depth: hidden layers.
        init: of all weights: "normal" is N(0, ``std``^2), "zeros", "he" (He et al. 2015), or "torch" for nn.Linear's
            own. Biases begin at 0, but for "torch".
        std: of "normal".
        bias: whether layers have one.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        size: int = 28,
        width: int = 50,
        depth: int = 20,
        init: Literal["normal", "zeros", "he", "torch"] = "normal",
        std: float = 0.1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if depth < 0 or width < 1:
            raise ValueError(f"depth={depth}, width={width}: must be at least 0 and 1")
        if init not in ("normal", "zeros", "he", "torch"):
            raise ValueError(f"init={init!r}: must be 'normal', 'zeros', 'he' or 'torch'")
        sizes = [in_chans * size * size, *[width] * depth]
        self.layers = nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(sizes)))
        self.head = nn.Linear(sizes[-1], num_classes, bias)
        for layer in [*self.layers, self.head]:
            _begin(layer, init, std)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def _begin(layer: nn.Linear, init: str, std: float) -> None:
    if init == "torch":
        return
    if init == "normal":
        nn.init.normal_(layer.weight, std=std)
    elif init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

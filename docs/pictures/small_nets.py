"""Small things that are trained for pictures, each once and in well under a second. They draw nothing."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_recipes.datamodules.xor_clusters import XORClusters, balanced_draw
from lightning_recipes.modules.two_layer_relu import even_part, odd_part
from pictures import _digits


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in [0, 1] as rows ``[1797, 64]``, and their labels."""
    images, labels = _digits()
    return torch.tensor(images.reshape(len(images), -1), dtype=torch.float32), torch.tensor(labels)


def softmax_regression(
    x: Tensor, y: Tensor, steps: int, start: Tensor | None = None, lr: float = 0.5, classes: int = 10
) -> Tensor:
    """A linear classifier by full-batch descent: ``[classes, features]``."""
    weight = (torch.zeros(classes, x.shape[1]) if start is None else start).clone()
    onehot = F.one_hot(y, classes).float()
    for _ in range(steps):
        weight -= lr * ((x @ weight.T).softmax(1) - onehot).T @ x / len(x)
    return weight


@functools.cache
def on_digits() -> Tensor:
    """A linear classifier of the first 1,200 digits after a little training."""
    x, y = digits()
    return softmax_regression(x[:1200], y[:1200], 300)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """Digits moved to the right by some pixels, ``[n, 64]``."""
    moved = torch.roll(x.reshape(-1, 8, 8), by, 2)
    moved[..., :by] = 0
    return moved.reshape(len(x), -1)


@functools.cache
def grokking(omega: float, steps: int = 11) -> dict[str, list[float]]:
    """A two-layer ReLU network on XOR clusters with flipped labels, as the paper has it but smaller: accuracy on the
    training labels and on clean test samples, and the linear share, at every step from 0 on."""
    n, p, m, rate = 160, 2500, 100, 0.01
    draws = torch.Generator().manual_seed(0)
    means = torch.zeros(2, p)
    means[0, 0] = means[1, 1] = 11.0
    train = XORClusters(*balanced_draw(n, 0.1, draws), means, draws)
    test = XORClusters(*balanced_draw(400, 0.0, draws), means, draws)
    (x, y), (tx, ty) = train.tensors, test.tensors
    w, a = omega * torch.randn(m, p, generator=draws), torch.tensor([1.0, -1.0]).repeat(m // 2) / m**0.5
    found: dict[str, list[float]] = {"train": [], "test": [], "linear": []}
    for step in range(steps + 1):
        odd, even = odd_part(w, a, tx), even_part(w, a, tx)
        if step:
            found["train"].append(float((((x @ w.T).relu() @ a > 0) == (y > 0)).float().mean()))
            found["test"].append(float(((odd + even > 0) == (ty > 0)).float().mean()))
            found["linear"].append(float(odd.square().mean() / (odd.square() + even.square()).mean()))
        pull = torch.sigmoid(-y * ((x @ w.T).relu() @ a)) * y
        w = w + rate / n * a[:, None] * ((((x @ w.T) > 0) * pull[:, None]).T @ x)
    return found


def valley(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A loss in two weights for pictures of gradients, with a valley that gets wider to the right: value, gradient."""
    narrow = (1 - np.tanh(x)) / 2
    value = 0.3 * (x - 1) ** 2 + 0.3 * y**2 + 0.9 * narrow * y**4
    return value, np.stack([0.6 * (x - 1) - 0.45 * y**4 / np.cosh(x) ** 2, 0.6 * y + 3.6 * narrow * y**3])

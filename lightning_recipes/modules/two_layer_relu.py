"""The two-layer ReLU network without biases whose training is understood step by step.

Xu, Wang, Frei, Vardi, Hu, 2024 (https://arxiv.org/abs/2310.02541), as `XORClusterDataModule` has it. Only the first
layer trains, by full-batch gradient descent of constant rate:

    f(x) = sum_j a_j relu(<w_j, x>),   a_j = +-1 / sqrt(m) for good,   w_j ~ N(0, omega^2 I)
    L(W) = (1 / n) sum_i log(1 + exp(-y_i f(x_i))),   W <- W - alpha grad L

For omega so small that f is about 0 the first step is known in closed form (:func:`first_step`). It fits every sample
and is linear in x but for the part of x that belongs to it alone; later steps grow the even part of f, which tells the
clusters apart (:func:`odd_part`, :func:`even_part`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.modules.on_pairs import OnPairs


def first_step(w: Tensor, a: Tensor, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """W after one step from weights so small that every f(x_i) is 0:
    w_j + (alpha a_j / 2n) sum_i y_i 1[<w_j, x_i> > 0] x_i.

    Args:
        w: ``[m, p]``.
        a: ``[m]``.
        x: ``[n, p]``.
        y: ``[n]``, -1 and 1.
        alpha: rate.

    Returns:
        ``[m, p]``.
    """
    active = (w @ x.T > 0).to(x.dtype)
    return w + alpha / (2 * len(x)) * a[:, None] * ((active * y) @ x)


def odd_part(w: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """(f(x) - f(-x)) / 2 = a^T W x / 2, ``[n]``: what of the network is linear."""
    return x @ (a @ w) / 2


def even_part(w: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """(f(x) + f(-x)) / 2 = sum_j a_j |<w_j, x>| / 2, ``[n]``."""
    return (x @ w.T).abs() @ a / 2


class TwoLayerReLU(OnPairs):
    """f(x) = sum_j a_j relu(<w_j, x>) without biases, of which ``hidden`` trains by plain SGD and ``out`` does not.

    Batches are (x ``[n, p]``, y ``[n]``), y -1 and 1 in floating point or class indices 0 and 1. Logs train/loss and,
    for val and test, loss and acc. Train it in fp32: gradients of a sample are of size lr / n, and in half precision
    first weights of size omega vanish.

    Args:
        p: dimension of x.
        m: hidden units.
        lr: alpha, 1/(n p) to 1/p.
        omega: standard deviation of the first weights of the hidden layer.
        seed: of the first weights and the signs.

    Raises:
        ValueError: for bad arguments.
    """

    paper = Paper(
        "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data",
        "Z. Xu, Y. Wang, S. Frei, G. Vardi, W. Hu",
        2024,
        "https://arxiv.org/abs/2310.02541",
    )
    does = "Trains the first layer of a two-layer ReLU network from tiny weights, as the theory of grokking has it."
    use_when = "You want to see a network overfit in one step and generalise some steps later."
    costs = "Two matrix products a step."
    purpose = "modules"

    def __init__(self, p: int = 10_000, m: int = 200, lr: float = 1e-4, omega: float = 1e-7, seed: int = 0) -> None:
        super().__init__()
        for name, value, ok in (("p", p, p >= 1), ("m", m, m >= 1), ("lr", lr, lr > 0), ("omega", omega, omega > 0)):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {'at least 1' if name in 'pm' else 'positive'}")
        self.save_hyperparameters()
        draws = generator(seed, "TwoLayerReLU")
        self.lr = lr
        # made without nn.Linear's own draws, which come from the global state
        self.hidden, self.out = nn.Linear(p, m, bias=False, device="meta"), nn.Linear(m, 1, bias=False, device="meta")
        self.hidden.weight = nn.Parameter(omega * torch.randn(m, p, generator=draws))
        signs = 2 * torch.randint(2, (1, m), generator=draws) - 1
        self.out.weight = nn.Parameter(signs / m**0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, p]`` to ``[n]``; its sign is the class."""
        return self.out(self.hidden(x).relu())[:, 0]

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Mean of log(1 + exp(-y f))."""
        return F.soft_margin_loss(f, signed(y).to(f.dtype))

    def measures(self, f: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Accuracy."""
        return {"acc": ((f > 0) == (y > 0)).float().mean()}

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probability of class 1, ``[n]``."""
        return super().predict_step(batch, batch_idx).sigmoid()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.hidden.weight], lr=self.lr)


def signed(y: Tensor) -> Tensor:
    """Labels -1 and 1 of either kind: floating ones are that already, class indices are 0 and 1."""
    return y if y.is_floating_point() else 2 * y - 1

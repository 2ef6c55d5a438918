"""Ridge regression on random features, solved in closed form.

J. B. Simon, D. Karkada, N. Ghosh, M. Belkin, "More is Better in Modern Machine Learning", ICLR 2024
(https://arxiv.org/abs/2311.14646): with features h of k numbers (the mean over features is the kernel, so that the
ridge means the same at every width)

    w = argmin sum_n (y_n - w h_n)^2 + ridge |w|^2

The features come with the batch (`GaussianRFDataModule`) or are those of a random layer, relu(W x + b) / sqrt(k).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_recipes.core.distributed import broadcast_
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.head_fit import LinearHead
from lightning_recipes.core.probe import encode, training_samples
from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.ridge_theory import ridge_readout
from lightning_recipes.core.spectrum import spectrum
from lightning_recipes.modules.on_pairs import OnPairs


class RandomFeatureRegressor(OnPairs):
    """y = w h without a bias, at the ridge optimum from the start: its steps train nothing.

    Batches are (h ``[n, k]`` or x, y ``[n]``). Logs train/loss and, for val and test, loss: mean squared errors.

    Args:
        k: features.
        ridge: added to the kernel matrix, without 1/n; at 0 the solution of least norm.
        n_inputs: of the random layer; None for batches of features.
        seed: of the random layer.

    Raises:
        ValueError: for bad arguments.
        RecipeError: before the first step, for batches of another size.
    """

    paper = Paper(
        "More is Better in Modern Machine Learning: when Infinite Overparameterization is Optimal and Overfitting is"
        " Obligatory",
        "J. B. Simon, D. Karkada, N. Ghosh, M. Belkin",
        2024,
        "https://arxiv.org/abs/2311.14646",
        "https://github.com/dkarkada/more-is-better",
    )
    does = "Fits ridge regression on random features in closed form."
    use_when = "You want to see what width, data and the ridge do where theory knows the test error."
    costs = "An eigendecomposition of a matrix of side min(n, k), once."
    purpose = "modules"

    def __init__(self, k: int = 256, ridge: float = 0.1, n_inputs: int | None = None, seed: int = 0) -> None:
        super().__init__()
        for name, value, ok, allowed in (
            ("k", k, k >= 1, "at least 1"),
            ("ridge", ridge, 0 <= ridge < float("inf"), "at least 0"),
            ("n_inputs", n_inputs, n_inputs is None or n_inputs >= 1, "None or at least 1"),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}")
        self.save_hyperparameters()
        self.k, self.ridge, self.n_inputs = k, ridge, n_inputs
        if n_inputs is not None:
            draws = generator(seed, "RandomFeatureRegressor")
            self.register_buffer("weight", torch.randn(k, n_inputs, generator=draws) / n_inputs**0.5)
            self.register_buffer("bias", 0.1 * torch.randn(k, generator=draws))
        self.readout = nn.Linear(k, 1, bias=False, device="meta")  # without its own draws
        self.readout.weight = nn.Parameter(torch.zeros(1, k))

    def features(self, x: Tensor) -> Tensor:
        """h ``[n, k]`` of a batch's inputs."""
        if self.n_inputs is None:
            return x
        return nn.functional.linear(x.flatten(1), self.weight, self.bias).relu() / self.k**0.5

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ...]`` to ``[n]``."""
        return self.readout(self.features(x))[:, 0]

    def on_fit_start(self) -> None:
        now: dict[str, Tensor] = {}

        def run(batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            x, y = batch
            now["h"] = self.features(x)
            if now["h"].shape[1] != self.k:
                raise RecipeError(f"k={self.k}: the batch has {now['h'].shape[1]} features")
            return y.reshape(len(y), 1)

        found = encode(self.trainer, self, lambda: now, training_samples(self.trainer), run=run, full_precision=True)
        solved = ridge_readout(spectrum(found.features["h"], found.targets, centred=False), self.ridge)
        LinearHead(solved, torch.zeros(1), 0, True).write(self.readout)
        broadcast_([self.readout.weight], self.trainer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # Lightning wants one

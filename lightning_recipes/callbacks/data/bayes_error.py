"""How much Bayes error a module's own features have, while anybody's training runs.

Of the paper of ``UnlearnableDataModule``: Zhang, Sun, Lim, Zhang, "Towards Provably Unlearnable Examples via Bayes
Error Optimisation", AAAI 2026 (https://arxiv.org/abs/2511.08191). With features z = phi(x) / max |phi(x)| of samples x
with labels y, the estimate is the mean of

    e_i = 1 - max_c p_ic,   p_ic = share of class c among the j != i, each weighing exp(-||z_i - z_j||^2 / (2 sigma^2))

(`lightning_recipes.core.bayes_error`). It falls as a network pulls the classes apart in its features, and stays high
where they are mixed up: on protected training images, or on wrong labels as long as they are not learned by heart.

Costs a forward pass over the samples that are measured, and their kernel in blocks, in time O(n^2 d).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_recipes.core.bayes_error import Kernel, bayes_error, max_abs_scaled
from lightning_recipes.core.diagnostics import History, where_to_draw
from lightning_recipes.core.distributed import decided_on_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.head_fit import where_to_fit
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, bar, encode, samples_of, some_of, training_samples, validation_samples
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.datamodules.unlearnable import PAPER


def estimate(features: Tensor, labels: Tensor, sigma: float = 0.3, kernel: Kernel = "rbf") -> Tensor:
    """The Bayes error of a labelled set by features of any scale, a scalar.

    Args:
        features: ``[n, d]``.
        labels: ``[n]`` integers from 0.
        sigma: width of the kernel, of features whose largest absolute value is 1.
        kernel: 'rbf' or 'sigmoid'.
    """
    return bayes_error(max_abs_scaled(features), labels, 1 + int(labels.max()), sigma, kernel)


class BayesErrorMonitor(Recipe):
    """Estimate the Bayes error of the training or validation samples by the module's own features, without a trace in
    the run.

    Logs ``bayes_error/estimate`` after validations, and draws it at the end of a fit. Features are those of the module
    in eval mode, of all ranks together.

    Args:
        layer: the part of the module whose output, flattened, are the features; None for the input of the last linear
            layer.
        every_n_epochs: measure in the validation of every n-th training epoch.
        sigma: width of the kernel, of features whose largest absolute value is 1.
        max_samples: measure on at most so many, drawn once.
        samples: 'train' for the training samples (as an evaluation sees them, where the data module says how), 'val'
            for the first validation set.
        kernel: 'rbf', or 'sigmoid' of the features' inner product.
        criterion: which loss of the module's training step to observe for the labels, where it cannot be found.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).
        seed: of the samples drawn.

    Raises:
        RecipeError: for bad arguments; in setup for a layer that is not there; before the first step for training data
            that are not read by index; in a fit's sanity check, or else in the first validation, for such validation
            data, features that are not one vector a sample, and targets that are no classes.
    """

    paper = PAPER
    does = "Estimates the Bayes error of a data set by the module's own features while training runs."
    use_when = (
        "You want to know how much of the labels the features cannot tell, on protected or noisy data for example."
    )
    costs = "A forward pass over max_samples samples and an n x n kernel every so many epochs."
    log_prefix = "bayes_error"
    free_on_resume = frozenset({"draw"})

    def __init__(
        self,
        layer: str | None = None,
        every_n_epochs: int = 1,
        sigma: float = 0.3,
        max_samples: int = 5000,
        samples: Literal["train", "val"] = "train",
        kernel: Kernel = "rbf",
        criterion: str | int | None = None,
        draw: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(layer is None or bool(layer), self, "layer", layer, "None or the path of a part")
        check_argument(every_n_epochs >= 1, self, "every_n_epochs", every_n_epochs, "at least 1")
        check_argument(sigma > 0, self, "sigma", sigma, "positive")
        check_argument(max_samples >= 2, self, "max_samples", max_samples, "at least 2")
        check_argument(samples in ("train", "val"), self, "samples", samples, "'train' or 'val'")
        check_argument(kernel in ("rbf", "sigmoid"), self, "kernel", kernel, "'rbf' or 'sigmoid'")
        self.layer, self.every_n_epochs, self.sigma, self.max_samples = layer, every_n_epochs, sigma, max_samples
        self.samples, self.kernel, self.criterion, self.draw, self.seed = samples, kernel, criterion, draw, seed
        self._history = History()
        self._taps: Taps | None = None

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if not plan.trainer.enable_validation:
            rank_zero_warn("BayesErrorMonitor measures in validations, and this fit has none")
            return

        def tap() -> None:
            point = (head_input(plan.module)[0], "input") if self.layer is None else (self.layer, "output")
            self._taps = Taps(plan.module, {"features": point})
            self._taps.open()

        plan.after_surgery(tap)
        plan.at_end(self._let_go)

    def _let_go(self) -> None:
        if self._taps is not None:
            self._taps.close()
        self._taps = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._taps is not None and self.samples == "train":
            with speaking_for(self):
                training_samples(trainer)  # asked for now, that bad ones are no late error

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or self._taps is None or not due:
            return
        with speaking_for(self):
            if trainer.sanity_checking:  # a fit that cannot be measured shall not start
                self._encode(trainer, pl_module, validation_samples(trainer), 2 * rank_and_world()[1])
                return
            samples = training_samples(trainer) if self.samples == "train" else validation_samples(trainer)
            features, labels = self._encode(trainer, pl_module, samples, self.max_samples)
            device = where_to_fit(pl_module)
            value = decided_on_rank_zero(
                lambda: float(estimate(features.to(device), labels.to(device), self.sigma, self.kernel)), trainer
            )
        self.log("bayes_error/estimate", value, rank_zero_only=False)
        self._history.add(trainer.global_step, {"estimate": value})

    def _encode(
        self, trainer: pl.Trainer, module: pl.LightningModule, samples: Samples, most: int
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of at most so many samples, the same ones on every rank."""
        chosen = some_of(samples.total, most, self.seed, "BayesErrorMonitor")
        found = encode(
            trainer,
            module,
            self._read,
            samples_of(samples.loader, chosen=chosen),
            self.criterion,
            bar(trainer, "Bayes error"),
        )
        labels = found.targets
        if labels.dim() == 2 and labels.is_floating_point():
            labels = labels.argmax(1)  # soft targets
        if labels.dim() != 1 or labels.is_floating_point():
            raise RecipeError(
                f"needs classes as targets; the observed loss got {str(labels.dtype)[6:]} {list(labels.shape)}"
            )
        return found.features["features"], labels

    def _read(self) -> dict[str, Tensor]:
        value = self._taps["features"]
        return {"features": value.flatten(1) if value.dim() > 1 else value}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self.draw and self._history.steps and trainer.is_global_zero and folder is not None:
            self._history.draw(folder / "bayes_error.png", "Bayes error by the module's features", "estimate")

    def state(self) -> dict[str, Any]:
        return {"history": self._history.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._history.load(state["history"])

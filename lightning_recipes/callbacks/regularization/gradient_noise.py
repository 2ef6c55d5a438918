"""GradientNoise: Gaussian noise of decaying variance on every gradient.

Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015
(https://arxiv.org/abs/1511.06807). No code was released; the paper's text decides.

With t = 0, 1, 2, ... the optimizer steps and g_t the gradient of a step, accumulated, averaged over ranks and clipped:

    sigma_t^2 = eta / (1 + t)^gamma                   (the VARIANCE decays: sigma_t = sqrt(eta) (1 + t)^(-gamma / 2))
    g_t <- g_t + N(0, sigma_t^2)                      (every element on its own, anew every step)

and the optimizer, whichever it is, sees the sum. This is the one exception to 'clipping sees the final gradient': the
noise comes after clipping, as the paper says, or a large draw would be clipped together with the gradient. Public
re-implementations disagree; several take the variance for the standard deviation, or let sigma decay like sigma^2.

The noise is drawn from a generator of its own, seeded by (seed, t): the same on every rank, after every resume, and
nobody else's draws are moved. A CPU and a GPU draw other numbers. Costs one normal number a parameter and step, and a
buffer for some four million of them. Under Adam a gradient far below sigma is drowned: such a weight walks at random by
the learning rate; keep weight decay, or a short `stop_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_recipes.core import select
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.gradients import global_norm, optimized
from lightning_recipes.core.noise import add_noise_
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.step import prefix

_DROWNED, _STEPS = 100.0, 50  # noise so many times the gradient, for so many steps, is worth a word


def deviation(step: int, eta: float, gamma: float) -> float:
    """sigma_t, the standard deviation of the noise at an optimizer step, counted from 0."""
    return sqrt(eta) * (1 + step) ** (-gamma / 2)


class GradientNoise(Recipe):
    """Add Gaussian noise to the gradient of every optimizer step, with a variance that decays.

    Steps are counted from 0, all that this callback has seen; a step that the fp16 scaler skips counts too, as it does
    in ``trainer.global_step``. Parameters without a gradient (frozen, unused) get no noise.

    Args:
        eta: variance at step 0; 0 switches the recipe off. The paper chose among 0.01 (MNIST), 0.3 and 1.0 (Adam):
            deeper networks need more, and too much harms.
        gamma: exponent with which the variance decays; 0 keeps it constant.
        seed: of the noise, which depends on (seed, step) alone.
        start_step, stop_step: noise is added from the one on and before the other; None never stops. Steps count from 0
            all the same.
        parameters: which get noise: names, module paths or `*` patterns ('head' finds the head), or a function of
            (name, parameter); None is everything that trains.
        after_clipping: False adds the noise before clipping, which then clips both together (not the paper's).

    Raises:
        RecipeError: for bad arguments; in setup for `parameters` that choose none, embeddings with sparse gradients,
            manual optimization, LBFGS, and a fused optimizer under fp16; in the first step for another sparse gradient
            and an optimizer that asks for several gradients an update.
    """

    paper = Paper(
        "Adding Gradient Noise Improves Learning for Very Deep Networks",
        "A. Neelakantan, L. Vilnis, Q. V. Le, I. Sutskever, L. Kaiser, K. Kurach, J. Martens",
        2015,
        "https://arxiv.org/abs/1511.06807",
    )
    does = "Adds Gaussian noise of decaying variance to every gradient."
    use_when = "A very deep or badly initialised network does not begin to train; not one that trains well already."
    costs = "One normal number a parameter and step; no extra pass."
    refuses: ClassVar[Mapping[str, str]] = {
        "LangevinMixture": "both add noise, and what is sampled at two temperatures follows neither law"
    }
    comes_after: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("GLAD", "NormalizedGD"), "the noise is added to the gradient that it makes"
    )
    free_on_resume = frozenset({"parameters"})  # a function has no name that a later process knows; the choice counts

    def __init__(
        self,
        eta: float = 0.01,
        gamma: float = 0.55,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int | None = None,
        parameters: str | list[str] | Callable[[str, Parameter], bool] | None = None,
        after_clipping: bool = True,
    ) -> None:
        super().__init__()
        check_argument(0 <= eta < float("inf"), self, "eta", eta, "a variance, at least 0 and finite")
        check_argument(0 <= gamma < float("inf"), self, "gamma", gamma, "at least 0 and finite")
        check_argument(start_step >= 0, self, "start_step", start_step, "at least 0")
        ends = stop_step is None or stop_step > start_step
        check_argument(ends, self, "stop_step", stop_step, f"None or above start_step={start_step}")
        some = parameters is None or callable(parameters) or len(parameters) > 0
        check_argument(some, self, "parameters", parameters, "None, a function, or names of at least one part")
        self.eta, self.gamma, self.seed, self.parameters = eta, gamma, seed, parameters
        self.start_step, self.stop_step, self.after_clipping = start_step, stop_step, after_clipping
        self._steps = 0
        self._drowned: int | Tensor = 0  # steps in a row
        self._warned = False
        self._names: list[str] | None = None
        self._plan: Plan | None = None
        self._places: dict[Tensor, int] = {}

    @property
    def neutral(self) -> bool:
        return self.eta == 0

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if plan.trainer.global_step == 0:  # else this fit goes on where another one ended
            self._steps = self._drowned = 0
            self._warned = False
        self._plan = plan
        plan.at_end(self._finish)
        plan.after_surgery(self._choose)
        plan.edit_gradients(self._add, "after_clip" if self.after_clipping else "before_clip", once=True)

    def _choose(self) -> None:
        """Which parameters get noise, and the order in which theirs is drawn: that of their names."""
        module, stored = self._plan.module, (self._plan.section or {}).get("state", {})
        self._names = None
        if self.parameters is not None:
            self._names = sorted(select.parameters_by(module, self.parameters, "parameters"))
        if stored and stored["names"] != self._names:
            raise RecipeError(
                "the checkpoint was written with other arguments: `parameters` chose"
                f" {_count(stored['names'])} there and chooses {_count(self._names)} here. Resume with the arguments of"
                " the checkpoint, or start a new fit from its weights"
            )
        named = sorted(module.named_parameters(), key=lambda pair: pair[0])
        chosen = None if self._names is None else set(self._names)
        self._places = {p: i for i, (name, p) in enumerate(named) if chosen is None or name in chosen}
        for name, part in module.named_modules():
            sparse = isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad
            if sparse and part.weight in self._places:
                raise RecipeError(f"{name} has sparse gradients, and noise is dense; make it with sparse=False")

    def _finish(self) -> None:
        self._plan, self._places = None, {}

    def _gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Those that get noise, in order; what the optimizer holds and the module has not comes last."""
        places, last = self._places, len(self._places)
        found = [p for p in optimized(optimizer) if self._names is None or p in places]
        found.sort(key=lambda p: places.get(p, last))
        gradients = [p.grad for p in found]
        if any(g.layout is not torch.strided for g in gradients):
            raise RecipeError("GradientNoise: a gradient is sparse, and noise is dense; make it with sparse=False")
        return gradients

    def _add(self, optimizer: Optimizer) -> None:
        step, self._steps = self._steps, self._steps + 1
        if step < self.start_step or (self.stop_step is not None and step >= self.stop_step):
            return
        gradients = self._gradients(optimizer)
        if not gradients:
            return
        sigma = deviation(step, self.eta, self.gamma)
        ratio = sigma * sqrt(sum(g.numel() for g in gradients)) / global_norm(gradients)
        add_noise_(gradients, sigma, self.seed, "GradientNoise", step)
        self._log(sigma, ratio)
        self._warn_if_drowned(step, ratio)

    def _log(self, sigma: float, ratio: Tensor) -> None:
        """In the steps that the Trainer's loggers write: a log entry costs more than the noise of a small network."""
        trainer, every = self._plan.trainer, self._plan.trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            values = {"sigma": torch.full_like(ratio, sigma), "ratio": ratio}
            # Allowed here: edits run inside the hook `configure_gradient_clipping`.
            self._plan.module.log_dict({f"{prefix(self)}/{name}": value for name, value in values.items()})

    def _warn_if_drowned(self, step: int, ratio: Tensor) -> None:
        """After as many steps of warm-up; looked at once in so many steps, for it waits for the device."""
        since = step - self.start_step
        if since < _STEPS or self._warned:
            return
        self._drowned = torch.where(ratio > _DROWNED, self._drowned + 1, 0)
        if (since + 1) % _STEPS == 0 and int(self._drowned) >= _STEPS:
            self._warned = True
            rank_zero_warn(
                f"GradientNoise: in each of the last {_STEPS} steps the noise was more than {_DROWNED:.0f} times the"
                f" gradient; eta={self.eta} may be far too large, or the gradients have vanished"
            )

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps, "drowned": int(self._drowned), "names": self._names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._steps, self._drowned = state["steps"], state["drowned"]


def _count(names: Sequence[str] | None) -> str:
    return "all" if names is None else f"{len(names)} parameters, the first {names[0]!r}"

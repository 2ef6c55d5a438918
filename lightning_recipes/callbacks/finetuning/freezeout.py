"""FreezeOut: layers are frozen one after the other from the input on, each when its own learning rate has reached 0.

Brock, Lim, Ritchie, Weston, "FreezeOut: Accelerate Training by Progressively Freezing Layers", 2017
(https://arxiv.org/abs/1706.04983; code https://github.com/ajbrock/FreezeOut).

With layers 0..N from the input to the head and t the share of all optimizer steps that is done:

    t_i     = h(t_0 + (1 - t_0) i / N),   h(x) = x, x^2 or x^3
    lr_i(t) = 1/2 lr_i(0) (1 + cos(pi t / t_i)) until t_i, then frozen;   lr_i(0) = lr / t_i (scaled) or lr

Scaling gives every layer the same integral of its rate over the fit. A frozen layer is in eval mode, takes no part in
the backward pass and leaves the optimizer. Costs nothing; the backward pass gets shorter as training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn

from lightning_recipes.core import select
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.schedule import horizon
from lightning_recipes.core.silence import HeldInEval

POWERS = {"linear": 1, "squared": 2, "cubic": 3}


def freezing_times(count: int, t0: float, power: int) -> list[float]:
    """t_i of `count` layers from the input to the head, as shares of the fit; the last one is 1."""
    last = max(count - 1, 1)
    return [(t0 + (1 - t0) * i / last) ** power for i in range(count)] if count > 1 else [1.0]


def rate(t: float, end: float, scaled: bool) -> float:
    """lr_i(t) / lr of a layer that freezes at `end`; 0 from there on."""
    if t >= end:
        return 0.0
    start = 1 / end if scaled else 1.0
    return 0.5 * start * (1 + math.cos(math.pi * t / end))


class FreezeOut(Recipe):
    """Anneal every layer's rate to 0, the first layers sooner, and freeze a layer when it gets there.

    The module's own learning rate is the lr of the equations: keep it constant.

    Args:
        groups: 'auto' cuts the network into layers and head; or the layers from the head down, each a module path,
            parameter name or `*` pattern, or a list of them. 'head' finds the head.
        t0: t_0, when the first layer would freeze if h were linear, as a share of the fit.
        how: h, 'linear', 'squared' or 'cubic'.
        scale_lr: start the rate of layer i at lr / t_i, which keeps how far each one can move; False starts at lr.
        never: what is frozen from the start.

    Raises:
        RecipeError: before training, for a pattern that matches nothing, a parameter in two groups or in none,
            parameters that are in no optimizer, and a fit without an end.
    """

    paper = Paper(
        "FreezeOut: Accelerate Training by Progressively Freezing Layers",
        "A. Brock, T. Lim, J. M. Ritchie, N. Weston",
        2017,
        "https://arxiv.org/abs/1706.04983",
        "https://github.com/ajbrock/FreezeOut",
    )
    does = "Freezes layers one after the other from the input on, each when its own annealed rate has reached 0."
    use_when = "Training time matters and the first layers settle early."
    costs = "Nothing; the backward pass gets shorter as training goes on."
    refuses = {"ProgressiveUnfreezing": "both decide when a layer trains"}  # noqa: RUF012
    owns_training_set = True
    log_prefix = "freezeout"

    def __init__(
        self,
        groups: Literal["auto"] | Sequence[str | Sequence[str]] = "auto",
        t0: float = 0.8,
        how: Literal["linear", "squared", "cubic"] = "cubic",
        scale_lr: bool = True,
        never: Sequence[str] = (),
    ) -> None:
        super().__init__()
        ok = groups == "auto" or (not isinstance(groups, str) and len(groups) > 0 and all(map(len, groups)))
        check_argument(ok, self, "groups", groups, "'auto' or a list of groups, each a name or some names")
        check_argument(0 < t0 <= 1, self, "t0", t0, "in (0, 1]")
        check_argument(how in POWERS, self, "how", how, "'linear', 'squared' or 'cubic'")
        check_argument(not isinstance(never, str), self, "never", never, "a list of names")
        self.groups, self.t0, self.how, self.scale_lr, self.never = groups, t0, how, scale_lr, never
        self._plan: Plan | None = None
        self._layers: list[tuple[str, list[str]]] = []
        self._never: list[str] = []
        self._times: list[float] = []
        self._total = 0
        self._frozen_layers: list[nn.Module] = []
        self._done = -1  # layers that are frozen
        self._at = 0.0  # t of the claim that stands
        self._held = HeldInEval()

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if not plan.module.automatic_optimization:
            raise RecipeError(
                "FreezeOut needs automatic optimization: it changes rates at optimizer steps, and under manual"
                " optimization the module takes those itself"
            )
        self._plan = plan
        plan.parameters(self._first_claim)
        plan.at_end(self._finish)

    def _first_claim(self) -> Claim:
        groups, self._never = select.groups(self._plan.module, self.groups, self.never)
        self._layers = list(reversed(groups))
        self._times = freezing_times(len(self._layers), self.t0, POWERS[self.how])
        self._total = horizon(self._plan.trainer, "step", "FreezeOut")
        self._done = -1
        return self._claim(0.0 if self._plan.section is None else self._plan.section["state"]["t"])

    def _claim(self, t: float) -> Claim:
        """What is frozen at t, and the rates of the rest."""
        self._at = t
        done = sum(end <= t for end in self._times)
        frozen = frozenset(n for _, names in self._layers[:done] for n in names) | frozenset(self._never)
        if done != self._done:
            self._done, self._frozen_layers = done, select.parts_under(self._plan.module, frozen)
        rates = [rate(t, end, self.scale_lr) for end in self._times[done:]]
        scales = {n: r for (_, names), r in zip(self._layers[done:], rates) for n in names}
        return Claim(frozen=frozen, lr_scale=scales, changes=True)

    @property
    def _t(self) -> float:
        return min(self._plan.trainer.global_step / self._total, 1 - 1e-12)  # in the end the head has rate 0 still

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._plan is None:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            before = self._done
            self._plan.change_parameters(self._claim(self._t))
            if self._done != before:
                self._log()
        self._held.hold(self._frozen_layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is not None:
            self._log()

    def _log(self) -> None:
        values = {"freezeout/frozen_layers": self._done, "freezeout/trainable_params": self._plan.trainable_parameters}
        log_values(self._plan.trainer, values)

    def _finish(self) -> None:
        self._held.hold(())
        self._plan, self._frozen_layers = None, []

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What trains at the moment, so that a resume freezes before it wraps; the rest comes from the counters."""
        return {"t": self._at}

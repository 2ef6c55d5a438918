"""Progressive unfreezing with discriminative learning rates.

Goedicke-Fritz, Bous, Engel et al., "Site-Level Fine-Tuning with Progressive Layer Freezing", 2025
(https://arxiv.org/abs/2507.12269; code https://github.com/phflot/bpdneo-cxr, commit 2569116), whose official procedure
is progressive UNfreezing; the same callback serves Isong, "Building Efficient Lightweight CNN Models", 2025
(https://arxiv.org/abs/2501.15547) and ULMFiT's gradual unfreezing.

With the groups of a network from the head (0) down, E epochs, and times t_0 <= t_1 <= ...:

    group g trains from the start of epoch floor(t_g E) on;  rate of group g = s_g x rate of its optimizer group.

A group that sleeps takes no part in the backward pass, has no gradient and no optimizer state, and is not decayed; its
rate follows the schedule all the same. Costs nothing; saves the backward pass below the lowest group awake.

A linear probe may come first: so many epochs of AdamW on the head alone, whose state is thrown away; then the module's
own optimizers and schedules begin, as long as the epochs that are left, and E counts those. With all groups awake from
there on (at all 0) that is LP-FT (Kumar et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_recipes.core import select
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import from_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.parameters import Claim, batch_norms
from lightning_recipes.core.phases import Phase, PhasePlan
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.schedule import At, EveryN, Plateau, horizon
from lightning_recipes.core.silence import HeldInEval


def awake(times: Sequence[float], now: float) -> int:
    """How many groups train at a time: those whose own time has come.

    Args:
        times: non-decreasing, one a group, in the unit of `now`.
        now: epochs or optimizer steps done.
    """
    return sum(time <= now for time in times)


PAPER_SCALES = (1.0, 0.5, 0.25, 0.1)
PROBE_DECAY = 1e-4
_NOTHING_DONE = {"stage": 0, "stalls": 0, "best": math.inf, "waited": 0}


def group_scales(lr_scale: Literal["paper"] | Sequence[float] | float | None, count: int) -> list[float]:
    """The factor on the rate of each group, the head first.

    Given one by one, the last holding for every group further down; or as one ratio from each group to the next.
    'paper' is 1, 1/2, 1/4, 1/10 for as many groups as there are.

    Raises:
        RecipeError: when there are more factors than groups.
    """
    if lr_scale is None:
        return [1.0] * count
    if lr_scale == "paper":
        lr_scale = PAPER_SCALES[:count]
    if isinstance(lr_scale, (int, float)):
        return [float(lr_scale) ** depth for depth in range(count)]
    if len(lr_scale) > count:
        raise RecipeError(f"lr_scale has {len(lr_scale)} factors for {count} groups; give at most one a group")
    return [float(scale) for scale in lr_scale] + [float(lr_scale[-1])] * (count - len(lr_scale))


class ProgressiveUnfreezing(Recipe):
    """Train the head first, then one group of layers more at a time, each deeper one at a smaller rate.

    Args:
        groups: 'auto' cuts the network into head and layers (timm, torchvision, Hugging Face, Sequential and plain
            modules); or the groups from the head down, each a module path, parameter name or `*` pattern, or a list of
            them. 'head' finds the head. A group without parameters (pooling, dropout) is an empty step, with a warning.
        at: when each group starts to train: an int is an epoch, a float a fraction of ``max_epochs`` (rounded down);
            or ``At`` (also in steps), ``EveryN`` or ``Plateau`` (the next group when a metric stalls). With 'auto',
            layers below the last time given never train.
        lr_scale: factor on the rate of each group, the last one for all further down too; 'paper' is 1, 1/2, 1/4, 1/10;
            one number is the ratio from each group to the next (1/2.6 is ULMFiT's); None leaves the rates alone.
        weight_decay: decay of each group; None keeps the optimizer's. The paper's is (1e-5, 1e-4, 1e-4, 1e-4).
        never: what never trains, as in `groups`.
        bn: what frozen batch-norm layers do. 'follow': their weights follow the group, running statistics move (the
            paper's); 'train': their weights always train too (fastai's); 'eval': they normalise by, and keep, their
            stored statistics.
        probe_epochs: epochs of the linear probe at the start, part of ``max_epochs``; 0 leaves it out.
        probe_lr: its constant rate; the decay is the paper's 1e-4.
        mechanism: 'rewrap' switches gradients off and wraps DDP anew at each change, which saves the backward pass;
            'drop_grad' computes all gradients and drops the sleeping groups' before clipping, with no change of the
            wrapper or of a compiled graph; 'auto' is 'drop_grad' for a compiled module with more than 6 changes, else
            'rewrap'.

    Raises:
        RecipeError: before training, for times that decrease or do not match the groups, a pattern that matches
            nothing, a parameter in two groups or in none, parameters that are in no optimizer, a plateau in a fit
            without validation, and a probe that leaves no epoch; in the first validation for a plateau's metric that
            was not logged.
    """

    paper = Paper(
        "Site-Level Fine-Tuning with Progressive Layer Freezing: Towards Robust Prediction of Bronchopulmonary"
        " Dysplasia from Day-1 Chest Radiographs in Extremely Preterm Infants",
        "S. Goedicke-Fritz, M. Bous, A. Engel et al.",
        2025,
        "https://arxiv.org/abs/2507.12269",
        "https://github.com/phflot/bpdneo-cxr",
    )
    does = "Trains the head first and wakes one group of layers at a time, each deeper one at a smaller learning rate."
    use_when = "You fine-tune a pre-trained network on little data and full fine-tuning forgets or overfits."
    costs = "Nothing; the backward pass is shorter while lower layers sleep."
    owns_training_set = True

    def __init__(
        self,
        groups: Literal["auto"] | Sequence[str | Sequence[str]] = "auto",
        at: Sequence[int | float] | At | EveryN | Plateau = (0, 0.10, 0.30, 0.60),
        lr_scale: Literal["paper"] | Sequence[float] | float | None = "paper",
        weight_decay: Sequence[float] | None = None,
        never: Sequence[str] = (),
        bn: Literal["follow", "train", "eval"] = "follow",
        probe_epochs: int = 0,
        probe_lr: float = 1e-3,
        mechanism: Literal["auto", "rewrap", "drop_grad"] = "auto",
    ) -> None:
        super().__init__()
        self.groups, self.at, self.lr_scale, self.weight_decay = groups, at, lr_scale, weight_decay
        self.never, self.bn, self.mechanism = never, bn, mechanism
        self.probe_epochs, self.probe_lr = probe_epochs, probe_lr
        ok = groups == "auto" or (not isinstance(groups, str) and len(groups) > 0 and all(map(len, groups)))
        check_argument(ok, self, "groups", groups, "'auto' or a list of groups, each a name or some names")
        ok = isinstance(at, (At, EveryN, Plateau)) or (isinstance(at, Sequence) and not isinstance(at, str))
        check_argument(ok, self, "at", at, "a list of times, At, EveryN or Plateau")
        check_argument(not isinstance(never, str), self, "never", never, "a list of names")
        check_argument(bn in ("follow", "train", "eval"), self, "bn", bn, "'follow', 'train' or 'eval'")
        allowed = ("auto", "rewrap", "drop_grad")
        check_argument(mechanism in allowed, self, "mechanism", mechanism, "'auto', 'rewrap' or 'drop_grad'")
        check_argument(probe_epochs >= 0, self, "probe_epochs", probe_epochs, "at least 0")
        check_argument(probe_lr > 0, self, "probe_lr", probe_lr, "positive")
        one_by_one = isinstance(lr_scale, Sequence) and lr_scale != "paper"
        scales = lr_scale if one_by_one else [lr_scale] if isinstance(lr_scale, (int, float)) else [1.0]
        ok = len(scales) > 0 and all(isinstance(s, (int, float)) and s > 0 for s in scales)
        check_argument(ok, self, "lr_scale", lr_scale, "'paper', None, or positive: one a group or one ratio")
        check_argument(all(d >= 0 for d in weight_decay or []), self, "weight_decay", weight_decay, "non-negative")
        self._when = at if isinstance(at, (At, EveryN, Plateau)) else At(list(at))
        some = not isinstance(self._when, At) or len(self._when.at) > 0
        check_argument(some, self, "at", at, "the time of at least one group")
        self._names: list[tuple[str, list[str]]] = []
        self._always_frozen: frozenset[str] = frozenset()
        self._times: list[float] = []
        self._scales: list[float] = []
        self._sleeping: frozenset[str] = frozenset()
        self._frozen_norms: list[nn.Module] = []
        self._held = HeldInEval()
        self._probing = False
        self._drops = False
        self._stage = 0
        self._stalls = 0
        self._plan: Plan | None = None

    @property
    def neutral(self) -> bool:
        """All groups awake from the start at the optimizer's own rates, and nothing else asked for."""
        if not isinstance(self._when, At) or any(self._when.at) or self.groups == "auto":
            return False
        rates_kept = all(scale == 1 for scale in group_scales(self.lr_scale, len(self._when.at)))
        asks_more = self.weight_decay is not None or self.never or self.bn == "eval" or self.probe_epochs
        return rates_kept and not asks_more

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if not plan.module.automatic_optimization:
            raise RecipeError(
                "ProgressiveUnfreezing needs automatic optimization: it changes what trains at optimizer steps, and"
                " under manual optimization the module takes those itself"
            )
        if isinstance(self._when, Plateau) and not plan.trainer.enable_validation:
            raise RecipeError(
                "ProgressiveUnfreezing: at=Plateau(...) wakes groups after validations, and this fit has none; give it"
                " validation data, or give times"
            )
        self._plan, self._names = plan, []
        plan.parameters(self._first_claim)
        plan.at_end(self._finish)
        if self.probe_epochs:
            plan.phases(self._phases(plan.trainer.max_epochs))
        self.load_state(_NOTHING_DONE if plan.section is None else plan.section["state"])
        if self.mechanism == "drop_grad" or (self.mechanism == "auto" and _is_compiled(plan.module)):
            plan.edit_gradients(self._drop_gradients)  # 'auto' decides whether to drop once the groups are known

    def _phases(self, epochs: int | None) -> PhasePlan:
        main = (epochs or 0) - self.probe_epochs
        if main < 1:
            raise RecipeError(
                f"probe_epochs={self.probe_epochs} leaves no epoch of Trainer(max_epochs={epochs}) for what comes after"
            )
        probe = Phase("linear probe", self.probe_epochs, self._probe_optimizer)
        return PhasePlan([probe, Phase("main phase", main)], self._enter, reload_data=False)

    def _enter(self, phase: int) -> None:
        self._probing = phase == 0
        if self._names:  # at the boundary; at first the groups are not known yet
            self._stage = self._stage_now()
            self._plan.change_parameters(self._claim())
            self._log()

    def _probe_optimizer(self) -> Optimizer:
        """The head's own optimizer, which is gone with the probe."""
        head = set(self._names[0][1])
        parameters = [p for name, p in self._plan.module.named_parameters() if name in head]
        return AdamW(parameters, lr=self.probe_lr, weight_decay=PROBE_DECAY)

    def _first_claim(self) -> Claim:
        """Runs after surgery, so that adapters and merged names are where they will stay."""
        module, trainer = self._plan.module, self._plan.trainer
        self._names, never = self._resolve_groups(module)
        count = len(self._names)
        self._times = [0.0] if isinstance(self._when, Plateau) else self._main_times(count, trainer)
        self._scales = group_scales(self.lr_scale, count)
        if self.weight_decay is not None and len(self.weight_decay) != count:
            raise RecipeError(f"weight_decay has {len(self.weight_decay)} values for {count} groups; give one a group")
        self._always_frozen = frozenset(never)
        late = [name for (name, _), t in zip(self._names, self._times) if self._beyond(t)]
        if late:
            rank_zero_warn(
                f"ProgressiveUnfreezing: groups {late} never wake: their time is at or after the end of the fit"
            )
        self._drops = self.mechanism == "drop_grad" or (self.mechanism == "auto" and count > 7 and _is_compiled(module))
        self._stage = self._stage_now() if self._plan.section is None else self._stage
        self._tell(module)
        return self._claim()

    def _main_times(self, count: int, trainer: pl.Trainer) -> list[float]:
        """When each group wakes, counted from the start of the fit."""
        before = self.probe_epochs
        if before and self._when.unit == "step":
            before *= horizon(trainer, "step", "probe_epochs") // trainer.max_epochs
        return [before + time for time in self._when.times(count, trainer, self.probe_epochs)]

    def _resolve_groups(self, module: pl.LightningModule) -> tuple[list[tuple[str, list[str]]], list[str]]:
        groups, never = select.groups(module, self.groups, self.never)
        if self.groups == "auto":
            count = len(self._when.at) if isinstance(self._when, At) else len(groups)
            if count > len(groups):
                found = [name for name, _ in groups]
                raise RecipeError(f"at has {count} times and the network {len(groups)} groups {found}")
            groups, never = groups[:count], never + [n for _, names in groups[count:] for n in names]
        empty = [name for name, names in groups if not names]
        if empty:
            rank_zero_warn(
                f"ProgressiveUnfreezing: groups {empty} have no parameters (pooling, dropout): their steps change"
                " nothing; leave them out"
            )
        return groups, never

    def _claim(self) -> Claim:
        """What sleeps at this stage, and every group's rate and decay."""
        sleeping = {n for _, names in self._names[self._stage :] for n in names} | self._always_frozen
        named = () if self.groups == "auto" else [n for _, names in self._names for n in names]
        norms = batch_norms(self._plan.module, sleeping)
        if self.bn == "train":
            paths = [select.lightning_path(self._plan.module, norm) for norm in norms]
            sleeping -= {n for n in sleeping if n.rpartition(".")[0] in paths}
        self._frozen_norms, self._sleeping = norms, frozenset(sleeping)
        scales, decays = ((), ()) if self._probing else (self._scales, self.weight_decay or ())  # the probe has its own
        return Claim(
            frozen=self._sleeping & self._always_frozen if self._drops else self._sleeping,
            thawed=frozenset(named),
            lr_scale={n: s for (_, names), s in zip(self._names, scales) for n in names},
            weight_decay={n: d for (_, names), d in zip(self._names, decays) for n in names},
            changes=not self._drops,
        )

    def _tell(self, module: pl.LightningModule) -> None:
        sizes = {name: p.numel() for name, p in module.named_parameters()}
        lines = [
            f"  {name:<32} {sum(sizes[n] for n in names):>11,} parameters   from {_when(time)}   rate x {scale:g}"
            for (name, names), time, scale in zip(
                self._names, self._times + [math.nan] * (len(self._names) - len(self._times)), self._scales
            )
        ]
        if self._always_frozen:
            lines.append(f"  {'never':<32} {sum(sizes[n] for n in self._always_frozen):>11,} parameters")
        rank_zero_info("ProgressiveUnfreezing:\n" + "\n".join(lines))

    # -- the schedule ------------------------------------------------------------------------------------------------

    def _beyond(self, time: float) -> bool:
        trainer = self._plan.trainer
        limit = trainer.max_epochs if getattr(self._when, "unit", "epoch") == "epoch" else trainer.max_steps
        return limit is not None and 0 < limit <= time

    def _stage_now(self) -> int:
        if self._probing:
            return 1
        if isinstance(self._when, Plateau):
            return min(1 + self._stalls, len(self._names))
        trainer = self._plan.trainer
        return awake(self._times, trainer.current_epoch if self._when.unit == "epoch" else trainer.global_step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral:  # nothing was declared; groups that do not fit the module are an error all the same
            with speaking_for(self):
                self._when.times(len(self._resolve_groups(pl_module)[0]), trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Every batch, not every epoch: after a resume Lightning skips on_train_epoch_start. Never inside a window.
        if self._plan is None:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._stage != (stage := self._stage_now()):
            self._stage = stage
            self._plan.change_parameters(self._claim())
            self._log()
        if self.bn == "eval":
            self._held.hold(self._frozen_norms)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is not None:
            self._log()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is None or not isinstance(self._when, Plateau) or trainer.sanity_checking or self._probing:
            return
        value = trainer.callback_metrics.get(self._when.monitor)
        if value is None:
            known = sorted(trainer.callback_metrics)
            raise RecipeError(
                f"ProgressiveUnfreezing: Plateau monitors {self._when.monitor!r}, which was not logged; logged are"
                f" {known}"
            )
        self._stalls += from_rank_zero(self._when.stalled(float(value)), trainer)

    def _drop_gradients(self, optimizer: Optimizer) -> None:
        if self._drops:
            for name, parameter in self._plan.module.named_parameters():
                if name in self._sleeping:
                    parameter.grad = None

    def _log(self) -> None:
        values = {"unfreeze/stage": self._stage, "unfreeze/trainable_params": self._plan.trainable_parameters}
        log_values(self._plan.trainer, values)

    def _finish(self) -> None:
        self._held.hold(())
        self._plan, self._frozen_norms = None, []

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        when = self._when
        plateau = {"best": when.best, "waited": when.waited} if isinstance(when, Plateau) else {}
        return {**_NOTHING_DONE, "stage": self._stage, "stalls": self._stalls, **plateau}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._stage, self._stalls = state["stage"], state["stalls"]
        if isinstance(self._when, Plateau):
            self._when.best, self._when.waited = state["best"], state["waited"]


def _when(time: float) -> str:
    return "a plateau" if math.isnan(time) else "the start" if time == 0 else f"{time:g}"


def _is_compiled(module: pl.LightningModule) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None or any(
        type(part).__name__ == "OptimizedModule" for part in module.modules()
    )

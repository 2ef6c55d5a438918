"""WiSEFT and BANG: the mean of the pre-trained and the fine-tuned weights, for inputs from elsewhere.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (https://arxiv.org/abs/2109.01903; code
https://github.com/mlfoundations/wise-ft, commit 58b7a4b); Lin et al., "Spurious Feature Diversification Improves
Out-of-distribution Generalization", ICLR 2024 (https://arxiv.org/abs/2309.17230; code
https://github.com/linyongver/SpuriousFeatureDiversification, commit 5aad511, which has no BANG).

With the weights theta_0 before fine-tuning and theta_1 after it:

    theta_a = (1 - a) theta_0 + a theta_1
    theta_a = ((1 - a) f_0 theta_0 + a f_1 theta_1) / ((1 - a) f_0 + a f_1)       (fisher=True; f: diagonal Fishers)

BANG fine-tunes on softened targets first, so that neither end is over-confident and dominates the mean:

    y' = (1 - s) y + s / C          and / or          x' = l x + (1 - l) x_perm,  y' = l y + (1 - l) y_perm

Looked at (``grid``): the share of samples that both ends get wrong and the mean gets right (FalseFalseTrue), the
reverse (TrueTrueFalse), and the mean of the largest probability of either end, on every validation loader.

The original averages every entry of the state dict, counters of batches and batch-norm statistics among them, which do
not average well; here buffers are by default those of the fine-tuned end (`buffers`). The paper's values of s and of
Mixup's alpha are not public; 0.1 and 0.2 are ours.

Costs nothing in training: a copy of the weights in main memory, which checkpoints hold too; at the end one evaluation a
grid point.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_recipes.core.averaging import (
    Swap,
    copied,
    distance,
    fisher_information,
    fisher_mean,
    interpolate,
    of_rank_zero_,
    tensors_of,
)
from lightning_recipes.core.batch_norm import recalibrate, statistics_names
from lightning_recipes.core.diagnostics import draw_curves, log_values, where_to_draw
from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import (
    Outcome,
    apart,
    classified,
    has_validation,
    on_device,
    outcomes,
    pass_through,
    training_loader,
    validation_loaders,
    where_it_trained,
)
from lightning_recipes.core.mixing import Mixing, as_probabilities, check_targets, smooth
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.random import key
from lightning_recipes.core.recipe import Paper, Recipe, StepRecipe
from lightning_recipes.core.select import network, parameters_under
from lightning_recipes.core.silence import gradients_allowed, modes_kept
from lightning_recipes.core.step import Step, observe

_OWNS_WEIGHTS = "both decide with which weights the network is evaluated"


def shares(pre: Tensor, fine: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Where the mean of two models differs from both of them.

    Args:
        pre, fine, mean: whether each sample is classified correctly, bool ``[n]``.

    Returns:
        counts ``fft`` (both wrong, the mean right) and ``ttf`` (both right, the mean wrong).
    """
    return {"fft": (~pre & ~fine & mean).sum(), "ttf": (pre & fine & ~mean).sum()}


def at_chance(correct: int, count: int, classes: int) -> bool:
    """Whether that many correct of `count` are no more than guessing gives, as far as so few samples can tell."""
    guessed = count / classes
    most = guessed + 2 * math.sqrt(guessed * (1 - 1 / classes))
    return correct <= most < count / 2


class WiSEFT(Recipe):
    """End a fine-tuning at the mean of the weights that it began from and those that it ended with.

    When the fit is over the module holds theta_a, and where checkpoints are written one more holds it
    (``...-wise-alpha=0.50.ckpt``, weights only). The checkpoints of the run itself hold the weights that train. With
    adapters beside it (``PEGO``, ``GLAD``) they are merged first: the mean of W and W + B A is W + a B A.

    A head that begins at random has no meaning at theta_0, and averaging halves its logits: begin from a zero-shot
    head, probe the head first, or leave it out of `scope`. Where ``reference="init"`` is no better than chance on the
    first batch, a warning says so.

    Args:
        alpha: weight of the fine-tuned end; 1 switches the averaging off.
        grid: weights at which the end of the fit measures accuracy on every validation loader, with 0, 1 and `alpha`
            added: ``wise/accuracy@0.50`` and so on, and a picture of the curve. Several loaders (the training
            distribution and shifted ones) are measured apart, under Lightning's suffix ``/dataloader_idx_N``. Choose
            alpha by data of the training distribution only.
        reference: theta_0: "init" is the module's weights when the fit begins, else the path of a ``.safetensors``,
            ``.pt``, ``.pth`` or ``.ckpt`` file.
        scope: what is averaged: module paths, parameter names or ``*`` patterns; None for everything. The rest is
            that of the fine-tuned end.
        fisher: weight each entry by its diagonal Fisher information at both ends, measured at the end of the fit on the
            training data: two passes with one backward a batch, two more copies of the weights on the device. The fit's
            own validations use the plain mean.
        buffers: of the mean: those of the fine-tuned end, interpolated too (integers are the fine-tuned end's), or
            batch-norm statistics measured anew on the training data (one pass a mean; the fit's own validations use
            the fine-tuned ones).
        evaluate: whether the fit's own validations, and those of its checkpoints, are of theta_a; the training weights
            come back bit for bit. Not while adapters are in the module.
        save: write the checkpoint of theta_a, beside those of the run's ModelCheckpoint.
        fisher_floor: least Fisher information.
        criterion: which loss of the training step to read logits and labels from, for `grid` and `fisher`.
        seed: of the labels that the Fisher information is measured by.

    Raises:
        RecipeError: for bad arguments; in setup for a reference that does not fit the module, a resume without this
            recipe's state, another callback that averages weights, or a `grid` without validation data; on the first
            batch where `grid` or `fisher` meet a loss that is not one of classification.
    """

    paper = Paper(
        "Robust fine-tuning of zero-shot models",
        "M. Wortsman, G. Ilharco, J. W. Kim, M. Li, et al.",
        2022,
        "https://arxiv.org/abs/2109.01903",
        "https://github.com/mlfoundations/wise-ft",
    )
    does = "Ends a fine-tuning at the mean of the weights before and after it, and draws the curve over the mean."
    use_when = "You fine-tune a pre-trained model and it must stay good on inputs from elsewhere."
    costs = "Nothing in training; one copy of the weights in main memory; one evaluation a grid point at the end."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("BANG", "EMA", "LangevinMixture", "EnsembleEvaluation"), _OWNS_WEIGHTS
    )
    log_prefix = "wise"
    free_on_resume = frozenset({"grid", "evaluate", "save"})

    def __init__(
        self,
        alpha: float = 0.5,
        grid: Sequence[float] | None = None,
        reference: str | Path = "init",
        scope: str | Sequence[str] | None = None,
        fisher: bool = False,
        buffers: Literal["interpolate", "finetuned", "recalibrate"] = "finetuned",
        evaluate: bool = True,
        save: bool = True,
        fisher_floor: float = 1e-8,
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(0 <= alpha <= 1, self, "alpha", alpha, "in [0, 1], the weight of the fine-tuned end")
        check_argument(grid is None or len(grid) > 0, self, "grid", grid, "None or at least one weight in [0, 1]")
        check_argument(all(0 <= a <= 1 for a in grid or ()), self, "grid", grid, "weights in [0, 1]")
        check_argument(scope is None or len(scope) > 0, self, "scope", scope, "None or names of at least one part")
        allowed = ("interpolate", "finetuned", "recalibrate")
        check_argument(buffers in allowed, self, "buffers", buffers, "'interpolate', 'finetuned' or 'recalibrate'")
        check_argument(fisher_floor > 0, self, "fisher_floor", fisher_floor, "positive")
        self.alpha, self.grid, self.reference, self.scope = alpha, grid, os.fspath(reference), scope
        self.fisher, self.buffers, self.evaluate, self.save = fisher, buffers, evaluate, save
        self.fisher_floor, self.criterion, self.seed = fisher_floor, criterion, seed
        self.curve: dict[float, list[float]] = {}
        """After a fit with `grid`: accuracy on each validation loader, by weight."""
        self._theta_0: dict[str, Tensor] = {}
        self._digest: str | None = None  # of the file that theta_0 came from
        self._averaged = False
        self._swap: Swap | None = None  # while a fit, or an evaluation of one of its checkpoints, goes on
        self._fits = self._begins = self._unseen = False

    @property
    def _averages(self) -> bool:
        return self.alpha < 1 or self.grid is not None

    @property
    def neutral(self) -> bool:
        return not self._averages

    # -- declarations ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._swap, self._fits, self._begins, self._unseen = None, False, False, False
        super().setup(trainer, pl_module, stage)

    def declare(self, plan: Plan) -> None:
        if not self._averages:
            return
        state = plan.section["state"] if plan.section else {}
        if not plan.fitting:
            if state and not state["averaged"]:
                self._take(plan, state)
                self._swap = Swap(plan.module)
            return
        self._check_trainer(plan)
        if state.get("averaged"):
            raise RecipeError(
                f"{type(self).__name__}: the checkpoint was written after the fit ended and holds averaged weights;"
                " there is no fine-tuning to resume. Load its weights into the module and start a new fit"
            )
        resumes = bool(plan.trainer._checkpoint_connector._loaded_checkpoint)
        if resumes and not state and self.reference == "init":
            raise RecipeError(
                f"{type(self).__name__}: the checkpoint was written without {type(self).__name__}, so that the weights"
                " before fine-tuning are not in it; give them by reference=PATH"
            )
        self._averaged, self.curve = False, {}
        self._take(plan, state)
        self._swap, self._fits, self._begins = Swap(plan.module), True, not resumes
        looks = self.grid is not None or self.fisher
        of_init = self.reference == "init" and self.scope is None and self.alpha < 1
        self._unseen = not resumes and plan.module.automatic_optimization and (looks or of_init)

    def _check_trainer(self, plan: Plan) -> None:
        name = type(self).__name__
        for other in plan.trainer.callbacks:
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                raise RecipeError(f"{name} and {type(other).__name__} cannot share a Trainer: {_OWNS_WEIGHTS}")
            kept = isinstance(other, Recipe) and not other.neutral and not getattr(other, "merge_on_end", True)
            if kept:
                raise RecipeError(
                    f"{name} and {type(other).__name__} cannot share a Trainer: {type(other).__name__} leaves the"
                    " network with another structure than it began with, and weights of two structures have no mean"
                )
        if self.grid is not None and not has_validation(plan.trainer):
            raise RecipeError(f"{name}: grid={self.grid!r} needs validation data to measure on; the fit has none")
        asks = {"grid": self.grid is not None, "fisher": self.fisher}
        asks["buffers='recalibrate'"] = self.buffers == "recalibrate"
        running = [word for word, on in asks.items() if on]
        if running and not plan.module.automatic_optimization:
            raise RecipeError(
                f"{name}: {running[0]} runs the module's training step to look at it, and needs automatic optimization:"
                " under manual optimization that step trains"
            )

    def _take(self, plan: Plan, state: Mapping[str, Any]) -> None:
        """theta_0, from the checkpoint, a file or the module as it is before its first step."""
        live = tensors_of(plan.module)
        names = self._scoped(plan.module, live)
        if self.reference != "init":
            self._theta_0, self._digest = _read(self.reference, plan.module, {n: live[n] for n in names})
            if state and state["digest"] != self._digest:
                raise RecipeError(
                    f"{type(self).__name__}: reference={self.reference!r} is not the file that the checkpoint was"
                    " written with; its contents have changed"
                )
        elif state:
            self._theta_0 = dict(state["theta_0"])
        else:
            self._theta_0 = copied({n: live[n] for n in names})

    def _scoped(self, module: pl.LightningModule, live: Mapping[str, Tensor]) -> list[str]:
        """Names of the parameters to average, and of the buffers of the parts that hold them."""
        if self.scope is None:
            return list(live)
        patterns = [self.scope] if isinstance(self.scope, str) else self.scope
        chosen = set(parameters_under(module, patterns, "scope"))
        owners = {name.rpartition(".")[0] for name in chosen}
        parameters = {name for name, _ in module.named_parameters()}
        return [n for n in live if n in chosen or (n not in parameters and n.rpartition(".")[0] in owners)]

    # -- the fit -----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._begins:  # DDP gives every rank the weights of rank 0
            of_rank_zero_(self._theta_0, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the first batch, before any step: is it a classification, and does theta_0 know anything of it?"""
        if not self._unseen:
            return
        self._unseen = False
        asks = "grid" if self.grid is not None else "fisher" if self.fisher else None
        try:
            with (
                speaking_for(self),
                gradients_allowed(),
                modes_kept(pl_module, training=False),
                trainer.precision_plugin.forward_context(),
            ):
                seen = observe(trainer, pl_module, batch, batch_idx, self.criterion)
        except RecipeError:
            if asks:
                raise
            return  # a module without a loss that can be seen is averaged all the same
        if not classified(seen):
            if asks:
                raise RecipeError(
                    f"{type(self).__name__}: {asks} needs a classification loss of logits [n, classes]; the observed"
                    f" one got {tuple(seen.logits.shape)} and targets {tuple(seen.targets.shape)}"
                )
            return
        if seen.targets.is_floating_point() or self.reference != "init" or self.scope is not None:
            return
        correct = int((seen.logits.argmax(1) == seen.targets).sum())
        if at_chance(correct, *seen.logits.shape):
            rank_zero_warn(
                f"{type(self).__name__}: the module's weights at the start classify {correct} of the first"
                f" {len(seen.logits)} samples correctly, which is chance. If its head is a new one, averaging it with"
                " the trained one only halves the logits: train the head first, or leave it out of scope"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._fits:
            return
        if _in_place(trainer):  # both ends in the stock structure, adapters merged
            Session.close_of(trainer)
        live = tensors_of(pl_module)
        unlike = [n for n, value in self._theta_0.items() if n not in live or live[n].shape != value.shape]
        if unlike:
            rank_zero_warn(
                f"{type(self).__name__}: {unlike[0]!r} has another shape than before the fit, or is gone; the module is"
                " left with its fine-tuned weights"
            )
            return
        with speaking_for(self), where_it_trained(trainer):
            fishers = self._fishers(trainer, pl_module) if self.fisher else ({}, {})
            values = {"wise/distance": distance(self._theta_0, tensors_of(pl_module))}
            if self.grid is not None:
                values |= self._measure(trainer, pl_module, fishers)
            log_values(trainer, values)
            self._draw(trainer)
            if self.alpha < 1:
                self._put(trainer, pl_module, self.alpha, fishers, recalibrates=True)
                self._swap.keep()
                self._averaged = True
                self._save(trainer)

    def _put(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        alpha: float,
        fishers: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {}),
        recalibrates: bool = False,
    ) -> None:
        """Write theta_alpha into the module; at 0 and 1 all that belongs to that end, buffers too."""
        parameters = {name for name, _ in module.named_parameters()}
        mixes_buffers = self.buffers == "interpolate" or alpha == 0

        def value(name: str, own: Tensor) -> Tensor:
            first = self._theta_0[name]
            if 0 < alpha < 1 and name in fishers[0] and name in fishers[1]:
                return fisher_mean(first, own, alpha, fishers[0][name], fishers[1][name], self.fisher_floor)
            return interpolate(first, own, alpha) if name in parameters or mixes_buffers else own

        self._swap.put(self._theta_0, value)
        if recalibrates and self.buffers == "recalibrate" and 0 < alpha < 1:
            self._swap.put(statistics_names(module), lambda name, own: own)  # noted, so that they come back
            loader = training_loader(trainer)
            with apart(trainer, self.seed, "recalibrate", loader.index):
                numbered = enumerate(on_device(trainer, loader))
                recalibrate(module, lambda each: pass_through(trainer, each[1], each[0]), numbered)

    def _fishers(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """At theta_0 and at theta_1; the module ends as it was."""
        parameters = {name: p for name, p in module.named_parameters() if name in self._theta_0}
        loader = training_loader(trainer)

        def logits() -> Any:
            for number, batch in enumerate(on_device(trainer, loader)):
                with torch.autocast(module.device.type, enabled=False):
                    yield observe(trainer, module, batch, number, self.criterion).logits

        found = []
        for alpha in (0.0, 1.0):
            if alpha == 0:
                self._put(trainer, module, 0.0)
            try:
                with apart(trainer, self.seed, "fisher"):
                    found.append(fisher_information(parameters, logits(), key(self.seed, "WiSEFT/fisher")))
            finally:
                self._swap.back()
        return found[0], found[1]

    # -- the curve over alpha ----------------------------------------------------------------------------------------

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, fishers: Any) -> dict[str, Tensor]:
        """Accuracy of every grid point on every validation loader, and how the mean differs from its ends."""
        loaders = validation_loaders(trainer)
        found: dict[float, list[Outcome]] = {}
        points = sorted({0.0, 1.0, float(self.alpha), *map(float, self.grid)})
        with _progress(trainer, len(points), loaders) as bar:
            for alpha in points:
                try:
                    self._put(trainer, module, alpha, fishers, recalibrates=True)
                    found[alpha] = outcomes(trainer, loaders, self.criterion, bar.update)
                finally:
                    self._swap.back()
        values: dict[str, Tensor] = {}
        for k in range(len(loaders)):
            pre, fine, mean = (found[a][k] for a in (0.0, 1.0, float(self.alpha)))
            sums = {f"accuracy@{_name_of(a)}": found[a][k].correct.sum() for a in points}
            sums |= shares(pre.correct, fine.correct, mean.correct)
            sums |= {"confidence_ref": pre.confidence.sum(), "confidence_ft": fine.confidence.sum()}
            count = torch.tensor(len(pre.correct), device=module.device)
            total = all_sum(torch.stack([count, *sums.values()]).float())
            suffix = f"/dataloader_idx_{k}" if len(loaders) > 1 else ""
            values |= {f"wise/{name}{suffix}": s / total[0] for name, s in zip(sums, total[1:])}
            for place, alpha in enumerate(points):
                self.curve.setdefault(alpha, []).append(float(total[1 + place] / total[0]))
        return values

    def _draw(self, trainer: pl.Trainer) -> None:
        folder = where_to_draw(trainer)
        if not self.curve or folder is None or not trainer.is_global_zero:
            return
        points, rows = list(self.curve), list(zip(*self.curve.values()))
        names = [f"dataloader_idx_{k}" for k in range(len(rows))] if len(rows) > 1 else ["validation"]
        draw_curves(
            folder / "wise_accuracy.png",
            {name: (points, row) for name, row in zip(names, rows)},
            "from the pre-trained (0) to the fine-tuned weights (1)",
            "alpha",
            "accuracy",
        )

    def _save(self, trainer: pl.Trainer) -> None:
        keeps = trainer.checkpoint_callback
        if not self.save or keeps is None:
            return
        folder = getattr(keeps, "dirpath", None) or trainer.default_root_dir
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}-wise-alpha={_name_of(self.alpha)}.ckpt"
        trainer.save_checkpoint(os.path.join(folder, name), weights_only=True)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _enter(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._swap is not None and self.evaluate and 0 <= self.alpha < 1 and not _in_place(trainer):
            self._put(trainer, module, self.alpha)

    def _leave(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._swap is not None:
            self._swap.back()

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint holds the weights that train, also one that is taken in the middle of a validation."""
        if self._swap is not None and self._swap.own:
            self._swap.mend(checkpoint["state_dict"])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer, pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._swap = None

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state = {"averaged": self._averaged, "digest": self._digest}
        if self.reference == "init" and rank_and_world()[0] == 0:  # once in a checkpoint; all ranks read it
            state["theta_0"] = self._theta_0
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """theta_0 was taken from the checkpoint in :meth:`declare`, before weights were loaded."""


class BANG(WiSEFT, StepRecipe):
    """Fine-tune on softened targets, so that neither end is over-confident, and end at the mean of the weights.

    Everything of :class:`WiSEFT`, and a classification loss with class indices.

    Args:
        alpha: weight of the fine-tuned end; 1 switches the averaging off.
        grid: weights at which the end of the fit measures accuracy on every validation loader (see ``WiSEFT``).
        reference: theta_0: "init", or the path of a file of weights.
        scope: what is averaged; None for everything.
        fisher: weight each entry by its diagonal Fisher information at both ends.
        buffers: of the mean: "finetuned", "interpolate" or "recalibrate".
        evaluate: whether the fit's own validations are of the mean.
        save: write a checkpoint of the mean.
        fisher_floor: least Fisher information.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        seed: of Mixup's draws and of the Fisher information's.
        label_smoothing: s; 0 switches it off.
        mixup_alpha: of Mixup's Beta(m, m); 0 switches it off.
        across_ranks: under DDP, mix with samples of the other ranks too (see ``Mixup``).

    Raises:
        RecipeError: as ``WiSEFT``; in the first step for targets that are no class indices, and for a loss that smooths
            labels already.
    """

    paper = Paper(
        "Spurious Feature Diversification Improves Out-of-distribution Generalization",
        "Y. Lin, L. Tan, Y. Hao, H. Wong, et al.",
        2024,
        "https://arxiv.org/abs/2309.17230",
        "https://github.com/linyongver/SpuriousFeatureDiversification",
    )
    does = "Fine-tunes with label smoothing and Mixup, and ends at the mean of the weights before and after."
    use_when = "WiSE-FT's case, and the fine-tuned model is over-confident on inputs from elsewhere."
    costs = "As WiSEFT, and one pass over the inputs a step for Mixup."
    couples_samples = True
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("WiSEFT", "EMA", "LangevinMixture", "EnsembleEvaluation"), _OWNS_WEIGHTS),
        **dict.fromkeys(("Mixup", "CutMix", "RepresentationMixup"), "both soften the labels; choose one"),
        "NormalizedGD": "its step length assumes hard labels",
        "LOOK": "it looks for neighbours of the same class, which needs hard labels",
        "SupCon": "it pairs samples of the same class, which needs hard labels",
    }

    def __init__(
        self,
        alpha: float = 0.5,
        grid: Sequence[float] | None = None,
        reference: str | Path = "init",
        scope: str | Sequence[str] | None = None,
        fisher: bool = False,
        buffers: Literal["interpolate", "finetuned", "recalibrate"] = "finetuned",
        evaluate: bool = True,
        save: bool = True,
        fisher_floor: float = 1e-8,
        criterion: str | int | None = None,
        seed: int = 0,
        label_smoothing: float = 0.1,
        mixup_alpha: float = 0.2,
        across_ranks: bool = False,
    ) -> None:
        super().__init__(alpha, grid, reference, scope, fisher, buffers, evaluate, save, fisher_floor, criterion, seed)
        check_argument(0 <= label_smoothing < 1, self, "label_smoothing", label_smoothing, "in [0, 1)")
        check_argument(0 <= mixup_alpha < math.inf, self, "mixup_alpha", mixup_alpha, "at least 0 and finite")
        self.label_smoothing, self.mixup_alpha, self.across_ranks = label_smoothing, mixup_alpha, across_ranks
        self._mixing: Mixing | None = None

    @property
    def _softens(self) -> bool:
        return self.label_smoothing > 0 or self.mixup_alpha > 0

    @property
    def neutral(self) -> bool:
        return not (self._averages or self._softens)

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if not (plan.fitting and self._softens):
            return
        self._mixing = None
        if self.mixup_alpha > 0:
            self._mixing = Mixing("mixup", self.mixup_alpha, 1.0, self.seed, self.across_ranks)
        plan.step(self)

    def transform_batch(self, step: Step, batch: Any) -> Any:
        """The batch mixed, where Mixup is on."""
        return batch if self._mixing is None else self._mixing.inputs(self, step, batch)

    def transform_targets(self, step: Step, logits: Tensor, targets: Tensor) -> Tensor:
        """Labels mixed as the inputs are, and smoothed."""
        check_targets(self, step.call, logits, targets)
        smoothing = step.call.options.get("label_smoothing", 0.0)
        if smoothing:
            raise RecipeError(
                f"{type(self).__name__}: the module's loss smooths labels by {smoothing} already; take that out, or set"
                " label_smoothing=0 and mixup_alpha=0"
            )
        mixed = targets if self._mixing is None else self._mixing.targets(self, step, logits, targets)
        return smooth(as_probabilities(mixed, logits), self.label_smoothing) if self.label_smoothing else mixed


# -- pieces ----------------------------------------------------------------------------------------------------------


def _name_of(alpha: float) -> str:
    """A weight in names: two digits after the point, more only where it has them."""
    return f"{alpha:.2f}" if round(alpha, 2) == alpha else f"{alpha:g}"


def _in_place(trainer: pl.Trainer) -> list[Recipe]:
    """The recipes whose changes to the network's structure are in the module now."""
    return [each for each in trainer.callbacks if isinstance(each, Recipe) and each._structure is not None]


def _read(path: str, module: pl.LightningModule, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The reference from a file, by the module's own names, and a digest of the file.

    Raises:
        RecipeError: when there is no such file, or names and shapes do not agree.
    """
    full = Path(os.path.expandvars(path)).expanduser()
    if not full.is_file():
        raise RecipeError(f"reference={path!r} is 'init' or the path of a file; there is none at {full.absolute()}")
    if full.suffix == ".safetensors":
        from safetensors.torch import load_file

        held = load_file(full)
    elif full.suffix in (".pt", ".pth", ".ckpt"):
        held = torch.load(full, map_location="cpu", weights_only=True)
        held = held.get("state_dict", held)
    else:
        raise RecipeError(f"reference={path!r} must be a .safetensors, .pt, .pth or .ckpt file")
    inner = network(module)[0]
    found: dict[str, Tensor] = {}
    for name, value in wanted.items():
        key = name if name in held else name.removeprefix(f"{inner}.")  # a file of the network alone
        if key not in held:
            raise RecipeError(f"reference={path!r} has no {name!r}; leave what is new in the module out of scope")
        if held[key].shape != value.shape:
            raise RecipeError(
                f"reference={path!r} has {name!r} of shape {tuple(held[key].shape)} and the module"
                f" {tuple(value.shape)}; leave what differs, a new head, out of scope"
            )
        found[name] = held[key].detach().clone()
    with open(full, "rb") as file:
        return found, hashlib.file_digest(file, "sha256").hexdigest()


def _progress(trainer: pl.Trainer, passes: int, loaders: Sequence[Any]) -> Any:
    """A bar over all batches of the curve, where the Trainer shows one."""
    from tqdm.auto import tqdm

    total = passes * sum(each.limit for each in loaders)
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    return tqdm(total=total if math.isfinite(total) else None, desc="WiSE-FT curve", disable=not shown, leave=False)

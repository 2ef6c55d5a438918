"""Train on the part of the training set that scores say matters: the second half of a data diet.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021
(https://arxiv.org/abs/2107.07075; code https://github.com/mansheej/data_diet). ``callbacks/data/scores.py`` has what is
chosen by scores, and ``DataDiet`` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_recipes.callbacks.data.scores import MODES, PAPER, Mode, prune_indices, read_scores
from lightning_recipes.core.artefacts import key_of
from lightning_recipes.core.data import SamplesKept
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import decided_on_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.labels import known_labels
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe


class PruneTrainSet(Recipe):
    """Train on the part of the training set that the scores say matters.

    Whatever the data module or the loader, and with its own kind of sampler: samples are left out before anybody asks
    how many steps the fit has. Validation and test data stay whole. Logs ``prune_train_set/kept`` and, up to 100
    classes, ``kept_of_class_<c>``.

    An epoch of fewer samples has fewer steps. The paper trains as many steps as on the whole set: give the Trainer
    ``max_steps`` and let schedules go by steps.

    Args:
        scores: a file of DataDiet's or a folder that holds a single one (the mean over its runs is taken), or one
            number a training sample in the order of the training set; None for mode 'random'.
        keep: how many samples, or (a float) what share; 1.0 changes nothing.
        mode: 'keep_max' the highest scores, which is the method, 'keep_min' the lowest, '..._abs' by absolute value for
            the margins, 'random', or 'offset' a window of the ascending order.
        offset: where the window begins: a place, or (a float) a share. It leaves out what stands above its end, for
            noisy labels: offset=0.4, keep=0.5 leaves out the hardest tenth.
        seed: of the random choice.

    Raises:
        RecipeError: for bad arguments and files; before training, for scores of another data set, training data of
            which no part can be taken, and a resume with another choice.
    """

    paper = PAPER
    does = "Trains on the most important part of the training set, by a file of scores."
    use_when = (
        "You have scores from DataDiet and want shorter epochs or less noise. Keep the hardest only where the network"
        " learns the task well; elsewhere as many at random are better."
    )
    costs = "Nothing; an epoch is as much shorter as samples are left out."
    refuses: ClassVar[Mapping[str, str]] = {
        "DataDiet": "scores of a part of the training set are those of no whole one; score in a run of its own"
    }
    free_on_resume = frozenset({"scores"})  # the choice is compared instead: a file may move, and may not change it

    def __init__(
        self,
        scores: str | Sequence[float] | Tensor | None = None,
        keep: int | float = 0.5,
        mode: Mode = "keep_max",
        offset: int | float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        share = isinstance(keep, float)
        ok = not isinstance(keep, bool) and (0 < keep <= 1 if share else keep >= 1)
        check_argument(ok, self, "keep", keep, "a share in (0, 1], or how many, at least 1")
        check_argument(mode in MODES, self, "mode", mode, f"one of {', '.join(map(repr, MODES))}")
        window = offset is not None and offset >= 0 and (not isinstance(offset, float) or offset < 1)
        ok = window if mode == "offset" else offset is None
        check_argument(
            ok, self, "offset", offset, "a place of at least 0 or a share in [0, 1), for mode='offset' alone"
        )
        check_argument(scores is not None or mode == "random", self, "scores", scores, "given, but for mode='random'")
        self.scores, self.keep, self.mode, self.offset, self.seed = scores, keep, mode, offset, seed
        self._forget()

    def _forget(self) -> None:
        self.kept: Tensor | None = None
        """Ascending indices of the samples in the training set that are trained on, once it is known."""
        self._values: Tensor | None = None
        self._labels: Tensor | None = None  # that the file's scores belong to
        self._key = ""  # of the choice
        self._histogram: dict[str, float] = {}

    @property
    def neutral(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        self._forget()
        plan.at_end(self._finish)
        if isinstance(self.scores, str):
            with speaking_for(self):
                found = decided_on_rank_zero(lambda: read_scores(self.scores), plan.trainer)
            self._values, self._labels = found.mean, found.labels
        elif self.scores is not None:
            self._values = torch.as_tensor(self.scores, dtype=torch.float64).cpu()
        if self._values is not None:
            with speaking_for(self):
                self._choose(len(self._values))
        if plan.section is not None:
            self._key = plan.section["state"]["key"]
        plan.install(SamplesKept(plan.trainer, self, lambda dataset: self._of(dataset, plan.trainer)))

    def _finish(self) -> None:
        self._values = self._labels = None

    def _choose(self, total: int) -> Tensor:
        values = torch.zeros(total) if self._values is None else self._values
        return prune_indices(values, self.keep, self.mode, self.offset, self.seed)

    def _of(self, dataset: Any, trainer: pl.Trainer) -> list[int]:
        total = len(dataset)
        if self._values is not None and len(self._values) != total:
            raise RecipeError(
                f"there are {len(self._values)} scores and {total} training samples: the scores belong to another data"
                " set or split"
            )
        labels = known_labels(dataset)
        if self._labels is not None and labels is not None:
            differ = int((labels != self._labels).sum())
            if differ > total / 2:
                raise RecipeError(
                    f"{differ} of {total} labels are not those that were scored: the scores belong to another data set,"
                    " split or order"
                )
            if differ:
                rank_zero_info(f"PruneTrainSet: {differ} labels have changed since their samples were scored")
        kept = self._choose(total)
        key = key_of([total, kept])
        if self._key not in ("", key):
            raise RecipeError(
                "the scores choose other samples than in the run of the checkpoint: its file of scores, or the training"
                " set, has changed. Resume with those of the checkpoint, or start a new fit from its weights"
            )
        if self.kept is None:
            self._tell(trainer, total, len(kept))
        self.kept, self._key = kept, key
        labels = self._labels if labels is None else labels
        self._histogram = {"kept": float(len(kept))}
        if labels is not None and int(labels.max()) < 100:
            counts = torch.bincount(labels[kept], minlength=int(labels.max()) + 1).tolist()
            self._histogram |= {f"kept_of_class_{c}": float(n) for c, n in enumerate(counts)}
        return kept.tolist()

    def _tell(self, trainer: pl.Trainer, total: int, kept: int) -> None:
        rank_zero_info(f"PruneTrainSet: {kept} of {total} training samples are kept ({self.mode})")
        if trainer.max_steps == -1 and trainer.max_epochs not in (None, -1):
            rank_zero_warn(
                f"PruneTrainSet: {trainer.max_epochs} epochs over {kept} of {total} samples are fewer steps than over"
                " all, which makes a pruned set look worse than it is; give Trainer(max_steps=...) those of the full"
                " run, with max_epochs=-1 and schedules by step"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.kept is not None:
            log_values(trainer, {f"prune_train_set/{name}": value for name, value in self._histogram.items()})

    def state(self) -> dict[str, Any]:
        return {"key": self._key}

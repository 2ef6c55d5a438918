"""Many-, medium- and few-shot accuracy of anybody's classifier.

The protocol of Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019
(https://arxiv.org/abs/1904.05160): the mean over the classes of a group of the accuracy within the class, groups by the
number n of training samples: many n > 100, medium 20 <= n <= 100, few n < 20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.core.diagnostics import History, where_to_draw
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.group_accuracy import LongTailAccuracy
from lightning_recipes.core.labels import class_counts as count_classes
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.outputs import part_of, watch_outputs
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe


class LongTailMonitor(Recipe):
    """Measure accuracy on many-, medium- and few-shot classes in validation and test, without a trace in the run.

    Logs ``long_tail/many``, ``medium``, ``few`` (those groups that have classes) and ``balanced``, the mean over all
    classes, and draws them over training at the end of a fit. It reads the logits that come out of the module in its
    own validation and test step (replaced ones, where BackdoorAdjustment is at work) and costs no pass. Where there are
    several evaluation loaders it measures the first.

    Args:
        class_counts: training samples of each class, or 'auto' to count the labels of the whole training set; the
            literature's CIFAR variants all take the groups of imbalance ratio 100.
        many: classes with more samples are many-shot.
        few: classes with fewer samples are few-shot.
        forward: where the logits come out: 'forward' for the module itself, or the name of a submodule.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; in the first evaluation when training labels cannot be counted, no logits
            ``[n, classes]`` come out, or a batch has no labels beside them.
    """

    paper = Paper(
        "Large-Scale Long-Tailed Recognition in an Open World",
        "Z. Liu, Z. Miao, X. Zhan, J. Wang, B. Gong, S. X. Yu",
        2019,
        "https://arxiv.org/abs/1904.05160",
        "https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
    )
    does = "Measures accuracy on many-, medium- and few-shot classes on the validation and test data."
    use_when = "Training classes are unequally frequent, and one accuracy hides what becomes of the rare ones."
    works_sharded = True
    costs = "No pass; all training labels are read once."

    def __init__(
        self,
        class_counts: Sequence[int] | Literal["auto"] = "auto",
        many: int = 100,
        few: int = 20,
        forward: str = "forward",
        draw: bool = True,
    ) -> None:
        super().__init__()
        counted = not isinstance(class_counts, str)
        usable = class_counts == "auto" or (counted and len(class_counts) > 1 and min(class_counts) >= 0)
        check_argument(usable, self, "class_counts", class_counts, "'auto' or a number of samples a class, at least 0")
        check_argument(few >= 0, self, "few", few, "at least 0")
        check_argument(many >= few - 1, self, "many", many, f"at least few - 1 = {few - 1}")
        self.class_counts, self.many, self.few, self.forward, self.draw = class_counts, many, few, forward, draw
        self._counts: Tensor | None = torch.tensor(list(class_counts)) if counted else None
        self._counted_in_fit = False
        self._history = History()
        self._metric: LongTailAccuracy | None = None
        self._seen: list[Tensor] = []
        self._leave: Callable[[], None] | None = None

    def declare(self, plan: Plan) -> None:
        part_of(plan.module, self.forward)
        plan.at_end(self._stop)
        if plan.fitting and self.class_counts == "auto":
            self._counts, self._counted_in_fit = None, False

    # -- validation and test -----------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        self._metric = None
        self._leave = watch_outputs(part_of(pl_module, self.forward), self._see)

    def on_validation_batch_start(self, *args: Any) -> None:
        self._seen.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx:
            return
        with speaking_for(self):
            logits, labels = self._read(batch)
            if trainer.sanity_checking:
                return
            if self._metric is None:
                self._metric = self._new_metric(trainer, logits.shape[1]).to(logits.device)
            self._metric.update(logits, labels)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._metric is None:
            return
        groups = self._metric.groups
        values = {name: value for name, value in self._metric.compute().items() if bool(groups[name].any())}
        self.log_dict({f"long_tail/{name}": value for name, value in values.items()}, rank_zero_only=False)
        if trainer.state.fn == "fit":
            self._history.add(trainer.global_step, values)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    on_test_start, on_test_batch_start, on_test_batch_end = (
        on_validation_start,
        on_validation_batch_start,
        on_validation_batch_end,
    )
    on_test_epoch_end, on_test_end = on_validation_epoch_end, on_validation_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self.draw and self._history.steps and trainer.is_global_zero and folder is not None:
            self._history.draw(folder / "long_tail.png", "accuracy by how often classes are trained on", "accuracy")

    def _stop(self) -> None:
        if self._leave is not None:
            self._leave()
        self._leave = None
        self._seen.clear()

    def _see(self, logits: Tensor) -> None:
        """Keep the first logits of each length; an attack that measures the same batch calls the module many times."""
        if all(len(logits) != len(seen) for seen in self._seen):
            self._seen.append(logits.detach())

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The step's logits and the batch's labels."""
        labels = labels_in(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise RecipeError("the evaluation batches have no class indices: no second item, no 'labels' or 'targets'")
        fitting = [logits for logits in self._seen if len(logits) == len(labels)]
        if not fitting:
            where = "the module" if self.forward == "forward" else repr(self.forward)
            raise RecipeError(
                f"no logits [{len(labels)}, classes] came out of {where} in the evaluation step; name the submodule"
                " that it calls on its inputs with forward='NAME'"
            )
        return fitting[0], labels

    def _new_metric(self, trainer: pl.Trainer, classes: int) -> LongTailAccuracy:
        if self._counts is None or (self.class_counts == "auto" and not self._counted_in_fit):
            try:
                self._counts = count_classes(trainer)
            except RecipeError as error:
                raise RecipeError(f"{error}; give class_counts=[samples of class 0, of class 1, ...]") from error
            self._counted_in_fit = trainer.state.fn == "fit"
        counts = self._counts
        if self.class_counts == "auto" and len(counts) < classes:
            counts = torch.cat([counts, counts.new_zeros(classes - len(counts))])  # the last classes have no sample
        if len(counts) != classes:
            raise RecipeError(f"there are {len(counts)} class counts and the logits have {classes} classes")
        return LongTailAccuracy(counts, self.many, self.few)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"history": self._history.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._history.load(state["history"])

"""Data diet: find early which examples matter, for PruneTrainSet to train on.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021
(https://arxiv.org/abs/2107.07075; code https://github.com/mansheej/data_diet, commit aee462e). The scores, and what is
chosen by them, stand in ``callbacks/data/scores.py``.

Of the paper one figure does not stand: GraNd at initialisation does not beat a random choice. Its code scored a trained
network there (A. Kirsch, 2023, https://arxiv.org/abs/2303.14753). ``at_epoch=0`` is the truth, with a warning.

Costs for el2n and grand_last a forward pass over the training set a run; for grand a backward pass in batches, of which
linear layers, convolutions and normalisations give every example's norm without its gradient (core.sample_gradients),
while what is in no such layer is differentiated example by example; for forgetting three numbers a sample and no pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_recipes.callbacks.data.scores import (
    OF_LOGITS,
    PAPER,
    SCORES,
    Score,
    each_cross_entropy,
    el2n,
    forget,
    forgetting,
    grand_last,
    suspicious,
)
from lightning_recipes.core import random
from lightning_recipes.core.artefacts import Artefact, Content, key_of
from lightning_recipes.core.batch import describe, get_input
from lightning_recipes.core.criterion import wrap_named
from lightning_recipes.core.diagnostics import draw_images, is_picture, log_text, log_values, where_to_draw
from lightning_recipes.core.distributed import active, decided_on_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import classified
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.labels import as_indices, known_labels, labels_in, labels_of, training_set
from lightning_recipes.core.outputs import logits_in, part_of
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, bar, encode, read, reads_anew, samples_of, training_samples
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.core.sample_gradients import SampleGradients
from lightning_recipes.core.sample_ids import SampleIds, root_of
from lightning_recipes.core.sample_table import SampleTable, of_all_ranks
from lightning_recipes.core.silence import silent
from lightning_recipes.core.step import Step, observe


class DataDiet(StepRecipe):
    """Score every training example after a few epochs of anybody's training, without a trace in the run.

    The score belongs to the place of an example in the training set. It is kept in `scores`, in the run's checkpoints
    and, with `out`, in a file that the next runs add to and that :class:`PruneTrainSet` reads. Logs ``data_diet/mean``,
    ``q10``, ``median``, ``q90`` and ``above_one`` (the share above 1), and draws the easiest and the hardest images.

    Under 'auto' logits and labels are those of the module's own training step, whatever form its batches have. A score
    is in fp32 and in eval mode, on the data module's ``plain_train_set`` (without augmentation) where it has one.

    Args:
        score: 'el2n', 'grand', 'grand_last', 'l1', 'max_margin', 'sum_margin' or 'forgetting'.
        at_epoch: complete epochs before scoring; 0 is at initialisation.
        dataset: the training set in the same order and without augmentation, where the loader's own has some.
        batch_size, num_workers: of the pass over the data.
        grad_chunk: examples that 'grand' takes at once; the gradients that no layer gives the norm of are held, so many
            times the size of their parameters.
        out: folder of the file of scores, which takes one row a run; None keeps none.
        run: name of this run in the file; None makes one of the weights and the random state that it begins with.
        stop_after: end the fit once the scores are there.
        forward: 'auto', or what gives logits for the input of a batch: 'forward' for the module itself, or a dotted
            name; labels are then those of the batch, and the training step is left alone.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save a picture in the run's log folder (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments and for an `at_epoch` that the fit does not reach; before training, for data that
            are not read by index, logits or labels of another form, a network that GraNd cannot be computed of, and a
            run that the file holds already.
    """

    paper = PAPER
    does = "Scores every training example early in training: what is important, what is redundant, what is mislabelled."
    use_when = "You want to train on part of your data, or to find wrong labels in it."
    costs = "A forward pass over the training set a run (GraNd: a backward pass an example); nothing in training steps."
    free_on_resume = frozenset({"dataset", "batch_size", "num_workers", "grad_chunk", "out", "stop_after", "draw"})

    def __init__(
        self,
        score: Score = "el2n",
        at_epoch: int = 10,
        dataset: Dataset | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        grad_chunk: int = 32,
        out: str | None = None,
        run: str | None = None,
        stop_after: bool = False,
        forward: str = "auto",
        criterion: str | int | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        check_argument(score in SCORES, self, "score", score, f"one of {', '.join(map(repr, SCORES))}")
        least = 1 if score == "forgetting" else 0
        check_argument(at_epoch >= least, self, "at_epoch", at_epoch, f"at least {least}")
        for name, value in (("batch_size", batch_size), ("grad_chunk", grad_chunk)):
            check_argument(value >= 1, self, name, value, "at least 1")
        check_argument(num_workers >= 0, self, "num_workers", num_workers, "at least 0")
        check_argument(run is None or bool(run), self, "run", run, "None or a name")
        check_argument(bool(forward), self, "forward", forward, "'auto', 'forward' or the name of a part")
        by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ok = dataset is None or (by_index and not isinstance(dataset, IterableDataset))
        check_argument(ok, self, "dataset", dataset, "None or a map-style data set with a length")
        self.score, self.at_epoch, self.dataset = score, at_epoch, dataset
        self.batch_size, self.num_workers, self.grad_chunk = batch_size, num_workers, grad_chunk
        self.out, self.run, self.stop_after = out, run, stop_after
        self.forward, self.criterion, self.draw = forward, criterion, draw
        self._forget()

    def _forget(self) -> None:
        self.scores: Tensor | None = None
        """This run's, fp32 ``[n]`` on the CPU, once they are there."""
        self.labels: Tensor | None = None
        """That they were scored with, int64 ``[n]``."""
        self.path: Path | None = None
        """Of the file that they are in."""
        self.verdict: str | None = None
        """What they come to, in words."""
        self._run_name = ""
        self._trainer: pl.Trainer | None = None  # while a fit goes on
        self._resumed = False
        self._ids: SampleIds | None = None
        self._table: SampleTable | None = None
        self._saved: Mapping[str, Any] | None = None  # the checkpoint's table, until its place is made
        self._new: tuple[Tensor, Tensor] | None = None  # ids of the batch at hand, and which of it are right

    @property
    def needs_criterion(self) -> bool:
        """Only forgetting looks at training steps."""
        return self.score == "forgetting"

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        self._forget()
        self._trainer, self._resumed = plan.trainer, plan.section is not None
        plan.at_end(self._finish)
        epochs = plan.trainer.max_epochs
        if epochs is not None and -1 < epochs < self.at_epoch:
            raise RecipeError(
                f"DataDiet: at_epoch={self.at_epoch} and Trainer(max_epochs=...) is {epochs}: scores would never be"
                " computed; score earlier, or train longer"
            )
        if self.score == "grand" and self.at_epoch == 0:
            rank_zero_warn(
                "DataDiet: GraNd at initialisation does not beat a random choice and goes with the norm of the input"
                " (https://arxiv.org/abs/2303.14753); score after an epoch or more"
            )
        if isinstance(self.criterion, str):
            plan.at_end(wrap_named(plan.module, self.criterion))
        if self.score == "forgetting":
            self._ids = SampleIds(plan.trainer, "DataDiet(score='forgetting')", check=self._check_size)
            plan.install(self._ids)
            super().declare(plan)

    def _finish(self) -> None:
        self._trainer = self._ids = self._table = self._new = None

    def _check_size(self, total: int) -> None:
        saved = None if self._saved is None else len(self._saved["written"])
        there = self._table.samples if self._table is not None else saved
        if there is not None and there != total:
            raise RecipeError(f"DataDiet: the training set has {total} samples and had {there} before")

    # -- when --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trainer is None:
            return
        if self.scores is not None:
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in self._summary().items()})
            return
        with speaking_for(self):
            self._begin(trainer, pl_module)
        if self.at_epoch == 0:
            self._compute(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The weights here are those that the last epoch ended with, also where its end was in another process."""
        due = batch_idx == 0 and trainer.current_epoch == self.at_epoch
        if due and self._trainer is not None and self.scores is None:
            self._compute(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trainer is not None and self.stop_after and trainer.current_epoch + 1 == self.at_epoch:
            trainer.should_stop = True  # and score when training has ended

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trainer is None or self.scores is not None:
            return
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.current_epoch == self.at_epoch and whole:
            self._compute(trainer, pl_module)
        else:
            rank_zero_warn(
                f"DataDiet: there are no scores, for the fit never stood at the end of {self.at_epoch} whole epochs; it"
                f" ended after {trainer.current_epoch}"
            )

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Whatever can be found out before the first step is, on the first few samples."""
        if trainer.current_epoch > self.at_epoch:
            raise RecipeError(
                f"the fit resumes in epoch {trainer.current_epoch}, at_epoch={self.at_epoch} is past and the checkpoint"
                " holds no scores: they would never be computed"
            )
        if not self._run_name:
            self._run_name = self.run or decided_on_rank_zero(lambda: _name_of(module), trainer)
        if self.score == "forgetting":
            self._table = SampleTable(self._ids.total, 3, storage="device", device=module.device)
            if self._saved is not None:
                self._table.load(self._saved)
                self._saved = None
            dataset: Any = training_set(trainer)
        else:
            samples = self._samples(trainer)
            few = samples_of(samples.loader, chosen=range(min(2 * rank_and_world()[1], samples.total)))
            self._pass(trainer, module, few, iter)
            dataset = samples.loader.dataset
            if reads_anew(dataset):
                rank_zero_warn(
                    "DataDiet: the training set gives another input each time (augmentation), and scores are meant for"
                    " plain ones; give dataset=, the same samples in the same order without it"
                )
        decided_on_rank_zero(lambda: self._check_file(len(dataset), known_labels(dataset)), trainer)

    # -- scores ------------------------------------------------------------------------------------------------------

    def _compute(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with speaking_for(self):
            samples = self._samples(trainer)
            if self._table is not None:
                dataset: Any = training_set(trainer)
                rows, _ = self._table.read(torch.arange(self._table.samples))
                root = root_of(dataset)[1]
                scores = forgetting(rows).cpu()
                self.scores, self.labels = (scores if root is None else scores[root]), labels_of(dataset)
            else:
                self.scores, self.labels = self._pass(trainer, module, samples, bar(trainer, "scoring"))
            folder = where_to_draw(trainer)  # asks all ranks
            kept = decided_on_rank_zero(lambda: self._keep(samples.loader, folder), trainer)
        self.path, self.verdict = kept
        log_values(trainer, self._summary())
        log_text(trainer, "data_diet/verdict", self.verdict)
        rank_zero_info(f"DataDiet: {self.verdict}")
        if self.stop_after:
            trainer.should_stop = True

    def _samples(self, trainer: pl.Trainer) -> Samples:
        if self.dataset is None:
            samples = training_samples(trainer)
            return samples_of(samples.loader, None, None, self.batch_size, self.num_workers)
        loader = trainer.train_dataloader
        there = getattr(loader, "dataset", None)
        if there is not None and hasattr(there, "__len__") and len(there) != len(self.dataset):
            raise RecipeError(
                f"dataset has {len(self.dataset)} samples and the training set {len(there)}; give the same in the same"
                " order"
            )
        loader = loader if isinstance(loader, DataLoader) else DataLoader(self.dataset)
        return samples_of(loader, self.dataset, None, self.batch_size, self.num_workers)

    def _pass(
        self, trainer: pl.Trainer, module: pl.LightningModule, samples: Samples, progress: Callable[[Samples], Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores fp32 and labels of some samples, the same on every rank."""
        now: dict[str, Tensor] = {}
        # uncompiled: no graph of the run's is traced anew, and functional transforms go through none
        with (
            torch.compiler.set_stance("force_eager"),
            random.held_left_alone(samples.loader.dataset),
            ExitStack() as on,
        ):
            reader = on.enter_context(_Reader(self, trainer, module))

            def run(batch: Any, number: int) -> Tensor:
                now["score"], labels = reader.scores(batch, number)
                now["score"] = now["score"][:, None]
                return labels

            found = encode(trainer, module, lambda: now, samples, progress=progress, run=run, full_precision=True)
        return found.features["score"][:, 0], found.targets

    # -- forgetting --------------------------------------------------------------------------------------------------

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """Look at the network's own logits, once a batch, and leave them as they are."""
        if self.scores is None and not (step.replaying or step.run_again or self in step.notes):
            step.notes[self] = True
            found, targets = step.outputs.detach(), step.hard_targets
            if not step.call.classifies or found.dim() != 2 or len(targets) != len(found):
                raise RecipeError(
                    "DataDiet needs a classification loss of logits [n, classes]; the observed one is"
                    f" {step.call.name} of {tuple(found.shape)} and {tuple(targets.shape)}"
                )
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            ids = self._ids.now()
            if len(ids) != len(found):
                raise RecipeError(f"DataDiet: the batch has {len(ids)} samples and the loss got logits of {len(found)}")
            self._new = ids, found.argmax(1) == labels
        return logits

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._table is None or self.scores is not None:
            return
        new, self._new = self._new, None
        ids = rows = None
        if new is not None:
            ids, rows = new[0], forget(self._table.read(new[0])[0], new[1])
        if active():
            ids, rows = of_all_ranks(ids, rows, self._ids.most, torch.empty(3, device=pl_module.device))
        if ids is not None:
            self._table.write(ids, rows)

    # -- what is done with them --------------------------------------------------------------------------------------

    def _artefact(self, total: int) -> Artefact:
        made_from = {"score": self.score, "at_epoch": self.at_epoch, "samples": total}
        return Artefact(self.out, f"{self.score}-epoch{self.at_epoch}", made_from)

    def _check_file(self, total: int, labels: Tensor | None) -> None:
        """Find out now that the scores could not be added to the file."""
        content = None if self.out is None else self._artefact(total).load()
        if content is not None and not self._resumed:
            if self._run_name in content["runs"]:
                raise RecipeError(
                    f"the file {self._artefact(total).path} holds run {self._run_name!r} already; scores are a mean"
                    " over independent runs: begin with another seed (seed_everything), or give run="
                )
            if labels is not None:
                _check_labels(content["labels"], labels, self._artefact(total).path)

    def _keep(self, loader: DataLoader, folder: Path | None) -> tuple[Path | None, str]:
        """On rank 0: into the file, into a picture and into words."""
        path, where = None, ""
        if self.out is not None:
            artefact = self._artefact(len(self.scores))
            path, runs = artefact.path, len(artefact.update(self._added)["runs"])
            where = f" {runs} run{'s' if runs > 1 else ''} in {path}."
        if self.draw and folder is not None:
            self._draw(folder / f"data_diet_{self.score}.png", loader)
        return path, self._in_words() + where

    def _in_words(self) -> str:
        hardest, total = suspicious(self.scores, 5).tolist(), len(self.scores)
        found = (
            f"{self.score} of {total} examples after {self.at_epoch} epochs, median {float(self.scores.median()):.3g}."
        )
        if self.score == "el2n" and (above := int((self.scores > 1).sum())):
            found += f" {above} are above 1, which takes a confident wrong answer."
        return f"{found} The hardest, to be looked at first, are {hardest}."

    def _added(self, content: Content | None) -> Content:
        if content is None:
            empty = torch.zeros(0, len(self.scores))
            content = {"score": self.score, "at_epoch": self.at_epoch, "runs": [], "values": empty}
            content["labels"] = self.labels
        _check_labels(content["labels"], self.labels, self._artefact(len(self.scores)).path)
        kept = [i for i, name in enumerate(content["runs"]) if name != self._run_name]  # a resume scores once more
        runs = [content["runs"][i] for i in kept] + [self._run_name]
        return {**content, "runs": runs, "values": torch.cat([content["values"][kept], self.scores[None]])}

    def _draw(self, path: Path, loader: DataLoader, most: int = 12) -> None:
        order = suspicious(self.scores, len(self.scores)).tolist()
        chosen = {"hardest": order[:most], "easiest": order[::-1][:most]}
        with random.forked(torch.device("cpu")), random.held_left_alone(loader.dataset):
            batches = [loader.collate_fn(read(loader.dataset, places)) for places in chosen.values()]
        try:
            inputs = [get_input(batch) for batch in batches]
        except RecipeError:
            return
        if all(is_picture(image) for images in inputs for image in images):
            words = {
                k: [f"{i}: {self.labels[i]}\n{self.scores[i]:.2f}" for i in places] for k, places in chosen.items()
            }
            rows = {name: list(zip(images, words[name])) for name, images in zip(chosen, inputs)}
            draw_images(path, rows, f"{self.score} after {self.at_epoch} epochs (index: label, score)", most)

    def _summary(self) -> dict[str, float]:
        finite = self.scores[self.scores.isfinite()].double()
        finite = finite if len(finite) else torch.zeros(1, dtype=torch.float64)
        q10, median, q90 = _quantiles(finite, (0.1, 0.5, 0.9))
        values = {"mean": float(finite.mean()), "q10": q10, "median": median, "q90": q90}
        values["above_one"] = float((self.scores > 1).double().mean())
        return {f"data_diet/{name}": value for name, value in values.items()}

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        table = self._saved if self._table is None or self.scores is not None else self._table.state()
        return {"run": self._run_name, "scores": self.scores, "labels": self.labels, "table": table}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._trainer is None:
            return
        self._run_name, self.scores, self.labels = state["run"], state["scores"], state["labels"]
        self._saved = state["table"]
        if self.scores is not None and self.out is not None:
            self.path = self._artefact(len(self.scores)).path


@dataclass
class _Seen:
    """What a batch came to: logits and targets, and the call of the network that gave the logits where GraNd asks."""

    logits: Tensor
    targets: Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


class _Reader:
    """Scores batches of a module. What it needs of the module is found out at its first batch.

    Use it as a context manager; under it the module is watched.
    """

    def __init__(self, recipe: DataDiet, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.recipe, self.trainer, self.module = recipe, trainer, module
        self._undo = ExitStack()
        self._network: str | None = None  # that GraNd goes through, once it is found
        self._gradients: SampleGradients | None = None
        self._called = False  # whether its own call in the training step is repeated
        self._last: tuple[Taps, nn.Linear] | None = None

    def __enter__(self) -> _Reader:
        if self.recipe.score == "grand_last":
            path, head = head_input(self.module)
            taps = Taps(self.module, {"features": (path, "input"), "logits": (path, "output")})
            self._last = self._undo.enter_context(taps), head
        if self.recipe.score == "grand":
            mixing = [n for n, p in self.module.named_modules() if isinstance(p, _BatchNorm) and p.running_mean is None]
            if mixing:
                raise RecipeError(
                    f"score='grand' needs examples that do not depend on each other; {mixing[0]} normalises by its"
                    " batch and keeps no running statistics"
                )
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def scores(self, batch: Any, number: int) -> tuple[Tensor, Tensor]:
        """Scores ``[n]`` and labels ``[n]`` of a batch on the device."""
        seen = self._see(batch, number)
        logits, targets = seen.logits.detach(), seen.targets.detach()
        score = el2n(logits, targets)  # checks both
        kind = self.recipe.score
        if kind == "grand":
            score = self._grand(seen)
        elif kind == "grand_last":
            score = self._grand_last(logits, targets)
        elif kind != "el2n":
            score = OF_LOGITS[kind](logits, targets)
        return score.detach(), (targets.argmax(1) if targets.is_floating_point() else as_indices(targets))

    def _see(self, batch: Any, number: int) -> _Seen:
        if self.recipe.forward != "auto":
            return self._by_forward(batch)
        if self.recipe.score != "grand" or (self._network is not None and not self._called):
            seen = self._observed(batch, number)
            return _Seen(seen.logits, seen.targets, (get_input(batch),) if self._network is not None else ())
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor | None]] = []
        watched = dict(self.module.named_modules())
        watched = watched if self._network is None else {self._network: watched[self._network]}
        with ExitStack() as hooks:
            for name, part in watched.items():

                def keep(part: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    calls.append((name, args, kwargs, logits_in(output)))

                hooks.callback(part.register_forward_hook(keep, with_kwargs=True).remove)
            seen = self._observed(batch, number)
        gave = [call for call in calls if _the_same(call[3], seen.logits)]
        if self._network is None:
            self._find_network(batch, seen, gave[-1][0] if gave else None)
        if not self._called:
            return _Seen(seen.logits, seen.targets, (get_input(batch),))
        _, args, kwargs, _ = gave[-1]  # the outermost of those that hand on the same tensor ends last
        return _Seen(seen.logits, seen.targets, args, kwargs)

    def _observed(self, batch: Any, number: int) -> Any:
        try:
            seen = observe(self.trainer, self.module, batch, number, self.recipe.criterion)
        except IndexError as error:  # torch's, of a label without a class
            raise RecipeError(
                f"the training step fails on the training data ({error}): is there a label that the logits have no"
                " class for?"
            ) from error
        if not classified(seen):
            raise RecipeError(
                f"needs a classification loss of logits [n, classes]; the observed one is {seen.call.name} of"
                f" {tuple(seen.logits.shape)} and {tuple(seen.targets.shape)}: name the part that gives logits for a"
                " batch's input with forward="
            )
        return seen

    def _by_forward(self, batch: Any) -> _Seen:
        part, x, y = part_of(self.module, self.recipe.forward), get_input(batch), labels_in(batch)
        with torch.no_grad(), silent(self.module):
            logits = logits_in(part(x))
        if logits is None or not isinstance(y, Tensor):
            found = "no logits [n, classes]" if logits is None else "no labels beside them"
            raise RecipeError(f"forward={self.recipe.forward!r} gave {found} for {describe(batch)}")
        self._network = "" if self.recipe.forward == "forward" else self.recipe.forward
        return _Seen(logits, y, (x,))

    def _find_network(self, batch: Any, seen: Any, called: str | None) -> None:
        """The part whose call gave the logits, if it holds all that trains; else the module by its ``forward``."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(seen.loss, list(trained.values()), allow_unused=True)
        reached = {name for name, g in zip(trained, found) if g is not None}
        if called is not None:
            inside = f"{called}." if called else ""
            if all(name.startswith(inside) for name in reached):
                self._network, self._called = called, True
                return
        try:
            with torch.no_grad(), silent(self.module):
                logits = logits_in(self.module(get_input(batch)))
        except Exception:  # it takes something else, or there is no forward
            logits = None
        if logits is None or logits.shape != seen.logits.shape or not torch.allclose(logits, seen.logits, atol=1e-4):
            raise RecipeError(
                "score='grand' needs one part that makes the logits of a batch and holds all parameters that train"
                f" ({called or 'none'} makes them here): name it with forward=, or use score='grand_last'"
            )
        self._network = ""

    def _grand(self, seen: _Seen) -> Tensor:
        network = self.module.get_submodule(self._network)
        if self._gradients is None:
            self._gradients = SampleGradients(network, each_cross_entropy, self.recipe.grad_chunk)
        try:
            with silent(self.module):
                return self._gradients.norms(seen.args, seen.targets.detach(), seen.kwargs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, (torch.OutOfMemoryError, RecipeError)):
                raise
            first = str(error).strip().partition("\n")[0]
            raise RecipeError(
                f"score='grand' cannot be computed example by example through {type(network).__name__} ({first}); use"
                " score='grand_last'"
            ) from error

    def _grand_last(self, logits: Tensor, targets: Tensor) -> Tensor:
        taps, head = self._last
        features, output = taps["features"].detach(), taps["logits"]
        if features.dim() != 2 or output.shape != logits.shape or not torch.allclose(output, logits, atol=1e-4):
            raise RecipeError(
                f"score='grand_last' needs logits that are the output of a last linear layer; it gives"
                f" {tuple(output.shape)} for features {tuple(features.shape)}, and the logits {tuple(logits.shape)} are"
                " something else: use score='el2n'"
            )
        return grand_last(logits, targets, features, head.bias is not None)


def _the_same(output: Tensor | None, logits: Tensor) -> bool:
    """Whether a part gave these logits; a loss may get a view of them."""
    return output is not None and output.shape == logits.shape and output.data_ptr() == logits.data_ptr()


def _name_of(module: nn.Module) -> str:
    """Of a run, by the weights and the random state that it begins with."""
    weights = dict(module.named_parameters())
    return key_of({"weights": weights, "random": torch.get_rng_state()})[:16]


def _check_labels(there: Tensor, here: Tensor, path: Path) -> None:
    differ = len(there) != len(here) or not torch.equal(there, here)
    if differ:
        count = int((there != here).sum()) if len(there) == len(here) else f"{len(there)} and {len(here)}"
        raise RecipeError(
            f"the labels of the training set are not those of the scores in {path} ({count} differ); scores of other"
            " data go to another folder"
        )


def _quantiles(values: Tensor, at: Sequence[float]) -> list[float]:
    """By the nearest rank; ``torch.quantile`` takes no more than 16 million values."""
    ordered = values.sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in at]

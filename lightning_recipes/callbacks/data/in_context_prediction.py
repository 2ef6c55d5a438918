"""Prediction on a table of one's own by a network that was trained on a prior: no training, one forward pass.

Mueller et al., "Transformers Can Do Bayesian Inference", ICLR 2022 (https://arxiv.org/abs/2112.10510). The rows with a
target are the context, the others are queries; queries do not see each other, so any number of them at a time gives
the same predictions. With the predictive q of a query

    mean, median and the central interval [q^-1((1 - c) / 2), q^-1((1 + c) / 2)],   or class probabilities

The network knows data that look like its prior's. Where the context does not, it is brought there by its own mean and
standard deviation, and predictions are brought back:

    y' = (y - mean_context) / std_context * std_prior + mean_prior,   the same for every feature

A prediction costs attention of every query over the context.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_recipes.core.diagnostics import draw_curves, where_to_draw
from lightning_recipes.core.distributed import active
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.predict import Predict, wrap_predictions
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.modules.pfn import PAPER, Classes, PFNModule


@dataclass(frozen=True)
class Scaling:
    """A linear map that brings values of one mean and spread to another, column by column.

    Attributes:
        centre, spread: of what comes, ``[F]`` or scalars.
        to_centre, to_spread: of what it becomes.
    """

    centre: Tensor
    spread: Tensor
    to_centre: Tensor
    to_spread: Tensor

    @classmethod
    def between(cls, values: Tensor, to_centre: Tensor, to_spread: Tensor) -> Scaling:
        """From the mean and standard deviation of values ``[n, ...]``; a column of equal values is only moved."""
        spread = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
        return cls(values.mean(0), torch.where(spread > 0, spread, to_spread), to_centre, to_spread)

    def there(self, values: Tensor) -> Tensor:
        return (values - self.centre) / self.spread * self.to_spread + self.to_centre

    def back(self, values: Tensor) -> Tensor:
        return (values - self.to_centre) / self.to_spread * self.spread + self.centre


def padded(x: Tensor, num_features: int) -> Tensor:
    """Features of 0 after the last: ``[n, f]`` to ``[n, num_features]``."""
    return torch.nn.functional.pad(x, (0, num_features - x.shape[-1]))


class InContextPrediction(Recipe):
    """Predicts the queries that a `predict` dataloader gives, from a context, with a trained `PFNModule`.

    Every batch becomes a dict of ``mean``, ``median``, ``lower`` and ``upper`` [n] in the units of the context's
    targets, or of ``probabilities`` [n, classes] and ``label`` [n]; ``trainer.predict`` returns them. At the end
    ``predictions.csv`` and, for a regression, ``predictions.png`` with mean and interval are written. In a fit it does
    nothing.

    The context is that of a `TableDataModule`, whose CSV file has both, or is given:

        trainer = Trainer(callbacks=[InContextPrediction(context=(x, y))])
        trainer.predict(PFNModule.load_from_checkpoint("pfn.ckpt"), DataLoader(queries, batch_size=1000))

    Args:
        context: x [n, F] and y [n], tensors or arrays; None for the data module's.
        interval: mass of the central interval.
        standardize: bring the targets to the mean and spread of the prior's, and predictions back; None where they
            reach beyond what the prior gives, and it says so.
        rescale: the same for every feature.
        chunk_size: queries in one forward pass at most; None for whole batches.
        folder: where files go; None for the run's log folder, or none at all for a run that logs nowhere.
        draw: whether to save the picture (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; before a prediction, for a module that is no PFNModule, no context, contexts of
            other shapes or with NaN, or more features than the network has.
    """

    paper = PAPER
    does = "Predicts on a table of your own, with intervals and a plot, by a trained prior-data fitted network."
    use_when = "You have a trained PFNModule and a small table: posterior means and intervals without training."
    costs = "one forward pass over context and queries; nothing in training."

    def __init__(
        self,
        context: Sequence[Any] | None = None,
        interval: float = 0.95,
        standardize: bool | None = None,
        rescale: bool | None = None,
        chunk_size: int | None = None,
        folder: str | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        check_argument(context is None or len(context) == 2, self, "context", type(context).__name__, "None or (x, y)")
        check_argument(0 < interval < 1, self, "interval", interval, "in (0, 1)")
        check_argument(chunk_size is None or chunk_size >= 1, self, "chunk_size", chunk_size, "None or at least 1")
        self.context, self.interval, self.standardize, self.rescale = context, interval, standardize, rescale
        self.chunk_size, self.folder, self.draw = chunk_size, folder, draw

    def state_dict(self) -> dict[str, Any]:
        return {"arguments": {}, "state": {}, "structure": None}  # a training has nothing of it, least of all the table

    # -- before ------------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if plan.trainer.state.fn != "predict":
            return
        module = plan.module
        if not isinstance(module, PFNModule):
            raise RecipeError(f"predicts with a PFNModule, which takes a context; {type(module).__name__} takes none")
        given = getattr(plan.trainer.datamodule, "context", None) if self.context is None else self.context
        if given is None:
            raise RecipeError("has no context to predict from; give context=(x, y), or predict on a TableDataModule")
        self._x, self._y = (torch.as_tensor(each).float() for each in given)
        self._check(module)
        self._classifies = isinstance(module.distribution, Classes)
        self._parts: list[dict[str, Tensor]] = []
        plan.at_end(wrap_predictions(module, lambda predict, batch: self._predict(module, predict, batch)))
        plan.at_end(self._parts.clear)

    def _check(self, module: PFNModule) -> None:
        x, y = self._x, self._y
        if x.dim() != 2 or y.dim() != 1 or len(x) != len(y):
            raise RecipeError(f"context must be x [n, F] and y [n]; got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if x.shape[1] > module.num_features:
            raise RecipeError(
                f"the context has {x.shape[1]} features and the network was trained on {module.num_features}; leave"
                " some out, or train one with more"
            )
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise RecipeError("the context has values that are not finite; fill them in or leave the rows out")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The checkpoint is loaded: what the network was trained on is known."""
        x, y, module = self._x.to(pl_module.device), self._y.to(pl_module.device), pl_module
        known, features = int(module.max_context), x.shape[1]
        if known and len(y) >= known:
            rank_zero_warn(
                f"InContextPrediction: the context has {len(y)} samples, and the network was trained on at most"
                f" {known - 1}: its predictions are an extrapolation"
            )
        self._low, self._high = module.x_low[:features], module.x_high[:features]
        alien_x = bool(known) and bool(((x < self._low) | (x > self._high)).any())
        alien_y = bool(known) and bool(((y < module.y_low) | (y > module.y_high)).any()) and not self._classifies
        self._x_scaling = self._y_scaling = None
        one, zero = torch.ones_like(y[:1].sum()), torch.zeros_like(y[:1].sum())
        if len(y) and (alien_x if self.rescale is None else self.rescale):
            to = (module.x_mean[:features], module.x_std[:features]) if known else (zero, one)
            self._x_scaling = Scaling.between(x, *to)
        if len(y) and not self._classifies and (alien_y if self.standardize is None else self.standardize):
            self._y_scaling = Scaling.between(y, *((module.y_mean, module.y_std) if known else (zero, one)))
        for automatic, scaling, what in (
            (self.rescale is None, self._x_scaling, "features reach"),
            (self.standardize is None, self._y_scaling, "targets reach"),
        ):
            if automatic and scaling is not None:
                rank_zero_info(
                    f"InContextPrediction: the context's {what} beyond the prior's; they are brought to its mean and"
                    " standard deviation, and predictions back"
                )
        x = x if self._x_scaling is None else self._x_scaling.there(x)
        self._context_x = padded(x, module.num_features)[:, None]
        self._context_y = (y if self._y_scaling is None else self._y_scaling.there(y))[:, None]
        folder = where_to_draw(trainer)  # asks all ranks
        self._folder = folder if self.folder is None else Path(self.folder)

    # -- predictions -------------------------------------------------------------------------------------------------

    def _predict(self, module: PFNModule, predict: Predict, batch: Any) -> dict[str, Tensor]:
        queries = self._queries(batch).to(module.device)
        x = queries if self._x_scaling is None else self._x_scaling.there(queries)
        beyond = ((x < self._low) | (x > self._high)).any(1)
        x = padded(x, module.num_features)[:, None]
        n = len(self._context_y)
        parts = [
            predict({"x": torch.cat([self._context_x, some]), "y": self._context_y, "n_context": n})["logits"][:, 0]
            for some in x.split(self.chunk_size or max(len(x), 1))
        ]
        logits = torch.cat(parts)
        if self._classifies:
            probabilities = module.distribution.probabilities(logits)
            found = {"probabilities": probabilities, "label": probabilities.argmax(-1)}
        else:
            tail, to = (1 - self.interval) / 2, module.distribution
            found = {"mean": to.mean(logits), "median": to.icdf(logits, 0.5)}
            found |= {"lower": to.icdf(logits, tail), "upper": to.icdf(logits, 1 - tail)}
            if self._y_scaling is not None:
                found = {name: self._y_scaling.back(values) for name, values in found.items()}
        rows = batch.get("row") if isinstance(batch, Mapping) else None
        kept = {**found, "x": queries, "beyond": beyond} | ({} if rows is None else {"row": rows})
        self._parts.append({name: value.cpu() for name, value in kept.items()})
        return found

    def _queries(self, batch: Any) -> Tensor:
        """x ``[m, F]`` of a batch: under 'x', the first of several, or the batch itself.

        Raises:
            RecipeError: for another number of features than the context has.
        """
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        x = batch.get("x") if isinstance(batch, Mapping) else x
        features = self._x.shape[1]
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != features:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise RecipeError(f"InContextPrediction: queries must be [n, {features}], as the context has; got {got}")
        return x.float()

    # -- after -------------------------------------------------------------------------------------------------------

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        everyone = [self._parts]
        if active():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self._parts)
        parts = [part for of_rank in everyone for part in of_rank]
        if not parts or not trainer.is_global_zero:
            return
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "row" in found:
            order = found.pop("row").argsort()
            found = {name: values[order] for name, values in found.items()}
        beyond = int(found.pop("beyond").sum())
        if beyond and int(pl_module.max_context):
            rank_zero_warn(
                f"InContextPrediction: {beyond} of {len(found['x'])} queries lie beyond all inputs of the prior: their"
                " predictions are an extrapolation"
            )
        if self._folder is not None:
            names = getattr(trainer.datamodule, "feature_names", None)
            target = getattr(trainer.datamodule, "target_name", "y")
            write_csv(self._folder / "predictions.csv", found, names)
            if self.draw and not self._classifies:
                picture(self._folder / "predictions.png", found, self._x, self._y, self.interval, names, target)


def write_csv(path: Path, found: Mapping[str, Tensor], names: Sequence[str] | None = None) -> None:
    """The queries with what was predicted, a line each: ``x`` [n, F] and any number of ``[n]`` or ``[n, C]``."""
    columns: dict[str, Tensor] = {}
    for name, values in found.items():
        if values.dim() == 1:
            columns[name] = values
            continue
        numbered = names if name == "x" and names is not None else [f"{name}{i}" for i in range(values.shape[1])]
        columns |= dict(zip(numbered, values.T))
    order = sorted(columns, key=lambda name: name in found)  # features first, in a stable order
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(order)
        writer.writerows(zip(*(columns[name].tolist() for name in order)))


def picture(
    path: Path,
    found: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    interval: float,
    names: Sequence[str] | None = None,
    target: str = "y",
) -> None:
    """Means and intervals of the queries: over the feature with the context's points, or, for several, by rank."""
    mean, low, high = found["mean"], found["lower"], found["upper"]
    one = x.shape[1] == 1
    order = (found["x"][:, 0] if one else mean).argsort()
    across = found["x"][order, 0] if one else torch.arange(len(order))
    name = f"mean and central {interval:.0%}"
    curves = {name: (across.tolist(), mean[order].tolist())}
    if one:
        curves["context"] = (x[:, 0].tolist(), y.tolist())
    draw_curves(
        path,
        curves,
        f"{target}: {len(mean)} predictions from {len(y)} samples",
        (names[0] if names else "x") if one else "queries, by their mean",
        target,
        bands={name: (low[order].tolist(), high[order].tolist())},
        points=["context"],
    )

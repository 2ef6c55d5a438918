"""How training error and test error go over time, by the theory of linear networks, read off anybody's training.

Advani, Saxe, Sompolinsky, "High-dimensional dynamics of generalization error in neural networks", Neural Networks 132,
2020 (https://arxiv.org/abs/1710.03667; no official code). A linear student of N inputs descends the squared error of P
samples of a noisy teacher; ``core/linear_dynamics.py`` has its errors over time, in closed form, from the eigenvalues
l_i of X X^T, alpha = P/N, SNR = s_w/s_e (of the teacher and its noise) and INR = s_0/s_e (of the first weights).

*Stopping*: t* = argmin E_test. *Overtraining*: E_test(now) - E_test(t*), worst at alpha = 1, where E_test grows without
bound.

Of anybody's network the readout is that student, on the features h that go into it. Features of another size are
divided by their scale s = sqrt(mean square x N), and the weights are multiplied by it, so that t = s^2 c eta k / P.

*Frozen subspace*: gradients of a linear layer are sums of its inputs. Under plain gradient descent without decay
nothing of its weights' change W(t) - W(0) lies outside of the span of the inputs.

Costs a forward pass over the probe a measurement and an eigendecomposition, O(min(P, N)^2 max(P, N)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_recipes.core import select
from lightning_recipes.core.diagnostics import Monitor, draw_curves
from lightning_recipes.core.distributed import decided_on_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import apart, as_a_step_gets_it
from lightning_recipes.core.features import Taps, head_input, part_of
from lightning_recipes.core.head_fit import where_to_fit
from lightning_recipes.core.linear_dynamics import (
    best_test_error,
    complexity,
    correlated,
    edges,
    empirical,
    expected_test_error,
    expected_train_error,
    flow_time,
    frozen_share,
    marchenko_pastur,
    more_data,
    optimal_stopping_time,
    outside_share,
    ridge_test_error,
    signal_and_noise,
)
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, encode, samples_at_hand, samples_of, some_of
from lightning_recipes.core.readout import Tally, kind_of, numbers_of
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.spectrum import WIDEST, Spectrum, Sums, spectrum
from lightning_recipes.core.step import Replay, observe

PAPER = Paper(
    "High-dimensional dynamics of generalization error in neural networks",
    "M. S. Advani, A. M. Saxe, H. Sompolinsky",
    2020,
    "https://arxiv.org/abs/1710.03667",
)
FEWEST = 64
"""Samples below which a spectrum says little."""
STUDENT = ""
"""The readout among the tapped layers; the others go by their names."""

# -- in words -------------------------------------------------------------------------------------------------------


def words(now: Mapping[str, float], step: int, index: bool = False) -> str:
    """What the figures of the last measurement come to, and what to do.

    Args:
        now: as the monitor logs them.
        step: optimizer steps so far.
        index: whether they are to be read as an index and are no forecast.
    """
    t, star = now["t"], now["t_star"]
    here, best, end = now["pred_test_error"], now["pred_best"], now["pred_final"]
    if math.isnan(here):
        return "The features no longer vary or are not finite: there is no forecast."
    what = "index of the test error" if index else "forecast of the test error"
    if star == 0:
        return f"Stop now: by the {what} nothing can be learnt from these features but noise (SNR {now['snr']:.2g})."
    if t == 0:
        return f"The readout has not moved by step {step}, so there is nothing to forecast from."
    at = f"step {step * star / t:.0f}" if math.isfinite(star) else "no step"
    lost, ahead = here - best, end - best
    without_end = "more than ten times the best" if ahead > 10 * best else f"{ahead:.3g} ({100 * ahead / best:.0f} %)"
    if ahead <= 0.01 * best and lost <= 0.01 * best:
        said = f"Stop when you like: the {what} is {here:.3g}, and training on costs 1 % at most, even without end."
    elif t > star and lost > 0.01 * best:
        said = (
            f"Stop now: the {what} was best at {at} ({best:.3g}), and overtraining has cost {lost:.3g}"
            f" ({100 * lost / best:.0f} %) since; without end it would cost {without_end}."
        )
    elif lost <= 0.01 * best:
        said = f"Stop now: the {what} is at its best ({here:.3g}, {at}); overtraining without end costs {without_end}."
    elif math.isfinite(star):
        said = (
            f"Keep training to about {at}: the {what} falls from {here:.3g} to {best:.3g}; overtraining without end"
            f" would cost {without_end}."
        )
    else:
        said = f"Keep training: the {what} falls from {here:.3g} to {best:.3g}, and there is no overtraining."
    gains = {
        "twice the data": now["gain_data"],
        "smaller first weights": now["gain_start"],
        "the best weight decay": now["gain_ridge"],
    }
    if t > star:
        gains["stopping in time"] = lost
    ordered = sorted(gains.items(), key=lambda item: -item[1])
    (most, much), others = ordered[0], [f"{name} ({max(gain, 0.0):.2g})" for name, gain in ordered[1:]]
    return f"{said} {most[0].upper()}{most[1:]} would help most, by {much:.2g}; more than {', '.join(others)}."


# -- the callback ----------------------------------------------------------------------------------------------------


class GeneralizationMonitor(Monitor):
    """Forecast from the training set alone how the test error will go, and say when to stop.

    Takes the inputs of the readout, the last linear layer, on a probe of training samples, and by the theory of linear
    networks forecasts the squared error of that layer's training on these features. The theory is exact for a linear
    model on features without correlations under plain gradient descent of small rate from random weights
    (`LinearStudent` on `StudentTeacherDataModule`). The further a run is from that, the less of a forecast it is: what
    is different is said in `limits`, and so is a training error that is not the one of the theory. With class labels
    (as one-hot vectors) it is an index of how far to train, never a forecast.

    Logs ``gd/alpha`` (P/N), ``alpha_eff`` (P/rank), ``lambda_min_nonzero``, ``lambda_max``, ``mp_edge_lo``,
    ``mp_edge_hi`` (where features without correlations would have them), ``frozen_frac``, ``soft_frozen_frac``,
    ``snr``, ``inr``, ``noise`` (s_e), ``t``, ``t_star``, ``complexity``; errors in the units of the module's own mean
    square, ``pred_test_error``, ``pred_train_error`` and ``pred_best`` (at t*), ``pred_final`` (without end),
    ``overtraining``, what other things would gain at the best stop, ``gain_data`` (twice the samples), ``gain_start``
    (from zero weights), ``gain_ridge`` (the best weight decay), for a squared loss ``train_error`` (on the probe); and
    ``outside_update``, the share of the tracked layer's change outside of the span of its inputs (``/<layer>`` for
    several). At the end `verdict` says it in words, over a picture in the run's log folder.

    Args:
        readout: dotted path of the linear layer that is the student; None for the head.
        probe_size: training samples to measure on. Fewer than there are make it an estimate: eigenvalues grow with the
            number of samples, and are scaled up.
        loss_factor: c of the time: 2 for the mean of squares, 1 for half of it. For ``F.mse_loss``, which averages over
            outputs too, it is divided by their number.
        frozen_tol: share of the largest eigenvalue below which a direction counts as frozen.
        track_frozen: linear layers whose change to hold against their inputs: "first" for the network's first layer
            where that is linear, names (``*`` for any one between dots), None for none.
        stop: end the fit when its time is past t*.
        patience_factor: how far past: at patience_factor x t*.
        force: stop also where the targets are class labels.
        every_n_steps: measure after every so many optimizer steps too.
        geometric_steps: measure after steps 0, 1, 2, 3, 5, 10, 20, 30, 50, ...
        budget: add at most this share to the run's work, counted in forward passes, and leave out what is more; None
            for no limit.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; under manual optimization and LBFGS; before the first step for a network without
            a linear readout, layers that are not there or not linear, data that are not read by index, fewer than 4
            samples an output, features that do not vary or are not finite, more than 8192 of them on a probe of as
            many, a loss that cannot be seen, and stop with class labels.
    """

    paper = PAPER
    does = "Forecasts the course of the test error from the training set alone, and says when to stop."
    use_when = "There is no data to validate on, or you ask whether more training, data or weight decay would help."
    costs = "A forward pass over 2,048 samples and an eigendecomposition, four times for every factor of ten in steps."
    log_prefix = "gd"
    ylabel = "squared error"

    def __init__(
        self,
        readout: str | None = None,
        probe_size: int = 2048,
        loss_factor: float = 2.0,
        frozen_tol: float = 1e-6,
        track_frozen: str | Sequence[str] | None = "first",
        stop: bool = False,
        patience_factor: float = 1.5,
        force: bool = False,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        budget: float | None = None,
        criterion: str | int | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        self.readout, self.probe_size, self.loss_factor, self.frozen_tol = readout, probe_size, loss_factor, frozen_tol
        self.track_frozen, self.stop, self.patience_factor, self.force = track_frozen, stop, patience_factor, force
        self.every_n_steps, self.geometric_steps = every_n_steps, geometric_steps
        self.budget, self.criterion, self.draw = budget, criterion, draw
        self.check_moments()
        named = readout is None or isinstance(readout, str)
        check_argument(named, self, "readout", readout, "None or the dotted path of a linear layer")
        check_argument(probe_size >= FEWEST, self, "probe_size", probe_size, f"at least {FEWEST}")
        check_argument(loss_factor > 0, self, "loss_factor", loss_factor, "positive: 2 for the mean of squares")
        check_argument(0 < frozen_tol < 1, self, "frozen_tol", frozen_tol, "between 0 and 1, as 1e-6")
        check_argument(patience_factor >= 1, self, "patience_factor", patience_factor, "at least 1")
        named = track_frozen is None or track_frozen == "first" or not isinstance(track_frozen, str)
        check_argument(named, self, "track_frozen", track_frozen, "'first', None or a list of names")
        self._points: dict[str, str] = {}  # the tapped linear layers' paths, by name
        self._taps: Taps | None = None
        self._module: pl.LightningModule | None = None
        self._clear()

    def _clear(self) -> None:
        self._kind = ""  # of the targets: 'squares', 'other' or 'classes'
        self._outputs, self._averaged, self._tokens = 1, False, set()  # and which points have several rows a sample
        self._start: dict[str, Tensor] = {}  # weights of tracked layers, and the mean square of the readout's
        self._rates, self._steps = 0.0, 0  # sum of eta / (1 - beta), and their number
        self._unit = 0.0  # what turns the sum of rates into t, by the last measurement
        self._star = math.inf
        self._forecast: dict[str, list[float]] = {}
        self._cached: dict[str, tuple[Tensor, Spectrum]] = {}

    # -- before the first step -----------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if plan.fitting:
            self._clear()
            self._module = plan.module
            plan.install(_Tapped(self, plan.module))
            plan.after_step(self._stepped)

    def _tap(self, module: pl.LightningModule) -> Taps:
        path, _ = head_input(module, self.readout or "auto")
        self._points = {STUDENT: path} | {name: name for name in self._tracked(module)}
        return Taps(module, {name: (where, "input") for name, where in self._points.items()})

    def _tracked(self, module: pl.LightningModule) -> list[str]:
        if self.track_frozen is None:
            return []
        if self.track_frozen == "first":
            parts = dict(module.named_modules())
            layers = [name for name, part in parts.items() if isinstance(getattr(part, "weight", None), Tensor)]
            return [name for name in layers[:1] if isinstance(parts[name], nn.Linear)]
        names = select.parts_named(module, list(self.track_frozen), "track_frozen")
        for name in names:
            if not isinstance(part_of(module, name), nn.Linear):
                kind = type(part_of(module, name)).__name__
                raise RecipeError(f"track_frozen: {name!r} is a {kind}; the span of inputs is that of linear layers")
        return names

    def _layer(self, name: str) -> nn.Linear:
        return part_of(self._module, self._points[name])

    @property
    def _weight(self) -> Tensor:
        return self._layer(STUDENT).weight

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        probe = self._probe(trainer)
        total = len(probe.loader.dataset)
        few = samples_of(probe.loader, chosen=range(min(2 * rank_and_world()[1], total)))
        with apart(trainer, "GeneralizationMonitor", "try"):
            for number, (batch, _) in enumerate(few):
                self._see(observe(trainer, module, as_a_step_gets_it(trainer, batch), number, self.criterion))
        if probe.total < 4 * self._outputs:
            raise RecipeError(
                f"{probe.total} samples say nothing of {self._outputs} outputs; it needs {4 * self._outputs} at least"
            )
        width = self._layer(STUDENT).in_features
        if min(width, probe.total) > WIDEST:
            raise RecipeError(
                f"the readout has {width} inputs, and {WIDEST} are the most; name another or take a smaller probe_size"
            )
        if self.stop and self._kind == "classes" and not self.force:
            raise RecipeError(
                "stop=True with class labels: the theory is one of the squared error, and t* an index; stop by a"
                " validation set, or give force=True"
            )
        for name in list(self._points):
            wide = self._layer(name).in_features
            if name != STUDENT and wide > WIDEST and (name in self._tokens or probe.total >= wide):
                self.limit(f"{name} has {wide} inputs, more than {WIDEST}, and is not tracked")
                del self._points[name]
        if not self._start:
            self._start = {name: self._layer(name).weight.detach().cpu().clone() for name in self._points}
            self._start[STUDENT] = self._start[STUDENT].double().square().mean()
        if differs := self._differs(trainer, module, probe, total):
            self.limit(
                "the theory is that of a linear model on fixed features under plain gradient descent from random"
                f" weights; here {', '.join(differs)}"
            )
        self._stop_if_over(trainer)  # decided before the checkpoint that this goes on from

    def _see(self, seen: Replay) -> None:
        """What kind of targets there are, and what goes into the layers."""
        for name in self._points:
            x = self._taps[name]
            if x.dim() != 2 or len(x) != len(seen.targets):
                if name == STUDENT:
                    raise RecipeError(
                        f"needs one feature vector a sample; {self._points[name]} got {tuple(x.shape)} for"
                        f" {len(seen.targets)} samples: name another with readout="
                    )
                self._tokens.add(name)
        self._kind = kind_of(seen)
        self._outputs, self._averaged = numbers_of(seen).shape[1], self._kind == "squares"

    def _differs(self, trainer: pl.Trainer, module: pl.LightningModule, probe: Samples, total: int) -> list[str]:
        """What of this run is not as the theory has it."""
        weight, own = self._weight, {id(p) for p in self._layer(STUDENT).parameters()}
        found = {
            "classes": "the targets are class labels, so the figures are an index and no forecast",
            "other": "the loss is not seen to be the mean of squares",
        }
        differs = [found[self._kind]] if self._kind in found else []
        if any(p.requires_grad and id(p) not in own for p in module.parameters()):
            differs.append("other layers train too and move the features")
        group = next((g for o in trainer.optimizers for g in _groups_of(o, weight)), None)
        optimizer = next((o for o in trainer.optimizers if _groups_of(o, weight)), None)
        if group is None or not weight.requires_grad:
            differs.append("the readout does not train")
        elif not isinstance(optimizer, SGD):
            name = type(optimizer).__name__
            differs.append(f"{name} is no plain gradient descent, so t and t* are on no common scale")
        else:
            if group.get("weight_decay"):
                differs.append(f"weights decay ({group['weight_decay']:g})")
            if group.get("momentum"):
                differs.append(f"momentum ({group['momentum']:g}) is counted as a larger rate")
        size = (probe.loader.batch_size or total) * trainer.accumulate_grad_batches * rank_and_world()[1]
        if size < total:
            differs.append("mini-batches follow the gradient of all data only at small rates")
        if total < FEWEST:
            differs.append(f"{total} samples are few for a law of large numbers")
        if probe.total < total:
            differs.append(
                f"the spectrum is that of {probe.total} of {total} samples, scaled up, with too wide an edge"
            )
        return differs

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer) -> None:
        for group in _groups_of(optimizer, self._weight):
            self._rates += float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
            self._steps += 1

    def _probe(self, trainer: pl.Trainer) -> Samples:
        samples = samples_at_hand(trainer)
        return samples_of(samples.loader, chosen=some_of(samples.total, self.probe_size, "GeneralizationMonitor"))

    def forwards(self, trainer: pl.Trainer) -> int:
        return self._probe(trainer).total

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, float]:
        probe, device = self._probe(trainer), where_to_fit(module)
        widths = {name: self._layer(name).in_features for name in self._points}
        sums = {
            name: Sums(width, self._outputs if name == STUDENT else 0, device)
            for name, width in widths.items()
            if probe.total >= width or name in self._tokens
        }
        tally = Tally(self._kind, device)

        def run(batch: Any, number: int) -> Tensor:
            seen = observe(trainer, module, batch, number, self.criterion)
            y = numbers_of(seen)
            for name in self._points:
                x = self._taps[name].detach()
                if name in sums:
                    sums[name].add(x.flatten(0, -2), y if name == STUDENT else None)
            tally.add(self._taps[STUDENT].detach(), y, seen)
            return y

        kept = encode(
            trainer,
            module,
            lambda: {name: self._taps[name] for name in self._points if name not in sums},
            probe,
            run=run,
            full_precision=True,
        )
        self._taps.values.clear()
        tallied = tally.over_ranks()
        total = {name: each.over_ranks() for name, each in sums.items()}

        def found(name: str, centred: bool) -> Spectrum:
            if name in total:
                return total[name].spectrum(centred)
            return spectrum(kept.features[name], kept.targets if name == STUDENT else None, centred)

        def inputs(name: str) -> Spectrum:
            """Of a tracked layer: the first layer's inputs are the same every time, and so is their spectrum."""
            key = total[name].xx if name in total else kept.features[name]
            if name not in self._cached or not torch.equal(self._cached[name][0], key):
                self._cached[name] = key, found(name, centred=False)
            return self._cached[name][1]

        def decide() -> tuple[dict[str, float], dict[str, list[float]], float]:
            tallied.check()
            centred = self._layer(STUDENT).bias is not None or self._kind == "classes"
            samples = len(probe.loader.dataset)
            return self._figures(found(STUDENT, centred), samples, tallied.error, inputs)

        values, forecast, unit = decided_on_rank_zero(decide, trainer)
        self._forecast, self._unit, self._star = forecast, unit, values["t_star"]
        return values

    def _figures(
        self, raw: Spectrum, samples: int, train_error: float | None, inputs: Callable[[str], Spectrum]
    ) -> tuple[dict[str, float], dict[str, list[float]], float]:
        """What is logged, the forecast's curves over t, and what a rate of 1 is in t."""
        if raw.rank(self.frozen_tol) == 0:
            raise RecipeError("the readout's inputs do not vary")
        of_probe = raw.scaled()
        more = samples / raw.samples
        law = empirical(of_probe.eigenvalues * more, raw.features, self.frozen_tol)
        there = law.values[law.values > 0]
        alpha = samples / raw.features
        low, high = edges(alpha)
        s_w, s_e = signal_and_noise(of_probe)
        s_e = max(s_e, 1e-12 * s_w, 1e-300)
        snr, inr = s_w / s_e, float(self._start[STUDENT]) * of_probe.scale**2 / s_e
        factor = self.loss_factor / (self._outputs if self._averaged else 1)
        unit = flow_time(of_probe.scale**2, samples, factor)
        t, steps = unit * self._rates, self._steps
        star = optimal_stopping_time(law, snr, inr)
        best = best_test_error(law, snr, inr)
        here = float(expected_test_error(t, law, snr, inr, steps))
        short = len(there) >= raw.samples - int(raw.centred)
        if correlated(float(there.max()), alpha):
            poorer, richer = law, more_data(law, short_of_samples=short)
        else:
            poorer, richer = marchenko_pastur(alpha), marchenko_pastur(2 * alpha)
        doubled = best * best_test_error(richer, snr, inr) / best_test_error(poorer, snr, inr)
        ridge = ridge_test_error(law, 1 / max(snr, 1e-12), snr)
        values = {
            "alpha": alpha,
            "alpha_eff": samples / len(there),
            "lambda_min_nonzero": float(there.min()),
            "lambda_max": float(there.max()),
            "mp_edge_lo": low,
            "mp_edge_hi": high,
            "frozen_frac": float(law.mass[-1]),
            "soft_frozen_frac": frozen_share(t, law),
            "snr": snr,
            "inr": inr,
            "noise": s_e,
            "t": t,
            "t_star": star,
            "pred_test_error": s_e * here,
            "pred_train_error": s_e * float(expected_train_error(t, law, alpha, snr, inr, steps)),
            "pred_best": s_e * best,
            "pred_final": s_e * float(expected_test_error(math.inf, law, snr, inr)),
            "overtraining": s_e * (here - best),
            "gain_data": s_e * (best - doubled),
            "gain_start": s_e * (best - best_test_error(law, snr)),
            "gain_ridge": s_e * (best - ridge),
            "complexity": complexity(self._weight.detach() * of_probe.scale, of_probe, self.frozen_tol),
        }
        if train_error is not None:
            values["train_error"] = train_error
        tracked = [name for name in self._points if name != STUDENT]
        for name in tracked:
            change = self._layer(name).weight.detach().cpu().double() - self._start[name].double()
            share = outside_share(change, inputs(name))
            values["outside_update" if len(tracked) == 1 else f"outside_update/{name}"] = share
        ends = [each for each in (t, star) if 0 < each < math.inf] or [1 / float(there.max())]
        times = torch.logspace(math.log10(min(ends) / 30), math.log10(max(ends) * 30), 60, dtype=torch.float64)
        forecast = {
            "t": times.tolist(),
            "test": (s_e * expected_test_error(times, law, snr, inr)).tolist(),
            "train": (s_e * expected_train_error(times, law, alpha, snr, inr)).tolist(),
        }
        return values, forecast, unit

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: pl.Trainer) -> None:
        if self.stop and self._unit * self._rates > self.patience_factor * self._star:
            trainer.should_stop = True

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def conclude(self) -> str:
        now = {name: values[-1] for name, values in self.history.values.items()}
        if math.isnan(now["pred_test_error"]):
            return words(now, self._steps)
        if correlated(now["lambda_max"], now["alpha"]):
            self.limit(
                f"the features are correlated (the largest eigenvalue is {now['lambda_max']:.3g}, without correlations"
                f" it would be {now['mp_edge_hi']:.3g}), and the forecast of the test error counts all directions alike"
            )
        seen, expected = now.get("train_error"), now["pred_train_error"]
        if seen is not None and abs(seen - expected) > max(0.5 * min(seen, expected), 0.05 * now["noise"]):
            self.limit(
                f"the training error is {seen:.3g} and by the theory would be {expected:.3g}, so it does not describe"
                " this run"
            )
        rate = self._rates / self._steps if self._steps else 0.0
        if self._unit * rate * now["lambda_max"] > 2:
            self.limit(
                f"at a rate of {rate:.3g} plain gradient descent of the readout would diverge (from"
                f" {2 / (self._unit * now['lambda_max']):.3g} on), so the forecast does not apply"
            )
        return words(now, self._steps, self._kind == "classes")

    def picture(self, path: Path, title: str) -> None:
        shown = self._steps / (self._unit * self._rates) if self._unit * self._rates > 0 else 1.0
        steps = [shown * t for t in self._forecast["t"]]
        curves = {name: (steps, self._forecast[name]) for name in ("test", "train")}
        curves = {f"{name}, forecast": curve for name, curve in curves.items()}
        if "train_error" in self.history.values:
            curves["train, measured"] = self.history.steps, self.history.values["train_error"]
        unit = "optimizer step" if self._unit * self._rates > 0 else "time t"
        draw_curves(path, curves, title, unit, self.ylabel, log_x=True)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        mine = {
            "start": dict(self._start),
            "rates": self._rates,
            "steps": self._steps,
            "unit": self._unit,
            "star": self._star,
            "forecast": {name: list(values) for name, values in self._forecast.items()},
        }
        return super().state() | mine

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._start = dict(state["start"])
        self._rates, self._steps, self._unit = state["rates"], state["steps"], state["unit"]
        self._star, self._forecast = state["star"], dict(state["forecast"])


class _Tapped:
    """The taps of a monitor, put on once the layers have their final names."""

    def __init__(self, monitor: GeneralizationMonitor, module: pl.LightningModule) -> None:
        self.monitor, self.module = monitor, module

    def install(self, undo: ExitStack) -> None:
        with speaking_for(self.monitor):
            self.monitor._taps = self.monitor._tap(self.module)
        self.monitor._taps.install(undo)


def _groups_of(optimizer: Optimizer, weight: Tensor) -> list[dict[str, Any]]:
    """The parameter groups that hold a weight."""
    return [group for group in optimizer.param_groups if any(p is weight for p in group["params"])]

"""Would more width help, or more data, or a larger weight decay? Asked of the last layer, without a validation set.

J. B. Simon, D. Karkada, N. Ghosh, M. Belkin, "More is Better in Modern Machine Learning: when Infinite
Overparameterization is Optimal and Overfitting is Obligatory", ICLR 2024 (https://arxiv.org/abs/2311.14646; code
https://github.com/dkarkada/more-is-better). The test error of ridge regression on k random features of a kernel and n
samples follows from the kernel's spectrum; at the best ridge it falls with k and with n; and where spectrum and target
are power laws, i^-alpha and i^-beta, the best ridge leaves a training error of a share R* of the test error,

    R* = r^2,   alpha - beta - (alpha - 1) beta r + alpha (alpha - 1) sigma^2 (1 - r)^beta = 0,   r = 0 if it is
    negative there,

with sigma^2 the noise over the test error without it: hard tasks of little noise want to be fitted to the last sample.

The inputs of the last linear layer are such features of whatever came before. A sweep of ridges over them gives the
test error of a ridge head by generalised cross-validation, and read backwards the kernel and the target behind them,
from which other n and k are forecast (``core/ridge_theory.py`` has the equations). A spectrum that takes the present
features for all there are could only forecast fewer; here they are k draws, so that twice the width is a forecast too.

Which kernel stands for the model can be chosen. `features`: the one of which the layer's inputs h are random features.
`relu_nngp`: the one of which random ReLU features of h are, as if a hidden layer of infinite width stood between h and
the readout, with t the angle of two inputs. `ntk`: the tangent kernel of the last layers, w their parameters and f_c
the C outputs (``core/tangents.py``): what gradient descent on these layers does at first order.

    K = |h| |h'| / (2 pi) [sin t + (pi - t) cos t],        K = 1/C sum_c df_c/dw . df_c'/dw

*Refit*: with H the inputs of the layer on the training set and Y the targets, both about their means if it has a bias,

    W = argmin |Y - H W^T|^2 + d |W|^2 = Y^T H (H^T H + d)^-1,   d = argmin n |Y - S Y|^2 / (n - tr S)^2

with S = H (H^T H + d)^-1 H^T. Class labels are one-hot vectors; one output that tells two classes apart by its sign has
-1 and 1.

Costs a forward pass over the probe a measurement and an eigendecomposition, O(min(n, k)^2 max(n, k)), O(n^3) for the
other two kernels; of the tangent kernel also a backward pass through the last layers an output, and O(n^2 C) times the
parameters of the layer before the readout. Of the refit one pass over the training set and one eigendecomposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_recipes.core.diagnostics import Monitor, draw_curves, log_values
from lightning_recipes.core.distributed import decided_on_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import ONE_OUTPUT
from lightning_recipes.core.features import head_input
from lightning_recipes.core.head_fit import LinearHead, where_to_fit
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, samples_at_hand, samples_of, some_of
from lightning_recipes.core.readout import Reading, Readout
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.ridge_theory import (
    Task,
    best_ridge,
    default_ridges,
    optimal_fitting_ratio,
    relu_nngp,
    ridge_readout,
    sweep,
    task_of,
    trusted,
)
from lightning_recipes.core.spectrum import WIDEST, Spectrum, spectrum_of_kernel

PAPER = Paper(
    "More is Better in Modern Machine Learning: when Infinite Overparameterization is Optimal and Overfitting is"
    " Obligatory",
    "J. B. Simon, D. Karkada, N. Ghosh, M. Belkin",
    2024,
    "https://arxiv.org/abs/2311.14646",
    "https://github.com/dkarkada/more-is-better",
)
KERNELS = ("features", "relu_nngp", "ntk")
FEWEST = 64
"""Samples below which a spectrum says little."""
FITTED = 1e-3
"""A training error that is a smaller share of the test error is none."""
WORTH = 0.02
"""A gain that is a smaller share of the error is none."""
WIDTH, DATA, NOISE = 0, 1, 2
"""What limits a task, as it is logged."""

# -- what a spectrum comes to ------------------------------------------------------------------------------------------


def equivalent_ridge(found: Spectrum, error: float) -> float:
    """The ridge whose head has this training error; 0 below what every ridge reaches, infinite above."""
    grid = torch.logspace(-8, 6, 400, dtype=torch.float64) * float(found.eigenvalues.sum() / found.samples)
    swept = sweep(found, grid)
    above = swept.train > error
    if not bool(above.any()):
        return math.inf
    first = int(above.nonzero()[0])
    return float(swept.ridges[first]) if first else 0.0


def limit_of(now: float, wider: float, more: float) -> int:
    """What limits a task: WIDTH or DATA, twice of which gains more, or NOISE where neither is worth it.

    Args:
        now, wider, more: the best error, and with twice the width and twice the data.
    """
    if max(now - wider, now - more) < WORTH * now:
        return NOISE
    return WIDTH if wider < more else DATA


def exponents(task: Task, n: float, k: float) -> tuple[float, float, float]:
    """alpha, beta and the best fitting ratio of a task, which is not a number outside of the theorem."""
    try:
        best = optimal_fitting_ratio(task.alpha, task.beta, min(task.relative_noise(n, k), 1e9))
    except RecipeError:
        best = math.nan
    return task.alpha, task.beta, best


def words(now: Mapping[str, float], kernel: str = "features") -> str:
    """What the figures of the last measurement come to, and what to do.

    Args:
        now: as the monitor logs them.
        kernel: that stands for the model.
    """
    best, wider, more = now["data_x1"], now.get("width_x2"), now["data_x2"]
    if math.isnan(best):
        return "The features no longer vary or are not finite: there is no forecast."
    of = "the forecast of the test error"
    limit = now["limited_by"]
    if wider is None and limit == NOISE:
        said = (
            f"Limited by noise: not even twice the data ({more:.3g}) would bring {of} ({best:.3g}) down by as much as"
            f" {100 * WORTH:g} %; what is left is noise, or nothing that such a kernel can say."
        )
    elif wider is None:
        said = f"More data would help: twice the data would bring {of} from {best:.3g} to {more:.3g}."
    elif limit == NOISE:
        said = (
            f"Limited by noise: neither twice the width ({wider:.3g}) nor twice the data ({more:.3g}) would bring {of}"
            f" ({best:.3g}) down by as much as {100 * WORTH:g} %; what is left is noise, or nothing that such features"
            " can say."
        )
    else:
        (first, gain), (second, other) = (("width", wider), ("data", more))[:: 1 if limit == WIDTH else -1]
        said = (
            f"More {first} would help more than more {second}: twice the {first} would bring {of} from {best:.3g} to"
            f" {gain:.3g}, twice the {second} to {other:.3g}."
        )
    here, ridge, train = now["pred_test_mse_best"], now["best_ridge"], now["train_mse_at_best"]
    ratio = f"a training error of {100 * train / here:.2g} % of the test error"
    if kernel != "features":
        return f"{said} Ridge regression with the kernel {kernel} is best at ridge {ridge:.3g}, with {ratio}."
    mine = now.get("ridge_now", math.nan)
    if math.isnan(mine):
        return f"{said} A ridge head on these features is best at ridge {ridge:.3g}, with {ratio}."
    seen, lost = now["train_mse"], now["pred_test_mse_now"] / here - 1
    decay = f"a weight decay of {now['weight_decay']:.3g} on the readout"
    if not lost > 0.05:
        return (
            f"{said} The readout is regularised about right: its training error ({seen:.3g}) is that of a ridge that"
            f" costs {100 * max(lost, 0.0):.1f} % at most; the best one has {ratio}."
        )
    if mine > ridge:
        grade = "over-regularised, or has not trained long enough"
        size = "any ridge is below that" if math.isinf(mine) else f"that of a ridge {mine / ridge:.3g} times the best"
    else:
        grade, size = "under-regularised", f"that of a ridge {mine / ridge:.2g} times the best"
    return (
        f"{said} The readout is {grade}: its training error ({seen:.3g}) is {size}, which costs {100 * lost:.0f} %;"
        f" the best ridge ({ridge:.3g}, {decay}) leaves {ratio}."
    )


def ridges_for(found: Spectrum, multiples: Sequence[float] | None) -> Tensor:
    """Ridges in ascending order, from multiples of the mean diagonal of the kernel matrix; None for the usual ones."""
    if multiples is None:
        return default_ridges(found)
    return torch.tensor(multiples, dtype=torch.float64).sort()[0] * float(found.eigenvalues.sum() / found.samples)


def is_hidden(module: pl.LightningModule, path: str) -> bool:
    """Whether a linear layer is another than the one that would be found for the readout."""
    try:
        return path != head_input(module)[0]
    except RecipeError:
        return False


def refitted(found: Spectrum, means: tuple[Tensor, Tensor], ridge: float, signs: bool = False) -> LinearHead:
    """The layer that ridge regression gives.

    Args:
        found: of inputs and targets; centred for a layer with a bias.
        means: of inputs ``[p]`` and targets ``[k]``.
        ridge: d.
        signs: whether targets 0 and 1 stand for -1 and 1.
    """
    weight, (x, y) = ridge_readout(found, ridge), means
    if signs:
        weight, y = 2 * weight, 2 * y - 1
    bias = y - weight @ x.to(weight) if found.centred else torch.zeros_like(y)
    return LinearHead(weight, bias, 0, True)


# -- the callbacks -----------------------------------------------------------------------------------------------------


class MoreIsBetterMonitor(Monitor):
    """Say whether more width, more data or another weight decay would help, from the training set alone.

    Takes the inputs of the last linear layer on a probe of training samples as random features of a kernel, and by the
    theory of ridge regression forecasts the squared error on new samples: of a ridge head on these features at every
    ridge, and of the best one with other numbers of features and samples. Features that were trained on the same labels
    have seen them, so that their error on new samples is more than the forecast; what it says of width takes them for
    random draws. What is not as the theory has it is said in `limits`.

    With `kernel` another one stands for the model, and the errors at ridges are those of ridge regression with it. It
    has no width. Of 'relu_nngp' what is said of width is what so many random ReLU features of the layer's inputs would
    come to, ``width_xinf`` being the kernel itself; as many as there are inputs are the width now, from which forecasts
    start. With `head` a hidden layer it is that layer that is drawn at random and made wider, from as many features as
    it has outputs. Of 'ntk' nothing is said of width, to which the theory does not apply.

    Logs, averaged over outputs, with class labels as centred one-hot vectors: of the probe ``mib/pred_test_mse`` (at
    the smallest ridge that can be relied on), ``pred_test_mse_best``, ``best_ridge`` (added to the kernel matrix,
    without 1/n), ``train_mse_at_best`` and ``fit_ratio``, training error over test error there; of the whole training
    set forecasts of the best error, ``width_x2``, ``data_x2`` and so on by multiples (``data_x1`` as it is now);
    ``limited_by`` (0 width, 1 data, 2 noise, or nothing that twice of either would mend); with `estimate_exponents`
    ``alpha``, ``beta``, ``noise`` and ``fit_ratio_opt``, the ratio that is best on power laws of these exponents. For
    a loss that is the mean of squares also ``train_mse`` of the module's own readout, ``ridge_now`` (the ridge with
    that training error), ``pred_test_mse_now``, ``fit_ratio_now``, and ``weight_decay``, which in the readout's loss
    would be the best ridge; these five with the features' own kernel alone. At the end `verdict` says it in words, over
    a picture in the run's log folder.

    Args:
        head: dotted path of the last linear layer; None finds it.
        probe_size: training samples to measure on; more than there are take all.
        ridges: to sweep over, in multiples of the mean diagonal of the kernel matrix; None for 31 from 1e-6 to 1e2.
        kernel: which stands for the model: 'features', the layer's inputs; 'relu_nngp', that of infinitely many random
            ReLU features of them, one hidden layer more, with weights of variance 1 and no biases; 'ntk', that of the
            gradients of the layer's outputs, averaged over these, with respect to its parameters and those of the last
            layer before it.
        what_if_k, what_if_n: multiples of the width and of the data to forecast for; the width may be infinite.
        estimate_exponents: log them.
        every_n_steps: measure after every so many optimizer steps too.
        geometric_steps: measure after steps 0, 1, 2, 3, 5, 10, 20, 30, 50, ...
        budget: add at most this share to the run's work, counted in forward passes, and leave out what is more; None
            for no limit. With 'ntk' the Jacobians and their products count too, by their multiplications.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save pictures in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; under manual optimization; before the first step for a network without a linear
            layer, data that are not read by index, fewer than 4 samples an output, features that do not vary, are not
            finite or are too few, more than 8192 of them on a probe of as many, and a loss that cannot be seen; with
            another kernel than 'features' for a probe of more than 8192 samples; and with 'ntk' where no layer before
            the readout has parameters or can be differentiated, and where it would keep more than 2^28 numbers.
    """

    paper = PAPER
    does = "Says whether more width, more data or another weight decay would help, from the training set alone."
    use_when = "You wonder what to pay for next, a wider network or more data, or whether the weight decay is right."
    costs = "A forward pass over 2,000 samples and an eigendecomposition, four times for every factor of ten in steps."
    log_prefix = "mib"
    ylabel = "squared error on new samples"

    def __init__(
        self,
        head: str | None = None,
        probe_size: int = 2000,
        ridges: Sequence[float] | None = None,
        kernel: Literal["features", "relu_nngp", "ntk"] = "features",
        what_if_k: Sequence[float] = (0.5, 1, 2, 4, math.inf),
        what_if_n: Sequence[float] = (0.5, 1, 2, 4),
        estimate_exponents: bool = True,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        budget: float | None = None,
        criterion: str | int | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        self.head, self.probe_size, self.ridges = head, probe_size, ridges
        self.kernel = kernel
        self.what_if_k, self.what_if_n, self.estimate_exponents = what_if_k, what_if_n, estimate_exponents
        self.every_n_steps, self.geometric_steps = every_n_steps, geometric_steps
        self.budget, self.criterion, self.draw = budget, criterion, draw
        self.check_moments()
        named = head is None or isinstance(head, str)
        check_argument(named, self, "head", head, "None or the dotted path of a linear layer")
        check_argument(probe_size >= FEWEST, self, "probe_size", probe_size, f"at least {FEWEST}")
        check_ridges(self, ridges)
        check_argument(kernel in KERNELS, self, "kernel", kernel, f"one of {', '.join(map(repr, KERNELS))}")
        for name, multiples, most in (("what_if_k", what_if_k, math.inf), ("what_if_n", what_if_n, 1e9)):
            ok = not isinstance(multiples, str) and all(0 < m <= most for m in multiples)
            finite = "" if name == "what_if_k" else " and finite"
            check_argument(ok, self, name, multiples, f"multiples that are positive{finite}, as (0.5, 1, 2)")
        self._clear()

    def _clear(self) -> None:
        self._readout: Readout | None = None
        self._curves: dict[str, list[float]] = {}  # of the last measurement, for the pictures
        self._width = 0  # of which multiples are forecast for
        self._beyond = False  # whether what it says of twice the width or data lies on the tail's law

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if plan.fitting:
            self._clear()
            self._readout = Readout(
                self, plan.trainer, plan.module, self.head, self.criterion, tangents=self.kernel == "ntk"
            )
            plan.install(self._readout)
            plan.at_end(self._let_go)

    def _let_go(self) -> None:
        self._readout = None

    # -- before the first step -----------------------------------------------------------------------------------------

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        probe, readout = self._probe(trainer), self._readout
        if self.kernel != "features" and probe.total > WIDEST:
            raise RecipeError(
                f"kernel={self.kernel!r} makes a matrix of as many rows as there are samples, and {WIDEST} are the"
                f" most; got {probe.total}: take fewer with probe_size="
            )
        readout.look(probe)
        hidden = self.kernel == "relu_nngp" and is_hidden(module, readout.path)
        self._width = readout.layer.out_features if hidden else readout.width
        total = len(probe.loader.dataset)
        own = {id(p) for p in module.get_submodule(readout.path).parameters()}
        trained = any(p.requires_grad and id(p) not in own for p in module.parameters())
        differs = {
            "the targets are class labels, so the errors are those of a ridge head on one-hot vectors and not of the"
            " loss that trains": readout.kind == "classes",
            "the loss is not the mean of squares, so the errors are those of a ridge head and not of this one":
                readout.kind == "other",
            "other layers train too and have seen the labels, so the error on new samples is more than forecast, and"
            " trained features are no random draws, of which twice as many would bring what is said of width":
                trained and self.kernel == "features",
            "the layers before train and have seen the labels, so the error on new samples is more than forecast":
                readout.learnt and self.kernel == "relu_nngp",
            "the kernel has no width: what is said of width is what random ReLU features of the inputs of"
            f" {readout.path} would come to, of which {self._width} (as many as it has"
            f" {'outputs' if hidden else 'inputs'}) are taken for the width now": self.kernel == "relu_nngp",
            "the layers train and have seen the labels, so the error on new samples is more than forecast, and the"
            " kernel changes as they do": self.kernel == "ntk" and any(p.requires_grad for p in module.parameters()),
            "its theory does not apply to the width of a network by its tangent kernel, whose features are no"
            " independent draws: nothing is forecast for another width": self.kernel == "ntk",
            "the features have half precision: eigenvalues and ridges below 1e-3 of the largest are rounding":
                readout.half,
            f"{total} samples are few for a law of large numbers": total < FEWEST,
            f"it was measured on {probe.total} of {total} samples, and what is said of all of them is forecast":
                probe.total < total,
        }  # fmt: skip
        for what, there in differs.items():
            if there:
                self.limit(what)

    def _probe(self, trainer: pl.Trainer) -> Samples:
        samples = samples_at_hand(trainer)
        return samples_of(samples.loader, chosen=some_of(samples.total, self.probe_size, "MoreIsBetterMonitor"))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def forwards(self, trainer: pl.Trainer) -> int:
        last, total = self._readout.last, self._probe(trainer).total
        return total if last is None else last.passes(total)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, float]:
        probe, readout = self._probe(trainer), self._readout
        reading = readout.read(probe, keep=self.kernel != "features")

        def decide() -> tuple[dict[str, float], dict[str, list[float]], bool]:
            found = self._spectrum(reading, readout.layer.bias is not None or readout.kind == "classes")
            error = reading.tallied.error if self.kernel == "features" else None
            return self._figures(found, self._width, len(probe.loader.dataset), error)

        values, self._curves, self._beyond = decided_on_rank_zero(decide, trainer)
        return values

    def _spectrum(self, reading: Reading, centred: bool) -> Spectrum:
        """Of the kernel that stands for the model."""
        if self.kernel == "features":
            return reading.spectrum(centred)
        reading.tallied.check()
        device = where_to_fit(self._readout.module)
        x = reading.x.to(device)
        kernel = relu_nngp(x) if self.kernel == "relu_nngp" else self._readout.tangent_kernel(reading)
        return spectrum_of_kernel(kernel, reading.y.to(device), centred)

    def _figures(
        self, found: Spectrum, width: int, total: int, error: float | None
    ) -> tuple[dict[str, float], dict[str, list[float]], bool]:
        """What is logged, what is drawn, and whether twice the width or data lies beyond what the data tell.

        Args:
            found: of the probe.
            width: now.
            total: samples that there are.
            error: of the module's own readout, where its ridge is to be found.
        """
        drawn = width if self.kernel == "features" else math.inf  # features that the spectrum is of
        width = math.inf if self.kernel == "ntk" else width
        widths = [] if self.kernel == "ntk" else sorted({2, *self.what_if_k})
        if self.kernel == "relu_nngp":
            widths = sorted({1, math.inf, *widths})
        task = task_of(found, drawn)
        diagonal = float(found.eigenvalues.sum() / found.samples)
        given = (
            default_ridges(found) if self.ridges is None else diagonal * torch.tensor(self.ridges).double().sort()[0]
        )
        swept = sweep(found, given)
        at = best_ridge(found, swept, drawn)
        reliable = trusted(found, swept, drawn)
        here, ridge = float(swept.test[at]), float(swept.ridges[at])
        scale = here / task.best(found.samples, drawn).error

        def forecast(n: float, k: float) -> float:
            return scale * task.best(n * total, k * width).error

        now, wider, more = (forecast(*times) for times in ((1, 1), (1, 2), (2, 1)))
        values = {
            "pred_test_mse": float(swept.test[reliable][0]),
            "pred_test_mse_best": here,
            "best_ridge": ridge,
            "train_mse_at_best": float(swept.train[at]),
            "fit_ratio": float(swept.train[at]) / here,
            "limited_by": limit_of(now, wider, more),
            **{f"width_x{k:g}": forecast(1, k) for k in widths},
            **{f"data_x{n:g}": forecast(n, 1) for n in sorted({1, 2, *self.what_if_n})},
        }
        if self.estimate_exponents:
            values["alpha"], values["beta"], values["fit_ratio_opt"] = exponents(task, total, drawn)
            values["noise"] = scale * task.noise
        if error is not None:
            whole = ridge if total == found.samples else task.best(total, width).ridge
            mine = equivalent_ridge(found, error) if total == found.samples else math.nan
            tried = sweep(found, torch.tensor([min(max(mine, 1e-8 * diagonal), 1e6 * diagonal)], dtype=torch.float64))
            values |= {
                "train_mse": error,
                "ridge_now": mine,
                "pred_test_mse_now": float(tried.test[0]),
                "fit_ratio_now": error / float(tried.test[0]),
                "weight_decay": 2 * whole / (total * found.targets.shape[1]),
            }
        multiples = [0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0]
        curves = {
            "multiples": multiples,
            **({"width": [forecast(1, k) for k in multiples]} if widths else {}),
            "data": [forecast(n, 1) for n in multiples],
            "ridges": swept.ridges[reliable].tolist(),
            "test": swept.test[reliable].tolist(),
            "train": swept.train[reliable].tolist(),
        }
        beyond = task.best(total, 2 * width).beyond or task.best(2 * total, width).beyond
        return values, curves, beyond

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def conclude(self) -> str:
        now = {name: values[-1] for name, values in self.history.values.items()}
        if self._beyond and not math.isnan(now["data_x1"]):
            self.limit(
                "what twice the width or the data would bring lies beyond what these samples tell, where the spectrum"
                " is taken to go on as a power law"
            )
        if now["fit_ratio"] < FITTED:
            self.limit(
                "at the best ridge the samples are fitted to the last, and there cross-validation is too low on real"
                " data (on digits by 25 to 45 %)"
            )
        if "fit_ratio_opt" in now and math.isnan(now["fit_ratio_opt"]) and not math.isnan(now["alpha"]):
            self.limit(
                f"the exponents (alpha {now['alpha']:.2g}, beta {now['beta']:.2g}) are outside of the power-law"
                " theorem, which has no best ratio for them"
            )
        return words(now, self.kernel)

    def picture(self, path: Path, title: str) -> None:
        """Draw the forecasts over multiples of width and data, and in a second file the errors over the ridge."""
        if not self._curves:
            return
        x, now = self._curves["multiples"], {name: values[-1] for name, values in self.history.values.items()}
        curves = {f"more {name}": (x, self._curves[name]) for name in ("width", "data") if name in self._curves}
        if now.get("noise", 0.0) > 0:
            curves["noise"] = (x, [now["noise"]] * len(x))
        draw_curves(path, curves, title, "times as much", self.ylabel)
        ridges = [math.log10(ridge) for ridge in self._curves["ridges"]]
        curves = {
            "test, forecast": (ridges, self._curves["test"]),
            "train": (ridges, self._curves["train"]),
            "best": ([math.log10(now["best_ridge"])], [now["pred_test_mse_best"]]),
        }
        mine = now.get("ridge_now", math.nan)
        if 0 < mine < math.inf:
            curves["now"] = ([math.log10(mine)], [now["pred_test_mse_now"]])
        draw_curves(path.with_name(f"{path.stem}_ridge.png"), curves, title, "log10 of the ridge", "squared error")

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        curves = {name: list(values) for name, values in self._curves.items()}
        return super().state() | {"curves": curves, "beyond": self._beyond}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._curves, self._beyond = dict(state["curves"]), state["beyond"]


def check_ridges(owner: object, ridges: Sequence[float] | None) -> None:
    """Refuse ridges that are no multiples of the kernel's diagonal.

    Raises:
        RecipeError: for that.
    """
    ok = ridges is None or (not isinstance(ridges, str) and len(ridges) > 0 and all(0 < r < math.inf for r in ridges))
    check_argument(ok, owner, "ridges", ridges, "None or positive multiples of the mean diagonal of the kernel matrix")


class RidgeRefit(Recipe):
    """When the fit is over, write ridge regression at the best ridge into the last layer, in place of what it learnt.

    With class labels the outputs are then estimates of one-hot vectors: the largest one is the class, but they are no
    logits, and a cross-entropy of them says nothing. With a logit of two classes the sign is the class. Logs
    ``ridge_refit/ridge`` and ``ridge_refit/pred_test_mse``, the squared error on new samples by cross-validation. A
    checkpoint of the fit holds the layer as it trained; one that is saved afterwards holds the new one, and no fit can
    be resumed from that.

    Args:
        head: dotted path of the last linear layer; None finds it.
        ridges: to choose from, in multiples of the mean diagonal of the kernel matrix; None for 31 from 1e-6 to 1e2.
        when: 'fit_end', or 'never' to leave the layer as it is.
        criterion: which loss of the module's training step to observe, where it cannot be found.

    Raises:
        RecipeError: for bad arguments; under manual optimization; before the first step for a network without a linear
            layer, data that arrive in stages or are not read by index, targets that are not of the
            layer's size, and a loss that cannot be seen or is neither of numbers nor of classes.
    """

    paper = PAPER
    does = "Refits the last layer in closed form at the best ridge when the fit is over."
    use_when = "The head is under-trained or over-regularised, and squared error or accuracy is what counts."
    costs = "A forward pass over the training set and an eigendecomposition at the end of the fit."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("BoostedHead", "ProjectionHead", "CosineHead", "SLCA"), "both own the head"
    )
    comes_after: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("WiSEFT", "BANG"), "weights are averaged first, then the layer is fitted to the features that they give"
    )

    def __init__(
        self,
        head: str | None = None,
        ridges: Sequence[float] | None = None,
        when: Literal["fit_end", "never"] = "fit_end",
        criterion: str | int | None = None,
    ) -> None:
        super().__init__()
        self.head, self.ridges, self.when, self.criterion = head, ridges, when, criterion
        named = head is None or isinstance(head, str)
        check_argument(named, self, "head", head, "None or the dotted path of a linear layer")
        check_ridges(self, ridges)
        check_argument(when in ("fit_end", "never"), self, "when", when, "'fit_end' or 'never'")
        self._readout: Readout | None = None
        self._head: LinearHead | None = None  # between the end of training and that of the fit
        self._written = False

    @property
    def neutral(self) -> bool:
        return self.when == "never"

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if plan.section is not None and plan.section["state"]["written"]:
            raise RecipeError(
                "the checkpoint was written after the fit ended and holds the refitted layer; there is no training to"
                " resume. Load its weights into the module and start a new fit"
            )
        if hasattr(plan.trainer.datamodule, "phase_plan"):
            kind = type(plan.trainer.datamodule).__name__
            raise RecipeError(f"{kind} shows its data in stages, and the layer would be fitted to the last one alone")
        self._written = False
        self._readout = Readout(self, plan.trainer, plan.module, self.head, self.criterion)
        self._head = None
        plan.install(self._readout)
        plan.at_end(self._write)  # once adapters are merged and masks are off, which would write over it

    def _write(self) -> None:
        if self._head is not None:
            self._head.write(self._readout.layer)
            self._written = True
        self._readout = self._head = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        readout = self._readout
        if readout is None:
            return
        with speaking_for(self):
            readout.look(samples_at_hand(trainer))
            numeric = readout.call.endswith(("mse_loss", "l1_loss", "huber_loss"))
            if readout.kind != "classes" and not numeric:
                raise RecipeError(f"the loss ({readout.call}) is neither of numbers nor of classes to fit a layer to")
            if readout.layer.out_features != readout.outputs:
                raise RecipeError(
                    f"{readout.path} has {readout.layer.out_features} outputs and there are {readout.outputs} targets"
                )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        readout = self._readout
        if readout is None:
            return
        with speaking_for(self):
            reading = readout.read(samples_at_hand(trainer))
            try:
                self._head, ridge, error = decided_on_rank_zero(lambda: self._fitted(reading, readout), trainer)
            except RecipeError as problem:
                rank_zero_warn(f"RidgeRefit: the layer is left as it was trained: {problem}")
                return
        log_values(trainer, {"ridge_refit/ridge": ridge, "ridge_refit/pred_test_mse": error})

    def _fitted(self, reading: Reading, readout: Readout) -> tuple[LinearHead, float, float]:
        found = reading.spectrum(readout.layer.bias is not None)
        if not found.rank():
            raise RecipeError("the features do not vary")
        swept = sweep(found, ridges_for(found, self.ridges))
        at = best_ridge(found, swept, readout.width)
        signs = readout.call in ONE_OUTPUT and float(reading.smallest) >= 0
        ridge = float(swept.ridges[at])
        return refitted(found, reading.means(), ridge, signs).to("cpu"), ridge, float(swept.test[at])

    def state(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._written = state["written"]

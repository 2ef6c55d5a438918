"""LangevinMixture: sample networks from the posterior by noisy SGD, and predict by the mean of their probabilities.

Feder, Urbanke, Fogel, "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025
(https://arxiv.org/abs/2506.07661; no official code). Under log-loss the mixture of all networks, weighted by prior and
likelihood, learns as fast as the prior mass of the networks near the truth is large, however many parameters there are
(:func:`~lightning_recipes.callbacks.regularization.hypothesis_weight.regret_bound`). SGD with Langevin noise draws from
that posterior. With N training samples, the MEAN negative log-likelihood l of a batch, learning rate eta, temperature T
and a Gaussian prior w of standard deviation s:

    theta <- theta - eta [ grad l(theta) + T / (N s^2) theta ] + sqrt(2 eta T / N) xi,      xi ~ N(0, I)
    q(y|x) = (1 / M) sum_m p_m(y|x)                 over M samples theta_m, every k steps after a burn-in

For small eta and full batches the law of theta is w(theta) exp(-N l / T): the Bayes posterior at T = 1, a cold one
below; the prior is not tempered. A finite eta widens it: for curvature h of l and the prior together the variance is
(2 eta T / N) / (1 - (1 - eta h)^2). The noise of the batches comes on top. A few hundred samples of a deep network are
of one mode: take the mixture for an approximation.

PROBABILITIES are averaged, neither logits nor weights. By Jensen the mixture's log-loss is at most the mean one of its
members; what lies between is the gain of the mixture.

PREQUENTIAL (ours). In the first epoch every batch is new. Scored before it is trained on, by the mixture of the weights
at hand and of earlier ones of that epoch, its log-losses add up to a code length: what it costs to send the labels to
somebody who has the inputs and learns alike,

    L = sum_i -log q_i(y_i|x_i),       regret = L - min_m sum_i -log p_m(y_i|x_i)

over the members m that are there when the epoch is over. They have seen the data, so their minimum is about that of
hindsight, and from above: the regret against the best of all networks is at least so large.

DISTILLATION (ours): log q of every training sample goes to a file, which ``PSKD(targets=...)`` trains one student on.

On clean labels with a wide prior the posterior at T = 1 can be worse than plain SGD; it shines where labels are noisy.
The paper's abstract has no schedule: burn-in, thinning and the prior's default are ours.

Costs one normal number a parameter and step, a copy of what trains a sample (in main memory and in checkpoints, or on
disk), and M forward passes in the place of one at evaluation. Prequential: up to M forward passes a batch of the first
epoch, and M over the training set after it. Distillation: M over the training set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from lightning_recipes.core import random
from lightning_recipes.core.artefacts import Artefact, content_at
from lightning_recipes.core.averaging import tensors_of
from lightning_recipes.core.copies import wearing
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import all_sum, broadcast_, check_strategy
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import apart, buffers_of_rank_zero
from lightning_recipes.core.labels import labels_in, training_set
from lightning_recipes.core.likelihood import (
    LogProb,
    code_lengths,
    likelihood_sums,
    mixture_log_prob,
    mixture_sums,
)
from lightning_recipes.core.noise import Deviation, add_noise_
from lightning_recipes.core.outputs import logits_in, part_of, replace_outputs
from lightning_recipes.core.predict import Predict, wrap_predictions
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Encoded, bar, encode, reads_anew, samples_at_hand
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.sample_ids import root_of
from lightning_recipes.core.schedule import horizon
from lightning_recipes.core.silence import gradients_allowed, modes_kept, silent
from lightning_recipes.core.step import Replay, observe, rest_of_arguments, stock_step

STAGES = ("val", "test", "predict")
_LOW = "{} is of 16 bits, in which noise as small as this is rounded away; use precision='32-true' or a mixed one"
SUMMED = 50.0
"""A first loss so many times that of guessing is no mean over a batch."""

# -- the maths -------------------------------------------------------------------------------------------------------


def noise_deviation(lr: Deviation, temperature: float, train_size: int) -> Deviation:
    """sqrt(2 eta T / N): of the noise that is added to the weights after a step on a MEAN loss."""
    square = 2 * lr * temperature / train_size
    return square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)


def gradient_deviation(lr: Deviation, temperature: float, train_size: int) -> Deviation:
    """sqrt(2 T / (N eta)): the same noise added to the gradient of plain SGD; 0 for a learning rate of 0."""
    if isinstance(lr, Tensor):
        return torch.where(lr > 0, (2 * temperature / (train_size * lr)).sqrt(), 0.0)
    return math.sqrt(2 * temperature / (train_size * lr)) if lr > 0 else 0.0


def prior_strength(temperature: float, train_size: int, prior_std: float | None) -> float:
    """T / (N s^2): what times theta a Gaussian prior adds to the gradient of a mean loss; 0 for a flat prior."""
    return 0.0 if prior_std is None else temperature / (train_size * prior_std**2)


def stationary_variance(lr: float, curvature: float, temperature: float, train_size: int) -> float:
    """Of the chain on a quadratic loss, prior included: (2 eta T / N) / (1 - (1 - eta h)^2)."""
    return 2 * lr * temperature / train_size / (1 - (1 - lr * curvature) ** 2)


def slot(count: int, most: int, *key: int | str) -> int | None:
    """Where the `count`-th thing of a stream goes among `most` places, so that all so far are kept alike often.

    Reservoir sampling: None for one that is not kept. `count` begins at 0.
    """
    if count < most:
        return count
    drawn = int(torch.randint(count + 1, (1,), generator=random.generator(*key, count)))
    return drawn if drawn < most else None


# -- the callback ----------------------------------------------------------------------------------------------------


class LangevinMixture(Recipe):
    """Train by SGD with Langevin noise, keep samples of the weights, and evaluate by the mixture of their predictions.

    In validations (those of the fit too, once there is a sample), tests and predictions the logits ``[n, classes]``
    that come out of the module are the log-probabilities of the mixture: the module's own losses and metrics are the
    mixture's, and ``predict`` gives log q. Its weights are what they were. Logs ``bayes/n_samples``,
    ``bayes/mixture_nll``, ``bayes/mean_sample_nll``, ``bayes/gain`` (the difference) and ``bayes/disagreement`` (mean
    KL of a member to the mixture).

    Train by plain SGD: under momentum or Adam the law is another one, and a warning says so. The learning rate is
    that of each parameter's group as it stands; one that decays to 0 freezes the chain. Noise comes once a true
    optimizer step, not in one that the fp16 scaler skips.

    With `log_prob` there are no class probabilities to put in the outputs' place. ``predict`` then gives what every
    sample of the weights predicts, stacked ``[M, n, ...]``: take mean, spread or quantiles over the first axis. In
    validation and test the ``bayes/`` figures are those of the mixture of densities (``disagreement``, which would be
    an integral, is left out); the module's own losses and metrics see ``log_prob.mixture`` of the outputs if it has
    that (for :class:`~lightning_recipes.core.likelihood.GaussianLogProb` the mixture's mean), else those of the weights
    that train. A loss that is not the mean of ``-log_prob`` samples another posterior, and a warning says so.

    With `prequential` the first epoch logs ``bayes/prequential``, the code length in nats of all labels so far, of all
    ranks, and ``bayes/prequential_last``, the same by the weights at hand alone: the difference is what mixing saves,
    or costs where training still moves fast. The mixture is of the weights at hand and those after every
    `sample_every`-th step, the last ``max_samples - 1``, without a burn-in: until there are any the weights at hand are
    the one expert. When the epoch is over ``bayes/regret`` is the code length less the log-loss of the best of these
    members on the same samples; left out where they were not each scored once (a part of the data, samples drawn anew)
    or come with a random transform. All of it in eval mode, on the module's own step without the changes of other
    recipes; training changes by no bit.

    Args:
        temperature: T; 1 is the Bayes posterior, below it is a cold one, 0 switches the recipe off.
        prior_std: standard deviation s of the Gaussian prior of all that trains; None for a flat one.
        train_size: N, samples of the training set; None to ask the training data.
        burn_in_steps: optimizer steps before samples are kept; a float below 1 is a share of all steps.
        sample_every: a sample every so many steps after that.
        max_samples: at most so many are kept; of more a random choice, each as likely as any other.
        storage: where: main memory, the module's device, or files below ``default_root_dir`` (checkpoints then hold
            their names alone; files of samples that were replaced stay).
        seed: of the noise and of that choice.
        inject: add the noise to the weights after the step, or to the gradient; the same for plain SGD.
        evaluate: where the mixture is used: any of 'val', 'test', 'predict'.
        forward: where the module's logits come out: 'forward' for itself, or the name of a submodule that takes the
            batch's inputs.
        log_prob: from outputs and targets to log-probabilities ``[n]``, for other things than classes: a function, or
            in YAML a class such as ``lightning_recipes.core.likelihood.GaussianLogProb``. None: classes, from logits.
        prequential: add up the code length of the first epoch, for up to `max_samples` forward passes a batch of it.
        distill: folder for a file with log q of every training sample, written when the fit is over, for
            ``PSKD(targets=...)`` to train a student on.

    Raises:
        RecipeError: for bad arguments; before the first step for a weight decay beside a prior, a burn-in that leaves
            no sample, training data without a length, weights below fp32, embeddings with sparse gradients, manual
            optimization, LBFGS, a loss that is not one of classification (unless ``evaluate`` is empty or there is a
            `log_prob`), batches without labels to score; at an evaluation without samples, or of a module that they do
            not fit.
    """

    paper = Paper(
        "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
        "M. Feder, R. Urbanke, Y. Fogel",
        2025,
        "https://arxiv.org/abs/2506.07661",
    )
    does = "Samples networks by SGD with Langevin noise and predicts by the mean of their probabilities."
    use_when = "Labels are noisy or data few, and you want calibrated probabilities rather than one over-confident net."
    costs = (
        "One normal number a parameter and step; a copy of the weights a sample; as many forward passes to predict;"
        " with prequential as many a batch of the first epoch."
    )
    log_prefix = "bayes"
    free_on_resume = frozenset({"evaluate", "log_prob", "distill"})
    refuses: Mapping[str, str] = {
        "GradientNoise": "both add noise, and what is sampled at two temperatures follows neither law",
        "NormalizedGD": "its factor assumes the plain gradient",
        **dict.fromkeys(("WiSEFT", "BANG", "EMA"), "both decide with which weights the network is evaluated"),
        **dict.fromkeys(
            ("BackdoorAdjustment", "AdaptiveSmoothing", "EnsembleEvaluation"),
            "both replace the outputs at evaluation",
        ),
        "SLCA": "it takes back what moves the rows of other tasks, noise too, and the samples would follow no one law",
        "StrongWeightDecay": "weight decay is a prior too, and there is one",
    }

    def __init__(
        self,
        temperature: float = 1.0,
        prior_std: float | None = 0.2,
        train_size: int | None = None,
        burn_in_steps: int | float = 0.5,
        sample_every: int = 100,
        max_samples: int = 30,
        storage: Literal["cpu", "disk", "device"] = "cpu",
        seed: int = 0,
        inject: Literal["param", "grad"] = "param",
        evaluate: Sequence[str] = STAGES,
        forward: str = "forward",
        log_prob: Callable | None = None,  # with the types of its arguments jsonargparse takes no class for one
        prequential: bool = False,
        distill: str | None = None,
    ) -> None:
        super().__init__()
        check_argument(0 <= temperature < math.inf, self, "temperature", temperature, "at least 0 and finite")
        fits = prior_std is None or 0 < prior_std < math.inf
        check_argument(fits, self, "prior_std", prior_std, "None or positive and finite")
        check_argument(train_size is None or train_size >= 1, self, "train_size", train_size, "None or at least 1")
        share = isinstance(burn_in_steps, float) and burn_in_steps < 1
        fits = burn_in_steps >= 0 and (share or burn_in_steps == int(burn_in_steps))
        check_argument(fits, self, "burn_in_steps", burn_in_steps, "a number of steps, or a share in [0, 1)")
        check_argument(sample_every >= 1, self, "sample_every", sample_every, "at least 1")
        allowed = "a list of 'val', 'test' and 'predict'"
        fits = not isinstance(evaluate, str) and set(evaluate) <= set(STAGES)
        check_argument(fits, self, "evaluate", evaluate, allowed)
        least = 2 if evaluate else 1
        said = f"at least {least}" + (": a mixture of one is none" if evaluate else "")
        check_argument(max_samples >= least, self, "max_samples", max_samples, said)
        kinds = ("cpu", "disk", "device")
        check_argument(storage in kinds, self, "storage", storage, "'cpu', 'disk' or 'device'")
        check_argument(inject in ("param", "grad"), self, "inject", inject, "'param' or 'grad'")
        self.temperature, self.prior_std, self.train_size = temperature, prior_std, train_size
        self.burn_in_steps, self.sample_every, self.max_samples = burn_in_steps, sample_every, max_samples
        self.storage, self.seed, self.inject, self.evaluate = storage, seed, inject, tuple(evaluate)
        fits = log_prob is None or callable(log_prob)
        check_argument(fits, self, "log_prob", log_prob, "None, or a function of outputs and targets")
        fits = distill is None or (bool(distill) and log_prob is None)
        check_argument(fits, self, "distill", distill, "None or a folder, and None beside log_prob: it is for classes")
        self.forward, self.prequential, self.distill = forward, prequential, distill
        self.log_prob: LogProb | None = log_prob
        if prior_std is None:
            self.refuses = {name: why for name, why in self.refuses.items() if name != "StrongWeightDecay"}
        self._begin()
        self._plan: Plan | None = None
        self._places: dict[Tensor, int] = {}
        self._size = 0
        self._undo = ExitStack()
        self._members: list[Mapping[str, Tensor]] = []
        self._seen: Any = None  # log-probabilities of members and mixture; with log_prob the outputs of the members
        self._sums: Tensor | None = None

    def _begin(self) -> None:
        """The state of a chain that has not begun."""
        self._steps = 0  # true optimizer steps
        self._burn_in: int | None = None  # known when the fit's length is
        self._taken = 0  # samples, kept or not
        self._due = self._fresh = False
        self._samples: list[dict[str, Tensor] | str] = []
        self._code: Tensor | None = None  # as of `code_lengths`, over all ranks
        self._regret: float | None = None
        self._stream_over = False
        self._ring: list[tuple[int, dict[str, Tensor] | str]] = []  # weights of the first epoch, after so many steps

    @property
    def neutral(self) -> bool:
        return self.temperature == 0

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    # -- before the first step ---------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        part_of(plan.module, self.forward)
        self._plan = plan
        plan.at_end(self._finish)
        if not plan.fitting:
            check_strategy(plan.trainer)
            if plan.section is not None:
                self._begin()
                self.load_state(plan.section["state"])
            return
        if plan.trainer.global_step == 0:  # else this fit goes on where another one ended
            self._begin()
        for other in plan.trainer.callbacks:
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                raise RecipeError(
                    f"LangevinMixture and {type(other).__name__} cannot share a Trainer: both decide with which weights"
                    " the network is evaluated"
                )
        if str(plan.trainer.precision) in ("bf16-true", "16-true"):
            raise RecipeError(_LOW.format(f"with precision={plan.trainer.precision!r} every weight"))
        plan.after_surgery(self._look)
        plan.edit_gradients(self._pull, "after_clip", once=True)
        plan.after_step(self._stepped)

    def _finish(self) -> None:
        self._stop()
        self._plan, self._places = None, {}

    def _look(self) -> None:
        """The order in which noise is drawn: that of the names."""
        named = sorted(self._plan.module.named_parameters(), key=lambda pair: pair[0])
        self._places = {p: i for i, (_, p) in enumerate(named)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.neutral:
            return
        trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        low = [name for name, p in trained if p.dtype in (torch.bfloat16, torch.half)]
        if low:
            raise RecipeError(f"LangevinMixture: {_LOW.format(repr(low[0]))}")
        for name, part in pl_module.named_modules():
            weight = getattr(part, "weight", None)
            if getattr(part, "sparse", False) is True and isinstance(weight, Tensor) and weight.requires_grad:
                raise RecipeError(
                    f"LangevinMixture: {name} has sparse gradients, and noise is dense; make it with sparse=False"
                )
        for optimizer in trainer.optimizers:
            self._check_optimizer(optimizer)
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"LangevinMixture: gradient_clip_val={trainer.gradient_clip_val} shortens the gradient of the"
                " likelihood, not that of the prior or the noise: where it does, the law that is sampled is not the"
                " posterior"
            )

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        kind = type(optimizer).__name__
        decay = max((float(g.get("weight_decay") or 0.0) for g in optimizer.param_groups), default=0.0)
        if self.prior_std is not None and decay > 0:
            raise RecipeError(
                f"LangevinMixture: prior_std={self.prior_std:g} and {kind}(weight_decay={decay:g}) are two priors; use"
                " weight_decay=0, or prior_std=None"
            )
        moving = [g for g in optimizer.param_groups if g.get("momentum")]
        if type(optimizer) is not SGD or moving:
            what = f"{kind}(momentum={moving[0]['momentum']:g})" if moving else kind
            rank_zero_warn(
                f"LangevinMixture: under {what} the weights do not follow the posterior that plain SGD samples; the"
                " mixture is an ensemble of iterates with noise"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral:
            return
        with speaking_for(self):
            self._measure(trainer)
            self._plan_samples(trainer)
        normed = [n for n, m in pl_module.named_modules() if isinstance(m, _BatchNorm) and m.training]
        if normed:
            rank_zero_warn(
                f"LangevinMixture: {normed[0]} is a batch norm in train mode: its loss is of a batch and not of a"
                " sample, so that the posterior is only nearly sampled; its running statistics belong to each sample"
            )
        self._collect(trainer, pl_module)  # a checkpoint may have been written between the step and this
        if self._code is not None:
            self._code = self._code.to(pl_module.device)
            trainer.callback_metrics.update({n: torch.tensor(v) for n, v in self._code_values().items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.neutral:
            with speaking_for(self):
                self._measure(trainer)  # a phase may have brought other data

    def _measure(self, trainer: pl.Trainer) -> None:
        """N."""
        if self.train_size is not None:
            self._size = self.train_size
            return
        loaders = trainer.fit_loop._combined_loader.flattened
        data = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
        if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise RecipeError("the training data do not say how many samples they have; give train_size")
        self._size = len(data)

    def _plan_samples(self, trainer: pl.Trainer) -> None:
        given = self.burn_in_steps
        share = isinstance(given, float) and given < 1
        total = horizon(trainer, "step", f"burn_in_steps={given!r}") if share else trainer.estimated_stepping_batches
        if self._burn_in is not None:
            return
        self._burn_in = int(given * total) if share else int(given)
        if self._burn_in + self.sample_every > total:
            raise RecipeError(
                f"burn_in_steps={given!r} is {self._burn_in} steps, and the fit has {int(total)}: with"
                f" sample_every={self.sample_every} no sample would be kept"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.neutral:
            return
        if not (self._steps or batch_idx or trainer.current_epoch):
            self._check_loss(trainer, pl_module, batch)
        if self.prequential and trainer.current_epoch == 0:
            with speaking_for(self):
                self._score(trainer, pl_module, batch, batch_idx)
        elif batch_idx == 0:  # the weights are those that the epoch ended with, also where that was in another process
            self._end_stream(trainer, pl_module)

    def _check_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Look at the loss of the first batch: is it a mean, and one of a classification?"""
        try:
            with (
                speaking_for(self),
                gradients_allowed(),
                modes_kept(pl_module, training=False),
                trainer.precision_plugin.forward_context(),
            ):
                seen = observe(trainer, pl_module, batch, 0)
                if self.log_prob is not None:
                    if seen.own_loss is not None:
                        self._check_scale(seen)
                    return
        except RecipeError:
            return  # a loss that cannot be seen is taken for what it should be
        logits, classes = seen.logits, seen.logits.shape[-1]
        if self.evaluate and seen.call.is_function and not (seen.call.classifies and logits.dim() == 2 and classes > 1):
            raise RecipeError(
                f"LangevinMixture mixes probabilities of classes; {seen.call.name} of {tuple(logits.shape)} gives none."
                " Give log_prob, or use evaluate=[] to sample only"
            )
        summed = seen.call.options.get("reduction") == "sum"
        if summed or (classes > 1 and float(seen.loss.detach()) > SUMMED * math.log(classes)):
            rank_zero_warn(
                f"LangevinMixture: the first loss is {float(seen.loss.detach()):.3g}, as if it were a sum over the"
                " batch; noise and prior are those of a MEAN negative log-likelihood"
            )

    def _check_scale(self, seen: Replay) -> None:
        """Is the loss that trains the mean of ``-log_prob``? By their gradients, in which constants do not count."""
        try:
            nll = -self.log_prob(seen.logits, seen.targets).mean()
            (wanted,) = torch.autograd.grad(nll, seen.logits, retain_graph=True)
            (found,) = torch.autograd.grad(seen.own_loss, seen.logits)
        except (RuntimeError, IndexError):
            return  # the loss gets another form of the outputs than log_prob does
        found, wanted = found.float(), wanted.float()
        factor = float((found * wanted).sum() / wanted.square().sum())
        if not torch.allclose(found, wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max())):
            rank_zero_warn(
                f"LangevinMixture: the loss that trains is {factor:.3g} times the mean of -log_prob"
                " and not that mean: the posterior that is sampled is not that of log_prob. Train on"
                " -log_prob(outputs, targets).mean(), or on what differs from it by a constant"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def _held(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Deviation]]:
        """The parameters that are stepped, in the order of their names, and the learning rate of each."""
        found = [(p, g["lr"]) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        last = len(self._places)
        found.sort(key=lambda pair: self._places.get(pair[0], last))
        if any(p.grad.layout is not torch.strided for p, _ in found):
            raise RecipeError("LangevinMixture: a gradient is sparse, and noise is dense; make it with sparse=False")
        return [p for p, _ in found], [lr for _, lr in found]

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer) -> None:
        """The prior's part of the gradient, after clipping; and the noise, where it goes there."""
        parameters, rates = self._held(optimizer)
        gradients = [p.grad for p in parameters]
        strength = prior_strength(self.temperature, self._size, self.prior_std)
        if strength and gradients:
            torch._foreach_add_(gradients, parameters, alpha=strength)
        if self.inject == "grad" and gradients:
            # what is descended on is subtracted: the same draws then move the weights alike
            sigma = [-gradient_deviation(lr, self.temperature, self._size) for lr in rates]
            add_noise_(gradients, sigma, self.seed, "LangevinMixture", self._steps)

    def _stepped(self, optimizer: Optimizer) -> None:
        step, self._steps = self._steps, self._steps + 1
        parameters, rates = self._held(optimizer)
        if self.inject == "param" and parameters:
            sigma = [noise_deviation(lr, self.temperature, self._size) for lr in rates]
            add_noise_(parameters, sigma, self.seed, "LangevinMixture", step)
        since = self._steps - self._burn_in
        self._due = since > 0 and since % self.sample_every == 0
        self._fresh = self.prequential and self._steps % self.sample_every == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.neutral:
            self._collect(trainer, pl_module)

    @torch.no_grad()
    def _collect(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a sample, if one is due; all ranks together."""
        sample = None
        if self._fresh and trainer.current_epoch == 0:
            sample = self._copied(trainer, module)
            self._ring = [*self._ring, (self._steps, sample)][-self.max_samples :]
        due, self._due, self._fresh = self._due, False, False
        if not due:
            return
        place = slot(self._taken, self.max_samples, self.seed, "LangevinMixture/keep")
        self._taken += 1
        if place is None:
            return
        sample = self._copied(trainer, module) if sample is None else sample
        self._samples[place:] = [sample, *self._samples[place + 1 :]]

    def _copied(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        """The weights as they stand, where they are kept; all ranks together."""
        trained = {p for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        frozen = self._plan.frozen_by_surgery
        held = {n: p for n, p in module.named_parameters() if p in trained and n not in frozen}
        saved = tensors_of(module)
        held |= {n: b for n, b in module.named_buffers() if n in saved}
        device = module.device if self.storage == "device" else torch.device("cpu")
        sample: Any = {name: value.detach().to(device, copy=True) for name, value in held.items()}
        own = dict(module.named_parameters())
        broadcast_([value for name, value in sample.items() if name not in own], trainer)  # statistics of a rank's own
        if self.storage == "disk":
            artefact = Artefact(Path(trainer.default_root_dir) / "langevin_mixture", "sample", {"weights": sample})
            content = sample
            artefact.get(lambda _: content)
            sample = str(artefact.path.absolute())
        return sample

    # -- the training data, looked at --------------------------------------------------------------------------------

    @torch.no_grad()
    def _outputs(
        self, module: pl.LightningModule, batch: Any, number: int, members: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Any], Tensor]:
        """What every member makes of a training batch in the module's own step, silently, and the labels beside it."""
        part, held = part_of(module, self.forward), []

        def run(*args: Any, **kwargs: Any) -> Any:
            if held:  # called again in the step: what counts is the first
                return part(*args, **kwargs)
            held.extend(self._every(members, args, kwargs))
            return held[-1]

        undo = replace_outputs(part, "LangevinMixture", None, run)
        try:
            with silent(module):
                stock_step(module)(batch, *rest_of_arguments(module, number))
        finally:
            undo()
        if not held:
            where = "the module" if self.forward == "forward" else repr(self.forward)
            raise RecipeError(
                f"nothing came out of {where} in the training step; name the submodule that it calls on its inputs with"
                " forward='NAME'"
            )
        labels = labels_in(batch)
        if not isinstance(labels, Tensor):
            raise RecipeError("there are no labels in the training batches, second in a pair or under their name")
        return held, labels

    def _log_probs(self, outputs: Sequence[Any], labels: Tensor) -> Tensor:
        """Of the labels, by every member: ``[M, n]``."""
        if self.log_prob is not None:
            return torch.stack([self._likelihood(each, labels) for each in outputs])
        logits = [logits_in(each) for each in outputs]
        if logits[0] is None or labels.is_floating_point() or labels.shape != logits[0].shape[:1]:
            got = "no logits [n, classes]" if logits[0] is None else f"logits {tuple(logits[0].shape)}"
            raise RecipeError(
                f"a code of labels needs logits [n, classes] and class indices [n]; got {got} and labels"
                f" {tuple(labels.shape)}. Name the part that gives logits with forward='NAME', or give log_prob"
            )
        at = labels[:, None]
        return torch.stack([each.float().log_softmax(1).gather(1, at)[:, 0] for each in logits])

    def _likelihood(self, outputs: Any, labels: Tensor) -> Tensor:
        found = self.log_prob(outputs, labels)
        if not isinstance(found, Tensor) or found.shape != labels.shape[:1]:
            got = str(tuple(found.shape)) if isinstance(found, Tensor) else type(found).__name__
            raise RecipeError(f"log_prob must give one number a sample, [{len(labels)}]; got {got}")
        return found

    def _experts(self) -> list[Mapping[str, Tensor]]:
        """The last earlier weights of the first epoch, and the ones at hand."""
        earlier = [sample for step, sample in self._ring if step < self._steps]
        kept = earlier[max(len(earlier) - self.max_samples + 1, 0) :]
        return [*map(self._opened, kept), {}]

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> None:
        """Add a batch to the code, before it is trained on."""
        with apart(trainer, self.seed, "LangevinMixture/prequential", number), buffers_of_rank_zero(trainer):
            outputs, labels = self._outputs(module, batch, number, self._experts())
            with torch.no_grad():
                found = all_sum(code_lengths(self._log_probs(outputs, labels)))
        self._code = found if self._code is None else self._code + found
        values = self._code[:2].float().unbind()
        self.log_dict(dict(zip(("bayes/prequential", "bayes/prequential_last"), values)), rank_zero_only=False)

    def _code_values(self) -> dict[str, float]:
        mixed, last, _ = self._code.tolist()
        values = {"bayes/prequential": mixed, "bayes/prequential_last": last}
        return values if self._regret is None else {**values, "bayes/regret": self._regret}

    def _over_training_set(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        members: Sequence[Mapping[str, Tensor]],
        rows: Callable[[list[Any], Tensor], Tensor],
        what: str,
    ) -> Encoded:
        """Rows ``[n, ...]`` made of the members' outputs and the labels, for the whole training set in its order."""
        held: dict[str, Tensor] = {}

        def run(batch: Any, number: int) -> Tensor:
            outputs, labels = self._outputs(module, batch, number, members)
            with torch.no_grad():
                held["rows"] = rows(outputs, labels)
            return labels

        samples = samples_at_hand(trainer)
        with buffers_of_rank_zero(trainer):
            return encode(trainer, module, lambda: held, samples, progress=bar(trainer, what), run=run)

    def _end_stream(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The regret, once the first epoch is over: its best member in hindsight needs another look at the samples."""
        if not self.prequential or self._stream_over or self._code is None:
            return
        why, count = None, int(self._code[2])
        with speaking_for(self):
            try:
                dataset = training_set(trainer)
                if len(dataset) != count:
                    why = f"the first epoch had {count} samples of {len(dataset)}"
                elif reads_anew(dataset):
                    why = "the training data are other ones each time that they are read"
            except RecipeError as error:
                why = str(error)
            if why is None:
                found = self._over_training_set(
                    trainer, module, self._experts(), lambda o, y: self._log_probs(o, y).T, "regret"
                )
                best = -found.features["rows"].double().sum(0).amax()
                self._regret = float(self._code[0] - best.to(self._code.device))
        self._stream_over, self._ring = True, []
        log_values(trainer, self._code_values())
        code = f"LangevinMixture: the labels of the first epoch cost {float(self._code[0]):.6g} nats"
        rank_zero_info(f"{code}, {self._regret:.4g} more than by the best member" if why is None else f"{code} ({why})")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral:
            return
        self._end_stream(trainer, pl_module)
        if self.distill is None:
            return
        if not self._samples:
            rank_zero_warn(f"LangevinMixture: the fit ended after {self._steps} steps without a sample to distil")
            return
        with speaking_for(self):
            self._write_targets(trainer, pl_module)

    def _write_targets(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """log q of every training sample, by its index below all subsets, to a file."""

        def log_q(outputs: list[Any], labels: Tensor) -> Tensor:
            logits = [logits_in(each) for each in outputs]
            if logits[0] is None:
                raise RecipeError(
                    "distill needs logits [n, classes]; name the part that gives them with forward='NAME'"
                )
            return mixture_log_prob(torch.stack([each.float().log_softmax(1) for each in logits]))

        members = [self._opened(sample) for sample in self._samples]
        rows = self._over_training_set(trainer, module, members, log_q, "soft targets").features["rows"]
        total, root = root_of(training_set(trainer))
        content = {"log_probs": rows, "ids": torch.arange(total) if root is None else root, "total": total}
        artefact = Artefact(self.distill, "log_q", content)
        if trainer.is_global_zero:
            artefact.save(content)
        rank_zero_info(f"LangevinMixture: log q of {len(rows)} training samples is in {artefact.path}")

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit"
        stage = {"fit": "val", "validate": "val"}.get(trainer.state.fn, trainer.state.fn)
        if self._plan is None or stage not in self.evaluate:  # None where it is neutral
            return
        self._stop()
        if not self._samples:
            if fitting:
                return
            first = "its burn-in and `sample_every`" if self._burn_in is None else self._burn_in + self.sample_every
            raise RecipeError(
                f"LangevinMixture: there is no sample to predict by: {self._steps} steps were taken, and the first"
                f" sample comes after {first}. Fit first, or give the checkpoint of a fit that went on for longer"
            )
        # Evaluation loops run under inference_mode, whose tensors could never be attacked or trained.
        with speaking_for(self), torch.inference_mode(False):
            self._members = [self._opened(sample) for sample in self._samples]
            here = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
            unlike = [n for m in self._members for n, v in m.items() if n not in here or here[n].shape != v.shape]
            if unlike:
                raise RecipeError(
                    f"the samples have a {unlike[0]!r} that the module has not, or in another shape; evaluate with the"
                    " checkpoint of the fit (ckpt_path=...), which brings its structure back"
                )
            if self.log_prob is not None and stage == "predict":
                self._undo.callback(wrap_predictions(pl_module, self._predict_by_each))
                return
            part = part_of(pl_module, self.forward)
            how = (self._mixture,) if self.log_prob is None else (None, self._outputs_together)
            self._undo.callback(replace_outputs(part, "LangevinMixture", *how))

    on_test_start = on_predict_start = on_validation_start

    def _opened(self, sample: dict[str, Tensor] | str) -> Mapping[str, Tensor]:
        return content_at(sample) if isinstance(sample, str) else sample

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    on_test_end = on_predict_end = on_validation_end

    def _stop(self) -> None:
        """Give the module its own outputs back."""
        self._undo.close()
        self._members, self._seen, self._sums = [], None, None

    def _mixture(self, logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """log q, in the place of the logits."""
        if logits.shape[1] < 2:
            raise RecipeError(
                f"LangevinMixture mixes probabilities of classes; logits {tuple(logits.shape)} give none. Leave"
                " this stage out of evaluate"
            )
        every = self._every(self._members, args, kwargs)
        log_probs = torch.stack([logits_in(each).float().log_softmax(1) for each in every])
        log_q = mixture_log_prob(log_probs)
        if self._seen is None:  # what the step itself got; an attack on the same batch asks many times more
            self._seen = log_probs.detach(), log_q.detach()
        return log_q

    def _every(
        self, members: Sequence[Mapping[str, Tensor]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """What comes out of the part under the weights of each member; those that it does not have stay."""
        module = self._plan.module
        part, own = part_of(module, self.forward), dict(module.named_parameters())
        every = []
        for member in members:
            with wearing(module, _like(own, member, module.device)):
                every.append(part(*args, **kwargs))
        return every

    def _outputs_together(self, *args: Any, **kwargs: Any) -> Any:
        """With log_prob: one output for all members if it knows one, else that of the weights that train."""
        outputs = self._every(self._members, args, kwargs)
        if self._seen is None:
            self._seen = outputs
        together = getattr(self.log_prob, "mixture", None)
        if together is None:
            return part_of(self._plan.module, self.forward)(*args, **kwargs)
        return together(_stacked(outputs))

    def _predict_by_each(self, predict: Predict, batch: Any) -> Any:
        """With log_prob: the predictions of all members, stacked."""
        module = self._plan.module
        own = dict(module.named_parameters())
        found = []
        for member in self._members:
            with wearing(module, _like(own, member, module.device)):
                found.append(predict(batch))
        return _stacked(found)

    def _begin_batch(self, *args: Any) -> None:
        self._seen = None

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        if not self._members or (self.log_prob is not None and trainer.predicting):
            return
        if self._seen is None:
            where = "the module" if self.forward == "forward" else repr(self.forward)
            what = "no logits [n, classes]" if self.log_prob is None else "nothing"
            raise RecipeError(
                f"LangevinMixture: {what} came out of {where} in the evaluation step; name the"
                " submodule that it calls on its inputs with forward='NAME'"
            )
        labels = labels_in(batch)
        if self.log_prob is not None:
            with speaking_for(self), torch.no_grad():
                found = self._log_probs(self._seen, labels) if isinstance(labels, Tensor) else None
            if found is not None:
                self._add(likelihood_sums(found))
            return
        log_probs, log_q = self._seen
        known = isinstance(labels, Tensor) and labels.shape == log_q.shape[:1]
        if known and labels.is_floating_point():
            raise RecipeError(
                "LangevinMixture mixes probabilities of classes; the labels are no class indices. Give log_prob, or"
                " leave this stage out of evaluate"
            )
        self._add(mixture_sums(log_probs, log_q, labels if known else None))

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        mixed, mean, apart_sum, labelled, count = all_sum(self._sums).unbind()
        values = {"n_samples": count.new_tensor(len(self._members))}
        if self.log_prob is None:
            values["disagreement"] = apart_sum / count
        if labelled:
            values |= {"mixture_nll": mixed / labelled, "mean_sample_nll": mean / labelled}
            values["gain"] = values["mean_sample_nll"] - values["mixture_nll"]
        self.log_dict({f"bayes/{name}": value.float() for name, value in values.items()}, rank_zero_only=False)
        self._sums = None

    on_test_epoch_end = on_validation_epoch_end

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "burn_in": self._burn_in,
            "taken": self._taken,
            "due": self._due,
            "samples": list(self._samples),
            "code": self._code,
            "regret": self._regret,
            "stream_over": self._stream_over,
            "ring": [list(each) for each in self._ring],
            "fresh": self._fresh,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._steps, self._burn_in, self._taken = state["steps"], state["burn_in"], state["taken"]
        self._due, self._samples = state["due"], list(state["samples"])
        self._code, self._regret, self._stream_over = (state.get(k) for k in ("code", "regret", "stream_over"))
        self._ring, self._fresh = [tuple(each) for each in state.get("ring", [])], state.get("fresh", False)


def _like(own: Mapping[str, Parameter], member: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A member's tensors on a device; parameters ask for a gradient where the module's own do, for whoever looks at a
    loss and takes one without a graph for none."""
    with torch.inference_mode(False):
        return {
            name: Parameter(value.to(device), own[name].requires_grad) if name in own else value.to(device)
            for name, value in member.items()
        }


def _stacked(outputs: Sequence[Any]) -> Any:
    """Outputs of M members as one, with M as the first axis of its tensors."""
    return tree_map(lambda *each: torch.stack(each) if isinstance(each[0], Tensor) else list(each), *outputs)

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

On clean labels with a wide prior the posterior at T = 1 can be worse than plain SGD; it shines where labels are noisy.
The paper's abstract has no schedule: burn-in, thinning and the prior's default are ours. Its prequential code length
and distillation are left out.

Costs one normal number a parameter and step, a copy of what trains a sample (in main memory and in checkpoints, or on
disk), and M forward passes in the place of one at evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.utils.data import IterableDataset

from lightning_recipes.core import random
from lightning_recipes.core.artefacts import Artefact, content_at
from lightning_recipes.core.averaging import tensors_of
from lightning_recipes.core.copies import wearing
from lightning_recipes.core.distributed import all_sum, broadcast_, check_strategy
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.noise import Deviation, add_noise_
from lightning_recipes.core.outputs import logits_in, part_of, replace_outputs
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.schedule import horizon
from lightning_recipes.core.silence import gradients_allowed, modes_kept
from lightning_recipes.core.step import observe

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


def mixture_log_prob(log_probs: Tensor) -> Tensor:
    """log of the mean of probabilities.

    Args:
        log_probs: ``[M, ...]``, the log-probabilities of M members, normalised.

    Returns:
        ``[...]``.
    """
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mixture_sums(log_probs: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
    """What a batch adds to the figures of a mixture.

    Args:
        log_probs: of the members, ``[M, n, classes]``.
        log_q: of the mixture, ``[n, classes]``.
        labels: int64 ``[n]``; None where they are not known.

    Returns:
        fp64 ``[5]``: sums over samples of the mixture's log-loss, of the members' mean log-loss, of the mean of
        KL(member || mixture); the number of samples with a label, and of all.
    """
    apart = (log_probs.exp() * (log_probs - log_q)).nan_to_num(nan=0.0).sum(-1).mean(0).double().sum()
    n = log_q.new_tensor(len(log_q), dtype=torch.float64)
    if labels is None:
        zero = torch.zeros_like(n)
        return torch.stack([zero, zero, apart, zero, n])
    at = labels[:, None]
    mixed = -log_q.gather(1, at).double().sum()
    mean = -log_probs.gather(2, at.expand(len(log_probs), -1, 1)).mean(0).double().sum()
    return torch.stack([mixed, mean, apart, n, n])


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

    Raises:
        RecipeError: for bad arguments; before the first step for a weight decay beside a prior, a burn-in that leaves
            no sample, training data without a length, weights below fp32, embeddings with sparse gradients, manual
            optimization, LBFGS, a loss that is not one of classification (unless ``evaluate`` is empty); at an
            evaluation without samples, or of a module that they do not fit.
    """

    paper = Paper(
        "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
        "M. Feder, R. Urbanke, Y. Fogel",
        2025,
        "https://arxiv.org/abs/2506.07661",
    )
    does = "Samples networks by SGD with Langevin noise and predicts by the mean of their probabilities."
    use_when = "Labels are noisy or data few, and you want calibrated probabilities rather than one over-confident net."
    costs = "One normal number a parameter and step; a copy of the weights a sample; as many forward passes to predict."
    log_prefix = "bayes"
    free_on_resume = frozenset({"evaluate"})
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
        self.forward = forward
        if prior_std is None:
            self.refuses = {name: why for name, why in self.refuses.items() if name != "StrongWeightDecay"}
        self._begin()
        self._plan: Plan | None = None
        self._places: dict[Tensor, int] = {}
        self._size = 0
        self._undo = ExitStack()
        self._members: list[Mapping[str, Tensor]] = []
        self._seen: tuple[Tensor, Tensor] | None = None
        self._sums: Tensor | None = None

    def _begin(self) -> None:
        """The state of a chain that has not begun."""
        self._steps = 0  # true optimizer steps
        self._burn_in: int | None = None  # known when the fit's length is
        self._taken = 0  # samples, kept or not
        self._due = False
        self._samples: list[dict[str, Tensor] | str] = []

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
        """Look at the loss of the first batch: is it a mean, and one of a classification?"""
        if self.neutral or self._steps or batch_idx or trainer.current_epoch:
            return
        try:
            with (
                speaking_for(self),
                gradients_allowed(),
                modes_kept(pl_module, training=False),
                trainer.precision_plugin.forward_context(),
            ):
                seen = observe(trainer, pl_module, batch, batch_idx)
        except RecipeError:
            return  # a loss that cannot be seen is taken for what it should be
        logits, classes = seen.logits, seen.logits.shape[-1]
        if self.evaluate and seen.call.is_function and not (seen.call.classifies and logits.dim() == 2 and classes > 1):
            raise RecipeError(
                f"LangevinMixture mixes probabilities of classes; {seen.call.name} of {tuple(logits.shape)} gives none."
                " Use evaluate=[] to sample only"
            )
        summed = seen.call.options.get("reduction") == "sum"
        if summed or (classes > 1 and float(seen.loss.detach()) > SUMMED * math.log(classes)):
            rank_zero_warn(
                f"LangevinMixture: the first loss is {float(seen.loss.detach()):.3g}, as if it were a sum over the"
                " batch; noise and prior are those of a MEAN negative log-likelihood"
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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.neutral:
            self._collect(trainer, pl_module)

    @torch.no_grad()
    def _collect(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a sample, if one is due; all ranks together."""
        if not self._due:
            return
        self._due = False
        place = slot(self._taken, self.max_samples, self.seed, "LangevinMixture/keep")
        self._taken += 1
        if place is None:
            return
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
        self._samples[place:] = [sample, *self._samples[place + 1 :]]

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
            part = part_of(pl_module, self.forward)
            self._undo.callback(replace_outputs(part, "LangevinMixture", self._mixture))

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
        module = self._plan.module
        part, own = part_of(module, self.forward), dict(module.named_parameters())
        every = []
        for member in self._members:
            with wearing(module, _like(own, member, logits.device)):
                every.append(logits_in(part(*args, **kwargs)).float().log_softmax(1))
        log_probs = torch.stack(every)
        log_q = mixture_log_prob(log_probs)
        if self._seen is None:  # what the step itself got; an attack on the same batch asks many times more
            self._seen = log_probs.detach(), log_q.detach()
        return log_q

    def _begin_batch(self, *args: Any) -> None:
        self._seen = None

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        if not self._members:
            return
        if self._seen is None:
            where = "the module" if self.forward == "forward" else repr(self.forward)
            raise RecipeError(
                f"LangevinMixture: no logits [n, classes] came out of {where} in the evaluation step; name the"
                " submodule that it calls on its inputs with forward='NAME'"
            )
        log_probs, log_q = self._seen
        labels = labels_in(batch)
        known = isinstance(labels, Tensor) and labels.shape == log_q.shape[:1]
        if known and labels.is_floating_point():
            raise RecipeError(
                "LangevinMixture mixes probabilities of classes; the labels are no class indices. Leave this stage out"
                " of evaluate"
            )
        sums = mixture_sums(log_probs, log_q, labels if known else None)
        self._sums = sums if self._sums is None else self._sums + sums

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        mixed, mean, apart, labelled, count = all_sum(self._sums).unbind()
        values = {"n_samples": count.new_tensor(len(self._members)), "disagreement": apart / count}
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
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._steps, self._burn_in, self._taken = state["steps"], state["burn_in"], state["taken"]
        self._due, self._samples = state["due"], list(state["samples"])


def _like(own: Mapping[str, Parameter], member: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A member's tensors on a device; parameters ask for a gradient where the module's own do, for whoever looks at a
    loss and takes one without a graph for none."""
    with torch.inference_mode(False):
        return {
            name: Parameter(value.to(device), own[name].requires_grad) if name in own else value.to(device)
            for name, value in member.items()
        }

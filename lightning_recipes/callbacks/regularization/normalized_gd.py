"""NormalizedGD: gradient descent whose step has the length of a perceptron's, however small the loss.

Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes", 2024
(https://arxiv.org/abs/2412.08424). No code was released; the paper's main text decides.

With samples (a_i, y_i), y_i = -1 or 1, margins m_i = y_i a_i^T theta and s_i = 1 / (1 + exp(m_i)):

    f(theta) = mean log(1 + exp(-m_i)),    grad f = -mean s_i y_i a_i
    theta <- theta - gamma beta grad f,    beta = 1 / mean s_i

so the step is gamma times a convex combination of the y_i a_i and at most gamma max ||a_i|| long. Plain descent needs
up to n R^2 / mu^2 updates until every sample is right (R the largest norm, mu the margin); this one at most
R^2 / mu^2 + 2 log(2 n - 1) / (gamma mu^2). For gamma to infinity they are batch perceptrons, and the loss says nothing
about progress: watch ``normalized_gd/misclassified``. (The paper's beta for gamma to infinity, |S_t|, is a slip: its
own formula gives n / |S_t|.) The gain is with unbalanced classes; with balanced ones the two are about level.

OURS is the extension to stock modules: for a softmax let m_i = z_{i,y} - logsumexp_{c != y} z_{i,c}. Then the
cross-entropy is log(1 + exp(-m_i)) and 1 - p_i(y) = s_i, so the same factor beta makes the same step; with two classes
it is the paper's method on the difference of the logits. The paper warns of networks at large steps.

The factor is one for all micro-batches, ranks and parameters, and multiplies the finished gradient before clipping; the
loss that is logged stays what it is. Costs a pass over the logits, and four numbers a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data.distributed import DistributedSampler

from lightning_recipes.core.criterion import CLASS_LOSSES, Call
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.gather import gather
from lightning_recipes.core.gradients import optimized
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step, prefix

_BINARY_LOSSES = {"binary_cross_entropy_with_logits": "0 or 1", "soft_margin_loss": "-1 or 1"}  # and their labels
_INVARIANT = ("Adam", "Adamax", "NAdam", "RAdam", "SparseAdam", "Adagrad", "Adadelta", "Adafactor", "RMSprop", "Rprop")


# -- the maths ---------------------------------------------------------------------------------------------------------


def normalized_logistic_gd(
    a: Tensor, y: Tensor, gamma: float, max_iter: int, normalized: bool = True
) -> tuple[Tensor, int | None]:
    """The paper's own setting: logistic regression without a bias, from 0, until every sample is right.

    Args:
        a: samples ``[n, d]``; append a column of ones for a bias.
        y: labels -1 or 1, ``[n]``.
        gamma: step size.
        max_iter: updates to take at most.
        normalized: False is plain gradient descent, beta = 1.

    Returns:
        theta, fp64 ``[d]``, and the number of updates after which every margin was above 0 for the first time, None if
        none of `max_iter` updates was enough.

    Raises:
        RecipeError: for a step size that is not positive, and labels other than -1 and 1.
    """
    if not gamma > 0:
        raise RecipeError(f"normalized_logistic_gd: gamma must be positive; got {gamma!r}")
    if not bool(((y == 1) | (y == -1)).all()):
        raise RecipeError(f"normalized_logistic_gd: y must be labels -1 or 1; got {y.unique().tolist()[:5]}")
    signed = a.double() * y.double()[:, None]
    theta = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
    for updates in range(max_iter + 1):
        margins = signed @ theta
        if bool((margins > 0).all()):
            return theta, updates
        if updates < max_iter:
            log_s = F.logsigmoid(-margins)
            weights = log_s.softmax(0) if normalized else log_s.exp() / len(a)
            theta = theta + gamma * (weights @ signed)
    return theta, None


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """m_i, of the shape of the targets, in fp32 at least.

    Args:
        logits: ``[n, classes, ...]``, or of the shape of the targets.
        targets: class indices ``[n, ...]``; or 1 and either 0 or -1, of the shape of the logits.
    """
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if z.shape == targets.shape:
        return torch.where(targets > 0, z, -z)
    targets = targets.unsqueeze(1)
    # Not log p - log(1 - p): in fp32 1 - p is 0 from m = 17 on.
    return (z.gather(1, targets) - z.scatter(1, targets, -torch.inf).logsumexp(1, keepdim=True)).squeeze(1)


def tally(margins: Tensor, kept: Tensor | None = None) -> Tensor:
    """What the factor and the log need of some samples: sum of s_i, their number, how many have m_i <= 0, least m_i.

    Args:
        margins: any shape.
        kept: which of them count, of that shape; None counts all.

    Returns:
        fp64 ``[4]`` (fp32 on a device without).
    """
    m = margins.flatten().to(torch.float32 if margins.device.type == "mps" else torch.float64)
    s, wrong = torch.sigmoid(-m), ~(m > 0)  # also where it is not a number
    count = m.new_tensor(float(len(m))) if kept is None else kept.sum().to(m.dtype)
    if kept is not None:
        kept = kept.flatten()
        s, wrong, m = s * kept, wrong & kept, m.where(kept, torch.inf)
    least = m.amin() if len(m) else m.new_tensor(torch.inf)
    return torch.stack([s.sum(), count, wrong.sum().to(m.dtype), least])


def joined(tallies: Tensor) -> Tensor:
    """The tally ``[4]`` of all samples from those of several parts, ``[k, 4]``."""
    return torch.cat([tallies[:, :3].sum(0), tallies[:, 3:].amin(0)])


def factor(tally: Tensor, max_beta: float) -> Tensor:
    """beta = n / sum s_i, at most `max_beta`; a scalar."""
    return (tally[1] / tally[0]).clamp_max(max_beta)


def scale_(gradients: list[Tensor], beta: Tensor) -> None:
    """Multiply gradients by a scalar of their device, in place."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        wide = torch.promote_types(dtype, torch.float32)
        torch._foreach_mul_([g for g in gradients if g.dtype == dtype], beta.to(wide))


# -- the callback ------------------------------------------------------------------------------------------------------


class NormalizedGD(StepRecipe):
    """Scale the gradient of a classification so that the step does not shrink with the loss.

    The step size gamma is the optimizer's learning rate: 0.1 to 100 in the paper, larger is not worse. Exact with
    plain SGD and one optimizer step over the whole training set, by one batch or by accumulation.

    Args:
        max_beta: cap on the factor, for losses so small that nothing is left to learn.
        stop_when_separated: end the fit when every training sample of an epoch is right; with full batches before the
            update that would follow, so that `updates` is the paper's count of iterations.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        require_full_batch: refuse optimizer steps over less than the whole training set. False takes the factor from
            the samples of each step; the paper says nothing about that.

    Attributes:
        updates: optimizer steps so far.
        separated: whether every training sample was right when the last epoch ended; with `stop_when_separated` only.

    Raises:
        RecipeError: for bad arguments; in setup for manual optimization; before the first step for mini-batches, LBFGS
            and optimizers that take a common factor out again (Adam); in the first step for a loss that is not the mean
            of logistic losses with hard labels: a regression, soft or smoothed labels, weights, sums.
    """

    paper = Paper(
        "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes",
        "A. Tyurin",
        2024,
        "https://arxiv.org/abs/2412.08424",
    )
    does = "Divides the gradient of a classification by the mean of 1 - p, so that steps do not shrink with the loss."
    use_when = "You train a linear classifier by full-batch gradient descent, above all on unbalanced classes."
    costs = "A pass over the logits; four numbers from every rank an optimizer step."
    needs_criterion = True
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("PSKD", "PSER", "BANG", "Mixup", "CutMix"), "its step length assumes hard labels"),
        **dict.fromkeys(("GLAD", "LangevinMixture"), "its factor assumes the plain gradient"),
        "ClassWeights": "its factor is that of a mean over all samples alike",
    }

    def __init__(
        self,
        max_beta: float = 1e6,
        stop_when_separated: bool = False,
        criterion: str | int | None = None,
        require_full_batch: bool = True,
    ) -> None:
        super().__init__()
        check_argument(1 < max_beta < float("inf"), self, "max_beta", max_beta, "above 1 and finite")
        self.max_beta, self.stop_when_separated = max_beta, stop_when_separated
        self.criterion, self.require_full_batch = criterion, require_full_batch
        self._begin()
        self._looked_at: int | None = None  # epoch
        self._plan: Plan | None = None

    def _begin(self) -> None:
        self.updates, self.separated = 0, False
        self._window: Tensor | None = None  # the tally of this rank since the last update
        self._size: int | None = None  # samples in a micro-batch of this window
        self._wrong: Tensor | None = None  # of all ranks in this epoch
        self._checked = False

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if not plan.fitting:
            return
        if plan.trainer.global_step == 0:
            self._begin()
        self._plan, self._checked = plan, False
        plan.at_end(self._finish)
        plan.edit_gradients(self._scale, once=True)

    def _finish(self) -> None:
        self._plan = None

    # -- before the first step -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            _check_optimizer(optimizer)
        if trainer.gradient_clip_val:
            rank_zero_warn("NormalizedGD: gradients are clipped after they are scaled, which undoes the scaling")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            rank_zero_warn("NormalizedGD: gradients of small losses underflow in fp16; use precision='32-true'")
        terms = [r for r in Session.of(trainer, pl_module).step_recipes if r is not self and r.overrides("extra_loss")]
        if terms:
            names = " and ".join(type(recipe).__name__ for recipe in terms)
            rank_zero_warn(f"NormalizedGD: the factor scales what {names} adds to the loss too")
        if self.stop_when_separated and trainer.max_epochs == -1 and trainer.max_steps == -1:
            rank_zero_warn("NormalizedGD: the fit has no other end: it never ends if the classes cannot be separated")
        self._looked_at = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wrong = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch of every epoch: a schedule of the accumulation has had its turn by then."""
        if self._looked_at == trainer.current_epoch:
            return
        self._looked_at = trainer.current_epoch
        partial = _less_than_everything(trainer)
        if partial is None:
            return
        if self.require_full_batch:
            raise RecipeError(
                f"NormalizedGD: require_full_batch needs optimizer steps over the whole training set; {partial}, or set"
                " require_full_batch=False to take the factor from the samples of each step"
            )
        if trainer.current_epoch == 0:
            rank_zero_info("NormalizedGD: steps over a part of the training set; the paper's theory does not apply")

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """Adds nothing: takes the tally of the micro-batch, once the loss is known."""
        call, targets = step.call, step.targets
        _check_criterion(call, step.logits, targets)
        if step.weights is not None:
            raise RecipeError("NormalizedGD: a recipe weights the samples of the loss; the factor is that of a mean")
        kept = None
        if call.name in CLASS_LOSSES:
            kept = targets != call.options.get("ignore_index", -100)
            targets = targets.where(kept, 0)
        m = margins(step.logits, targets)
        if not self._checked:
            _check_labels(call, step.logits, targets)
            self._check_loss(step, m, kept)
            self._checked = True
        if self._size is not None and self._size != len(m) and self.require_full_batch:
            raise RecipeError(
                f"NormalizedGD: micro-batches of {self._size} and {len(m)} samples in one optimizer step; the mean of"
                " their means is not the mean over all samples: make them equally large, or set"
                " require_full_batch=False"
            )
        self._size, own = len(m), tally(m, kept)
        self._window = own if self._window is None else joined(torch.stack([self._window.to(own.device), own]))
        return {}

    def _check_loss(self, step: Step, m: Tensor, kept: Tensor | None) -> None:
        """What only values can show; looked at once."""
        losses = F.softplus(-m) if kept is None else F.softplus(-m)[kept]
        mean, loss = losses.mean().to(m.dtype), step.loss.detach().to(m.dtype)
        same = {"rtol": 0.02, "atol": 1e-3, "equal_nan": True}  # a criterion may compute in 16 bits
        if loss.dim() or not torch.allclose(loss, mean, **same):
            raise RecipeError(
                f"NormalizedGD: {step.call.name} is not the mean of logistic losses of its logits and labels, of which"
                f" the factor is made: it gave {loss.mean().item():.4g}, and they {mean.item():.4g}"
            )
        returned = step.own_loss.detach().to(m.dtype)
        if step.own_loss is not step.loss and not torch.allclose(returned, loss, **same):
            rank_zero_warn(
                f"NormalizedGD: the module returns a loss of {returned.item():.4g} where the observed one is"
                f" {loss.item():.4g}; the factor scales the gradient of all of it"
            )

    # -- the update ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer) -> None:
        if self._window is None:  # no micro-batch had a loss
            return
        everywhere = joined(gather(self._window[None]))
        self._window = self._size = None
        wrong = everywhere[2]
        self._wrong = wrong if self._wrong is None else self._wrong.to(wrong.device) + wrong
        beta = factor(everywhere, self.max_beta)
        parameters = optimized(optimizer)
        if self.stop_when_separated and self.require_full_batch and int(wrong) == 0:
            for parameter in parameters:  # the paper stops here, before another update
                parameter.grad = None
        else:
            scale_([p.grad for p in parameters], beta)
            self.updates += 1
        values = {"beta": beta, "misclassified": wrong, "min_margin": everywhere[3]}
        values = {name: value.float() for name, value in values.items()}
        values["updates"] = torch.full_like(values["beta"], float(self.updates))
        # Allowed here: edits run inside the hook `configure_gradient_clipping`.
        self._plan.module.log_dict({f"{prefix(self)}/{name}": value for name, value in values.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stop_when_separated:
            self.separated = self._wrong is not None and int(self._wrong) == 0
            trainer.should_stop = trainer.should_stop or self.separated

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stop_when_separated and not self.separated:
            left = "some" if self._wrong is None else int(self._wrong)
            rank_zero_warn(
                f"NormalizedGD: the fit ended with {left} training samples wrong in the last epoch; the classes may not"
                " be separable, or need more epochs"
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        window = None if self._window is None else self._window.tolist()
        wrong = None if self._wrong is None else int(self._wrong)
        return {
            "updates": self.updates,
            "separated": self.separated,
            "wrong": wrong,
            "window": window,
            "size": self._size,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.updates, self.separated = state["updates"], state["separated"]
        self._wrong = None if state["wrong"] is None else torch.tensor(float(state["wrong"]))
        self._window = self._size = None
        # Where the gradients of a window are lost, as with Lightning's own resume, the tally goes with them.
        exact = self._plan is not None and Session.of(self._plan.trainer, self._plan.module).keeps_place
        if exact and state["window"] is not None:
            self._window, self._size = torch.tensor(state["window"], dtype=torch.float64), state["size"]


def _check_optimizer(optimizer: Optimizer) -> None:
    names = [each.__name__ for each in type(optimizer).__mro__]
    if any(name in _INVARIANT for name in names):
        raise RecipeError(
            f"NormalizedGD has no effect under {names[0]}, which takes a common factor of the gradients out again; use"
            " torch.optim.SGD"
        )
    if not isinstance(optimizer, SGD):
        rank_zero_warn(f"NormalizedGD: the method is plain SGD; what it does under {names[0]} is not known")


def _less_than_everything(trainer: pl.Trainer) -> str | None:
    """Why an optimizer step is not one over the whole training set, and what to do; None where it is, or where the
    loader does not tell and every batch of it is in the step.
    """
    loader, batches, window = trainer.train_dataloader, trainer.num_training_batches, trainer.accumulate_grad_batches
    size, sampler, world = getattr(loader, "batch_size", None), getattr(loader, "sampler", None), rank_and_world()[1]
    if size is None or sized_len(loader) is None or sized_len(sampler) is None:
        there = sized_len(loader)
        if there is None:
            return "the training data have no length: give a data set that has one"
        if batches == window == there:
            return None
        return f"accumulate_grad_batches is {window}, and an epoch has {there} batches: set it to that many"
    own = len(sampler)
    samples = len(sampler.dataset) if isinstance(sampler, DistributedSampler) else own * world
    once = not getattr(sampler, "replacement", False) and samples == own * world and batches == -(-own // size)
    if once and window == batches and (own % size == 0 or batches == 1):
        return None
    return (
        f"there are {samples} training samples in {batches} batches of {size} on {world} rank(s), drawn by"
        f" {type(sampler).__name__}, and accumulate_grad_batches is {window}: give every sample once an epoch, in equal"
        " batches, and set accumulate_grad_batches to the number of batches"
    )


def _check_criterion(call: Call, logits: Tensor, targets: Tensor) -> None:
    """Refuse a loss that is not the mean of logistic losses of hard labels.

    Raises:
        RecipeError: says what arrived.
    """
    options = call.options
    got = f"{call.name} of {tuple(logits.shape)} with targets {tuple(targets.shape)}"
    if call.is_function and call.name not in (*CLASS_LOSSES, *_BINARY_LOSSES):
        raise RecipeError(
            f"NormalizedGD needs a cross-entropy of logits, binary or of classes; the observed loss is {got}"
        )
    if options.get("label_smoothing"):
        raise RecipeError(
            f"NormalizedGD: the loss smooths labels by {options['label_smoothing']}, and 1 - p of the label is not what"
            " its gradient is made of; use hard labels"
        )
    weighted = [name for name in ("weight", "pos_weight") if options.get(name) is not None]
    if weighted:
        raise RecipeError(f"NormalizedGD: the loss has {weighted[0]}=, and the factor is that of a plain mean")
    if options.get("reduction", "mean") != "mean":
        raise RecipeError(
            f"NormalizedGD: the loss has reduction={options['reduction']!r}, and the factor is that of a mean"
        )
    if logits.shape != targets.shape:
        if targets.is_floating_point() or logits.dim() != targets.dim() + 1:
            raise RecipeError(f"NormalizedGD needs class indices for targets; the observed loss is {got}")
        return
    if call.name in CLASS_LOSSES:
        raise RecipeError(f"NormalizedGD assumes hard labels, and the targets are probabilities; it is {got}")


def _check_labels(call: Call, logits: Tensor, targets: Tensor) -> None:
    """Refuse soft labels of a binary loss; waits for the device."""
    if logits.shape != targets.shape:
        return
    ones = targets == 1
    zero, minus = (bool((ones | (targets == other)).all()) for other in (0, -1))
    if not {"binary_cross_entropy_with_logits": zero, "soft_margin_loss": minus}.get(call.name, zero or minus):
        allowed = _BINARY_LOSSES.get(call.name, "0 or 1, or -1 or 1")
        raise RecipeError(
            f"NormalizedGD needs labels that are {allowed}; among the targets are {targets.unique().tolist()[:4]}"
        )

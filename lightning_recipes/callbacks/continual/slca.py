"""SLCA: a slow learner with classifier alignment for class-incremental learning on a pre-trained network.

Zhang, Wang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model", ICCV
2023 (https://arxiv.org/abs/2303.05118; code https://github.com/GengDavid/SLCA, commit 169d4e6), whose code decides
where it and the paper could differ. Tasks t = 0, 1, ... bring classes that no other task has; nothing of them is kept.

Slow learner, on the data of task t alone, with a fresh optimizer and a fresh schedule:

    L = CE(z_c : c in task t; y)                 rate of the backbone = scale x rate of the head        (scale 1/100)

Afterwards, from the features of the task's training samples (evaluation transform, eval mode, fp64), for each class:

    mu_c = mean,   Sigma_c = covariance + eps I,   kept as they are from then on

Alignment, from the second task on: SGD on the head alone, E epochs, cosine to 0. An epoch draws S features of every
class so far and goes through them in batches of S:

    x ~ N(s_c mu_c, Sigma_c),   s_c = 1 - a + a (task of c + 1) / (t + 1)                                (a = 0.1)
    L = CE(z / n / tau; y),     n = mean over tasks j of ( ||z of task j||_2 + 1e-7 )                    (tau = 0.1)

The aligned head classifies, in validations, tests and after the fit; the next task goes on from the head as it was
before. The stock head of all classes stands for the paper's heads that grow: classes outside the task have probability
0 in the loss, their rows do not move (neither by decay nor by momentum), the rows of a new task begin at N(0, 0.02) cut
at 2 and bias 0, and in eval mode classes that are still to come get -inf.

Costs one more forward pass over the data of each task, and E x (classes so far) small steps of the head. The features
of an epoch, (classes so far) x S x D numbers in fp32, are held at once; Gaussians and what they take in memory and in a
checkpoint: `lightning_recipes.core.gaussians`. At the last task of 1,000 classes with 768 features, on one CPU core
(`python -m benchmarks.alignment`), statistics of all classes, alignment, and the peak of memory:

    'full' 60 s, 3.6 min, 2.3 GB       'low_rank' (32) 23 s, 4.7 min, 1.0 GB       'diag' 7 s, 3.8 min, 1.4 GB
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from lightning_recipes.core import gaussians, random, select
from lightning_recipes.core.data import ClassesShown
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import broadcast_, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import Taps
from lightning_recipes.core.gaussians import Gaussian
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.phases import Phase, PhasePlan
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import encode
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.select import has_batch_norm
from lightning_recipes.core.step import Step
from lightning_recipes.core.tasks import Tasks, cut, supplied, up_to

NOWHERE = -1e4
"""In the place of a logit that the loss shall not see: its exponential is 0 in every precision, and so is its product
with a probability of 0, as -inf's would not be."""


def shrink_factors(tasks: Tasks, current: int, shrink: float) -> list[float]:
    """s_c of every class of tasks 0 to `current`, in order; 1 for those of the current one."""
    return [1 - shrink + shrink * (task + 1) / (current + 1) for task in range(current + 1) for _ in tasks[task]]


def normalised(logits: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """z / n / tau, with n the mean over tasks of the norm of their logits.

    Args:
        logits: ``[m, classes]``, task after task.
        sizes: classes of each task.
        temperature: tau.
    """
    norms = torch.stack([part.norm(dim=1) for part in logits.split(list(sizes), 1)], 1) + 1e-7
    return logits / norms.mean(1, keepdim=True) / temperature


def draw_epoch(
    classes: Sequence[Gaussian], factors: Sequence[float], count: int, key: tuple[int | str, ...]
) -> tuple[Tensor, Tensor]:
    """Features of every class, shuffled.

    Args:
        classes: their Gaussians.
        factors: s_c.
        count: S, samples of each.
        key: of the random numbers; the same key gives the same samples on every rank.

    Returns:
        features ``[classes x S, D]`` in fp32 and places in `classes` ``[classes x S]``.
    """
    device, width = classes[0].mean.device, len(classes[0].mean)
    x = torch.empty(len(classes) * count, width, device=device)
    for place, (gaussian, factor) in enumerate(zip(classes, factors)):
        x[place * count : (place + 1) * count] = gaussian.draw(count, random.generator(*key, place), factor)
    order = torch.randperm(len(x), generator=random.generator(*key, "order")).to(device)
    return x, order


def align(
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    draw: Callable[[int], tuple[Tensor, Tensor]],
    *,
    epochs: int = 5,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch: int = 256,
    temperature: float | None = 0.1,
    advance: Callable[[], Any] = lambda: None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Train a linear head on drawn features, in fp32.

    Args:
        weight, bias: of the head, ``[classes, D]`` and ``[classes]``, task after task; left alone.
        sizes: classes of each task.
        draw: from the epoch to features, class after class with as many of each, and the order to read them in.
        epochs, lr, momentum, weight_decay: of SGD; the rate follows a cosine to 0, epoch by epoch.
        batch: features a step.
        temperature: tau; None for plain cross-entropy.
        advance: called after every step.

    Returns:
        weight and bias, and the mean loss of each epoch ``[epochs]``.
    """
    losses = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        free = [p.detach().float().clone().requires_grad_() for p in (weight, bias) if p is not None]
        optimizer = SGD(free, lr=lr, momentum=momentum, weight_decay=weight_decay)
        schedule = CosineAnnealingLR(optimizer, epochs)
        for epoch in range(epochs):
            x, order = draw(epoch)
            each, total = len(x) // len(weight), x.new_zeros(())
            for chosen in order.split(batch):
                logits = F.linear(x[chosen], *free)
                if temperature is not None:
                    logits = normalised(logits, sizes, temperature)
                loss = F.cross_entropy(logits, chosen // each)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(chosen)
                advance()
            losses.append(total / len(x))
            del x, order  # an epoch's features are the largest thing here: never hold two of them
            schedule.step()
    aligned = [p.detach() for p in free]
    return aligned[0], aligned[1] if bias is not None else None, torch.stack(losses)


@torch.no_grad()
def begin_rows_(weight: Tensor, bias: Tensor | None, rows: Sequence[int], generator: torch.Generator) -> None:
    """Give the rows of new classes their first values: N(0, 0.02) cut at 2, bias 0."""
    fresh = nn.init.trunc_normal_(torch.empty(len(rows), weight.shape[1]), std=0.02, generator=generator)
    index = torch.tensor(list(rows), device=weight.device)
    weight[index] = fresh.to(weight)
    if bias is not None:
        bias[index] = 0


class SLCA(StepRecipe):
    """Learn classes task by task with a slow backbone, and align the classifier after each task on drawn features.

    One ``Trainer.fit`` through all tasks: the data of a phase are those of its task, from a
    ``ClassIncrementalDataModule`` or cut out of the user's own loaders, which then also validate on the classes so far
    only. Accuracies, forgetting and their picture are ``ForgettingMonitor``'s. Logs ``slca/task``, and for every
    alignment ``slca/ca_loss`` (of its last epoch) and the accuracy on drawn features before and after it,
    ``slca/drawn_acc_before`` and ``slca/drawn_acc``.

    Args:
        tasks: the classes of each task in order; a number cuts the head's classes in order; None asks the data module.
        epochs_per_task: epochs of every task, or of each; their sum is the fit's ``max_epochs``. None shares those out,
            the first tasks taking what is left over.
        backbone_lr_scale: factor on the rate of everything but the head; 0 freezes it.
        ca_epochs: E; 0 leaves the alignment out.
        ca_lr, ca_momentum, ca_weight_decay: of the alignment's SGD.
        samples_per_class: S, also its batch size.
        logit_norm: tau; None aligns by plain cross-entropy.
        mean_shrink: a; 0 leaves the means as they are.
        cov_eps: added to the diagonal of every covariance.
        covariance: 'full', 'low_rank' (`covariance_rank` directions and all variances) or 'diag'. With 768 features a
            class takes 1.2 MB, 104 kB (rank 32) or 6 kB, in memory and in every checkpoint.
        covariance_rank: directions of 'low_rank'.
        restore_head: go on from the head before its alignment; False trains the aligned one further.
        reset_optimizer: fresh optimizers and schedulers for every task.
        head: dotted path of the linear head; None finds it.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        seed: of new rows and of the drawn features.

    Raises:
        RecipeError: for bad arguments; before training when there is no linear head, tasks do not fit it or are not
            known, a class has fewer than 2 training samples, the data cannot be cut by class, or ``max_epochs`` is not
            the sum of the tasks' epochs; in the first step for a loss that is not one of class scores, or smooths
            labels; after a task for a covariance that is not positive definite.
    """

    paper = Paper(
        "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
        "G. Zhang, L. Wang, G. Kang, L. Chen, Y. Wei",
        2023,
        "https://arxiv.org/abs/2303.05118",
        "https://github.com/GengDavid/SLCA",
    )
    does = "Learns classes task by task with a slow backbone and re-aligns the classifier on drawn features."
    use_when = "Classes arrive in tasks, old data may not be kept, and the network is pre-trained."
    costs = "A forward pass over each task's data, then some steps of the head; a Gaussian a class in checkpoints."
    refuses: ClassVar[Mapping[str, str]] = {
        "GroupMask": "both mask the same logits",
        **dict.fromkeys(("SCoLe", "ProCLIP", "WeakToStrong", "ProgressiveShrinking"), "each cuts the fit into phases"),
        **dict.fromkeys(("BoostedHead", "ProjectionHead", "CosineHead", "RidgeRefit"), "both own the head"),
    }
    comes_after: ClassVar[Mapping[str, str]] = {
        "LogitAdjustment": "logits are adjusted first, then those outside the task are masked",
        "PruneTrainSet": "the whole training set is pruned, then cut into tasks",
    }
    owns_training_set = True

    def __init__(
        self,
        tasks: int | list[list[int]] | None = None,
        epochs_per_task: int | list[int] | None = 20,
        backbone_lr_scale: float = 0.01,
        ca_epochs: int = 5,
        ca_lr: float = 0.01,
        ca_momentum: float = 0.9,
        ca_weight_decay: float = 5e-4,
        samples_per_class: int = 256,
        logit_norm: float | None = 0.1,
        mean_shrink: float = 0.1,
        cov_eps: float = 1e-4,
        covariance: Literal["full", "low_rank", "diag"] = "full",
        covariance_rank: int = 32,
        restore_head: bool = True,
        reset_optimizer: bool = True,
        head: str | None = None,
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.epochs_per_task, self.backbone_lr_scale = tasks, epochs_per_task, backbone_lr_scale
        self.ca_epochs, self.ca_lr, self.ca_momentum, self.ca_weight_decay = (
            ca_epochs,
            ca_lr,
            ca_momentum,
            ca_weight_decay,
        )
        self.samples_per_class, self.logit_norm, self.mean_shrink = samples_per_class, logit_norm, mean_shrink
        self.cov_eps, self.covariance, self.covariance_rank = cov_eps, covariance, covariance_rank
        self.restore_head, self.reset_optimizer = restore_head, reset_optimizer
        self.head, self.criterion, self.seed = head, criterion, seed
        ok = tasks is None or (tasks >= 1 if isinstance(tasks, int) else not isinstance(tasks, str) and len(tasks) > 0)
        check_argument(ok, self, "tasks", tasks, "None, a number of at least 1, or the classes of each task")
        lengths = [1] if epochs_per_task is None else _as_list(epochs_per_task)
        ok = len(lengths) > 0 and min(lengths) >= 1
        check_argument(ok, self, "epochs_per_task", epochs_per_task, "at least 1, for all tasks or one a task, or None")
        check_argument(backbone_lr_scale >= 0, self, "backbone_lr_scale", backbone_lr_scale, "at least 0")
        check_argument(ca_epochs >= 0, self, "ca_epochs", ca_epochs, "at least 0")
        check_argument(ca_lr > 0, self, "ca_lr", ca_lr, "positive")
        check_argument(0 <= ca_momentum < 1, self, "ca_momentum", ca_momentum, "at least 0 and below 1")
        check_argument(ca_weight_decay >= 0, self, "ca_weight_decay", ca_weight_decay, "at least 0")
        check_argument(samples_per_class >= 1, self, "samples_per_class", samples_per_class, "at least 1")
        check_argument(logit_norm is None or logit_norm > 0, self, "logit_norm", logit_norm, "None or positive")
        check_argument(0 <= mean_shrink <= 1, self, "mean_shrink", mean_shrink, "between 0 and 1")
        check_argument(cov_eps >= 0, self, "cov_eps", cov_eps, "at least 0")
        kinds = ("full", "low_rank", "diag")
        check_argument(covariance in kinds, self, "covariance", covariance, "'full', 'low_rank' or 'diag'")
        check_argument(covariance_rank >= 1, self, "covariance_rank", covariance_rank, "at least 1")
        self.gaussians: dict[int, Gaussian] = {}
        """Of every class so far, on the CPU."""
        self._begun = -1  # the task whose rows were begun last
        self._backup: list[Tensor] = []  # the head before its alignment, while it is aligned
        self._tasks: Tasks = []
        self._phases: PhasePlan
        self._task = 0  # of the phase that is under way
        self._path = ""
        self._layer: nn.Linear | None = None
        self._taps: Taps | None = None
        self._data: Any = None
        self._shown: ClassesShown | None = None
        self._outside = torch.zeros(0, dtype=torch.bool)  # classes that the task does not have
        self._unseen = torch.zeros(0, dtype=torch.bool)  # classes that are still to come
        self._held: list[Tensor] = []  # the head as the rows of other tasks shall stay
        self._before_begin: list[Tensor] = []  # the head before new rows, until the first step
        self._undo: ExitStack | None = None

    @property
    def neutral(self) -> bool:
        """One task at the optimizer's own rates."""
        single = self.tasks == 1 or (isinstance(self.tasks, (list, tuple)) and len(self.tasks) == 1)
        return single and self.backbone_lr_scale == 1

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        self._path, self._layer = self._find_head(plan.module)
        self._tasks = self._resolve_tasks(plan)
        self._outside, self._unseen = (torch.zeros(self._layer.out_features, dtype=torch.bool) for _ in range(2))
        self._undo = ExitStack()
        self._undo.callback(self._layer.register_forward_hook(_Close(self)).remove)
        if plan.fitting and plan.section is None:
            self._forget()
        if plan.fitting or self._begun >= 0:
            self._show_classes()
        if not plan.fitting:
            return
        plan.step(self)
        plan.after_step(self._keep_rows)
        plan.parameters(lambda: self._claim(plan.module))
        self._phases = self._cut_fit(plan.trainer)
        plan.phases(self._phases)
        self._taps = Taps(plan.module, {"features": (self._path, "input")})
        plan.install(self._taps)
        given = supplied(plan.trainer)
        if given is not None:
            self._data, self._shown = given[0], None
            labels = getattr(self._data, "train_labels", None)
            if labels is not None:
                self._check_counts(labels)
        else:
            self._data, self._shown = None, ClassesShown(plan.trainer, self, self._check_counts)
            plan.install(self._shown)
        if has_batch_norm(plan.module):
            rank_zero_warn(
                "SLCA keeps the features of old classes by small rates; running batch-norm statistics move at full"
                " speed all the same, unless the module keeps them"
            )

    def _find_head(self, module: pl.LightningModule) -> tuple[str, nn.Linear]:
        path = select.head(module) if self.head is None else self.head
        try:
            part = module.get_submodule(path)
        except AttributeError as error:
            raise RecipeError(
                f"SLCA: head={path!r} is no part of {type(module).__name__}; its parts are {select.names_of(module)}"
            ) from error
        if not isinstance(part, nn.Linear):
            linears = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
            raise RecipeError(
                f"SLCA: the head {path!r} is a {type(part).__name__} and must be one linear layer on the features; name"
                f" it with head=, one of {linears}"
            )
        return path, part

    def _resolve_tasks(self, plan: Plan) -> Tasks:
        classes = range(self._layer.out_features)
        given = supplied(plan.trainer)
        if self.tasks is not None:
            tasks = cut(self.tasks, classes)
            if given is not None and given[1] != tasks:
                raise RecipeError(
                    f"SLCA: tasks={tasks} and the data module's tasks are {given[1]}; leave tasks out, or give the same"
                )
            return tasks
        if given is None and not plan.fitting:  # on any data: the tasks of the checkpoint, or of the fit before
            return (plan.section or {}).get("state", {}).get("tasks") or self._tasks
        if given is None:
            raise RecipeError(
                "SLCA: tasks is None and the Trainer's data module has no tasks; give tasks, or a"
                " ClassIncrementalDataModule"
            )
        beyond = [c for c in up_to(given[1], len(given[1])) if c not in classes]
        if beyond:
            raise RecipeError(
                f"SLCA: the data module has a class {max(beyond)} and the head {self._path!r} has {len(classes)}"
                " outputs; give the network one for every class"
            )
        return given[1]

    def _cut_fit(self, trainer: pl.Trainer) -> PhasePlan:
        count = len(self._tasks)
        if self.epochs_per_task is None:
            size, larger = divmod(trainer.max_epochs or 0, count)
            if size < 1:
                raise RecipeError(f"SLCA: max_epochs={trainer.max_epochs} cannot be shared out over {count} tasks")
            epochs = [size + (task < larger) for task in range(count)]
        else:
            epochs = _as_list(self.epochs_per_task)
            if len(epochs) == 1:
                epochs *= count
            elif len(epochs) != count:
                raise RecipeError(f"SLCA: epochs_per_task has {len(epochs)} lengths for {count} tasks; give one a task")
        phases = [Phase(f"task {task}", length) for task, length in enumerate(epochs)]
        return PhasePlan(phases, self._enter, reset_optimizers=self.reset_optimizer)

    def _enter(self, task: int) -> None:
        """Before the data of the phase are loaded."""
        self._task = task
        if self._data is not None:
            self._data.task = task
        else:
            self._shown.training = self._tasks[task]
            self._shown.evaluation = up_to(self._tasks, task)

    def _check_counts(self, labels: Tensor) -> None:
        """Labels of all training samples: every class must have a covariance."""
        classes = self._layer.out_features
        if len(labels) and int(labels.max()) >= classes:
            raise RecipeError(f"SLCA: a training sample has label {int(labels.max())}; the head has {classes} outputs")
        counts = labels.bincount(minlength=classes).tolist()
        few = [c for task in self._tasks for c in task if counts[c] < (2 if self.ca_epochs else 1)]
        if few:
            raise RecipeError(
                f"SLCA: class {few[0]} has {counts[few[0]]} training samples and needs at least"
                f" {2 if self.ca_epochs else 1}; leave such classes out of the data"
            )

    def _claim(self, module: pl.LightningModule) -> Claim:
        if not isinstance(module.get_submodule(self._path), nn.Linear):
            raise RecipeError(f"SLCA: another recipe put adapters on the head {self._path!r}; leave it out there")
        own = {id(p) for p in self._layer.parameters()}
        if not all(p.requires_grad for p in self._layer.parameters()):
            raise RecipeError(f"SLCA: the head {self._path!r} is frozen; it must train")
        backbone = [name for name, p in module.named_parameters() if id(p) not in own]
        if self.backbone_lr_scale == 0:
            return Claim(frozen=frozenset(backbone))
        if self.backbone_lr_scale == 1:
            return Claim()
        return Claim(lr_scale=dict.fromkeys(backbone, self.backbone_lr_scale))

    # -- the slow learner --------------------------------------------------------------------------------------------

    @property
    def _head(self) -> list[Tensor]:
        """The head's weight and, where it has one, bias."""
        return [p.data for p in (self._layer.weight, self._layer.bias) if p is not None]

    def _write_head(self, values: Sequence[Tensor]) -> None:
        for value, new in zip(self._head, values):
            value.copy_(new)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._undo is None:
            return
        if self._begun < self._task:
            self._begin_task(trainer)
        if not self._held:  # also after a resume: the rows of other tasks are where they were left
            self._held = [value.clone() for value in self._head]
            self._show_classes()

    def _begin_task(self, trainer: pl.Trainer) -> None:
        """Before the first step of a task."""
        self._before_begin = [value.clone() for value in self._head]
        self._write_head(self._backup)
        self._backup, self._held, self._begun = [], [], self._task
        rows, weight, *bias = self._tasks[self._task], *self._head
        generator = random.generator(self.seed, "SLCA/rows", self._task)
        begin_rows_(weight, bias[0] if bias else None, rows, generator)
        log_values(trainer, {"slca/task": self._task})

    def _show_classes(self) -> None:
        """Bring the masks to where the run is."""
        if not self._tasks:
            return
        device, classes = self._layer.weight.device, self._layer.out_features
        if self._outside.device != device:
            self._outside, self._unseen = self._outside.to(device), self._unseen.to(device)
        now = set(self._tasks[self._task])
        seen = set(up_to(self._tasks, max(self._begun, 0)))
        for mask, shown in ((self._outside, now), (self._unseen, seen)):
            mask.copy_(torch.tensor([c not in shown for c in range(classes)]))

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """Only the classes of the task count."""
        if not step.call.classifies or logits.dim() != 2 or logits.shape[1] != self._layer.out_features:
            raise RecipeError(
                f"SLCA: needs a classification loss of logits [n, {self._layer.out_features}]; the observed one"
                f" ({step.call.name}) got {tuple(logits.shape)}"
            )
        if step.call.options.get("label_smoothing"):
            raise RecipeError(
                f"SLCA: the loss smooths labels (label_smoothing={step.call.options['label_smoothing']}) over all"
                " classes, and only those of the task are there; use plain labels"
            )
        return logits.masked_fill(self._outside, NOWHERE)

    def _keep_rows(self, optimizer: Optimizer) -> None:
        """Rows of other tasks as they were before the step, which decay and momentum have moved."""
        self._before_begin = []
        for value, held in zip(self._head, self._held):
            outside = self._outside if value.dim() == 1 else self._outside[:, None]
            value.copy_(torch.where(outside, held, value))

    # -- between the tasks -------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._undo is None or not self.ca_epochs:
            return
        last_epoch = trainer.current_epoch + 1 == self._phases.ends[self._task]
        if last_epoch and batch_idx + 1 >= trainer.num_training_batches:
            self._end_task(trainer, pl_module)

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """After the last step of a task and before its last validation."""
        with _bar(trainer, f"statistics of task {self._task}") as bar:
            encoded = encode(
                trainer,
                module,
                lambda: {"features": self._taps["features"]},
                select=self.criterion,
                progress=lambda samples: _counted(samples, len(samples.loader), bar),
                full_precision=True,
            )
        self._describe(encoded.features["features"], encoded.targets)
        if self._task == 0:
            return
        if self.restore_head:
            self._backup = [value.clone() for value in self._head]
        self._align(trainer)

    def _describe(self, features: Tensor, labels: Tensor) -> None:
        """The Gaussians of the task's classes; those of earlier ones stay as they are."""
        width = features.shape[1]
        for c in self._tasks[self._task]:
            own = features[labels == c]
            if self.covariance == "full" and len(own) <= width and not self.gaussians:
                rank_zero_info(
                    f"SLCA: class {c} has {len(own)} samples for {width} features; cov_eps={self.cov_eps:g} makes its"
                    " covariance whole"
                )
            try:
                self.gaussians[c] = gaussians.fit(own, self.covariance, self.cov_eps, self.covariance_rank)
            except RecipeError as error:
                raise RecipeError(f"SLCA: class {c}: {error}") from error

    def _align(self, trainer: pl.Trainer) -> None:
        order = up_to(self._tasks, self._task)
        device = self._layer.weight.device
        known = [self.gaussians[c].to(device) for c in order]
        factors = shrink_factors(self._tasks, self._task, self.mean_shrink)
        sizes = [len(task) for task in self._tasks[: self._task + 1]]
        rows = torch.tensor(order, device=device)
        weight, *bias = (value[rows] for value in self._head)
        bias = bias[0] if bias else None

        def draw(epoch: int) -> tuple[Tensor, Tensor]:
            key = (self.seed, "SLCA/features", self._task, epoch)
            return draw_epoch(known, factors, self.samples_per_class, key)

        with _bar(trainer, f"aligning after task {self._task}") as bar:
            bar.total = self.ca_epochs * len(order)
            aligned, aligned_bias, losses = align(
                weight,
                bias,
                sizes,
                draw,
                epochs=self.ca_epochs,
                lr=self.ca_lr,
                momentum=self.ca_momentum,
                weight_decay=self.ca_weight_decay,
                batch=self.samples_per_class,
                temperature=self.logit_norm,
                advance=bar.update,
            )
        x, _ = draw(self.ca_epochs)
        y = torch.arange(len(order), device=device).repeat_interleave(self.samples_per_class)
        accuracies = [
            (F.linear(x, w, b).argmax(1) == y).double().mean() for w, b in ((weight, bias), (aligned, aligned_bias))
        ]
        for value, new in zip(self._head, (aligned, aligned_bias)):
            value[rows] = new.to(value)
        broadcast_(self._head, trainer)
        names = ("slca/drawn_acc_before", "slca/drawn_acc", "slca/ca_loss")
        log_values(trainer, dict(zip(names, (*accuracies, losses[-1]))))

    # -- the end -----------------------------------------------------------------------------------------------------

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, RecipeError) and self._before_begin:  # refused in the first step: nothing has happened
            self._write_head(self._before_begin)
        self._finish()

    def _finish(self) -> None:
        self._held, self._before_begin, self._taps, self._data, self._shown = [], [], None, None, None
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def _forget(self) -> None:
        """A new fit begins with the first task."""
        self.gaussians, self._begun, self._backup, self._held, self._task = {}, -1, [], [], 0

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"begun": self._begun, "tasks": self._tasks}
        if rank_and_world()[0] == 0:  # the same on every rank, and large
            state["backup"] = [value.cpu() for value in self._backup]
            state["gaussians"] = {str(c): gaussian.state() for c, gaussian in self.gaussians.items()}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._begun, self._held = state["begun"], []
        if "gaussians" in state:
            device = "cpu" if self._layer is None else self._layer.weight.device
            self._backup = [value.to(device) for value in state["backup"]]
            self.gaussians = {int(c): gaussians.from_state(each) for c, each in state["gaussians"].items()}
        if self._undo is not None:
            self._show_classes()


class _Close:
    """In eval mode no class that is still to come is predicted; a copy of the module does without."""

    def __init__(self, recipe: SLCA) -> None:
        self.recipe = recipe

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        return None if layer.training else logits.masked_fill(self.recipe._unseen.to(logits.device), -torch.inf)

    def __reduce__(self) -> Any:
        return _Open, ()


class _Open:
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        return None


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else [int(each) for each in value]


def _bar(trainer: pl.Trainer, what: str) -> Any:
    """A progress bar beside the Trainer's own, where it has one."""
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    return tqdm(desc=f"SLCA: {what}", leave=False, disable=not shown)


def _counted(items: Any, total: int, bar: Any) -> Any:
    bar.total = total
    for item in items:
        yield item
        bar.update()

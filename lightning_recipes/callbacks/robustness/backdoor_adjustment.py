"""BackdoorAdjustment: one prediction of several differently pre-trained models.

Chen et al., "Rethinking the Bias of Foundation Model under Long-tailed Distribution", ICML 2025
(https://arxiv.org/abs/2501.15955; code https://github.com/JiahaoChen1/Pre-train-Imbalance, commit f5ec404).

The paper takes what a foundation model saw in its pre-training for a confounder C of image X and label Y, each
pre-trained model m = 1..M, fine-tuned by itself with LogitAdjustment, for one of its values, and adjusts for it:

    P(Y | do(X)) = sum_c P(Y | X, c) P(c),    P(c) = 1/M unless given

    "logit":    z = sum_m P(m) z_m                             (the official code: a product of experts)
    "logprob":  z = sum_m P(m) log softmax(z_m)                (the same up to a constant a sample)
    "prob":     z = log sum_m P(m) softmax(z_m)                (the formula)

z_m are the logits without the prior, which belongs to the training loss alone. It is an ensemble of differently
pre-trained models; copies of one model adjust for nothing. Costs no training: M forward passes and M sets of weights
while it validates, tests or predicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core import random
from lightning_recipes.core.distributed import all_sum, check_strategy
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.outputs import logits_in, part_of, replace_outputs
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.core.surgery import Surgery, rebuilt, stored_in

SPACES = ("logit", "prob", "logprob")


def fuse(logits: Sequence[Tensor], prior: Sequence[float], space: str = "logit") -> Tensor:
    """Logits of the mixture, in at least fp32; a single member comes back as it is.

    Args:
        logits: of each member, ``[n, C]``.
        prior: P(m), one a member.
        space: where to average: 'logit', 'logprob' or 'prob'.

    Returns:
        ``[n, C]``; in 'prob' log-probabilities, so that a cross-entropy and a softmax of them mean what they say.
    """
    if len(logits) == 1:
        return logits[0]
    dtype = torch.float32
    for each in logits:
        dtype = torch.promote_types(dtype, each.dtype)
    stacked = torch.stack([each.to(dtype) for each in logits])
    weights = torch.tensor(prior, dtype=dtype, device=stacked.device)[:, None, None]
    if space == "logit":
        return (weights * stacked).sum(0)
    stacked = stacked.log_softmax(-1)
    return (weights * stacked).sum(0) if space == "logprob" else (weights.log() + stacked).logsumexp(0)


def disagreement(choices: Tensor) -> Tensor:
    """Number of samples on which not all members choose the same class; choices are ``[M, n]``."""
    return (choices != choices[:1]).any(0).sum()


class BackdoorAdjustment(Recipe):
    """Validate, test and predict by the mixture of this module and others with different pre-training.

    While it evaluates, the logits ``[n, classes]`` that come out of the module are replaced by those of the mixture, so
    that the module's own steps, metrics and predictions are the mixture's. Logs ``backdoor_adjustment/acc_member_i``
    (0 is the module itself, if it takes part) and ``backdoor_adjustment/disagreement``, the share of samples on which
    members differ. A fit, its validations included, is left alone.

    Args:
        members: the others: checkpoints of the same LightningModule class, or modules that are built and loaded. A
            checkpoint with other hyperparameters (another backbone) is built from them. Members are evaluated in eval
            mode whatever mode they come in. Their classes must stand in the same order.
        prior: P(m), the module first if it takes part; None is uniform.
        space: average 'logit's as the official code, 'prob'abilities as the formula, or 'logprob's. In logit space the
            member with the larger logits decides: average probabilities where scales differ.
        include_self: whether the module itself is a member, with the weights that it evaluates with.
        forward: where the logits come out: 'forward' for the module itself, or the name of a submodule that takes the
            batch's inputs.
        device: 'same' moves members to the module's device while it evaluates; 'cpu' leaves them there.
        transforms: what each member's inputs go through first, None for nothing; for backbones with a normalisation or
            size of their own.

    Raises:
        RecipeError: for bad arguments; before it evaluates for a checkpoint that is not there, cannot be read, does not
            fit the module, or has other classes; in the first batch for logits of another width and when no logits
            come out.
    """

    paper = Paper(
        "Rethinking the Bias of Foundation Model under Long-tailed Distribution",
        "J. Chen, B. Qin, J. Li, H. Chen, B. Su",
        2025,
        "https://arxiv.org/abs/2501.15955",
        "https://github.com/JiahaoChen1/Pre-train-Imbalance",
    )
    does = "Evaluates by the mean of several fine-tuned models with different pre-training."
    use_when = (
        "Your data are long-tailed and you have fine-tuned foundation models that were pre-trained on different data."
    )
    costs = "Nothing in training; one forward pass and one set of weights a member at test time."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("AdaptiveSmoothing", "EnsembleEvaluation", "LangevinMixture"), "both replace the outputs at evaluation"
    )
    free_on_resume = frozenset({"members", "device"})

    def __init__(
        self,
        members: Sequence[str | LightningModule] = (),
        prior: Sequence[float] | None = None,
        space: Literal["logit", "prob", "logprob"] = "logit",
        include_self: bool = True,
        forward: str = "forward",
        device: Literal["same", "cpu"] = "same",
        transforms: Sequence[Callable | None] | None = None,
    ) -> None:
        super().__init__()
        check_argument(not isinstance(members, str), self, "members", members, "a list of checkpoints and modules")
        check_argument(space in SPACES, self, "space", space, "'logit', 'prob' or 'logprob'")
        check_argument(device in ("same", "cpu"), self, "device", device, "'same' or 'cpu'")
        check_argument(len(members) > 0 or include_self, self, "members", members, "not empty with include_self=False")
        count = len(members) + include_self
        if prior is not None:
            check_argument(len(prior) == count, self, "prior", prior, f"one number a member, {count} of them")
            check_argument(min(prior) >= 0, self, "prior", prior, "at least 0 for every member")
            check_argument(abs(sum(prior) - 1) < 1e-6, self, "prior", prior, f"of sum 1, it is {sum(prior):.6g}")
        fits = transforms is None or len(transforms) == len(members)
        check_argument(fits, self, "transforms", transforms, f"one transform or None a member, {len(members)} of them")
        self.members, self.prior, self.space, self.include_self = members, prior, space, include_self
        self.forward, self.device, self.transforms = forward, device, transforms
        self._weights = [1 / count] * count if prior is None else list(prior)
        self._hashes: dict[str, str] = {}
        self._running: list[tuple[str, nn.Module, Callable | None]] = []
        self._undo = ExitStack()
        self._choices: Tensor | None = None
        self._sums: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        named = [m if isinstance(m, str) else type(m).__name__ for m in self.members]
        return {**super().arguments, "members": named}

    @property
    def neutral(self) -> bool:
        return len(self.members) == 0

    def declare(self, plan: Plan) -> None:
        if plan.fitting:
            self._hashes = {m: _sha256(m) for m in self.members if isinstance(m, str) and Path(m).is_file()}
            return
        known = ((plan.section or {}).get("state") or {}).get("hashes", {})
        check_strategy(plan.trainer)
        part_of(plan.module, self.forward)
        expected = _class_names(plan.trainer.datamodule, plan.module)
        for name, member in self._named():
            if isinstance(member, str):
                checkpoint = _read(name, member)
                self._hashes[member] = _sha256(member)
                if known.get(member, self._hashes[member]) != self._hashes[member]:
                    rank_zero_warn(f"BackdoorAdjustment: {name} is another file than when the checkpoint was written")
                names = _class_names_in(checkpoint)
            else:
                part_of(member, self.forward)
                names = _class_names(member)
            if names is not None and expected is not None and names != expected:
                raise RecipeError(f"{name} has its classes in another order or other classes: {names}; not {expected}")
            expected = expected or names
        averaging = [type(c).__name__ for c in plan.trainer.callbacks if isinstance(c, WeightAveraging)]
        if averaging and self.include_self:
            rank_zero_info(f"BackdoorAdjustment: member 0 is the module with the weights that {averaging[0]} gives it")

    def _named(self) -> Iterator[tuple[str, str | LightningModule]]:
        for i, member in enumerate(self.members, start=int(self.include_self)):
            yield f"member {i} ({member if isinstance(member, str) else type(member).__name__})", member

    # -- beginning and end of an evaluation --------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral or trainer.state.fn == "fit":
            return
        self._stop()
        # Evaluation loops run under inference_mode, whose tensors could never be attacked or trained.
        with speaking_for(self), torch.inference_mode(False):
            modules = self._build(trainer, pl_module)
            _warn_of_copies([pl_module, *modules] if self.include_self else modules)
            transforms = self.transforms or [None] * len(modules)
            shared: dict[str, Tensor] = {}
            for (name, member), module, transform in zip(self._named(), modules, transforms):
                self._undo.enter_context(modes_kept(module, training=False))
                self._move(module, pl_module.device if self.device == "same" else torch.device("cpu"))
                if isinstance(member, str):
                    _share(module, shared)
                self._running.append((name, part_of(module, self.forward), transform))
            part = part_of(pl_module, self.forward)
            self._undo.callback(replace_outputs(part, "BackdoorAdjustment", self._mixture))
        self._sums = None

    on_test_start = on_predict_start = on_validation_start

    def _build(self, trainer: pl.Trainer, pl_module: LightningModule) -> list[LightningModule]:
        surgeries = {r.state_key: spec for r, spec in Session.of(trainer, pl_module).surgeries.items()}
        return [
            _load(name, member, pl_module, surgeries) if isinstance(member, str) else member
            for name, member in self._named()
        ]

    def _move(self, module: LightningModule, device: torch.device) -> None:
        before = next((p.device for p in module.parameters()), device)
        if before != device:
            module.to(device)
            self._undo.callback(module.to, before)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()
        super().teardown(trainer, pl_module, stage)

    def _stop(self) -> None:
        """Give the module its own outputs back, and let go of the members."""
        self._undo.close()
        self._running = []
        self._choices = None

    # -- batches -----------------------------------------------------------------------------------------------------

    def _mixture(self, logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with speaking_for(self):
            every = [logits] if self.include_self else []
            for name, part, transform in self._running:
                every.append(self._ask(name, part, transform, logits, args, kwargs))
        if self._choices is None:
            self._choices = torch.stack([each.detach().argmax(1) for each in every])
        return fuse(every, self._weights, self.space)

    def _ask(
        self, name: str, part: nn.Module, transform: Callable | None, logits: Tensor, args: Any, kwargs: Any
    ) -> Tensor:
        """One member's logits for the inputs of a call."""
        if self.device == "cpu":
            args, kwargs = move_data_to_device((args, kwargs), torch.device("cpu"))
        if transform is not None:
            if not args:
                raise RecipeError("transforms work on the first positional argument of forward, and it has none")
            args = (transform(args[0]), *args[1:])
        output = logits_in(part(*args, **kwargs))
        if output is None or output.shape != logits.shape:
            found = "no logits [n, classes]" if output is None else f"logits {list(output.shape)}"
            raise RecipeError(f"{name} gives {found} where the module gives {list(logits.shape)}; classes must agree")
        return output.to(logits.device)

    def on_validation_batch_start(self, *args: Any) -> None:
        self._choices = None

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        if not self._running:
            return
        if self._choices is None:
            where = "the module's forward" if self.forward == "forward" else f"{self.forward!r}"
            raise RecipeError(
                f"BackdoorAdjustment: no logits [n, classes] came out of {where} in the evaluation step, so nothing was"
                " replaced; name the submodule that it calls on its inputs with forward='NAME'"
            )
        members, count = self._choices.shape
        labels = labels_in(batch)
        known = isinstance(labels, Tensor) and labels.shape == (count,)
        right = (self._choices == labels).sum(1) if known else self._choices.new_zeros(members)
        sums = torch.cat([right, torch.stack([disagreement(self._choices)]), right.new_tensor([count, known * count])])
        self._sums = sums if self._sums is None else self._sums + sums

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        *right, differ, count, labelled = all_sum(self._sums).double().unbind()
        values = {"disagreement": differ / count}
        if labelled:
            values |= {f"acc_member_{i}": each / labelled for i, each in enumerate(right)}
        self.log_dict({f"backdoor_adjustment/{k}": v.float() for k, v in values.items()}, rank_zero_only=False)
        self._sums = None

    on_test_epoch_end = on_validation_epoch_end

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"hashes": dict(self._hashes)}


# -- members -----------------------------------------------------------------------------------------------------------


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(name: str, path: str) -> dict[str, Any]:
    """A Lightning checkpoint, read without unpickling code."""
    if not Path(path).is_file():
        raise RecipeError(f"{name}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # cut off, of another format, or with objects that would run code
        raise RecipeError(
            f"{name} cannot be read with weights_only=True ({type(error).__name__}: {str(error).splitlines()[0]}); load"
            " it yourself and give the module"
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise RecipeError(f"{name} is no checkpoint of Lightning: it has no 'state_dict'; build the module and give it")
    return checkpoint


def _load(name: str, path: str, like: LightningModule, surgeries: Mapping[str, Surgery]) -> LightningModule:
    """A module of the class of `like` with the weights of a checkpoint.

    Where the checkpoint's hyperparameters are other ones (another backbone, another normalisation) it is built from
    them, with the surgery that the checkpoint describes; else it is a copy of `like`.
    """
    checkpoint = _read(name, path)
    weights, hyper = checkpoint["state_dict"], checkpoint.get("hyper_parameters") or {}
    differ = sorted(key for key in hyper if repr(hyper[key]) != repr(like.hparams.get(key)))
    if differ:
        try:
            with random.forked(torch.device("cpu")):
                member = type(like).load_from_checkpoint(path, map_location="cpu", strict=False, weights_only=True)
            for key, spec in surgeries.items():
                if stored := stored_in(checkpoint.get("callbacks", {}).get(key)):
                    rebuilt(spec, stored).operate(member)
            member.load_state_dict(weights)
            return member
        except Exception:  # hyperparameters that do not say everything, as a network that was given
            rank_zero_warn(
                f"BackdoorAdjustment: {name} cannot be built from its hyperparameters, which differ in {differ}; it is"
                f" taken for a copy of this {type(like).__name__} with other weights"
            )
    try:
        member = deepcopy(like).cpu()
        member.load_state_dict(weights)
        return member
    except Exception as error:
        raise RecipeError(
            f"{name} does not fit {type(like).__name__}: {str(error).splitlines()[-1].strip()}; build the module that"
            " it belongs to, load it and give the module"
        ) from error


def _share(member: nn.Module, shared: dict[str, Tensor]) -> None:
    """Let tensors of loaded members that are equal be one: they may differ in their adapters alone."""
    for key, parameter in member.named_parameters():
        first = shared.setdefault(key, parameter.data)
        if first is not parameter.data and first.shape == parameter.shape and torch.equal(first, parameter.data):
            parameter.data = first


def _warn_of_copies(modules: Sequence[nn.Module]) -> None:
    for (i, first), (j, second) in combinations(enumerate(modules), 2):
        one, other = dict(first.named_parameters()), dict(second.named_parameters())
        if one.keys() == other.keys() and all(_same(p, other[key]) for key, p in one.items()):
            rank_zero_warn(
                f"BackdoorAdjustment: members {i} and {j} of {len(modules)} have the same weights; averaging copies is"
                " not an adjustment"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu(), b.detach().cpu())


def _class_names(*owners: Any) -> list[str] | None:
    """Class names that a data module or a module says it has."""
    for owner in owners:
        names = getattr(owner, "class_names", None)
        if names is None and hasattr(owner, "hparams"):
            names = owner.hparams.get("class_names")
        if names is not None:
            return [str(name) for name in names]
    return None


def _class_names_in(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Class names in the hyperparameters of a checkpoint's module or data, or in what its callbacks stored."""
    sections = checkpoint.get("callbacks", {}).values()
    states = [s.get("state") for s in sections if isinstance(s, Mapping)]
    for place in (checkpoint.get("hyper_parameters"), checkpoint.get("datamodule_hyper_parameters"), *states):
        if isinstance(place, Mapping) and (names := place.get("class_names")) is not None:
            return [str(name) for name in names]
    return None

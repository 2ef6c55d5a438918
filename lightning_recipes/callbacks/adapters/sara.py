"""SaRA: train only the entries of a pre-trained network that are nearly 0, and keep them low in rank.

Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025
(https://arxiv.org/abs/2409.06633; code https://github.com/sjtuplayer/SaRA, commit ea21192).

With P a parameter, theta a threshold and v the free entries of P in a flat vector:

    M0 = |P0| < theta                                once, from the pre-trained weights; v = P[M0], the rest is frozen
    L  = loss + lambda ||P .* M||_*                  of ONE matrix with both sides above 64, drawn anew every step;
                                                     none where M has 100 entries or fewer
    M <- M0 and (|P| < theta)                        after half of the steps: what has grown past theta stands still

Of the released optimizers the dense one (``optim/adamw2.py``) is followed: with AdamW it is AdamW on P, then all but
P[M] put back. The other one (``optim/adamw.py``), which saves memory, flips signs, drops the rank loss and cannot
accumulate. Here both ways of training give the same weights: ``backprop="sparse"`` has v in the optimizer and lets no
dense gradient outlive its layer, ``"dense"`` trains P and puts it back. The gradient norm that is clipped is that of
the free entries. Released code takes all parameters; here the head trains whole, as a new one must (``train_fully``).

Memory for N numbers of which a share q is free, in fp32: weights 4 N bytes, and 20 q N for v, its gradient, two moments
of Adam and its places; training everything takes 16 N. A checkpoint holds 4 N of weights, 8 q N of moments and N / 8 of
mask. Costs one SVD of one matrix a step, and v written into P at every pass. Nothing at test time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from os import PathLike
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_recipes.core import random, select
from lightning_recipes.core.distributed import decided_on_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.schedule import horizon
from lightning_recipes.core.sparse import Leaf, SparseLeaves, is_sparse, make_sparse
from lightning_recipes.core.step import Step
from lightning_recipes.core.surgery import Operation

Entries = dict[str, tuple[Tensor, Tensor]]
"""By name of a parameter: flat positions (row by row) of its free entries, ``[k]`` int64, and their values ``[k]``."""

_TOO_FEW = 100  # free entries of a matrix without a rank loss

# -- the maths ---------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def small(weight: Tensor, threshold: float) -> Tensor:
    """|P| < theta, in fp32 at least (bf16 rounds values across the threshold): a boolean tensor of P's shape."""
    return weight.detach().to(_wide(weight)).abs() < threshold


def quantiles(weights: Sequence[Tensor], shares: Sequence[float]) -> list[float]:
    """For each share s the value of rank round(s n) of all |p| in ascending order, so that it has as many below it.

    A share that takes all n gets the next number above the largest. Exact, and without a copy of all weights: numbers
    that are not negative have the order of their bits, which are found 8 at a time by counting.
    """
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    of_bits, width = (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)
    total = sum(w.numel() for w in weights)
    found = []
    for share in shares:
        rank, prefix = min(round(share * total), total - 1), 0
        for shift in range(width - 8, -1, -8):
            counts = torch.zeros(256, dtype=torch.int64)
            for w in weights:
                bits = w.detach().abs().to(dtype).flatten().view(of_bits)
                if shift < width - 8:
                    bits = bits[bits >> (shift + 8) == prefix]
                counts += torch.bincount(bits >> shift & 0xFF, minlength=256).cpu()
            upto = counts.cumsum(0)
            digit = int(torch.searchsorted(upto, rank, right=True))
            rank -= int(upto[digit - 1]) if digit else 0
            prefix = prefix << 8 | digit
        prefix += round(share * total) >= total  # the bits of the next number
        found.append(torch.tensor(prefix, dtype=of_bits).view(dtype).item())
    return found


def chosen(
    weights: Mapping[str, Tensor], threshold: float | None, fraction: float | None
) -> tuple[float, dict[str, Tensor]]:
    """theta, and M0 by name.

    Args:
        weights: the target's, pre-trained.
        threshold, fraction: exactly one; the other is None.

    Raises:
        RecipeError: when no entry is below the threshold, or more than half of all are below one that was given.
    """
    theta = quantiles(list(weights.values()), [fraction])[0] if threshold is None else threshold
    masks = {name: small(weight, theta) for name, weight in weights.items()}
    count, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    if count == 0 or (fraction is None and 2 * count > total):
        shares = (0.01, 0.1, 0.2, 0.5)
        found = ", ".join(f"{s:.0%}: {q:.3g}" for s, q in zip(shares, quantiles(list(weights.values()), shares)))
        given = f"fraction={fraction!r}" if threshold is None else f"threshold={threshold!r}"
        raise RecipeError(
            f"{given} selects {count} of {total} entries of the target; |p| has the quantiles {found}. Give a threshold"
            " between them, or fraction=0.1 for the smallest tenth"
        )
    return theta, masks


def suggested_rate(threshold: float) -> float:
    """The paper's learning rate for a threshold, 1e-3 exp(-350 theta): 4.966e-4 at 2e-3."""
    return 1e-3 * exp(-350 * threshold)


class _NuclearNorm(torch.autograd.Function):
    """See :func:`nuclear_norm`. Kept for backward is the subgradient at the free entries alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
        wide = values.to(_wide(values))
        matrix = wide.new_zeros(shape[0] * shape[1]).index_copy_(0, index.long(), wide).view(*shape)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        # Directions of no size have no sign; leaving them out is a subgradient too.
        held = s > s[0] * max(shape) * torch.finfo(s.dtype).eps
        ctx.save_for_backward(((u * held) @ vh).view(-1).index_select(0, index).to(values.dtype))
        return s.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (subgradient,) = ctx.saved_tensors
        return grad.to(subgradient.dtype) * subgradient, None, None


def nuclear_norm(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """||P .* M||_*, the sum of the singular values of a matrix that is 0 but for its free entries.

    Args:
        values: the free entries ``[k]``.
        index: their flat positions ``[k]``.
        shape: of P.

    Returns:
        a scalar in fp32 at least; its gradient for the values is (U V^T)[M].
    """
    with torch.autocast(values.device.type, enabled=False):
        return _NuclearNorm.apply(values, index, shape)


def drawn(seed: int, step: int, count: int) -> int:
    """Which of `count` matrices has the rank loss at an optimizer step; the same on every rank."""
    return int(torch.randint(count, (), generator=random.generator(seed, "SaRA/rank", step)))


# -- free entries as files and bits ------------------------------------------------------------------------------------


def packed(mask: Tensor) -> Tensor:
    """A boolean tensor as bits, ``[ceil(n / 8)]`` uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`packed` was given."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(*shape)


def entries_of(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Entries:
    """The free entries of stock weights (``module.state_dict()``), on the CPU."""
    found: Entries = {}
    for name, mask in masks.items():
        index = mask.cpu().flatten().nonzero().squeeze(1)
        found[name] = index, weights[name].detach().cpu().flatten().index_select(0, index)
    return found


def save_entries(entries: Entries, path: str | PathLike[str]) -> None:
    """Write free entries to a safetensors file: two tensors a parameter, ``<name>/index`` and ``<name>/values``."""
    from safetensors.torch import save_file

    parts = {}
    for name, (index, values) in entries.items():
        parts[f"{name}/index"], parts[f"{name}/values"] = index.contiguous(), values.contiguous()
    save_file(parts, path)


def load_entries(path: str | PathLike[str]) -> Entries:
    """Read what :func:`save_entries` wrote."""
    from safetensors.torch import load_file

    parts = load_file(path)
    names = dict.fromkeys(key.rpartition("/")[0] for key in parts)
    return {name: (parts[f"{name}/index"], parts[f"{name}/values"]) for name in names}


@torch.no_grad()
def write_entries(module: nn.Module, entries: Entries) -> None:
    """Write free entries into a stock module with the pre-trained weights, in place.

    Raises:
        KeyError: for a parameter that the module has not.
    """
    names = dict(module.named_parameters())
    for name, (index, values) in entries.items():
        parameter = names[name]
        flat = parameter.detach().flatten().index_copy(0, index.to(parameter.device), values.to(parameter))
        parameter.copy_(flat.view_as(parameter))


# -- the surgery -------------------------------------------------------------------------------------------------------


def weights_of(
    module: pl.LightningModule, target: Sequence[str] | None, train_fully: Sequence[str]
) -> tuple[dict[str, Parameter], list[Parameter]]:
    """The parameters to choose entries from, by name, and those that train whole.

    Raises:
        RecipeError: when there is none to choose from, or one is quantised or stored in fp16.
    """
    names = dict(module.named_parameters())
    whole = select.parameters_under(module, train_fully, "train_fully") if train_fully else []
    if target is None:
        found = [name for name, p in names.items() if p.requires_grad or not torch.is_floating_point(p)]
    else:
        found = select.parameters_under(module, target, "target")
    found = [name for name in found if name not in whole]
    for name in found:
        dtype = names[name].dtype
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise RecipeError(
                f"{name} is stored in {str(dtype).removeprefix('torch.')} (quantised?), which keeps no small entries"
                " apart; load it in float32, or name by target= what shall train"
            )
    if not found:
        raise RecipeError(
            "there is no parameter to choose entries from: the module froze all of them, or they are named in"
            f" train_fully={list(train_fully)}; unfreeze them or name them by target="
        )
    return {name: names[name] for name in found}, [names[name] for name in whole]


@dataclass(frozen=True)
class SmallEntries:
    """Which entries are free: how to choose them, and once they are chosen, which.

    Attributes:
        threshold, fraction: as :class:`SaRA` has them.
        dense: leave the parameters as they are.
        weights, whole: the parameters to choose from, before any surgery, and those that train whole.
        theta: the threshold that was used; None before.
        masks: M0 by name of the parameter, as bits; None before. Those without a free entry are not among them.
    """

    what: ClassVar[str] = "sparse parameters"
    on_weights: ClassVar[bool] = True
    stock_keys: ClassVar[bool] = True

    threshold: float | None
    fraction: float | None
    dense: bool
    weights: Sequence[Parameter] = field(metadata={"stored": False})
    whole: Sequence[Parameter] = field(metadata={"stored": False})
    theta: float | None = None
    masks: Mapping[str, Tensor] | None = None

    def present(self, module: pl.LightningModule) -> bool:
        return is_sparse(module)

    def operate(self, module: pl.LightningModule) -> Operation:
        """Choose the entries, unless they are known, and give each parameter that has some its leaf."""
        spec, names = self, dict(module.named_parameters())
        now = {id(p): name for name, p in names.items()}  # another recipe's surgery may have moved or removed them
        if self.masks is None:
            weights = {now[id(p)]: p for p in self.weights if id(p) in now}
            theta, bits = decided_on_rank_zero(lambda: self._choose(weights), module._trainer)
            spec = replace(self, theta=theta, masks=bits)
        masks = {name: unpacked(bits, names[name].shape) for name, bits in spec.masks.items()}
        whole = [now[id(p)] for p in self.whole if id(p) in now]
        if not self.dense:
            return make_sparse(module, {n: m.to(names[n].device) for n, m in masks.items()}, spec, whole)
        return Operation(module, spec, {name: names[name] for name in masks}, whole)

    def _choose(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        theta, masks = chosen(weights, self.threshold, self.fraction)
        return theta, {name: packed(mask) for name, mask in masks.items() if mask.any()}


# -- the callback ------------------------------------------------------------------------------------------------------


class _Target(ABC):
    """One parameter with free entries.

    Attributes:
        parameter: what the optimizer moves: v, or in dense mode the whole of P.
        index: flat positions ``[k]`` of the entries of M0 in a tensor of `shape`.
        count: how many are free now.
        active: which of M0 are ``[k]``; None before the re-selection, when all are.
        held: True at entries of `parameter` that stand still, of its shape; None where all move.
    """

    parameter: Parameter
    index: Tensor
    shape: Sequence[int]
    active: Tensor | None = None
    held: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.index) if self.active is None else self._active

    @abstractmethod
    def free(self) -> Tensor:
        """The entries of M0 ``[k]``, with their graph."""

    @abstractmethod
    def rest(self) -> Tensor:
        """What the held entries shall be, of the parameter's shape."""

    def keep(self, active: Tensor) -> None:
        """From now on only these of M0 are free; the others stand still where they are."""
        self.active, self._active = active, int(active.sum())

    def norm(self) -> Tensor:
        """||P .* M||_* with its graph."""
        values = self.free() if self.active is None else self.free().where(self.active, 0)
        return nuclear_norm(values, self.index, self.shape)

    def stop_gradients(self) -> None:
        if self.held is not None and self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(self.held, 0)

    def put_back(self) -> None:
        """Undo what weight decay and momentum did to the held entries."""
        if self.held is not None:
            self.parameter.copy_(torch.where(self.held, self.rest(), self.parameter))


class _InLeaf(_Target):
    """v trains, and the dense tensor still has what v was before the step."""

    def __init__(self, leaf: Leaf) -> None:
        self.parameter, self.leaf = leaf.values, leaf
        order = leaf.places.order or range(leaf.dense.dim())
        self.index, self.shape = leaf.places.index, [leaf.dense.shape[d] for d in order]

    def free(self) -> Tensor:
        return self.parameter

    def rest(self) -> Tensor:
        return self.leaf.at_rest()

    def keep(self, active: Tensor) -> None:
        super().keep(active)
        self.held = ~active
        self.leaf.write()


class _InPlace(_Target):
    """P trains, and a copy has what its held entries shall be."""

    def __init__(self, parameter: Parameter, mask: Tensor) -> None:
        self.parameter, self.shape = parameter, parameter.shape
        mask = mask.to(parameter.device)
        self.index = mask.flatten().nonzero().squeeze(1)
        self._stay(~mask)

    def _stay(self, held: Tensor) -> None:
        self.held, self._kept = held, self.parameter.detach().clone()

    def free(self) -> Tensor:
        return self.parameter.flatten()[self.index]

    def rest(self) -> Tensor:
        return self._kept

    def keep(self, active: Tensor) -> None:
        super().keep(active)
        still = torch.ones(self.held.numel(), dtype=torch.bool, device=active.device)
        self._stay(still.index_copy_(0, self.index, ~active).view_as(self.held))


class SaRA(StepRecipe):
    """Train the smallest entries of a pre-trained network, and nothing else but the head.

    Args:
        threshold: theta; entries below it in absolute value are free. 2e-3 is for Stable Diffusion: elsewhere give a
            fraction, or look at the quantiles that an error lists. None with a fraction.
        fraction: theta is this quantile of all |p| in the target (ours); None with a threshold.
        progressive_at: share of the fit's optimizer steps after which those entries that have grown past theta stop;
            None never stops any, and is what an endless fit needs.
        rank_weight: lambda, of the nuclear norm of one matrix a step; 0 leaves it out.
        rank_min_size: both sides of a matrix with that loss are at least this long; convolutions never have it.
        target: names or `*` patterns of parameters and modules to choose entries from; None is everything that the
            module does not freeze.
        train_fully: what trains whole beside them; 'head' finds the head. A new head must: of random numbers most
            would stay as they are. [] treats a pre-trained head like the rest, as the paper does.
        backprop: 'sparse' saves memory; 'dense' gives the same weights with a full gradient and a copy of the target.
        seed: of the draw of the matrix.

    Raises:
        RecipeError: for bad arguments; in setup for a threshold that selects nothing or more than half, no matrix that
            is large enough, a quantised or fp16-stored weight, a recurrent layer, and nothing to choose from; before
            the first step for progressive_at in a fit without an end.
    """

    paper = Paper(
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "T. Hu, J. Zhang, R. Yi, H. Huang, Y. Wang, L. Ma",
        2025,
        "https://arxiv.org/abs/2409.06633",
        "https://github.com/sjtuplayer/SaRA",
    )
    does = "Trains only those entries of pre-trained weights that are nearly 0, and keeps them low in rank."
    use_when = "You fine-tune a large generative model and want it to keep what it knows, with little memory."
    costs = "Less memory than full training; an SVD of one matrix a step; nothing at test time."
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("GLAD", "PEGO", "SVFit", "LoRA", "MakeElastic"), "both adapt the layers' weights"),
        "LEVI": "LEVI freezes the network, and leaves parts of it unused whose entries SaRA would train",
    }
    of_weights_alone = True
    owns_training_set = True
    log_prefix = "sara"

    def __init__(
        self,
        threshold: float | None = 2e-3,
        fraction: float | None = None,
        progressive_at: float | None = 0.5,
        rank_weight: float = 5e-4,
        rank_min_size: int = 65,
        target: str | list[str] | None = None,
        train_fully: Sequence[str] = ("head",),
        backprop: Literal["sparse", "dense"] = "sparse",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (threshold is None) == (fraction is None):
            raise RecipeError(
                "SaRA: give exactly one of threshold and fraction, and None for the other; got"
                f" threshold={threshold!r} and fraction={fraction!r}"
            )
        check_argument(threshold is None or threshold > 0, self, "threshold", threshold, "positive")
        check_argument(fraction is None or 0 < fraction < 1, self, "fraction", fraction, "in (0, 1)")
        inside = progressive_at is None or 0 < progressive_at < 1
        check_argument(inside, self, "progressive_at", progressive_at, "in (0, 1), or None for never")
        check_argument(rank_weight >= 0, self, "rank_weight", rank_weight, "at least 0")
        check_argument(rank_min_size >= 1, self, "rank_min_size", rank_min_size, "at least 1")
        check_argument(target is None or len(target) > 0, self, "target", target, "None or at least one name")
        check_argument(not isinstance(train_fully, str), self, "train_fully", train_fully, "a list of names")
        check_argument(backprop in ("sparse", "dense"), self, "backprop", backprop, "'sparse' or 'dense'")
        self.threshold, self.fraction, self.progressive_at = threshold, fraction, progressive_at
        self.rank_weight, self.rank_min_size = rank_weight, rank_min_size
        self.target, self.train_fully, self.backprop, self.seed = target, train_fully, backprop, seed
        self._forget()

    def _forget(self) -> None:
        self._targets: dict[str, _Target] = {}
        self._matrices = 0
        self._reselect_at: int | None = None
        self._active: dict[str, Tensor] | None = None  # as bits, of a checkpoint

    # -- setting up ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return  # checkpoints hold stock weights under stock names
        self._forget()
        plan.at_end(lambda: self._targets.clear())
        target = [self.target] if isinstance(self.target, str) else self.target
        weights, whole = weights_of(plan.module, target, self.train_fully)
        dense = self.backprop == "dense"
        if self.rank_weight > 0:
            self._matrices = self._large_enough(weights)
            plan.step(self)
        if plan.section is None:
            self._warn_of_a_head(plan.module, weights)
        plan.surgery(SmallEntries(self.threshold, self.fraction, dense, list(weights.values()), whole))
        if dense and target is not None:
            plan.parameters(lambda: Claim(thawed=frozenset(self.operation.made)))
        if dense or self.progressive_at is not None:
            plan.edit_gradients(lambda optimizer: self._each(_Target.stop_gradients))
            plan.after_step(lambda optimizer: self._each(_Target.put_back))

    def _large_enough(self, weights: Mapping[str, Tensor]) -> int:
        """How many matrices may be drawn."""
        sides = [sorted(w.shape) for w in weights.values() if w.dim() == 2]
        count = sum(side[0] >= self.rank_min_size for side in sides)
        if not count:
            there = "there is no matrix"
            if sides:
                shorter, longer = max(sides)
                there = f"the largest matrix is {shorter} x {longer}"
            raise RecipeError(
                f"SaRA: rank_weight={self.rank_weight} needs a matrix in the target with both sides at least"
                f" rank_min_size={self.rank_min_size}, and {there}; set rank_weight=0 or a smaller rank_min_size"
            )
        return count

    def _warn_of_a_head(self, module: pl.LightningModule, weights: Mapping[str, Tensor]) -> None:
        try:
            path = select.head(module)
        except RecipeError:
            return
        inside = [name for name in weights if name.startswith(path + ".")]
        if inside:
            rank_zero_warn(
                f"SaRA: only the smallest entries of the head train ({', '.join(inside)}). If it is new, most of it"
                " stays at random values: name it in train_fully"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        operation = self.operation
        if isinstance(operation, SparseLeaves):
            self._targets = {name: _InLeaf(leaf) for name, leaf in operation.leaves.items()}
        else:
            masks, made = operation.spec.masks, operation.made
            self._targets = {name: _InPlace(p, unpacked(masks[name], p.shape)) for name, p in made.items()}
        if self.progressive_at is not None and self._reselect_at is None:
            steps = horizon(trainer, "step", f"SaRA: progressive_at={self.progressive_at} (or None for never)")
            self._reselect_at = int(self.progressive_at * steps)
        for name, bits in (self._active or {}).items():
            target = self._targets[name]
            target.keep(unpacked(bits, [len(target.index)]).to(target.index.device))

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def _reselected(self) -> bool:
        return any(target.active is not None for target in self._targets.values())

    def _each(self, do: Callable[[_Target], None]) -> None:
        for target in self._targets.values():
            do(target)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """The re-selection, as the first step after `progressive_at` of all begins."""
        if self._reselect_at is None or trainer.global_step < self._reselect_at or self._reselected:
            return
        for target in self._targets.values():
            target.keep(small(target.free(), self.operation.spec.theta))

    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """lambda ||P .* M||_* of the matrix that this optimizer step has drawn."""
        place = drawn(self.seed, step.trainer.global_step, self._matrices)
        matrices = [t for t in self._targets.values() if len(t.shape) == 2 and min(t.shape) >= self.rank_min_size]
        if place >= len(matrices) or matrices[place].count <= _TOO_FEW:  # those without any free entry come last
            return {}
        norm = matrices[place].norm()
        step.log(self, {"nuclear_norm": norm})
        return {"rank_loss": self.rank_weight * norm}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        theta, targets = self.operation.spec.theta, self._targets.values()
        below = torch.stack([small(target.free(), theta).sum() for target in targets]).sum()
        of_all = sum(len(target.index) for target in targets)
        trainable = float(sum(target.count for target in targets))
        self.log_dict({"sara/trainable": trainable, "sara/below_threshold": below / of_all})

    # -- results -----------------------------------------------------------------------------------------------------

    def entries(self, module: pl.LightningModule) -> Entries:
        """The free entries of M0, during the fit and after it; for :func:`save_entries`.

        Raises:
            RecipeError: before the first fit.
        """
        if self.operation is None:
            raise RecipeError("SaRA: there are no free entries before a fit has begun")
        weights, masks = module.state_dict(), self.operation.spec.masks
        return entries_of(weights, {name: unpacked(bits, weights[name].shape) for name, bits in masks.items()})

    def state(self) -> dict[str, Any]:
        active = {name: packed(t.active) for name, t in self._targets.items() if t.active is not None}
        return {"reselect_at": self._reselect_at, "active": active}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._reselect_at, self._active = state["reselect_at"], dict(state["active"])

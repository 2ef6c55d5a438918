"""SVFit: train nothing but the singular values of pre-trained weights.

Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024
(https://arxiv.org/abs/2409.05926). No code was released, and beyond the abstract the text could not be read. What the
abstract fixes: factors from the weight's own SVD, of which only the top r singular values train. OURS are: query and
value projections as the place, the difference form below (the same function, and exact at the start), no constraint on
the values, no weight decay on them, and energies by squares.

    W = U S V^T                        once, thin; k = min(out, in)
    y = x W^T + b + ((x V_r) * delta) U_r^T,    delta = sigma - S_r,    delta = 0 at the start
    dL/dsigma_i = u_i^T (dL/dW) v_i             the same for either sign of (u_i, v_i)
    merged: W + U_r diag(delta) V_r^T

r numbers a layer train: all k of a d x d weight are 1/16 of LoRA's at rank 8.

Costs the SVD once, O(out in k) a layer; the frozen memory and the r (in + out) multiply-adds a token of LoRA at rank r.
With all k of a square weight that is twice the layer's own. Nothing at test time, merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from lightning_recipes.core import random
from lightning_recipes.core.adapter_files import trained_beside
from lightning_recipes.core.adapters import AdapterRecipe, Adapters, AdapterSpec, carries_adapters, inject
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import broadcast_, decided_on_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.gradients import global_norm
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.surgery import as_structure

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Measure = Literal["squares", "sums"]
Part = Literal["top", "bottom", "random"]
Factors = tuple[Tensor, Tensor, Tensor]
NAME = "svfit"  # of the adapter, as peft calls it


# -- the maths ---------------------------------------------------------------------------------------------------------


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a weight ``[out, in]`` in fp32 at least: U ``[out, k]``, S ``[k]`` descending, V^T ``[k, in]``."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.svd(wide, full_matrices=False)


def shares(values: Tensor, of: Measure = "squares") -> Tensor:
    """Share of the whole that each singular value holds, ``[k]`` in fp64; of a weight of zeros all the same."""
    parts = values.double().square() if of == "squares" else values.double()
    whole = parts.sum()
    return parts / whole if whole > 0 else torch.full_like(parts, 1 / len(parts))


def rank_for(values: Tensor, energy: float, of: Measure = "squares") -> int:
    """The smallest r whose r largest values hold a share of at least `energy`."""
    held = shares(values, of).cumsum(0)
    return min(int((held < energy).sum()) + 1, len(values))


def part_of(k: int, rank: int, part: Part, generator: torch.Generator) -> Tensor:
    """Which of the k singular values are trained: ``[rank]`` indices in ascending order."""
    if part == "random":
        return torch.randperm(k, generator=generator)[:rank].sort().values
    return torch.arange(rank) if part == "top" else torch.arange(k - rank, k)


def merged(weight: Tensor, u: Tensor, delta: Tensor, vt: Tensor) -> Tensor:
    """W + U_r diag(delta) V_r^T, ``[out, in]``."""
    return weight + (u * delta) @ vt


def fingerprint(u: Tensor, vt: Tensor) -> Tensor:
    """(z u_i) (v_i w) with fixed random z and w, ``[r]``: tells vectors apart, and not the joint sign of a pair."""
    draw = random.generator("SVFit", "fingerprint")
    z, w = (torch.randn(n, generator=draw).to(u) for n in (u.shape[0], vt.shape[1]))
    return (z @ u) * (vt @ w)


class Directions(nn.Module):
    """The left factor of the update as a function of delta, for ``torch.nn.utils.parametrize``: U_r diag(delta).

    U_r and S_r are parameters that never train, not buffers, which DDP would send from rank 0 in every step.

    Args:
        u: U_r ``[out, r]``.
        values: S_r ``[r]``.
    """

    def __init__(self, u: Tensor, values: Tensor) -> None:
        super().__init__()
        self.u, self.values = Parameter(u, requires_grad=False), Parameter(values, requires_grad=False)

    def forward(self, delta: Tensor) -> Tensor:
        """``[r]`` to ``[out, r]``."""
        return self.u * delta

    def right_inverse(self, left: Tensor) -> Tensor:
        """The delta whose factor is nearest to `left`; 0 for 0. The columns of U_r are orthonormal."""
        return (self.u * left).sum(0)


# -- the surgery -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingularValues:
    """Adapters that train singular values: what to put in, and once it is in, what was decided.

    Attributes:
        rank, energy, energy_of, target, part, train_fully, seed: as :class:`SVFit` has them.
        ranks: r by path of the layer; None before the weights were decomposed. With it the factors are made empty, to
            be filled from a checkpoint: another SVD might find other vectors to values that are close.
        energies: share of the whole that those r hold, by path.
    """

    what: ClassVar[str] = "adapters"
    on_weights: ClassVar[bool] = True

    rank: int | None
    energy: float | None
    energy_of: Measure
    target: str | Sequence[str]
    part: Part
    train_fully: Sequence[str]
    seed: int
    ranks: Mapping[str, int] | None = None
    energies: Mapping[str, float] | None = None

    def present(self, module: pl.LightningModule) -> bool:
        return carries_adapters(module)

    def operate(self, module: pl.LightningModule) -> Adapters:
        """Inject LoRA of each layer's rank, V_r^T its frozen A, and U_r diag(delta) its B."""
        trainer = getattr(module, "_trainer", None)
        chosen: dict[str, tuple[int, int, float]] = {}  # r, k and the share by path
        factors: dict[str, Factors] = {}  # on rank 0 alone

        def rank_of(path: str, layer: nn.Module) -> int:
            if self.ranks is not None:
                return self.ranks[path]
            if not isinstance(layer, nn.Linear) and type(layer).__name__ != "Conv1D":
                raise RecipeError(f"target {path} is a {type(layer).__name__}; SVFit adapts linear layers")
            device = layer.weight.device if trainer is None else trainer.strategy.root_device
            chosen[path] = decided_on_rank_zero(lambda: self._decide(path, layer, device, factors), trainer)
            return chosen[path][0]

        first = self.rank or 1
        lora = AdapterSpec([NAME], first, first, 0.0, self.target, self.train_fully, self.seed)
        adapters = inject(module, lora, rank_of)
        adapters.made = {}
        for path, layer in adapters.layers.items():
            directions = _take_over(layer, factors.get(path))
            if self.ranks is None:
                broadcast_((*directions.parameters(), layer.lora_A[NAME].weight), trainer)
            name = f"{path}.lora_B.{NAME}.parametrizations.weight.original"
            adapters.made[name] = module.get_parameter(name)
            adapters.weight_decay[name] = 0.0
        adapters.spec = self
        if self.ranks is None:
            ranks = {path: rank for path, (rank, _, _) in chosen.items()}
            adapters.spec = replace(self, ranks=ranks, energies={path: share for path, (_, _, share) in chosen.items()})
            if self.energy is not None and all(rank == k for rank, k, _ in chosen.values()):
                rank_zero_warn(f"SVFit: energy={self.energy} takes all singular values of every layer; for fewer, less")
        return adapters

    def _decide(
        self, path: str, layer: nn.Module, device: torch.device, factors: dict[str, Factors]
    ) -> tuple[int, int, float]:
        """Decompose one weight; keeps the factors that are trained and returns r, k and the share that they hold."""
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        if not torch.isfinite(weight).all():
            raise RecipeError(f"the weight of {path} has entries that are not finite, and so no singular values")
        u, values, vt = decompose(weight.to(device))
        k = len(values)
        rank = k if self.rank is None and self.energy is None else self.rank
        if rank is None:
            rank = rank_for(values, self.energy, self.energy_of)
        index = part_of(k, rank, self.part, random.generator("SVFit", self.seed, path)).to(device)
        factors[path] = u[:, index], values[index], vt[index]
        return rank, k, float(shares(values, self.energy_of)[index].sum())


def _take_over(layer: LoraLayer, factors: Factors | None) -> Directions:
    """Make a LoRA layer's A the right singular vectors, and its B a function of delta; zeros without factors."""
    a, b = layer.lora_A[NAME], layer.lora_B[NAME]
    like = torch.empty(0, dtype=torch.promote_types(a.weight.dtype, torch.float32), device=a.weight.device)
    if factors is None:
        (rank, width), height = a.weight.shape, b.weight.shape[0]
        factors = like.new_zeros(height, rank), like.new_zeros(rank), like.new_zeros(rank, width)
    u, values, vt = (x.to(like).contiguous() for x in factors)
    a.weight = Parameter(vt, requires_grad=False)
    b.weight = Parameter(torch.zeros_like(u))
    directions = Directions(u, values)
    parametrize.register_parametrization(b, "weight", directions)
    return directions


# -- the compact file --------------------------------------------------------------------------------------------------


def save_values(adapters: Adapters, path: str | Path) -> None:
    """Write delta and nothing of the vectors, two numbers a trained value, and what trains beside them.

    Whoever loads it decomposes the weights again; fingerprints say whether the same vectors came out.
    """
    from safetensors.torch import save_file

    tensors = {f"beside/{name}": value for name, value in trained_beside(adapters).items()}
    for place, layer in adapters.layers.items():
        part = layer.lora_B[NAME].parametrizations.weight
        tensors[f"delta/{place}"] = part.original.detach()
        tensors[f"fingerprint/{place}"] = fingerprint(part[0].u, layer.lora_A[NAME].weight)
    spec = {k: v for k, v in as_structure(adapters.spec)["spec"].items() if k not in ("ranks", "energies")}
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, {"svfit": json.dumps(spec)})


def load_values(module: pl.LightningModule, path: str | Path) -> pl.LightningModule:
    """Merge what :func:`save_values` wrote into a module with the pre-trained weights, in place.

    Raises:
        RecipeError: when the module's weights are others, or another machine's decomposition finds other vectors to
            values that are close; the module is as it was then.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        spec = json.loads(file.metadata()["svfit"])
    adapters = SingularValues(**{**spec, "train_fully": ()}).operate(module)
    for place, layer in adapters.layers.items():
        part = layer.lora_B[NAME].parametrizations.weight
        found, wanted = fingerprint(part[0].u, layer.lora_A[NAME].weight), tensors.get(f"fingerprint/{place}")
        if wanted is None or found.shape != wanted.shape or not torch.allclose(found.cpu(), wanted, 0, 1e-2):
            adapters.remove(merge=False)
            raise RecipeError(
                f"{path} was written for other singular vectors of {place}: its weight is another one, or has values so"
                " close that they came out otherwise here. Take the adapter in peft's format (adapter_dir)"
            )
        with torch.no_grad():
            part.original.copy_(tensors[f"delta/{place}"])
    adapters.remove(merge=True)
    with torch.no_grad():
        state = module.state_dict()
        for name, value in tensors.items():
            if name.startswith("beside/"):
                state[name.removeprefix("beside/")].copy_(value)
    return module


# -- the callback ------------------------------------------------------------------------------------------------------


class SVFit(AdapterRecipe):
    """Decompose the weights of some layers, freeze all vectors, and train the singular values.

    Args:
        rank: r, the number of trained singular values a layer; None trains all of them, unless `energy` chooses.
        energy: choose each layer's r as the smallest whose largest values hold this share of the whole.
        energy_of: measure that share by 'squares' of the values or by plain 'sums' (the abstract does not say).
        target_modules: names of modules, 'all-linear', or roles as one word; None is 'qv', the query and value
            projections of every attention block. A fused layer that is named itself is decomposed as one matrix.
        part: which singular values train: the 'top' r, the 'bottom' r, or 'random' ones, for ablations.
        train_fully: what trains beside the values; 'head' finds the head.
        merge_on_end: fold the adapters into the stock weights when the fit ends; False keeps them in the module.
        adapter_dir: folder that gets the adapters in peft's format when the fit ends, an ordinary LoRA of r numbers
            times (in + out) a layer; None writes none.
        seed: of the 'random' part.

    The learning rate should be about ten times LoRA's: what trains is few and large.

    Raises:
        RecipeError: for bad arguments; in setup for a target that matches nothing, is no plain linear layer, is already
            adapted, or has weights that are not finite, a rank above a layer's width, a missing or frozen head, and
            true half precision.
    """

    paper = Paper(
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        "C. Sun et al.",
        2024,
        "https://arxiv.org/abs/2409.05926",
    )
    does = "Trains the singular values of the adapted weights and nothing else of them."
    use_when = "You adapt a pre-trained model with as few trained parameters as can be, and need no old task kept."
    costs = "An SVD a layer at the start; LoRA's time and frozen memory at the same rank, all k by default."
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("PEGO", "GLAD", "SaRA", "LoRA", "MakeElastic"), "both adapt the layers' weights"),
        "SubGM": "its rate is that of one LoRA product, and the values train beside frozen vectors",
    }
    log_prefix = NAME
    owns_training_set = True

    def __init__(
        self,
        rank: int | None = None,
        energy: float | None = None,
        energy_of: Measure = "squares",
        target_modules: str | list[str] | None = None,
        part: Part = "top",
        train_fully: Sequence[str] = ("head",),
        merge_on_end: bool = True,
        adapter_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(rank is None or rank >= 1, self, "rank", rank, "None or at least 1")
        check_argument(energy is None or 0 < energy <= 1, self, "energy", energy, "None or in (0, 1]")
        if rank is not None and energy is not None:
            raise RecipeError(f"SVFit: rank={rank} and energy={energy} both choose the rank; give one of them")
        check_argument(energy_of in ("squares", "sums"), self, "energy_of", energy_of, "'squares' or 'sums'")
        check_argument(part in ("top", "bottom", "random"), self, "part", part, "'top', 'bottom' or 'random'")
        check_argument(
            energy is None or part == "top", self, "part", part, "'top' with an energy, which the largest values hold"
        )
        some = target_modules is None or len(target_modules) > 0
        check_argument(some, self, "target_modules", target_modules, "None or names of at least one module")
        check_argument(not isinstance(train_fully, str), self, "train_fully", train_fully, "a list of names")
        self.rank, self.energy, self.energy_of, self.target_modules = rank, energy, energy_of, target_modules
        self.part, self.train_fully, self.merge_on_end = part, train_fully, merge_on_end
        self.adapter_dir, self.seed = adapter_dir, seed

    def declare(self, plan: Plan) -> None:
        if plan.fitting and isinstance(plan.trainer.precision_plugin, HalfPrecision):
            raise RecipeError(
                f"SVFit trains small changes of large values, which need fp32; precision={plan.trainer.precision!r}"
                " leaves them none: use the mixed one, 'bf16-mixed' or '16-mixed'"
            )
        target = "qv" if self.target_modules is None else self.target_modules
        plan.surgery(
            SingularValues(
                self.rank, self.energy, self.energy_of, target, self.part, tuple(self.train_fully), self.seed
            )
        )

    def save_values(self, path: str | Path) -> None:
        """Write the compact file on rank 0, while the adapters are in the module; see :func:`save_values`."""
        self.check_saves()
        if rank_and_world()[0] == 0:
            save_values(self.operation, path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        shares = list(self.operation.spec.energies.values())
        log_values(trainer, {"svfit/energy_min": min(shares), "svfit/energy_mean": sum(shares) / len(shares)})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.operation is None or not self.operation.layers:
            return
        parts = [layer.lora_B[NAME].parametrizations.weight for layer in self.operation.layers.values()]
        change = global_norm([part.original.detach() for part in parts])
        start = global_norm([part[0].values for part in parts])
        self.log("svfit/relative_change", change / start.clamp_min(1e-12))

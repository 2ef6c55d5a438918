"""SubGM: factors of too high a rank, from a tiny start, by sub-gradient steps of a length that falls geometrically.

Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small Initialization, Noisy
Measurements, and Over-parameterization", JMLR 2023 (https://arxiv.org/abs/2202.08788; no official code was found, and
the algorithm's details stand here from memory, checked by simulation). For measurements y_i = <A_i, X*> + s_i of which
some are grossly wrong, and X = U U^T with U of more columns than X* has rank:

    Q_t     = (1/m) sum_i sign(<A_i, X_t> - y_i) (A_i + A_i^T) / 2        the sub-gradient with respect to X
    U_{t+1} = U_t - 2 eta_t Q_t U_t,   eta_t = eta rho^t / ||Q_t||_F,   U_0 = a G,   G_ij ~ N(0, 1/d)

What lies in X*'s column space grows geometrically; the excess columns grow through the error of Q alone and stay small
until the signal is fitted. So the rank may be too high. Q does not change when all residuals are scaled, and its
direction is right whatever the noise, which only shrinks it (:func:`sign_rip_phi`).

Growth from a to 1 needs sum_t eta rho^t = eta / (1 - rho) of the order log(1/a). Ours is the rule that gives it,
rho = 1 - eta / (2 log(1/a) + 4). The last error has two floors: the last step eta rho^T, and a term that falls with a.

Here for any product X = B A in a network (LoRA adapters, factors U and V), where a plain SGD step of rate eta_t on both
factors is the paper's step. NEVER divide by the norm of dL/dB itself: it is as small as A, so that steps of length eta
at factors of size a would end the small start at once. ``normalize`` says where ||Q|| comes from:

    "matrix"  Q = dL/dX itself: at the output of a product, or sum g h^T of what leaves B and enters A
    "param"   ||(dL/dB, dL/dA)|| / (||A||^2 + ||B||^2)^{1/2}, of the same scale and free of hooks (dL/dB = Q A^T)

Several pairs count as the diagonal blocks of one matrix: one norm, one rate (ours). The loss is the module's own and
must be one of absolute errors for the robustness that the paper proves.

Costs one number read back a step; with "matrix" one product of the size of a dense weight's gradient a pair and pass,
that memory, and under DDP a message of that size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.gradients import global_norm
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.product_gradients import ProductGradients
from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.surgery import Writing
from lightning_recipes.modules.low_rank_recovery import PAPER, FactorProduct, check_measurements, measure

# -- the maths ---------------------------------------------------------------------------------------------------------


def subgradient(a: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Q = (1/m) sum_i sign(<A_i, X> - y_i) (A_i + A_i^T) / 2, with sign(0) = 0.

    Args:
        a: ``[m, d, d]``.
        y: ``[m]``.
        x: ``[d, d]``.
    """
    signs = torch.sign(measure(a, x) - y)
    q = (a.flatten(1).T @ signs).view_as(x) / len(y)
    return (q + q.T) / 2


def subgradient_step(u: Tensor, q: Tensor, size: float) -> Tensor:
    """U - 2 (size / ||Q||_F) Q U; U where Q is 0.

    Args:
        u: ``[d, r]``.
        q: ``[d, d]``.
        size: eta rho^t, the length of the step in X / U.
    """
    norm = torch.linalg.norm(q)
    return torch.where(norm > 0, u - 2 * size / norm * (q @ u), u)


def decay_for(init_scale: float, eta: float) -> float:
    """rho = 1 - eta / (2 log(1/a) + 4), whose steps sum to 2 log(1/a) + 4; for a above 1 as for 1."""
    return 1 - eta / (2 * max(math.log(1 / init_scale), 0.0) + 4)


def budget(eta: float, rho: float, steps: float = math.inf) -> float:
    """sum over t < steps of eta rho^t = eta (1 - rho^steps) / (1 - rho)."""
    return eta * (1 - rho**steps) / (1 - rho)


def spectral_matrix(a: Tensor, y: Tensor) -> Tensor:
    """C = (1/m) sum sign(y_i) A_i, ``[d1, d2]``: minus the sub-gradient at X = 0."""
    return (a.flatten(1).T @ torch.sign(y).to(a.dtype)).view(a.shape[1:]) / len(y)


def spectral_init(a: Tensor, y: Tensor, rank: int) -> Tensor:
    """B = V diag(e+)^{1/2} of the largest eigenpairs of C made symmetric, scaled so that ||B B^T||_F = 1.

    U_0 = init_scale * B points along X* up to the Sign-RIP error.

    Args:
        a: ``[m, d, d]``.
        y: ``[m]``.
        rank: columns, at most d.

    Returns:
        ``[d, rank]``; columns of eigenvalues below 0 are 0.

    Raises:
        ValueError: for measurements that are not those of one square matrix, also a y that is not finite; for a rank
            outside of 1 to d; when no eigenvalue is positive.
    """
    check_measurements(a, y)
    if not 1 <= rank <= a.shape[-1]:
        raise ValueError(f"rank={rank}: must be at least 1 and at most d={a.shape[-1]}")
    c = spectral_matrix(a, y)
    values, vectors = torch.linalg.eigh((c + c.T) / 2)  # in ascending order
    values = values.flip(0)[:rank].clamp_min(0)
    if not bool(values[0] > 0):
        raise ValueError("no direction has a positive mean sign: these are no measurements of a positive matrix")
    b = vectors.flip(1)[:, :rank] * values.sqrt()
    return b / torch.linalg.norm(values).sqrt()  # ||B B^T||_F is the norm of the eigenvalues kept


def spectral_init_pair(a: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`spectral_init` for X = U V^T, from the singular pairs of C: ``[d1, rank]`` and ``[d2, rank]``, balanced.

    Raises:
        ValueError: for measurements that are not those of one matrix, or a rank outside of 1 to min(d1, d2).
    """
    check_measurements(a, y, tuple(a.shape[1:]))
    if not 1 <= rank <= min(a.shape[1:]):
        raise ValueError(f"rank={rank}: must be at least 1 and at most {min(a.shape[1:])}")
    left, values, right = torch.linalg.svd(spectral_matrix(a, y), full_matrices=False)
    values = values[:rank] / torch.linalg.norm(values[:rank])
    return left[:, :rank] * values.sqrt(), right[:rank].T * values.sqrt()


def sign_rip_phi(norm: float | Tensor, outlier_prob: float = 0.0, std: float = 0.0) -> Tensor:
    """phi(X) = sqrt(2/pi) (1 - p + p (1 + v^2 / ||X||_F^2)^{-1/2}): how long Q is along X / ||X||_F.

    For Gaussian A_i with N(0, 1) entries and noise s_i ~ N(0, v^2) with probability p; p = 1 is dense noise. (In
    general the second term is p E exp(-s^2 / (2 ||X||_F^2)).)

    Args:
        norm: ||X||_F of the distance to the truth, positive.
        outlier_prob: p.
        std: v.
    """
    norm = torch.as_tensor(norm, dtype=torch.float64)
    hit = (1 + (std / norm) ** 2).rsqrt()
    return math.sqrt(2 / math.pi) * (1 - outlier_prob + outlier_prob * hit)


def small_factor(shape: Sequence[int], d: int, init_scale: float, draws: torch.Generator) -> Tensor:
    """a G with entries N(0, 1/d): a factor of r columns has norm about a sqrt(r), whatever its d."""
    return init_scale / math.sqrt(d) * torch.randn(*shape, generator=draws)


def product_norm(gradient: Tensor, symmetric: bool) -> Tensor:
    """||Q||_F of dL/dX; of its symmetric part for X = U U^T, which moves along no other."""
    return torch.linalg.norm((gradient + gradient.T) / 2 if symmetric else gradient)


def factor_norm(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """||(dL/dB, dL/dA)|| / ||(A, B)||: what stands for ||Q|| where Q is not seen.

    Args:
        gradients, factors: of B and A; of U alone for X = U U^T, where dL/dU = 2 Q U counts once for each side.
    """
    ratio = global_norm(gradients) / global_norm(factors)
    return ratio / 2 if len(factors) == 1 else ratio


def singular_values(b: Tensor, a: Tensor | None = None) -> Tensor:
    """Singular values of B A in descending order, in fp64, ``[min(m, r, n)]``; of U U^T for B alone.

    Args:
        b: ``[m, r]``.
        a: ``[r, n]``.
    """
    b = b.detach().double()
    if a is None:
        return torch.linalg.svdvals(b) ** 2
    a = a.detach().double()
    if b.shape[1] < min(b.shape[0], a.shape[1]):
        return torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    return torch.linalg.svdvals(b @ a)


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values' shares: k for k equal ones."""
    squares = values**2
    return torch.special.entr(squares / squares.sum()).sum().exp()


def spectral_gap(values: Tensor) -> Tensor:
    """The largest s_k / s_{k+1}: where the spectrum falls off, if it does. 1 for a single value."""
    below = values[1:].clamp_min(values[0] * torch.finfo(values.dtype).eps)
    return torch.cat([values.new_ones(1), values[:-1] / below]).max()


def falls_like_a_square(loss: tuple[float, float], q: tuple[float, float]) -> bool:
    """Whether ||Q|| fell with the loss from the first to the second point, as sqrt(loss) or faster.

    Of squared errors e the loss is e^2 and Q is of the order e; of absolute ones Q does not depend on e.
    """
    return q[1] < q[0] and loss[1] < loss[0] and math.log(q[0] / q[1]) > SQUARE * math.log(loss[0] / loss[1])


SQUARE = 0.4  # just below the exponent 1/2 of squared errors
DROP = 0.75  # of the first loss, at which it is looked whether ||Q|| fell too

# -- factor pairs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A product X = B A in a module, by the names of its parameters.

    Attributes:
        b: ``[m, r]``.
        a: ``[r, n]``; the same name for X = U U^T.
        transposed: whether the second factor is stored as ``[n, r]`` (V of U V^T).
        seen: paths of the parts that A's input enters and B's output leaves, or twice that of a part that puts out X;
            None where Q cannot be seen.
    """

    b: str
    a: str
    transposed: bool = False
    seen: tuple[str, str] | None = None

    @property
    def symmetric(self) -> bool:
        """Whether X = U U^T."""
        return self.a == self.b

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters, each once."""
        return (self.b,) if self.symmetric else (self.b, self.a)

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """B ``[m, r]`` and A ``[r, n]`` (None for X = U U^T) as matrices, of the parameters."""
        b, a = parameters[self.b].flatten(1), parameters[self.a].flatten(1)
        return (b, None) if self.symmetric else (b, a.T if self.transposed else a)

    def product(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """X, ``[m, n]``."""
        b, a = self.factors(parameters)
        return b @ (b.T if a is None else a)


def paired(module: nn.Module, b: str, a: str) -> Pair | None:
    """Two parameters as a pair, as far as their shapes allow it."""
    parameters = dict(module.named_parameters())
    first, second = parameters[b], parameters[a]
    if first.dim() < 2 or second.dim() < 2:
        return None
    (_, r), (rows, columns) = first.flatten(1).shape, second.flatten(1).shape
    by_columns = b == a or (r == columns and (r != rows or b.rpartition(".")[2] == "U"))
    if not by_columns and r != rows:
        return None
    return Pair(b, a, by_columns, _seen(module, b, a))


def _seen(module: nn.Module, b: str, a: str) -> tuple[str, str] | None:
    """Where the gradient of the product can be read, if anywhere."""
    owner = b.rpartition(".")[0]
    if a.rpartition(".")[0] == owner:
        for name, part in module.get_submodule(owner).named_children():
            if isinstance(part, FactorProduct):
                path = f"{owner}.{name}" if owner else name
                return path, path
    if ".lora_B." in f".{b}":
        first, last = a.rpartition(".")[0], owner
        if all(isinstance(module.get_submodule(path), nn.Linear) for path in (first, last)):
            return first, last
    return None


def find_pairs(module: nn.Module) -> list[Pair]:
    """Every lora_B with its lora_A, U with V (or alone, for U U^T) and weight_u with weight_v, in their order."""
    names = [name for name, _ in module.named_parameters()]
    found = []
    for name in names:
        path, _, last = name.rpartition(".")
        start = path + "." * bool(path)
        partner = None
        if ".lora_B." in f".{name}" and last == "weight":
            partner = ".".join("lora_A" if part == "lora_B" else part for part in name.split("."))
        elif last == "U":
            partner = start + "V" if start + "V" in names else name
        elif last == "weight_u":
            partner = start + "weight_v"
        if partner in names and (pair := paired(module, name, partner)) is not None:
            found.append(pair)
    return found


def match_pairs(module: nn.Module, patterns: Sequence[Sequence[str]]) -> list[Pair]:
    """The parameters whose whole names match, the k-th of the first expression with the k-th of the second.

    Raises:
        RecipeError: for an expression that matches nothing, other numbers of both, or shapes that do not multiply.
    """
    names = [name for name, _ in module.named_parameters()]
    found = []
    for each in patterns:
        sides = [[name for name in names if re.fullmatch(pattern, name)] for pattern in each]
        for pattern, side in zip(each, sides):
            if not side:
                raise RecipeError(f"pairs: {pattern!r} matches no parameter; {_listed(module)}")
        if len(sides[0]) != len(sides[1]):
            raise RecipeError(
                f"pairs: {each[0]!r} matches {len(sides[0])} parameters and {each[1]!r} {len(sides[1])}; each factor"
                " needs its partner"
            )
        for b, a in zip(*sides):
            pair = paired(module, b, a)
            if pair is None:
                shapes = [list(module.get_parameter(name).shape) for name in (b, a)]
                raise RecipeError(f"pairs: {b} {shapes[0]} and {a} {shapes[1]} are no factors of one product")
            found.append(pair)
    return found


def _listed(module: nn.Module) -> str:
    shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in module.named_parameters())
    return f"the module has {shapes or 'none'}"


# -- the recipe --------------------------------------------------------------------------------------------------------


class SubGM(Recipe):
    """Small balanced first factors, and normalised steps that shrink geometrically, for products of factors.

    It takes hold of pairs of factors that train; everything else trains as it did, at the rates of its groups. Use a
    loss of absolute errors (``F.l1_loss``). After a recipe that adds adapters it starts both of their factors.

    Args:
        init_scale: a, size of the first factors; the smaller, the closer to the truth. Above 1 there is a warning.
        eta: length of the first step, of the factors relative to their size.
        rho: factor on it after every optimizer step, in (0, 1); None for 1 - eta / (2 log(1/a) + 4) (ours).
        pairs: "auto" for every lora_B and lora_A, U and V (or U alone, for X = U U^T), weight_u and weight_v; or pairs
            of regular expressions for whole names of parameters, B's (rows of X) and A's.
        normalize: what stands for ||Q||: "matrix", the gradient with respect to the product ("param" for pairs where it
            cannot be seen, which is said); "param", from the factors and their gradients; "none", 1.
        init: "random"; "keep", the factors as they are; "spectral", along the mean sign of the measurements, for one
            pair and data with ``measurements`` (MatrixSensingDataModule).
        schedule_lr: set the factors' rate to eta rho^t / ||Q||. False leaves the optimizer's own.
        log_spectrum: log effective rank and gap of the singular values, the mean over pairs, when Lightning logs.
        allow_any_optimizer: take another optimizer than SGD without momentum, for which the steps mean nothing.
        seed: of the first factors.

    Raises:
        RecipeError: for bad arguments, also steps that sum to less than log(1/init_scale); in setup when no pair is
            found or none trains, for another optimizer, a scheduler on the factors' group, and under manual
            optimization.
    """

    paper = PAPER
    does = "Starts the factors of a matrix tiny and takes normalised, shrinking steps: too high a rank does no harm."
    use_when = "You fit low-rank factors to data with gross errors, and do not know the rank."
    costs = "One number read back a step; with 'matrix' one more product and a dense gradient in memory a pair."
    log_prefix = "subgm"
    free_on_resume = frozenset({"log_spectrum"})
    refuses: ClassVar[Mapping[str, str]] = {
        "SVFit": "it trains the singular values of the layers, and there are no factors left",
        "SaRA": "it trains entries of the weights, and there are no factors left",
        "PEGO": "its adapters must start and stay orthogonal, and SubGM writes over their first values",
        "MakeElastic": "both own the layers' weights",
    }
    comes_after: ClassVar[Mapping[str, str]] = dict.fromkeys(("GLAD", "LoRA"), "it starts the adapters that they add")

    def __init__(
        self,
        init_scale: float = 1e-4,
        eta: float = 0.25,
        rho: float | None = None,
        pairs: str | Sequence[tuple[str, str]] = "auto",
        normalize: Literal["matrix", "param", "none"] = "matrix",
        init: Literal["random", "keep", "spectral"] = "random",
        schedule_lr: bool = True,
        log_spectrum: bool = True,
        allow_any_optimizer: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive = 0 < init_scale < math.inf
        check_argument(positive, self, "init_scale", init_scale, "positive (zero is a saddle: U = 0 never moves)")
        check_argument(0 < eta < math.inf, self, "eta", eta, "positive")
        check_argument(rho is None or 0 < rho < 1, self, "rho", rho, "None or in (0, 1)")
        ways = ("matrix", "param", "none")
        check_argument(normalize in ways, self, "normalize", normalize, "'matrix', 'param' or 'none'")
        check_argument(init in ("random", "keep", "spectral"), self, "init", init, "'random', 'keep' or 'spectral'")
        some = pairs == "auto" or (
            not isinstance(pairs, str) and len(pairs) > 0 and all(_are_patterns(each) for each in pairs)
        )
        check_argument(some, self, "pairs", pairs, "'auto' or pairs of regular expressions")
        self.init_scale, self.eta, self.rho, self.pairs, self.normalize = init_scale, eta, rho, pairs, normalize
        self.init, self.schedule_lr, self.log_spectrum = init, schedule_lr, log_spectrum
        self.allow_any_optimizer, self.seed = allow_any_optimizer, seed
        self._rho = decay_for(init_scale, eta) if rho is None else rho
        check_argument(self._rho > 0, self, "eta", eta, "below 2 log(1/init_scale) + 4 where rho is None")
        self._growth = math.log(1 / init_scale)
        if init != "keep" and schedule_lr and normalize != "none" and budget(eta, self._rho) < self._growth:
            raise RecipeError(
                f"SubGM: the steps of eta={eta:g}, rho={self._rho:g} sum to {budget(eta, self._rho):.3g}, and from"
                f" init_scale={init_scale:g} they need log(1/init_scale) = {self._growth:.3g}: the iterate cannot leave"
                " the initialisation; raise eta, rho or init_scale"
            )
        if init_scale > 1:
            rank_zero_warn(f"SubGM: init_scale={init_scale:g} is no small start; take 1e-1 to 1e-8")
        self._started: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # factors that it has written over
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._t, self._found = 0, []
        self._factors: dict[str, nn.Parameter] = {}
        self._first: tuple[float, float] | None = None  # loss and ||Q||
        self._told = False
        self._norm: Tensor | None = None
        self._plan: Plan | None = None
        self._writing: Writing | None = None
        self._products: ProductGradients | None = None

    @property
    def neutral(self) -> bool:
        return self.init == "keep" and not self.schedule_lr and not self.log_spectrum

    # -- before the fit ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        self._begin_anew()
        self._plan = plan
        self._writing = plan.write_weights(self._first_factors, after_surgery=True)
        plan.after_surgery(self._watch)
        if self.schedule_lr:
            plan.parameters(lambda: Claim(lr_scale=dict.fromkeys(self._names, 1.0)))
        plan.edit_gradients(self._edit)
        plan.after_step(self._stepped)
        plan.at_end(self._let_go)
        if self.schedule_lr and "16" in str(plan.trainer.precision):
            rank_zero_warn(
                f"SubGM: precision={plan.trainer.precision!r}: products of factors of size {self.init_scale:g} and"
                " signs of small residuals are lost in half precision; train the factors in 32-true"
            )

    def _find(self, plan: Plan) -> list[Pair]:
        """The pairs that train."""
        module = plan.module
        found = find_pairs(module) if self.pairs == "auto" else match_pairs(module, self.pairs)
        if not found:
            raise RecipeError(
                f"no pair of factors was found (lora_A and lora_B, U and V, weight_u and weight_v); {_listed(module)}:"
                " name them with pairs=[[B, A], ...]"
            )
        names = [name for pair in found for name in pair.names]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"pairs: {twice} is in two pairs")
        parameters, frozen = dict(module.named_parameters()), plan.frozen_by_surgery
        trained = [p for p in found if all(parameters[n].requires_grad and n not in frozen for n in p.names)]
        if not trained:
            by = f" ({frozen[names[0]]} trains what it adds and freezes the rest)" if names[0] in frozen else ""
            raise RecipeError(
                f"none of the factors trains{by}, {names[0]} is the first of them; unfreeze both of a pair"
            )
        return trained

    def _first_factors(self) -> dict[str, Tensor]:
        plan = self._plan
        self._found = self._find(plan)
        if self.init == "keep":
            return {}
        parameters = dict(plan.module.named_parameters())
        fresh = [pair for pair in self._found if not any(parameters[n] in self._started for n in pair.names)]
        if self.init == "spectral":
            return self._spectral(parameters) if fresh else {}
        values = {}
        for number, pair in enumerate(self._found):
            if pair not in fresh:
                continue  # a second fit goes on from where the first one ended
            for side, name in enumerate(pair.names):
                shape, flat = parameters[name].shape, parameters[name].flatten(1).shape
                d = flat[1] if side == 1 and not pair.transposed else flat[0]
                values[name] = small_factor(shape, d, self.init_scale, generator(self.seed, "SubGM", number, side))
        return values

    def _spectral(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        measurements = getattr(getattr(self._plan.trainer, "datamodule", None), "measurements", None)
        if measurements is None or len(self._found) > 1:
            have = f"{len(self._found)} pairs" if measurements is not None else "no measurements"
            raise RecipeError(
                "init='spectral' needs one pair of factors and a data module with `measurements`, (A [m, d, d], y [m]),"
                f" as MatrixSensingDataModule has; there are {have}: use 'random'"
            )
        pair = self._found[0]
        b, _ = pair.factors(parameters)
        try:
            check_measurements(*measurements, tuple(pair.product(parameters).shape))
            if pair.symmetric:
                return {pair.b: self.init_scale * spectral_init(*measurements, b.shape[1])}
            left, right = spectral_init_pair(*measurements, b.shape[1])
        except ValueError as error:
            raise RecipeError(f"init='spectral': {error}") from error
        right = right if pair.transposed else right.T
        return {pair.b: self.init_scale * left, pair.a: self.init_scale * right}

    def _watch(self) -> None:
        """Once all names are final: where ||Q|| is to be seen."""
        rank_zero_info(f"SubGM: {len(self._found)} pairs of factors, the first {' and '.join(self._found[0].names)}")
        if self.normalize != "matrix":
            return
        unseen = [pair for pair in self._found if pair.seen is None]
        if unseen:
            rank_zero_warn(
                f"SubGM: the gradient of the product cannot be seen for {len(unseen)} of {len(self._found)} pairs, the"
                f" first {' and '.join(unseen[0].names)}; normalize='param' is used for them"
            )
        seen = {pair.b: pair.seen for pair in self._found if pair.seen is not None}
        if seen:
            self._products = ProductGradients(self._plan.module, seen)
            self._plan.install(self._products)

    @property
    def _names(self) -> list[str]:
        return [name for pair in self._found for name in pair.names]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._plan is None:
            return
        parameters = dict(pl_module.named_parameters())
        self._factors = {name: parameters[name] for name in self._names}
        if self.schedule_lr:
            factors = {id(parameter): name for name, parameter in self._factors.items()}
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    mine = [factors[id(p)] for p in group["params"] if id(p) in factors]
                    if mine:
                        self._check_group(trainer, optimizer, group, mine[0])

    def _check_group(self, trainer: pl.Trainer, optimizer: Optimizer, group: Mapping[str, Any], name: str) -> None:
        kind = type(optimizer).__name__
        plain = isinstance(optimizer, SGD) and not group["momentum"]
        if not plain and not self.allow_any_optimizer:
            momentum = f"(momentum={group['momentum']:g})" if "momentum" in group else ""
            raise RecipeError(
                f"SubGM: {name} is trained by {kind}{momentum}, on top of which normalised steps are meaningless; use"
                " SGD without momentum, schedule_lr=False, or allow_any_optimizer=True if you mean it"
            )
        for config in trainer.lr_scheduler_configs:
            if getattr(config.scheduler, "optimizer", None) is optimizer:
                raise RecipeError(
                    f"SubGM: {type(config.scheduler).__name__} sets the rate of {name} and SubGM does too; train the"
                    " factors without a scheduler, or with schedule_lr=False"
                )
        if not float(group["lr"]) > 0:
            raise RecipeError(f"SubGM: the rate of {name}'s group must be positive to be scaled; got {group['lr']}")

    # -- in the fit ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keep()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Factors that have been trained stand there now: a run that has no batch left must not take them back."""
        self._keep()

    def _keep(self) -> None:
        if self._writing is not None:
            self._writing.settle()
            self._writing = None
            for factor in self._factors.values():
                self._started[factor] = True

    @torch.no_grad()
    def _edit(self, optimizer: Optimizer) -> None:
        """With the finished gradient, before clipping: the norm, and with it the rate of this update."""
        plan, parameters = self._plan, self._factors
        products = self._products.take(plan.trainer) if self._products is not None else {}
        norms = [
            product_norm(products[pair.b], pair.symmetric)
            if pair.b in products
            else factor_norm([parameters[n].grad for n in pair.names], [parameters[n] for n in pair.names])
            for pair in self._found
            if all(parameters[n].grad is not None for n in pair.names)
        ]
        if not norms:
            return
        self._norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
        size = self.eta * self._rho**self._t
        values: dict[str, Any] = {"q_norm": self._norm}
        if self.schedule_lr:
            q = 1.0 if self.normalize == "none" else float(self._norm)
            rate = size / q if q > 0 else 0.0  # where Q is 0 no step would be one
            plan.change_parameters(Claim(lr_scale=self._scales(optimizer, parameters, rate)))
            values["lr"] = rate
            if self._growth > 0:
                values["budget"] = budget(self.eta, self._rho, self._t + 1) / self._growth
        if self._is_logged(plan.trainer):
            values |= self._looked_at(parameters)
        # Allowed here: the edit runs inside the hook `configure_gradient_clipping`.
        plan.module.log_dict({f"subgm/{name}": value for name, value in values.items()})

    def _scales(self, optimizer: Optimizer, parameters: Mapping[str, Tensor], rate: float) -> dict[str, float]:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        return {name: rate / rates[id(parameters[name])] for name in self._names if id(parameters[name]) in rates}

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        every = trainer.log_every_n_steps
        return every > 0 and (trainer.global_step + 1) % every == 0

    def _looked_at(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {}
        if self.log_spectrum:
            spectra = [singular_values(*pair.factors(parameters)) for pair in self._found]
            values["effective_rank"] = torch.stack([effective_rank(s) for s in spectra]).mean()
            values["sv_gap"] = torch.stack([spectral_gap(s) for s in spectra]).mean()
        truth = getattr(getattr(self._plan.trainer, "datamodule", None), "truth", None)
        if isinstance(truth, Tensor) and len(self._found) == 1:
            found = self._found[0].product(parameters)
            if found.shape == truth.shape:
                values["error"] = torch.linalg.norm(found - truth.to(found))
        return values

    def _stepped(self, optimizer: Optimizer) -> None:
        self._t += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None or self._plan is None:
            return
        loss = loss.detach() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self.log("subgm/loss", loss)
        every = max(trainer.log_every_n_steps, 1)
        if self._norm is None or self._told or (self._first is not None and trainer.global_step % every):
            return
        self._hold_against_first(float(loss), float(self._norm))

    def _hold_against_first(self, loss: float, q: float) -> None:
        """Say once, when the loss has dropped, that ||Q|| dropped as it does for squared errors."""
        if self._first is None:
            self._first = loss, q
        elif 0 < loss < DROP * self._first[0] and min(q, self._first[1]) > 0:
            self._told = True
            if falls_like_a_square((self._first[0], loss), (self._first[1], q)):
                rank_zero_warn(
                    f"SubGM: the loss fell from {self._first[0]:.3g} to {loss:.3g} and its gradient from"
                    f" {self._first[1]:.3g} to {q:.3g}, as it does for squared errors and not for absolute ones;"
                    " against gross errors in the data use a loss of absolute errors (F.l1_loss)"
                )

    def _let_go(self) -> None:
        self._plan, self._writing, self._products, self._norm = None, None, None, None
        self._factors = {}

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        sums = dict(self._products.sums) if self._products is not None else {}
        norm = None if self._norm is None else self._norm.detach().clone()
        return {"t": self._t, "sums": sums, "first": list(self._first or ()), "told": self._told, "norm": norm}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._t, self._told = state["t"], state["told"]
        self._first = tuple(state["first"]) or None
        self._norm = state["norm"]
        if self._products is not None:
            self._products.sums.clear()
            self._products.sums.update(state["sums"])


def _are_patterns(pair: Any) -> bool:
    try:
        ok = not isinstance(pair, str) and len(pair) == 2
        return ok and all(re.compile(pattern) is not None for pattern in pair)
    except (re.error, TypeError):
        return False

"""HypothesisWeightMonitor: how much prior mass lies near a solution, and so how many samples it takes to learn it.

Feder, Urbanke, Fogel, "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025
(https://arxiv.org/abs/2506.07661; no official code). The weight of a hypothesis theta0 is the prior mass of all that
predict alike:

    W(theta0, eps) = P{theta : E_x KL(p_theta0(.|x) || p_theta(.|x)) <= eps}

and the cumulative expected regret of the Bayes mixture over n samples of theta0 is

    R_n <= min over eps of n eps - log W(theta0, eps)

(restrict the mixture to the ball, and use Jensen's inequality): at most eps + (-log W) / n a sample, whatever the
number of parameters. In a regular model of d parameters -log W is (d/2) log(1/eps) and a constant, in a singular one
lambda log(1/eps), with the learning coefficient lambda.

Both estimates of W are ours, and approximate. *llc*: with SGLD around theta* on the mean loss l, at inverse temperature
beta = 1 / log N and with a restoring force gamma,

    theta <- theta - eta [ grad l + gamma / (N beta) (theta - theta*) ] + sqrt(2 eta / (N beta)) xi
    lambda = N beta (mean of l over the second half of the chain - l(theta*)),      -log W = lambda log(1 / eps)

*star*: along directions u, uniform on the sphere, the largest r with KL(theta*, theta* + r u) <= eps, and with a
Gaussian prior w

    W = area of the sphere x mean over u of the integral from 0 to r of w(theta* + t u) t^(d-1) dt

in logarithms. In high dimension few directions see the wide parts of the ball: a lower bound that can be thousands of
nats off, for comparing runs of one architecture only.

Costs three passes over a batch for each of the `n_draws` steps of a chain, or some 20 over the probe for each of the
`n_draws` directions of a star.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from lightning_recipes.core.copies import wearing
from lightning_recipes.core.diagnostics import TRAINED, Monitor
from lightning_recipes.core.distributed import all_mean_, all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.evaluation import apart, as_a_step_gets_it, decide
from lightning_recipes.core.gradients import global_norm
from lightning_recipes.core.noise import add_noise_
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, samples_at_hand, samples_of, some_of
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.step import check_observable, observe

HALVINGS = 12
"""Of the bracket of a radius, which is then known to a few parts in ten thousand."""
DOUBLINGS = 40

# -- the maths -------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """min over eps of n eps - log W(eps), and where it is."""

    regret: float
    eps: float


def regret_bound(
    log_weight_fn: Callable[[float], float], n: int, least: float = 1e-9, most: float = 10.0, points: int = 400
) -> Bound:
    """The bound on the cumulative expected regret over n samples, in nats.

    Args:
        log_weight_fn: from eps to log W(theta0, eps); asked for 0 too, where a class with many parameters of one
            function has mass and the bound is -log W for every n.
        n: samples.
        least, most: eps to look between, on a log scale.
        points: of the first look, refined afterwards.
    """

    def cost(eps: float) -> float:
        return n * eps - log_weight_fn(eps)

    grid = [0.0, *(least * (most / least) ** (i / (points - 1)) for i in range(points))]
    costs = [cost(eps) for eps in grid]
    best = min(range(len(grid)), key=costs.__getitem__)
    if best == 0:
        return Bound(costs[0], 0.0)
    low, high = max(grid[best - 1], least / 10), grid[min(best + 1, points)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section on the log scale
        a, b = (math.exp(math.log(high) - s * (math.log(high) - math.log(low))) for s in (ratio, 1 - ratio))
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    eps = min((grid[best], math.sqrt(low * high)), key=cost)
    return Bound(cost(eps), eps)


def cumulative_log_loss(log_probs: Tensor, log_prior: Tensor) -> Tensor:
    """Code length of the Bayes mixture after each sample of a stream: -log sum_h w_h prod_i p_h(y_i|x_i).

    Args:
        log_probs: of every hypothesis for every sample, ``[hypotheses, n]``.
        log_prior: ``[hypotheses]``, of sum 1.

    Returns:
        ``[n]``, in nats.
    """
    return -(log_probs.cumsum(1) + log_prior[:, None]).logsumexp(0)


def inverse_temperature(n: int) -> float:
    """N beta = N / log N."""
    return n / math.log(n)


@torch.no_grad()
def chain_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    centre: Sequence[Tensor],
    n_beta: float,
    gamma: float,
    step_size: float,
    *key: int | str,
) -> None:
    """One step of SGLD around `centre`, in place.

    Args:
        gradients: of the mean loss; None for 0.
        key: of the noise.
    """
    for weight, gradient, middle in zip(weights, gradients, centre, strict=True):
        pull = (weight - middle).mul_(gamma / n_beta)
        weight.sub_(pull if gradient is None else pull.add_(gradient), alpha=step_size)
    add_noise_(weights, math.sqrt(2 * step_size / n_beta), *key)


def learning_coefficient(excess: float, n_beta: float) -> float:
    """lambda from how far above l(theta*) the losses of the chain are on average."""
    return n_beta * excess


def log_sphere_area(dim: int) -> float:
    """log of the area of the unit sphere in so many dimensions: 2 pi^(d/2) / Gamma(d/2)."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def log_ray_mass(radius: float, along: float, square: float, dim: int, prior_std: float, points: int = 4001) -> float:
    """log of the integral from 0 to r of w(theta + t u) t^(d-1) dt, w the Gaussian prior.

    Args:
        radius: r.
        along, square: theta . u and |theta|^2.
        dim: d.
        prior_std: s of w.
        points: of the trapezoid rule, spread over where the integrand is.
    """
    if radius <= 0:
        return -math.inf
    variance = prior_std**2
    mode = (-along + math.sqrt(along**2 + 4 * (dim - 1) * variance)) / 2
    top = min(radius, max(mode, 0.0))
    curvature = 1 / variance + ((dim - 1) / top**2 if top > 0 and dim > 1 else 0.0)
    slope = (dim - 1) / top - (top + along) / variance if top > 0 and dim > 1 else 0.0
    width = 1 / max(slope, math.sqrt(curvature))
    t = torch.linspace(max(0.0, top - 40 * width), min(radius, top + 40 * width), points, dtype=torch.float64)
    power = torch.zeros_like(t) if dim == 1 else (dim - 1) * t.log()
    logs = power - (square + 2 * along * t + t.square()) / (2 * variance)
    logs[0] += math.log(0.5)
    logs[-1] += math.log(0.5)
    mass = float(logs.logsumexp(0)) + math.log(float(t[1] - t[0]))
    return mass - dim / 2 * math.log(2 * math.pi * variance)


def log_star_weight(
    radii: Sequence[float], alongs: Sequence[float], square: float, dim: int, prior_std: float
) -> float:
    """log W from the radii of a star, each with theta . u of its direction; see :func:`log_ray_mass`."""
    rays = [log_ray_mass(r, a, square, dim, prior_std) for r, a in zip(radii, alongs, strict=True)]
    return log_sphere_area(dim) + float(torch.tensor(rays, dtype=torch.float64).logsumexp(0)) - math.log(len(rays))


def reach(divergence: Callable[[float], float], eps: float, start: float) -> float:
    """The radius at which a divergence that grows along a ray reaches eps: bracketed by doubling, then by bisection.

    Args:
        divergence: of a radius; 0 at 0.
        start: a guess.

    Returns:
        a radius just inside; the last one that was tried where none is outside.
    """
    inside, outside = 0.0, start
    for _ in range(DOUBLINGS):
        if divergence(outside) > eps:
            break
        inside, outside = outside, 2 * outside
    else:
        return inside
    for _ in range(HALVINGS if inside else DOUBLINGS):
        middle = (inside + outside) / 2
        if divergence(middle) > eps:
            outside = middle
        else:
            inside = middle
        if inside and outside / inside < 1 + 2**-HALVINGS:
            break
    return inside


def log_probabilities(logits: Tensor) -> Tensor:
    """fp64 ``[n, classes]`` of logits ``[n, classes]``, or ``[n, 1]`` where one tells two classes apart."""
    z = logits.double()
    return torch.cat([F.logsigmoid(-z), F.logsigmoid(z)], 1) if z.shape[1] == 1 else z.log_softmax(1)


def words(
    steps: Sequence[int], values: Mapping[str, Sequence[float]], eps: float, n: int, classes: int, parameters: int
) -> str:
    """What weights of a solution, measured at steps, say about it.

    Args:
        values: `neg_log_w` at each, and `llc` where that was the method.
        eps: radius that they belong to.
        n: training samples.
        classes: of the task.
        parameters: that train.
    """
    now, guessing = values["neg_log_w"][-1], math.log(classes)
    found = f"-log W({eps:g}) is about {now:.3g} nats at step {steps[-1]}"
    if "llc" in values:
        found += (
            f" (learning coefficient {values['llc'][-1]:.3g}; a regular model of {parameters} parameters would have"
            f" {parameters / 2:g})"
        )
    bound = eps + max(now, 0.0) / n
    said = f"{found}: by the bound {n} samples cost at most {bound:.2g} nats of regret each, guessing {guessing:.2g}. "
    if bound < guessing / 2:
        said += "The solution is simple for so many samples."
    elif bound < guessing:
        said += "So many samples are just enough for a solution of this weight; more would help."
    else:
        need = math.ceil(max(now, 0.0) / max(guessing / 2 - eps, 1e-9))
        said += f"The bound vouches for nothing: a solution of this weight asks for some {need} samples."
    before = [(step, value) for step, value in zip(steps[:-1], values["neg_log_w"]) if step]
    if before:
        step, value = before[0]
        change = "grew more complex" if now > value * 1.1 else "grew simpler" if now < value * 0.9 else "hardly changed"
        said += f" It {change} since step {step} ({value:.3g})."
    return said


# -- the callback ----------------------------------------------------------------------------------------------------


class HypothesisWeightMonitor(Monitor):
    """Estimate how simple a classifier's solution is by the prior mass around it, and whether the data are enough.

    Logs ``weight/neg_log_w`` (-log W(eps), in nats) and ``weight/llc`` (the local learning coefficient; method 'llc')
    or ``weight/radius`` (the median one of a star; method 'star'). At the end `verdict` says in words whether the
    training set is large enough for a solution of this weight, over a picture in the run's log folder. It measures in
    eval mode and full precision, on `n_probe` training samples that are drawn once.

    Args:
        eps: KL radius, in nats.
        method: 'llc' or 'star'.
        n_probe: training samples to measure on.
        n_draws: steps of the chain (llc), or directions (star).
        prior_std: of the Gaussian prior, for 'star'.
        gamma: restoring force of the chain, for 'llc'.
        step_size: eta of the chain.
        every_n_steps: measure after every so many optimizer steps too.
        geometric_steps: measure after steps 0, 1, 2, 3, 5, 10, 20, 30, 50, ...
        budget: add at most this share to the run's work, counted in forward passes, and leave out what is more; None
            for no limit.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; before the first step for data that are not read by index, fewer than three
            training samples, a loss that cannot be seen or does not classify, and manual optimization.
    """

    paper = Paper(
        "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
        "M. Feder, R. Urbanke, Y. Fogel",
        2025,
        "https://arxiv.org/abs/2506.07661",
    )
    does = "Estimates the prior mass around a solution, and says whether the data are enough for one so complex."
    use_when = "You compare solutions of one architecture, or wonder whether a network is simple enough for its data."
    costs = "600 passes over a batch a measurement (llc), held to a share of the run."
    log_prefix = "weight"
    ylabel = "nats"

    def __init__(
        self,
        eps: float = 0.01,
        method: Literal["llc", "star"] = "llc",
        n_probe: int = 512,
        n_draws: int = 200,
        prior_std: float = 0.2,
        gamma: float = 100.0,
        step_size: float = 0.005,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        budget: float | None = 0.1,
        criterion: str | int | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        self.eps, self.method, self.n_probe, self.n_draws, self.prior_std = eps, method, n_probe, n_draws, prior_std
        self.gamma, self.step_size = gamma, step_size
        self.every_n_steps, self.geometric_steps = every_n_steps, geometric_steps
        self.budget, self.criterion, self.draw = budget, criterion, draw
        self.check_moments()
        check_argument(0 < eps < 1, self, "eps", eps, "in (0, 1), nats")
        check_argument(method in ("llc", "star"), self, "method", method, "'llc' or 'star'")
        check_argument(n_probe >= 3, self, "n_probe", n_probe, "at least 3")
        check_argument(n_draws >= 2, self, "n_draws", n_draws, "at least 2")
        for name, value in (("prior_std", prior_std), ("step_size", step_size)):
            check_argument(0 < value < math.inf, self, name, value, "positive and finite")
        check_argument(0 <= gamma < math.inf, self, "gamma", gamma, "at least 0 and finite")
        self._classes = self._parameters = 0
        self._size = 0  # of the training set

    # -- before the first step -----------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if plan.fitting:
            check_observable(plan.module, self)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._size = samples_at_hand(trainer).total
        if self._size < 3 * rank_and_world()[1]:
            raise RecipeError(f"needs at least 3 training samples on each rank; there are {self._size}")
        probe = self._probe(trainer)
        with apart(trainer, "HypothesisWeightMonitor", "try"):
            few = range(min(2 * rank_and_world()[1], self._size))
            for batch, _ in samples_of(probe.loader, chosen=few):
                self._classes = decide(trainer, as_a_step_gets_it(trainer, batch), 0, self.criterion).classes
        self._parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if self.method == "star":
            self.limit(
                "the volume of a star is a lower bound that may be far off in many dimensions; compare runs of one"
                " architecture by it, and nothing else"
            )

    def _probe(self, trainer: pl.Trainer) -> Samples:
        """As many samples on each rank."""
        samples, world = samples_at_hand(trainer), rank_and_world()[1]
        most = min(self.n_probe, samples.total) // world * world
        return samples_of(samples.loader, chosen=some_of(samples.total, most, "HypothesisWeightMonitor"))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def forwards(self, trainer: pl.Trainer) -> int:
        probe = self._probe(trainer)
        if self.method == "star":
            return probe.total * (1 + self.n_draws * (HALVINGS + 8))
        batch = min(probe.loader.batch_size * rank_and_world()[1], probe.total)
        return probe.total + TRAINED * self.n_draws * batch

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, float]:
        probe = self._probe(trainer)
        own = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        with apart(trainer, "HypothesisWeightMonitor", full_precision=True):
            batches = [as_a_step_gets_it(trainer, batch) for batch, _ in probe]
            with _elsewhere(module, own) as moved:
                look = self._chain if self.method == "llc" else self._star
                return look(trainer, module, batches, own, moved)

    def _chain(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Sequence[Any],
        own: Mapping[str, Tensor],
        moved: Mapping[str, Parameter],
    ) -> dict[str, float]:
        n_beta, weights, centre = inverse_temperature(self._size), list(moved.values()), list(own.values())
        at_rest = [self._loss(trainer, module, batch, k).detach() for k, batch in enumerate(batches)]
        excess, counted = torch.zeros((), dtype=torch.float64, device=module.device), 0
        for draw in range(self.n_draws):
            k = draw % len(batches)
            loss = self._loss(trainer, module, batches[k], k)
            if 2 * draw >= self.n_draws:
                excess += (loss.detach() - at_rest[k]).double()
                counted += 1
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            all_mean_([g for g in found if g is not None])
            where = "HypothesisWeightMonitor", trainer.global_step, draw
            chain_step_(weights, found, centre, n_beta, self.gamma, self.step_size, *where)
        mean = float(all_sum(excess)) / rank_and_world()[1] / counted
        llc = learning_coefficient(mean, n_beta)
        if not math.isfinite(mean) or mean > math.log(self._classes):
            self.limit(
                f"the chain ran away from the solution (its loss rose by {mean:.3g}); step_size={self.step_size:g} is"
                " too large for this network, or gamma too small"
            )
        elif mean < 0:
            self.limit(
                "the chain found lower losses than where it began: the weights were not at a minimum, and the"
                " coefficient is not one"
            )
        return {"llc": llc, "neg_log_w": llc * math.log(1 / self.eps)}

    def _loss(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> Tensor:
        return observe(trainer, module, batch, number, self.criterion).loss

    def _star(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Sequence[Any],
        own: Mapping[str, Tensor],
        moved: Mapping[str, Parameter],
    ) -> dict[str, float]:
        def predictions() -> list[Tensor]:
            return [log_probabilities(decide(trainer, b, k, self.criterion).logits) for k, b in enumerate(batches)]

        here, weights, centre = predictions(), list(moved.values()), list(own.values())
        square = float(global_norm(centre).double().square())
        dim = sum(p.numel() for p in centre)
        radii: list[float] = []
        alongs: list[float] = []
        for draw in range(self.n_draws):
            direction = [torch.zeros_like(p) for p in centre]
            add_noise_(direction, 1.0, "HypothesisWeightMonitor", "star", trainer.global_step, draw)
            torch._foreach_div_(direction, float(global_norm(direction)))

            def divergence(r: float, direction: list[Tensor] = direction) -> float:
                with torch.no_grad():
                    torch._foreach_copy_(weights, centre)
                    torch._foreach_add_(weights, direction, alpha=r)
                sums = torch.zeros(2, dtype=torch.float64, device=module.device)
                for p, q in zip(here, predictions(), strict=True):
                    sums[0] += (p.exp() * (p - q)).sum()
                    sums[1] += len(p)
                total, count = all_sum(sums).tolist()
                return total / count if math.isfinite(total) else math.inf

            radii.append(reach(divergence, self.eps, radii[-1] if radii and radii[-1] else 0.1))
            alongs.append(float(sum((p * u).double().sum() for p, u in zip(centre, direction))))
        weight = log_star_weight(radii, alongs, square, dim, self.prior_std)
        return {"neg_log_w": -weight, "radius": sorted(radii)[len(radii) // 2]}

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def conclude(self) -> str:
        history = self.history
        return words(history.steps, history.values, self.eps, self._size, self._classes, self._parameters)

    def picture(self, path: Path, title: str) -> None:
        self.history.draw(path, title, self.ylabel, log_x=self.geometric_steps, names=("neg_log_w", "llc"))


@contextmanager
def _elsewhere(module: pl.LightningModule, own: Mapping[str, Tensor]) -> Iterator[dict[str, Parameter]]:
    """Copies of these parameters in the module, to be moved about; its own come back untouched."""
    copies = {name: Parameter(value.clone()) for name, value in own.items()}
    with wearing(module, copies):
        yield copies

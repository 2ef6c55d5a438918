"""The bar distribution against the card's numbers, scipy and integrals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.modules.bar_distribution import BarDistribution, quantile_borders

BORDERS, PROBABILITIES = torch.tensor([-1.0, 0.0, 1.0, 3.0]), torch.tensor([0.2, 0.5, 0.3])
LOGITS = PROBABILITIES.log() + 1.7  # a constant makes no difference


def bars(full_support: bool, dtype: torch.dtype = torch.float64) -> BarDistribution:
    return BarDistribution(BORDERS.to(dtype), full_support)


def of(y: list[float]) -> Tensor:
    return torch.tensor(y, dtype=torch.float64)


def random_bars(full_support: bool) -> tuple[BarDistribution, Tensor]:
    generator = torch.Generator().manual_seed(0)
    borders = torch.rand(12, generator=generator, dtype=torch.float64).cumsum(0) - 3
    return BarDistribution(borders, full_support), torch.randn(11, generator=generator, dtype=torch.float64)


# -- numbers by hand -------------------------------------------------------------------------------------------------


def test_the_bounded_distribution_has_the_numbers_of_the_card() -> None:
    bar, logits = bars(False), LOGITS.double()
    nll = bar(logits.expand(4, 3), of([-0.5, 0.5, 2, 3]))
    assert nll.tolist() == pytest.approx([1.609438, 0.693147, 1.897120, 1.897120], abs=1e-6)
    assert bar.mean(logits).item() == pytest.approx(0.75)
    assert bar.median(logits).item() == pytest.approx(0.6)
    assert bar.ei(logits, 0.5).item() == pytest.approx(0.5125)
    assert bar.quantile(logits, 0.682).tolist() == pytest.approx([-0.205, 1.94])
    assert bar.mode(logits).item() == pytest.approx(0.5)


def test_the_distribution_with_full_support_has_the_numbers_of_the_card() -> None:
    bar, logits = bars(True), LOGITS.double()
    nll = bar(logits.expand(5, 3), of([-0.5, 0.5, 2, -5, 10]))
    assert nll.tolist() == pytest.approx([2.285895, 0.693147, 2.573577, 7.915733, 7.122941], abs=1e-6)
    assert bar.mean(logits).item() == pytest.approx(1.023178, abs=1e-6)


def test_borders_stand_at_quantiles() -> None:
    assert quantile_borders(torch.arange(12.0), 3).tolist() == [0, 3.5, 7.5, 11]
    shuffled = torch.tensor([5.0, 1, 4, 0, 3, 2, 99])  # the last is one too many
    assert quantile_borders(shuffled.view(1, 7), 3).tolist() == [0, 1.5, 3.5, 5]
    with pytest.raises(RecipeError, match="num_buckets must be at least 2 and at most the 4 values; got 5"):
        quantile_borders(torch.arange(4.0), 5)


def test_a_target_on_a_border_belongs_to_the_bucket_below_it_and_the_least_to_the_first() -> None:
    assert bars(True).bucket(of([-9, -1, -0.5, 0, 0.1, 1, 3, 9])).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


# -- against scipy and against integrals -----------------------------------------------------------------------------


def test_without_tails_it_is_scipys_histogram_distribution() -> None:
    bar, logits = random_bars(False)
    theirs = stats.rv_histogram((logits.softmax(0).numpy(), bar.borders.numpy()), density=False)
    y = torch.linspace(-2.9, float(bar.borders[-1]) - 0.01, 57, dtype=torch.float64)
    y = y[y > bar.borders[0]]
    spread = logits.expand(len(y), -1)
    assert np.allclose(bar(spread, y), -theirs.logpdf(y), atol=1e-12)
    assert np.allclose(bar.cdf(spread, y), theirs.cdf(y), atol=1e-12)
    q = torch.linspace(0, 1, 41, dtype=torch.float64)
    assert np.allclose(bar.icdf(logits.expand(41, -1), q), theirs.ppf(q), atol=1e-12)
    assert bar.mean(logits).item() == pytest.approx(theirs.mean(), abs=1e-12)
    assert bar.variance(logits).item() == pytest.approx(theirs.var(), abs=1e-12)
    assert bar.entropy(logits).item() == pytest.approx(float(theirs.entropy()), abs=1e-9)
    assert bar.cdf(logits.expand(2, -1), of([-100, 100])).tolist() == [0, 1]


def test_the_tails_are_scipys_half_normals() -> None:
    bar, logits = bars(True), LOGITS.double()
    left, right = stats.halfnorm(scale=1 / stats.norm.ppf(0.75)), stats.halfnorm(scale=2 / stats.norm.ppf(0.75))
    for y in (-7.0, -1.5, -0.2):
        assert bar(logits, of([y])[0]).item() == pytest.approx(-math.log(0.2) - left.logpdf(-y))
        assert bar.cdf(logits, of([y])[0]).item() == pytest.approx(0.2 * left.sf(-y))
    for y in (1.1, 3.5, 12.0):
        assert bar(logits, of([y])[0]).item() == pytest.approx(-math.log(0.3) - right.logpdf(y - 1))
        assert bar.cdf(logits, of([y])[0]).item() == pytest.approx(0.7 + 0.3 * right.cdf(y - 1))
    assert bar.icdf(logits, 0.1).item() == pytest.approx(-left.isf(0.5))
    assert bar.icdf(logits, 1e-9).item() == pytest.approx(-left.isf(5e-9))
    assert bar.icdf(logits, 0.85).item() == pytest.approx(1 + right.ppf(0.5))
    assert bar.icdf(logits, 0.1).item() == pytest.approx(-1), "half of the outer bucket lies within its width"


@pytest.mark.parametrize("full_support", [False, True])
def test_every_quantity_is_the_integral_of_the_density(full_support: bool) -> None:
    bar, logits = random_bars(full_support)
    reach = 40.0 if full_support else 0.0
    edges = bar.borders.clone()
    edges[0], edges[-1] = edges[0] - reach, edges[-1] + reach
    grid = torch.cat([torch.linspace(float(a) + 1e-9, float(b), 40001, dtype=torch.float64) for a, b in
                      itertools.pairwise(edges)])  # fmt: skip
    density = (-bar(logits.expand(len(grid), -1), grid)).exp()

    def integral(values: Tensor) -> float:
        return float(torch.trapezoid(values, grid))

    best = 0.5 * float(bar.borders[0] + bar.borders[-1])
    mean = integral(grid * density)
    assert integral(density) == pytest.approx(1, abs=1e-6)
    assert bar.mean(logits).item() == pytest.approx(mean, abs=1e-5)
    assert bar.variance(logits).item() == pytest.approx(integral((grid - mean) ** 2 * density), abs=1e-4)
    assert bar.entropy(logits).item() == pytest.approx(integral(-density * density.clamp_min(1e-300).log()), abs=1e-5)
    for level in (best, float(bar.borders[0]) + 0.1, float(bar.borders[-1]) - 0.1, float(bar.borders[0]) - 1, 9.0):
        up, down = integral((grid - level).clamp_min(0) * density), integral((level - grid).clamp_min(0) * density)
        assert bar.ei(logits, level).item() == pytest.approx(up, abs=1e-5)
        assert bar.ei(logits, level, maximize=False).item() == pytest.approx(down, abs=1e-5)


@pytest.mark.parametrize("full_support", [False, True])
def test_quantiles_invert_the_distribution_function(full_support: bool) -> None:
    bar, logits = random_bars(full_support)
    q = torch.linspace(0.001, 0.999, 499, dtype=torch.float64)
    spread = logits.expand(499, -1)
    assert torch.allclose(bar.cdf(spread, bar.icdf(spread, q)), q, atol=1e-9)


def test_the_mode_with_tails_is_where_the_density_is_highest() -> None:
    bar = bars(True)
    steep = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64).log()
    assert bar.mode(steep).item() == 0, "the left tail is highest where it begins"
    assert bar.mode(LOGITS.double()).item() == 0.5


def test_a_uniform_softmax_over_quantile_borders_is_the_distribution_of_the_sample() -> None:
    """Its mean likelihood is near the entropy of what was sampled."""
    sample = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    bar = BarDistribution(quantile_borders(sample[:100_000], 1000))
    nll = bar(torch.zeros(100_000, 1000), sample[100_000:]).mean().item()
    assert nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.01)


def test_draws_follow_the_distribution() -> None:
    bar, logits = random_bars(True)
    drawn = bar.sample(logits.expand(4000, -1), torch.Generator().manual_seed(0))
    theirs = stats.kstest(drawn.numpy(), lambda y: bar.cdf(logits.expand(len(y), -1), torch.tensor(y)).numpy())
    assert theirs.pvalue > 0.01


# -- as a head and loss ----------------------------------------------------------------------------------------------


def test_it_is_a_head_and_loss_for_any_regressor() -> None:
    """y = 2 x + noise: trained by its loss, the mean follows the line."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 1, generator=generator) * 2 - 1
    y = 2 * x[:, 0] + 0.1 * torch.randn(512, generator=generator)
    bar = BarDistribution(quantile_borders(y, 20))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, bar.num_outputs))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(150):
        loss = bar(net(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (bar.mean(net(x)) - 2 * x[:, 0]).square().mean().sqrt()
    assert error < 0.12
    interval = bar.quantile(net(x), 0.9)
    inside = ((interval[:, 0] <= y) & (y <= interval[:, 1])).float().mean()
    assert inside > 0.88
    assert (interval[:, 1] - interval[:, 0]).mean() < 0.7, "of targets between -2 and 2"


def test_half_precision_logits_give_the_likelihood_of_narrow_buckets() -> None:
    borders = torch.linspace(0, 1e-3, 10_001)  # widths of 1e-7, 0 in half precision
    bar = BarDistribution(borders)
    nll = bar(torch.zeros(2, 10_000, dtype=torch.bfloat16), torch.tensor([2e-4, 5.5e-4]))
    assert nll.tolist() == pytest.approx([math.log(1e-3)] * 2, abs=0.02)


@pytest.mark.parametrize(
    ("borders", "says"),
    [
        ([0.0, 2.0, 1.0, 3.0], "borders must ascend; got 2 before 1 at index 2"),
        ([0.0, 1.0], r"borders must be at least 3 numbers, for 2 buckets; got shape \(2,\)"),
        ([0.0, 1.0, 1.0, 2.0], "borders must differ, or a bucket has no width; got 1 twice from index 1 on"),
        ([0.0, math.nan, 1.0], "borders must be finite; got 1 that are not"),
    ],
)
def test_borders_that_make_no_buckets_are_refused(borders: list[float], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        BarDistribution(borders)


def test_a_target_beyond_a_bounded_support_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"targets from -2 to 5 reach beyond the borders -1 and 3.*full_support=True"):
        bars(False)(LOGITS.double().expand(3, 3), of([-2, 0, 5]))
    with pytest.raises(RecipeError, match=r"q must be a probability in \[0, 1\]; got 1.5"):
        bars(True).icdf(LOGITS.double(), 1.5)

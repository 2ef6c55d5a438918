"""The prior mass around a hypothesis: the bound on regret, both estimates, and what the monitor says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from scipy.stats import chi2, ncx2, norm
from torch import nn

from lightning_recipes.callbacks import HypothesisWeightMonitor
from lightning_recipes.callbacks.regularization.hypothesis_weight import (
    chain_step_,
    cumulative_log_loss,
    inverse_temperature,
    learning_coefficient,
    log_probabilities,
    log_ray_mass,
    log_sphere_area,
    log_star_weight,
    reach,
    regret_bound,
    words,
)
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, loader, quiet, samples

# -- the bound: y ~ N(theta, 1), prior N(0, 1), KL = (theta - theta0)^2 / 2 --------------------------------------------


def log_weight(theta0):
    def of(eps):
        r = math.sqrt(2 * eps)
        mass = norm.cdf(theta0 + r) - norm.cdf(theta0 - r)
        return math.log(mass) if mass > 0 else -math.inf

    return of


def exact_regret(theta0, n):
    return (math.log(n + 1) - n / (n + 1) + n * theta0**2 / (n + 1)) / 2


def test_the_weight_of_a_gaussian_mean_is_a_difference_of_two_normal_probabilities():
    assert math.exp(log_weight(0.0)(0.02)) == pytest.approx(0.158519, abs=1e-6)
    assert -log_weight(0.0)(0.02) == pytest.approx(1.841878, abs=1e-6)


@pytest.mark.parametrize(
    ("theta0", "n", "regret", "bound"),
    [(0.0, 100, 1.8125, 3.0300), (1.0, 100, 2.3076, 3.5284), (0.0, 1000, 2.9549, 4.1798)],
)
def test_the_bound_lies_above_the_exact_regret_of_a_gaussian_mean(theta0, n, regret, bound):
    found = regret_bound(log_weight(theta0), n)
    assert exact_regret(theta0, n) == pytest.approx(regret, abs=1e-4)
    assert found.regret == pytest.approx(bound, abs=1e-4) and found.regret > regret
    if (theta0, n) == (0.0, 100):
        assert found.eps == pytest.approx(0.00498, abs=1e-5)


def test_a_ball_of_radius_0_with_mass_bounds_the_regret_for_every_n():
    for n in (1, 100, 10**6):
        assert regret_bound(lambda eps: math.log(0.25), n) == (pytest.approx(math.log(4)), 0.0)


def test_a_singular_model_costs_its_learning_coefficient_times_log_n():
    bounds = [regret_bound(lambda eps: 3 * math.log(eps) if eps else -math.inf, n).regret for n in (10**3, 10**5)]
    assert bounds[1] - bounds[0] == pytest.approx(3 * math.log(100), abs=1e-4)
    assert bounds[0] == pytest.approx(3 + 3 * math.log(1000 / 3), abs=1e-4)


def test_the_code_length_of_the_mixture_is_the_marginal_likelihood():
    theta = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    prior = (-theta.square() / 2).log_softmax(0)
    y = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_probs = -(y[None] - theta[:, None]).square() / 2 - math.log(2 * math.pi) / 2
    found = cumulative_log_loss(log_probs, prior)
    for n in (1, 10, 100):
        some = y[:n]
        square = some.square().sum() - some.sum() ** 2 / (n + 1)
        expected = (n * math.log(2 * math.pi) + math.log(n + 1) + square) / 2
        assert found[n - 1].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_mixture_pays_at_most_the_prior_of_any_hypothesis():
    draws = torch.Generator().manual_seed(0)
    log_probs = torch.rand(5, 40, generator=draws, dtype=torch.float64).log()
    prior = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64).log()
    found = cumulative_log_loss(log_probs, prior)
    assert (found[None] + log_probs.cumsum(1) <= -prior[:, None] + 1e-9).all()


# -- the chain ---------------------------------------------------------------------------------------------------------


def test_the_inverse_temperature_is_n_over_its_logarithm():
    assert inverse_temperature(100) == pytest.approx(100 / 4.60517, rel=1e-6)
    assert learning_coefficient(0.25, 20.0) == 5.0


@pytest.mark.parametrize("gamma", [0.0, 30.0])
def test_the_chain_finds_half_a_dimension_each_less_what_the_force_takes(gamma):
    n_beta, h, eta, dim = 40.0, 2.0, 0.02, 20_000
    w, centre = torch.ones(dim), torch.ones(dim)
    for step in range(200):
        chain_step_([w], [h * (w - centre)], [centre], n_beta, gamma, eta, "chain", step)
    stiff = h + gamma / n_beta
    variance = 2 * eta / n_beta / (1 - (1 - eta * stiff) ** 2)
    assert (w - centre).double().square().mean().item() == pytest.approx(variance, rel=0.04)
    found = learning_coefficient((h * (w - centre).double().square() / 2).sum().item(), n_beta) / dim
    assert found == pytest.approx(n_beta * h / 2 * variance, rel=0.04)
    assert found == pytest.approx(0.5 * n_beta * h / (n_beta * h + gamma), rel=0.08), "half of each, in small steps"


def test_without_a_gradient_the_force_alone_holds_the_chain():
    w, centre = torch.full((3,), 2.0), torch.zeros(3)
    chain_step_([w], [None], [centre], 10.0, 5.0, 1e-12, "a")
    assert torch.allclose(w, torch.full((3,), 2.0), atol=1e-5)
    chain_step_([w], [None], [centre], 1e12, 1e12, 0.25, "a")
    assert torch.allclose(w, torch.full((3,), 1.5), atol=1e-4)


# -- the star ----------------------------------------------------------------------------------------------------------


def test_the_sphere_has_the_area_that_it_has():
    assert [math.exp(log_sphere_area(d)) for d in (1, 2, 3)] == pytest.approx([2, 2 * math.pi, 4 * math.pi])


def test_a_star_around_a_gaussian_mean_has_its_weight():
    assert math.exp(log_star_weight([0.2, 0.2], [0.0, 0.0], 0.0, 1, 1.0)) == pytest.approx(0.158519, abs=1e-6)
    off_centre = norm.cdf(1.2) - norm.cdf(0.8)
    assert math.exp(log_star_weight([0.2, 0.2], [1.0, -1.0], 1.0, 1, 1.0)) == pytest.approx(off_centre, rel=1e-5)


@pytest.mark.parametrize(("dim", "radius", "std"), [(2, 0.3, 1.0), (3, 5.0, 1.0), (50, 1.0, 0.2), (2000, 9.0, 0.2)])
def test_a_ball_around_0_has_the_mass_of_the_chi_square_law(dim, radius, std):
    found = log_star_weight([radius], [0.0], 0.0, dim, std)
    assert found == pytest.approx(chi2.logcdf((radius / std) ** 2, dim), rel=1e-4, abs=1e-4)


def test_a_ball_beside_0_has_the_mass_of_the_law_that_is_not_central():
    draws = torch.Generator().manual_seed(0)
    u = F.normalize(torch.randn(4000, 4, generator=draws, dtype=torch.float64), dim=1)
    theta = torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)
    found = log_star_weight([0.6] * 4000, (u @ theta).tolist(), float(theta @ theta), 4, 0.5)
    assert math.exp(found) == pytest.approx(ncx2.cdf((0.6 / 0.5) ** 2, 4, float(theta @ theta) / 0.25), rel=0.02)


def test_ten_million_parameters_do_no_harm():
    found = log_ray_mass(10.0, 0.3, 4e5, 10**7, 0.2)
    assert math.isfinite(found) and log_ray_mass(0.0, 0.0, 0.0, 3, 1.0) == -math.inf
    assert log_ray_mass(20.0, 0.3, 4e5, 10**7, 0.2) - found == pytest.approx(1e7 * math.log(2), rel=1e-3)


@pytest.mark.parametrize("start", [1e-6, 0.2, 50.0])
def test_the_radius_is_where_the_divergence_reaches_eps(start):
    assert reach(lambda r: r**2 / 2, 0.02, start) == pytest.approx(0.2, rel=3e-4)
    assert reach(lambda r: math.inf if r > 3 else 0.0, 0.02, start) == pytest.approx(3, rel=3e-4)


def test_a_ray_along_which_nothing_changes_goes_on():
    assert reach(lambda r: 0.0, 0.02, 1.0) >= 2.0**39


def test_one_logit_is_two_classes():
    found = log_probabilities(torch.tensor([[0.0], [2.0]]))
    assert found.exp()[:, 1].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert log_probabilities(torch.tensor([[1.0, 2.0]])).exp().sum().item() == pytest.approx(1)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_verdict_says_whether_the_data_are_enough():
    many = words([0, 100, 1000], {"neg_log_w": [1.0, 40.0, 60.0], "llc": [0.2, 9.0, 13.0]}, 0.01, 300, 10, 4810)
    assert "-log W(0.01) is about 60 nats at step 1000 (learning coefficient 13; a regular model of 4810" in many
    assert "would have 2405): by the bound 300 samples cost at most 0.21 nats of regret each, guessing 2.3" in many
    assert "simple for so many samples. It grew more complex since step 100 (40)." in many
    few = words([1000], {"neg_log_w": [600.0]}, 0.01, 300, 10, 4810)
    assert "just enough" in few and "llc" not in few and "since" not in few
    none = words([10, 1000], {"neg_log_w": [9000.0, 6000.0]}, 0.01, 300, 10, 4810)
    assert "vouches for nothing: a solution of this weight asks for some 5258 samples. It grew simpler" in none


class Logistic(LightningModule):
    """Two inputs and two classes: six parameters, of which a softmax sees three."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0)


def noisy_data(n=200):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=draws)
    return x, (torch.rand(n, generator=draws) < torch.sigmoid(x[:, 0] - x[:, 1])).long()


def fit(module, monitor, data, **settings):
    quiet(callbacks=[monitor], **settings).fit(module, data)
    return monitor


def test_a_regular_model_has_half_its_effective_parameters():
    torch.manual_seed(0)
    monitor = HypothesisWeightMonitor(n_draws=1000, gamma=0.0, step_size=0.5, every_n_steps=10**6,
                                      geometric_steps=False, budget=None)  # fmt: skip
    fit(Logistic(), monitor, loader(*noisy_data(), size=200), max_epochs=60)
    values = monitor.history.values
    assert monitor.history.steps == [0, 60]
    assert values["llc"][1] == pytest.approx(1.5, abs=0.45)
    assert values["neg_log_w"][1] == pytest.approx(values["llc"][1] * math.log(100))
    assert "simple for so many samples" in monitor.verdict


def test_a_flatter_solution_weighs_more_by_the_star():
    found = {}
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        module = Logistic()
        with torch.no_grad():
            module.net.weight.copy_(torch.tensor([[-0.5, 0.5], [0.5, -0.5]]) * scale)
            module.net.bias.zero_()
        monitor = HypothesisWeightMonitor(method="star", n_draws=12, every_n_steps=10**6, geometric_steps=False,
                                          budget=None, prior_std=3.0)  # fmt: skip
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        fit(module, monitor, loader(*noisy_data(), size=200))
        found[scale] = monitor.history.values["neg_log_w"][-1]
        assert monitor.history.values["radius"][-1] > 0
        assert "compare runs of one architecture" in monitor.verdict and len(monitor.limits) == 1
    # KL = z^2 p (1 - p) / 2 along z: sure predictions are flat, and their weights lie where the prior is thin
    assert all(0 < value < 60 for value in found.values()) and found[1.0] != found[8.0]


def test_a_chain_that_runs_away_says_so():
    x, y = samples(32)
    monitor = HypothesisWeightMonitor(n_draws=20, step_size=500.0, gamma=0.0, budget=None, every_n_steps=100,
                                      geometric_steps=False)  # fmt: skip
    fit(Classifier(), monitor, loader(x, y))
    assert "ran away from the solution" in monitor.verdict


def test_measurements_that_the_budget_does_not_allow_are_left_out():
    x, y = samples(32)
    monitor = fit(Classifier(), HypothesisWeightMonitor(n_draws=2, n_probe=8, budget=0.5), loader(x, y), max_epochs=4)
    assert monitor.left_out > 0 and 0 < monitor.spent <= 0.5 and monitor.history.steps


def test_what_cannot_be_measured_is_refused():
    x, y = samples(32)

    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())

    with pytest.raises(RecipeError, match="HypothesisWeightMonitor: needs a classification loss"):
        fit(Regression(), HypothesisWeightMonitor(), loader(x, y))
    with pytest.raises(RecipeError, match="needs at least 3 training samples on each rank; there are 2"):
        fit(Classifier(), HypothesisWeightMonitor(), loader(x[:2], y[:2]))

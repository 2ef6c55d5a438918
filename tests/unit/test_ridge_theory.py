"""Ridge regression's errors from a spectrum: the eigenframework's limits and numbers, and what a training set tells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.ridge_theory import (
    Task,
    default_ridges,
    kernel_spectrum,
    krr_risk,
    optimal_fitting_ratio,
    relu_nngp,
    rf_risk,
    sweep,
    task_of,
)
from lightning_recipes.core.spectrum import spectrum, spectrum_of_kernel

I = torch.arange(1, 2001, dtype=torch.float64)  # noqa: E741
LAM, V = I**-1.5, I**-0.75

# -- from a spectrum to the errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "test", "train"),
    [
        (256, 64, 1.14393, 0.67511),
        (256, 256, 1.05661, 0.22709),
        (256, 1024, 0.91584, 0.11295),
        (64, 256, 1.25189, 0.05778),
    ],
)
def test_errors_of_random_features_on_a_power_law(n: int, k: int, test: float, train: float) -> None:
    found = rf_risk(LAM, V, n, k, 0.1, 0.5)
    assert float(found.test) == pytest.approx(test, abs=6e-6)
    assert float(found.train) == pytest.approx(train, abs=6e-6)


def test_what_the_eigenframework_has_on_the_way() -> None:
    found = rf_risk(LAM, V, 256, 64, 0.1, 0.5)
    expected = {"kappa": 5.08479e-4, "gamma": 6.97571e-3, "z": 59.3349, "q": 21.5786}
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=2e-6)
    assert float(found.z + 0.1 / found.kappa) == pytest.approx(256, rel=1e-10)
    assert float(found.z + 64 * found.kappa / found.gamma) == pytest.approx(64, rel=1e-10)


def test_errors_of_the_kernel_on_a_power_law() -> None:
    found = krr_risk(LAM, V, 256, 0.1, 0.5)
    assert float(found.test) == pytest.approx(0.863588, abs=6e-7)
    assert float(found.train) == pytest.approx(0.087859, abs=6e-7)
    assert float(found.kappa) == pytest.approx(1.224672e-3, rel=1e-6)
    assert float(256 / (256 - found.q)) == pytest.approx(1.375181, rel=1e-6)


def test_very_many_features_are_the_kernel() -> None:
    ridges = torch.logspace(-1, 2, 7, dtype=torch.float64)
    kernel = krr_risk(LAM, V, 256, ridges, 0.5)
    for k, rel in ((1e7, 1e-5), (math.inf, 1e-12)):
        found = rf_risk(LAM, V, 256, k, ridges, 0.5)
        assert found.test.tolist() == pytest.approx(kernel.test.tolist(), rel=rel)
        assert found.train.tolist() == pytest.approx(kernel.train.tolist(), rel=3 * rel)


def test_one_eigenvalue_has_a_closed_form() -> None:
    """n = 1 / (1 + kappa) + d / kappa is a quadratic equation."""
    n, d = 3.0, 0.7
    found = rf_risk(torch.ones(1), torch.ones(1), n, math.inf, d)
    b = n - 1 - d
    kappa = (-b + math.sqrt(b * b + 4 * n * d)) / (2 * n)
    assert float(found.kappa) == pytest.approx(kappa, rel=1e-12)
    learned = 1 / (1 + kappa)
    assert float(found.test) == pytest.approx(n / (n - learned**2) * (1 - learned) ** 2, rel=1e-10)


def test_an_infinite_ridge_learns_nothing() -> None:
    found = rf_risk(LAM, V, 50, 20, 1e12, 0.5)
    assert float(found.test) == pytest.approx(float(V.square().sum()) + 0.5, rel=1e-8)
    assert float(found.train / found.test) == pytest.approx(1, rel=1e-8)


@pytest.mark.parametrize(
    ("n", "k"), [(64, 256), (256, 64), (64, math.inf), (3000, math.inf), (3000, 2500), (2500, 100)]
)
def test_no_ridge_is_the_limit_of_a_small_one(n: int, k: float) -> None:
    none, small = (rf_risk(LAM, V, n, k, d, 0.5) for d in (0.0, 1e-11))
    for name in ("test", "train"):
        assert float(getattr(none, name)) == pytest.approx(float(getattr(small, name)), rel=1e-4, abs=1e-9), name


def test_fewer_parameters_than_samples_is_least_squares() -> None:
    """Noise adds p / n for every sample that is left over."""
    found = rf_risk(torch.ones(20), torch.ones(20), 100, math.inf, 0.0, 0.5)
    assert float(found.test) == pytest.approx(0.5 / (1 - 0.2))
    assert float(found.train) == pytest.approx(0.5 * (1 - 0.2))


def test_the_best_ridge_makes_more_of_everything_better() -> None:
    lam, v, ridges = LAM, V, torch.logspace(-3, 2, 31, dtype=torch.float64)
    widths = [float(rf_risk(lam, v, 64, k, ridges, 0.5).test.min()) for k in (16, 32, 64, 128, 512, 4096)]
    assert widths == pytest.approx([1.551, 1.364, 1.241, 1.165, 1.093, 1.068], abs=3e-3)
    assert widths == sorted(widths, reverse=True)
    samples = [float(rf_risk(lam, v, n, 256, ridges, 0.5).test.min()) for n in (16, 64, 256, 1024)]
    assert samples == pytest.approx([1.544, 1.119, 0.882, 0.757], abs=3e-3)
    small = [float(rf_risk(lam, v, 64, k, 1e-3, 0.5).test) for k in (16, 32, 64, 128, 512, 4096)]
    assert small == pytest.approx([1.78, 2.16, 9.64, 2.06, 1.31, 1.20], abs=6e-3)


def test_order_and_scale_of_the_eigenvalues_change_nothing() -> None:
    shuffled = torch.randperm(len(LAM), generator=torch.Generator().manual_seed(0))
    one, other = rf_risk(LAM, V, 64, 32, 0.1, 0.5), rf_risk(3 * LAM[shuffled], V[shuffled], 64, 32, 0.3, 0.5)
    assert float(one.test) == pytest.approx(float(other.test), rel=1e-10)
    several = rf_risk(LAM, torch.stack([V, 2 * V], 1), 64, 32, 0.1)
    assert float(several.test) == pytest.approx(5 * float(rf_risk(LAM, V, 64, 32, 0.1).test), rel=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eigvals": torch.tensor([1.0, -1e-3])}, "none of them negative; got -0.001 to 1"),
        ({"coeffs": torch.ones(3)}, r"coeffs must be one for each of the 2 eigvals; got \(3,\)"),
        ({"n": 0.5}, "n must be at least 1 and finite; got 0.5"),
        ({"n": math.inf}, "n must be at least 1 and finite; got inf"),
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"ridge": -1.0}, "ridge must be at least 0 and finite; got -1"),
        ({"noise_var": -0.5}, "noise_var must be at least 0; got -0.5"),
        (
            {"n": 1, "k": 1, "ridge": 0.0},
            "n = k = 1 with ridge 0: the risk diverges at the interpolation threshold; give a",
        ),
        ({"n": 2, "ridge": 0.0}, "n = the number of eigenvalues = 2 with ridge 0"),
    ],
)
def test_what_has_no_risk_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"eigvals": torch.tensor([1.0, 0.5]), "coeffs": torch.ones(2), "n": 4, "k": 9, "ridge": 0.1}
    with pytest.raises(RecipeError, match=message):
        rf_risk(**{**arguments, **change})


def test_negative_rounding_of_an_eigenvalue_is_zero() -> None:
    one, other = (rf_risk(torch.tensor([1.0, x]), torch.ones(2), 4, 9, 0.1) for x in (-1e-9, 0.0))
    assert float(one.test) == float(other.test)


@pytest.mark.parametrize(
    ("alpha", "beta", "noise", "ratio"),
    [
        (1.17, 1.14, 0, 0.0240),
        (1.17, 1.14, 1, 0.3121),
        (1.17, 1.14, 5, 0.6905),
        (1.17, 1.14, 50, 0.9477),
        (1.12, 1.36, 0, 0.0),
        (1.12, 1.36, 1, 0.0),
        (1.12, 1.36, 5, 0.1875),
        (1.12, 1.36, 50, 0.7713),
        (1.5, 1.2, 0, 0.25),
    ],
)
def test_the_best_ratio_of_the_errors_on_power_laws(alpha: float, beta: float, noise: float, ratio: float) -> None:
    assert optimal_fitting_ratio(alpha, beta, noise) == pytest.approx(ratio, abs=6e-5)


def test_the_best_ratio_without_noise_has_a_closed_form() -> None:
    for alpha, beta in ((2.0, 1.5), (1.5, 1.2), (1.3, 1.9)):
        expected = max(0.0, (alpha - beta) / ((alpha - 1) * beta)) ** 2
        assert optimal_fitting_ratio(alpha, beta) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.2), (1.5, 1.0), (1.5, 4.0), (math.nan, 1.2)])
def test_exponents_outside_of_the_theorem_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(RecipeError, match="outside the power-law theorem"):
        optimal_fitting_ratio(alpha, beta)
    with pytest.raises(RecipeError, match="noise must be at least 0; got -1"):
        optimal_fitting_ratio(1.5, 1.2, -1)


def test_a_pool_gives_its_spectrum_and_coefficients() -> None:
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.ones(5, dtype=torch.float64)
    lam, v = kernel_spectrum(x @ x.T, y)
    assert torch.allclose(lam[:5].flip(0), torch.linalg.eigvalsh(x.T @ x / 40))
    assert bool((lam[5:].abs() < 1e-12).all())
    assert float(v.square().sum()) == pytest.approx(float(y.square().mean()))  # Parseval
    assert bool((v[5:].abs() < 1e-10).all())


# -- from a training set to the errors ---------------------------------------------------------------------------------


def features(n: int, k: int, seed: int = 0, modes: int = 3000, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Random features of the power law 1.5, and targets of 1.5."""
    draws = torch.Generator().manual_seed(seed)
    i = torch.arange(1, modes + 1, dtype=torch.float64)
    lam = i**-1.5
    x = torch.randn(n, modes, dtype=torch.float64, generator=draws)
    y = x @ i**-0.75 + noise**0.5 * torch.randn(n, dtype=torch.float64, generator=draws)
    h = x @ (lam.sqrt()[:, None] * torch.randn(modes, k, dtype=torch.float64, generator=draws)) / k**0.5
    return h, y[:, None]


@pytest.mark.parametrize(("n", "k", "centred"), [(60, 20, False), (20, 60, False), (60, 20, True), (20, 60, True)])
def test_cross_validation_has_two_forms_that_agree(n: int, k: int, centred: bool) -> None:
    h, y = features(n, k)
    found, ridges = spectrum(h, y, centred), torch.logspace(-3, 1, 5, dtype=torch.float64)
    swept, mean = sweep(found, ridges), int(centred)
    if centred:
        h, y = h - h.mean(0), y - y.mean(0)
    for d, test, train, kappa in zip(ridges, swept.test, swept.train, swept.kappa):
        smoother = h @ torch.linalg.solve(h.T @ h + d * torch.eye(k, dtype=torch.float64), h.T)
        off = float((y - smoother @ y).square().mean())
        assert float(train) == pytest.approx(off, rel=1e-9)
        free = n - mean - float(smoother.trace())
        assert float(test) == pytest.approx(off / (free / n) ** 2, rel=1e-9)
        assert float(test) == pytest.approx(float(train * (n * kappa / d) ** 2), rel=1e-10)
        if not centred:
            kernel = h @ h.T + d * torch.eye(n, dtype=torch.float64)
            assert float(kappa) == pytest.approx(1 / float(torch.linalg.inv(kernel).trace()), rel=1e-9)


def test_errors_of_several_targets_are_their_mean() -> None:
    h, y = features(40, 15)
    both, ridges = torch.cat([y, y.flip(0)], 1), torch.tensor([0.1, 1.0])
    swept, single = sweep(spectrum(h, both), ridges), [sweep(spectrum(h, each[:, None]), ridges) for each in both.T]
    assert torch.allclose(swept.test, (single[0].test + single[1].test) / 2)


def test_default_ridges_are_shares_of_the_kernels_diagonal() -> None:
    h, y = features(40, 15)
    ridges, diagonal = default_ridges(spectrum(h, y, centred=False)), float((h @ h.T).diagonal().mean())
    assert len(ridges) == 31
    assert [float(ridges[0]), float(ridges[-1])] == pytest.approx([1e-6 * diagonal, 1e2 * diagonal])


def best_of(n: float, k: float, noise: float = 0.5) -> float:
    i = torch.arange(1, 3001, dtype=torch.float64)
    return float(rf_risk(i**-1.5, i**-0.75, n, k, torch.logspace(-4, 2, 100, dtype=torch.float64), noise).test.min())


def tasks(n: int, k: int, seeds: int = 4) -> list[Task]:
    return [task_of(spectrum(*features(n, k, seed), centred=False), k) for seed in range(seeds)]


def test_a_task_foretells_what_it_was_read_from() -> None:
    """At its own n and k the forecast is cross-validation: nothing is lost on the way through gamma."""
    for n, k in ((256, 64), (128, 256)):
        found = spectrum(*features(n, k), centred=False)
        swept = sweep(found, torch.logspace(-2, 3, 400, dtype=torch.float64))
        best = task_of(found, k).best(n, k)
        at = int(swept.test.argmin())
        assert not best.beyond
        assert best.error == pytest.approx(float(swept.test[at]), rel=2e-3)
        assert best.train == pytest.approx(float(swept.train[at]), rel=0.1)
        assert math.log(best.ridge) == pytest.approx(math.log(float(swept.ridges[at])), abs=0.2)


@pytest.mark.parametrize(("n", "k"), [(256, 64), (64, 256), (200, 256), (512, 128)])
def test_what_other_numbers_of_samples_and_features_would_bring_is_near_the_theory(n: int, k: int) -> None:
    """On average over draws, from one training set each; to twice as many within 6 %, to half within 4 %."""
    found, now = tasks(n, k), best_of(n, k)
    for times_n, times_k, off in ((2, 1, 0.06), (1, 2, 0.06), (0.5, 1, 0.04), (1, 0.5, 0.04)):
        forecasts = [t.best(times_n * n, times_k * k).error / t.best(n, k).error for t in found]
        assert sum(forecasts) / len(forecasts) == pytest.approx(best_of(times_n * n, times_k * k) / now, abs=off)


def test_the_exponent_of_the_kernel_is_found_from_either_side() -> None:
    for n, k in ((256, 64), (64, 256), (256, 256)):
        found = [task.alpha for task in tasks(n, k)]
        assert sum(found) / len(found) == pytest.approx(1.5, abs=0.1)


def test_exponent_and_noise_of_the_target_where_there_are_samples_enough() -> None:
    found = tasks(1024, 512, 2)
    assert sum(t.beta for t in found) / 2 == pytest.approx(1.5, abs=0.25)
    assert sum(t.noise for t in found) / 2 == pytest.approx(0.5, abs=0.15)


def test_nothing_helps_against_pure_noise() -> None:
    h, _ = features(256, 128)
    y = torch.randn(256, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    task = task_of(spectrum(h, y, centred=False), 128)
    now = task.best(256, 128).error
    assert now == pytest.approx(float(y.square().mean()), rel=0.02)
    assert task.best(512, 128).error > 0.97 * now and task.best(256, 256).error > 0.97 * now


def test_features_that_do_not_vary_are_no_task() -> None:
    with pytest.raises(RecipeError, match="the features do not vary"):
        task_of(spectrum(torch.ones(10, 3), torch.rand(10, 1)), 3)


# -- the kernel of infinitely many ReLU features -----------------------------------------------------------------------


def test_the_relu_kernel_at_angles_that_are_known() -> None:
    """|x||x'| / (2 pi) times pi, 1 and 0."""
    x = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    found = relu_nngp(x)
    assert found.dtype == torch.float64
    assert float(found[0, 1]) == pytest.approx(7.5, rel=1e-14) and float(found[0, 0]) == pytest.approx(4.5, rel=1e-14)
    assert float(found[0, 2]) == pytest.approx(3 / math.pi, rel=1e-14)
    assert float(found[0, 3]) == pytest.approx(0.0, abs=1e-14) and not bool(found[4].any())
    assert torch.equal(found, found.T) and torch.allclose(relu_nngp(7 * x), 49 * found, rtol=1e-13, atol=1e-13)


def test_the_relu_kernel_is_the_mean_over_random_relu_features() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=draws, dtype=torch.float64)
    features = (x @ torch.randn(3, 200_000, generator=draws, dtype=torch.float64)).relu()
    products = features[:, None] * features
    error = products.std(-1) / 200_000**0.5
    off = (products.mean(-1) - relu_nngp(x)) / error
    assert float(off.abs().max()) < 4 and 0.3 < float(off.square().mean()) < 3


def test_what_random_relu_features_come_to_is_forecast_from_their_kernel() -> None:
    """The best errors of 16 to 512 features, on a function of which 200 samples are known: within 20 %."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 5, generator=draws, dtype=torch.float64)
    y = (x[:, :1] * 2).tanh() * x[:, 1:2] + 0.1 * torch.randn(1200, 1, generator=draws, dtype=torch.float64)
    kernel = relu_nngp(x)
    task = task_of(spectrum_of_kernel(kernel[:200, :200], y[:200], centred=False), math.inf)
    measured = []
    for k in (16, 64, 512):
        errors = []
        for _ in range(4):
            h = (x @ torch.randn(5, k, generator=draws, dtype=torch.float64)).relu() / k**0.5
            values, vectors = torch.linalg.eigh(h[:200].T @ h[:200])
            along = vectors.T @ (h[:200].T @ y[:200])
            fits = [h[200:] @ (vectors @ (along / (values + d)[:, None])) for d in torch.logspace(-4, 2, 25).tolist()]
            errors.append(min(float((fit - y[200:]).square().mean()) for fit in fits))
        measured.append(sum(errors) / 4)
        assert task.best(200, k).error == pytest.approx(measured[-1], rel=0.2), k
    assert measured[0] > 1.2 * measured[1] > 1.2 * measured[2]


@pytest.mark.parametrize("centred", [True, False])
def test_both_forms_of_cross_validation_agree_for_a_kernel(centred: bool) -> None:
    """E_train (n kappa / d)^2 with kappa = 1 / tr (K + d)^-1, and |y - S y|^2 / n over (1 - tr S / n)^2."""
    draws = torch.Generator().manual_seed(0)
    x, n = torch.randn(60, 8, generator=draws, dtype=torch.float64), 60
    y = x[:, :2] + 0.3 * torch.randn(n, 2, generator=draws, dtype=torch.float64)
    one = torch.eye(n, dtype=torch.float64)
    # With a mean that is fitted too, in the n - 1 directions beside it.
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), one[:, 1:]], 1))[0][:, int(centred) :]
    for kernel in (relu_nngp(x), x @ x.T + 1):
        ridges = default_ridges(spectrum_of_kernel(kernel, y, centred))[15:]  # an inverse is rounding at smaller ones
        found = sweep(spectrum_of_kernel(kernel, y, centred), ridges)
        inside, target = basis.T @ kernel @ basis, basis.T @ y
        for i, d in enumerate(ridges.tolist()):
            inverse = torch.linalg.inv(inside + d * torch.eye(len(inside), dtype=torch.float64))
            off = target - inside @ inverse @ target
            train = off.square().sum() / (2 * n)
            first = train * (n * (1 / inverse.trace()) / d) ** 2
            second = train / ((len(inside) - (inside @ inverse).trace()) / n) ** 2
            assert float(first) == pytest.approx(float(second), rel=1e-10)
            assert float(found.test[i]) == pytest.approx(float(first), rel=1e-10)
            assert float(found.train[i]) == pytest.approx(float(train), rel=1e-10)

"""GeneralizationMonitor: the theory of linear networks against closed forms, quadrature and simulation; what it reads
off a run; and that it leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_recipes.callbacks import GeneralizationMonitor
from lightning_recipes.callbacks.diagnostics.generalization_dynamics import words
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.linear_dynamics import (
    Law,
    complexity,
    edges,
    empirical,
    expected_test_error,
    expected_train_error,
    final_test_error,
    flow_time,
    frozen_share,
    left,
    marchenko_pastur,
    mode_weights,
    more_data,
    optimal_stopping_time,
    outside_share,
    overtraining,
    ridge_test_error,
    signal_and_noise,
    stable_rate,
)
from lightning_recipes.core.spectrum import spectrum
from lightning_recipes.datamodules import DigitsDataModule, StudentTeacherDataModule
from lightning_recipes.modules import LinearStudent
from lightning_recipes.modules.linear_student import true_test_error
from tests.stock import Classifier, Watch, loader, quiet, same, weights

SNR = 5.0
HALF, ONE, TWO = (marchenko_pastur(alpha) for alpha in (0.5, 1.0, 2.0))

# -- the theory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_the_law_has_its_mass_its_mean_and_its_edges(alpha: float) -> None:
    law = marchenko_pastur(alpha)
    bulk = law.values > 0
    assert float(law.mass.sum()) == pytest.approx(1)
    assert float(law.mass[bulk].sum()) == pytest.approx(min(1, alpha))
    assert float((law.mass * law.values).sum()) == pytest.approx(alpha)
    low, high = edges(alpha)
    assert float(law.values[bulk].min()) == pytest.approx(low, abs=1e-5)
    assert float(law.values.max()) == pytest.approx(high, abs=1e-5)


def test_the_law_is_that_of_random_features() -> None:
    x = torch.randn(800, 400, generator=torch.Generator().manual_seed(0)) / 400**0.5
    found = empirical(spectrum(x, centred=False).eigenvalues, 400)
    for t in (0.5, 3.0, 20.0):
        expected = float(expected_test_error(t, TWO, SNR, 1.0))
        assert float(expected_test_error(t, found, SNR, 1.0)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("alpha", "snr", "inr", "t", "test", "train"),
    [(0.5, 5.0, 1.0, 1.0, 4.964137, 0.982981), (2.0, 1.0, 0.0, 2.0, 1.582061, 0.534626)],
)
def test_errors_at_a_time_by_quadrature(
    alpha: float, snr: float, inr: float, t: float, test: float, train: float
) -> None:
    law = marchenko_pastur(alpha)
    assert float(expected_test_error(t, law, snr, inr)) == pytest.approx(test, abs=1e-6)
    assert float(expected_train_error(t, law, alpha, snr, inr)) == pytest.approx(train, abs=1e-6)


def test_errors_before_the_start_and_without_end() -> None:
    for law, alpha in ((HALF, 0.5), (TWO, 2.0)):
        for inr in (0.0, 1.0, 5.0):
            assert float(expected_test_error(0.0, law, SNR, inr)) == pytest.approx(1 + SNR + inr, abs=1e-12)
            end = float(expected_test_error(math.inf, law, SNR, inr))
            assert end == pytest.approx(final_test_error(alpha, SNR, inr), abs=1e-6)
    assert [final_test_error(0.5, SNR, inr) for inr in (0, 1, 5)] == [4.5, 5.0, 7.0]
    assert [final_test_error(2.0, SNR, inr) for inr in (0, 1, 5)] == [2.0] * 3
    assert final_test_error(1.0, SNR) == math.inf
    assert float(expected_test_error(1e5, ONE, SNR)) == pytest.approx(209.5, abs=0.1)
    assert float(expected_train_error(math.inf, HALF, 0.5, SNR, 1.0)) == pytest.approx(0, abs=1e-9)
    assert float(expected_train_error(math.inf, TWO, 2.0, SNR, 1.0)) == pytest.approx(0.5)


def test_training_error_before_the_start_is_that_of_new_samples() -> None:
    """Its samples' noise and signal are those of any others: 1 + SNR + INR."""
    for law, alpha in ((HALF, 0.5), (ONE, 1.0), (TWO, 2.0)):
        assert float(expected_train_error(0.0, law, alpha, SNR, 1.0)) == pytest.approx(1 + SNR + 1.0, abs=1e-6)


def test_without_a_signal_the_error_only_grows() -> None:
    times = torch.logspace(-2, 4, 50)
    errors = expected_test_error(times, TWO, 0.0, 0.0)
    assert float(expected_test_error(0.0, TWO, 0.0)) == 1
    assert bool((errors.diff() > -1e-12).all()) and float(errors[-1]) == pytest.approx(2.0)
    assert optimal_stopping_time(TWO, 0.0) == 0


def test_equal_eigenvalues_have_a_closed_form() -> None:
    value, t = 1.7, 0.9
    law = empirical(torch.full((6,), value), 6)
    d = math.exp(-value * t)
    assert float(expected_test_error(t, law, SNR, 0.5)) == pytest.approx(1 + (SNR + 0.5) * d**2 + (1 - d) ** 2 / value)
    d = (1 - value * t / 4) ** 4
    discrete = expected_test_error(t, law, SNR, 0.5, steps=4)
    assert float(discrete) == pytest.approx(1 + (SNR + 0.5) * d**2 + (1 - d) ** 2 / value)


def test_frozen_directions_keep_their_start_for_ever() -> None:
    law = empirical(torch.tensor([2.0, 1.0, 1e-9]), 5, tolerance=1e-6)
    assert float(law.mass[law.values == 0].sum()) == pytest.approx(3 / 5)
    assert float(expected_test_error(math.inf, law, SNR, 1.0)) == pytest.approx(1 + (3 * 6 + 1 / 2 + 1) / 5)
    assert frozen_share(0.04, law) == pytest.approx(1), "l t below 0.1 everywhere"
    assert frozen_share(0.06, law) == pytest.approx(4 / 5)


def test_what_is_left_of_a_mode_by_the_flow_and_step_by_step() -> None:
    values = torch.tensor([0.0, 1e-12, 0.3, 2.0], dtype=torch.float64)
    assert left(torch.tensor([0.0, math.inf]), values).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert left(3.0, values)[2] == pytest.approx(math.exp(-0.9))
    assert left(3.0, values, steps=2).tolist() == pytest.approx([1, 1, (1 - 0.45) ** 2, (1 - 3.0) ** 2])
    assert left(3.0, values, steps=0).tolist() == [1] * 4
    assert left(3.0, values, steps=10**7)[2] == pytest.approx(math.exp(-0.9), rel=1e-6)


def test_modes_go_as_gradient_descent_goes() -> None:
    """Many small steps on the squared error of 4 samples of 6 features, in the coordinates of the modes."""
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, generator=draws, dtype=torch.float64)
    teacher, noise = torch.randn(6, generator=draws).double(), torch.randn(4, generator=draws).double()
    start = torch.randn(6, generator=draws).double()
    y, w = x @ teacher + noise, start.clone()
    for _ in range(20000):
        w = w - 1e-4 * x.T @ (x @ w - y)
    v, roots, u = torch.linalg.svd(x, full_matrices=True)
    values = torch.cat([roots.square(), torch.zeros(2)])
    along_v = torch.cat([v.T @ noise, torch.zeros(2)])
    found = mode_weights(2.0, values, u @ start, u @ teacher, along_v)
    assert torch.allclose(found, u @ w, atol=2e-3)
    assert torch.equal(found[4:], (u @ start)[4:])


@pytest.mark.parametrize(("alpha", "best", "when"), [(0.5, 4.1303, 2.707), (1.0, 2.8376, 3.067), (2.0, 1.7704, 2.394)])
def test_the_best_time_to_stop_and_its_error(alpha: float, best: float, when: float) -> None:
    law = marchenko_pastur(alpha)
    assert optimal_stopping_time(law, SNR) == pytest.approx(when, abs=1e-3)
    assert float(expected_test_error(when, law, SNR)) == pytest.approx(best, abs=1e-4)


def test_the_best_time_to_stop_is_longest_where_parameters_are_as_many_as_samples() -> None:
    found = [optimal_stopping_time(marchenko_pastur(alpha), SNR) for alpha in (0.25, 0.5, 1, 2, 4)]
    assert found == pytest.approx([2.28, 2.71, 3.07, 2.39, 1.33], abs=0.006)


def test_overtraining_vanishes_for_many_samples_and_is_worst_at_one() -> None:
    lost = [overtraining(300.0, marchenko_pastur(alpha), SNR) for alpha in (0.1, 0.5, 1, 2, 10)]
    assert max(lost) == lost[2] > 10 * max(lost[1], lost[3])
    assert lost[4] < 0.01 and lost[0] < 0.1
    assert overtraining(optimal_stopping_time(TWO, SNR), TWO, SNR) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("alpha", "error"), [(0.5, 4.1085), (1.0, 2.7913), (2.0, 1.7417)])
def test_the_best_ridge_is_little_better_than_stopping(alpha: float, error: float) -> None:
    law = marchenko_pastur(alpha)
    assert ridge_test_error(law, 1 / SNR, SNR) == pytest.approx(error, abs=1e-4)
    assert all(ridge_test_error(law, factor / SNR, SNR) > error for factor in (0.5, 2))


def test_time_of_steps_and_the_rate_at_which_they_diverge() -> None:
    assert flow_time(0.5, 100) == pytest.approx(0.01)
    assert flow_time(0.5, 100, loss_factor=1.0, momentum=0.9) == pytest.approx(0.05)
    rate = stable_rate(4.0, 100)
    assert rate == pytest.approx(25)
    assert abs(float(left(flow_time(rate, 100), torch.tensor([4.0]), steps=1))) == pytest.approx(1)


@pytest.mark.parametrize(("n", "p"), [(900, 450), (450, 900), (600, 600)])
def test_signal_and_noise_are_found_from_a_spectrum(n: int, p: int) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(n, p, generator=draws) / p**0.5
    teacher = SNR**0.5 * torch.randn(p, 8, generator=draws)
    y = x @ teacher + torch.randn(n, 8, generator=draws)
    signal, noise = signal_and_noise(spectrum(x, y))
    assert signal == pytest.approx(SNR, rel=0.15) and noise == pytest.approx(1.0, rel=0.2)
    _, only = signal_and_noise(spectrum(x, torch.randn(n, 8, generator=draws)))
    assert only == pytest.approx(1.0, rel=0.05)


def test_signal_without_noise_is_told() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(200, 50, generator=draws).double()
    signal, noise = signal_and_noise(spectrum(x, x @ torch.randn(50, 1, generator=draws).double(), centred=False))
    assert 0 < noise < 1e-5 * signal


def test_more_data_scale_the_eigenvalues_and_thaw_directions() -> None:
    law = Law(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.2, 0.2, 0.6]))
    doubled = more_data(law)
    assert doubled.values.tolist() == [4, 2, 0] and doubled.mass.tolist() == law.mass.tolist()
    thawed = more_data(law, short_of_samples=True)
    assert thawed.values.tolist() == [4, 2, 0, 1]
    assert thawed.mass.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4])
    for alpha in (0.25, 0.5, 1.0, 2.0):  # between the law and that with twice the samples
        law, richer = marchenko_pastur(alpha), marchenko_pastur(2 * alpha)
        found = more_data(law, short_of_samples=alpha < 1)
        best = [
            float(expected_test_error(optimal_stopping_time(each, SNR), each, SNR)) for each in (richer, found, law)
        ]
        assert best == sorted(best) and best[2] - best[1] > 0.25 * (best[2] - best[0])


def test_complexity_counts_weights_along_directions_that_are_not_frozen() -> None:
    x = torch.tensor([[3.0, 0, 0], [0, 2, 0]])
    found = complexity(torch.tensor([[3.0, 4.0, 100.0]]), spectrum(x, centred=False))
    assert found == pytest.approx(5 * math.sqrt(9 + 4) / 2)


# -- the frozen subspace -----------------------------------------------------------------------------------------------


def changed(optimizer: Any, steps: int = 50) -> float:
    """f_out of the first layer of an MLP 64-32-3 on 20 random points, in batches of 5."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 64), torch.randint(3, (20,))
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    start, solver = net[0].weight.detach().clone(), optimizer(net.parameters())
    for step in range(steps):
        some = torch.arange(5) + 5 * (step % 4)
        solver.zero_grad()
        F.cross_entropy(net(x[some]), y[some]).backward()
        solver.step()
    return outside_share(net[0].weight.detach() - start, spectrum(x, centred=False))


def test_plain_gradient_descent_does_not_leave_the_span_of_the_inputs() -> None:
    assert changed(lambda p: torch.optim.SGD(p, lr=0.1)) < 1e-5
    assert changed(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) < 1e-5


def test_weight_decay_and_adam_do() -> None:
    little = changed(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4))
    assert 1e-4 < little < 1e-2
    assert changed(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2)) > 0.03
    assert changed(lambda p: torch.optim.Adam(p, lr=1e-3)) > 0.1
    assert outside_share(torch.zeros(3, 4), spectrum(torch.rand(2, 4), centred=False)) == 0


# -- words -------------------------------------------------------------------------------------------------------------


def said(step: int = 100, index: bool = False, **changes: float) -> str:
    now = {"t": 2.0, "t_star": 4.0, "snr": 5.0, "pred_test_error": 3.0, "pred_best": 2.0, "pred_final": 5.0}
    now |= {"gain_data": 0.5, "gain_start": 0.0, "gain_ridge": 0.04} | changes
    return words(now, step, index)


def test_words_before_at_and_after_the_best_time() -> None:
    assert said() == (
        "Keep training to about step 200: the forecast of the test error falls from 3 to 2; overtraining without end"
        " would cost 3 (150 %). Twice the data would help most, by 0.5; more than the best weight decay (0.04), smaller"
        " first weights (0)."
    )
    assert "Stop now: the forecast of the test error is at its best (2.01, step 200)" in said(pred_test_error=2.01)
    after = said(400, t=8.0, pred_test_error=2.6, pred_final=50.0)
    assert after.startswith(
        "Stop now: the forecast of the test error was best at step 200 (2), and overtraining has cost 0.6 (30 %) since;"
        " without end it would cost more than ten times the best. Stopping in time would help most, by 0.6; more than"
        " twice the data (0.5)"
    )


def test_words_where_there_is_nothing_to_stop_for() -> None:
    assert said(pred_final=2.01, pred_test_error=2.005).startswith("Stop when you like: the forecast of the test error")
    assert said(t_star=math.inf, pred_final=2.0).startswith(
        "Keep training: the forecast of the test error falls from 3 to 2, and there is no overtraining. Twice"
    )
    assert said(t_star=0.0).startswith("Stop now: by the forecast of the test error nothing can be learnt")
    assert said(t=0.0).startswith("The readout has not moved by step 100")
    assert said(pred_test_error=math.nan).startswith("The features no longer vary")
    assert "the index of the test error falls" in said(index=True)


# -- on the run that the theory is of ----------------------------------------------------------------------------------


def student(
    alpha: float = 1.0, steps: int = 40, rate: float = 0.1, inr: float = 1.0, n: int = 200, **arguments: Any
) -> tuple[GeneralizationMonitor, LinearStudent, StudentTeacherDataModule]:
    """A student after so many steps, each `rate` of the theory's time."""
    data = StudentTeacherDataModule(n, alpha, SNR, seed=1, n_test=10)
    module = LinearStudent(n, inr**0.5, rate * data.samples / 2, seed=2)
    monitor = GeneralizationMonitor(**{"every_n_steps": 5, "geometric_steps": False, **arguments})
    quiet(callbacks=[monitor], max_epochs=steps, limit_val_batches=0).fit(module, datamodule=data)
    return monitor, module, data


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_monitor_forecasts_the_errors_of_a_student(alpha: float) -> None:
    monitor, module, data = student(alpha, n=400 if alpha < 1 else 200)
    now = {name: values[-1] for name, values in monitor.history.values.items()}
    assert monitor.limits == [], "this is the run that the theory is of"
    assert now["alpha"] == pytest.approx(alpha)
    assert now["t"] == pytest.approx(4.0, rel=0.05), "features as drawn have a scale of about 1"
    assert now["snr"] * now["noise"] == pytest.approx(SNR, rel=0.35 if alpha >= 1 else 0.5), "few samples say little"
    assert now["train_error"] == pytest.approx(now["pred_train_error"], rel=0.15)
    true = true_test_error(module.readout.weight.detach(), data.teacher)
    assert now["pred_test_error"] == pytest.approx(true, rel=0.15)
    assert now["frozen_frac"] == pytest.approx(max(0, 1 - alpha), abs=0.01)
    assert (now["mp_edge_lo"], now["mp_edge_hi"]) == edges(alpha)
    assert now["lambda_max"] == pytest.approx(now["mp_edge_hi"], rel=0.1)
    law = marchenko_pastur(alpha)
    best = float(expected_test_error(optimal_stopping_time(law, SNR, 1.0), law, SNR, 1.0))
    at_star = float(expected_test_error(now["t_star"], law, SNR, 1.0))
    assert at_star < 1.05 * best, "stopping at the time that was found costs next to nothing"
    assert now["outside_update"] < 1e-5
    assert "forecast of the test error" in monitor.verdict


def test_units_of_features_and_of_targets_change_no_figure_but_the_errors() -> None:
    """Features 10 times as large need weights a tenth and rates a hundredth; targets 3 times as large, errors 9."""

    def figures(large: float, high: float) -> dict[str, float]:
        data = StudentTeacherDataModule(80, 1.0, SNR, seed=1, n_test=10)
        data.setup()
        x, y = data.train_set.tensors
        data.train_set.tensors = (large * x, high * y)
        module = LinearStudent(80, high / large, 4.0 / large**2, seed=2)
        monitor = GeneralizationMonitor(every_n_steps=10, geometric_steps=False)
        quiet(callbacks=[monitor], max_epochs=10, limit_val_batches=0).fit(module, datamodule=data)
        return {name: values[-1] for name, values in monitor.history.values.items()}

    plain, other = figures(1.0, 1.0), figures(10.0, 3.0)
    for name in ("t", "t_star", "snr", "inr", "lambda_max", "alpha_eff"):
        assert other[name] == pytest.approx(plain[name], rel=1e-3), name
    for name in ("pred_test_error", "train_error", "noise", "pred_best", "gain_data"):
        assert other[name] == pytest.approx(9 * plain[name], rel=1e-3), name


def test_stop_ends_a_fit_past_the_best_time() -> None:
    monitor, _, _ = student(steps=200, n=100, stop=True, patience_factor=1.2, every_n_steps=10)
    star = monitor.history.values["t_star"][-1]
    assert 1.2 * star < monitor.history.values["t"][-1] < 1.2 * star + 0.21
    assert monitor.verdict.startswith("Stop now")
    went_on, _, _ = student(steps=60, n=100, every_n_steps=20)
    assert went_on.history.steps[-1] == 60


def test_a_probe_of_some_samples_scales_the_spectrum_and_says_so() -> None:
    monitor, _, _ = student(2.0, steps=5, probe_size=300)
    whole, _, _ = student(2.0, steps=5)
    for name in ("t", "t_star", "lambda_max"):
        assert monitor.history.values[name][-1] == pytest.approx(whole.history.values[name][-1], rel=0.2)
    assert "the spectrum is that of 300 of 400 samples, scaled up" in monitor.verdict


# -- on others' runs ---------------------------------------------------------------------------------------------------


class Regressor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def regression(n: int = 80) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=draws)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2], x[:, 3]], 1) + 0.1 * torch.randn(n, 3, generator=draws)


def fit(module: Any, monitor: GeneralizationMonitor, x: Tensor, y: Tensor, epochs: int = 2, **trainer: Any) -> Any:
    run = quiet(callbacks=[monitor], max_epochs=epochs, **trainer)
    run.fit(module, loader(x, y, size=16))
    return run


def test_what_is_not_as_the_theory_has_it_is_said() -> None:
    monitor = GeneralizationMonitor()
    momentum = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)  # noqa: E731
    run = fit(Regressor(optimizer=momentum), monitor, *regression())
    (said_first,) = monitor.limits[:1]
    for what in ("other layers train too", "weights decay (0.001)", "momentum (0.9)", "mini-batches"):
        assert what in said_first
    assert said_first.capitalize()[:40] in monitor.verdict
    values = monitor.history.values
    unit = values["t"][-1] / (10 * 0.05 / 0.1)
    assert unit == pytest.approx(monitor._unit) and run.callback_metrics["gd/t"] == pytest.approx(values["t"][-1])
    adam = GeneralizationMonitor()
    fit(Regressor(optimizer=torch.optim.Adam), adam, *regression(), epochs=1)
    assert "Adam is no plain gradient descent" in adam.limits[0]


def test_class_labels_give_an_index_and_no_forecast() -> None:
    x, _ = regression()
    y = torch.arange(80) % 3
    monitor = GeneralizationMonitor()
    fit(Classifier(), monitor, x, y)
    assert "the targets are class labels, so the figures are an index and no forecast" in monitor.verdict
    assert "train_error" not in monitor.history.values
    with pytest.raises(RecipeError, match="stop=True with class labels"):
        fit(Classifier(), GeneralizationMonitor(stop=True), x, y)
    fit(Classifier(), GeneralizationMonitor(stop=True, force=True), x, y)


def test_a_rate_at_which_gradient_descent_diverges_is_said() -> None:
    monitor, _, _ = student(steps=3, rate=0.7)
    assert any("plain gradient descent of the readout would diverge" in limit for limit in monitor.limits)


def test_the_first_layer_of_a_network_is_held_against_its_inputs() -> None:
    x, y = regression()
    x[:, 4:] = x[:, :2]  # rank 4 of 6
    plain, decayed = GeneralizationMonitor(), GeneralizationMonitor()
    fit(Regressor(), plain, x, y)
    fit(Regressor(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)), decayed, x, y)
    assert plain.history.values["outside_update"][0] == 0
    assert plain.history.values["outside_update"][-1] < 1e-5
    assert decayed.history.values["outside_update"][-1] > 0.01
    both = GeneralizationMonitor(track_frozen=["net.0", "net.2"])
    fit(Regressor(), both, x, y, epochs=1)
    assert {"outside_update/net.0", "outside_update/net.2"} <= both.history.values.keys()
    without = GeneralizationMonitor(track_frozen=None)
    fit(Regressor(), without, x, y, epochs=1)
    assert "outside_update" not in without.history.values


def test_features_that_die_in_mid_training_end_no_run() -> None:
    module, monitor = Regressor(), GeneralizationMonitor()
    with torch.no_grad():
        module.net[2].bias.fill_(2.0)

    def kill(trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step == 4:
            with torch.no_grad():
                pl_module.net[2].weight.zero_()
                pl_module.net[2].bias.fill_(-1.0)

    x, y = regression()
    run = quiet(callbacks=[Watch(on_train_batch_end=kill), monitor], max_epochs=2)
    run.fit(module, loader(x, y, size=16))
    assert run.global_step == 10 and math.isnan(monitor.history.values["pred_test_error"][-1])
    assert "the readout's inputs do not vary" in monitor.verdict


def test_the_run_is_the_same_to_the_bit_and_the_picture_is_there(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")

    def run(*callbacks: Any, **trainer: Any) -> Any:
        torch.manual_seed(5)
        module = Regressor(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.BatchNorm1d(5), nn.Linear(5, 3)))
        quiet(callbacks=list(callbacks), max_epochs=2, **trainer).fit(module, loader(*regression(), size=16))
        return weights(module), torch.get_rng_state()

    logger = CSVLogger(tmp_path)
    plain, watched = run(), run(GeneralizationMonitor(every_n_steps=1), logger=logger)
    assert same(plain[0], watched[0]) and torch.equal(plain[1], watched[1])
    assert (tmp_path / "lightning_logs" / "version_0" / "gd.png").stat().st_size > 1000


def test_pixels_that_are_the_same_in_all_digits_are_frozen_directions() -> None:
    class OnPixels(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))

    monitor = GeneralizationMonitor()
    quiet(callbacks=[monitor], limit_val_batches=0).fit(OnPixels(), datamodule=DigitsDataModule())
    now = {name: values[-1] for name, values in monitor.history.values.items()}
    assert 0 < now["frozen_frac"] < 0.2 and now["alpha_eff"] > now["alpha"] > 10
    assert "features are correlated" in monitor.verdict

"""MoreIsBetterMonitor and RidgeRefit: what a run's features come to, in figures and words, and what is written back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_recipes.callbacks import MoreIsBetterMonitor, RidgeRefit, SaRA
from lightning_recipes.callbacks.diagnostics.overparameterization import (
    DATA,
    NOISE,
    WIDTH,
    equivalent_ridge,
    limit_of,
    refitted,
    words,
)
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.ridge_theory import best_ridge, default_ridges, ridge_readout, sweep, trusted
from lightning_recipes.core.spectrum import spectrum
from lightning_recipes.datamodules import DigitsDataModule, GaussianRFDataModule
from lightning_recipes.modules import RandomFeatureRegressor
from tests.stock import Classifier, Watch, loader, quiet, same, weights


def some(n: int = 40, p: int = 7, k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, dtype=torch.float64, generator=draws) + 1
    return x, x[:, :k] + 0.3 * torch.randn(n, k, dtype=torch.float64, generator=draws)


# -- the maths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(40, 7), (7, 40)])
def test_ridge_regression_from_the_spectrum_is_that_of_the_normal_equations(n: int, p: int) -> None:
    x, y = some(n, p)
    for ridge in (0.1, 10.0):
        expected = torch.linalg.solve(x.T @ x + ridge * torch.eye(p, dtype=torch.float64), x.T @ y).T
        assert torch.allclose(ridge_readout(spectrum(x, y, centred=False), ridge), expected, atol=1e-9)
    least = ridge_readout(spectrum(x, y, centred=False), 0.0)
    assert torch.allclose(least, (torch.linalg.pinv(x) @ y).T, atol=1e-7)


def test_a_refitted_layer_with_a_bias_is_least_squares_with_an_intercept() -> None:
    x, y = some()
    head = refitted(spectrum(x, y), (x.mean(0), y.mean(0)), 1e-9)
    both = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    assert torch.allclose(head.weight, both[:-1].T, atol=1e-6) and torch.allclose(head.bias, both[-1], atol=1e-6)


def test_labels_zero_and_one_stand_for_a_sign() -> None:
    x, _ = some()
    y = (x[:, :1] > 1).double()
    ordinary, signs = (refitted(spectrum(x, y), (x.mean(0), y.mean(0)), 1.0, s) for s in (False, True))
    assert torch.allclose(signs(x), 2 * ordinary(x) - 1)


def test_the_ridge_with_a_training_error() -> None:
    found = spectrum(*some())
    swept = sweep(found, torch.tensor([0.5, 50.0]))
    for ridge, error in zip((0.5, 50.0), swept.train.tolist()):
        assert equivalent_ridge(found, error) == pytest.approx(ridge, rel=0.1)
    assert equivalent_ridge(found, 0.0) == 0
    assert equivalent_ridge(found, 1e6) == math.inf


def test_ridges_at_the_interpolation_threshold_are_not_relied_on() -> None:
    x, y = some(60, 60, 1)
    found = spectrum(x, y, centred=False)
    swept = sweep(found, default_ridges(found))
    reliable = trusted(found, swept, 60)
    assert not bool(reliable[0]) and bool(reliable[-1])
    assert bool(reliable[best_ridge(found, swept, 60)])
    few = spectrum(*some(60, 8, 1), centred=False)
    assert bool(trusted(few, sweep(few, default_ridges(few)), 8).all())


def test_what_limits_a_task() -> None:
    assert limit_of(1.0, 0.8, 0.9) == WIDTH
    assert limit_of(1.0, 0.95, 0.9) == DATA
    assert limit_of(1.0, 0.99, 0.985) == NOISE


# -- words -------------------------------------------------------------------------------------------------------------


def said(**changes: float) -> str:
    now = {"data_x1": 1.0, "width_x2": 0.8, "data_x2": 0.9, "limited_by": WIDTH, "pred_test_mse_best": 1.0}
    now |= {"best_ridge": 2.0, "train_mse_at_best": 0.3, **changes}
    return words(now)


def test_words_on_width_data_and_noise() -> None:
    assert said().startswith(
        "More width would help more than more data: twice the width would bring the forecast of the test error from 1"
        " to 0.8, twice the data to 0.9."
    )
    assert said().endswith(
        "A ridge head on these features is best at ridge 2, with a training error of 30 % of the test error."
    )
    more = said(limited_by=DATA, width_x2=0.95)
    assert more.startswith("More data would help more than more width: twice the data would bring")
    assert "from 1 to 0.9, twice the width to 0.95." in more
    assert said(limited_by=NOISE).startswith("Limited by noise: neither twice the width (0.8) nor twice the data (0.9)")
    assert said(data_x1=math.nan) == "The features no longer vary or are not finite: there is no forecast."


def test_words_on_the_regularisation_of_the_readout() -> None:
    own = {"train_mse": 0.5, "ridge_now": 20.0, "pred_test_mse_now": 1.2, "weight_decay": 0.01}
    over = said(**own)
    assert (
        "The readout is over-regularised, or has not trained long enough: its training error (0.5) is that of a ridge"
        " 10 times the best" in over
    )
    assert "which costs 20 %; the best ridge (2, a weight decay of 0.01 on the readout) leaves" in over
    assert "any ridge is below that" in said(**{**own, "ridge_now": math.inf})
    assert "The readout is under-regularised: " in said(**{**own, "ridge_now": 0.2})
    assert "The readout is regularised about right" in said(**{**own, "pred_test_mse_now": 1.01})


def test_words_on_a_kernel_that_stands_for_the_model() -> None:
    now = {"data_x1": 1.0, "data_x2": 0.9, "limited_by": DATA, "pred_test_mse_best": 0.9, "best_ridge": 2.0}
    now["train_mse_at_best"] = 0.3
    assert words(now, "ntk") == (
        "More data would help: twice the data would bring the forecast of the test error from 1 to 0.9. Ridge"
        " regression with the kernel ntk is best at ridge 2, with a training error of 33 % of the test error."
    )
    assert words({**now, "limited_by": NOISE, "data_x2": 0.99}, "ntk").startswith(
        "Limited by noise: not even twice the data (0.99) would bring the forecast of the test error (1) down by as"
        " much as 2 %; what is left is noise, or nothing that such a kernel can say."
    )
    wide = words({**now, "width_x2": 0.8, "limited_by": WIDTH}, "relu_nngp")
    assert wide.startswith("More width would help more than more data: twice the width would bring") and (
        "Ridge regression with the kernel relu_nngp is best" in wide
    )


# -- the monitor on runs that the theory is of -------------------------------------------------------------------------


def looked_at(n: int, k: int, ridge: float = 1.0, seed: int = 0, **arguments: Any) -> MoreIsBetterMonitor:
    data = GaussianRFDataModule(n_modes=2000, n=n, k=k, seed=seed, n_test=10)
    monitor = MoreIsBetterMonitor(**arguments)
    quiet(callbacks=[monitor], limit_val_batches=0).fit(RandomFeatureRegressor(k, ridge), datamodule=data)
    return monitor


def last(monitor: MoreIsBetterMonitor) -> dict[str, float]:
    return {name: values[-1] for name, values in monitor.history.values.items()}


def test_few_features_and_many_samples_want_width_and_the_other_way_round() -> None:
    few, many = looked_at(512, 32), looked_at(64, 512)
    assert last(few)["limited_by"] == WIDTH and few.verdict.startswith("More width would help more than more data")
    assert last(many)["limited_by"] == DATA and many.verdict.startswith("More data would help more than more width")
    (only,) = few.limits  # this is the run that the theory is of
    assert only.startswith("what twice the width or the data would bring lies beyond what these samples tell")
    assert last(few)["width_xinf"] < last(few)["width_x4"] < last(few)["width_x2"] < last(few)["width_x1"]
    assert last(few)["width_x1"] == last(few)["data_x1"] == pytest.approx(last(few)["pred_test_mse_best"])


def test_the_readouts_own_ridge_is_found_from_its_training_error() -> None:
    for ridge in (0.05, 1.0, 50.0):
        monitor = looked_at(256, 64, ridge, every_n_steps=1)
        assert last(monitor)["ridge_now"] == pytest.approx(ridge, rel=0.15)
    assert (
        "over-regularised" in monitor.verdict
        and last(monitor)["pred_test_mse_now"] > 1.05 * last(monitor)["pred_test_mse_best"]
    )
    now = last(monitor)
    assert now["weight_decay"] == pytest.approx(2 * now["best_ridge"] / 256)
    assert now["fit_ratio"] == pytest.approx(now["train_mse_at_best"] / now["pred_test_mse_best"])
    assert now["fit_ratio_now"] > now["fit_ratio"]


def test_weight_decay_of_that_size_trains_to_the_best_ridge() -> None:
    """Gradient descent on the mean of squares with that decay ends where the ridge head is."""
    x, y = some(80, 6, 2)
    found = spectrum(x, y, centred=False)
    ridge = 3.0
    layer = nn.Linear(6, 2, bias=False).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(layer(x), y) + 2 * ridge / (80 * 2) / 2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.allclose(layer.weight, ridge_readout(found, ridge), atol=1e-6)


def test_a_probe_of_some_samples_forecasts_for_all_and_says_so() -> None:
    monitor, whole = looked_at(512, 64, probe_size=256), looked_at(512, 64)
    assert "it was measured on 256 of 512 samples" in monitor.limits[0]
    assert last(monitor)["data_x1"] < last(monitor)["pred_test_mse_best"]
    assert last(monitor)["data_x1"] == pytest.approx(last(whole)["data_x1"], rel=0.25)
    assert math.isnan(last(monitor)["ridge_now"]) and "A ridge head on these features is best" in monitor.verdict


def test_scales_of_features_and_targets_change_the_units_alone() -> None:
    def figures(large: float, high: float) -> dict[str, float]:
        data = GaussianRFDataModule(n_modes=500, n=128, k=32, n_test=10)
        data.setup()
        x, y = data.train_set.tensors
        data.train_set.tensors = (large * x, high * y)
        monitor = MoreIsBetterMonitor()
        module = RandomFeatureRegressor(32, large**2)
        quiet(callbacks=[monitor], limit_val_batches=0).fit(module, datamodule=data)
        return last(monitor)

    plain, other = figures(1.0, 1.0), figures(10.0, 3.0)
    for name in ("alpha", "beta", "fit_ratio", "limited_by"):
        assert other[name] == pytest.approx(plain[name], rel=1e-2), name
    for name in ("pred_test_mse_best", "width_x2", "data_x2", "train_mse"):
        assert other[name] == pytest.approx(9 * plain[name], rel=1e-2), name
    assert other["best_ridge"] == pytest.approx(100 * plain["best_ridge"], rel=1e-4)


def test_exponents_can_be_left_out_and_ridges_be_given() -> None:
    monitor = looked_at(128, 32, estimate_exponents=False, ridges=[1.0, 0.1], what_if_k=[3], what_if_n=[])
    now = last(monitor)
    assert not {"alpha", "beta", "noise", "fit_ratio_opt"} & now.keys()
    assert {"width_x2", "width_x3", "data_x1", "data_x2"} == {n for n in now if n.startswith(("width_", "data_"))}
    assert len(monitor._curves["ridges"]) == 2
    assert now["best_ridge"] in monitor._curves["ridges"]


# -- on others' runs ---------------------------------------------------------------------------------------------------


class Regressor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def wide(p: int = 30, out: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, p), nn.ReLU(), nn.Linear(p, out))


def regression(n: int = 80) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=draws)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2], x[:, 3]], 1) + 0.1 * torch.randn(n, 3, generator=draws)


def fit(module: Any, callback: Any, x: Tensor, y: Tensor, epochs: int = 2, **trainer: Any) -> Any:
    run = quiet(callbacks=[callback], max_epochs=epochs, **trainer)
    run.fit(module, loader(x, y, size=16))
    return run


def test_what_is_not_as_the_theory_has_it_is_said() -> None:
    monitor = MoreIsBetterMonitor()
    run = fit(Regressor(wide()), monitor, *regression())
    assert "other layers train too and have seen the labels" in monitor.limits[0]
    assert run.callback_metrics["mib/best_ridge"] == pytest.approx(last(monitor)["best_ridge"])
    assert monitor.limits[0][1:40] in monitor.verdict
    x, _ = regression()
    labels = MoreIsBetterMonitor()
    fit(Classifier(wide()), labels, x, torch.arange(80) % 3)
    assert "the targets are class labels" in labels.limits[0]
    assert "train_mse" not in labels.history.values and "A ridge head on these features" in labels.verdict
    huber = MoreIsBetterMonitor()

    class Huber(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.huber_loss(self(batch[0]), batch[1])

    fit(Huber(wide()), huber, *regression())
    assert "the loss is not the mean of squares" in huber.limits[0]


def test_half_precision_features_are_warned_of() -> None:
    monitor = MoreIsBetterMonitor()
    fit(Regressor(wide()), monitor, *regression(), epochs=1, precision="bf16-true")
    assert any("half precision" in limit for limit in monitor.limits)
    mixed = MoreIsBetterMonitor()
    fit(Regressor(wide()), mixed, *regression(), epochs=1, precision="bf16-mixed")
    assert not any("half precision" in limit for limit in mixed.limits), "the probe is read in full precision"


def test_features_that_die_in_mid_training_end_no_run() -> None:
    module, monitor = Regressor(wide()), MoreIsBetterMonitor()

    def kill(trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step == 4:
            with torch.no_grad():
                pl_module.net[0].weight.zero_()
                pl_module.net[0].bias.fill_(-1.0)

    x, y = regression()
    run = quiet(callbacks=[Watch(on_train_batch_end=kill), monitor], max_epochs=2)
    run.fit(module, loader(x, y, size=16))
    assert run.global_step == 10 and math.isnan(monitor.history.values["data_x1"][-1])
    assert "the features do not vary" in monitor.verdict and "there is no forecast" in monitor.verdict


def test_the_run_is_the_same_to_the_bit_and_the_pictures_are_there(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")

    def run(*callbacks: Any, **trainer: Any) -> Any:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.3), nn.BatchNorm1d(20), nn.Linear(20, 3))
        module = Regressor(net)
        quiet(callbacks=list(callbacks), max_epochs=2, **trainer).fit(module, loader(*regression(), size=16))
        return weights(module), torch.get_rng_state()

    plain, watched = run(), run(MoreIsBetterMonitor(every_n_steps=1), logger=CSVLogger(tmp_path))
    assert same(plain[0], watched[0]) and torch.equal(plain[1], watched[1])
    for name in ("mib", "mib_ridge"):
        assert (tmp_path / "lightning_logs" / "version_0" / f"{name}.png").stat().st_size > 1000


# -- other kernels than the features' own ------------------------------------------------------------------------------


def of_kernel(kernel: Tensor, y: Tensor) -> dict[str, float]:
    """What ridge regression with a kernel comes to by cross-validation, with the mean fitted too."""
    n = len(y)
    middle = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(middle @ kernel.double() @ middle)
    values, along = values.clamp_min(0), vectors.T @ (y - y.mean(0)).double()
    ridges = torch.logspace(-6, 2, 31, dtype=torch.float64) * values.sum() / n
    left = ridges[:, None] / (values + ridges[:, None])
    train = (left.square() @ along.square()).mean(1) / n
    test = train / ((left.sum(1) - 1) / n).square()  # the mean's own direction, with the eigenvalue 0, is fitted
    best = int(test.argmin())
    return {
        "pred_test_mse_best": float(test[best]),
        "best_ridge": float(ridges[best]),
        "train_mse_at_best": float(train[best]),
    }


def test_each_kernel_is_that_of_the_network_as_it_stands() -> None:
    """Before the first step, against kernels that are written out by hand."""
    x, y = regression()
    net = wide()
    before = (x @ net[0].weight.T + net[0].bias).detach().double()
    h, back = before.relu(), (before > 0).double()[:, None] * net[2].weight.detach().double()  # [n, 3, 30]
    k = h @ h.T + 1 + (x @ x.T + 1).double() * torch.einsum("ick,jck->ij", back, back) / 3
    norm = h.norm(dim=1)
    angle = torch.nn.functional.cosine_similarity(h[:, None], h, dim=2).clamp(-1, 1).acos()
    arc = norm.outer(norm) * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    for kernel, matrix in (("ntk", k), ("relu_nngp", arc)):
        monitor = MoreIsBetterMonitor(kernel=kernel)
        fit(Regressor(wide()), monitor, x, y, epochs=1)
        first = {name: values[0] for name, values in monitor.history.values.items()}
        for name, value in of_kernel(matrix, y).items():
            assert first[name] == pytest.approx(value, rel=1e-3), (kernel, name)


def test_a_tangent_kernel_forecasts_for_other_data_and_for_no_other_width() -> None:
    monitor = MoreIsBetterMonitor(kernel="ntk")
    fit(Regressor(wide()), monitor, *regression())
    now = last(monitor)
    assert not any(name.startswith("width_") for name in now) and now["limited_by"] in (DATA, NOISE)
    assert now["data_x4"] < now["data_x2"] < now["data_x1"] == pytest.approx(now["pred_test_mse_best"])
    assert not {"train_mse", "ridge_now", "weight_decay"} & now.keys()
    assert any(each.startswith("its theory does not apply to the width of a network") for each in monitor.limits)
    assert any(each.startswith("the layers train and have seen the labels") for each in monitor.limits)
    assert "Its theory does not apply to the width of a network by its tangent kernel" in monitor.verdict


def test_what_is_said_of_the_width_of_a_relu_kernel_is_of_features_drawn_from_it() -> None:
    """Of a hidden layer as many as it has outputs now; of the readout as many as it has inputs."""
    x, y = regression()
    for head, width, of in (("net.0", 20, "outputs"), (None, 20, "inputs")):
        monitor = MoreIsBetterMonitor(head, kernel="relu_nngp", what_if_k=[0.5])
        fit(Regressor(wide(20)), monitor, x, y)
        now = last(monitor)
        names = ("width_x0.5", "width_x1", "width_x2", "width_xinf")
        assert {name for name in now if name.startswith("width_")} == set(names)
        errors = [now[name] for name in names]
        assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
        assert now["width_x1"] == now["data_x1"] and errors[-1] == pytest.approx(now["pred_test_mse_best"])
        assert any("the layers before train and have seen" in each for each in monitor.limits) == (head is None)
        (said,) = (each for each in monitor.limits if each.startswith("the kernel has no width"))
        assert f"of which {width} (as many as it has {of}) are taken for the width now" in said
    inputs = MoreIsBetterMonitor("net.0", kernel="relu_nngp", geometric_steps=False, every_n_steps=100)
    fit(Regressor(wide(20)), inputs, x, y)
    values = inputs.history.values["pred_test_mse_best"]
    assert values[0] == values[-1], "a kernel of the data themselves does not change as the network trains"
    assert not any("have seen the labels" in each for each in inputs.limits)


@pytest.mark.parametrize("kernel", ["relu_nngp", "ntk"])
def test_with_every_kernel_the_run_is_the_same_to_the_bit_and_costs_what_the_budget_allows(
    kernel: str, tmp_path: Any
) -> None:
    pytest.importorskip("matplotlib")

    def run(*callbacks: Any, **trainer: Any) -> Any:
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(20, 3)
        )
        module = Regressor(net)
        quiet(callbacks=list(callbacks), max_epochs=2, **trainer).fit(module, loader(*regression(), size=16))
        return weights(module), torch.get_rng_state()

    budget = 60.0 if kernel == "ntk" else 1.0  # in so small a network the products of all pairs are most of the work
    often = MoreIsBetterMonitor(kernel=kernel, every_n_steps=1, budget=budget)
    plain, watched = run(), run(often, logger=CSVLogger(tmp_path))
    assert same(plain[0], watched[0]) and torch.equal(plain[1], watched[1])
    # One forward pass and one back an output; of all pairs the products of 6 inputs and 3 x 20 gradients in the linear
    # layer and of 3 x 40 derivatives in the norm, over the 120 + 60 multiplications of a pass.
    passes = 80 * 4 + round(80**2 * (6 + 60 + 120) / 180) if kernel == "ntk" else 80
    assert often.history.steps[0] == math.ceil(passes / (3 * 16 * budget)), "after so many samples were trained on"
    assert often.left_out > 0 and often.spent == pytest.approx(len(often.history.steps) * passes / (3 * 160))
    assert often.spent <= budget
    assert (tmp_path / "lightning_logs" / "version_0" / "mib.png").stat().st_size > 1000


# -- the refit ---------------------------------------------------------------------------------------------------------


def test_the_refit_is_ridge_regression_at_the_ridge_of_cross_validation() -> None:
    module, (x, y) = Regressor(wide()), regression()
    run = fit(module, RidgeRefit(), x, y)
    h = module.net[:2](x).double().detach()
    found = spectrum(h.float(), y)
    swept = sweep(found, default_ridges(found))
    ridge = float(swept.ridges[best_ridge(found, swept, 30)])
    assert run.callback_metrics["ridge_refit/ridge"] == pytest.approx(ridge, rel=1e-4)
    off = h - h.mean(0)
    expected = torch.linalg.solve(
        off.T @ off + ridge * torch.eye(30, dtype=torch.float64), off.T @ (y - y.mean(0)).double()
    )
    assert torch.allclose(module.net[2].weight.double(), expected.T, atol=1e-4)
    assert torch.allclose(module(x).mean(0), y.mean(0), atol=1e-5)


def test_one_ridge_can_be_given_and_never_leaves_the_layer() -> None:
    x, y = regression()
    given, plain, never = Regressor(wide()), Regressor(wide()), Regressor(wide())
    run = fit(given, RidgeRefit(ridges=[0.5]), x, y)
    h = given.net[:2](x).detach()
    assert run.callback_metrics["ridge_refit/ridge"] == pytest.approx(
        0.5 * float((h - h.mean(0)).square().sum() / 80), rel=1e-4
    )
    fit(plain, Watch(), x, y)
    fit(never, RidgeRefit(when="never"), x, y)
    assert same(weights(plain), weights(never)) and RidgeRefit(when="never").neutral
    assert torch.equal(plain.net[0].weight, given.net[0].weight) and not torch.equal(
        plain.net[2].weight, given.net[2].weight
    )


def test_a_layer_without_a_bias_goes_through_the_origin() -> None:
    net = wide()
    net[2] = nn.Linear(30, 3, bias=False)
    module, (x, y) = Regressor(net), regression()
    fit(module, RidgeRefit(ridges=[1e-3]), x, y)
    h = module.net[:2](x).double().detach()
    d = 1e-3 * float(h.square().sum() / 80)
    expected = torch.linalg.solve(h.T @ h + d * torch.eye(30, dtype=torch.float64), h.T @ y.double()).T
    assert torch.allclose(module.net[2].weight.double(), expected, atol=1e-4)


def test_a_classifier_of_frozen_features_is_better_after_the_refit() -> None:
    """A head that has hardly trained on random features of digits."""

    class OnRandom(Classifier):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)))
            self.net[1].requires_grad_(False)

    ends = []
    for callbacks in ([], [RidgeRefit()]):
        module, data = OnRandom(), DigitsDataModule()
        quiet(callbacks=callbacks, limit_val_batches=0).fit(module, datamodule=data)
        right = [(module(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
        ends.append(float(torch.cat(right).mean()))
    assert ends[1] > max(0.93, ends[0])


def test_a_logit_of_two_classes_keeps_its_sign() -> None:
    class Binary(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1])

    x, _ = regression()
    y = (x[:, 0] > 0.5).float()
    module = Binary(wide(out=1))
    fit(module, RidgeRefit(), x, y)
    assert float(((module(x)[:, 0] > 0).float() == y).float().mean()) > 0.9


def test_adapters_on_the_layer_are_merged_before_it_is_written_over() -> None:
    """SaRA trains some entries of every layer, the last one among them, and writes them back at the end."""
    module, (x, y) = Regressor(wide()), regression()
    run = quiet(callbacks=[SaRA(threshold=None, fraction=0.3, rank_weight=0), RidgeRefit(ridges=[0.1])], max_epochs=2)
    run.fit(module, loader(x, y, size=16))
    h = module.net[:2](x).double().detach()
    off = h - h.mean(0)
    ridge = run.callback_metrics["ridge_refit/ridge"].double()
    expected = torch.linalg.solve(
        off.T @ off + ridge * torch.eye(30, dtype=torch.float64), off.T @ (y - y.mean(0)).double()
    )
    assert torch.allclose(module.net[2].weight.double(), expected.T, atol=1e-4)


def test_features_that_do_not_vary_leave_the_layer_as_it_was() -> None:
    module, (x, y) = Regressor(wide()), regression()
    with torch.no_grad():
        module.net[0].weight.zero_()
    module.net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="RidgeRefit: the layer is left as it was trained: the features do not vary"):
        fit(module, RidgeRefit(), x, y)


def test_nothing_is_resumed_from_a_refitted_layer(tmp_path: Any) -> None:
    x, y = regression()
    run = fit(Regressor(wide()), RidgeRefit(), x, y)
    run.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.raises(RecipeError, match="was written after the fit ended and holds the refitted layer"):
        quiet(callbacks=[RidgeRefit()], max_epochs=3).fit(
            Regressor(wide()), loader(x, y, size=16), ckpt_path=str(tmp_path / "after.ckpt")
        )
    keep = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    through, resumed = Regressor(wide()), Regressor(wide())
    quiet(callbacks=[RidgeRefit(), keep], enable_checkpointing=True, max_epochs=2).fit(through, loader(x, y, size=16))
    quiet(callbacks=[RidgeRefit()], max_epochs=2).fit(
        resumed, loader(x, y, size=16), ckpt_path=str(tmp_path / "epoch=0.ckpt")
    )
    assert same(weights(through), weights(resumed))

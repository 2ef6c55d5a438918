"""Gaussian random features and the closed-form regressor: moments, shapes, and the theory's errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.ridge_theory import rf_risk
from lightning_recipes.datamodules import GaussianRFDataModule
from lightning_recipes.modules import RandomFeatureRegressor
from tests.stock import quiet


def test_features_have_the_kernels_trace_and_targets_their_variance() -> None:
    data = GaussianRFDataModule(n_modes=300, n=4000, k=400, n_test=5, noise_var=0.25, beta=2.0)
    data.setup()
    h, y = data.train_set.tensors
    assert h.shape == (4000, 400) and y.shape == (4000,) and h.dtype == torch.float32
    assert float(h.square().sum(1).mean()) == pytest.approx(float(data.eigvals.sum()), rel=0.1)
    assert float(y.var()) == pytest.approx(float(data.coeffs.square().sum()) + 0.25, rel=0.1)
    assert float(data.eigvals[3]) == pytest.approx(4**-1.5) and float(data.coeffs[3]) == pytest.approx(0.25)


def test_samples_hang_on_the_seed_alone_and_sets_share_the_features() -> None:
    one, again, other = (GaussianRFDataModule(n_modes=50, n=20, k=8, seed=seed, n_test=6) for seed in (0, 0, 1))
    for each in (one, again, other):
        each.setup()
    assert torch.equal(one.train_set.tensors[0], again.train_set.tensors[0])
    assert not torch.equal(one.train_set.tensors[0], other.train_set.tensors[0])
    assert len(one.val_set) == len(one.test_set) == 6
    (h, _), *rest = one.train_dataloader()
    assert h.shape == (20, 8) and not rest


def test_the_regressor_is_ridge_regression_from_the_start_and_no_step_moves_it() -> None:
    data, module = GaussianRFDataModule(n_modes=100, n=40, k=15, n_test=6), RandomFeatureRegressor(15, 0.3)
    trainer = quiet(max_epochs=2)
    trainer.fit(module, datamodule=data)
    h, y = (each.double() for each in data.train_set.tensors)
    expected = torch.linalg.solve(h.T @ h + 0.3 * torch.eye(15, dtype=torch.float64), h.T @ y)
    assert torch.allclose(module.readout.weight[0].double(), expected, atol=1e-5)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(
        float((h @ expected - y).square().mean()), rel=1e-4
    )
    assert trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"] > 0


def test_the_regressor_has_random_features_of_its_own_where_it_is_told_the_inputs() -> None:
    x = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    module = RandomFeatureRegressor(80, 1e-6, n_inputs=5, seed=3)
    quiet().fit(module, DataLoader(TensorDataset(x, x[:, 0] * x[:, 1]), batch_size=60))
    assert torch.allclose(module(x), x[:, 0] * x[:, 1], atol=0.03)
    h = module.features(x)
    assert h.shape == (60, 80) and bool((h >= 0).all())
    assert torch.equal(module.weight, RandomFeatureRegressor(80, n_inputs=5, seed=3).weight)


def test_batches_of_another_size_are_refused() -> None:
    with pytest.raises(RecipeError, match="k=16: the batch has 15 features"):
        quiet().fit(RandomFeatureRegressor(16), datamodule=GaussianRFDataModule(n_modes=20, n=10, k=15, n_test=2))


@pytest.mark.parametrize(("n", "k"), [(256, 64), (64, 256)])
def test_errors_are_those_of_the_theory(n: int, k: int) -> None:
    tests, trains = [], []
    for seed in range(4):
        data, module = GaussianRFDataModule(n_modes=2000, n=n, k=k, seed=seed), RandomFeatureRegressor(k, 0.1)
        trainer = quiet()
        trainer.fit(module, datamodule=data)
        trains.append(float(trainer.callback_metrics["train/loss"]))
        tests.append(float(trainer.callback_metrics["val/loss"]))
    expected = rf_risk(data.eigvals, data.coeffs, n, k, 0.1, 0.5)
    assert sum(tests) / 4 == pytest.approx(float(expected.test), rel=0.12)
    assert sum(trains) / 4 == pytest.approx(float(expected.train), rel=0.12)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GaussianRFDataModule, {"n": 0}, "n=0: must be at least 1"),
        (GaussianRFDataModule, {"k": 0}, "k=0: must be at least 1"),
        (GaussianRFDataModule, {"n_modes": 0}, "n_modes=0: must be at least 1"),
        (GaussianRFDataModule, {"n_test": 0}, "n_test=0: must be at least 1"),
        (GaussianRFDataModule, {"alpha": 0}, "alpha=0: must be positive"),
        (GaussianRFDataModule, {"beta": math.inf}, "beta=inf: must be positive"),
        (GaussianRFDataModule, {"noise_var": -1}, "noise_var=-1: must be at least 0"),
        (RandomFeatureRegressor, {"k": 0}, "k=0: must be at least 1"),
        (RandomFeatureRegressor, {"ridge": -1}, "ridge=-1: must be at least 0"),
        (RandomFeatureRegressor, {"n_inputs": 0}, "n_inputs=0: must be None or at least 1"),
    ],
)
def test_bad_arguments_are_named(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)

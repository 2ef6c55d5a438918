"""Priors and the data module that draws from them: distributions, the exact posterior, and batches by number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern
from torch import Tensor

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import (
    GaussianPrior,
    GPPrior,
    LinearPrior,
    MLPPrior,
    Prior,
    PriorDataModule,
    SampledGPPrior,
    TableDataModule,
)
from lightning_recipes.datamodules.prior_data import length_probabilities
from lightning_recipes.datamodules.priors import draw
from tests.stock import Watch, quiet

PRIORS = [
    GPPrior(),
    GPPrior(0.3, 2.0, 0.01, "matern52"),
    SampledGPPrior(),
    LinearPrior(),
    MLPPrior(),
    MLPPrior(4, 20, weight_dropout=0.3, vary_features=True, binary=True),
]


def small(**changes: Any) -> PriorDataModule:
    arguments = {"batch_size": 4, "seq_len": 6, "max_context": 5, "steps_per_epoch": 5, "val_datasets": 10}
    return PriorDataModule(LinearPrior(1.0), 2, **{**arguments, **changes})


# -- priors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_a_prior_draws_by_its_generator_alone(prior: Prior) -> None:
    x, y = draw(prior, 7, 5, 3, generator(1))
    state = torch.get_rng_state()
    again, other = draw(prior, 7, 5, 3, generator(1)), draw(prior, 7, 5, 3, generator(2))
    assert torch.equal(state, torch.get_rng_state())
    assert x.shape == (7, 5, 3) and y.shape == (7, 5) and x.dtype == y.dtype == torch.float32
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(y, other[1])
    assert not torch.equal(y[:, 0], y[:, 1]), "every data set has a function of its own"


def test_draws_have_the_covariance_of_their_prior() -> None:
    for prior in (GPPrior(0.5, 2.0, 0.1), LinearPrior(1.5, 0.5, 0.3, -1, 1)):
        fixed = torch.tensor([[-0.9], [0.1], [0.8]], dtype=torch.float64).expand(40_000, 3, 1)
        prior.inputs = lambda shape, numbers, fixed=fixed: fixed
        _, y = prior.sample(3, 40_000, 1, generator(0))
        expected = prior.kernel(fixed[:1], fixed[:1])[0] + prior.noise * torch.eye(3)
        assert torch.allclose(torch.cov(y.double()), expected, atol=0.06)
    assert torch.allclose(expected[0, 1], torch.tensor(1.5**2 * -0.09 + 0.25).double())


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_the_posterior_of_a_gaussian_process_is_scikit_learns(kernel: str) -> None:
    prior = GPPrior(0.4, 1.7, 0.05, kernel)
    x, y = prior.sample(9, 3, 2, generator(0))
    mean, variance = prior.posterior(x[:6], y[:6], x[6:])
    theirs = RBF(0.4, "fixed") if kernel == "rbf" else Matern(0.4, "fixed", 2.5)
    for column in range(3):
        gp = GaussianProcessRegressor(ConstantKernel(1.7, "fixed") * theirs, alpha=0.05, optimizer=None)
        gp.fit(x[:6, column].double(), y[:6, column].double())
        expected, spread = gp.predict(x[6:, column].double(), return_std=True)
        assert mean[:, column].tolist() == pytest.approx(expected, abs=1e-8)
        assert variance[:, column].tolist() == pytest.approx(spread**2 + 0.05, abs=1e-8)


def test_the_posterior_of_ridge_regression_is_that_of_its_weights() -> None:
    """Against the normal equations: covariance (X^T X / s^2 + P^-1)^-1 of the weights."""
    prior = LinearPrior(0.7, 1.3, 0.2, -1, 1)
    x, y = prior.sample(8, 2, 3, generator(3))
    mean, variance = prior.posterior(x[:5], y[:5], x[5:])
    for column in range(2):
        with_one = torch.cat([x[:, column].double(), torch.ones(8, 1, dtype=torch.float64)], 1)
        known, asked = with_one[:5], with_one[5:]
        precision = torch.diag(torch.tensor([0.7, 0.7, 0.7, 1.3], dtype=torch.float64) ** -2)
        covariance = torch.linalg.inv(known.T @ known / 0.04 + precision)
        weights = covariance @ known.T @ y[:5, column].double() / 0.04
        assert torch.allclose(mean[:, column], asked @ weights)
        assert torch.allclose(variance[:, column], 0.04 + (asked @ covariance * asked).sum(1))


def test_without_a_context_the_posterior_is_the_prior() -> None:
    prior = LinearPrior(1.0, 1.0, 0.3, -1, 1)
    x, y = prior.sample(3, 2, 1, generator(0))
    mean, variance = prior.posterior(x[:0], y[:0], x)
    assert (mean == 0).all()
    assert torch.allclose(variance, x[..., 0].double() ** 2 + 1.09)
    by_hand = (y.double() ** 2 / variance + (2 * math.pi * variance).log()) / 2
    assert torch.allclose(prior.nll(x, y, 0), by_hand)
    with pytest.raises(RecipeError, match="MLPPrior has no posterior in closed form"):
        MLPPrior().posterior(x, y, x)


def test_a_bayesian_network_gives_standardised_columns_or_halves() -> None:
    x, y = MLPPrior(vary_features=True).sample(50, 200, 9, generator(0))
    assert torch.allclose(y.mean(0), torch.zeros(200), atol=1e-5)
    assert torch.allclose(y.std(0), torch.ones(200), atol=1e-4)
    used = (x != 0).all(0)
    assert torch.equal(used, (x != 0).any(0)), "a feature is used or padded as a whole"
    assert used.sum(1).min() == 2 and used.sum(1).max() == 9
    _, y = MLPPrior(binary=True).sample(50, 20, 3, generator(0))
    assert (y.sum(0) == 25).all() and set(y.unique().tolist()) == {0.0, 1.0}


class Wrong(Prior):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def sample(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.x, self.y


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.rand(4, 6, 2), torch.rand(4, 6), r"got \(4, 6, 2\) and \(4, 6\): tokens come first, then data sets"),
        (torch.rand(6, 4, 2), torch.rand(6), r"shapes \(6, 4, 2\) and \(6, 4\) .*; got \(6, 4, 2\) and \(6,\)"),
        (torch.rand(6, 4, 2), torch.full((6, 4), 1.5), "the same target 1.5 everywhere"),
        (torch.rand(6, 4, 2), torch.full((6, 4), math.nan), "numbers that are not finite"),
    ],
)
def test_a_prior_that_draws_something_else_is_refused(x: Tensor, y: Tensor, says: str) -> None:
    with pytest.raises(RecipeError, match=f"Wrong.sample .*{says}"):
        draw(Wrong(x, y), 6, 4, 2, generator(0))


def test_a_prior_of_ones_own_needs_a_kernel_only() -> None:
    class Cosine(GaussianPrior):
        noise = 0.01

        def kernel(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cos(a - b.transpose(1, 2))

    x, y = draw(Cosine(), 5, 3, 1, generator(0))
    mean, _ = Cosine().posterior(x, y, x)
    assert (mean - y).abs().mean() < 0.2


# -- batches ---------------------------------------------------------------------------------------------------------


def test_long_contexts_come_more_often() -> None:
    """The card's numbers for T_max = 5."""
    expected = [0.0876, 0.1095, 0.1460, 0.2190, 0.4380]
    assert length_probabilities(5, "weighted").tolist() == pytest.approx(expected, abs=5e-5)
    assert length_probabilities(4, "uniform").tolist() == [0.25] * 4
    assert length_probabilities(4, 2).tolist() == [0, 0, 1, 0]
    drawn = torch.tensor([small().batches("train")[i]["n_context"] for i in range(3000)])
    assert (drawn.bincount() / 3000).tolist() == pytest.approx(expected, abs=0.03)


def test_a_batch_is_a_function_of_seed_rank_and_number() -> None:
    batches = small().batches("train", 0)
    torch.manual_seed(5)
    first = [batches[i] for i in (3, 0, 3)]
    assert torch.equal(first[0]["y"], first[2]["y"]) and not torch.equal(first[0]["y"], first[1]["y"])
    for other in (small().batches("train", 1), small(seed=1).batches("train", 0), small().batches("val", 0)):
        assert not torch.equal(first[0]["y"], other[3]["y"])
    lengths = [[small().batches("train", rank)[i]["n_context"] for i in range(20)] for rank in (0, 1)]
    assert lengths[0] == lengths[1], "ranks agree on the length, so that none waits"


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_go_on_where_the_last_one_ended_whatever_the_workers(workers: int) -> None:
    loader = small(num_workers=workers).train_dataloader()
    assert len(loader) == 5
    seen = [batch["y"] for _ in range(2) for batch in loader]
    expected = [small().batches("train")[i]["y"] for i in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_the_validation_is_the_same_every_time_and_has_whole_batches() -> None:
    loader = small().val_dataloader()
    first, second = ([batch["y"] for batch in loader] for _ in range(2))
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, second))
    assert small(val_datasets=0).val_dataloader() == []


def test_a_fit_draws_on_over_its_epochs() -> None:
    from lightning_recipes.modules import PFNModule

    seen: list[Tensor] = []
    watch = Watch(on_train_batch_start=lambda trainer, module, batch, index: seen.append(batch["y"]))
    module = PFNModule(2, 8, 2, 1, num_buckets=10)
    quiet(max_epochs=2, callbacks=[watch]).fit(module, datamodule=small())
    expected = [small().batches("train")[i]["y"] for i in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seq_len": 4}, "seq_len=4: must be above 4, the longest context, or no query is left"),
        ({"eval_pos": 6}, "seq_len=6: must be above 6, the longest context"),
        ({"eval_pos": "often"}, "eval_pos='often': must be 'weighted', 'uniform' or a number"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"val_datasets": -1}, "val_datasets=-1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**changes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GPPrior(lengthscale=0), "GPPrior: lengthscale must be positive; got 0"),
        (lambda: GPPrior(kernel_name="cosine"), "GPPrior: kernel_name must be 'rbf' or 'matern52'; got 'cosine'"),
        (lambda: LinearPrior(low=1.0, high=0.0), r"LinearPrior: high must be above low \(1.0\); got 0.0"),
        (lambda: SampledGPPrior(noise=(1.0, -1.0)), "SampledGPPrior: noise must be a concentration and a rate"),
        (lambda: MLPPrior(weight_dropout=1.0), r"MLPPrior: weight_dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_arguments_of_priors_are_named(make: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make()


# -- tables ----------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str, name: str = "table.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rows_with_a_target_are_context_and_those_without_are_queries(tmp_path: Path) -> None:
    path = written(tmp_path, "a,y,b\n1,10,2\n3,,4\n5,30,6\n7, NaN ,8\n")
    table = TableDataModule(path, "y", batch_size=1)
    assert table.feature_names == ["a", "b"]
    assert table.context[0].tolist() == [[1, 2], [5, 6]] and table.context[1].tolist() == [10, 30]
    assert [batch["x"].tolist() for batch in table.predict_dataloader()] == [[[3, 4]], [[7, 8]]]
    more = written(tmp_path, "b,a\n20,10\n", "queries.csv")
    table = TableDataModule(path, "y", ["b"], more)
    assert table.context[0].tolist() == [[2], [6]] and table.query_rows.tolist() == [[4], [8], [20]]


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("a,y\n1,2\n3,\n", {"target": "z"}, r"target='z': must be one of the columns \['a', 'y'\]"),
        ("a,y\n1,2\n3,\n", {"features": ["b"]}, r"there is no \['b'\]"),
        ("a,y\nred,2\n3,\n", {}, "line 2, column 'a' is 'red', no number"),
        ("a,y\n1,2,3\n", {}, "line 2 has 3 cells, the first has 2"),
        ("a,y\n1,2\n", {}, "a table with an empty cell in 'y', to predict"),
        ("a,y\n1,\n", {}, "a table with values in 'y': it has none"),
        ("a,y\n,2\n3,\n", {}, "'a' is empty in row 1 of the data"),
        ("a,y\n", {}, "a CSV file with a line of column names and lines of numbers"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, text: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TableDataModule(written(tmp_path, text), **arguments)

"""The spectrum of features: by either Gram matrix, from sums over batches and ranks, against a singular value
decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_recipes.core import spectrum as module
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.spectrum import Sums, effective_rank, spectrum, spectrum_of_kernel


def data(n: int, p: int, k: int = 2) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(n, p, generator=draws) + 3, torch.randn(n, k, generator=draws) - 2


def by_svd(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of X X^T and squares of v_i . y."""
    v, roots, _ = torch.linalg.svd(x.double(), full_matrices=False)
    return roots.square(), (v.T @ y.double()).square()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("n", "p"), [(40, 7), (7, 40), (9, 9)])
def test_either_gram_matrix_gives_what_a_singular_value_decomposition_gives(n: int, p: int, centred: bool) -> None:
    x, y = data(n, p)
    found = spectrum(x, y, centred)
    if centred:
        x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    values, squares = by_svd(x, y)
    rank = min(n - centred, p)
    assert found.rank() == rank and found.eigenvalues.dtype == torch.float64
    assert torch.allclose(found.eigenvalues, values, atol=1e-9)
    assert torch.allclose(found.targets[:rank].square(), squares[:rank], atol=1e-9)
    assert torch.allclose(found.rest + found.targets.square().sum(0), y.double().square().sum(0))
    along = x.double() @ found.directions[:, :rank]  # X u_i = v_i sqrt(l_i)
    assert torch.allclose(along.square().sum(0), values[:rank])
    assert torch.allclose(along.T @ y.double(), found.targets[:rank] * values[:rank, None].sqrt(), atol=1e-9)
    assert not found.targets[rank:].any() and not found.directions[:, rank:].any()


def test_least_squares_and_ridge_are_functions_of_a_spectrum() -> None:
    x, y = data(30, 5)
    found = spectrum(x, y, centred=False)
    for penalty in (0.0, 2.5):
        shrunk = found.eigenvalues.sqrt() / (found.eigenvalues + penalty)
        weights = found.directions @ (shrunk[:, None] * found.targets)
        x_, y_ = x.double(), y.double()
        expected = torch.linalg.solve(x_.T @ x_ + penalty * torch.eye(5, dtype=torch.float64), x_.T @ y_)
        assert torch.allclose(weights, expected)


def test_sums_over_batches_are_the_sums_of_all_samples() -> None:
    x, y = data(25, 6)
    sums = Sums(6, 2)
    for some_x, some_y in zip(x.split(4), y.split(4)):
        sums.add(some_x, some_y)
    once, whole = sums.spectrum(), spectrum(x, y)
    assert torch.allclose(once.eigenvalues, whole.eigenvalues) and once.samples == 25
    assert torch.allclose(once.targets.abs(), whole.targets.abs()) and torch.allclose(once.rest, whole.rest)


def test_sums_of_fewer_samples_than_features_have_the_eigenvalues_of_the_samples() -> None:
    x, y = data(5, 12)
    found, expected = Sums(12, 2).add(x, y).spectrum(), spectrum(x, y)
    assert found.eigenvalues.shape == (5,) and found.rank() == expected.rank() == 4
    assert torch.allclose(found.eigenvalues, expected.eigenvalues, atol=1e-9)


def test_sums_over_ranks_are_one_message_and_leave_those_of_this_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(24, 5)
    mine, theirs = (Sums(5, 2).add(x[rank::2], y[rank::2]) for rank in (0, 1))
    sent = []

    def all_sum(value: Tensor) -> Tensor:
        sent.append(value)
        return value + theirs._flat

    monkeypatch.setattr(module, "all_sum", all_sum)
    total = mine.over_ranks()
    assert len(sent) == 1 and int(total.count) == 24 and int(mine.count) == 12
    found, expected = total.spectrum(), spectrum(x, y)
    assert torch.allclose(found.eigenvalues, expected.eigenvalues) and torch.allclose(found.rest, expected.rest)


def test_scaled_features_have_entries_of_variance_one_over_p() -> None:
    x, y = data(50, 8)
    found = spectrum(x, y).scaled()
    centred = x.double() - x.double().mean(0)
    scale = float((centred.square().mean() * 8).sqrt())
    assert found.scale == pytest.approx(scale)
    assert float(found.eigenvalues.sum()) == pytest.approx(50), "the trace is n p times the variance 1 / p"
    assert torch.allclose(found.eigenvalues, spectrum(x / scale, y).eigenvalues)
    assert torch.equal(found.targets, spectrum(x, y).targets), "targets along v_i do not hang on the scale"


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).double()
    expected = spectrum(x).eigenvalues
    assert torch.allclose(spectrum(x + 1e4).eigenvalues, expected, rtol=1e-6)


def test_what_lies_outside_of_the_span_of_the_samples() -> None:
    x = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0], [2, 0, 0, 0]])
    rows = torch.tensor([[3.0, 4, 0, 0], [1, 0, 5, -2]])
    for found in (spectrum(x, centred=False), Sums(4).add(x).spectrum(centred=False)):
        assert found.rank() == 2
        expected = torch.tensor([[0.0, 0, 0, 0], [0, 0, 5, -2]], dtype=torch.float64)
        assert torch.allclose(found.outside(rows), expected, atol=1e-12)


def test_effective_rank_is_that_of_equal_and_of_unequal_variances() -> None:
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert float(effective_rank(two)) == pytest.approx(2)
    assert float(effective_rank(two * torch.tensor([1.0, 0.0]))) == pytest.approx(1)
    assert float(effective_rank(torch.ones(3, 2))) == pytest.approx(1)


def test_what_has_no_spectrum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="the features are not all finite"):
        spectrum(torch.tensor([[1.0, float("nan")], [0.0, 1.0], [2.0, 1.0]]))
    with pytest.raises(RecipeError, match="the features are not all finite"):
        spectrum(torch.tensor([[1.0, float("inf"), 2.0]]))
    for shape in ((50, 3), (3, 50)):
        with pytest.raises(RecipeError, match="do not vary"):
            spectrum(torch.full(shape, 0.3)).scaled()
    monkeypatch.setattr(module, "WIDEST", 6)
    assert spectrum(torch.rand(5, 30)).features == 30, "the smaller side counts"
    with pytest.raises(RecipeError, match="a matrix of side 7, and 6 is the most"):
        spectrum(torch.rand(7, 30))
    with pytest.raises(RecipeError, match="a matrix of side 7, and 6 is the most"):
        Sums(7)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("n", "p"), [(40, 7), (7, 40)])
def test_a_kernel_of_products_has_the_spectrum_of_the_features(n: int, p: int, centred: bool) -> None:
    x, y = data(n, p)
    expected, found = spectrum(x, y, centred), spectrum_of_kernel(x.double() @ x.double().T, y, centred)
    rank = expected.rank()
    assert found.rank() == rank and (found.samples, found.features, found.centred) == (n, n, centred)
    assert torch.allclose(found.eigenvalues[:rank], expected.eigenvalues[:rank], rtol=1e-9)
    assert torch.allclose(found.targets[:rank].square(), expected.targets[:rank].square(), atol=1e-9)
    assert torch.allclose(found.rest, expected.rest, atol=1e-9)
    assert found.directions.shape == (0, n)


def test_a_kernel_that_is_not_finite_or_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, y = torch.eye(4), torch.ones(4, 1)
    monkeypatch.setattr(module, "WIDEST", 4)
    assert spectrum_of_kernel(kernel, y).rank() == 3
    kernel[1, 2] = kernel[2, 1] = torch.nan
    with pytest.raises(RecipeError, match="the features are not all finite"):
        spectrum_of_kernel(kernel, y)
    with pytest.raises(RecipeError, match="needs a matrix of side 5, and 4 is the most"):
        spectrum_of_kernel(torch.eye(5), torch.ones(5, 1))

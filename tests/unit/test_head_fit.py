"""Fitting a linear head: against scikit-learn, its limit cases, and the same on every rank."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.head_fit import accuracy, balanced, fit_logistic, standardisation, worst_group


def blobs(n: int = 60, p: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, p, generator=generator)
    return centres[y] + torch.randn(n, p, generator=generator), y


@pytest.mark.parametrize("l2", [0.1, 1.0, 10.0])
def test_without_standardisation_it_is_scikit_learns_logistic_regression(l2: float) -> None:
    x, y = blobs()
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, l2=l2, standardise=False)
    assert ours.converged and ours.weight.dtype == torch.float64
    assert torch.allclose(ours.weight, torch.from_numpy(theirs.coef_).double(), atol=2e-5)
    expected = torch.from_numpy(theirs.predict_proba(x.double().numpy())).double()
    assert torch.allclose(ours(x).softmax(1), expected, atol=2e-5)


def test_weights_that_balance_are_scikit_learns() -> None:
    x, y = blobs()
    keep = torch.cat([torch.arange(60)[y == 0], torch.arange(60)[y == 1][:5], torch.arange(60)[y == 2][:2]])
    x, y = x[keep], y[keep]
    theirs = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, standardise=False, weights=balanced(y))
    assert torch.allclose(ours.weight, torch.from_numpy(theirs.coef_).double(), atol=2e-5)


def test_balanced_weights_by_hand() -> None:
    """Three of one and one of another: 4 / (2 x 3) and 4 / (2 x 1)."""
    assert torch.allclose(balanced(torch.tensor([7, 7, 7, 9])), torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]).double())


def test_a_standardised_fit_does_not_see_shift_and_scale_of_a_feature() -> None:
    """From 1e-11 to 1e5, as a head with fixed weights makes them."""
    x, y = blobs()
    x = x.double()
    scale, shift = torch.tensor([1.0, 1e-3, 1e-11, 1e5]).double(), torch.tensor([0.0, 1.0, 1e-11, 3e5]).double()
    plain, moved = fit_logistic(x, y), fit_logistic(x * scale + shift, y)
    assert torch.allclose(plain(x), moved(x * scale + shift), atol=1e-6)
    raw = fit_logistic(x * scale + shift, y, standardise=False)
    assert (raw(x * scale + shift) - plain(x)).abs().max() > 0.1


def test_a_constant_feature_takes_no_part_and_breaks_nothing() -> None:
    x, y = blobs()
    constant = torch.full((60, 1), 0.1)
    mean, deviation = standardisation(torch.cat([x, constant], 1))
    assert deviation[-1] == 1 and torch.allclose(mean[-1], constant[0, 0])
    with_it = fit_logistic(torch.cat([x, constant], 1), y)
    assert torch.allclose(with_it(torch.cat([x, constant], 1)), fit_logistic(x, y)(x), atol=1e-6)


def test_with_a_floor_a_feature_that_hardly_varies_gets_no_huge_weight() -> None:
    """A deviation of 1e-5 counts as a tenth of the largest, so its weight is at most ten times as large as its own."""
    x, y = blobs()
    x = standardised = (x - x.mean(0)) / x.std(0, correction=0)
    x = standardised * torch.tensor([1.0, 1.0, 1.0, 1e-5])
    brittle, sound = fit_logistic(x, y), fit_logistic(x, y, floor=0.1)
    assert brittle.weight[:, 3].abs().max() > 1e4
    assert sound.weight[:, 3].abs().max() < 1 < sound.weight[:, :3].abs().max()
    mean, scale = x.double().mean(0), torch.tensor([1.0, 1.0, 1.0, 0.1]).double()
    by_hand = fit_logistic((x.double() - mean) / scale, y, standardise=False)
    assert torch.allclose(sound(x), by_hand((x.double() - mean) / scale), atol=1e-4)


def test_the_same_numbers_whatever_the_random_state_the_grad_mode_and_the_threads() -> None:
    x, y = blobs()
    first = fit_logistic(x, y)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    seeded = torch.get_rng_state()
    with torch.inference_mode():
        second = fit_logistic(x.clone(), y.clone())
    assert torch.equal(torch.get_rng_state(), seeded)
    torch.set_rng_state(state)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_it_can_be_written_into_a_layer_with_or_without_a_bias() -> None:
    x, y = blobs()
    layer = nn.Linear(4, 3)
    head = fit_logistic(x, y)
    head.write(layer)
    assert torch.allclose(layer(x).double(), head(x), atol=1e-5)
    bare = nn.Linear(4, 3, bias=False)
    head = fit_logistic(x, y, bias=False)
    assert not head.bias.any()
    head.write(bare)
    assert torch.allclose(bare(x).double(), head(x), atol=1e-5)
    with pytest.raises(RecipeError, match="has no bias; fit it with bias=False"):
        fit_logistic(x, y).write(bare)
    with pytest.raises(RecipeError, match=r"fitted head is \(3, 4\) and the layer to write it into is \(2, 4\)"):
        head.write(nn.Linear(4, 2))


def test_a_class_that_does_not_occur_is_never_predicted() -> None:
    x, y = blobs()
    head = fit_logistic(x, y, classes=5)
    assert head.weight.shape == (5, 4) and int(head(x).argmax(1).max()) <= 2


def test_separable_data_without_a_penalty_end_unconverged_and_finite() -> None:
    x = torch.tensor([[-1.0], [1.0]])
    head = fit_logistic(x, torch.tensor([0, 1]), l2=0.0, max_steps=2, tolerance=1e-12)
    assert not head.converged and head.weight.isfinite().all()


def test_fp32_where_fp64_is_too_large() -> None:
    x, y = blobs()
    head = fit_logistic(x, y, dtype=torch.float32, tolerance=1e-5)
    assert head.weight.dtype == torch.float32
    assert torch.allclose(head(x).double(), fit_logistic(x, y)(x), atol=1e-2)


def test_scores_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0], [-1.0], [-3.0]]), torch.tensor([1, 0, 0, 0])
    head = fit_logistic(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    correct = accuracy(head, x, y)
    assert correct.tolist() == [1, 0, 1, 1]
    assert worst_group(correct, torch.tensor([5, 5, 8, 8])) == 0.5


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"got \(4,\) and \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(3).long(), r"got \(4, 2\) and \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), r"got \(0, 2\)"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "class indices .* got torch.float32"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), "from 0 to 2 - 1; got torch.int64 from 0 to 3"),
        (torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), "not all finite"),
    ],
)
def test_what_cannot_be_fitted_is_one_error(x: Tensor, y: Tensor, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fit_logistic(x, y, classes=2)

"""The Bayes error by local averaging: the numbers of a hand-computed set, its limits, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_recipes.core.bayes_error import bayes_error, check_tell_apart, max_abs_scaled
from lightning_recipes.core.errors import RecipeError


def dense(z: Tensor, y: Tensor, classes: int, sigma: float, kernel: str = "rbf") -> Tensor:
    """The formula as it stands, sample by sample, for autograd."""
    if kernel == "rbf":
        s = torch.exp(-(z[:, None] - z[None]).square().sum(2) / (2 * sigma**2))
    else:
        s = torch.sigmoid(z @ z.T)
    s = s * (1 - torch.eye(len(z), dtype=z.dtype))
    p = torch.stack([(s * (y == c)).sum(1) for c in range(classes)], 1) / (s.sum(1, keepdim=True) + 1e-8)
    return 1 - p.max(1).values


def some(n: int = 40, d: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=dtype), torch.randint(0, 4, (n,), generator=generator)


def test_three_points_on_a_line_have_the_errors_computed_by_hand() -> None:
    z, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 0, 1])
    errors = bayes_error(z, y, 2, sigma=1.0, reduction="none")
    first = math.exp(-2) / (math.exp(-0.5) + math.exp(-2))
    assert errors.tolist() == pytest.approx([first, 0.5, 0.0], abs=1e-6)
    assert first == pytest.approx(0.18243, abs=1e-5)
    assert float(bayes_error(z, y, 2, sigma=1.0)) == pytest.approx(0.22748, abs=1e-5)


@pytest.mark.parametrize("kernel", ["rbf", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_value_and_gradient_of_the_mean_are_those_of_the_dense_formula(kernel: str, chunk: int) -> None:
    z, y = some()
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = bayes_error(ours, y, 4, 0.7, kernel, chunk)
    expected = dense(theirs, y, 4, 0.7, kernel).mean()
    assert float((value - expected).detach().abs()) < 1e-6
    value.backward()
    expected.backward()
    assert float(theirs.grad.abs().max()) > 1e-3
    assert float((ours.grad - theirs.grad).abs().max()) < 1e-6


@pytest.mark.parametrize("kernel", ["rbf", "sigmoid"])
def test_every_samples_error_has_its_own_gradient(kernel: str) -> None:
    z, y = some(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: bayes_error(x, y, 4, 0.7, kernel, 5, reduction="none"), z.requires_grad_()
    )


def test_the_gradient_of_half_the_mean_is_half_the_gradient() -> None:
    z, y = some()
    ours = z.clone().requires_grad_()
    (whole,) = torch.autograd.grad(bayes_error(ours, y, 4), ours)
    (half,) = torch.autograd.grad(0.5 * bayes_error(ours, y, 4), ours)
    assert torch.allclose(half, whole / 2, rtol=1e-5, atol=1e-9) and float(whole.abs().max()) > 0


def test_two_far_apart_clusters_of_one_class_each_have_no_error() -> None:
    z = torch.cat([torch.zeros(5, 2), torch.full((5, 2), 100.0)]) + 0.01 * some(10, 2)[0]
    assert float(bayes_error(z, torch.arange(10) // 5, 2)) == pytest.approx(0, abs=1e-6)


def test_a_class_in_the_middle_of_another_is_predictable_and_no_error() -> None:
    z = torch.cat([some(50, 2)[0] * 0.01, torch.zeros(1, 2)])
    errors = bayes_error(z, torch.tensor([0] * 50 + [1]), 2, reduction="none")
    assert float(errors[-1]) < 1e-6, "1 - p of its own label would be 1"


def test_an_endless_width_leaves_the_largest_share_of_a_class_among_the_others() -> None:
    z, y = some()
    shares = torch.stack([1 - torch.cat([y[:i], y[i + 1 :]]).bincount(minlength=4).max() / 39 for i in range(len(y))])
    assert torch.allclose(bayes_error(z, y, 4, sigma=1e4, reduction="none"), shares, atol=1e-5)


def test_a_sample_with_no_neighbour_within_reach_counts_as_unpredictable() -> None:
    z = torch.tensor([[0.0], [0.1], [100.0]])
    assert bayes_error(z, torch.zeros(3).long(), 1, reduction="none").tolist() == pytest.approx([0, 0, 1], abs=1e-5)


def test_small_distances_far_from_the_origin_are_not_lost() -> None:
    z, y = some(dtype=torch.float64)
    near, far = bayes_error(z * 0.01, y, 4, 0.007), bayes_error((z * 0.01 + 100).float(), y, 4, 0.007)
    assert float(near) == pytest.approx(float(far), abs=1e-3)


def test_half_precision_and_autocast_are_computed_in_single() -> None:
    z, y = some()
    z = z.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = bayes_error(z.requires_grad_(), y, 4)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(dense(z.detach().float(), y, 4, 0.3).mean()), abs=1e-5)
    value.backward()
    assert z.grad.dtype == torch.bfloat16


def test_scaling_by_the_largest_value_passes_its_gradient() -> None:
    z = torch.tensor([[1.0, -4.0], [2.0, 3.0]], requires_grad=True)
    scaled = max_abs_scaled(z)
    assert scaled.tolist() == [[0.25, -1.0], [0.5, 0.75]]
    scaled.sum().backward()
    # d/dz of sum(z) / |z_max|: 1 / 4 everywhere, and at the maximum also sum(z) / 16 = 2 / 16
    assert z.grad.tolist() == [[0.25, 0.25 + 2 / 16], [0.25, 0.25]]


def test_features_that_collapsed_have_the_error_of_their_labels_and_those_that_diverged_none() -> None:
    y = torch.tensor([0, 0, 0, 1])
    # Each 0 sees two 0 and one 1, the 1 sees three 0
    assert float(bayes_error(max_abs_scaled(torch.zeros(4, 2)), y, 2)) == pytest.approx(3 / 3 / 4, abs=1e-6)
    assert math.isnan(bayes_error(max_abs_scaled(torch.full((4, 2), math.nan)), y, 2))


def test_what_cannot_be_estimated_is_one_error() -> None:
    z, y = some()
    for features, labels, says in (
        (z[:1], y[:1], "at least 2 samples; got torch.float32 .1, 3."),
        (z[:, :, None], y, r"must be floating \[n, d\].*40, 3, 1"),
        (z.long(), y, "must be floating"),
        (z, y[:-1], "one a sample; got torch.int64 .39,. for 40"),
        (z, y.float(), "labels must be integers"),
        (z, y - 1, r"in \[0, num_classes=4\); they are from -1 to 2"),
        (z, y + 1, "they are from 1 to 4"),
    ):
        with pytest.raises(RecipeError, match=says):
            bayes_error(features, labels, 4)
    for arguments, says in (
        ({"sigma": 0.0}, "sigma must be positive; got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be positive; got 0"),
        ({"kernel": "linear"}, "kernel must be 'rbf' or 'sigmoid'; got 'linear'"),
    ):
        with pytest.raises(RecipeError, match=says):
            bayes_error(z, y, 4, **arguments)
    with pytest.raises(RecipeError, match="the features are the same for all samples"):
        check_tell_apart(torch.ones(4, 2))
    with pytest.raises(RecipeError, match="not finite"):
        check_tell_apart(torch.tensor([[1.0], [math.nan]]))
    check_tell_apart(z)

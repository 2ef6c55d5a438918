"""One Gaussian a class: what is kept of mean and covariance, what is drawn from it, what it takes."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.gaussians import Gaussian, fit, from_state, pack, unpack

SQUARE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


def cloud(n=200, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(n, width, generator=generator) @ mix + torch.arange(width)


def exact(x, eps):
    return torch.cov(x.double().T) + eps * torch.eye(x.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["full", "low_rank", "diag"])
def test_the_corners_of_a_square_have_the_mean_and_the_covariance_of_the_card(kind):
    gaussian = fit(SQUARE, kind, eps=1e-4, rank=1)
    assert torch.equal(gaussian.mean, torch.tensor([1.0, 1.0]))
    expected = (4 / 3 + 1e-4) * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(gaussian.covariance(), expected, atol=1e-6)
    assert round(float(expected[0, 0]), 5) == 1.33343


def test_full_is_the_unbiased_covariance_and_diag_its_diagonal():
    x = cloud()
    assert torch.allclose(fit(x, "full").covariance(), exact(x, 1e-4), rtol=1e-5, atol=1e-5)
    assert torch.allclose(fit(x, "diag").covariance(), exact(x, 1e-4).diag().diag(), rtol=1e-6)
    assert torch.allclose(fit(x, "full").mean, x.double().mean(0).float())


@pytest.mark.parametrize("n", [5, 200], ids=["fewer samples than features", "more"])
def test_low_rank_keeps_the_largest_directions_and_every_variance(n):
    x = cloud(n, 8)
    for rank in (0, 1, 3):
        kept = fit(x, "low_rank", 1e-4, rank).covariance()
        assert torch.allclose(kept.diagonal(), exact(x, 1e-4).diagonal(), rtol=1e-5)
        values, vectors = torch.linalg.eigh(exact(x, 0.0))
        top = vectors[:, 8 - rank :] @ values[8 - rank :].diag() @ vectors[:, 8 - rank :].T
        off = ~torch.eye(8, dtype=torch.bool)
        assert torch.allclose(kept[off], top[off], atol=1e-4 * float(values[-1]))
    whole = fit(x, "low_rank", 1e-4, 8).covariance()
    assert torch.allclose(whole, exact(x, 1e-4), atol=1e-5 * float(values[-1]))


def test_statistics_are_taken_in_fp64():
    """A spread of 1 around 1e4, which fp32 sums of squares would lose."""
    x = torch.tensor([[1e4 - 1.0], [1e4], [1e4 + 1.0]])
    assert torch.allclose(fit(x, "full", 0.0).covariance(), torch.ones(1, 1).double(), atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "low_rank", "diag"])
def test_samples_have_the_mean_times_its_factor_and_the_covariance(kind):
    gaussian = fit(cloud(), kind, rank=2)
    drawn = gaussian.draw(200_000, torch.Generator().manual_seed(0), shrink=0.9)
    sd = gaussian.covariance().diagonal().sqrt().float()
    assert ((drawn.mean(0) - 0.9 * gaussian.mean).abs() < 0.01 * sd).all()
    scale = float(sd.max()) ** 2
    assert torch.allclose(torch.cov(drawn.double().T), gaussian.covariance(), atol=0.02 * scale)


def test_the_same_generator_gives_the_same_samples_and_the_global_state_is_left_alone():
    gaussian, before = fit(cloud(), "low_rank", rank=2), torch.get_rng_state()
    first, second = (gaussian.draw(4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, gaussian.draw(4, torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("kind", "size"), [("full", 2 * 768 * 771), ("low_rank", 4 * 768 * 34), ("diag", 8 * 768)])
def test_a_class_of_768_features_takes_what_the_docstring_says(kind, size):
    gaussian = fit(torch.randn(4, 768, generator=torch.Generator().manual_seed(0)), kind, rank=32)
    if kind == "low_rank":  # four samples span three directions: no more are kept than there are singular vectors
        assert gaussian.factor.shape == (768, 4)
        gaussian = Gaussian(gaussian.mean, gaussian.scale, torch.zeros(768, 32))
    assert gaussian.nbytes == size


def test_pack_keeps_the_lower_half_by_rows():
    lower = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [4.0, 5.0, 6.0]])
    assert torch.equal(pack(lower), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert torch.equal(unpack(pack(lower), 3), lower)


@pytest.mark.parametrize("kind", ["full", "low_rank", "diag"])
def test_a_checkpoint_gives_back_the_same_gaussian(kind):
    gaussian, file = fit(cloud(), kind, rank=2), io.BytesIO()
    torch.save(gaussian.state(), file)
    file.seek(0)
    again = from_state(torch.load(file, weights_only=True))
    for name in ("mean", "scale", "factor"):
        mine, theirs = getattr(gaussian, name), getattr(again, name)
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_one_sample_and_a_covariance_without_a_factor_are_refused():
    with pytest.raises(RecipeError, match="at least 2 samples; got 1"):
        fit(torch.zeros(1, 3))
    with pytest.raises(RecipeError, match=r"no Cholesky factor with cov_eps=0; take a larger cov_eps"):
        fit(torch.zeros(4, 3), eps=0.0)

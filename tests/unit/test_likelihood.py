"""Log-probabilities of targets: closed forms, shapes and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.likelihood import GaussianLogProb
from lightning_recipes.core.recipe import plain


def test_a_gaussian_is_that_of_torch_summed_over_the_numbers_of_a_sample():
    mean, y = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.allclose(GaussianLogProb(0.7)(mean, y), Normal(mean, 0.7).log_prob(y).sum(1), atol=1e-5)
    spread = torch.randn(5, 3)
    found = GaussianLogProb(None)(torch.cat([mean, spread], 1), y)
    assert torch.allclose(found, Normal(mean, spread.exp()).log_prob(y).sum(1), atol=1e-4)


def test_one_number_a_sample_may_stand_in_a_column_or_not():
    found = GaussianLogProb(2.0)(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
    assert found.tolist() == pytest.approx([-math.log(2) - math.log(2 * math.pi) / 2 - each for each in (0, 0.5)])


def test_half_precision_is_taken_in_full():
    assert GaussianLogProb()(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.float32


def test_mse_loss_is_that_of_a_variance_of_a_half():
    mean, y = torch.randn(6), torch.randn(6)
    found = -GaussianLogProb(math.sqrt(0.5))(mean, y).mean() - math.log(math.pi) / 2
    assert float(found) == pytest.approx(float(torch.nn.functional.mse_loss(mean, y)), rel=1e-5)


def test_the_mixture_has_the_mean_and_the_variance_of_its_members():
    means = torch.tensor([[[1.0]], [[3.0]]])
    assert GaussianLogProb(1.0).mixture(means).tolist() == [[2.0]]
    outputs = torch.cat([means, torch.tensor([[[0.0]], [[math.log(2.0)]]])], -1)
    mean, log_std = GaussianLogProb(None).mixture(outputs)[0].tolist()
    assert mean == 2 and 2 * log_std == pytest.approx(math.log((1 + 4) / 2 + 1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match=r"std must be None or positive and finite; got 0"):
        GaussianLogProb(0)
    with pytest.raises(RecipeError, match=r"outputs \(4, 2\) give \(4, 2\) means, and the targets are \(4,\)"):
        GaussianLogProb()(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(RecipeError, match=r"from the last axis of the outputs, which are \(4, 3\)"):
        GaussianLogProb(None)(torch.zeros(4, 3), torch.zeros(4))


def test_a_checkpoint_can_tell_one_from_another():
    assert plain(GaussianLogProb(2.0)) == {"class": "GaussianLogProb", "std": 2.0}

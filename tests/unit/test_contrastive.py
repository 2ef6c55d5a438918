"""Contrastive losses and fixed heads against numbers by hand, on two ranks against one process, and in a fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.gather import gather
from lightning_recipes.modules import (
    ContrastivePretraining,
    FixedReweighting,
    IdentityHead,
    MLPHead,
    NTXentLoss,
    SpectralContrastiveLoss,
    SupConLoss,
    SymmetricReLU,
)
from lightning_recipes.modules.contrastive import two_views
from lightning_recipes.modules.projection import dead_coordinates
from tests.stock import in_two_ranks, quiet

# -- heads -----------------------------------------------------------------------------------------------------------


def test_the_fixed_head_by_hand() -> None:
    head = FixedReweighting(4, 2.0)
    assert torch.equal(head(torch.ones(1, 4)), torch.tensor([[1.0, 0.5, 0.25, 0.125]]))
    assert not list(head.parameters()) and list(head.state_dict()) == ["weights"]


def test_the_fixed_head_at_kappa_1_is_bitwise_nothing() -> None:
    z = torch.randn(3, 5)
    assert torch.equal(FixedReweighting(5, 1.0)(z), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_fixed_weights_stay_in_fp32_in_any_precision(dtype: torch.dtype) -> None:
    """At p = 512 and kappa = 1.05 the last weight is 1.5e-11, which fp16 rounds to 0."""
    head = FixedReweighting(512, 1.05).to(dtype)
    assert head.weights.dtype == torch.float32
    assert float(head.weights[-1]) == pytest.approx(1.05**-511, rel=1e-6)
    assert torch.equal(head.weights, FixedReweighting(512, 1.05).weights)
    u = head(torch.ones(2, 512, dtype=dtype))
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and bool((u > 0).all())


def test_dead_coordinates_are_warned_of_with_their_number() -> None:
    """1.2^-i is below 2^-126 from i = 479.03 on: of 512 coordinates those from 480 to 511."""
    first = math.ceil(126 * math.log(2) / math.log(1.2))
    assert dead_coordinates(512, 1.2) == 512 - first == 32
    with pytest.warns(UserWarning, match="with kappa=1.2 32 of 512 coordinates are dead"):
        FixedReweighting(512, 1.2)
    assert dead_coordinates(512, 1.05) == 0


@pytest.mark.parametrize("kappa", [0.0, -1.0])
def test_a_kappa_that_is_not_positive_is_an_error(kappa: float) -> None:
    with pytest.raises(ValueError, match=f"kappa={kappa}: must be positive"):
        FixedReweighting(4, kappa)


def test_a_kappa_that_grows_beyond_fp32_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kappa=0.5: kappa\^-199 is .*, beyond fp32"):
        FixedReweighting(200, 0.5)


def test_the_symmetric_relu_by_hand() -> None:
    relu = SymmetricReLU()
    a = torch.tensor([2.0, -2.0, 0.3])
    assert torch.equal(relu(a), a)
    nn.init.constant_(relu.threshold, 0.5)
    assert torch.equal(relu(a), torch.tensor([1.5, -1.5, 0.0]))


@pytest.mark.parametrize("threshold", [True, False])
def test_the_identity_head_starts_as_the_exact_identity(threshold: bool) -> None:
    head, z = IdentityHead(7, threshold), torch.randn(5, 7)
    assert torch.equal(head(z), z)
    assert len(list(head.parameters())) == (5 if threshold else 4)


def test_mlp_heads_have_the_sizes_asked_for() -> None:
    shapes = lambda head: [tuple(p.shape) for p in head.parameters() if p.dim() == 2]  # noqa: E731
    assert shapes(MLPHead(4)) == [(4, 4), (4, 4)]
    assert shapes(MLPHead(4, 6, 3)) == [(6, 4), (3, 6)]
    assert shapes(MLPHead(4, 6, 3, layers=2)) == [(6, 4), (6, 6), (3, 6)]
    with pytest.raises(ValueError, match="hidden=0"):
        MLPHead(4, 0)


# -- losses ----------------------------------------------------------------------------------------------------------

TWO_BY_TWO = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])  # two orthogonal classes
OF_TWO = torch.tensor([0, 0, 1, 1])
ORACLE = -2 + math.log(math.exp(2) + 2)  # at tau 0.5, 0.2395


def test_supcon_by_hand() -> None:
    """Two classes of two samples, identical within and orthogonal between: s is 2 for the positive and 0 twice."""
    assert float(SupConLoss(0.5)(TWO_BY_TWO, labels=OF_TWO)) == pytest.approx(ORACLE, abs=1e-6)
    assert float(SupConLoss(0.5)(TWO_BY_TWO[::2], TWO_BY_TWO[1::2], OF_TWO[::2])) == pytest.approx(ORACLE, abs=1e-6)


def test_supcon_skips_anchors_without_a_positive() -> None:
    """The fifth sample, orthogonal to all, is one more negative of the other anchors and no anchor itself."""
    u = torch.eye(3)[[0, 0, 1, 1, 2]]
    y = torch.tensor([0, 0, 1, 1, 2])
    assert float(SupConLoss(0.5)(u, labels=y)) == pytest.approx(-2 + math.log(math.exp(2) + 3), abs=1e-6)


def test_supcon_without_any_positive_is_an_error_and_not_nan() -> None:
    with pytest.raises(RecipeError, match="no class has two samples in a batch of 4"):
        SupConLoss()(TWO_BY_TWO, labels=torch.arange(4))
    with pytest.raises(RecipeError, match=r"needs labels: batches of \(x1, x2, y\)"):
        SupConLoss()(TWO_BY_TWO, TWO_BY_TWO)


def test_ntxent_by_hand() -> None:
    """Two samples with identical views, orthogonal to one another: every anchor sees s = 2 once and 0 twice."""
    first, second = TWO_BY_TWO[::2], TWO_BY_TWO[1::2]
    assert float(NTXentLoss(0.5)(first, second)) == pytest.approx(ORACLE, abs=1e-6)


def test_ntxent_is_cross_entropy_over_all_other_views() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 3, generator=generator)
    u = F.normalize(torch.cat([first, second]), dim=1)
    s = (u @ u.T / 0.2).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(s, torch.arange(10).roll(5))
    assert torch.allclose(NTXentLoss(0.2)(first, second), expected)
    # with one class a sample SupCon is the same
    assert torch.allclose(SupConLoss(0.2)(first, second, torch.arange(5)), expected)


def test_the_spectral_loss_by_hand() -> None:
    """u = (1), (2) and u+ = (1), (3): -2 (1 + 6) / 2 + ((1 x 3)^2 + (2 x 1)^2) / 2."""
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert float(SpectralContrastiveLoss()(first, second)) == -7 + 6.5
    with pytest.raises(RecipeError, match="batches of at least two samples"):
        SpectralContrastiveLoss()(first[:1], second[:1])


@pytest.mark.parametrize("loss", [SupConLoss(), NTXentLoss(), SpectralContrastiveLoss()])
def test_losses_are_computed_in_fp32_under_autocast(loss: nn.Module) -> None:
    u = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.arange(8) % 2
    expected = loss(u[0].float(), u[1].float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(u[0], u[1], y)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("loss", [SupConLoss, NTXentLoss])
def test_a_temperature_that_is_not_positive_is_an_error(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="tau=0: must be positive"):
        loss(0)


# -- two ranks against one process -----------------------------------------------------------------------------------


def _losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {
        "supcon": SupConLoss(),
        "supcon of one view": lambda first, second, y: SupConLoss()(first, labels=y),
        "ntxent": NTXentLoss(),
        "spectral": SpectralContrastiveLoss(),
    }


def _views() -> tuple[Tensor, Tensor]:
    """Classes 0 and 1 are shared by the halves, 2 has both samples in the second and 3 one sample alone."""
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0, 1, 0, 3, 1, 2, 2, 0])


def _gradient(rank: int, world: int) -> dict[str, tuple[float, Tensor]]:
    """Loss and gradient of a linear map, each the mean over ranks, as DDP takes it."""
    (first, second), y = _views()
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {}
    for name, loss in _losses().items():
        w = torch.linspace(-1, 1, 6).reshape(3, 2).requires_grad_()
        value = loss(first[part] @ w, second[part] @ w, y[part])
        value.backward()
        mean = torch.cat([value.detach()[None], w.grad.flatten()]) / world
        if world > 1:
            dist.all_reduce(mean)
        found[name] = (float(mean[0]), mean[1:])
    return found


def _rank(rank: int, folder: Path) -> None:
    place = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    found = {name: (value, gradient.tolist()) for name, (value, gradient) in _gradient(rank, 2).items()}
    torch.save((gather(torch.arange(3) + 10 * rank).tolist(), found), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(tmp_path: Path) -> None:
    in_two_ranks(_rank, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    one = _gradient(0, 1)
    for whole, found in results:
        assert whole == [0, 1, 2, 10, 11, 12]
        for name, (value, gradient) in one.items():
            assert found[name][0] == pytest.approx(value, rel=1e-5), name
            assert torch.allclose(torch.tensor(found[name][1]), gradient, rtol=1e-4, atol=1e-6), name
    assert one["supcon"][1].abs().max() > 1e-2


# -- the LightningModule ---------------------------------------------------------------------------------------------


def _pairs(*more: Tensor) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, 6, generator=generator)
    x = x + (torch.arange(32) % 2)[:, None] * torch.tensor([2.0, 0, 0, 0, 0, 0])
    noise = 0.05 * torch.randn(2, 32, 6, generator=generator)
    return DataLoader(TensorDataset(x + noise[0], x + noise[1], *more), batch_size=16)


@pytest.mark.parametrize("loss", [SupConLoss(), NTXentLoss(), SpectralContrastiveLoss()])
def test_pretraining_lowers_its_loss(loss: nn.Module) -> None:
    torch.manual_seed(0)
    module = ContrastivePretraining(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), MLPHead(8, 8, 4), loss, optimizer=lambda p: torch.optim.Adam(p, 1e-2)
    )
    data = _pairs(torch.arange(32) % 2)
    (before,) = quiet().validate(module, data, verbose=False)
    trainer = quiet(max_epochs=20)
    trainer.fit(module, data, data)
    assert float(trainer.callback_metrics["val/loss"]) < before["val/loss"] - 0.1
    assert float(trainer.callback_metrics["train/loss"]) < before["val/loss"]


def test_what_downstream_gets() -> None:
    encoder, head, x = nn.Linear(3, 4), FixedReweighting(4, 2.0), torch.randn(5, 3)
    z = encoder(x)
    assert torch.equal(ContrastivePretraining(encoder, head)(x), z)
    assert torch.equal(ContrastivePretraining(encoder, head, keep="post")(x), head(z))
    both = ContrastivePretraining(encoder, head, keep="both").predict_step((x, torch.zeros(5)), 0)
    assert torch.equal(both[0], z) and torch.equal(both[1], head(z))
    with pytest.raises(ValueError, match="keep='all'"):
        ContrastivePretraining(encoder, head, keep="all")


def test_batches_of_two_views_are_known_in_all_their_forms() -> None:
    x1, x2, y = torch.zeros(4, 3), torch.ones(4, 3), torch.arange(4)
    for batch in ((x1, x2), (x1, x2, y), [x1, x2, y], ((x1, x2), y), [[x1, x2], y]):
        first, second, labels = two_views(batch)
        assert first is x1 and second is x2
        assert labels is (y if len(batch) == 3 or not isinstance(batch[0], Tensor) else None)
    assert two_views((x1, y)) is None and two_views(x1) is None
    module = ContrastivePretraining(nn.Linear(3, 4))
    module.validation_step((x1, y), 0)  # encoded for a monitor, nothing to log
    with pytest.raises(RecipeError, match=r"needs batches \(x1, x2\), \(x1, x2, y\) or \(\(x1, x2\), y\)"):
        module.training_step((x1, y), 0)

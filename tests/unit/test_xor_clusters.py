"""XOR clusters and the two-layer ReLU network on them: what is drawn, the first step by hand, the two parts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.datamodules import XORClusterDataModule
from lightning_recipes.datamodules.xor_clusters import fit_ratio, generalisation_ratio
from lightning_recipes.modules import TwoLayerReLU
from lightning_recipes.modules.two_layer_relu import even_part, first_step, odd_part
from tests.stock import quiet

SMALL = {"n": 40, "p": 400, "mu_norm": 6.0, "eta": 0.2, "n_val": 60}


def drawn(**arguments):
    data = XORClusterDataModule(**{**SMALL, **arguments})
    data.setup()
    return data


def test_a_balanced_draw_has_exactly_as_many_samples_and_flips_in_every_cluster():
    data = drawn()
    assert torch.bincount(data.train_set.centres).tolist() == [10] * 4
    flips = torch.bincount(data.train_set.centres[data.flip_mask], minlength=4)
    assert flips.tolist() == [2] * 4, "round(0.2 * 10) in each"
    assert data.train_set.flip_mask is data.flip_mask
    assert not data.val_set.flip_mask.any() and not data.test_set.flip_mask.any()


def test_labels_are_xor_of_the_centres_and_flipped_where_the_mask_says():
    data = drawn()
    x, y = data.train_set.tensors
    clean = torch.where(data.train_set.centres < 2, 1.0, -1.0)
    assert torch.equal(y, torch.where(data.flip_mask, -clean, clean))
    means = torch.stack([data.mu1, -data.mu1, data.mu2, -data.mu2])
    noise = x - means[data.train_set.centres]
    assert noise.mean().abs() < 0.03 and (noise.std() - 1).abs() < 0.03
    assert data.mu1 @ data.mu2 == 0 and data.mu1.norm() == data.mu2.norm() == 6
    indices = drawn(label_dtype="long").train_set.labels
    assert torch.equal(indices, (y > 0).long()) and indices.dtype == torch.int64


def test_the_draw_hangs_on_the_seed_alone_and_sets_are_independent():
    torch.manual_seed(1)
    first = drawn()
    torch.manual_seed(2)
    again, other = drawn(), drawn(seed=1)
    assert torch.equal(first.train_set.tensors[0], again.train_set.tensors[0])
    assert not torch.equal(first.train_set.tensors[0], other.train_set.tensors[0])
    assert not torch.equal(first.val_set.tensors[0], first.test_set.tensors[0])
    assert torch.initial_seed() == 2


def test_independent_draws_flip_about_a_share_eta():
    data = drawn(n=2002, p=2100, balanced=False, mu_norm=6.0)
    assert abs(data.flip_mask.float().mean() - 0.2) < 0.03
    assert (torch.bincount(data.train_set.centres) - 500).abs().max() < 80


def test_one_epoch_is_one_step_on_all_samples_in_order():
    data = drawn()
    (batch,) = data.train_dataloader()
    assert torch.equal(batch[0], data.train_set.tensors[0])
    module = TwoLayerReLU(p=400, m=16, lr=1e-3)
    trainer = quiet(max_epochs=3)
    trainer.fit(module, data)
    assert trainer.global_step == 3


def test_two_ranks_share_the_same_data():
    data = drawn()
    parts = []
    for rank in range(2):
        data.trainer = type("T", (), {"distributed_sampler_kwargs": {"num_replicas": 2, "rank": rank}})()
        data.trainer.fit_loop = type("F", (), {})()
        data.trainer.fit_loop.epoch_progress = type("P", (), {"current": type("C", (), {"processed": 0})})
        parts.append(next(iter(data.train_dataloader()))[0])
    assert [len(part) for part in parts] == [20, 20]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), data.train_set.tensors[0])


def test_a_mean_outside_of_the_window_is_warned_of_with_both_ratios():
    assert fit_ratio(200, 10_000, 20.0) == pytest.approx(0.5657, abs=1e-4)
    assert generalisation_ratio(200, 10_000, 20.0) == pytest.approx(56.57, abs=1e-2)
    with pytest.warns(UserWarning, match=r"mu_norm=40 with n=200 and p=10000: .* is 2\.26 and .* is 226 and"):
        XORClusterDataModule(mu_norm=40.0)
    with pytest.warns(UserWarning, match=r"mu_norm=2 .* is 0\.00566 and .* is 0\.566 and should be far above 1"):
        XORClusterDataModule(mu_norm=2.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"eta": 0.5}, r"eta=0\.5: must be at least 0 and below 0\.5"),
        ({"eta": -0.1}, r"eta=-0\.1: must be"),
        ({"n": 41}, r"n=41: must be a multiple of 4 for a balanced draw \(or balanced=False\)"),
        ({"n": 2}, r"n=2: must be at least 4"),
        ({"p": 1}, r"p=1: must be at least 2"),
        ({"mu_norm": 0.0}, r"mu_norm=0\.0: must be positive"),
        ({"n_val": 0}, r"n_val=0: must be at least 1"),
        ({"label_dtype": "float"}, r"label_dtype='float': must be 'pm1' or 'long'"),
    ],
)
def test_bad_arguments_of_the_data(arguments, says):
    with pytest.raises(ValueError, match=says):
        XORClusterDataModule(**{**SMALL, **arguments})


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_first_step_on_two_points_by_hand():
    """m=1, a=1, w(0)=(1e-9, 1e-9), x1=(1,0) of +1 and x2=(0,1) of -1, alpha=1: W = (1/4, -1/4)."""
    module = TwoLayerReLU(p=2, m=1, lr=1.0)
    with torch.no_grad():
        module.hidden.weight.fill_(1e-9)
        module.out.weight.fill_(1.0)
    x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    by_hand = first_step(torch.full((1, 2), 1e-9), torch.ones(1), x, y, 1.0)
    quiet().fit(module, DataLoader(TensorDataset(x, y), 2))
    expected = torch.tensor([[0.25, -0.25]])
    assert torch.allclose(module.hidden.weight, expected, atol=1e-8, rtol=0)
    assert torch.allclose(by_hand, expected, atol=1e-8, rtol=0)
    assert module(x).tolist() == [0.25, 0.0]


def test_the_first_step_is_the_closed_form_and_the_second_layer_stays():
    data = drawn()
    module = TwoLayerReLU(p=400, m=16, lr=1e-3, omega=1e-9)
    w, a = module.hidden.weight.detach().clone(), module.out.weight.detach()[0].clone()
    x, y = data.train_set.tensors
    quiet().fit(module, data)
    expected = first_step(w, a, x, y, 1e-3)
    assert (module.hidden.weight - expected).norm() < 1e-5 * (expected - w).norm()
    assert torch.equal(module.out.weight[0], a) and torch.equal(a.abs(), torch.full((16,), 0.25))


def test_odd_and_even_part_are_exact_and_add_up():
    module, x = TwoLayerReLU(p=30, m=8, omega=1.0), torch.randn(50, 30)
    w, a = module.hidden.weight.detach(), module.out.weight.detach()[0]
    with torch.no_grad():
        f, mirrored = module(x), module(-x)
    for part, exact in ((f - mirrored, odd_part(w, a, x)), (f + mirrored, even_part(w, a, x))):
        assert (part / 2 - exact).norm() < 1e-6 * exact.norm()


def test_class_indices_train_as_signs_do():
    ends = []
    for kind in ("pm1", "long"):
        module = TwoLayerReLU(p=400, m=16, lr=1e-3)
        trainer = quiet(max_epochs=2)
        trainer.fit(module, drawn(label_dtype=kind))
        ends.append((module.hidden.weight, float(trainer.callback_metrics["val/acc"])))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_its_weights_hang_on_its_seed_alone():
    torch.manual_seed(3)
    a, b, other = TwoLayerReLU(30, 8), TwoLayerReLU(30, 8), TwoLayerReLU(30, 8, seed=1)
    assert torch.equal(a.hidden.weight, b.hidden.weight) and not torch.equal(a.hidden.weight, other.hidden.weight)
    assert torch.initial_seed() == 3
    assert abs(TwoLayerReLU(2000, 64, omega=0.01).hidden.weight.std() - 0.01) < 1e-4


@pytest.mark.parametrize("arguments", [{"p": 0}, {"m": 0}, {"lr": 0.0}, {"omega": 0.0}])
def test_bad_arguments_of_the_network(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.*: must be"):
        TwoLayerReLU(**arguments)

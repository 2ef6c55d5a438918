"""SubGM, LowRankRecovery and MatrixSensingDataModule against numbers computed by hand, closed forms and limit cases."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD

from lightning_recipes.callbacks import GLAD, SubGM
from lightning_recipes.callbacks.adapters import subgm as maths
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import MatrixSensingDataModule
from lightning_recipes.modules import FactorProduct, LowRankRecovery
from lightning_recipes.modules.low_rank_recovery import check_measurements, measure
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples()


def sensed(d=6, r=1, m=90, seed=0, **arguments):
    data = MatrixSensingDataModule(d, r, m, seed=seed, **{"passes": 100, **arguments})
    data.setup()
    return data


def recover(data, recipe, steps, **arguments):
    module = LowRankRecovery(data.d, **{"rank": data.d, **arguments})
    trainer = quiet(max_epochs=-1, max_steps=steps, callbacks=[recipe], log_every_n_steps=steps, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data)
    return module, trainer


# -- the maths -------------------------------------------------------------------------------------------------------


def test_the_sub_gradient_and_a_step_of_two_measurements_by_hand():
    a = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    u = torch.tensor([[0.1], [0.1]])
    q = maths.subgradient(a, torch.tensor([1.0, 0.0]), u @ u.T)
    assert torch.equal(q, torch.diag(torch.tensor([-0.5, 0.5])))
    assert torch.linalg.norm(q).item() == pytest.approx(0.70711, abs=1e-5)
    stepped = maths.subgradient_step(u, q, 0.1)
    assert stepped.flatten().tolist() == pytest.approx([0.1141421, 0.0858579], abs=1e-7)
    assert torch.equal(maths.subgradient_step(u, torch.zeros(2, 2), 0.1), u), "no step where Q is 0"


def test_the_sub_gradient_is_that_of_autograd_and_does_not_change_when_all_residuals_are_scaled():
    data = sensed()
    (a, y), u = data.measurements, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = u @ u.T
    F.l1_loss(measure(a, x), y).backward()
    q = maths.subgradient(a, y, x.detach())
    assert torch.allclose(u.grad, 2 * q @ u.detach(), atol=1e-6)
    scaled = measure(a, x.detach()) - 7 * (measure(a, x.detach()) - y)
    assert torch.equal(maths.subgradient(a, scaled, x.detach()), q)


def test_phi_of_outliers_and_of_dense_noise():
    assert maths.sign_rip_phi(1.0, 0.1, 10.0).item() == pytest.approx(0.7260, abs=1e-4)
    assert maths.sign_rip_phi(1.0, 1.0, 1.0).item() == pytest.approx(0.5642, abs=1e-4)
    assert maths.sign_rip_phi(0.3).item() == pytest.approx(math.sqrt(2 / math.pi)), "no noise"
    assert maths.sign_rip_phi(1.0, 1.0, 1e6).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("p", "v"), [(0.1, 10.0), (1.0, 1.0), (0.0, 0.0)])
def test_the_sub_gradient_has_the_length_phi_along_the_distance(p, v):
    draws = torch.Generator().manual_seed(0)
    a, x = torch.randn(20_000, 4, 4, generator=draws), torch.randn(4, 2, generator=draws)
    x = x @ x.T / torch.linalg.norm(x @ x.T)
    noise = v * torch.randn(len(a), generator=draws) * (torch.rand(len(a), generator=draws) < p)
    q = maths.subgradient(a, noise, x)
    assert (q * x).sum().item() == pytest.approx(maths.sign_rip_phi(1.0, p, v).item(), abs=0.02)


def test_the_spectral_start_points_along_the_truth():
    data = sensed(d=8, r=2, m=8000, outlier_prob=0.1)
    b = maths.spectral_init(*data.measurements, rank=8)
    assert torch.linalg.norm(b @ b.T).item() == pytest.approx(1, abs=1e-5)
    truth = data.truth / torch.linalg.norm(data.truth)
    assert (b @ b.T * truth).sum().item() > 0.95
    left, right = maths.spectral_init_pair(*data.measurements, rank=2)
    assert torch.linalg.norm(left @ right.T).item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(left.T @ left, right.T @ right, atol=1e-5), "balanced"
    assert (left @ right.T * truth).sum().item() > 0.95
    c = maths.spectral_matrix(*data.measurements)
    zero = maths.subgradient(*data.measurements, torch.zeros(8, 8))
    assert torch.allclose((c + c.T) / 2, -zero, atol=1e-6), "C is minus the sub-gradient at 0"
    with pytest.raises(ValueError, match=r"rank=9: must be at least 1 and at most d=8"):
        maths.spectral_init(*data.measurements, rank=9)
    with pytest.raises(ValueError, match="no direction has a positive mean sign"):
        maths.spectral_init(torch.eye(2)[None], torch.tensor([-1.0]), 1)


def test_the_rule_for_rho_leaves_room_to_grow():
    rho = maths.decay_for(1e-4, 0.25)
    assert maths.budget(0.25, rho) == pytest.approx(2 * math.log(1e4) + 4)
    assert maths.budget(0.1, 0.99) == pytest.approx(10)
    assert maths.budget(0.5, 0.5, 2) == pytest.approx(0.75)
    assert maths.decay_for(2.0, 0.25) == maths.decay_for(1.0, 0.25)


def test_of_a_symmetric_product_only_the_symmetric_part_of_the_gradient_counts():
    gradient = torch.tensor([[3.0, 2.0], [-2.0, 4.0]])
    assert maths.product_norm(gradient, symmetric=True).item() == pytest.approx(5)
    assert maths.product_norm(gradient, symmetric=False).item() == pytest.approx(33**0.5)


def test_the_norm_from_the_factors_of_an_aligned_pair_is_that_of_the_product_gradient():
    draws = torch.Generator().manual_seed(0)
    direction = torch.linalg.qr(torch.randn(5, 1, generator=draws))[0]
    u, q = 1e-4 * direction, 3 * direction @ direction.T
    found = maths.factor_norm([2 * q @ u], [u])
    assert found.item() == pytest.approx(3, rel=1e-4), "X = U U^T, whatever the size of U"
    v = 2e-4 * direction
    assert maths.factor_norm([q @ v, q.T @ u], [u, v]).item() == pytest.approx(3, rel=1e-4)


def test_spectra_by_hand():
    b, a = torch.diag(torch.tensor([2.0, 1.0, 1.0]))[:, :2], torch.diag(torch.tensor([3.0, 1.0, 1.0]))[:2]
    assert maths.singular_values(b, a).tolist() == pytest.approx([6, 1])
    wide = torch.randn(3, 7), torch.randn(7, 4)
    assert torch.allclose(maths.singular_values(*wide), torch.linalg.svdvals((wide[0] @ wide[1]).double()), atol=1e-5)
    u = torch.randn(5, 3)
    assert torch.allclose(maths.singular_values(u), torch.linalg.svdvals((u @ u.T).double())[:3], atol=1e-5)
    assert maths.effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert maths.effective_rank(torch.tensor([1.0, 0.0])).item() == pytest.approx(1)
    assert maths.spectral_gap(torch.tensor([8.0, 4.0, 0.1, 0.1])).item() == pytest.approx(40)
    assert maths.spectral_gap(torch.tensor([5.0])).item() == 1
    assert math.isfinite(maths.spectral_gap(torch.tensor([5.0, 0.0])))


def test_what_falls_like_a_square():
    assert maths.falls_like_a_square((1.0, 0.25), (1.0, 0.5)), "squared errors"
    assert not maths.falls_like_a_square((1.0, 0.25), (1.0, 0.9)), "absolute ones"
    assert not maths.falls_like_a_square((1.0, 0.25), (1.0, 1.2))
    assert not maths.falls_like_a_square((1.0, 1.5), (1.0, 0.5)), "the loss has not fallen"


# -- factor pairs ----------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(*shape)))


def test_pairs_are_found_by_their_names_and_shapes():
    net = nn.ModuleDict(
        {
            "asymmetric": Holder(U=(4, 2), V=(3, 2)),
            "alone": Holder(U=(4, 2)),
            "linear": Holder(weight_u=(4, 2), weight_v=(2, 3)),
            "other": Holder(weight_u=(4, 2), bias=(4,)),
            "vectors": Holder(U=(4,), V=(4,)),
        }
    )
    found = {pair.b: pair for pair in maths.find_pairs(net)}
    assert found.keys() == {"asymmetric.U", "alone.U", "linear.weight_u"}
    assert found["asymmetric.U"].a == "asymmetric.V" and found["asymmetric.U"].transposed
    assert found["alone.U"].symmetric and not found["linear.weight_u"].transposed
    parameters = dict(net.named_parameters())
    assert found["asymmetric.U"].product(parameters).tolist() == [[2.0] * 3] * 4
    assert found["linear.weight_u"].product(parameters).tolist() == [[2.0] * 3] * 4
    assert found["alone.U"].product(parameters).tolist() == [[2.0] * 4] * 4
    assert all(pair.seen is None for pair in found.values())
    assert maths.find_pairs(LowRankRecovery(4))[0].seen == ("product", "product")


def test_pairs_are_named_by_expressions():
    net = mlp()
    (pair,) = maths.match_pairs(net, [(r"2\.weight", r"0\.weight")])
    assert (pair.b, pair.a, pair.transposed) == ("2.weight", "0.weight", False)
    with pytest.raises(RecipeError, match=r"'9' matches no parameter; the module has 0.weight \[5, 6\], 0.bias \[5\]"):
        maths.match_pairs(net, [("9", "0.weight")])
    with pytest.raises(RecipeError, match=r"matches 3 parameters and '0\.weight' 1; each factor needs its partner"):
        maths.match_pairs(net, [(".*weight", "0.weight")])
    with pytest.raises(RecipeError, match=r"4.weight \[3, 5\] and 0.bias \[5\] are no factors of one product"):
        maths.match_pairs(net, [("4.weight", "0.bias")])


# -- the reference problem -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_fit_takes_the_papers_steps(symmetric):
    """By hand from the same start, with the true Q: U of U U^T, or both of U V^T by Q V and Q^T U."""
    data, starts = sensed(r=2), []
    recipe = SubGM(1e-2, eta=0.2)
    begin = Watch(on_train_batch_start=lambda t, m, *rest: starts.append([p.detach().clone() for p in m.parameters()]))
    module = LowRankRecovery(6, 4, symmetric, lr=0.3)
    trainer = quiet(max_steps=30, callbacks=[recipe, begin], log_every_n_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    (u, *v), (a, y), rho = starts[0], data.measurements, maths.decay_for(1e-2, 0.2)
    assert torch.linalg.norm(u).item() == pytest.approx(1e-2 * 2, rel=0.3), "a sqrt(r)"
    for t in range(30):
        size = 0.2 * rho**t
        if symmetric:
            q = maths.subgradient(a, y, u @ u.T)
            u = maths.subgradient_step(u, q, size)
        else:
            signs = torch.sign(measure(a, u @ v[0].T) - y)
            q = torch.einsum("m,mij->ij", signs, a) / len(y)
            rate = size / torch.linalg.norm(q)
            u, v = u - rate * q @ v[0], [v[0] - rate * q.T @ u]
    for ours, theirs in zip(module.parameters(), [u, *v]):
        assert torch.allclose(ours, theirs, atol=1e-5)
    logged = trainer.callback_metrics
    assert logged["subgm/q_norm"].item() == pytest.approx(torch.linalg.norm(q).item(), rel=1e-4)
    assert logged["subgm/lr"].item() == pytest.approx(0.2 * rho**29 / torch.linalg.norm(q).item(), rel=1e-4)
    assert logged["subgm/budget"].item() == pytest.approx(maths.budget(0.2, rho, 30) / math.log(100), rel=1e-5)
    assert {"subgm/loss", "subgm/error", "subgm/effective_rank", "subgm/sv_gap"} <= logged.keys()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.3, "the user's group is as it was"
    assert recipe.state()["t"] == 30


def test_without_noise_it_recovers_to_the_floor_of_the_last_step_and_logs_the_rank():
    data = sensed(r=2, m=120, outlier_prob=0.0)
    module, trainer = recover(data, SubGM(1e-2), 400)
    assert torch.linalg.norm(module() - data.truth).item() < 2e-3
    assert trainer.callback_metrics["subgm/error"].item() < 2e-3
    assert trainer.callback_metrics["subgm/effective_rank"].item() == pytest.approx(2, abs=0.01)
    assert trainer.callback_metrics["subgm/sv_gap"].item() > 100


def test_the_scalar_problem_converges():
    data = sensed(d=1, r=1, m=30, outlier_prob=0.3)
    module, _ = recover(data, SubGM(0.1), 250)
    assert module().item() == pytest.approx(1, abs=1e-3)


def test_too_short_a_schedule_never_leaves_the_origin_and_is_refused():
    with pytest.raises(
        RecipeError, match=r"sum to 10, and from init_scale=1e-06 they need .* 13.8: the iterate cannot"
    ):
        SubGM(1e-6, eta=0.1, rho=0.99)
    data = sensed(d=20, r=3, m=600)
    u = 1e-6 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0)) / 20**0.5
    for t in range(600):
        u = maths.subgradient_step(u, maths.subgradient(*data.measurements, u @ u.T), 0.1 * 0.99**t)
    assert torch.linalg.norm(u @ u.T - data.truth).item() == pytest.approx(3**0.5, abs=0.02), "what it is refused for"


def test_normalised_by_the_factors_it_recovers_too():
    data = sensed(m=120)
    module, _ = recover(data, SubGM(1e-2, normalize="param"), 300)
    assert torch.linalg.norm(module() - data.truth).item() < 0.02


def test_from_the_spectral_start_both_forms_recover():
    data = sensed(m=120)
    starts = []
    for symmetric in (True, False):
        recipe = SubGM(1e-2, init="spectral")
        module = LowRankRecovery(6, 3, symmetric)
        begin = Watch(on_train_start=lambda t, m: starts.append(m().detach()))
        trainer = quiet(max_epochs=-1, max_steps=300, callbacks=[recipe, begin], limit_val_batches=0)
        trainer.fit(module, datamodule=data)
        assert torch.linalg.norm(starts[-1]).item() == pytest.approx(1e-4, rel=1e-3)
        assert torch.linalg.norm(module() - data.truth).item() < 0.02


# -- what it leaves alone --------------------------------------------------------------------------------------------


def test_keeping_everything_is_bitwise_plain_sgd_and_still_shows_the_spectrum():
    data = sensed()
    plain = LowRankRecovery(6, lr=0.05, init_scale=0.1)
    quiet(max_steps=20, limit_val_batches=0).fit(plain, datamodule=data)
    watched, trainer = recover(data, SubGM(init="keep", schedule_lr=False), 20, lr=0.05, init_scale=0.1)
    assert same(weights(plain), weights(watched))
    assert trainer.callback_metrics["subgm/effective_rank"] > 1
    assert not SubGM(init="keep", schedule_lr=False).neutral
    assert SubGM(init="keep", schedule_lr=False, log_spectrum=False).neutral


def test_without_a_norm_the_rate_is_the_geometric_one():
    data = sensed()
    _, trainer = recover(data, SubGM(init="keep", normalize="none", eta=0.05, rho=0.5), 3, init_scale=0.1)
    assert trainer.callback_metrics["subgm/lr"] == pytest.approx(0.0125)


def test_other_parameters_keep_their_rate():
    module, start = Classifier(Factored()), Classifier(Factored())
    recipe = SubGM(0.3, eta=0.01)
    first = {n: p.detach().clone() for n, p in start.named_parameters()}
    quiet(callbacks=[recipe], limit_train_batches=1).fit(module, loader(X, Y))
    with torch.no_grad():  # the same small factors
        for name, value in recipe_start(recipe, start).items():
            start.get_parameter(name).copy_(value)
    loss = F.cross_entropy(start(X[:4]), Y[:4])
    loss.backward()
    assert torch.allclose(
        module.net.head.weight, first["net.head.weight"] - 0.1 * start.net.head.weight.grad, atol=1e-6
    )
    norm = maths.factor_norm(
        [start.net.weight_u.grad, start.net.weight_v.grad], [start.net.weight_u, start.net.weight_v]
    )
    rate = 0.01 / norm
    assert torch.allclose(module.net.weight_u, start.net.weight_u - rate * start.net.weight_u.grad, atol=1e-6)


class Factored(nn.Module):
    """A linear layer of factors that no part of its own multiplies, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight_u, self.weight_v = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x @ (self.weight_u @ self.weight_v).T)


def recipe_start(recipe, module):
    from lightning_recipes.core.random import generator

    shapes = {"net.weight_u": ((5, 2), 5), "net.weight_v": ((2, 6), 6)}
    return {
        name: maths.small_factor(shape, d, recipe.init_scale, generator(0, "SubGM", 0, side))
        for side, (name, (shape, d)) in enumerate(shapes.items())
    }


def test_after_glad_both_factors_of_its_adapters_start_small_and_q_is_the_dense_gradient():
    module, seen = Classifier(), {}

    def look(trainer, pl_module, *rest):
        if not seen:
            seen.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if "lora" in n})

    recipe = SubGM(1e-2, eta=0.05)
    lora = GLAD(mix=0, rank=2, lora_alpha=6, target_modules=["2"])
    quiet(callbacks=[lora, recipe, Watch(on_train_batch_start=look)], limit_train_batches=1).fit(module, loader(X, Y))
    a, b = (next(v for n, v in seen.items() if side in n) for side in ("lora_A", "lora_B"))
    for factor in (a, b):
        assert 0 < torch.linalg.norm(factor) < 3e-2
    dense = mlp()
    with torch.no_grad():
        dense[2].weight += 3 * b @ a
    F.cross_entropy(dense(X[:4]), Y[:4]).backward()
    q = 3 * dense[2].weight.grad  # with respect to B A, of which the layer takes alpha / r
    moved = mlp()[2].weight + 3 * (b - 0.05 / torch.linalg.norm(q) * q @ a.T) @ (
        a - 0.05 / torch.linalg.norm(q) * b.T @ q
    )
    assert torch.allclose(module.net[2].weight, moved, atol=1e-6)


def test_frozen_factors_beside_adapters_are_left_alone():
    module = Classifier(Factored())
    before = weights(module)
    lora = GLAD(mix=0, rank=2, target_modules=["head"], train_fully=[])
    quiet(callbacks=[lora, SubGM(1e-2)]).fit(module, loader(X, Y))
    after = weights(module)
    assert torch.equal(before["net.weight_u"], after["net.weight_u"])
    assert not torch.equal(before["net.head.weight"], after["net.head.weight"])


def test_a_second_fit_goes_on_from_the_weights_of_the_first():
    data, recipe = sensed(), SubGM(1e-2, eta=1e-6, rho=0.9999999)
    module, _ = recover(data, recipe, 3)
    between = weights(module)
    quiet(max_steps=1, callbacks=[recipe]).fit(module, datamodule=data)
    assert torch.allclose(module.U, between["U"], rtol=1e-3, atol=1e-8)
    quiet(max_steps=1, callbacks=[SubGM(1e-3)]).fit(module, datamodule=data)
    assert torch.linalg.norm(module.U) < 0.5 * torch.linalg.norm(between["U"]), "another one starts anew"


def test_a_resume_with_no_step_left_ends_with_the_checkpoints_factors(tmp_path):
    data, keep = sensed(), ModelCheckpoint(tmp_path, "last", every_n_train_steps=5)
    through, resumed = LowRankRecovery(6), LowRankRecovery(6)
    quiet(max_epochs=-1, max_steps=5, callbacks=[SubGM(0.1), keep], enable_checkpointing=True).fit(
        through, datamodule=data
    )
    again = quiet(max_epochs=-1, max_steps=5, callbacks=[SubGM(0.1)])
    again.fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert same(weights(resumed), weights(through))


def test_squared_errors_are_warned_of_and_absolute_ones_are_not():
    data = sensed(d=4, r=1, m=100, outlier_prob=0.0)
    for loss, expected in (("mse", True), ("l1", False)):
        module = LowRankRecovery(4, 1, loss=loss)
        trainer = quiet(max_steps=60, callbacks=[SubGM(0.1)], log_every_n_steps=1, limit_val_batches=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, datamodule=data)
        assert any("as it does for squared errors" in str(w.message) for w in caught) == expected, loss


def test_a_large_start_and_half_precision_are_warned_of():
    with pytest.warns(UserWarning, match="init_scale=2 is no small start"):
        SubGM(2.0)
    with pytest.warns(UserWarning, match="lost in half precision; train the factors in 32-true"):
        quiet(callbacks=[SubGM(0.1)], precision="bf16-mixed", max_steps=2).fit(LowRankRecovery(6), datamodule=sensed())


def test_a_pair_that_cannot_be_seen_is_said():
    with pytest.warns(UserWarning, match="cannot be seen for 1 of 1 pairs, the first net.weight_u and net.weight_v"):
        quiet(callbacks=[SubGM(0.1)]).fit(Classifier(Factored()), loader(X, Y))


# -- the module and its data -----------------------------------------------------------------------------------------


def test_the_measurements_are_what_they_are_said_to_be():
    data = sensed(d=12, r=3, m=4000, outlier_prob=0.2, outlier_std=5.0)
    a, y = data.measurements
    assert torch.linalg.norm(data.truth).item() == pytest.approx(3**0.5, abs=1e-5)
    assert torch.allclose(data.truth @ data.truth, data.truth, atol=1e-5), "a projection of rank 3"
    noise = y - torch.einsum("mij,ij->m", a, data.truth)
    hit = noise.abs() > 1e-3
    assert hit.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert noise[hit].std().item() == pytest.approx(5, rel=0.1)
    assert a.std().item() == pytest.approx(1, abs=0.01)
    dense = sensed(d=12, r=3, m=4000, outlier_prob=0.0, noise_std=0.5)
    assert (dense.measurements[1] - measure(dense.measurements[0], dense.truth)).std().item() == pytest.approx(
        0.5, rel=0.1
    )
    again = sensed(d=12, r=3, m=4000, outlier_prob=0.2, outlier_std=5.0)
    assert torch.equal(again.measurements[1], y), "the same from the same seed"


def test_a_batch_is_all_measurements_and_an_epoch_as_many_steps_as_it_is_told():
    data = sensed(m=90, passes=3)
    batches = list(data.train_dataloader())
    assert len(batches) == 3 and batches[0][0] is data.measurements[0], "not copied"
    for a, y in batches:
        assert torch.equal(a, data.measurements[0]) and torch.equal(y, data.measurements[1])
    (truth, _), *rest = data.val_dataloader()
    assert torch.equal(truth[0], data.truth) and not rest
    shuffled = sensed(m=90, batch_size=60, shuffle=True, passes=1)
    parts = list(shuffled.train_dataloader())
    assert [len(y) for _, y in parts] == [60, 30]
    together = torch.cat([y for _, y in parts])
    assert not torch.equal(together, data.measurements[1]) and torch.equal(
        together.sort().values, data.measurements[1].sort().values
    )


def test_the_module_tells_the_error_and_takes_a_balance():
    data = sensed()
    module = LowRankRecovery(6, 2, symmetric=False, balance=2.0, init_scale=0.5)
    (tested,) = quiet().test(module, data, verbose=False)
    assert tested["test/error"] == pytest.approx(torch.linalg.norm(module() - data.truth).item(), abs=1e-6)
    gap = module.U.T @ module.U - module.V.T @ module.V
    plain = F.l1_loss(measure(data.measurements[0], module()), data.measurements[1])
    module.log = lambda *args, **kwargs: None
    assert module.training_step(data.measurements, 0).item() == pytest.approx(
        (plain + 0.5 * gap.square().sum()).item(), rel=1e-5
    )
    squares = LowRankRecovery(6, 2, loss="mse")
    squares.log = module.log
    by_hand = (measure(data.measurements[0], squares()) - data.measurements[1]).square().mean()
    assert squares.training_step(data.measurements, 0).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_product_is_formed_in_fp32_under_autocast():
    u = torch.full((2, 1), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        x = FactorProduct()(u, u)
    assert x.dtype == torch.float32
    assert x[0, 0].item() == pytest.approx(1e-8, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "y", "says"),
    [
        (torch.ones(0, 2, 2), torch.ones(0), r"y must be \[m\] with at least one measurement; got \[0\]"),
        (torch.ones(3, 2, 3), torch.ones(3), r"A must be \[m, 2, 2\] with m=3 as y has it; got \[3, 2, 3\]"),
        (torch.ones(4, 2, 2), torch.ones(3), r"A must be \[m, 2, 2\] with m=3 as y has it; got \[4, 2, 2\]"),
        (torch.ones(3, 2, 2), torch.tensor([0.0, math.nan, math.inf]), r"y\[1\] is nan, and .* finite \(2 are not\)"),
    ],
)
def test_measurements_that_are_none_are_refused(a, y, says):
    with pytest.raises(ValueError, match=says):
        check_measurements(a, y, (2, 2))
    module = LowRankRecovery(2)
    module.log = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=says):
        module.training_step((a, y), 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"r": 7}, "r=7: must be at least 1 and at most d=6"),
        ({"m": 0}, "m=0: must be at least 1"),
        ({"outlier_prob": 1.0}, "outlier_prob=1.0: must be at least 0 and below 1"),
        ({"passes": 0}, "passes=0: must be at least 1"),
    ],
)
def test_bad_arguments_of_the_data(arguments, says):
    with pytest.raises(ValueError, match=says):
        MatrixSensingDataModule(**{"d": 6, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rank": 0}, "rank=0: must be None or at least 1"),
        ({"loss": "huber"}, "loss='huber': must be 'l1' or 'mse'"),
        ({"init_scale": 0.0}, "init_scale=0.0: must be positive: zero is a saddle"),
        ({"balance": 1.0}, r"balance=1.0: must be 0, or positive for X = U V\^T"),
    ],
)
def test_bad_arguments_of_the_module(arguments, says):
    with pytest.raises(ValueError, match=says):
        LowRankRecovery(6, **arguments)


def test_small_batches_are_warned_of():
    with pytest.warns(UserWarning, match="batches of 59 measurements for d=6: below about 10 d = 60"):
        MatrixSensingDataModule(6, 1, 90, batch_size=59)


def test_the_factors_rate_must_be_there_to_be_scaled():
    module = Classifier(Factored(), optimizer=lambda parameters: SGD(parameters, lr=0.0))
    with pytest.raises(RecipeError, match=r"the rate of net\.weight_u's group must be positive to be scaled; got 0.0"):
        quiet(callbacks=[SubGM(0.1)]).fit(module, loader(X, Y))

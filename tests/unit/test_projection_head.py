"""Projection heads in a stock module, the theory behind them, and the probes of both sides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_recipes.callbacks import PEGO, PrePostMonitor, ProgressiveUnfreezing, ProjectionHead
from lightning_recipes.callbacks.finetuning.pre_post_monitor import effective_rank
from lightning_recipes.callbacks.finetuning.projection_head import build_head, projected
from lightning_recipes.core import select
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.head_fit import fit_logistic
from lightning_recipes.modules import ContrastivePretraining, FixedReweighting, MLPHead, NTXentLoss
from tests.attention import timm_vit
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(24)
STOCK = sorted(Classifier().state_dict())


def data() -> DataLoader:
    return loader(X, Y)


def train(*callbacks: Any, module: Any = None, **trainer: Any) -> tuple[Classifier, pl.Trainer]:
    module = Classifier() if module is None else module
    fit = quiet(callbacks=list(callbacks), **trainer)
    fit.fit(module, data(), trainer.get("val"))
    return module, fit


def logits_at_start(*callbacks: Any) -> Tensor:
    found = []
    train(*callbacks, Watch(on_train_start=lambda trainer, module: found.append(module(X).detach())))
    return found[0]


# -- theory: linear layers and the spectral contrastive loss ---------------------------------------------------------


def descend(phi: Any, rho: Any, w1: Any, w2: Any, rate: float, steps: int) -> tuple[Any, Any, float]:
    """Gradient descent of L = -2 tr(M P) + tr(M S M S), M = (W2 W1)' W2 W1; weights of features in z and u, and L."""
    s, p = np.diag(phi**2), np.diag(rho * phi**2)
    for _ in range(steps):
        u = w2 @ w1
        g = 4 * u @ (s @ u.T @ u @ s - p)  # dL/du, with M, S and P symmetric
        w1, w2 = w1 - rate * w2.T @ g, w2 - rate * g @ w1.T
    u = w2 @ w1
    m = u.T @ u
    loss = -2 * np.trace(m @ p) + np.trace(m @ s @ m @ s)
    return np.linalg.norm(w1, axis=0), np.linalg.norm(u, axis=0), float(loss)


PHI, RHO = np.array([2.0, 1.0, 0.5, 1.0]), np.array([1.0, 1.0, 1.0, 0.25])


def test_a_linear_network_weights_features_by_sqrt_rho_over_phi_behind_the_head_and_by_its_root_before_it() -> None:
    draw = np.random.default_rng(0)
    w1, w2 = (0.1 * draw.standard_normal((4, 4)) for _ in range(2))
    pre, post, loss = descend(PHI, RHO, w1, w2, 0.03, 40_000)
    assert np.abs(post - np.sqrt(RHO) / PHI).max() < 1e-9
    assert loss == pytest.approx(-np.sum(RHO**2), abs=1e-9) == -3.0625
    # the start is not small enough for exact balance, and small enough to see it
    assert np.abs(pre - np.sqrt(np.sqrt(RHO) / PHI)).max() < 0.08
    assert post.max() / post.min() > 1.5 * pre.max() / pre.min()


def test_balanced_layers_stay_balanced_so_the_root_is_exact() -> None:
    w1 = np.diag([0.3, 0.4, 0.5, 0.6])
    pre, post, _ = descend(PHI, RHO, w1, w1.copy(), 0.03, 20_000)
    assert np.abs(pre - [2**-0.5, 1, 2**0.5, 2**-0.5]).max() < 1e-9
    assert np.abs(post - [0.5, 1, 2, 0.5]).max() < 1e-9


def test_a_feature_that_is_learned_slowly_is_further_on_before_the_head() -> None:
    """From a balanced start post is the square of pre at every moment."""
    start = 0.03 * np.eye(2)
    pre, post, _ = descend(np.array([2.0, 1.0]), np.ones(2), start, start.copy(), 0.03, 3800)
    assert post[0] == pytest.approx(0.5, abs=1e-9)
    assert 0.004 < post[1] < 0.006 and pre[1] == pytest.approx(post[1] ** 0.5) and pre[1] > 0.065


# -- the head in a stock module --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [True, False])
def test_the_identity_head_starts_with_the_same_logits(threshold: bool) -> None:
    assert torch.equal(logits_at_start(ProjectionHead("identity", threshold=threshold)), logits_at_start())


def test_the_fixed_head_with_kappa_1_is_bitwise_plain_training_and_warns() -> None:
    with pytest.warns(UserWarning, match="kappa=1 has no effect"):
        neutral = ProjectionHead("fixed", kappa=1.0, discard="fit_end")
    assert same(weights(train(neutral)[0]), weights(train()[0]))


def test_the_fixed_head_multiplies_what_the_classifier_gets() -> None:
    start = logits_at_start(ProjectionHead("fixed", kappa=2.0))
    net = mlp()
    z = net[:-1](X)
    assert torch.allclose(start, net[-1](z * torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])))


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ({}, {"0.weight": (5, 5), "0.bias": (5,), "2.weight": (5, 5), "2.bias": (5,)}),
        ({"kind": "mlp2", "hidden": 7}, {"0.weight": (7, 5), "2.weight": (7, 7), "4.weight": (5, 7)}),
        ({"kind": "identity"}, {"0.weight": (5, 5), "1.threshold": (), "2.weight": (5, 5)}),
        ({"kind": "fixed"}, {"weights": (5,)}),
    ],
)
def test_the_stock_keys_stay_and_the_head_adds_its_own(arguments: Any, made: dict[str, Any]) -> None:
    module, trainer = train(ProjectionHead(**arguments))
    kept = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert {name: kept[name] for name in STOCK} == {
        name: tuple(v.shape) for name, v in Classifier().state_dict().items()
    }
    heads = {name.removeprefix("net.4.projection."): shape for name, shape in kept.items() if "projection" in name}
    assert made.items() <= heads.items()
    moved = [name for name, p in module.named_parameters() if "projection" in name]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert all(id(module.get_parameter(name)) in held for name in moved)
    assert type(module.net[4]) is nn.Linear and select.head(module) == "net.4"


def test_another_width_makes_the_classifier_anew_and_discarding_gives_the_old_one_back() -> None:
    widths = []
    look = Watch(
        on_train_start=lambda trainer, module: widths.append((module.net[4].in_features, module.net[4].weight))
    )
    module, trainer = train(ProjectionHead(hidden=6, out=2, discard="fit_end"), look)
    assert widths[0][0] == 2 and widths[0][1].shape == (3, 2)
    assert any(p is widths[0][1] for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert module.net[4].in_features == 5 and module.net[4].weight.shape == (3, 5)
    assert sorted(module.state_dict()) == STOCK


def test_the_head_is_adopted_by_an_optimizer_whose_groups_are_listed_by_hand() -> None:
    net = mlp()
    listed = lambda _: torch.optim.SGD(  # noqa: E731
        [
            {"params": [*net[0].parameters(), *net[2].parameters()], "lr": 0.1},
            {"params": [*net[4].parameters()], "lr": 0.3},
        ]
    )
    module, trainer = train(ProjectionHead("identity"), module=Classifier(net, listed))
    ours = {id(p) for p in module.net[4].projection.parameters()}
    held = [{id(p) for p in group["params"]} for group in trainer.optimizers[0].param_groups]
    assert ours <= held[1] and not ours & held[0]


def test_the_first_values_are_the_heads_own_and_the_random_state_is_left_alone() -> None:
    def begin(*recipes: Any) -> tuple[Tensor, list[Tensor]]:
        state, first = [], []
        torch.manual_seed(5)

        def look(trainer: Any, module: Any) -> None:
            state.append(torch.get_rng_state())
            first.extend(p.detach().clone() for n, p in module.named_parameters() if "projection" in n)

        train(*recipes, Watch(on_train_start=look))
        return state[0], first

    plain, _ = begin()
    once, first = begin(ProjectionHead())
    again, second = begin(ProjectionHead())
    _, other = begin(ProjectionHead(seed=1))
    assert torch.equal(plain, once) and torch.equal(once, again)
    assert all(map(torch.equal, first, second)) and not torch.equal(first[0], other[0])


def test_kept_by_choice_it_goes_on_acting_and_a_copy_has_a_head_of_its_own() -> None:
    """Nothing of the result changes when the fit closes, whatever runs afterwards, in a copy too."""
    last = []
    module, _ = train(ProjectionHead(), Watch(on_train_end=lambda t, m: last.append(m(X).detach())))
    assert torch.equal(module(X), last[0])
    quiet(callbacks=[ProjectionHead()]).validate(module, data(), verbose=False)
    assert torch.equal(module(X), last[0]) and projected(module)[0] == "net.4"
    twin = copy.deepcopy(module)
    assert torch.equal(twin(X), last[0])
    nn.init.zeros_(twin.net[4].projection[2].weight)
    assert not torch.equal(twin(X), last[0]) and torch.equal(module(X), last[0])


def test_a_second_fit_goes_on_with_the_head_that_the_first_one_kept() -> None:
    module, _ = train(ProjectionHead())
    head = module.net[4].projection
    before = weights(head)
    train(ProjectionHead(), module=module)
    assert module.net[4].projection is head and not same(weights(head), before)
    assert len(module.net[4]._forward_pre_hooks) == 1
    with pytest.raises(RecipeError, match="carries another projection head from an earlier fit"):
        train(ProjectionHead("identity"), module=module)
    train(ProjectionHead(discard="fit_end"), module=module)
    assert sorted(module.state_dict()) == STOCK and not module.net[4]._forward_pre_hooks


@pytest.mark.parametrize("arguments", [{"kind": "mlp"}, {"kind": "fixed"}, {"kind": "mlp", "out": 2}])
def test_discarded_the_module_is_stock_and_its_classifier_is_the_probe_of_z(arguments: Any) -> None:
    module, _ = train(ProjectionHead(discard="fit_end", **arguments), max_epochs=3)
    assert sorted(module.state_dict()) == STOCK and not module.net[4]._forward_pre_hooks
    z = module.net[:-1](X).detach()
    expected = fit_logistic(z, Y, 3, floor=0.1)
    assert torch.allclose(module(X).double(), expected(z), atol=1e-4)
    assert same(weights(copy.deepcopy(module)), weights(module))


def test_discarded_without_a_refit_the_classifier_stays_and_the_user_is_warned() -> None:
    with pytest.warns(
        UserWarning, match="discard='fit_end' with refit='none' leaves a classifier that was trained on u"
    ):
        module, _ = train(ProjectionHead("fixed", kappa=1.5, discard="fit_end", refit="none"))
    kept, _ = train(ProjectionHead("fixed", kappa=1.5))
    trained = {name: value for name, value in weights(kept).items() if name in STOCK}
    assert same(weights(module), trained)


def test_checkpoints_of_the_fit_load_with_the_head_and_those_after_it_without(tmp_path: Path) -> None:
    at_end = []
    keep = ModelCheckpoint(tmp_path, "fit", save_top_k=-1)
    recipe = ProjectionHead(out=2, discard="fit_end")
    module, trainer = train(
        recipe, keep, Watch(on_train_end=lambda t, m: at_end.append(m(X).detach())), enable_checkpointing=True
    )
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    fresh, seen = Classifier(mlp(seed=3)), []
    look = Watch(on_validation_start=lambda t, m: seen.append(m(X).detach()))
    quiet(callbacks=[ProjectionHead(out=2, discard="fit_end"), look]).validate(
        fresh, data(), ckpt_path=tmp_path / "fit.ckpt", verbose=False
    )
    assert torch.equal(seen[0], at_end[0])
    assert sorted(fresh.state_dict()) == STOCK and projected(fresh) is None

    stock = Classifier(mlp(seed=3))
    quiet().validate(stock, data(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert same(weights(stock), weights(module))
    stock.load_state_dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"])


def test_an_exception_takes_the_head_out_without_fitting_anything() -> None:
    def fail(*args: Any) -> None:
        raise KeyError("stop")

    module = Classifier()
    with pytest.raises(KeyError):
        train(ProjectionHead(out=2, discard="fit_end"), Watch(on_train_batch_end=fail), module=module)
    assert sorted(module.state_dict()) == STOCK and module.net[4].weight.shape == (3, 5)
    assert not module.net[4]._forward_pre_hooks


def test_the_threshold_moves_and_is_logged() -> None:
    module, trainer = train(ProjectionHead("identity"), max_epochs=2)
    threshold = module.net[4].projection[1].threshold
    assert threshold != 0 and trainer.callback_metrics["projection/threshold"] == threshold.detach()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", ["mlp", "identity", "fixed"])
def test_other_precisions(kind: Any, precision: Any) -> None:
    module, _ = train(ProjectionHead(kind, discard="fit_end"), precision=precision)
    assert sorted(module.state_dict()) == STOCK and module.net[4].weight.isfinite().all()


def test_a_compiled_network_goes_through_the_head_also_when_it_ran_before() -> None:
    compiled = Classifier()
    compiled.net = torch.compile(compiled.net, backend="eager")
    compiled(X)
    plain, _ = train(ProjectionHead("fixed", kappa=2.0))
    train(ProjectionHead("fixed", kappa=2.0), module=compiled)
    for (name, ours), theirs in zip(weights(compiled).items(), weights(plain).values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_it_is_a_part_of_the_head_for_other_recipes() -> None:
    """Of a Linear without a head's name too; beside adapters it trains, and it sleeps and wakes with the head."""
    module, _ = train(ProgressiveUnfreezing(at=(0,)), ProjectionHead())
    names = [name for name, _ in module.named_parameters()]
    assert set(select.parameters_under(module, ["head"], "x")) == {n for n in names if n.startswith("net.4.")}
    assert [name for name, _ in select.layers(module)] == ["net.0", "net.2", "head"]
    assert not torch.equal(module.net[4].projection[0].weight, mlp(seed=0)[2].weight)
    for order in (1, -1):
        vit, trains = timm_vit(), []
        recipes = [PEGO(1, 2), ProjectionHead()][::order]
        look = Watch(
            on_train_start=lambda t, m, trains=trains: trains.extend(
                n for n, p in m.named_parameters() if p.requires_grad
            )
        )
        images = loader(torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3)
        quiet(callbacks=[*recipes, look]).fit(vit, images)
        assert sum("projection" in name for name in trains) == 4 and any("lora" in name for name in trains)
        assert {n.split(".projection")[0] for n in trains if "projection" in n} == {select.head(vit)}


# -- the monitor -----------------------------------------------------------------------------------------------------


class Labelled(TensorDataset):
    """Digit-like data with a finer label and a group beside the label."""

    def __init__(self, count: int = 48) -> None:
        x, y = samples(count)
        super().__init__(x, y)
        self.fine = torch.arange(count) % 6
        self.place = torch.arange(count) // 8 % 2


def monitored(*recipes: Any, module: Any = None, sets: Any = None, **trainer: Any) -> tuple[Any, dict[str, float]]:
    train_set, val_set = (Labelled(), Labelled(24)) if sets is None else sets
    module = Classifier() if module is None else module
    fit = quiet(callbacks=list(recipes), **trainer)
    fit.fit(module, DataLoader(train_set, 8), DataLoader(val_set, 8))
    return module, {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("projection")}


def test_effective_rank_by_hand() -> None:
    assert effective_rank(torch.eye(4).repeat(3, 1) * 2 - 1) == pytest.approx(3)  # 4 vertices of a tetrahedron
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert effective_rank(two) == pytest.approx(2)
    assert effective_rank(two * torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.ones(3, 2)) == pytest.approx(1)
    shares = torch.tensor([0.8, 0.2])
    assert effective_rank(two * shares.sqrt()) == pytest.approx(float((-shares * shares.log()).sum().exp()))
    assert effective_rank(torch.randn(5, 40)) <= 4 + 1e-9


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_fit_is_bitwise_the_same_with_the_monitor(sanity: int, tmp_path: Path) -> None:
    def end(*callbacks: Any, **trainer: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
        return weights(monitored(*callbacks, module=Classifier(net), max_epochs=3, **trainer)[0])

    probes = PrePostMonitor(labels="fine", group="place", max_samples=30)
    log = {"logger": CSVLogger(tmp_path), "num_sanity_val_steps": sanity}
    assert same(end(ProjectionHead(), num_sanity_val_steps=sanity), end(ProjectionHead(), probes, **log))
    assert list(tmp_path.rglob("projection_probes.png")), "the curves are drawn where the run logs"
    assert len(probes._history.steps) == 3


def test_what_is_logged_is_the_probe_of_z_and_u_on_held_features() -> None:
    module, found = monitored(ProjectionHead(), PrePostMonitor(labels="fine", group="place"), max_epochs=2)
    held, on = Labelled(24), Labelled()
    z_on, z_held = (module.net[:-1](d.tensors[0]).detach() for d in (on, held))
    head = module.net[4].projection
    for side, of in (("pre", nn.Identity()), ("post", head)):
        f, g = of(z_on).detach(), of(z_held).detach()
        assert on.place.bincount().tolist() == [24, 24]  # balanced as it is
        right = (fit_logistic(f, on.fine, 6)(g).argmax(1) == held.fine).double()
        assert found[f"projection/probe_{side}"] == pytest.approx(float(right.mean()))
        worst = min(float(right[held.place == place].mean()) for place in (0, 1))
        assert found[f"projection/probe_{side}_worst_group"] == pytest.approx(worst)
        assert found[f"projection/effective_rank_{side}"] == pytest.approx(float(effective_rank(f)), rel=1e-4)
    ratio = found["projection/effective_rank_post"] / found["projection/effective_rank_pre"]
    assert found["projection/feature_ratio"] == pytest.approx(ratio)


def test_standardised_probes_of_a_fixed_head_agree_and_raw_ones_do_not() -> None:
    z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 3
    u = FixedReweighting(8, 3.0)(z)
    alike = [fit_logistic(f, y)(f) for f in (z, u)]
    raw = [fit_logistic(f, y, standardise=False)(f) for f in (z, u)]
    assert torch.allclose(*alike, atol=1e-5) and (raw[0] - raw[1]).abs().max() > 0.1
    with pytest.warns(UserWarning, match="standardising makes z and u of the fixed head the same"):
        _, found = monitored(ProjectionHead("fixed", kappa=3.0), PrePostMonitor())
    assert found["projection/probe_pre"] == found["projection/probe_post"]


def test_without_a_head_only_the_classifiers_input_is_probed() -> None:
    _, found = monitored(PrePostMonitor())
    assert set(found) == {"projection/probe_pre", "projection/effective_rank_pre"}


def test_a_head_of_the_users_own_is_named() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), MLPHead(5, 7, 4), nn.Linear(4, 3))
    _, found = monitored(PrePostMonitor(head="net.2"), module=Classifier(net))
    z = net[:2](Labelled().tensors[0]).detach()
    assert found["projection/effective_rank_pre"] == pytest.approx(float(effective_rank(z)), rel=1e-4)
    assert found["projection/effective_rank_post"] == pytest.approx(float(effective_rank(net[2](z).detach())), rel=1e-4)


def test_labels_and_groups_by_a_function_of_the_batch_and_attributes_below_subsets() -> None:
    x, y = samples(48)
    columns = TensorDataset(x, y, torch.arange(48) % 6, torch.arange(48) // 8 % 2)

    class Three(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    by_function = PrePostMonitor(labels=lambda batch: batch[2], group=lambda batch: batch[3])
    _, found = monitored(by_function, module=Three(), sets=(columns, columns))
    named = PrePostMonitor(labels="fine", group="place")
    everything = list(range(48))
    _, expected = monitored(
        named, sets=(Subset(Labelled(), everything), Subset(Subset(Labelled(), everything), everything))
    )
    assert found == expected and "projection/probe_pre_worst_group" in found


def test_contrastive_pretraining_is_probed_on_both_sides_of_its_head() -> None:
    x, y = samples(32)
    module = ContrastivePretraining(
        nn.Linear(6, 5), MLPHead(5), NTXentLoss(), optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    views, single = TensorDataset(x, x + 0.01, y), TensorDataset(x, y)
    _, found = monitored(PrePostMonitor(), module=module, sets=(views, single))
    z = module.encoder(x).detach()
    right = (fit_logistic(z, y, 3)(z).argmax(1) == y).double().mean()
    assert found["projection/probe_pre"] == pytest.approx(float(right)) and "projection/probe_post" in found


def test_a_monitor_in_a_fit_without_validation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="PrePostMonitor measures in validations, and this fit has none"):
        quiet(callbacks=[PrePostMonitor()]).fit(Classifier(), data())


def test_at_most_so_many_samples_the_same_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    probes = PrePostMonitor(max_samples=20)
    measure = probes._measure
    probes._measure = lambda train, val, device: seen.append((train["y"], val["y"])) or measure(train, val, device)
    monitored(probes, max_epochs=2)
    assert [len(side) for side in seen[0]] == [20, 20]
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][0].unique().tolist() == [0, 1, 2]


def test_build_head_refuses_sizes_that_a_kind_cannot_have() -> None:
    with pytest.raises(RecipeError, match=r"hidden=7 with kind='identity': .* input width, which is 5"):
        build_head("identity", 5, hidden=7)
    with pytest.raises(RecipeError, match=r"out=4 with kind='fixed'"):
        build_head("fixed", 5, out=4)
    with pytest.raises(RecipeError, match=r"kappa=0.5: kappa\^-499 is .* beyond fp32"):
        build_head("fixed", 500, kappa=0.5)

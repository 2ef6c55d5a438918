"""LEVI against the card's numbers and limit cases; what it wraps, what it leaves, on stock networks of every kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import AAER, LEVI
from lightning_recipes.callbacks.finetuning.levi import ensemble_gap, evenly_spaced
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.modules import LEVIEnsemble
from lightning_recipes.modules.levi_ensemble import ImageView, TokenView, VectorView, combined, normalized
from tests.attention import CASES
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples()


def fit(module, *callbacks, data=None, epochs=1, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y) if data is None else data)
    return trainer


def at_the_start(do):
    """Does something to the module right before training."""
    return Watch(on_train_start=lambda trainer, module: do(module))


class Losses:
    """What the Trainer trained on, step by step."""

    def __init__(self):
        self.values, self.logged = [], []
        self.callback = Watch(on_train_batch_end=self._note)

    def _note(self, trainer, module, outputs, *rest):
        self.values.append(outputs["loss"].item())
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


# -- the maths -------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    heads = [torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 0.0]], requires_grad=True)]
    y = torch.tensor([0])
    losses, together = [F.cross_entropy(h, y) for h in heads], combined(heads)
    assert [loss.item() for loss in losses] == pytest.approx([0.126928, 0.693147], abs=1e-6)
    assert together.tolist() == [[1, 0]]
    loss = F.cross_entropy(together, y)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    gap = ensemble_gap(losses, loss)
    assert gap.item() == pytest.approx(0.096776, abs=1e-6)
    assert (loss + gap).item() == pytest.approx(0.410038, abs=1e-6)
    (loss + gap).backward()
    for head in heads:
        assert torch.equal(head.grad, (head.detach().softmax(1) - F.one_hot(y, 2)) / 2)


def test_the_gap_is_never_negative_for_cross_entropy_and_squared_error_and_zero_for_one_head():
    heads, y = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0)).unbind(), Y[:8]
    for loss, target in ((F.cross_entropy, y), (F.mse_loss, F.one_hot(y, 3).float())):
        assert ensemble_gap([loss(h, target) for h in heads], loss(combined(heads), target)) > 0
    one = heads[:1]
    assert ensemble_gap([F.cross_entropy(one[0], y)], F.cross_entropy(combined(one), y)) == 0


def test_averaged_probabilities_come_as_the_logits_whose_softmax_they_are():
    heads = [torch.tensor([[3.0, 0, -1]]), torch.tensor([[0.0, 2, 0]])]
    by_hand = (heads[0].softmax(1) + heads[1].softmax(1)) / 2
    assert torch.allclose(combined(heads, "probs").softmax(1), by_hand, atol=1e-7)
    assert torch.allclose(combined(heads, "probs").exp(), by_hand, atol=1e-7)


def test_half_precision_outputs_are_summed_in_fp32():
    heads = [torch.tensor([[1.0]], dtype=torch.bfloat16), torch.tensor([[1 / 256]], dtype=torch.bfloat16)]
    assert combined(heads).item() == (1 + 1 / 256) / 2
    assert combined([h.double() for h in heads]).dtype == torch.float64


def test_depths_are_evenly_spaced_and_the_last_is_among_them():
    assert evenly_spaced(4, 12) == [2, 5, 8, 11]
    assert evenly_spaced(3, 4) == [0, 1, 3]
    assert evenly_spaced(1, 12) == [11]
    assert evenly_spaced(4, 2) == [0, 1]


def test_normalized_features_have_mean_0_and_variance_1_by_sample():
    assert normalized(torch.tensor([[1.0, 3.0], [10.0, 50.0]])).tolist() == [
        pytest.approx([-1, 1], abs=1e-4),
        pytest.approx([-1, 1], abs=1e-4),
    ]


@pytest.mark.parametrize(
    ("view", "x"),
    [
        (VectorView(6, 8), X),
        (ImageView(3, 8), torch.rand(4, 3, 8, 8)),
        (ImageView(1, 2), torch.rand(4, 1, 5, 7)),
        (TokenView(11, 8), torch.randint(1, 11, (4, 5))),
        (TokenView(11, 7), torch.randint(1, 11, (4, 5))),
    ],
)
def test_small_views_make_one_vector_a_sample_whatever_stands_beside_it(view, x):
    z = view(x)
    assert z.shape[:1] == x.shape[:1]
    assert torch.allclose(z[1], view(x[1:2])[0], atol=1e-6)
    z.sum().backward()
    assert all(p.grad is not None for p in view.parameters())


def test_padding_does_not_change_what_the_small_view_makes_of_tokens():
    view, ids = TokenView(11, 8), torch.randint(1, 11, (2, 5))
    padded, mask = F.pad(ids, (0, 3), value=9), F.pad(torch.ones_like(ids), (0, 3))
    assert torch.allclose(view(ids), view(padded, attention_mask=mask), atol=1e-6)
    blocks = view.blocks.layers
    assert not torch.equal(blocks[0].linear1.weight, blocks[1].linear1.weight), "each block begins on its own"


# -- limit cases -----------------------------------------------------------------------------------------------------


def test_one_depth_without_a_small_view_and_with_the_networks_head_is_linear_probing_bitwise():
    probe = Classifier()
    probe.net[:4].requires_grad_(False)
    fit(probe, epochs=3)
    levi = Classifier()
    losses = Losses()

    def give_it_the_head(module):
        module.net.heads[0].load_state_dict(module.net.base[4].state_dict())

    fit(
        levi,
        LEVI(1, small_width=0, normalize=False),
        at_the_start(give_it_the_head),
        losses.callback,
        epochs=3,
    )
    assert same(weights(probe.net[4]), weights(levi.net.heads[0]))
    assert "levi/ensemble_gap" not in losses.logged[-1]
    assert torch.equal(probe(X), levi(X))


class Zeros(nn.Module):
    def forward(self, x):
        return x.new_zeros(len(x), 2)


def test_without_anything_from_the_small_view_it_is_the_mean_of_independent_probes():
    levi = Classifier()
    start = []
    fit(levi, LEVI(small=Zeros()), at_the_start(lambda m: start.append(copy.deepcopy(m.net.heads))), epochs=3)
    logits = []
    for depth, head in zip((2, 4), start[0], strict=True):
        features = normalized(mlp()[:depth](X).detach())
        probe = nn.Linear(5, 3)
        probe.load_state_dict({"weight": head.weight[:, :5], "bias": head.bias})
        # Each head has a share of 1/2 in the loss.
        fit(Classifier(probe, lambda p: torch.optim.SGD(p, lr=0.05)), data=loader(features, Y), epochs=3)
        logits.append(probe(features))
    assert torch.allclose(levi(X), torch.stack(logits).mean(0), atol=1e-6)


# -- the step --------------------------------------------------------------------------------------------------------


class Softens(StepRecipe):
    def transform_targets(self, step, logits, targets):
        return F.one_hot(targets, 3) * 0.8 + 0.2 / 3


class Weighs(StepRecipe):
    def loss_weights(self, step):
        return torch.arange(len(step.hard_targets)).float()


class Shifts(StepRecipe):
    def transform_logits(self, step, logits):
        return logits + torch.tensor([0.0, 1.0, 2.0])


class Scaled(Classifier):
    """Half of the cross-entropy, and a term of its own."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": 0.5 * F.cross_entropy(self(x), y) + 0.01 * self.net.heads[0].weight.square().sum()}


class Unreduced(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return (F.cross_entropy(self(x), y, reduction="none") * torch.tensor([1.0, 2, 3, 4])).mean()


class Smooth(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)(self(x), y)


class Squared(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())


SOFT = F.one_hot(Y[:4], 3) * 0.8 + 0.2 / 3
EACH = torch.arange(4.0)


def levi():
    return LEVI(small_width=4)


def cross_entropy(y, net):
    return F.cross_entropy(y, Y[:4])


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
TOTALS = {
    "plain": (Classifier, [levi], cross_entropy),
    "squared error": (Squared, [levi], lambda y, net: F.mse_loss(y, F.one_hot(Y[:4], 3).float())),
    "options": (Smooth, [levi], lambda y, net: F.cross_entropy(y, Y[:4], CLASS_WEIGHTS, label_smoothing=0.1)),
    "scaled, beside a term": (
        Scaled,
        [levi],
        lambda y, net: 0.5 * cross_entropy(y, net) + 0.01 * net.heads[0].weight.square().sum(),
    ),
    "unreduced": (
        Unreduced,
        [levi],
        lambda y, net: (F.cross_entropy(y, Y[:4], reduction="none") * (EACH + 1)).mean(),
    ),
    "soft targets": (Classifier, [levi, Softens], lambda y, net: F.cross_entropy(y, SOFT)),
    "sample weights": (
        Classifier,
        [Weighs, levi],
        lambda y, net: (F.cross_entropy(y, Y[:4], reduction="none") * EACH).mean(),
    ),
    "changed logits": (Classifier, [Shifts, levi], lambda y, net: F.cross_entropy(y + EACH[:3], Y[:4])),
    "logits changed later": (Classifier, [levi, Shifts], lambda y, net: F.cross_entropy(y + EACH[:3], Y[:4])),
}


@pytest.mark.parametrize(("module", "stack", "of_a_head"), TOTALS.values(), ids=TOTALS)
def test_what_trains_is_exactly_the_mean_of_the_heads_losses(module, stack, of_a_head):
    module, losses, stored = module(), Losses(), {}

    def by_hand(trainer, module, *rest):
        net = module.net
        z, h = net.small(X[:4]), [normalized(net.base[:depth](X[:4]).detach()) for depth in (2, 4)]
        heads = [head(torch.cat([each, z], 1)) for head, each in zip(net.heads, h, strict=True)]
        total = sum(of_a_head(y, net) for y in heads) / 2
        train = [p for p in module.parameters() if p.requires_grad]
        stored["loss"], stored["gradients"] = total.item(), torch.autograd.grad(total, train)

    def compare(trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        for ours, theirs in zip(gradients, stored["gradients"], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)

    watch = Watch(on_train_batch_start=by_hand, on_before_optimizer_step=compare)
    fit(module, *(make() for make in stack), losses.callback, watch, limit_train_batches=1)
    assert losses.values[0] == pytest.approx(stored["loss"], abs=1e-6)
    assert losses.logged[0]["levi/ensemble_gap"] > 0


def test_the_parts_are_logged_and_every_heads_accuracy_on_validation_data():
    module = Classifier()
    losses = Losses()
    trainer = quiet(callbacks=[LEVI(small_width=4), losses.callback], max_epochs=1)
    trainer.fit(module, loader(X, Y), loader(X, Y, size=5))
    last = losses.logged[-1]
    assert (last["levi/loss_layer_0"] + last["levi/loss_layer_1"]) / 2 == pytest.approx(losses.values[-1], abs=1e-6)
    net = module.net
    for i, depth in enumerate((2, 4)):
        y = net.heads[i](torch.cat([normalized(net.base[:depth](X)), net.small(X)], 1))
        accuracy = (y.argmax(1) == Y).float().mean().item()
        assert trainer.callback_metrics[f"levi/acc_layer_{i}"].item() == pytest.approx(accuracy, abs=1e-6)


def test_an_attack_sees_both_views():
    """Under no_grad alone the gradient of an input would come from the small network only."""
    torch.manual_seed(0)
    module = Classifier(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )
    x = torch.rand(16, 1, 8, 8)
    fit(module, LEVI(small_width=4), AAER(0.1), data=loader(x, Y))
    net, x = module.net.eval().double(), x.double()
    at = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(net(at).square().sum(), at)
    step = 1e-5 * torch.randn_like(x)
    with torch.no_grad():
        change = net(x + step).square().sum() - net(x - step).square().sum()
    assert (2 * (ours * step).sum()).item() == pytest.approx(change.item(), rel=1e-3)
    with torch.no_grad():
        net.small[0].weight.zero_()
    (without,) = torch.autograd.grad(net(at).square().sum(), at)
    assert without.abs().max() > 0


# -- the frozen network ----------------------------------------------------------------------------------------------


class Norms(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5)),
            nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(5, 3),
        )


def test_a_frozen_network_stays_as_it_was_also_when_somebody_calls_train():
    module = Classifier(Norms())
    before, seen = weights(module.net), []

    def reach_in(trainer, module, *rest):
        module.train()
        assert not module.net.base.training
        assert module.net.small.training
        module.net.base[0].train()  # past LEVIEnsemble.train

    look = Watch(
        on_train_batch_start=reach_in,
        on_train_batch_end=lambda t, m, *rest: seen.append(any(p.training for p in m.net.base.modules())),
    )
    fit(module, LEVI(small_width=4), look, epochs=2)
    assert not any(seen)
    assert same(before, weights(module.net.base))
    assert all(p.grad is None for p in module.net.base.parameters())


def test_every_parameter_that_trains_gets_a_gradient_and_nothing_else_does():
    for backbone in ("frozen", "trainable"):
        module, missing, loose = Classifier(), [], []

        def look(trainer, module, optimizer, missing=missing, loose=loose):
            for name, p in module.named_parameters():
                if p.requires_grad and (p.grad is None or not p.grad.abs().sum()):
                    missing.append(name)
                if not p.requires_grad and p.grad is not None:
                    loose.append(name)

        watch = Watch(on_before_optimizer_step=look)
        fit(module, LEVI([0], small=nn.Sequential(nn.Linear(6, 4)), backbone=backbone), watch, epochs=2)
        assert missing == []
        assert loose == []
        moved = [n for n, p in module.net.base.named_parameters() if not torch.equal(p, mlp().get_parameter(n))]
        assert moved == ([] if backbone == "frozen" else ["0.weight", "0.bias"]), (
            "what comes after the last depth rests"
        )


def test_flags_of_the_network_come_back_after_the_fit():
    module = Classifier()
    module.net[0].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in module.net.named_parameters()}
    fit(module, LEVI())
    assert {name: p.requires_grad for name, p in module.net.base.named_parameters()} == flags


# -- optimizers ------------------------------------------------------------------------------------------------------


def test_an_optimizer_with_groups_by_hand_adopts_the_new_parameters():
    module = Classifier()
    module.make_optimizer = lambda _: torch.optim.SGD([{"params": module.net_parameters}], lr=0.1)
    module.net_parameters = list(module.net.parameters())
    fit(module, LEVI(small_width=4))
    fresh = Classifier()
    fit(fresh, LEVI(small_width=4))
    assert same(weights(module), weights(fresh))


def test_the_rate_of_small_view_and_heads_is_scaled_and_the_networks_is_not():
    def run(scale, backbone):
        module, start = Classifier(), []
        watch = at_the_start(lambda m: start.append(weights(m)))
        fit(module, LEVI(small_width=4, lr_scale=scale, backbone=backbone), watch, limit_train_batches=1)
        return {name: value - start[0][name] for name, value in weights(module).items()}

    once, three = run(1.0, "trainable"), run(3.0, "trainable")
    for name, change in once.items():
        assert torch.allclose(three[name], change * (1.0 if ".base." in name else 3.0), atol=1e-6), name
    assert once["net.base.0.weight"].abs().sum() > 0


def test_first_values_depend_on_the_seed_alone_and_leave_the_random_state_alone():
    def begin(mess, *recipes):
        torch.manual_seed(mess)
        module, start, states = Classifier(), [], []
        torch.manual_seed(mess)
        watch = Watch(on_train_start=lambda t, m: (start.append(weights(m)), states.append(torch.get_rng_state())))
        fit(module, *recipes, watch)
        return start[0], states[0]

    (first, state), (again, _), (other, _) = (
        begin(m, LEVI(small_width=4, seed=s)) for m, s in ((1, 0), (2, 0), (1, 1))
    )
    assert torch.equal(state, begin(1)[1])
    assert same(first, again)
    assert not torch.equal(first["net.heads.0.weight"], other["net.heads.0.weight"])


# -- what stays ------------------------------------------------------------------------------------------------------


def test_the_ensemble_stays_and_the_session_s_end_does_not_change_it():
    module, last = Classifier(Norms()), []

    def note(trainer, module):
        module.eval()
        last.append(module(X))

    fit(module, LEVI(small_width=4), Watch(on_fit_end=note))
    assert isinstance(module.net, LEVIEnsemble)
    assert torch.equal(module.eval()(X), last[0])
    assert not any(part._forward_hooks for part in (*module.net.heads, module.net)), "only the ensemble's own listen"


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_the_ensemble_listens_to_its_own_network(make):
    module = Classifier()
    fit(module, LEVI(small_width=4))
    net = module.net
    twin = make(net)
    with torch.no_grad():
        twin.base[0].weight.zero_()
        expected = twin.heads[0](torch.cat([normalized(twin.base[:2](X)), twin.small(X)], 1))
        other = twin.heads[1](torch.cat([normalized(twin.base[:4](X)), twin.small(X)], 1))
        assert torch.allclose(twin(X), (expected + other) / 2, atol=1e-6)
        assert not torch.allclose(twin(X), net(X), atol=1e-3)


@pytest.mark.parametrize("small", [None, nn.Sequential(nn.Linear(6, 4), nn.Tanh())], ids=["auto", "given"])
def test_saved_and_loaded_as_a_plain_module(tmp_path, small):
    module = Classifier()
    fit(module, LEVI(small="auto" if small is None else small, small_width=4, adapter_hidden=3))
    module.net.save(tmp_path / "levi.pt")
    again = LEVIEnsemble.load(tmp_path / "levi.pt", mlp(seed=7), copy.deepcopy(small))
    assert torch.equal(again(X), module(X))
    assert again.structure == module.net.structure
    if small is not None:
        with pytest.raises(RecipeError, match="small network of the user's own: give it as small"):
            LEVIEnsemble.load(tmp_path / "levi.pt", mlp())


def test_the_users_small_network_is_copied():
    small = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    before = weights(small)
    module = Classifier()
    fit(module, LEVI(small=small))
    assert same(before, weights(small))
    assert not torch.equal(module.net.small[0].weight, small[0].weight)
    assert module.net.small[1].num_batches_tracked == 4, "the dry run is not counted"


def test_another_fit_trains_the_kept_ensemble_on(tmp_path):
    module = Classifier()
    fit(module, LEVI(small_width=4), epochs=1)
    net, before = module.net, weights(module)
    fit(module, LEVI(small_width=4), epochs=1)
    assert module.net is net
    assert not same(before, weights(module))
    with pytest.raises(RecipeError, match=r"earlier fit with other arguments \(small_width=4 there and 8 here\)"):
        fit(module, LEVI(small_width=8))
    assert module.net is net
    module.net = module.net.release()
    assert not any(part._forward_hooks for part in module.modules())
    fit(module, LEVI(small_width=8))


@pytest.mark.parametrize("small", [None, nn.Sequential(nn.Linear(6, 4), nn.Tanh())], ids=["auto", "given"])
def test_a_checkpoint_is_enough_to_rebuild_for_validation_and_prediction(tmp_path, small):
    """On a module that never saw the training data, and which is stock again afterwards."""
    make = lambda: LEVI(small="auto" if small is None else small, small_width=4)  # noqa: E731
    module = Classifier()
    keep = ModelCheckpoint(tmp_path, "last")
    fit(module, make(), keep, enable_checkpointing=True)
    fresh = Classifier(mlp(seed=3))
    seen = []
    peek = Watch(on_validation_end=lambda t, m: seen.append(m(X)))
    trainer = quiet(callbacks=[make(), peek])
    trainer.validate(fresh, loader(X, Y), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert torch.equal(seen[0], module.eval()(X))
    assert type(fresh.net) is nn.Sequential
    assert not any(part._forward_hooks for part in fresh.modules())
    # The module that was trained carries it already.
    quiet(callbacks=[make()]).validate(module, loader(X, Y), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert isinstance(module.net, LEVIEnsemble)


def test_a_resumed_fit_ends_where_the_uninterrupted_one_does(tmp_path):
    whole = Classifier()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, LEVI(small_width=4), keep, epochs=3, enable_checkpointing=True)
    again = Classifier()
    trainer = quiet(callbacks=[LEVI(small_width=4)], max_epochs=3)
    trainer.fit(again, loader(X, Y), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert same(weights(whole), weights(again))


# -- stock networks --------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A small view of a sequence of vectors."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 4)

    def forward(self, x):
        return self.linear(x.mean(1))


NETWORKS = {
    "timm vit": ("net", ["blocks.0", "blocks.1"], "cls"),
    "torchvision vit": ("net", ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"], "cls"),
    "encoder layers": ("net", ["encoder.layers.0", "encoder.layers.1"], "mean"),
    "bert": ("model", ["bert.encoder.layer.0", "bert.encoder.layer.1"], "cls"),
    "gpt2": ("model", ["transformer.h.0", "transformer.h.1"], "last"),
}


def batches(name):
    x = CASES[name].inputs()
    y = torch.arange(len(x)) % 3
    if name in ("bert", "gpt2"):
        data = [
            {"input_ids": ids, "attention_mask": torch.tensor([1, 1, 1, 1, 0]), "labels": t} for ids, t in zip(x, y)
        ]
        return DataLoader(data, 3)
    return loader(x, y, size=3)


@pytest.mark.parametrize("backbone", ["frozen", "trainable"])
@pytest.mark.parametrize("name", NETWORKS)
def test_stock_networks_of_every_kind(name, backbone):
    torch.manual_seed(0)
    module, losses = CASES[name].build(), Losses()
    path, blocks, pool = NETWORKS[name]
    small = Bag(8) if name == "encoder layers" else "auto"
    fit(module, LEVI(small=small, small_width=8, backbone=backbone), losses.callback, data=batches(name), epochs=4)
    ensemble = module.get_submodule(path)
    assert ensemble.structure["blocks"] == blocks
    assert ensemble.structure["pools"] == [pool, pool]
    assert losses.values[-1] < losses.values[0]
    assert losses.logged[0]["levi/ensemble_gap"] >= 0
    mean = (losses.logged[0]["levi/loss_layer_0"] + losses.logged[0]["levi/loss_layer_1"]) / 2
    assert losses.values[0] == pytest.approx(mean, abs=1e-5)


def test_a_convolutional_network_is_pooled_over_places_and_channels_last_where_timm_says_so():
    x = torch.rand(4, 3, 32, 32)
    for name, arguments, pool in (
        ("resnet18", {"channels": (4, 4, 4, 8)}, "avg"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
            "mean",
        ),
    ):
        module = Classifier(timm.create_model(name, num_classes=3, **arguments))
        fit(module, LEVI(small_width=8), data=loader(x, Y[:4]))
        widths = [4, 4, 4, 8] if pool == "avg" else [8, 16]
        assert (module.net.structure["widths"], set(module.net.structure["pools"])) == (widths, {pool})
        assert module(x).shape == (4, 3)


def test_a_hugging_face_output_keeps_its_class_and_has_the_loss_of_the_ensembles_logits():
    module = CASES["bert"].build()
    fit(module, LEVI(small_width=8), data=batches("bert"))
    ids, labels = CASES["bert"].inputs(), torch.tensor([0, 1, 2])
    output = module.model(input_ids=ids, labels=labels)
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert output.loss == F.cross_entropy(output.logits, labels)
    assert output[0] is output.loss
    assert module.model(input_ids=ids).loss is None
    assert module.model.config.num_labels == 3, "what a step may ask of the network"


def test_a_user_may_name_the_blocks_and_the_pooling():
    module = CASES["timm vit"].build()
    fit(module, LEVI(["norm"], small_width=4, pool="mean"), data=batches("timm vit"))
    assert module.net.structure["blocks"] == ["norm"]
    assert module.net.structure["pools"] == ["mean"]
    module = CASES["timm vit"].build()
    fit(module, LEVI([-1, 0], small_width=4), data=batches("timm vit"))
    assert module.net.structure["blocks"] == ["blocks.1", "blocks.0"]


class Wrapped(LightningModule):
    """A network two levels down, and a metric-like part beside it."""

    def __init__(self):
        super().__init__()
        self.outer, self.extra = nn.ModuleDict({"net": mlp()}), nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.outer["net"](x), y) + 0 * self.extra.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_part_deep_in_the_module_is_named():
    module = Wrapped()
    with pytest.raises(RecipeError, match=r"no single part of Wrapped maps .* \['outer', 'extra'\].* backbone_path"):
        fit(module, LEVI())
    fit(module, LEVI(backbone_path="outer.net"))
    assert isinstance(module.outer["net"], LEVIEnsemble)


@pytest.mark.parametrize("how", ["network", "in place"])
def test_a_compiled_network_inside(how):
    torch._dynamo.reset()
    eager, module = Classifier(), Classifier()
    fit(eager, LEVI(small_width=4), epochs=2)
    if how == "network":
        module.net = torch.compile(module.net, backend="aot_eager")
    else:
        module.net.compile(backend="aot_eager")
    fit(module, LEVI(small_width=4), epochs=2)
    ours, theirs = weights(module.net.heads), weights(eager.net.heads)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


# -- errors that only a step can show --------------------------------------------------------------------------------


def test_a_loss_of_something_else_than_the_ensembles_output_is_refused():
    class Tempered(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]) / 2, batch[1])

    with pytest.raises(
        RecipeError, match=r"LEVI: the loss is not computed from what net returned, \[4, 3\]: it sees other"
    ):
        fit(Tempered(), LEVI(small_width=4))


def test_a_batch_of_nan_is_the_users_to_notice_and_no_other_networks_output():
    """NaN equals nothing, itself neither; the check waits for a batch that tells something."""

    class Tempered(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]) / (1 + (batch_idx > 0)), batch[1])

    bad = Watch(
        on_train_batch_start=lambda trainer, module, batch, index: batch[0].fill_(float("nan")) if index == 0 else None
    )
    frozen = Watch(
        on_after_backward=lambda trainer, module: [p.grad.zero_() for p in module.parameters() if p.requires_grad]
    )
    losses = Losses()
    with pytest.raises(RecipeError, match="the loss is not computed from what net returned"):
        fit(Tempered(), bad, LEVI(small_width=4), losses.callback, frozen)
    assert len(losses.values) == 1
    assert losses.values[0] != losses.values[0]

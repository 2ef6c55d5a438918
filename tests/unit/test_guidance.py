"""Guidance against the card's numbers, its limit cases and a training loop written out by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_recipes.callbacks import Guidance
from lightning_recipes.callbacks.regularization.guidance import alignment, layer_pairs, noise
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.similarity import linear_cka
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(32)


class Guide(nn.Module):
    """Two layers, batch norm and dropout, on inputs of 6 features; its maps are 'a' and 'b'."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.b(self.norm(self.a(x)).relu()).relu()))


GUIDE = f"{__name__}:Guide"


def guidance(**arguments):
    return Guidance(**{"guide": GUIDE, "pretrained": False, "seed": 3, **arguments})


def guide_of(seed=3):
    torch.manual_seed(seed)
    return Guide().eval()


def fit(module, *callbacks, epochs=2, x=X, y=Y, size=8, ckpt_path=None, **trainer):
    run = quiet(callbacks=list(callbacks), max_epochs=epochs, **trainer)
    run.fit(module, loader(x, y, size=size), ckpt_path=ckpt_path)
    return run


def noisy():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 5), nn.Linear(5, 3)
    )


# -- the pure functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guides", "targets", "places"),
    [
        (4, 7, [0, 2, 4, 6]),
        (3, 6, [0, 2, 5]),
        (1, 6, [0]),
        (21, 48, [0, 2, 5, 7, 9, 12, 14, 16, 19, 21, 24, 26, 28, 31, 33, 35, 38, 40, 42, 45, 47]),
        (3, 1, [0]),
    ],
)
def test_the_pairs_of_the_card(guides, targets, places):
    pairs = layer_pairs(guides, targets)
    assert list(pairs) == places
    assert list(pairs.values()) == (list(range(guides)) if len(places) == guides else [guides - 1])


def test_of_several_guide_maps_on_one_target_map_the_last_counts():
    """7 -> 4: places 0, 0, 1, 2, 2, 2, 3."""
    assert layer_pairs(7, 4) == {0: 1, 1: 2, 2: 5, 3: 6}


def test_the_loss_is_a_sum_over_the_pairs_whose_maps_vary():
    scores = torch.tensor([0.0, 0.25, 1.0, 0.5])
    assert alignment(scores, torch.ones(4).bool()).item() == 2.25
    assert alignment(torch.zeros(5), torch.ones(5).bool()).item() == 5
    assert alignment(scores, torch.tensor([True, True, True, False])).item() == 1.75


def test_noise_is_that_of_the_code():
    """clip(randn + 0.1 randn, 0, 1): half of it 0, 1 where a normal of variance 1.01 is above 1."""
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    drawn = noise(u, torch.zeros(1))
    above = 0.5 * math.erfc(1 / math.sqrt(2 * 1.01))
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5, abs=5e-3)
    assert (drawn == 1).float().mean().item() == pytest.approx(above, abs=5e-3)
    assert noise(torch.tensor([0.0, 0.5]), torch.zeros(1)).tolist() == [0.0, 0.0]
    assert noise(torch.tensor([0.0, 0.5, 0.99]), torch.zeros(1, dtype=torch.long), 4).tolist() == [0, 2, 3]


# -- in a fit ----------------------------------------------------------------------------------------------------------


def by_hand(net, guide, alpha=1.0, epochs=2, steps=None, maps=(("0", "a"), ("2", "b")), size=8, lr=0.1, debiased=False):
    """The card's steps in plain torch, SGD; returns the net and the sum of 1 - CKA of every step."""
    seen, sums = {}, []
    for part, names in ((net, [t for t, _ in maps]), (guide, [g for _, g in maps])):
        for name in names:
            keep = lambda m, a, out, key=(part, name): seen.__setitem__(key, out)  # noqa: E731
            part.get_submodule(name).register_forward_hook(keep)
    step = 0
    for _ in range(epochs):
        for x, y in zip(X.split(size), Y.split(size)):
            loss = F.cross_entropy(net(x), y)
            if steps is None or step < steps:
                with torch.no_grad():
                    guide(x)
                far = sum(1 - linear_cka(seen[net, t], seen[guide, g], debiased) for t, g in maps)
                sums.append(far.item())
                loss = loss + alpha * far
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= lr * p.grad
            step += 1
    return net, sums


def close(module, net, atol=1e-6):
    first, second = weights(module.net), weights(net)
    return all(torch.allclose(first[name], second[name], atol=atol) for name in second)


@pytest.mark.parametrize(("metric", "alpha"), [("cka", 1.0), ("cka_debiased", 0.3)])
def test_a_fit_equals_the_loop_by_hand(metric, alpha):
    """The target's maps are layers 0 and 2; 4 gives the logits. So are a and b the guide's."""
    module, logged = Classifier(), []
    recipe = guidance(metric=metric, alpha=alpha)
    note = Watch(on_train_batch_end=lambda run, *rest: logged.append(run.callback_metrics["guidance/loss"].item()))
    fit(module, recipe, note)
    net, sums = by_hand(mlp(), guide_of(), alpha, debiased=metric == "cka_debiased")
    assert recipe.pairs == [("a", "net.0"), ("b", "net.2")]
    assert logged == pytest.approx([alpha * each for each in sums], abs=1e-5)
    assert close(module, net)
    assert not close(module, by_hand(mlp(), guide_of(), 0.0)[0], atol=1e-3)


def test_alpha_0_is_bitwise_the_plain_fit():
    plain, neutral = Classifier(noisy()), Classifier(noisy())
    for module, recipes in ((plain, []), (neutral, [guidance(alpha=0.0)])):
        torch.manual_seed(1)
        fit(module, *recipes)
    assert same(weights(plain), weights(neutral))


def test_from_guide_steps_on_it_is_plain_training_and_optimizer_steps_are_counted():
    """Windows of two batches: 3 optimizer steps are 6 batches of 8, in an epoch of 4."""
    module, active, hooks = Classifier(noisy()), [], []

    def look(run, module, *rest):
        active.append(run.callback_metrics["guidance/active"].item())
        hooks.append(any(part._forward_hooks for part in module.modules()))

    states = []

    def keep(run, module, *rest):
        if run.global_step == 3:
            states.append((weights(module), torch.get_rng_state()))

    fit(module, guidance(guide_steps=3), Watch(on_train_batch_end=look, on_train_batch_start=keep), epochs=3,
        accumulate_grad_batches=2)  # fmt: skip
    assert active == [1.0] * 6 + [0.0] * 6
    assert hooks == [True] * 6 + [False] * 6
    plain = Classifier(noisy())
    plain.load_state_dict(states[0][0])
    torch.set_rng_state(states[0][1])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    second, third = list(zip(X.split(8), Y.split(8)))[2:], loader(X, Y, size=8)  # whose iterator draws a seed
    for i, batch in enumerate(itertools.chain(second, third)):
        (plain.training_step(batch, i) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert same(weights(module), weights(plain))


def test_guided_by_a_copy_of_itself_the_loss_begins_at_0():
    module = Classifier()
    run = fit(module, Guidance(copy.deepcopy(module.net)), max_steps=1)
    assert run.callback_metrics["guidance/loss"].item() == pytest.approx(0, abs=1e-6)
    assert run.callback_metrics["guidance/cka_mean"].item() == pytest.approx(1, abs=1e-6)


def test_it_logs_every_pair_their_mean_and_whether_it_guides():
    run = fit(Classifier(), guidance(), max_steps=1, log_every_n_steps=1)
    _, (total,) = by_hand(mlp(), guide_of(), epochs=1, steps=1)
    logged = {k.removeprefix("guidance/"): v.item() for k, v in run.callback_metrics.items() if k.startswith("guid")}
    assert set(logged) == {"loss", "cka_0", "cka_1", "cka_mean", "left_out", "active"}
    assert logged["cka_0"] + logged["cka_1"] == pytest.approx(2 - total, abs=1e-6)
    assert logged["cka_mean"] == pytest.approx(1 - total / 2, abs=1e-6)
    assert (logged["left_out"], logged["active"]) == (0, 1)


def test_a_collapsed_map_is_left_out_of_the_sum_and_the_rest_trains():
    net = mlp()
    nn.init.zeros_(net[2].weight)  # the same output, its bias, for every sample
    module = Classifier(net, lambda parameters: torch.optim.SGD(net[0].parameters(), lr=0.1))
    run = fit(module, guidance(), max_steps=3, log_every_n_steps=1)
    assert run.callback_metrics["guidance/left_out"].item() == 1
    assert run.callback_metrics["guidance/cka_1"].item() == 0
    assert run.callback_metrics["guidance/cka_mean"].item() == run.callback_metrics["guidance/cka_0"].item()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert run.callback_metrics["guidance/loss"].item() <= 1


# -- the guide ---------------------------------------------------------------------------------------------------------


def test_the_guide_stays_as_it_is_and_outside_of_the_module():
    guide = guide_of().train()
    before, module, sizes = weights(guide), Classifier(), []
    names = list(module.state_dict())

    def look(run, module, *rest):
        assert not any(part.training for part in guide.modules())
        sizes.append((list(module.state_dict()), sum(len(g["params"]) for g in run.optimizers[0].param_groups)))

    fit(module, Guidance(guide), Watch(on_train_batch_end=look))
    assert sizes == [(names, 6)] * 8
    assert same(weights(guide), before)
    assert all(p.grad is None and p.requires_grad for p in guide.parameters())
    assert all(part.training for part in guide.modules())
    assert not any(part._forward_hooks for part in guide.modules())


def test_the_guide_costs_one_forward_a_step():
    calls = []
    guide = guide_of()
    guide.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    fit(Classifier(), Guidance(guide), epochs=1, num_sanity_val_steps=0)
    assert calls == [False] * (2 + 4)  # two dry runs before training, then one a batch


def test_no_map_outlives_its_step():
    import weakref

    maps = []

    def outlives(run, module, *rest):
        assert all(each() is None for each in maps)
        maps.clear()

    module = Classifier()
    module.net[0].register_forward_hook(lambda part, args, out: maps.append(weakref.ref(out)))
    fit(module, guidance(), Watch(on_train_batch_start=outlives))
    assert maps


def test_noise_for_the_guide_belongs_to_the_sample():
    module, inputs = Classifier(), []
    guide = guide_of()
    guide.register_forward_pre_hook(lambda part, args: inputs.append(args[0]))
    fit(module, Guidance(guide, guide_input="noise"), epochs=1)
    seen = torch.cat(inputs[2:])
    assert seen.shape == X.shape and seen.min() == 0 and seen.max() == 1 and (seen == 0).float().mean() > 0.3
    inputs.clear()
    fit(Classifier(), Guidance(guide, guide_input="noise"), epochs=1, size=16)
    assert torch.equal(torch.cat(inputs[2:]), seen), "whatever the batches are"
    inputs.clear()
    fit(Classifier(), Guidance(guide, guide_input="noise", seed=1), epochs=1)
    assert not torch.equal(torch.cat(inputs[2:]), seen)


def test_a_transform_brings_the_input_into_the_guides_shape():
    guide = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 3))
    recipe = Guidance(guide, guide_transform=nn.Unflatten(1, (1, 2, 3)))
    fit(Classifier(), recipe)
    assert recipe.pairs == [("0", "net.0"), ("2", "net.2")]


@pytest.mark.parametrize("second", [False, True])
def test_a_second_forward_moves_batch_norm_twice_as_the_official_code(second):
    net = noisy()
    fit(Classifier(net), guidance(second_forward=second), epochs=1)
    assert net[1].num_batches_tracked == (8 if second else 4)


def test_a_second_forward_has_masks_of_its_own_and_its_maps_carry_the_gradient():
    """Layer 4 comes after dropout: the loss's pass and the maps' differ; without dropout they are the same."""
    plain, again = Classifier(), Classifier()
    fit(plain, guidance())
    fit(again, guidance(second_forward=True))
    assert close(plain, again.net)
    losses = []
    for second in (False, True):
        torch.manual_seed(1)
        run = fit(Classifier(noisy()), guidance(second_forward=second, target_layers=["net.4"]), max_steps=1)
        losses.append(run.callback_metrics["guidance/loss"].item())
    assert abs(losses[0] - losses[1]) > 1e-3


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_by_name_are_paired_in_order_of_execution_and_none_is_dropped():
    recipe = guidance(target_layers=["net.4", "net.1"], guide_layers=["norm", "head"])
    fit(Classifier(), recipe, max_steps=1)
    assert recipe.pairs == [("norm", "net.1"), ("head", "net.4")]


def test_the_networks_blocks():
    import timm

    small = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 1, "depth": 3, "num_classes": 3}
    torch.manual_seed(0)
    module = Classifier(timm.create_model("vit_tiny_patch16_224", in_chans=1, **small))
    x = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    guide = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    recipe = Guidance(guide, target_layers="blocks")
    fit(module, recipe, x=x, max_steps=1)
    assert recipe.pairs == [("1", "net.blocks.0"), ("2", "net.blocks.2")]


def test_layers_that_run_without_gradients_are_no_maps():
    class Probe(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            with torch.no_grad():
                h = self.net[0](x)
            return F.cross_entropy(self.net[1:](h), y)

    net = nn.Sequential(*mlp(), nn.Linear(3, 3), nn.Linear(3, 3))
    recipe = guidance()
    fit(Probe(net), recipe, max_steps=1)
    assert recipe.pairs == [("a", "net.2"), ("b", "net.5")]


def test_a_recurrent_target_on_token_ids_and_a_hugging_face_guide_with_its_mask():
    from transformers import AutoConfig, AutoModel

    class Recurrent(Classifier):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(20, 6), nn.LSTM(6, 8)  # time first
            self.hidden, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def training_step(self, batch, batch_idx):
            h, _ = self.rnn(self.embed(batch["input_ids"]).transpose(0, 1))
            return F.cross_entropy(self.out(self.hidden(h[-1])), batch["labels"])

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    guide = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=20, **sizes))
    masks = []
    guide.register_forward_pre_hook(lambda m, args, kw: masks.append(kw.get("attention_mask")), with_kwargs=True)
    ids = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": Y[:16]}] * 3
    for arguments in ({}, {"guide_input": "noise"}):
        recipe = Guidance(guide, guide_layers=["encoder.layer.*"], **arguments)
        run = quiet(callbacks=[recipe], log_every_n_steps=1)
        run.fit(Recurrent(), torch.utils.data.DataLoader(batches, batch_size=None))
        assert recipe.pairs == [("encoder.layer.0", "rnn[0]")]
        assert 0 < run.callback_metrics["guidance/cka_0"] < 1
    assert torch.equal(masks[2], mask)
    assert masks[-1] is None, "random ids have no padding"


# -- small batches -----------------------------------------------------------------------------------------------------


def test_batches_below_32_are_warned_of_with_what_unrelated_maps_come_to():
    with pytest.warns(UserWarning, match=r"the 8 samples of a batch: CKA of unrelated maps of 1000 features is 0.99"):
        fit(Classifier(), guidance(), max_steps=1)


def test_a_short_last_batch_is_not_guided():
    module, active = Classifier(), []
    note = Watch(on_train_batch_end=lambda run, *rest: active.append(run.callback_metrics["guidance/active"].item()))
    fit(module, guidance(), note, epochs=1, x=X[:19], y=Y[:19])
    assert active == [1, 1, 0]


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["by name", "a module", "a file"])
def test_a_resume_has_the_same_guide_whoever_builds_it(how, tmp_path):
    """A module is random in every process; its weights come from the checkpoint, where the others leave a hash."""
    torch.save(guide_of(seed=4).state_dict(), tmp_path / "guide.pt")

    def make(seed):
        if how == "a module":
            return Guidance(guide_of(seed))
        return guidance(**({"guide_checkpoint": str(tmp_path / "guide.pt")} if how == "a file" else {}))

    through = Classifier()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(through, make(7), keep, enable_checkpointing=True)
    resumed = Classifier()
    fit(resumed, make(8), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert same(weights(through), weights(resumed))
    section = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["Guidance"]
    assert ("weights" in section["state"]["guide"]) == (how == "a module")
    assert not any("guide" in name for name in torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])


def test_another_guide_on_a_resume_is_refused(tmp_path):
    path = tmp_path / "guide.pt"
    torch.save(guide_of(seed=4).state_dict(), path)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(Classifier(), guidance(guide_checkpoint=str(path)), keep, enable_checkpointing=True)
    torch.save(guide_of(seed=5).state_dict(), path)
    with pytest.raises(RecipeError, match="is not the network of the run that is resumed"):
        fit(Classifier(), guidance(guide_checkpoint=str(path)), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    torch.save(guide_of(seed=4).state_dict(), moved := tmp_path / "moved.pt")
    fit(Classifier(), guidance(guide_checkpoint=str(moved)), ckpt_path=str(tmp_path / "epoch=0.ckpt"))


# -- the picture -------------------------------------------------------------------------------------------------------


def test_cka_is_noted_by_epoch_and_drawn_at_the_end(tmp_path):
    recipe = guidance()
    run = fit(Classifier(), recipe, logger=CSVLogger(tmp_path))
    _, sums = by_hand(mlp(), guide_of())
    history = recipe.state()["history"]
    assert history["steps"] == [4, 8]
    assert list(history["values"]) == ["a -> net.0", "b -> net.2"]
    totals = [sum(values) for values in zip(*history["values"].values())]
    assert totals == pytest.approx([2 - sum(sums[:4]) / 4, 2 - sum(sums[4:]) / 4], abs=1e-5)
    assert (tmp_path.joinpath(run.log_dir) / "guidance.png").stat().st_size > 1000
    silent = fit(Classifier(), guidance(draw=False), logger=CSVLogger(tmp_path, name="silent"))
    assert not (tmp_path.joinpath(silent.log_dir) / "guidance.png").exists()


def test_single_pairs_are_logged_in_the_steps_that_the_trainer_logs():
    seen = []
    note = Watch(on_train_batch_end=lambda run, *rest: seen.append("guidance/cka_0" in run.callback_metrics))
    fit(Classifier(), guidance(), note, epochs=1, log_every_n_steps=3)
    assert seen == [False, False, True, True]

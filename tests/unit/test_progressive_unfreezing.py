"""Progressive unfreezing: when groups wake, at what rate, and that sleeping costs and changes nothing."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from lightning_recipes.callbacks import ExactResume, ProgressiveUnfreezing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.schedule import At, EveryN, Plateau
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)
GROUPS = ["net.4", "net.2", "net.0"]  # of the mlp, the head first
Unfreeze = partial(ProgressiveUnfreezing, groups=GROUPS, lr_scale=None)


def fit(module, *callbacks, epochs=4, val=False, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y), loader(X, Y) if val else None)
    return trainer


class Stages:
    """Which layers have a gradient at each update."""

    def __init__(self):
        self.seen = []
        self.watch = Watch(on_train_batch_end=self.note)

    def note(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen.append("".join(str(i) for i in (0, 2, 4) if module.net[i].weight.grad is not None))


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["rewrap", "drop_grad"])
@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((0, 1, 2), ["4"] * 4 + ["24"] * 4 + ["024"] * 8),
        ((0, 0.25, 0.75), ["4"] * 4 + ["24"] * 8 + ["024"] * 4),
        ((0, 0, 3), ["24"] * 12 + ["024"] * 4),
        ((0, 1, math.inf), ["4"] * 4 + ["24"] * 12),
        (EveryN(1), ["4"] * 4 + ["24"] * 4 + ["024"] * 8),
        (EveryN(3, unit="step"), ["4"] * 3 + ["24"] * 3 + ["024"] * 10),
        (At((0, 5, 6), unit="step"), ["4"] * 5 + ["24"] + ["024"] * 10),
        (At((0, 0.25, 0.5), unit="step"), ["4"] * 4 + ["24"] * 4 + ["024"] * 8),
    ],
)
def test_groups_wake_on_time(at, expected, mechanism):
    stages = Stages()
    fit(Classifier(), Unfreeze(at=at, mechanism=mechanism), stages.watch)
    assert stages.seen == expected


def test_nothing_wakes_inside_an_accumulation_window():
    stages = Stages()
    fit(Classifier(), Unfreeze(at=EveryN(1, unit="step")), stages.watch, accumulate_grad_batches=2)
    assert stages.seen == ["4", "24"] + ["024"] * 6


def test_a_plateau_wakes_the_next_group():
    """The metric stands still: the first check after each waking is the new mark, the second wakes one."""

    class Constant(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    stages, recipe = Stages(), Unfreeze(at=Plateau(patience=1))
    fit(Constant(), recipe, stages.watch, epochs=5, val=True)
    assert stages.seen == ["4"] * 8 + ["24"] * 8 + ["024"] * 4
    assert recipe.state() == {"stage": 3, "stalls": 2, "best": 1.0, "waited": 0}


def test_the_default_groups_and_times():
    """'auto' cuts the network; layers below the last time never train."""
    net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 3))
    module = Classifier(net)
    start = weights(net)
    fit(module, ProgressiveUnfreezing(at=(0, 1, 2), lr_scale=0.5), epochs=3)
    moved = {i for i in range(6) if not torch.equal(net[i].weight, start[f"{i}.weight"])}
    assert moved == {3, 4, 5}
    assert all(p.requires_grad for p in module.parameters())


def test_never_and_nested_groups():
    module = Classifier()
    stages = Stages()
    recipe = Unfreeze(groups=["head", ["net.2.weight", "net.0.*"]], at=(0, 1), never=["net.2.bias"])
    fit(module, recipe, stages.watch, epochs=2)
    assert stages.seen == ["4"] * 4 + ["024"] * 4
    assert torch.equal(module.net[2].bias, mlp()[2].bias)


def test_it_logs_stage_and_size():
    sizes = []
    watch = Watch(
        on_train_batch_end=lambda trainer, *rest: sizes.append(
            (
                trainer.callback_metrics["unfreeze/stage"].item(),
                trainer.callback_metrics["unfreeze/trainable_params"].item(),
            )
        )
    )
    fit(Classifier(), Unfreeze(at=(0, 1, 2), mechanism="rewrap"), watch)
    assert sizes[::4] == [(1, 18), (2, 18 + 30), (3, 18 + 30 + 35), (3, 83)]


# -- limit cases --------------------------------------------------------------------------------------------------


def adamw(parameters):
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def test_all_awake_from_the_start_is_bitwise_the_plain_fit():
    plain, neutral = Classifier(optimizer=adamw), Classifier(optimizer=adamw)
    recipe = ProgressiveUnfreezing(groups=GROUPS, at=(0, 0, 0), lr_scale=1.0)
    assert recipe.neutral
    fit(plain)
    fit(neutral, recipe)
    assert same(weights(plain), weights(neutral))


@pytest.mark.parametrize("mechanism", ["rewrap", "drop_grad"])
def test_groups_that_never_wake_equal_training_the_head_alone(mechanism):
    module = Classifier(optimizer=adamw)
    trainer = fit(module, Unfreeze(at=(0, math.inf, math.inf), mechanism=mechanism))
    head = Classifier(optimizer=lambda _: adamw(head.net[4].parameters()))
    head.net[0].requires_grad_(False)
    head.net[2].requires_grad_(False)
    fit(head)
    assert same(weights(module), weights(head))
    assert same(weights(module.net[0]), weights(mlp()[0]))
    state = trainer.optimizers[0].state
    assert {id(p) for p in state} == {id(p) for p in module.net[4].parameters()}


@pytest.mark.parametrize("mechanism", ["rewrap", "drop_grad"])
def test_a_dormant_group_is_bitwise_unchanged_and_has_no_state_until_it_wakes(mechanism):
    seen = []

    def look(trainer, module, *rest):
        state = trainer.optimizers[0].state
        changed = not torch.equal(module.net[0].weight, mlp()[0].weight)
        seen.append((changed, bool(state.get(module.net[0].weight))))

    fit(Classifier(optimizer=adamw), Unfreeze(at=(0, 1, 2), mechanism=mechanism), Watch(on_train_batch_end=look))
    assert seen == [(False, False)] * 8 + [(True, True)] * 8


@pytest.mark.parametrize("make", [adamw, partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1)])
def test_both_mechanisms_give_the_same_weights(make):
    results = []
    for mechanism in ("rewrap", "drop_grad"):
        module = Classifier(optimizer=make)
        fit(
            module,
            Unfreeze(at=(0, 1, 2), lr_scale=0.5, mechanism=mechanism),
            gradient_clip_val=0.05,
            accumulate_grad_batches=2,
        )
        results.append(weights(module))
    assert same(*results)


def test_weight_decay_of_each_group():
    decays, scales = (0.0, 0.2, 0.4), (1.0, 0.5, 0.25)
    reference = Classifier(
        optimizer=lambda _: AdamW(
            [
                {"params": list(reference.get_submodule(g).parameters()), "lr": 0.01 * s, "weight_decay": d}
                for g, s, d in zip(GROUPS, scales, decays, strict=True)
            ]
        )
    )
    fit(reference)
    module = Classifier(optimizer=adamw)
    fit(module, ProgressiveUnfreezing(groups=GROUPS, at=(0, 0, 0), lr_scale=scales, weight_decay=decays))
    assert same(weights(module), weights(reference))


def test_zero_biases_and_fresh_norms_are_trained_once_awake():
    """Lightning's BaseFinetuning leaves out what equals a tensor that the optimizer holds already."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    for layer in net:
        nn.init.zeros_(layer.bias)
    module = Classifier(net)
    start = weights(net)
    fit(module, Unfreeze(groups=["net.4", ["net.3", "net.2"], ["net.1", "net.0"]], at=(0, 1, 2)))
    assert not any(
        torch.equal(start[name], p) for name, p in net.named_parameters() if name not in ("0.bias", "2.bias")
    )


# -- rates ----------------------------------------------------------------------------------------------------------


class Records(SGD):
    """Writes down the rate of each layer at every update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = []

    def step(self, closure=None):
        loss = super().step(closure)
        self.rates.append({id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]})
        return loss


SCHEDULERS = {
    "one cycle": (lambda o: OneCycleLR(o, max_lr=0.1, total_steps=17), "step"),
    "cosine": (lambda o: CosineAnnealingLR(o, T_max=16), "step"),
    "warm restarts": (lambda o: CosineAnnealingWarmRestarts(o, T_0=5), "step"),
    "lambda": (lambda o: LambdaLR(o, lambda step: 1 / (step + 1)), "step"),
    "lambda list": (lambda o: LambdaLR(o, [lambda step: 0.9**step]), "epoch"),
    "step": (lambda o: StepLR(o, 2, gamma=0.3), "epoch"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs_and_each_group_follows_it_at_its_scale(name):
    make, interval = SCHEDULERS[name]

    def configure(parameters):
        optimizer = Records(parameters, lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": make(optimizer), "interval": interval}]

    module = Classifier(optimizer=configure)
    trainer = fit(module, Unfreeze(at=(0, 1, 2), lr_scale=(1.0, 0.5, 0.1)))

    alone = SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, expected = make(alone), []
    for batch in range(16):
        expected.append(alone.param_groups[0]["lr"])
        alone.step()
        if interval == "step" or batch % 4 == 3:
            scheduler.step()
    rates = trainer.optimizers[0].rates
    for layer, scale in ((4, 1.0), (2, 0.5), (0, 0.1)):
        mine = [step[id(module.net[layer].weight)] for step in rates]
        assert mine == pytest.approx([scale * lr for lr in expected], rel=1e-6)
    assert len(trainer.optimizers[0].param_groups) == 1


def test_reduce_on_plateau_reduces_all_groups_alike():
    class Constant(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    def configure(parameters):
        optimizer = Records(parameters, lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=1e-4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    module = Constant(optimizer=configure)
    trainer = fit(module, Unfreeze(at=(0, 1, 2), lr_scale=(1.0, 0.5, 0.1)), val=True)
    for layer, scale in ((4, 1.0), (2, 0.5), (0, 0.1)):
        mine = [step[id(module.net[layer].weight)] for step in trainer.optimizers[0].rates][::4]
        assert mine == pytest.approx([0.1 * scale * f for f in (1, 1, 0.5, 0.25)])


# -- batch-norm -------------------------------------------------------------------------------------------------------


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("bn", "weights_move", "statistics_move", "mode"),
    [("follow", False, True, True), ("train", True, True, True), ("eval", False, False, False)],
)
def test_what_frozen_batch_norm_does(bn, weights_move, statistics_move, mode):
    modes = []
    watch = Watch(on_before_backward=lambda trainer, module, *rest: modes.append(module.net[1].training))
    module, start = Classifier(normed()), weights(normed())
    recipe = ProgressiveUnfreezing(groups=["net.3", ["net.1", "net.0"]], at=(0, math.inf), bn=bn, lr_scale=None)
    fit(module, recipe, watch, epochs=2, val=True)
    assert torch.equal(module.net[1].weight, start["1.weight"]) != weights_move
    assert torch.equal(module.net[1].running_mean, start["1.running_mean"]) != statistics_move
    assert torch.equal(module.net[0].weight, start["0.weight"])
    assert modes == [mode] * 8
    assert module.net[1].training == module.training


def test_frozen_batch_norm_in_eval_mode_normalises_by_its_statistics():
    outputs = []

    class Looks(Classifier):
        def training_step(self, batch, batch_idx):
            outputs.append(self.net[:2](batch[0]).detach())
            return super().training_step(batch, batch_idx)

    module, net = Looks(normed()), normed().eval()
    recipe = ProgressiveUnfreezing(groups=["net.3", ["net.1", "net.0"]], at=(0, 1), bn="eval", lr_scale=None)
    fit(module, recipe, epochs=2)
    assert torch.allclose(outputs[3], net[:2](X[12:]))
    assert module.net[1].num_batches_tracked == 8  # awake in the second epoch, where each step runs it twice


def test_batch_norm_is_back_in_the_modules_mode_after_an_exception():
    def fail(*args):
        raise RuntimeError("user's own")

    module = Classifier(normed())
    recipe = ProgressiveUnfreezing(groups=["net.3", ["net.1", "net.0"]], at=(0, 1), bn="eval", lr_scale=None)
    with pytest.raises(RuntimeError, match="user's own"):
        fit(module, recipe, Watch(on_train_batch_end=fail))
    assert module.net[1].training == module.training
    assert all(p.requires_grad for p in module.parameters())


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 8, 12])
@pytest.mark.parametrize("at", [(0, 1, 2), EveryN(3, unit="step")])
def test_a_resumed_fit_ends_where_the_whole_one_does(at, steps, tmp_path):
    def module():
        return Classifier(optimizer=lambda p: AdamW(p, lr=0.01))

    whole = module()
    fit(whole, Unfreeze(at=at, lr_scale=0.5))
    save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=steps, save_top_k=1)
    trainer = quiet(
        max_epochs=4, max_steps=steps, callbacks=[Unfreeze(at=at, lr_scale=0.5), save], enable_checkpointing=True
    )
    trainer.fit(module(), loader(X, Y))
    resumed, stages = module(), Stages()
    trainer = quiet(max_epochs=4, callbacks=[Unfreeze(at=at, lr_scale=0.5), stages.watch])
    trainer.fit(resumed, loader(X, Y), ckpt_path=tmp_path / "last.ckpt")
    assert stages.seen[0] == ("24" if steps == 4 else "024")
    assert same(weights(resumed), weights(whole))


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4)
    quiet(max_epochs=1, callbacks=[Unfreeze(at=(0, 1, 2)), save], enable_checkpointing=True).fit(
        Classifier(), loader(X, Y)
    )
    with pytest.raises(RecipeError, match=r"at=\[0, 1, 2\] in the checkpoint but \[0, 1, 3\] here"):
        quiet(max_epochs=4, callbacks=[Unfreeze(at=(0, 1, 3))]).fit(
            Classifier(), loader(X, Y), ckpt_path=tmp_path / "last.ckpt"
        )


def test_what_the_user_froze_wakes_only_when_named():
    module = Classifier()
    module.net[0].requires_grad_(False)
    fit(module, ProgressiveUnfreezing(at=(0, 1, 2), lr_scale=None))
    assert torch.equal(module.net[0].weight, mlp()[0].weight)
    module = Classifier()
    module.net[0].requires_grad_(False)
    fit(module, Unfreeze(at=(0, 1, 2)))
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)
    assert not module.net[0].weight.requires_grad


def test_the_loss_still_falls():
    module = Classifier(optimizer=adamw)
    before = F.cross_entropy(module(X), Y).item()
    fit(module, Unfreeze(at=(0, 1, 2)), epochs=20)
    assert F.cross_entropy(module(X), Y).item() < before


def test_a_second_fit_with_the_same_object_begins_anew() -> None:
    recipe = Unfreeze(at=Plateau("val/loss", patience=1))
    net = mlp()
    fit(Classifier(net, lambda parameters: SGD(parameters, lr=0.0)), recipe, epochs=4, val=True)
    assert recipe.state()["stage"] > 1, "nothing improves at rate 0, so groups woke"
    stages = []
    watch = Watch(on_train_batch_start=lambda *_: stages.append(recipe.state()["stage"]))
    fit(Classifier(mlp(), lambda parameters: SGD(parameters, lr=0.0)), recipe, watch, epochs=1, val=True)
    assert set(stages) == {1}


def test_no_gradient_is_edited_where_the_wrapper_is_rebuilt() -> None:
    """By default the clipping hook is left alone, so optimizers that unscale in their step stay allowed."""
    seen = []
    watch = Watch(on_train_batch_start=lambda _, module, *__: seen.append(set(module.__dict__)))
    fit(Classifier(mlp()), Unfreeze(at=(0, 1, 2)), watch)
    assert seen
    assert all("configure_gradient_clipping" not in names for names in seen)


# -- the linear probe --------------------------------------------------------------------------------------------------


class Decayed(Classifier):
    """AdamW under a schedule as long as the fit that it is told of."""

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, steps)}}


def by_hand(module, epochs, parameters=None):
    """The same training as a plain loop; AdamW of the probe where parameters are given."""
    probe = None if parameters is None else AdamW(parameters, lr=0.02, weight_decay=1e-4)
    optimizer = probe or AdamW(module.parameters(), lr=0.01)
    schedule = None if probe else CosineAnnealingLR(optimizer, 4 * epochs)
    for _ in range(epochs):
        for x, y in loader(X, Y):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()


def test_lp_ft_is_a_probe_with_its_own_optimizer_and_then_plain_fine_tuning():
    module, plain = Decayed(), Decayed()
    plain.load_state_dict(module.state_dict())
    fit(module, Unfreeze(at=(0, 0, 0), probe_epochs=2, probe_lr=0.02), epochs=5)
    plain.requires_grad_(False)
    plain.net[4].requires_grad_(True)
    by_hand(plain, 2, list(plain.net[4].parameters()))
    plain.requires_grad_(True)
    by_hand(plain, 3)
    assert same(weights(module), weights(plain))


def test_times_count_from_the_end_of_the_probe():
    stages, rates = Stages(), []
    note = Watch(on_train_epoch_start=lambda t, m: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    fit(Decayed(), Unfreeze(at=(0, 0.25, 0.5), probe_epochs=2, probe_lr=0.02), stages.watch, note, epochs=6)
    # 2 epochs of the probe; then 4: layer 2 at floor(.25 * 4) = 1, layer 0 at 2
    assert stages.seen == ["4"] * 8 + ["4"] * 4 + ["24"] * 4 + ["024"] * 8
    assert rates[:3] == [0.02, 0.02, 0.01]


def test_times_in_steps_count_from_the_end_of_the_probe():
    stages = Stages()
    fit(Decayed(), Unfreeze(at=At((0, 2, 3), "step"), probe_epochs=1), stages.watch, epochs=2)
    assert stages.seen == ["4"] * 4 + ["4"] * 2 + ["24"] + ["024"]


def test_a_plateau_is_not_looked_for_in_the_probe():
    stages = Stages()
    stuck = Plateau("val/loss", patience=1, min_delta=10.0)
    fit(Decayed(), Unfreeze(at=stuck, probe_epochs=2), stages.watch, epochs=5, val=True)
    assert stages.seen == ["4"] * 16 + ["24"] * 4  # the first validation that counts is that of epoch 2


@pytest.mark.parametrize("mechanism", ["rewrap", "drop_grad"])
def test_rates_and_decays_of_the_groups_are_those_of_the_main_phase(mechanism):
    """The probe's rate is its own; afterwards every group has its scale."""
    seen = []

    def note(trainer, module, optimizer):
        seen.append({group["lr"] for group in optimizer.param_groups})

    module = Classifier()
    recipe = Unfreeze(at=(0, 0, 0), lr_scale=(0.5, 0.25, 0.125), probe_epochs=1, probe_lr=0.02, mechanism=mechanism)
    updates = []

    def spy(trainer, *args):
        if trainer.current_epoch == 1 and not updates:
            before = {n: p.detach().clone() for n, p in module.named_parameters()}
            updates.append(before)
        elif len(updates) == 1:
            updates.append({n: (p.detach() - updates[0][n], p.grad) for n, p in module.named_parameters()})

    fit(module, recipe, Watch(on_before_optimizer_step=note, on_train_batch_start=spy), epochs=2)
    assert seen[0] == {0.02}
    assert seen[4] == {0.1}, "at rest the groups are the user's own"
    for name, scale in (("net.4.weight", 0.5), ("net.2.weight", 0.25), ("net.0.weight", 0.125)):
        moved, grad = updates[1][name]
        assert torch.allclose(moved, -0.1 * scale * grad, atol=1e-8)


@pytest.mark.parametrize("step", [2, 4, 6, 11])
def test_a_probe_resumes(step, tmp_path):
    recipe = lambda: Unfreeze(at=(0, 1, 1), lr_scale=0.5, probe_epochs=1)  # noqa: E731
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    whole, resumed = Decayed(), Decayed()
    resumed.load_state_dict(whole.state_dict())
    fit(whole, recipe(), ExactResume(), saves, epochs=4, enable_checkpointing=True)
    trainer = quiet(callbacks=[recipe(), ExactResume()], max_epochs=4)
    trainer.fit(resumed, loader(X, Y), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert same(weights(whole), weights(resumed))

"""The gradient socket: edits of the final gradient, and a second pass over the accumulation window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torchmetrics import MeanMetric

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.gradients import check_optimizers, global_norm, optimized, skip_if_nonfinite
from lightning_recipes.core.random import key, uniform
from lightning_recipes.core.recipe import Recipe, StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(20)


class Edit(Recipe):
    def __init__(self, edit, when="before_clip"):
        super().__init__()
        self.edit, self.when = edit, when

    def declare(self, plan):
        plan.edit_gradients(self.edit, self.when)


class Edit2(Edit):
    pass


class AfterStep(Recipe):
    """Calls ``edit`` with the optimizer after every true step."""

    def __init__(self, edit):
        super().__init__()
        self.edit = edit

    def declare(self, plan):
        plan.after_step(self.edit)


class Again(Recipe):
    """Runs the window again at weights moved by ``shift`` and keeps both gradients."""

    def __init__(self, shift=0.0, run=None, write=False):
        super().__init__()
        self.shift, self.run, self.write = shift, run, write
        self.plain, self.sharp, self.losses, self.objects = [], [], [], []

    def declare(self, plan):
        plan.replay_window(self.edit, self.run)

    def edit(self, optimizer, window):
        parameters = optimized(optimizer)
        grads = [p.grad for p in parameters]
        self.plain.append([g.clone() for g in grads])
        with torch.no_grad():
            at = [p.clone() for p in parameters]
            torch._foreach_add_(parameters, self.shift)
            sharp, loss = window.gradients(parameters)
            torch._foreach_copy_(parameters, at)
            self.sharp.append([g.clone() for g in sharp])
            self.losses.append((window.loss.item(), loss.item()))
            self.objects.append([p.grad is g for p, g in zip(parameters, grads, strict=True)])
            if self.write:
                skip_if_nonfinite(window.trainer, optimizer, sharp)
                torch._foreach_copy_(grads, sharp)


class Again2(Again):
    pass


def fit(module, *callbacks, x=X, y=Y, **kwargs):
    trainer = quiet(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, loader(x, y))
    return trainer


def gradient(net, parts, divisor):
    """Sum of the gradients of the parts' mean losses, divided."""
    net.zero_grad()
    for x, y in parts:
        (F.cross_entropy(net(x), y) / divisor).backward()
    return [p.grad.clone() for p in net.parameters()]


def parts(*numbers):
    return [(X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]) for i in numbers]


def close(first, second, atol=1e-6):
    return all(torch.allclose(a, b, atol=atol, rtol=1e-5) for a, b in zip(first, second, strict=True))


# -- edits ---------------------------------------------------------------------------------------------------------


def test_an_edit_sees_the_accumulated_unclipped_gradient_once_a_step():
    seen = []
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Edit(lambda optimizer: seen.append([p.grad.clone() for p in optimized(optimizer)]))
    fit(module, recipe, accumulate_grad_batches=3, gradient_clip_val=1e-3)
    assert len(seen) == 2  # 5 batches: a window of 3, and a short one of 2
    assert close(seen[0], gradient(mlp(), parts(0, 1, 2), 3))
    assert close(seen[1], gradient(mlp(), parts(3, 4), 3))  # Lightning divides a short window by 3 all the same


def test_edits_run_before_and_after_clipping_in_the_order_of_the_trainer():
    norms = []

    def note(optimizer):
        norms.append(global_norm([p.grad for p in optimized(optimizer)]).item())

    def double(optimizer):
        note(optimizer)
        torch._foreach_mul_([p.grad for p in optimized(optimizer)], 2.0)

    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    fit(
        module,
        Edit2(double, "after_clip"),
        Edit(double, "before_clip"),
        limit_train_batches=1,
        gradient_clip_val=0.1,
    )
    norm = torch.cat([g.flatten() for g in gradient(mlp(), parts(0), 1)]).norm().item()
    assert norms == pytest.approx([norm, 0.1], rel=1e-4)
    moved = torch.cat([(a - b).flatten() for a, b in zip(module.net.parameters(), mlp().parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.2, rel=1e-4)


def test_two_edits_at_one_place_run_in_order():
    order = []
    fit(Classifier(), Edit(lambda _: order.append("a")), Edit2(lambda _: order.append("b")), limit_train_batches=1)
    assert order == ["a", "b"]


def test_an_edit_after_the_step_sees_the_new_weights_once_an_update():
    module, seen, expected = Classifier(), [], []
    recipe = AfterStep(lambda optimizer: seen.append((optimizer, weights(module.net))))
    watch = Watch(on_train_batch_end=lambda *args: expected.append(weights(module.net)))
    trainer = fit(module, recipe, watch, accumulate_grad_batches=2)
    assert len(seen) == 3  # 5 batches: two windows of 2, and a short one
    assert [optimizer for optimizer, _ in seen] == trainer.optimizers * 3
    for (_, after), end in zip(seen, expected[1::2] + expected[-1:], strict=True):
        assert same(after, end)
    assert not same(seen[0][1], weights(mlp()))


def test_what_an_edit_after_the_step_writes_stays_and_decay_and_momentum_do_not_move_it():
    kept = mlp()[2].weight.detach().clone()
    module = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))
    fit(module, AfterStep(lambda _: module.net[2].weight.copy_(kept)))
    assert torch.equal(module.net[2].weight, kept)
    assert module.net[2].weight.requires_grad and not torch.equal(module.net[0].weight, mlp()[0].weight)


def test_edits_run_before_the_clipping_after_it_and_after_the_step():
    order, module = [], Classifier()

    def note(what):
        return lambda _: order.append((what, same(weights(module.net), weights(mlp()))))

    recipes = [AfterStep(note("after_step")), Edit(note("after_clip"), "after_clip"), Edit2(note("before_clip"))]
    fit(module, *recipes, limit_train_batches=1, gradient_clip_val=0.1)
    assert order == [("before_clip", True), ("after_clip", True), ("after_step", False)]


def test_a_second_optimizer_of_a_fit_is_watched_from_its_first_step():
    stepped, module = [], Classifier()

    def replace(trainer, *args):
        if trainer.global_step == 2:
            trainer.strategy.optimizers = [torch.optim.Adam(module.parameters(), lr=0.1)]

    recipe = AfterStep(lambda optimizer: stepped.append(type(optimizer).__name__))
    fit(module, recipe, Watch(on_train_batch_start=replace), limit_train_batches=4)
    assert stepped == ["SGD", "SGD", "Adam", "Adam"]


@pytest.mark.parametrize("stops", [False, True])
def test_afterwards_no_optimizer_has_a_hook_of_ours(stops):
    module, trainer = Classifier(), quiet(callbacks=[AfterStep(lambda _: None)])

    def stop(*args):
        if stops:
            raise RuntimeError("stop")

    trainer.callbacks.append(Watch(on_train_batch_end=stop))
    if stops:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(module, loader(X, Y))
    else:
        trainer.fit(module, loader(X, Y))
    assert trainer.optimizers and not trainer.optimizers[0]._optimizer_step_post_hooks
    assert "configure_gradient_clipping" not in module.__dict__


class Twice(torch.optim.SGD):
    """Asks for two gradients an update."""

    def step(self, closure):
        closure()
        return super().step(closure)


class OnceAnUpdate(Edit):
    def declare(self, plan):
        plan.edit_gradients(self.edit, self.when, once=True)


@pytest.mark.parametrize("when", ["before_clip", "after_clip"])
def test_a_second_gradient_in_one_update_is_refused_where_an_edit_is_one_of_the_update(when):
    calls = []
    module = Classifier(optimizer=lambda parameters: Twice(parameters, lr=0.1))
    with pytest.raises(RecipeError, match="OnceAnUpdate edits the gradient of an update, and Twice calls its closure"):
        fit(module, Edit(lambda _: None), OnceAnUpdate(calls.append, when))
    assert len(calls) == 1 and same(weights(module.net), weights(mlp()))
    fit(module, Edit(calls.append, when))
    assert len(calls) == 1 + 2 * 5


def test_a_recipe_looks_at_the_network_after_all_surgery_and_before_it_trains():
    from lightning_recipes.callbacks import PEGO

    class Looks(Recipe):
        def declare(self, plan):
            plan.after_surgery(lambda: seen.append([name for name, _ in plan.module.named_parameters()]))

    class Refuses(Recipe):
        def declare(self, plan):
            plan.after_surgery(self.look)

        def look(self):
            raise RecipeError("there is no such thing")

    seen, module = [], Classifier()
    fit(module, Looks(), PEGO(1, 2, target_modules=["0"]))
    assert len(seen) == 1 and "net.0.lora_A.g0.weight" in seen[0]
    before = weights(module)
    with pytest.raises(RecipeError, match="Refuses: there is no such thing"):
        fit(module, Refuses(), PEGO(1, 2, target_modules=["0"]))
    assert same(before, weights(module))


def test_the_modules_own_clipping_still_runs():
    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            calls.append(gradient_clip_val)
            self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val)

    calls = []
    module = Clips()
    fit(module, Edit(lambda _: calls.append("edit")), limit_train_batches=1, gradient_clip_val=0.5)
    assert calls == ["edit", 0.5]
    assert "configure_gradient_clipping" not in module.__dict__


def test_manual_optimization_is_refused():
    module = Classifier()
    module.automatic_optimization = False
    for recipe in (Edit(print), Again(), AfterStep(print)):
        with pytest.raises(RecipeError, match="needs automatic optimization"):
            fit(module, recipe)


def test_the_global_norm_is_one_norm_over_all():
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0, 12.0]], dtype=torch.bfloat16)]
    assert global_norm(tensors).item() == 13.0


# -- the window ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_the_replay_is_the_gradient_of_the_window_at_the_moved_weights(shift):
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again(shift)
    fit(module, recipe, accumulate_grad_batches=3)
    moved = mlp()
    with torch.no_grad():
        for p in moved.parameters():
            p += shift
    for step, numbers in enumerate([(0, 1, 2), (3, 4)]):
        assert close(recipe.plain[step], gradient(mlp(), parts(*numbers), 3))
        assert close(recipe.sharp[step], gradient(moved, parts(*numbers), 3))
        for net, mean in zip((mlp(), moved), recipe.losses[step], strict=True):
            losses = [F.cross_entropy(net(x), y).item() for x, y in parts(*numbers)]
            assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert all(all(kept) for kept in recipe.objects)
    assert same(weights(module.net), weights(mlp()))


class Noisy(Classifier):
    """Everything that a second run could disturb: dropout, batch-norm, a metric, logs."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
        self.seen = MeanMetric()
        self.runs = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.update(loss)
        self.log("loss", loss, on_epoch=True)
        self.runs += 1
        return loss


def test_the_replay_is_silent_and_draws_the_same_masks():
    plain, replayed, recipe = Noisy(), Noisy(), Again()
    torch.manual_seed(3)
    first = fit(plain, accumulate_grad_batches=2)
    torch.manual_seed(3)
    second = fit(replayed, recipe, accumulate_grad_batches=2)
    assert (plain.runs, replayed.runs) == (5, 10)
    assert same(weights(replayed), weights(plain))
    assert replayed.seen.compute() == plain.seen.compute()
    assert replayed.seen._update_count == 5
    assert first.callback_metrics.keys() == second.callback_metrics.keys()
    assert all(torch.equal(v, second.callback_metrics[k]) for k, v in first.callback_metrics.items())
    for a, b, (before, after) in zip(recipe.plain, recipe.sharp, recipe.losses, strict=True):
        assert close(a, b)
        assert before == pytest.approx(after)


class Streams(StepRecipe):
    """A recipe with keyed random numbers; the replay must see the same ones."""

    def transform_batch(self, step, batch):
        return batch[0] + step.uniform(self, 0, "noise", batch[0]), batch[1]


class Bare(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("module", [Classifier, Bare])
def test_keyed_random_numbers_are_the_same_in_the_replay(module):
    recipe = Again()
    fit(module(), Streams(), recipe, accumulate_grad_batches=3)
    noise = uniform(key(0, 0, "Streams/noise", 0), torch.arange(20), (6,))
    noisy = [(x + noise[4 * i : 4 * i + 4], y) for i, (x, y) in enumerate(parts(0, 1, 2))]
    assert close(recipe.plain[0], gradient(mlp(), noisy, 3))
    assert close(recipe.sharp[0], recipe.plain[0])
    assert close(recipe.sharp[1], recipe.plain[1])


def test_a_term_of_the_weights_alone_counts_once_in_the_replay():
    class Penalty(StepRecipe):
        of_weights_alone = True

        def extra_loss(self, step):
            return sum(p.square().sum() for p in step.module.parameters())

    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again()
    fit(module, Penalty(), recipe, accumulate_grad_batches=3)
    for step, numbers in enumerate([(0, 1, 2), (3, 4)]):
        net = mlp()
        expected = [g + 2 * p for g, p in zip(gradient(net, parts(*numbers), 3), net.parameters(), strict=True)]
        assert close(recipe.plain[step], expected)
        assert close(recipe.sharp[step], expected)


def test_a_named_loss_replaces_the_step_in_the_replay():
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again(run=lambda batch: F.cross_entropy(2 * module.net(batch[0]), batch[1]))
    fit(module, recipe, limit_train_batches=1)
    net = mlp()
    F.cross_entropy(2 * net(X[:4]), Y[:4]).backward()
    assert close(recipe.sharp[0], [p.grad for p in net.parameters()])


def test_batches_that_the_step_skipped_are_not_replayed():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again()
    fit(module, recipe, accumulate_grad_batches=3)
    assert close(recipe.sharp[0], gradient(mlp(), parts(0, 2), 3))


def test_a_dict_step_is_replayed():
    class DictStep(Classifier):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx)}

    module = DictStep(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again()
    fit(module, recipe, limit_train_batches=1)
    assert close(recipe.sharp[0], gradient(mlp(), parts(0), 1))


def test_a_parameter_that_the_loss_does_not_reach_gets_zeros():
    class Unused(Classifier):
        def __init__(self):
            super().__init__()
            self.spare = nn.Parameter(torch.ones(2))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.spare.sum() if self.first else 0)

        first = True

    class Asks(Again):
        def edit(self, optimizer, window):
            window.module.first = False
            super().edit(optimizer, window)

    module, recipe = Unused(), Asks()
    fit(module, recipe, limit_train_batches=1)
    assert any(torch.equal(p, torch.ones(2)) for p in recipe.plain[0])
    assert any(torch.equal(p, torch.zeros(2)) for p in recipe.sharp[0])


def test_a_second_replay_is_refused():
    module = Classifier()
    with pytest.raises(RecipeError, match="Again and Again2 both run a second pass"):
        fit(module, Again(), Again2())
    assert not {"training_step", "configure_gradient_clipping"} & set(module.__dict__)


def test_nothing_is_left_of_the_window_when_the_fit_is_over():
    module, kept = Classifier(), []

    class Keeps(Again):
        def edit(self, optimizer, window):
            kept.append(window)

    fit(module, Keeps(), limit_train_batches=3, accumulate_grad_batches=2)
    assert kept[0]._steps == []
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p, max_iter=2)])
def test_an_optimizer_that_calls_its_closure_again_is_refused(make):
    for recipe in (Again(), Edit(lambda optimizer: None), AfterStep(lambda optimizer: None)):
        with pytest.raises(RecipeError, match="LBFGS"):
            fit(Classifier(optimizer=make), recipe)


# -- fp16 -----------------------------------------------------------------------------------------------------------


def half():
    """16-mixed on the CPU, where the scaler works too."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_fp16_gradients_are_unscaled_in_both_passes():
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recipe = Again()
    fit(module, recipe, plugins=[half()], accumulate_grad_batches=3, gradient_clip_val=1e-3)
    expected = gradient(mlp(), parts(0, 1, 2), 3)
    assert close(recipe.plain[0], expected, atol=2e-3)
    assert close(recipe.sharp[0], recipe.plain[0], atol=1e-7)


@pytest.mark.parametrize("bad", [False, True])
def test_a_sharp_gradient_that_is_not_finite_skips_the_step(bad):
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.runs = getattr(self, "runs", 0) + 1
            return loss * (float("inf") if bad and self.runs == 2 else 1)

    plugin, module = half(), Breaks()
    trainer = fit(module, Again(write=True), plugins=[plugin], limit_train_batches=1)
    assert same(weights(module.net), weights(mlp())) == bad
    assert plugin.scaler.get_scale() == (2.0**9 if bad else 2.0**10)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert trainer.global_step == 1


def test_a_step_that_fp16_skips_is_not_followed_by_an_edit():
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1)

    module, seen = Breaks(), []
    recipe = AfterStep(lambda optimizer: seen.append(module.trainer.fit_loop.batch_idx))
    trainer = fit(module, recipe, plugins=[half()])
    assert seen == [0, 2, 3, 4] and trainer.global_step == 5


def test_fp16_with_an_optimizer_that_unscales_by_itself_is_refused():
    for recipe in (Edit(lambda _: None), AfterStep(lambda _: None)):
        module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
        with pytest.raises(RecipeError, match=r"AdamW\(fused=True\) unscales"):
            fit(module, recipe, plugins=[half()])


def test_a_fused_optimizer_is_fine_without_fp16():
    module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
    trainer = fit(module, Edit(lambda _: None), Watch())
    check_optimizers(trainer, Edit(print))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_attack_is_repeated_as_it_was(accumulate):
    """GLAD's second pass with AAER in it: the same starts and the same ramp, wherever the Trainer's counter stands."""
    from lightning_recipes.callbacks import AAER

    recipe = Again()
    attack = AAER(epsilon=0.3, variant="n", attack_warmup_epochs=2, reg_warmup_epochs=1)
    frozen = Bare(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(frozen, attack, recipe, accumulate_grad_batches=accumulate, max_epochs=2)
    assert len(recipe.plain) >= 4
    for plain, sharp, (before, after) in zip(recipe.plain, recipe.sharp, recipe.losses, strict=True):
        assert close(plain, sharp)
        assert before == pytest.approx(after, rel=1e-5)

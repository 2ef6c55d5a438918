"""The training-step socket: the order of stages, what they see, what the module gets back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.core.step import prefix
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples()


class Log(StepRecipe):
    """Writes down when each of its stages runs and with what."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def transform_batch(self, step, batch):
        self.calls.append((self.name, "batch"))
        return batch[0] + 1, batch[1]

    def transform_logits(self, step, logits):
        self.calls.append((self.name, "logits"))
        return logits * 2

    def transform_targets(self, step, logits, targets):
        self.calls.append((self.name, "targets"))
        return targets

    def loss_weights(self, step):
        self.calls.append((self.name, "weights"))
        return torch.ones(len(step.logits))

    def extra_loss(self, step):
        self.calls.append((self.name, "extra"))
        return step.logits.sum() * 0


class Other(Log):
    pass


class Extra(StepRecipe):
    """Adds named losses that do not depend on anything observed."""

    def extra_loss(self, step):
        norm = sum(p.square().sum() for p in step.module.parameters())
        return {"norm": norm, "twice": 2 * norm}


class OneScalar(StepRecipe):
    def extra_loss(self, step):
        return sum(p.abs().sum() for p in step.module.parameters())


class Smooth(StepRecipe):
    """Soft targets: 0.7 on the label, the rest spread."""

    def transform_targets(self, step, logits, targets):
        return F.one_hot(targets, 3) * 0.7 + 0.1


class Seen(StepRecipe):
    """Keeps what its stages were handed."""

    def transform_targets(self, step, logits, targets):
        self.targets, self.batch = targets, step.batch
        return targets

    def extra_loss(self, step):
        self.loss, self.hard, self.outputs = step.loss.detach(), step.hard_targets, step.outputs
        self.final = step.logits
        return {}


class Only(StepRecipe):
    """The module's own loss does not count."""

    def own_loss_weight(self, step):
        return 0.0

    def extra_loss(self, step):
        return sum(p.square().sum() for p in step.module.parameters())


class Half(StepRecipe):
    def own_loss_weight(self, step):
        return 0.5


class Doubled(StepRecipe):
    def transform_batch(self, step, batch):
        return batch[0] * 2, batch[1]


def fit(module, *recipes, epochs=1, data=None, **kwargs):
    trainer = quiet(callbacks=list(recipes), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(*(data or (X, Y))))
    return trainer


def sgd_by_hand(net, loss, steps=4, lr=0.1, x=X, y=Y):
    """Plain SGD on batches of 4 in order; loss(net, x, y)."""
    for i in range(steps):
        net.zero_grad()
        loss(net, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(p.grad, alpha=-lr)
    return weights(net)


def close(first, second, tolerance=1e-6):
    return all(torch.allclose(first[name], second[name], atol=tolerance, rtol=0) for name in second)


def test_stages_chain_in_the_order_of_the_trainer_and_stage_by_stage():
    calls = []
    fit(Classifier(), Log("a", calls), Other("b", calls), limit_train_batches=1)
    stages = ["batch", "logits", "targets", "weights", "extra"]
    assert calls == [(name, stage) for stage in stages for name in ("a", "b")]


def test_later_stages_see_the_final_batch_and_both_transforms_act():
    seen = Seen()
    fit(Classifier(), Log("a", []), Other("b", []), seen, limit_train_batches=1)
    assert torch.equal(seen.batch[0], X[:4] + 2)
    net = mlp()
    assert torch.allclose(seen.outputs, net(X[:4] + 2))
    assert torch.allclose(seen.final, 4 * net(X[:4] + 2))
    assert torch.allclose(seen.loss, F.cross_entropy(4 * net(X[:4] + 2), Y[:4]))


def test_soft_targets_reach_later_stages_and_the_loss():
    soft = F.one_hot(Y, 3) * 0.7 + 0.1
    seen = Seen()
    module = Classifier()
    fit(module, Smooth(), seen)
    assert torch.equal(seen.targets, soft[12:])
    assert torch.equal(seen.hard, Y[12:])
    by_hand = sgd_by_hand(mlp(), lambda net, x, y: F.cross_entropy(net(x), F.one_hot(y, 3) * 0.7 + 0.1))
    assert close(weights(module.net), by_hand)


def test_a_batch_transform_alone_trains_on_the_transformed_batch():
    module = Classifier()
    fit(module, Doubled())
    assert same(weights(module.net), sgd_by_hand(mlp(), lambda net, x, y: F.cross_entropy(net(2 * x), y)))


def test_extra_losses_add_up_and_are_logged_under_their_names():
    module = Classifier()
    start = sum(p.square().sum() for p in module.parameters()).item()
    absolute = sum(p.abs().sum() for p in module.parameters()).item()
    trainer = fit(module, Extra(), OneScalar(), limit_train_batches=1)
    assert trainer.callback_metrics["extra/norm"].item() == pytest.approx(start)
    assert trainer.callback_metrics["extra/twice"].item() == pytest.approx(2 * start)
    assert trainer.callback_metrics["one_scalar/extra_loss"].item() == pytest.approx(absolute)

    def loss(net, x, y):
        extra = sum(3 * p.square().sum() + p.abs().sum() for p in net.parameters())
        return F.cross_entropy(net(x), y) + extra

    assert close(weights(module.net), sgd_by_hand(mlp(), loss, steps=1))


@pytest.mark.parametrize("alone", [False, True])
def test_a_term_of_the_weights_alone_counts_once_an_optimizer_step(alone):
    class Penalty(OneScalar):
        of_weights_alone = alone

        def extra_loss(self, step):
            calls.append(step.batch_idx)
            self.own = step.own_loss.item()
            return super().extra_loss(step)

    calls, module = [], Classifier()
    absolute = sum(p.abs().sum() for p in module.parameters()).item()
    recipe = Penalty()
    trainer = fit(module, recipe, limit_train_batches=3, accumulate_grad_batches=3)
    assert calls == ([2] if alone else [0, 1, 2])
    assert trainer.callback_metrics["penalty/extra_loss"].item() == pytest.approx(absolute, rel=1e-5)
    assert recipe.own == pytest.approx(F.cross_entropy(mlp()(X[8:12]), Y[8:12]).item())

    def loss(net, x, y):
        own = sum(F.cross_entropy(net(X[4 * i : 4 * i + 4]), Y[4 * i : 4 * i + 4]) for i in range(3)) / 3
        return own + sum(p.abs().sum() for p in net.parameters())

    assert close(weights(module.net), sgd_by_hand(mlp(), loss, steps=1))


def test_the_log_prefix_is_the_class_name_in_snake_case():
    names = {"AAER": "aaer", "CutMix": "cut_mix", "PEGO": "pego", "WiSEFT": "wi_seft", "OneEpoch": "one_epoch"}
    assert {name: prefix(type(name, (), {})()) for name in names} == names


def test_own_loss_weight_0_drops_the_term_also_when_it_is_not_a_number():
    class NotANumber(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    module = NotANumber()
    fit(module, Only())
    by_hand = sgd_by_hand(mlp(), lambda net, x, y: sum(p.square().sum() for p in net.parameters()))
    assert close(weights(module.net), by_hand)


def test_own_loss_weight_scales_the_loss():
    module = Classifier()
    fit(module, Half())
    assert close(weights(module.net), sgd_by_hand(mlp(), lambda net, x, y: F.cross_entropy(net(x), y) / 2))


def test_own_loss_weight_0_with_nothing_else_is_an_error():
    class Nothing(StepRecipe):
        def own_loss_weight(self, step):
            return 0.0

    with pytest.raises(RecipeError, match="nothing to train"):
        fit(Classifier(), Nothing())


def test_two_own_loss_weights_are_refused():
    with pytest.raises(RecipeError, match="Only and Half each set the weight"):
        fit(Classifier(), Only(), Half())


def test_recipes_that_name_different_losses_are_refused():
    first, second = Smooth(), Seen()
    first.criterion, second.criterion = 0, 1
    with pytest.raises(RecipeError, match="Smooth criterion=0, Seen criterion=1"):
        fit(Classifier(), first, second)


def test_loss_weights_multiply():
    class Ones(StepRecipe):
        def loss_weights(self, step):
            return torch.tensor([1.0, 2.0, 3.0, 4.0])

    class Zeros(StepRecipe):
        def loss_weights(self, step):
            return torch.tensor([0.0, 1.0, 0.0, 2.0])

    module = Classifier()
    fit(module, Ones(), Zeros(), limit_train_batches=1)

    def loss(net, x, y):
        losses = F.cross_entropy(net(x), y, reduction="none")
        return (2 * losses[1] + 8 * losses[3]) / 4

    assert close(weights(module.net), sgd_by_hand(mlp(), loss, steps=1))


class DictStep(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "kept": batch[1]}


def test_a_step_that_returns_a_dict_keeps_its_other_entries():
    seen = []
    watch = Watch(on_train_batch_end=lambda trainer, module, outputs, *rest: seen.append(outputs))
    module = DictStep()
    fit(module, Only(), watch)
    assert torch.equal(seen[0]["kept"], Y[:4])
    assert close(
        weights(module.net), sgd_by_hand(mlp(), lambda net, x, y: sum(p.square().sum() for p in net.parameters()))
    )


def test_a_step_that_skips_its_batch_is_left_alone():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Skips()
    fit(module, Smooth(), Extra())
    assert not same(weights(module.net), weights(mlp()))


def test_a_step_without_an_index_of_the_batch_works():
    class NoIndex(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Index(StepRecipe):
        seen: list

        def transform_batch(self, step, batch):
            self.seen.append(step.batch_idx)
            return batch

    recipe = Index()
    recipe.seen = []
    fit(NoIndex(), recipe)
    assert recipe.seen == [0, 1, 2, 3]


def test_a_dataloader_iter_step_is_refused():
    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(RecipeError, match="dataloader_iter"):
        fit(Fetches(), Doubled())


class Manual(Classifier):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2, 4)]


def test_manual_optimization_takes_batch_and_target_transforms():
    module = Manual()
    fit(module, Doubled(), Smooth())

    def loss(net, x, y):
        return F.cross_entropy(net(2 * x), F.one_hot(y, 3) * 0.7 + 0.1)

    assert close(weights(module.net), sgd_by_hand(mlp(), loss))


@pytest.mark.parametrize(
    ("recipe", "stage"), [(Extra, "extra_loss"), (Half, "own_loss_weight"), (Log, "loss_weights, extra_loss")]
)
def test_manual_optimization_refuses_what_would_come_too_late(recipe, stage):
    made = recipe("a", []) if recipe is Log else recipe()
    module = Manual()
    with pytest.raises(RecipeError, match=f"automatic optimization.*{stage} would come too late"):
        fit(module, made)
    assert "training_step" not in module.__dict__


def test_manual_optimization_with_two_losses_asks_which():
    class TwoLosses(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    with pytest.raises(RecipeError, match="computes 2 losses"):
        fit(TwoLosses(), Smooth())


# -- replay -----------------------------------------------------------------------------------------------------------


class Attack(StepRecipe):
    """Looks at the gradient with respect to the input, by a replay."""

    needs_criterion = True

    def transform_batch(self, step, batch):
        x = batch[0].clone().requires_grad_()
        self.replay = step.replay((x, batch[1]))
        self.gradient = torch.autograd.grad(self.replay.loss, x)[0]
        self.after = [p.grad for p in step.module.parameters()]
        return batch


def test_a_replay_gives_logits_targets_loss_and_the_gradient_of_the_input():
    attack = Attack()
    module = Classifier()
    fit(module, attack, limit_train_batches=1)
    net, x = mlp(), X[:4].clone().requires_grad_()
    loss = F.cross_entropy(net(x), Y[:4])
    assert torch.allclose(attack.replay.logits, net(x))
    assert torch.equal(attack.replay.targets, Y[:4])
    assert torch.allclose(attack.replay.loss, loss)
    assert torch.allclose(attack.replay.per_sample(), F.cross_entropy(net(x), Y[:4], reduction="none"))
    assert torch.allclose(attack.gradient, torch.autograd.grad(loss, x)[0])
    assert attack.after == [None] * 6
    assert same(weights(module.net), sgd_by_hand(mlp(), lambda net, x, y: F.cross_entropy(net(x), y), steps=1))


def test_a_replay_sees_the_logit_and_target_transforms_of_all_recipes():
    attack = Attack()
    fit(Classifier(), Log("a", []), Smooth(), attack, limit_train_batches=1)
    soft = F.one_hot(Y[:4], 3) * 0.7 + 0.1
    assert torch.allclose(attack.replay.loss, F.cross_entropy(2 * mlp()(X[:4] + 1), soft))
    assert torch.equal(attack.replay.targets, soft)


# -- within the network -----------------------------------------------------------------------------------------------


def test_hooks_within_the_network_find_the_step_that_they_are_in():
    from lightning_recipes.core.step import running

    found = []

    class Replays(StepRecipe):
        def transform_batch(self, step, batch):
            found.append(("recipe", running() is step))
            step.replay(batch)
            return batch

    module = Classifier()
    module.net.register_forward_pre_hook(lambda *a: found.append((running().batch_idx, running().replaying)))
    fit(module, Replays(), limit_train_batches=2)
    assert found == [("recipe", True), (0, True), (0, False), ("recipe", True), (1, True), (1, False)]
    assert running() is None

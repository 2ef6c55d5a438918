"""The parameter socket: rates and decays without split groups, freezing that leaves nothing behind, adoption."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.recipe import Recipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(32)
SCALES = {0: 0.1, 2: 0.5, 4: 1.0}  # of the layers of the mlp
DECAYS = {0: 0.05, 2: 0.0, 4: 0.01}


class Wants(Recipe):
    """Claims what it is given; ``then`` is claimed anew at the batch of that number."""

    def __init__(self, claim: Claim, then: dict[int, Claim] | None = None) -> None:
        super().__init__()
        self.claim, self.then = claim, then or {}

    def declare(self, plan):
        self.plan = plan
        plan.parameters(lambda: self.claim)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.then:
            self.plan.change_parameters(self.then[trainer.global_step])


class Wants2(Wants):
    pass


def by_layer(values):
    return {f"net.{i}.{kind}": value for i, value in values.items() for kind in ("weight", "bias")}


def names(*layers):
    return frozenset(f"net.{i}.{kind}" for i in layers for kind in ("weight", "bias"))


def fit(module, *callbacks, epochs=2, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y))
    return trainer


OPTIMIZERS = {
    "sgd momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw foreach": partial(AdamW, lr=0.01, weight_decay=0.01, foreach=True),
    "adamw fused": partial(AdamW, lr=0.01, weight_decay=0.01, fused=True),
    "adafactor": partial(Adafactor, lr=0.01, weight_decay=0.01),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.9, weight_decay=0.01),
}
SCHEDULERS = {
    "none": lambda optimizer, lrs: None,
    "cosine": lambda optimizer, lrs: CosineAnnealingLR(optimizer, T_max=16),
    # cycles momentum or beta1 too, where there is one; its rates come from max_lr alone
    "onecycle": lambda optimizer, lrs: OneCycleLR(
        optimizer, max_lr=lrs, total_steps=17, cycle_momentum=not isinstance(optimizer, Adafactor)
    ),
}


def scheduled(optimizer, name, lrs):
    scheduler = SCHEDULERS[name](optimizer, lrs)
    return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_expanded_groups_equal_groups_that_were_split_from_the_start(kind, schedule):
    make = OPTIMIZERS[kind]
    lr = make.keywords["lr"]

    def split(parameters):
        net = reference.net
        groups = [
            {"params": list(net[i].parameters()), "lr": lr * SCALES[i], "weight_decay": DECAYS[i]} for i in SCALES
        ]
        return scheduled(make(groups), schedule, [lr * s for s in SCALES.values()])

    reference = Classifier(optimizer=split)
    fit(reference)

    module = Classifier(optimizer=lambda parameters: scheduled(make(parameters), schedule, lr))
    trainer = fit(module, Wants(Claim(lr_scale=by_layer(SCALES), weight_decay=by_layer(DECAYS))))
    assert same(weights(module), weights(reference))
    assert not same(weights(module.net), weights(mlp()))
    optimizer = trainer.optimizers[0]
    assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
    assert len(optimizer.param_groups[0]["params"]) == 6
    assert "step" not in optimizer.__dict__ or "recipes" not in type(optimizer.step).__module__


def test_what_the_optimizer_writes_into_a_group_comes_back():
    class Counts(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["done"] = group.get("done", 0) + 1
            return loss

    module = Classifier(optimizer=lambda parameters: Counts(parameters, lr=0.1))
    trainer = fit(module, Wants(Claim(lr_scale=by_layer(SCALES))))
    assert trainer.optimizers[0].param_groups[0]["done"] == 16
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_groups_are_put_back_when_the_step_raises():
    class Fails(SGD):
        def step(self, closure=None):
            super().step(closure)
            assert [group["lr"] for group in self.param_groups] == [0.1 * s for s in SCALES.values()]
            raise RuntimeError("user's own")

    made = []

    def optimizer(parameters):
        made.append(Fails(parameters, lr=0.1))
        return made[0]

    with pytest.raises(RuntimeError, match="user's own"):
        fit(Classifier(optimizer=optimizer), Wants(Claim(lr_scale=by_layer(SCALES))))
    assert [len(group["params"]) for group in made[0].param_groups] == [6]
    assert made[0].param_groups[0]["lr"] == 0.1


def test_a_tensor_rate_is_replaced_and_not_multiplied_in_place():
    rate = torch.tensor(0.01)
    reference = Classifier(
        optimizer=lambda _: AdamW(
            [{"params": list(reference.net[i].parameters()), "lr": torch.tensor(0.01) * s} for i, s in SCALES.items()],
            foreach=False,
        )
    )
    fit(reference)
    module = Classifier(optimizer=lambda parameters: AdamW(parameters, lr=rate, foreach=False))
    trainer = fit(module, Wants(Claim(lr_scale=by_layer(SCALES))))
    assert same(weights(module), weights(reference))
    assert trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)


def test_factors_of_two_recipes_multiply():
    reference = Classifier(
        optimizer=lambda _: SGD(
            [{"params": list(reference.net[i].parameters()), "lr": 0.1 * s * 0.25} for i, s in SCALES.items()]
        )
    )
    fit(reference)
    module = Classifier()
    fit(module, Wants(Claim(lr_scale=by_layer(SCALES))), Wants2(Claim(lr_scale=by_layer(dict.fromkeys(SCALES, 0.25)))))
    for name, value in weights(reference).items():
        assert torch.allclose(weights(module)[name], value, atol=1e-7)


def test_two_decays_of_one_parameter_are_refused():
    with pytest.raises(RecipeError, match=r"weight decay of net\.0\.weight"):
        fit(Classifier(), Wants(Claim(weight_decay=by_layer({0: 0.1}))), Wants2(Claim(weight_decay=by_layer({0: 0.2}))))


def test_lbfgs_with_scales_is_refused():
    module = Classifier(optimizer=lambda parameters: torch.optim.LBFGS(parameters))
    with pytest.raises(RecipeError, match="LBFGS"):
        fit(module, Wants(Claim(lr_scale=by_layer(SCALES))))


# -- freezing --------------------------------------------------------------------------------------------------------


def test_what_is_frozen_does_not_move_and_has_no_gradient_and_no_state():
    seen = []

    def look(trainer, module, *rest):
        seen.append([module.net[0].weight.grad, module.net[0].weight.requires_grad])

    module = Classifier(optimizer=lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1))
    trainer = fit(module, Wants(Claim(frozen=names(0))), Watch(on_before_zero_grad=look))
    assert all(grad is None and not flag for grad, flag in seen[1:])
    assert torch.equal(module.net[0].weight, mlp()[0].weight)
    assert module.net[0].weight not in trainer.optimizers[0].state
    assert module.net[2].weight in trainer.optimizers[0].state
    assert all(p.requires_grad for p in module.parameters())


def test_freezing_in_mid_fit_drops_gradient_and_state():
    """With ``zero_grad(set_to_none=False)`` AdamW goes on moving a parameter whose gradient is zero."""

    class KeepsZeros(Classifier):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    kept = []
    watch = Watch(on_train_batch_start=lambda trainer, module, *rest: kept.append(weights(module.net)["0.weight"]))
    module = KeepsZeros(optimizer=lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1))
    trainer = fit(module, Wants(Claim(changes=True), {5: Claim(frozen=names(0), changes=True)}), watch)
    assert not torch.equal(kept[4], kept[5])
    assert torch.equal(kept[5], module.net[0].weight)
    assert module.net[0].weight not in trainer.optimizers[0].state
    assert len(trainer.optimizers[0].state) == 4


def test_thawing_in_mid_fit_equals_a_fit_by_hand():
    module = Classifier(optimizer=lambda parameters: AdamW(parameters, lr=0.01))
    fit(module, Wants(Claim(frozen=names(0, 2), changes=True), {3: Claim(frozen=names(0), changes=True)}))
    net = mlp()
    head, middle = AdamW(net[4].parameters(), lr=0.01), AdamW(net[2].parameters(), lr=0.01)
    for step in range(16):
        i = step % 8
        net.zero_grad()
        nn.functional.cross_entropy(net(X[4 * i : 4 * i + 4]), Y[4 * i : 4 * i + 4]).backward()
        head.step()
        if step >= 3:
            middle.step()
    for name, value in weights(net).items():
        assert torch.allclose(weights(module.net)[name], value, atol=1e-6), name


def filtered(module, **kwargs):
    return SGD([p for p in module.parameters() if p.requires_grad], **kwargs)


def test_an_optimizer_built_by_a_filter_holds_what_a_recipe_froze():
    """So that a parameter can wake later, without a new group in mid-run."""
    module = Classifier(optimizer=lambda _: filtered(module, lr=0.1))
    trainer = fit(module, Wants(Claim(frozen=names(0, 2), changes=True), {4: Claim(changes=True)}))
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 6
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)


def test_what_the_user_froze_stays_frozen_and_out_of_the_filter():
    module = Classifier(optimizer=lambda _: filtered(module, lr=0.1))
    module.net[2].requires_grad_(False)
    trainer = fit(module, Wants(Claim(frozen=names(0))))
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 4
    assert torch.equal(module.net[2].weight, mlp()[2].weight)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False, True, True]


def test_what_the_user_froze_trains_when_named_and_is_frozen_again_after_the_fit():
    module = Classifier(optimizer=lambda _: filtered(module, lr=0.1))
    module.net[2].requires_grad_(False)
    fit(module, Wants(Claim(thawed=names(2))))
    assert not torch.equal(module.net[2].weight, mlp()[2].weight)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False, True, True]
    assert all(p.grad is None for p in module.net[2].parameters())


def test_nothing_left_to_train_is_an_error():
    module = Classifier()
    with pytest.raises(RecipeError, match="Wants and Wants2: every parameter would be frozen"):
        fit(module, Wants(Claim(frozen=names(0, 2))), Wants2(Claim(frozen=names(4))))
    assert all(p.requires_grad for p in module.parameters())


def test_a_parameter_that_shall_train_and_is_in_no_optimizer_is_an_error():
    module = Classifier(optimizer=lambda _: SGD(module.net[4].parameters(), lr=0.1))
    with pytest.raises(RecipeError, match=r"2 parameters.*no optimizer, the first 'net\.2\.weight'"):
        fit(module, Wants(Claim(frozen=names(2), changes=True)))
    assert "configure_optimizers" not in module.__dict__


def test_a_parameter_that_never_trains_may_be_missing():
    module = Classifier(optimizer=lambda _: SGD(module.net[4].parameters(), lr=0.1))
    fit(module, Wants(Claim(frozen=names(0, 2))))


# -- adoption --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["PEGO", "GLAD"])
def test_adapters_join_the_group_of_their_neighbours(recipe):
    from lightning_recipes.callbacks import GLAD, PEGO

    def optimizer(_):
        body = [*module.net[0].parameters(), *module.net[2].parameters()]
        return Adagrad(
            [
                {"params": list(module.net[4].parameters()), "lr": 0.5, "mark": "head"},
                {"params": body, "lr": 0.1, "mark": "body"},
            ]
        )

    held = []
    watch = Watch(
        on_train_batch_start=lambda trainer, *rest: held.append(
            {group["mark"]: len(group["params"]) for group in trainer.optimizers[0].param_groups}
        )
    )
    module = Classifier(optimizer=optimizer)
    made = {
        "PEGO": PEGO(rank=1, groups=2, target_modules=["0", "2"], train_fully=["head"]),
        "GLAD": GLAD(rank=1, target_modules=["0", "2"]),
    }[recipe]
    fit(module, made, watch)
    assert held[0] == {"head": 2, "body": 4 + {"PEGO": 8, "GLAD": 4}[recipe]}
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)
    assert torch.equal(module.net[0].bias, mlp()[0].bias)

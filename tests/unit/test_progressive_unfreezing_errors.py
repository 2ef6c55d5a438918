"""Every misuse of progressive unfreezing gives one clear error, and nothing is left half-applied."""

from __future__ import annotations

import math
from functools import partial

import pytest
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.optim import SGD

from lightning_recipes.callbacks import ProgressiveUnfreezing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.schedule import At, EveryN, Plateau
from tests.stock import Classifier, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)
GROUPS = ["net.4", "net.2", "net.0"]  # of the mlp, the head first
Unfreeze = partial(ProgressiveUnfreezing, groups=GROUPS, lr_scale=None)


def fit(module, *callbacks, epochs=4, val=False, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y), loader(X, Y) if val else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": "head"}, "groups must be 'auto' or a list; got 'head'"),
        ({"bn": "frozen"}, "bn must be 'follow', 'train' or 'eval'; got 'frozen'"),
        ({"mechanism": "fast"}, "mechanism must be"),
        ({"lr_scale": (1.0, 0.0)}, "lr_scale must be positive"),
        ({"lr_scale": ()}, "lr_scale must be positive, at least one"),
        ({"weight_decay": (-1.0,)}, "weight_decay must be non-negative"),
        ({"at": (0, 1.5)}, "at must be epochs or steps"),
        ({"at": (0, -1)}, "at must be epochs or steps"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(RecipeError, match=message):
        ProgressiveUnfreezing(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EveryN(0), "n must be at least 1"),
        (lambda: EveryN(1, unit="batch"), "unit must be 'epoch' or 'step'"),
        (lambda: At((0,), unit="batch"), "unit must be 'epoch' or 'step'"),
        (lambda: Plateau(patience=0), "patience must be at least 1"),
        (lambda: Plateau(mode="up"), "mode must be 'min' or 'max'"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def manual():
    module = Classifier()
    module.automatic_optimization = False
    return module


def head_only():
    module = Classifier(optimizer=lambda _: SGD(module.net[4].parameters(), lr=0.1))
    return module


@pytest.mark.parametrize(
    ("recipe", "module", "message"),
    [
        (Unfreeze(at=(0, 2, 1)), Classifier, r"at must not decrease; got \[0, 2, 1\]"),
        (Unfreeze(at=(0, 1)), Classifier, "at has 2 times for 3 groups"),
        (Unfreeze(at=(0, 1, 2), lr_scale=(1.0,) * 4), Classifier, "lr_scale has 4 factors for 3 groups"),
        (Unfreeze(at=(0, 1, 2), weight_decay=(0.1,)), Classifier, "weight_decay has 1 values for 3 groups"),
        (
            Unfreeze(groups=["net.4", "nothing"], at=(0, 1)),
            Classifier,
            r"groups: 'nothing' matches no parameter.*net\.0",
        ),
        (Unfreeze(at=(0, 1, 2), never=["nothing"]), Classifier, "never: 'nothing' matches no parameter"),
        (
            Unfreeze(groups=["net.4", "net"], at=(0, 1)),
            Classifier,
            r"parameter 'net\.4\.weight' is in .*'net\.4'.* and in \['net'\]",
        ),
        (
            Unfreeze(groups=["net.4", "net.0"], at=(0, 1)),
            Classifier,
            r"2 parameters are in no group, the first 'net\.2\.weight'",
        ),
        (Unfreeze(groups="auto", at=(0, 1, 2, 3)), Classifier, "at has 4 times and the network 3 groups"),
        (
            Unfreeze(at=(math.inf, math.inf, math.inf), mechanism="rewrap"),
            Classifier,
            "every parameter would be frozen",
        ),
        (Unfreeze(at=(0, 1, 2)), manual, "automatic optimization"),
        (
            Unfreeze(at=(0, 1, 2)),
            head_only,
            r"4 parameters that are to train are in no optimizer, the first 'net\.0\.weight'",
        ),
        (
            Unfreeze(at=(0, 1, 2), mechanism="drop_grad"),
            head_only,
            "4 parameters that are to train are in no optimizer",
        ),
    ],
)
def test_what_cannot_work_is_an_error_before_training(recipe, module, message):
    built = module()
    with pytest.raises(RecipeError, match=message):
        fit(built, recipe)
    assert same(weights(built.net), weights(mlp()))
    assert all(p.requires_grad for p in built.parameters())
    assert "configure_optimizers" not in built.__dict__


def test_fractions_need_a_finite_fit():
    with pytest.raises(RecipeError, match=r"needs Trainer\(max_epochs=\.\.\.\); it is -1"):
        fit(Classifier(), Unfreeze(at=(0, 0.5, 0.6)), epochs=-1, max_steps=3)


def test_a_group_that_never_wakes_is_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"groups \['net.2', 'net.0'\] never wake"):
        fit(Classifier(), Unfreeze(at=(0, 4, 7)))


def test_lightnings_own_finetuning_beside_it_is_refused():
    class Both(Classifier):
        @property
        def backbone(self):
            return self.net[0]

    with pytest.raises(RecipeError, match="ProgressiveUnfreezing and BackboneFinetuning both decide what trains"):
        fit(Both(), Unfreeze(at=(0, 1, 2)), BackboneFinetuning(unfreeze_backbone_at_epoch=1))


def test_a_metric_that_was_never_logged_is_an_error():
    with pytest.raises(RecipeError, match=r"Plateau monitors 'val/f1', which was not logged; logged are .*val/loss"):
        fit(Classifier(), Unfreeze(at=Plateau("val/f1")), val=True)

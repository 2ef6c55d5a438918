"""The module is stock again when the fit is over, however it ended."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Checkpoint

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Recipe, StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, samples, weights

X, Y = samples()


class Extra(StepRecipe):
    def extra_loss(self, step):
        return sum(p.square().sum() for p in step.module.parameters())


class Smooth(StepRecipe):
    def transform_targets(self, step, logits, targets):
        return F.one_hot(targets, 3) * 0.7 + 0.1


class Half(StepRecipe):
    def own_loss_weight(self, step):
        return 0.5


class EditsGradients(Recipe):
    def declare(self, plan):
        plan.edit_gradients(lambda optimizer: None)


class Attack(StepRecipe):
    needs_criterion = True

    def transform_batch(self, step, batch):
        step.replay(batch)
        return batch


def fit(module, *recipes, **kwargs):
    quiet(callbacks=list(recipes), **kwargs).fit(module, loader(X, Y))


def stock(module, cls=None):
    """No wrapper of ours on the instance, its own class, and torch's own losses in F."""
    return (
        type(module) is (cls or type(module))
        and not {"training_step", "configure_optimizers", "configure_gradient_clipping", "log"} & set(module.__dict__)
        and "recipes" not in F.cross_entropy.__module__
        and not hasattr(F.cross_entropy, "__wrapped__")
    )


def test_the_module_is_stock_after_the_fit():
    module = Classifier()
    keys = list(module.state_dict())
    fit(module, Smooth(), Extra())
    assert stock(module, Classifier)
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("when", ["on_train_start", "on_train_batch_start", "on_train_batch_end"])
def test_the_module_is_stock_after_an_exception(when):
    def fail(*args):
        raise RuntimeError("user's own")

    module = Classifier()
    with pytest.raises(RuntimeError, match="user's own"):
        fit(module, Smooth(), Attack(), Watch(**{when: fail}))
    assert stock(module)


def test_the_module_is_stock_after_an_exception_inside_the_step():
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("user's own")

    module = Fails()
    with pytest.raises(RuntimeError, match="user's own"):
        fit(module, Smooth(), Attack())
    assert stock(module)


@pytest.mark.parametrize("data", [False, True], ids=["callback", "data module"])
def test_the_module_is_stock_when_saving_on_an_exception_fails_too(data):
    """A full disk, or another rank that is gone: Lightning asks nobody after the one that fails."""

    def fail(*args):
        raise RuntimeError("user's own")

    class Full(Checkpoint):
        def on_exception(self, *args):
            assert "training_step" in module.__dict__, "it sees the module as it trained"
            raise OSError("no space left on device")

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(X, Y)

        def on_exception(self, *args):
            raise OSError("no space left on device")

    module, attack = Classifier(), Attack()
    callbacks = [Smooth(), attack, Watch(on_train_batch_start=fail), *[Full()] * (not data)]
    trainer = quiet(callbacks=callbacks, enable_checkpointing=not data)
    with pytest.raises(OSError, match="no space left"):
        trainer.fit(module, Data() if data else loader(X, Y))
    assert stock(module)
    assert not any("on_exception" in each.__dict__ for each in [*trainer.callbacks, trainer.strategy])
    trainer = quiet(callbacks=[attack])
    trainer.fit(module, loader(X, Y))
    assert trainer.global_step == 4


def test_the_module_is_stock_after_ctrl_c():
    def interrupt(*args):
        raise KeyboardInterrupt

    module, handler = Classifier(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(module, Smooth(), Watch(on_train_batch_end=interrupt))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stock(module)


def test_the_module_is_stock_after_a_failed_setup():
    class Refuses(StepRecipe):
        def declare(self, plan):
            plan.step(self)
            raise RecipeError("no")

    module = Classifier()
    with pytest.raises(RecipeError, match="no"):
        fit(module, Smooth(), Refuses())
    assert stock(module)
    fit(module, Smooth())
    assert stock(module)


def test_a_step_that_stood_on_the_instance_comes_back():
    module = Classifier()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx) * 3
    stood = module.training_step
    fit(module, Half())
    assert module.__dict__["training_step"] is stood
    net = mlp()
    for x, y in loader(X, Y):
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y) * 1.5, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= 0.1 * g
    assert all(torch.allclose(weights(module.net)[name], value, atol=1e-6) for name, value in weights(net).items())


def test_a_deepcopy_in_mid_fit_carries_no_wrapper():
    copies = []
    watch = Watch(on_train_batch_end=lambda trainer, module, *rest: copies.append(copy.deepcopy(module)))
    module = Classifier()
    fit(module, Half(), Smooth(), watch, limit_train_batches=1)
    twin = copies[0]
    assert twin.training_step.__self__ is twin
    assert type(twin.training_step).__name__ == "method"
    assert torch.allclose(twin.training_step((X, Y), 0), F.cross_entropy(twin.net(X), Y))


def test_validation_is_not_touched():
    class Validates(Classifier):
        def validation_step(self, batch, batch_idx):
            self.valid = F.cross_entropy(self(batch[0]), batch[1])
            assert "training_step" not in self.__dict__ or not hasattr(F.cross_entropy, "__wrapped__")

    module = Validates()
    quiet(callbacks=[Smooth(), Half()], limit_val_batches=1).fit(module, loader(X, Y), loader(X, Y))
    assert torch.allclose(module.valid, F.cross_entropy(module.net(X[:4]), Y[:4]))


# -- the recipes themselves, when a fit breaks off ---------------------------------------------------------------------


def recipes():
    from lightning_recipes.callbacks import AAER, GLAD, PEGO, ProgressiveUnfreezing, RobustAccuracyMonitor

    layers = ["net.0", "net.2"]
    return {
        "AAER": AAER(epsilon=0.3),
        "GLAD": GLAD(rank=1, target_modules=layers),
        "GLAD without adapters": GLAD(rank=None),
        "PEGO": PEGO(rank=1, groups=2, target_modules=layers),
        "PEGO that would stay": PEGO(rank=1, groups=2, target_modules=layers, merge_on_end=False),
        "ProgressiveUnfreezing": ProgressiveUnfreezing(at=(0, 1, 2), lr_scale=0.5),
        "RobustAccuracyMonitor": RobustAccuracyMonitor(attack="fgsm"),
    }


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end"])
@pytest.mark.parametrize("name", recipes())
def test_every_recipe_lets_go_of_the_module(name, hook):
    def fail(*args, **kwargs):
        raise RuntimeError("user's own")

    module = Classifier()
    parts = {path: id(part) for path, part in module.named_modules()}
    keys, attributes = list(module.state_dict()), set(module.__dict__)
    with pytest.raises(RuntimeError, match="user's own"):
        fit(module, recipes()[name], Watch(**{hook: fail}))
    stays = "stay" in name and hook != "setup"  # by choice
    if not stays:
        assert {path: id(part) for path, part in module.named_modules()} == parts
        assert list(module.state_dict()) == keys
    assert stock(module)
    assert set(module.__dict__) - {"_hparams"} == attributes  # which Lightning makes when it first looks
    assert stays or all(p.requires_grad for p in module.parameters())


def test_adapters_that_would_stay_are_taken_out_when_the_fit_cannot_begin():
    module = Classifier(optimizer=torch.optim.LBFGS)
    parts = {path: id(part) for path, part in module.named_modules()}
    with pytest.raises(RecipeError, match="LBFGS"):
        fit(module, recipes()["PEGO that would stay"], EditsGradients())
    assert {path: id(part) for path, part in module.named_modules()} == parts


@pytest.mark.parametrize("name", [name for name in recipes() if "stay" not in name])
def test_a_module_can_be_fitted_again_with_another_trainer(name):
    module, recipe = Classifier(), recipes()[name]
    for _ in range(2):
        fit(module, recipe)
    fit(module, recipes()[name])
    assert stock(module)

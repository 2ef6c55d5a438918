"""SmallInit: what it scales, once, and what comes back when a fit does not begin."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_recipes.callbacks import PEGO, ExactResume, GrokkingMonitor, SmallInit
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)


def began(module, *callbacks, **trainer):
    """The weights as the first step finds them."""
    seen = {}
    watch = Watch(on_train_batch_start=lambda trainer, module, *rest: seen or seen.update(weights(module)))
    quiet(callbacks=[*callbacks, watch], **trainer).fit(module, loader(X, Y))
    return seen


def test_weights_are_scaled_and_biases_are_not():
    module = Classifier()
    before, start = weights(module), began(module, SmallInit(0.01))
    for name, value in before.items():
        assert torch.equal(start[name], value * 0.01 if name.endswith("weight") else value)


def test_scale_one_is_neutral():
    assert SmallInit(1.0).neutral and not SmallInit(1.0, freeze=["net.4.*"]).neutral and not SmallInit(0.5).neutral
    ends = []
    for callbacks in ([], [SmallInit(1.0)]):
        module = Classifier(mlp())
        quiet(callbacks=callbacks).fit(module, loader(X, Y))
        ends.append(weights(module))
    assert same(*ends)


def test_patterns_choose_by_the_whole_name():
    module = Classifier()
    before = weights(module)
    start = began(module, SmallInit(0.5, [r"net\.0\..*", r"net\.4\.bias"]))
    changed = {name for name in before if not torch.equal(before[name], start[name])}
    assert changed == {"net.0.weight", "net.0.bias", "net.4.bias"}


def test_what_is_frozen_does_not_train_and_is_the_users_again_afterwards():
    module = Classifier()
    before = weights(module)
    quiet(callbacks=[SmallInit(0.5, r"net\.0\.weight", freeze=[r"net\.4\..*"])]).fit(module, loader(X, Y))
    assert torch.equal(module.net[4].weight, before["net.4.weight"])
    assert not torch.equal(module.net[2].weight, before["net.2.weight"])
    assert all(p.requires_grad for p in module.parameters())


def test_tied_weights_are_scaled_once():
    module = Classifier(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)))
    module.net[1].weight = module.net[0].weight
    before = module.net[0].weight.detach().clone()
    assert torch.equal(began(module, SmallInit(0.5))["net.1.weight"], 0.5 * before)


def test_a_resume_takes_the_checkpoints_weights(tmp_path):
    keep = ModelCheckpoint(tmp_path, "first", every_n_epochs=1, save_top_k=-1)
    through = Classifier(mlp())
    quiet(callbacks=[SmallInit(0.1), keep], enable_checkpointing=True).fit(through, loader(X, Y))
    resumed = Classifier(mlp())
    start = {}
    watch = Watch(on_train_batch_start=lambda trainer, module, *rest: start or start.update(weights(module)))
    quiet(callbacks=[SmallInit(0.1), watch], max_epochs=2).fit(
        resumed, loader(X, Y), ckpt_path=str(tmp_path / "first.ckpt")
    )
    assert same(start, weights(through))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "lightnings own"])
def test_a_resume_with_no_batch_left_ends_with_the_checkpoints_weights(exact, tmp_path):
    """Stopped in the validation after the last batch, say."""
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    recipes = [SmallInit(0.1), *[ExactResume()] * exact]
    through, resumed = Classifier(mlp()), Classifier(mlp())
    quiet(callbacks=[*recipes, keep], enable_checkpointing=True).fit(through, loader(X, Y))
    again = SmallInit(0.1)
    trainer = quiet(callbacks=[again, *[ExactResume()] * exact])
    trainer.fit(resumed, loader(X, Y), ckpt_path=str(tmp_path / "last.ckpt"))
    assert trainer.global_step == 4
    assert same(weights(resumed), weights(through))
    assert same(began(resumed, again), weights(through)), "it has been scaled"


def test_a_module_is_scaled_once_however_often_it_is_fitted():
    module, recipe = Classifier(), SmallInit(0.1)
    began(module, recipe)
    trained = weights(module)
    assert same(began(module, recipe), trained)
    other = Classifier()
    before = weights(other)
    assert torch.equal(began(other, recipe)["net.0.weight"], 0.1 * before["net.0.weight"])


def test_evaluations_leave_the_weights_alone():
    module = Classifier()
    before = weights(module)
    quiet(callbacks=[SmallInit(0.1)]).validate(module, loader(X, Y), verbose=False)
    assert same(before, weights(module))


def test_adapters_of_another_recipe_stand_on_the_scaled_weights():
    module = Classifier()
    before = weights(module)
    start = began(module, PEGO(2, 1, target_modules=["net.0", "net.2"], train_fully=["net.4"]), SmallInit(0.1))
    assert torch.equal(start["net.0.base_layer.weight"], 0.1 * before["net.0.weight"])
    assert start["net.0.lora_A.g0.weight"].abs().max() > 0.01


def refuse(_):
    raise RuntimeError("no optimizer today")


@pytest.mark.parametrize(
    ("make", "others", "error"),
    [
        (lambda: Classifier(optimizer=refuse), [], RuntimeError),  # after all was applied
        (Classifier, [GrokkingMonitor()], RecipeError),  # refused in the declaration
        (Classifier, [PEGO(2, 1, target_modules=["nothing"])], RecipeError),  # refused in surgery
        (Classifier, [Watch(on_train_start=lambda *_: refuse(None))], RuntimeError),  # before the first step
    ],
)
def test_a_fit_that_does_not_begin_leaves_the_weights_as_they_were(make, others, error):
    module, recipe = make(), SmallInit(0.1)
    before = weights(module)
    with pytest.raises(error):
        quiet(callbacks=[recipe, *others]).fit(module, loader(X, Y))
    assert same(before, weights(module))
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    assert torch.equal(began(module, recipe)["net.0.weight"], 0.1 * before["net.0.weight"]), "the next fit scales"


def test_tiny_weights_in_half_precision_are_warned_of():
    with pytest.warns(UserWarning, match=r"SmallInit: weights of standard deviation \d.*e-07 in precision='bf16"):
        began(Classifier(), SmallInit(1e-6), precision="bf16-mixed")

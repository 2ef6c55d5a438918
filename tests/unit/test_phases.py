"""Phases: one fit in stages, each with fresh optimizers and data of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.phases import Phase, PhasePlan
from lightning_recipes.core.prepare import Session
from lightning_recipes.core.recipe import Recipe
from tests.stock import Classifier, Watch, loader, quiet, same, samples, weights

X, Y = samples()


class InPhases(Recipe):
    def __init__(self, *epochs, optimizers=(), **options):
        super().__init__()
        makers = [*optimizers, *[None] * len(epochs)]
        self._phases = [Phase(f"phase {i}", n, make) for i, (n, make) in enumerate(zip(epochs, makers))]
        self._options, self.entered = options, []

    @property
    def arguments(self):
        return {}

    def declare(self, plan):
        if plan.fitting:
            self.module, self.data = plan.module, plan.trainer.datamodule
            plan.phases(PhasePlan(self._phases, self._enter, **self._options))

    def _enter(self, index):
        self.entered.append(index)
        if self.data is not None:
            self.data.part = index


class InPhases2(InPhases):
    pass


class Parts(LightningDataModule):
    """Other samples in every phase, and more of them; validated on what was seen."""

    def __init__(self, sizes=(8, 12)):
        super().__init__()
        self.sizes, self.part, self.asked = sizes, None, []

    def train_dataloader(self):
        self.asked.append(self.part)
        return loader(X[: self.sizes[self.part]], Y[: self.sizes[self.part]])

    def val_dataloader(self):
        return [loader(X[:size], Y[:size]) for size in self.sizes[: self.part + 1]]


class Scheduled(Classifier):
    """A schedule as long as the fit, and a note of the length that it was told."""

    def __init__(self, kind=AdamW):
        super().__init__()
        self.kind, self.told = kind, []

    def configure_optimizers(self):
        steps = int(self.trainer.estimated_stepping_batches)
        self.told.append((steps, self.trainer.max_epochs))
        optimizer = self.kind(self.parameters(), lr=0.05)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": OneCycleLR(optimizer, 0.05, steps), "interval": "step"},
        }

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def fit(module, data, *callbacks, ckpt_path=None, epochs=5, **trainer):
    quiet(max_epochs=epochs, callbacks=list(callbacks), **trainer).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def test_a_fit_in_phases_is_bitwise_one_fit_after_the_other():
    module, one_by_one = Scheduled(), Scheduled()
    one_by_one.load_state_dict(module.state_dict())
    data = Parts()
    fit(module, data, InPhases(2, 3))
    for part, epochs in enumerate((2, 3)):
        alone = Parts()
        alone.part = part
        fit(one_by_one, alone, epochs=epochs)
    assert same(weights(module), weights(one_by_one))
    assert module.told == one_by_one.told == [(4, 2), (9, 3)]
    assert data.asked == [0, 1]


def test_validation_data_are_asked_for_anew():
    seen = []
    watch = Watch(on_validation_end=lambda trainer, module: seen.append(trainer.num_val_batches))
    fit(Scheduled(), Parts(), InPhases(2, 3), watch)
    assert seen == [[2]] * 2 + [[2, 3]] * 3


def test_optimizers_and_data_may_go_on_through_the_phases():
    module, plain = Scheduled(SGD), Scheduled(SGD)
    plain.load_state_dict(module.state_dict())
    data = Parts((8, 8))
    data.part = 0
    recipe = InPhases(2, 3, reset_optimizers=False, reload_data=False)
    told = []
    fit(module, data, recipe, Watch(on_train_epoch_start=lambda t, m: told.append(id(t.optimizers[0]))))
    assert recipe.entered == [0, 1]
    assert data.asked == [0]
    assert len(set(told)) == 1
    assert module.told == [(10, 5)]


def test_a_phase_may_bring_its_own_optimizers():
    module = Scheduled()
    before = weights(module)
    mine = InPhases(1, 1, optimizers=[lambda: SGD(module.net[4].parameters(), lr=0.1)])
    after_first = {}
    watch = Watch(on_train_epoch_end=lambda t, m: after_first.update(weights(m)) if t.current_epoch == 0 else None)
    fit(module, Parts(), mine, watch, epochs=2)
    moved = {name for name in before if not torch.equal(before[name], after_first[name])}
    assert moved == {"net.4.weight", "net.4.bias"}
    assert module.told == [(2, 1), (3, 1)], "asked in the first phase too, so that an error does not come in mid-fit"
    assert not torch.equal(before["net.0.weight"], weights(module)["net.0.weight"])


@pytest.mark.parametrize("exact", [False, True], ids=["at the ends of epochs", "at any step"])
def test_a_fit_resumes_in_the_middle_of_every_phase(exact, tmp_path):
    start = Scheduled()
    every = {"every_n_train_steps": 1} if exact else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    saves = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **every)
    recipes = lambda: [InPhases(2, 3), *([ExactResume()] if exact else [])]  # noqa: E731
    whole = fit(copy.deepcopy(start), Parts(), *recipes(), saves, enable_checkpointing=True)
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) == (4 + 9 if exact else 5)
    for path in written:
        recipe, *rest = recipes()
        resumed = fit(copy.deepcopy(start), Parts(), recipe, *rest, ckpt_path=path)
        assert same(weights(whole), weights(resumed)), path
        first_epoch = int(path.name.split("=")[1].split("-")[0])
        assert recipe.entered == ([0, 1] if first_epoch < 2 else [1])


def test_phases_that_do_not_fill_the_fit_are_refused():
    with pytest.raises(
        RecipeError, match=r"InPhases: the phases take 5 epochs \(phase 0 2, phase 1 3\) and .* is 4; set max_epochs=5"
    ):
        fit(Scheduled(), Parts(), InPhases(2, 3), epochs=4)


def test_a_phase_without_an_epoch_is_refused():
    with pytest.raises(RecipeError, match="epochs must be at least 1 for nothing; got 0"):
        Phase("nothing", 0)


def test_two_plans_are_refused():
    with pytest.raises(RecipeError, match="InPhases and InPhases2 both cut the fit into phases; use one of them"):
        fit(Scheduled(), Parts(), InPhases(5), InPhases2(5))


class MovesOn(Parts):
    """Cuts the fit by itself, with or without a recipe."""

    def setup(self, stage):
        if stage == "fit":
            Session.of(self.trainer, self.trainer.lightning_module)

    def phase_plan(self):
        return PhasePlan([Phase("first", 2), Phase("second", 3)], lambda index: setattr(self, "part", index))

    def teardown(self, stage):
        Session.close_of(self.trainer)

    def on_exception(self, exception):
        Session.close_after_exception(self.trainer, exception)


def test_a_data_module_may_cut_the_fit_as_a_recipe_does():
    by_recipe, by_data, data = Scheduled(), Scheduled(), MovesOn()
    by_data.load_state_dict(by_recipe.state_dict())
    fit(by_recipe, Parts(), InPhases(2, 3))
    fit(by_data, data)
    assert same(weights(by_recipe), weights(by_data)) and data.asked == [0, 1]
    assert by_data.told == by_recipe.told
    assert "configure_optimizers" not in vars(by_data)
    with pytest.raises(RecipeError, match="MovesOn and InPhases both cut the fit into phases; use one of them"):
        fit(by_data, MovesOn(), InPhases(5))
    with pytest.raises(RecipeError, match=r"MovesOn: the phases take 5 epochs .* is 4; set max_epochs=5"):
        fit(by_data, MovesOn(), epochs=4)
    assert "configure_optimizers" not in vars(by_data), "also when the fit was refused"
    by_data.automatic_optimization = False
    with pytest.raises(RecipeError, match="MovesOn cuts the fit into phases and needs automatic optimization"):
        fit(by_data, MovesOn())


def test_manual_optimization_is_refused():
    module = Scheduled()
    module.automatic_optimization = False
    with pytest.raises(RecipeError, match="InPhases cuts the fit into phases and needs automatic optimization"):
        fit(module, Parts(), InPhases(5))

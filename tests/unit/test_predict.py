"""The prediction socket: results are replaced, several wrap each other, and the step is the module's own afterwards."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_recipes.core.predict import Around, wrap_predictions
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from tests.stock import Classifier, Watch, loader, quiet, samples

X, Y = samples()


def batches() -> DataLoader:
    return DataLoader(X, batch_size=4)


class Wraps(Recipe):
    """Declares one function around predictions."""

    def __init__(self, around: Around) -> None:
        self.around = around

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            plan.at_end(wrap_predictions(plan.module, self.around))


class AlsoWraps(Wraps):
    """Another, since a Trainer takes one of a kind."""


class Own(Classifier):
    """A step of its own that says which batch of which loader it got."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch), batch_idx, dataloader_idx


class WithoutIndex(Classifier):
    def predict_step(self, batch: Any) -> Any:
        return self(batch)


def test_the_result_of_lightnings_own_step_is_replaced_and_only_in_this_run() -> None:
    module = Classifier()
    plain = quiet().predict(module, batches())
    doubled = quiet(callbacks=[Wraps(lambda predict, batch: 2 * predict(batch))]).predict(module, batches())
    assert all(torch.equal(2 * a, b) for a, b in zip(plain, doubled, strict=True))
    again = quiet().predict(module, batches())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert "predict_step" not in vars(module)


def test_the_batch_may_be_replaced_and_the_indices_reach_the_step() -> None:
    module = Own()
    recipe = Wraps(lambda predict, batch: predict(batch.flip(0)))
    first, second = quiet(callbacks=[recipe]).predict(module, [batches(), batches()])
    assert [(i, j) for _, i, j in first] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [(i, j) for _, i, j in second] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert torch.equal(first[0][0], module(X[:4].flip(0)))


def test_a_step_that_takes_the_batch_alone_is_called_with_it_alone() -> None:
    module = WithoutIndex()
    (first, *_) = quiet(callbacks=[Wraps(lambda predict, batch: -predict(batch))]).predict(module, batches())
    assert torch.equal(first, -module(X[:4]))


def test_several_wrap_each_other_in_the_order_of_the_callbacks() -> None:
    order: list[str] = []

    def around(name: str, change: float) -> Around:
        def call(predict: Any, batch: Any) -> Any:
            order.append(f"{name} in")
            result = predict(batch)
            order.append(f"{name} out")
            return result * change + 1

        return call

    module = Classifier()
    recipes = [Wraps(around("first", 2)), AlsoWraps(around("second", 3))]
    (result,) = quiet(callbacks=recipes).predict(module, DataLoader(X, batch_size=16))
    assert order == ["second in", "first in", "first out", "second out"]
    assert torch.allclose(result, (module(X) * 2 + 1) * 3 + 1)


def test_after_an_error_in_a_prediction_the_step_is_the_modules_own() -> None:
    def fail(trainer: Any, module: Any, *rest: Any) -> None:
        assert "predict_step" in vars(module)
        raise RuntimeError("in mid-prediction")

    module = Own()
    with pytest.raises(RuntimeError, match="in mid-prediction"):
        quiet(callbacks=[Wraps(lambda predict, batch: None), Watch(on_predict_batch_end=fail)]).predict(
            module, batches()
        )
    assert "predict_step" not in vars(module)
    assert module.predict_step.__func__ is Own.predict_step


def test_a_deepcopy_predicts_by_itself() -> None:
    copies: list[pl.LightningModule] = []

    def take(trainer: Any, module: Any, *rest: Any) -> None:
        own, module._trainer = module._trainer, None
        copies.append(copy.deepcopy(module))
        module._trainer = own

    module = Own()
    quiet(callbacks=[Wraps(lambda predict, batch: None), Watch(on_predict_start=take)]).predict(module, batches())
    with torch.inference_mode():
        assert torch.equal(copies[0].predict_step(X, 0)[0], module(X))


def test_a_fit_leaves_the_step_alone() -> None:
    module = Own()
    there: list[bool] = []
    watch = Watch(on_train_start=lambda trainer, module: there.append("predict_step" in vars(module)))
    quiet(callbacks=[Wraps(lambda predict, batch: None), watch]).fit(module, loader(X, Y))
    assert there == [False]

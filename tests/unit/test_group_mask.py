"""GroupMask: figures by hand, and what a step leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import AAER, GroupMask, LogitAdjustment
from lightning_recipes.callbacks.continual.group_mask import masked, present
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule, SCoLeDataModule
from tests.stock import Classifier, Watch, mlp, quiet, same, samples, weights

Z, Y = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])


def test_the_loss_by_hand():
    keep = present(Y, 3)
    assert keep.tolist() == [True, True, False]
    assert F.cross_entropy(masked(Z[:1], keep), Y[:1]).item() == pytest.approx(0.313262, abs=1e-6)  # log(1 + 1/e)
    assert F.cross_entropy(Z[:1], Y[:1]).item() == pytest.approx(0.407606, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_gradient_reaches_a_class_that_is_not_there_in_any_precision(dtype):
    z = Z.to(dtype, copy=True).requires_grad_()
    seen = masked(z, torch.tensor([True, True, False]))
    assert seen.isfinite().all() and seen.dtype == dtype
    F.cross_entropy(seen.float(), Y).backward()
    assert (z.grad[:, 2] == 0).all() and (z.grad[:, :2] != 0).all()
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.9, 0.0]])
    assert F.cross_entropy(masked(Z.to(dtype), present(soft, 3)).float(), soft).isfinite()


def test_classes_are_present_by_label_or_by_probability_in_every_shape():
    assert present(torch.tensor([[0, -100], [2, 2]]), 4).tolist() == [True, False, True, False]
    assert present(torch.tensor([-100, -100]), 3).tolist() == [False] * 3
    soft = torch.tensor([[0.7, 0.3, 0.0], [1.0, 0.0, 0.0]])
    assert present(soft, 3).tolist() == [True, True, False]
    assert present(soft[:, :, None].expand(2, 3, 4), 3).tolist() == [True, True, False]
    images = torch.zeros(2, 3, 4, 4)
    assert (masked(images, torch.tensor([True, False, True]))[:, 1] == -1e9).all()


def test_log_probabilities_stay_log_probabilities():
    keep = torch.tensor([True, True, False])
    left = masked(Z.log_softmax(1), keep, normalised=True)
    assert torch.allclose(left.exp().sum(1), torch.ones(2))
    assert torch.allclose(left[:, :2], Z[:, :2].log_softmax(1))
    assert F.nll_loss(left[:1], Y[:1]).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


# -- in a fit --------------------------------------------------------------------------------------------------------


def fit(recipes, y, module=None, datamodule=None, **trainer):
    module = Classifier(mlp()) if module is None else module
    x = samples(len(y))[0]
    data = None if datamodule is not None else DataLoader(TensorDataset(x, torch.tensor(y)), 4)
    quiet(callbacks=recipes, **trainer).fit(module, data, datamodule=datamodule)
    return module


def test_a_step_leaves_the_rows_of_absent_classes_bitwise_alone():
    module = Classifier(mlp())
    before = weights(module)
    fit([GroupMask()], [0, 1, 1, 0], module)
    after = weights(module)
    for name in ("net.4.weight", "net.4.bias"):
        assert torch.equal(before[name][2], after[name][2]) and not torch.equal(before[name][:2], after[name][:2])
    fit([], [0, 1, 1, 0], module)
    assert not torch.equal(after["net.4.weight"][2], weights(module)["net.4.weight"][2]), "without it it moves"


def test_with_every_class_in_every_batch_nothing_changes_at_all():
    y = [0, 1, 2, 0, 2, 1, 0, 1]
    assert same(weights(fit([GroupMask()], y)), weights(fit([], y)))
    assert same(weights(fit([GroupMask("all")], [0, 1] * 4)), weights(fit([], [0, 1] * 4)))


def test_a_fit_is_the_one_with_the_loss_by_hand_and_the_module_sees_its_own_logits():
    class ByHand(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            outside = torch.ones_like(logits).index_fill_(1, y.unique(), 0).bool()
            return F.cross_entropy(logits.masked_fill(outside, -1e9), y)

    class Watched(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            assert (logits > -1e3).all(), "metrics see the network's logits"
            loss = F.cross_entropy(logits, y)
            assert (logits > -1e3).all(), "nor were they written over"
            return loss

    y = [0, 1, 1, 0, 2, 2, 1, 1]
    assert same(weights(fit([], y, ByHand(mlp()))), weights(fit([GroupMask()], y, Watched(mlp()))))


def test_the_batch_is_that_of_all_ranks_unless_told_otherwise(monkeypatch):
    import lightning_recipes.callbacks.continual.group_mask as module

    monkeypatch.setattr(module, "all_sum", lambda keep: keep + torch.tensor([0.0, 1.0, 0.0]))
    hit = {}
    for sync in (True, False):
        classifier = Classifier(mlp())
        before = weights(classifier)
        after = weights(fit([GroupMask(sync=sync)], [0, 0, 2, 2], classifier))
        hit[sync] = not torch.equal(before["net.4.bias"][1], after["net.4.bias"][1])
    assert hit == {True: True, False: False}


class Flat(Classifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), mlp(64, 10, 16)))


@pytest.mark.parametrize("replay", [None, "random"])
def test_the_classes_of_the_task_are_those_of_the_data_module_with_what_it_replays(replay):
    data, moved, shown = SCoLeDataModule(DigitsDataModule(), 6, 2, replay=replay, batch_size=8), [], []
    before = {}

    def begin(trainer, module):
        before.update(weights(module))
        shown.append(sorted(data.current_classes))

    def end(trainer, module):
        now = weights(module)["net.1.4.bias"]
        moved.append(torch.nonzero(now != before["net.1.4.bias"]).flatten().tolist())

    watch = Watch(on_train_epoch_start=begin, on_train_epoch_end=end)
    fit([GroupMask("task"), watch], [], Flat(), data, max_epochs=6, limit_val_batches=0)
    assert moved == shown and (max(map(len, shown)) > 2) == (replay is not None)


def test_the_task_may_be_one_of_class_incremental_learning():
    data = ClassIncrementalDataModule(DigitsDataModule(), tasks=5, task=3, batch_size=64)
    module = Flat()
    before = weights(module)["net.1.4.bias"]
    fit([GroupMask("task")], [], module, data, limit_val_batches=0)
    moved = torch.nonzero(weights(module)["net.1.4.bias"] != before).flatten().tolist()
    assert moved == sorted(data.task_classes[3])


def test_logits_are_adjusted_first_and_attacks_see_the_mask():
    y = [0, 1, 1, 0] * 2
    fit([LogitAdjustment([4.0, 3.0, 1.0]), GroupMask()], y)
    with pytest.raises(RecipeError, match="LogitAdjustment must stand before GroupMask"):
        fit([GroupMask(), LogitAdjustment([4.0, 3.0, 1.0])], y)
    module = Classifier(mlp())
    before = weights(module)["net.4.bias"][2].clone()
    fit([AAER(0.1), GroupMask()], y, module)
    assert torch.isfinite(weights(module)["net.4.bias"]).all() and before.isfinite()


class Smooths(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


class Regression(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, 0], batch[1].float())


@pytest.mark.parametrize(
    ("recipe", "module", "y", "says"),
    [
        (lambda: GroupMask("class"), Classifier, [0] * 4, "scope must be 'batch', 'task' or 'all'; got 'class'"),
        (lambda: GroupMask(fill=0.0), Classifier, [0] * 4, "fill must be at most -1e3; got 0.0"),
        (lambda: GroupMask("task"), Classifier, [0] * 4, "scope='task' needs a data module that deals its classes"),
        (GroupMask, Smooths, [0] * 4, r"the loss smooths labels \(label_smoothing=0.1\) over all classes"),
        (GroupMask, Regression, [0] * 4, r"needs a classification loss of logits \[n, classes\]; .* mse_loss"),
        (GroupMask, Classifier, [0, 1, 3, 0], "a label is 3 and the logits have 3 classes"),
    ],
)
def test_what_it_cannot_mask_is_an_error(recipe, module, y, says):
    with pytest.raises(RecipeError, match=says):
        fit([recipe()], y, module(mlp()))


def test_a_head_of_another_size_than_the_data_is_refused():
    with pytest.raises(RecipeError, match="the data module has 10 classes and the logits 12"):
        module = Classifier(nn.Sequential(nn.Flatten(), mlp(64, 12)))
        fit([GroupMask()], [], module, SCoLeDataModule(DigitsDataModule(), 2, 2), max_epochs=2)

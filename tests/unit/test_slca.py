"""SLCA: its formulas, the masked head against heads that grow, what happens between two tasks, and its limit cases."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import SLCA, ExactResume, ForgettingMonitor
from lightning_recipes.callbacks.continual.slca import align, begin_rows_, draw_epoch, normalised, shrink_factors
from lightning_recipes.core import gaussians, random
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule
from lightning_recipes.modules import ImageClassifier
from tests.conformance.table import differing
from tests.stock import Classifier, Watch, mlp, quiet, same, weights

TASKS = [[2, 0], [1, 4], [3]]


# -- formulas --------------------------------------------------------------------------------------------------------


def test_the_means_of_old_classes_are_shrunk_the_oldest_most():
    factors = shrink_factors([[5], [1, 2], [0]], 2, 0.1)
    assert torch.allclose(torch.tensor(factors), torch.tensor([0.9333, 0.9667, 0.9667, 1.0]), atol=5e-5)
    assert shrink_factors([[5], [1, 2], [0]], 1, 0.1) == pytest.approx([0.95, 1.0, 1.0])
    assert shrink_factors([[5], [1, 2], [0]], 2, 0.0) == [1.0] * 4


def test_logits_are_divided_by_the_mean_norm_over_tasks_and_the_temperature():
    logits = torch.tensor([[3.0, 4.0, 0.0, 5.0]], requires_grad=True)
    scaled = normalised(logits, [2, 2], 0.1)
    assert torch.allclose(scaled, torch.tensor([[6.0, 8.0, 0.0, 10.0]]), atol=1e-5)
    label = torch.tensor([1])
    assert float(F.cross_entropy(scaled, label).detach()) == pytest.approx(2.142971, abs=1e-6)
    assert float(F.cross_entropy(logits, label).detach()) == pytest.approx(1.412078, abs=1e-6)
    unequal = normalised(torch.tensor([[3.0, 4.0, 12.0]]), [2, 1], 1.0)
    assert torch.allclose(unequal, torch.tensor([[3.0, 4.0, 12.0]]) / 8.5, atol=1e-6)


def test_the_gradient_flows_through_the_norm():
    """The loss does not change with the scale of the logits, so its gradient is at right angles to them."""
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    F.cross_entropy(normalised(logits, [2, 4], 0.1), torch.arange(5)).backward()
    assert torch.allclose((logits.grad * logits).sum(1), torch.zeros(5), atol=1e-6)
    assert logits.grad.abs().max() > 1e-3


def test_new_rows_begin_small_with_bias_0_and_others_stay():
    weight, bias = torch.ones(4, 1000), torch.ones(4)
    begin_rows_(weight, bias, [3, 1], torch.Generator().manual_seed(0))
    assert torch.equal(weight[[0, 2]], torch.ones(2, 1000))
    assert bias.tolist() == [1, 0, 1, 0]
    assert weight[[1, 3]].std() == pytest.approx(0.02, rel=0.05)
    assert abs(float(weight[[1, 3]].mean())) < 0.002
    begin_rows_(weight, None, [0], torch.Generator().manual_seed(0))


def clouds(classes=4, width=3):
    generator = torch.Generator().manual_seed(0)
    return [
        gaussians.fit(torch.randn(20, width, generator=generator) + 3 * torch.randn(width, generator=generator))
        for _ in range(classes)
    ]


def test_an_epoch_draws_as_many_features_of_every_class_and_shuffles_them():
    known = clouds()
    x, order = draw_epoch(known, [0.5, 1, 1, 1], 500, (0, "a"))
    assert x.shape == (2000, 3)
    assert sorted(order.tolist()) == list(range(2000))
    assert len(set((order[:500] // 500).tolist())) == 4, "a batch has all classes"
    for place, factor in ((0, 0.5), (3, 1.0)):
        mean = x[place * 500 : (place + 1) * 500].mean(0)
        assert torch.allclose(mean, factor * known[place].mean, atol=0.25)
    again, other = draw_epoch(known, [0.5, 1, 1, 1], 500, (0, "a")), draw_epoch(known, [0.5, 1, 1, 1], 500, (0, "b"))
    assert torch.equal(x, again[0]) and torch.equal(order, again[1])
    assert not torch.equal(x, other[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [0.1, None])
def test_alignment_is_sgd_on_the_drawn_features_under_a_cosine(bias, temperature):
    torch.manual_seed(0)
    layer, known = nn.Linear(3, 4, bias=bias), clouds()
    drawn = [draw_epoch(known, [1] * 4, 8, (e,)) for e in range(3)]
    start = copy.deepcopy(layer)
    weight, new_bias, losses = align(
        layer.weight, layer.bias, [2, 2], drawn.__getitem__, epochs=3, lr=0.1, batch=8, temperature=temperature
    )
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), start.parameters())), "its inputs are left alone"

    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule, first = CosineAnnealingLR(optimizer, 3), []
    for x, order in drawn:
        total = []
        for step in range(4):
            chosen = order[step * 8 : (step + 1) * 8]
            z = layer(x[chosen])
            if temperature is not None:
                norm = (z[:, :2].norm(dim=1) + z[:, 2:].norm(dim=1) + 2e-7) / 2
                z = z / norm[:, None] / 0.1
            loss = F.cross_entropy(z, chosen // 8)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total.append(float(loss.detach()))
        first.append(sum(total) / 4)
        schedule.step()
    assert torch.allclose(weight, layer.weight, atol=1e-6)
    assert new_bias is None if not bias else torch.allclose(new_bias, layer.bias, atol=1e-6)
    assert torch.allclose(losses, torch.tensor(first), atol=1e-5)


# -- a fit -----------------------------------------------------------------------------------------------------------


def data(count=60):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 5
    centres = 2 * torch.randn(5, 6, generator=generator)
    return centres[y] + torch.randn(count, 6, generator=generator), y


class Scheduled(Classifier):
    """SGD with momentum, decay and steps, as the paper trains; it counts how often it is asked for it."""

    configured = 0

    def configure_optimizers(self):
        self.configured += 1
        self.epochs_seen = self.trainer.max_epochs
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 2, 0.1)}


def fit(recipe, module=None, epochs=6, callbacks=(), validation=True, ckpt_path=None, **settings):
    module = Scheduled(mlp(classes=5)) if module is None else module
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), 8)
    trainer = quiet(max_epochs=epochs, callbacks=[*([recipe] if recipe else []), *callbacks], **settings)
    held_out = DataLoader(TensorDataset(x, y), 16) if validation else None
    trainer.fit(module, loader, held_out, ckpt_path=ckpt_path)
    return module, trainer


def slca(**arguments):
    return SLCA(**{"tasks": TASKS, "epochs_per_task": 2, "backbone_lr_scale": 0.1, "seed": 3, **arguments})


def test_a_masked_head_gives_the_weights_of_heads_that_grow():
    """The method by hand: a new head for every task, the loss over its logits alone, a fresh optimizer."""
    module, _ = fit(slca(ca_epochs=0))
    net, x, y = mlp(classes=5), *data()
    body, heads = net[:4], []
    for number, task in enumerate(TASKS):
        head = nn.Linear(5, len(task))
        begin_rows_(head.weight, head.bias, range(len(task)), random.generator(3, "SLCA/rows", number))
        groups = [{"params": head.parameters()}, {"params": body.parameters(), "lr": 0.01}]
        optimizer = SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        schedule = StepLR(optimizer, 2, 0.1)
        chosen = torch.isin(y, torch.tensor(task)).nonzero().flatten()
        for _ in range(2):
            for batch in chosen.split(8):
                local = (y[batch][:, None] == torch.tensor(task)).int().argmax(1)
                loss = F.cross_entropy(head(body(x[batch])), local)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        heads.append(head)
    order = [c for task in TASKS for c in task]
    assert torch.allclose(module.net[4].weight[order], torch.cat([h.weight for h in heads]), atol=1e-6)
    assert torch.allclose(module.net[4].bias[order], torch.cat([h.bias for h in heads]), atol=1e-6)
    for mine, theirs in zip(module.net[:4].parameters(), body.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_every_task_has_fresh_optimizers_and_a_schedule_of_its_own_length():
    module, _ = fit(slca(ca_epochs=0))
    assert module.configured == 3
    assert module.epochs_seen == 2
    again = Scheduled(mlp(classes=5))
    fit(slca(ca_epochs=0, reset_optimizer=False), again)
    assert again.configured == 1
    assert not same(weights(module), weights(again))


def test_rows_of_other_tasks_do_not_move_and_a_scale_of_0_freezes_the_features():
    heads, bodies = [], []

    def look(trainer, module, *args):
        heads.append([value.clone() for value in (module.net[4].weight, module.net[4].bias)])
        bodies.append(weights(module.net[:4]))

    fit(slca(ca_epochs=0, backbone_lr_scale=0.0), callbacks=[Watch(on_train_batch_end=look)])
    assert all(same(bodies[0], body) for body in bodies)
    starts = [0]
    for task in TASKS[:-1]:
        starts.append(starts[-1] + 2 * -(-12 * len(task) // 8))
    assert len(heads) == starts[-1] + 2 * 2
    for (first, last), task in zip([(0, starts[1]), (starts[1], starts[2]), (starts[2], len(heads))], TASKS):
        others = [c for c in range(5) if c not in task]
        for values in heads[first:last]:
            assert all(torch.equal(value[others], begin[others]) for value, begin in zip(values, heads[first]))
        moved = [c for c in range(5) if not torch.equal(heads[last - 1][0][c], heads[first][0][c])]
        assert moved == sorted(task)


@pytest.mark.parametrize("tasks", [1, [[0, 1, 2, 3, 4]]])
def test_one_task_at_scale_1_is_plain_training_bitwise(tasks):
    recipe = SLCA(tasks=tasks, backbone_lr_scale=1.0, ca_epochs=0)
    assert recipe.neutral
    assert same(weights(fit(recipe)[0]), weights(fit(None)[0]))
    assert not SLCA(tasks=1).neutral and not slca(backbone_lr_scale=1.0).neutral


class Between:
    """The weights in every validation and as the first step of every epoch begins (the recipe's hook comes first)."""

    def __init__(self):
        self.validated, self.begun = [], []
        self.watch = Watch(
            on_train_batch_start=self.begin,
            on_validation_start=lambda trainer, module: self.validated.append(weights(module)),
        )

    def begin(self, trainer, module, batch, index):
        if index == 0:
            self.begun.append(weights(module))


def test_the_aligned_head_validates_and_training_goes_on_from_the_head_before():
    aligned, plain = slca(), slca(ca_epochs=0)
    ours, theirs = Between(), Between()
    module, _ = fit(aligned, callbacks=[ours.watch], num_sanity_val_steps=0)
    without, _ = fit(plain, callbacks=[theirs.watch], num_sanity_val_steps=0)
    assert len(ours.validated) == len(theirs.validated) == 6
    for epoch in range(6):
        same_body = all(
            torch.equal(v, theirs.validated[epoch][k]) for k, v in ours.validated[epoch].items() if "4." not in k
        )
        assert same_body, "alignment leaves the backbone alone, and what is trained next too"
        is_aligned = not same(ours.validated[epoch], theirs.validated[epoch])
        assert is_aligned == (epoch in (3, 5)), "after the second and the third task"
        assert same(ours.begun[epoch], theirs.begun[epoch])
    assert torch.equal(ours.validated[3]["net.4.weight"][3], theirs.validated[3]["net.4.weight"][3]), "still to come"
    assert same(weights(module), ours.validated[5]), "the fit ends with the aligned head"
    assert not same(weights(module), weights(without))


def test_without_restoring_the_aligned_head_is_trained_further():
    kept, plain = slca(restore_head=False), slca(ca_epochs=0)
    ours, theirs = Between(), Between()
    fit(kept, callbacks=[ours.watch])
    fit(plain, callbacks=[theirs.watch])
    assert same(ours.begun[3], theirs.begun[3])
    old = [c for c in range(5) if c != 3]
    assert torch.equal(ours.begun[4]["net.4.weight"][old], ours.validated[3]["net.4.weight"][old])


def test_the_alignment_is_the_one_of_the_formulas():
    recipe = slca(ca_epochs=2, samples_per_class=16)
    module, trainer = fit(recipe)
    assert sorted(recipe.gaussians) == [0, 1, 2, 3, 4]
    order = [2, 0, 1, 4, 3]
    backup = recipe._backup
    drawn = [
        draw_epoch([recipe.gaussians[c] for c in order], shrink_factors(TASKS, 2, 0.1), 16, (3, "SLCA/features", 2, e))
        for e in range(3)
    ]
    weight, bias, losses = align(backup[0][order], backup[1][order], [2, 2, 1], drawn.__getitem__, epochs=2, batch=16)
    assert torch.equal(module.net[4].weight[order], weight)
    assert torch.equal(module.net[4].bias[order], bias)
    assert float(trainer.callback_metrics["slca/ca_loss"]) == pytest.approx(float(losses[-1]))
    x, y = drawn[2][0], torch.arange(5).repeat_interleave(16)
    for name, w, b in (("drawn_acc_before", backup[0][order], backup[1][order]), ("drawn_acc", weight, bias)):
        expected = (F.linear(x, w, b).argmax(1) == y).float().mean()
        assert float(trainer.callback_metrics[f"slca/{name}"]) == pytest.approx(float(expected))


def test_statistics_are_those_of_the_tasks_samples_under_the_weights_at_its_end():
    recipe, ends = slca(), []
    module = Scheduled(mlp(classes=5))
    keep = Watch(on_validation_start=lambda t, m: ends.append(copy.deepcopy(m.net)))
    fit(recipe, module, callbacks=[keep])
    x, y = data()
    for task, epoch in zip(TASKS, (1, 3, 5)):
        body = ends[epoch][:4]
        for c in task:
            with torch.no_grad():
                expected = gaussians.fit(body(x[y == c]))
            assert torch.allclose(recipe.gaussians[c].mean, expected.mean, atol=1e-6)
            assert torch.allclose(recipe.gaussians[c].covariance(), expected.covariance(), atol=1e-6)


def test_statistics_are_of_the_evaluation_transform_in_eval_mode_and_full_precision():
    from torchvision.transforms import v2

    inner = DigitsDataModule(train_transform=v2.RandomErasing(p=1.0, value=255))
    data = ClassIncrementalDataModule(inner, tasks=2, batch_size=64, evaluate="together")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))
    recipe, ends = SLCA(epochs_per_task=1, covariance="diag"), []
    keep = Watch(on_validation_start=lambda t, m: ends.append(copy.deepcopy(m.net)))
    module = ImageClassifier(net, optimizer=lambda p: SGD(p, 0.1))
    quiet(max_epochs=2, callbacks=[recipe, keep], precision="bf16-mixed").fit(module, data)
    plain = data.data.plain(data.data.train_set)
    x, y = (torch.stack(each) for each in zip(*[plain[i] for i in range(len(plain))]))
    for task, end in zip(data.task_classes, ends):
        end.eval()
        for c in task:
            with torch.no_grad():
                expected = gaussians.fit(end[:3](x[y == c]), "diag")
            assert torch.allclose(recipe.gaussians[c].mean, expected.mean, atol=1e-5)
            assert torch.allclose(recipe.gaussians[c].scale, expected.scale, atol=1e-5)


def test_classes_still_to_come_are_not_predicted_until_they_come(tmp_path):
    recipe, logits = slca(), []
    x, _ = data()

    def look(trainer, module):
        with torch.no_grad():
            logits.append(module(x))

    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, _ = fit(recipe, callbacks=[Watch(on_validation_start=look), keep], enable_checkpointing=True)
    for epoch, seen in enumerate([[2, 0]] * 2 + [[2, 0, 1, 4]] * 2 + [[0, 1, 2, 3, 4]] * 2):
        shut = [c for c in range(5) if c not in seen]
        assert (logits[epoch][:, shut] == -torch.inf).all()
        assert logits[epoch][:, seen].isfinite().all()
    module.eval()
    assert module(x).isfinite().all(), "afterwards the module is stock"
    assert not module.net[4]._forward_hooks

    again, found = Scheduled(mlp(classes=5)), []
    Classifier.test_step = lambda self, batch, i: found.append(self(batch[0]))
    try:
        loader = DataLoader(TensorDataset(*data()), 60)
        quiet(callbacks=[slca()]).test(again, loader, ckpt_path=str(tmp_path / "epoch=2.ckpt"), verbose=False)
    finally:
        del Classifier.test_step
    assert (found[0][:, 3] == -torch.inf).all()
    assert found[0][:, [0, 1, 2, 4]].isfinite().all(), "a test from a checkpoint in the second task"


@pytest.mark.parametrize("epochs", [None, 2, [3, 1, 2]])
def test_the_epochs_of_the_tasks_fill_the_fit(epochs):
    seen = []
    begin = Watch(on_train_batch_start=lambda t, m, batch, i: seen.append((t.current_epoch, set(batch[1].tolist()))))
    fit(slca(epochs_per_task=epochs, ca_epochs=0), callbacks=[begin])
    lengths = epochs if isinstance(epochs, list) else [2, 2, 2]
    expected = [task for task, length in zip(TASKS, lengths) for _ in range(length)]
    for epoch, task in enumerate(expected):
        assert set().union(*(labels for e, labels in seen if e == epoch)) == set(task)


def test_a_data_module_gives_the_tasks_and_is_moved_on():
    inner = DigitsDataModule(fraction=0.2)
    data, at = ClassIncrementalDataModule(inner, tasks=5, batch_size=16), []
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    recipe = SLCA(epochs_per_task=1, samples_per_class=8)
    look = Watch(on_validation_start=lambda t, m: at.append((data.task, len(t.val_dataloaders))))
    module = ImageClassifier(net, optimizer=lambda p: SGD(p, 0.1))
    trainer = quiet(max_epochs=5, callbacks=[recipe, look])
    trainer.fit(module, data)
    assert [task for task, _ in at] == [0, 1, 2, 3, 4]
    assert [loaders for _, loaders in at[1:]] == [2, 3, 4, 5]
    assert sorted(recipe.gaussians) == list(range(10))
    assert {"val/acc/dataloader_idx_4", "slca/ca_loss", "slca/task"} <= trainer.callback_metrics.keys()


def test_a_second_fit_begins_anew():
    recipe = slca()
    first, _ = fit(recipe)
    second, _ = fit(recipe)
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("covariance", ["low_rank", "diag"])
def test_every_kind_of_covariance_aligns(covariance):
    module, trainer = fit(slca(covariance=covariance, covariance_rank=2))
    assert not same(weights(module), weights(fit(slca(ca_epochs=0))[0]))
    assert trainer.callback_metrics["slca/ca_loss"].isfinite()


def test_soft_targets_within_the_task_meet_finite_logits():
    """Mixing recipes make targets soft: a probability of 0 times a logit that is shut out must be 0, not nan."""

    class Mixed(Scheduled):
        def training_step(self, batch, batch_idx):
            x, y = batch
            soft = F.one_hot(y, 5).float()
            return F.cross_entropy(self(x), 0.7 * soft + 0.3 * soft.flip(0))

    module, _ = fit(slca(ca_epochs=0), Mixed(mlp(classes=5)))
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_covariance_that_is_not_positive_definite_names_the_class():
    net = mlp(classes=5)
    with torch.no_grad():
        net[2].weight[0], net[2].bias[0] = 0.0, -1.0  # after the ReLU this feature is 0 for every sample
    with pytest.raises(RecipeError, match="SLCA: class 2: its covariance has no Cholesky factor with cov_eps=0"):
        fit(slca(cov_eps=0.0), Scheduled(net))


def test_a_test_on_any_data_takes_the_tasks_of_the_checkpoint(tmp_path):
    data = ClassIncrementalDataModule(DigitsDataModule(fraction=0.2), tasks=5, batch_size=32)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    recipe = SLCA(epochs_per_task=1, samples_per_class=4)
    module = ImageClassifier(net(), optimizer=lambda p: SGD(p, 0.1))
    trainer = quiet(max_epochs=5, callbacks=[recipe, keep], enable_checkpointing=True)
    trainer.fit(module, data)
    plain, logits = DigitsDataModule(), []
    plain.setup()
    loader = DataLoader([plain.test_set[i] for i in range(8)], 8)
    again = ImageClassifier(net())
    look = Watch(on_test_batch_start=lambda t, m, batch, *_: logits.append(m(batch[0])))
    for epoch in (1, 4):
        path = str(tmp_path / f"epoch={epoch}.ckpt")
        quiet(callbacks=[SLCA(epochs_per_task=1), look]).test(again, loader, ckpt_path=path, verbose=False)
        seen = [c for task in data.task_classes[: epoch + 1] for c in task]
        assert logits[-1][0].isfinite().nonzero().flatten().tolist() == sorted(seen)


@pytest.mark.parametrize("restore_head", [True, False])
def test_a_run_of_four_tasks_goes_on_from_anywhere_as_if_it_had_not_stopped(tmp_path, restore_head):
    """From the middle of task 3, from the last step of a task (its head is aligned then) and from the first of one."""

    def run(ckpt_path=None, keep=()):
        inner = DigitsDataModule(fraction=0.15)
        data = ClassIncrementalDataModule(inner, tasks=[[3, 1], [0, 2, 4], [5, 6], [7, 8, 9]], batch_size=16)
        torch.manual_seed(0 if ckpt_path is None else 123)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 10))
        module = ImageClassifier(net, optimizer=lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01))
        recipe = SLCA(epochs_per_task=2, samples_per_class=4, restore_head=restore_head, backbone_lr_scale=0.1)
        callbacks = [ExactResume(), recipe, ForgettingMonitor(), *keep]
        trainer = quiet(max_epochs=8, callbacks=callbacks, enable_checkpointing=bool(keep))
        trainer.fit(module, data, ckpt_path=ckpt_path)
        ended = trainer.optimizers[0].state_dict(), recipe.state_dict(), callbacks[2].state_dict()
        return weights(module), ended, trainer.callback_metrics, recipe

    saves = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    whole, ended, metrics, recipe = run(keep=[saves])
    assert recipe.gaussians.keys() == set(range(10))
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    epochs = [int(path.stem.split("-")[0].rpartition("=")[2]) for path in files]
    first, last = epochs.index(4), epochs.index(6) - 1
    for place in (first - 1, first, (first + last) // 2, last):
        again, ended_again, metrics_again, _ = run(str(files[place]))
        assert same(whole, again), files[place].name
        assert differing(ended, ended_again) == []
        assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in metrics_again.items()}

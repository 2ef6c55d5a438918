"""PSKD: the card's numbers, its limit cases, what is stored when, and what module, loss and other recipes see of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_recipes.callbacks import AAER, BANG, GLAD, PSKD, ExactResume, LogitAdjustment, Mixup, SaRA
from lightning_recipes.callbacks.regularization.ps_kd import agreement, entropy, growth, normalised, refined
from lightning_recipes.core.artefacts import Artefact
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.mixing import mixes_of
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples()


class Keeps(StepRecipe):
    """Stands last and keeps what the loss is computed from."""

    needs_criterion = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def extra_loss(self, step: Any) -> Any:
        epoch = step.trainer.current_epoch
        self.seen.append((epoch, step.logits.detach(), step.targets, step.loss.detach()))
        return {}


def fit(
    module: pl.LightningModule, *recipes: Any, data: Any = None, epochs: int = 3, ckpt_path: Any = None, **settings: Any
) -> pl.Trainer:
    trainer = quiet(callbacks=list(recipes), max_epochs=epochs, **settings)
    trainer.fit(module, loader(X, Y) if data is None else data, ckpt_path=ckpt_path)
    return trainer


def still(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.0)


def hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float()


# -- the maths ---------------------------------------------------------------------------------------------------------


def test_the_oracle_of_the_card() -> None:
    q = refined(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.6, 0.3, 0.1]]), 0.5)
    assert q[0].tolist() == pytest.approx([0.8, 0.15, 0.05])
    logits = torch.tensor([[2.0, 1, 0]], requires_grad=True)
    loss = F.cross_entropy(logits, q)
    assert loss.item() == pytest.approx(0.657606, abs=1e-6)
    loss.backward()
    assert logits.softmax(1)[0].tolist() == pytest.approx([0.66524, 0.24473, 0.09003], abs=1e-5)
    assert logits.grad[0].tolist() == pytest.approx([-0.13476, 0.09473, 0.04003], abs=1e-5)


def test_alpha_grows_from_the_first_epoch_to_the_last() -> None:
    assert [growth(e, 300, 0.8) for e in (0, 149, 299, 300)] == pytest.approx([0.8 / 300, 0.4, 0.8, 0.8])
    assert growth(0, 300, 0.8) == pytest.approx(0.0026667, abs=1e-7)
    assert growth(5, 300, 0.8, "constant") == 0.8
    assert [growth(e, 300, 0.8, [0.0, 0.5, 1.0]) for e in range(4)] == pytest.approx([0, 0.4, 0.8, 0.8])


def test_samples_that_improve_are_weighted_down() -> None:
    """||p - q||_1 = (1 - alpha gamma_{t-1} / gamma_t) ||p - onehot||_1 with gamma = 1 - p(y), for a small alpha."""
    now, before, y, alpha = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2]), hot(torch.tensor(0)), 0.45
    assert alpha <= float((now / before)[1:].min())
    refined_norm, plain_norm = (now - refined(y, before, alpha)).abs().sum(), (now - y).abs().sum()
    assert (refined_norm / plain_norm).item() == pytest.approx(1 - alpha * 0.5 / 0.3)


def test_a_constant_uniform_past_is_label_smoothing() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 5
    q = refined(F.one_hot(y, 5).float(), torch.full((8, 5), 0.2), 0.3)
    assert torch.allclose(F.cross_entropy(logits, q), F.cross_entropy(logits, y, label_smoothing=0.3), atol=1e-6)


def test_rows_in_half_precision_sum_to_one_again() -> None:
    row = torch.tensor([[0.3, 0.7 - 5e-8, 5e-9, 4.5e-8]]).half().float()
    assert row[0, 2] == 0, "below 6e-8"
    assert normalised(row).sum().item() == pytest.approx(1, abs=1e-6)
    assert normalised(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_entropy_and_agreement() -> None:
    assert entropy(torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])).item() == pytest.approx(0.5 * torch.tensor(2.0).log())
    past, y = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]]), torch.tensor([0, 1, 1, -100])
    assert agreement(past, y).item() == pytest.approx(2 / 3)
    assert agreement(past, y, torch.tensor([False, True, True, True])).item() == pytest.approx(1 / 2)
    assert agreement(past, y, torch.zeros(4, dtype=torch.bool)).item() == 0
    assert agreement(past[:3], torch.tensor([[1.0, 0], [0.2, 0.8], [0.3, 0.7]])).item() == pytest.approx(2 / 3)


# -- limit cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_one_epoch_is_bitwise_plain_training_whatever_alpha(mode: Any) -> None:
    plain, ours = Classifier(), Classifier()
    fit(plain, epochs=1)
    fit(ours, PSKD(1.0, mode=mode), epochs=1)
    assert same(weights(plain), weights(ours))


@pytest.mark.parametrize("repeats", [False, True])
def test_epoch_zero_trains_on_labels_also_where_a_sample_comes_twice(repeats: bool) -> None:
    plain, ours = Classifier(), Classifier()
    draws = torch.tensor([0, 1, 0, 0, 1, 2, 3, 2])
    for module, recipes in ((plain, []), (ours, [PSKD(1.0, 5)])):
        data = DataLoader(TensorDataset(X, Y), 2, sampler=draws.tolist() if repeats else None)
        fit(module, *recipes, data=data, epochs=1)
    assert same(weights(plain), weights(ours))


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_with_weights_that_stay_the_gradient_is_the_plain_one_times_one_minus_alpha(mode: Any) -> None:
    module, keeps, gradients = Classifier(optimizer=still), Keeps(), []
    grads = Watch(
        on_before_optimizer_step=lambda trainer, m, o: gradients.append([p.grad.clone() for p in m.parameters()])
    )
    fit(module, PSKD(0.9, mode=mode), keeps, grads)
    for number, (epoch, logits, targets, _) in enumerate(keeps.seen):
        if epoch == 0:
            assert not targets.is_floating_point()
            continue
        alpha = 0.9 * (epoch + 1) / 3
        y = Y[number % 4 * 4 : number % 4 * 4 + 4]
        assert torch.allclose(targets, (1 - alpha) * hot(y) + alpha * logits.softmax(1), atol=1e-6)
        for mine, plain in zip(gradients[number], gradients[number % 4], strict=True):
            assert torch.allclose(mine, (1 - alpha) * plain, atol=1e-7)


# -- what is stored, and when ------------------------------------------------------------------------------------------


def test_targets_are_made_of_what_training_predicted_one_epoch_before() -> None:
    """Shuffled, with batch-norm in train mode and noise on the inputs: this epoch's forward, before the update."""

    class Noisy(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.BatchNorm1d(6), *mlp()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0] + 0.3 * torch.rand_like(batch[0])), batch[1])

    keeps, order = Keeps(), []
    named = DataLoader(TensorDataset(X, Y, torch.arange(16)), 4, shuffle=True)

    class Three(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            order.append(batch[2])
            return super().training_step(batch[:2], batch_idx)

    fit(Three(), PSKD(0.8), keeps, data=named, epochs=4)
    predicted: dict[tuple[int, int], Tensor] = {}
    for (epoch, logits, targets, loss), ids in zip(keeps.seen, order, strict=True):
        for row, k in enumerate(ids.tolist()):
            predicted[epoch, k] = logits[row].softmax(0)
            if epoch:
                alpha = 0.8 * (epoch + 1) / 4
                expected = (1 - alpha) * hot(Y[k]) + alpha * predicted[epoch - 1, k]
                assert torch.allclose(targets[row], expected, atol=1e-6)
        if epoch:
            assert torch.allclose(loss, -(targets * logits.log_softmax(1)).sum(1).mean(), atol=1e-6)


def test_a_snapshot_predicts_with_the_weights_of_the_epochs_end_in_eval_mode_on_these_inputs() -> None:
    class Noisy(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.BatchNorm1d(6), *mlp(), nn.Dropout(0.3)))
            self.inputs: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0] + 0.3 * torch.rand_like(batch[0])
            self.inputs.append(x)
            return F.cross_entropy(self(x), batch[1])

    ends, keeps, module = [], Keeps(), Noisy()
    fit(module, PSKD(0.8, mode="snapshot"), keeps, Watch(on_train_epoch_end=lambda t, m: ends.append(weights(m))))
    teacher = Noisy().eval()
    inputs = iter(module.inputs)
    for number, (epoch, _, targets, _) in enumerate(keeps.seen):
        x = next(inputs)
        if not epoch:
            continue
        assert torch.equal(x, next(inputs)), "the teacher's noise is the step's"
        teacher.load_state_dict(ends[epoch - 1])
        with torch.no_grad():
            past = teacher(x).softmax(1)
        alpha, y = 0.8 * (epoch + 1) / 3, Y[number % 4 * 4 : number % 4 * 4 + 4]
        assert torch.allclose(targets, (1 - alpha) * hot(y) + alpha * past, atol=1e-6)


@pytest.mark.parametrize("storage", ["cpu", "device", "memmap"])
def test_where_the_table_lies_makes_no_difference(storage: Any, tmp_path: Path) -> None:
    here, there = Classifier(), Classifier()
    fit(here, PSKD())
    fit(there, PSKD(storage=storage), default_root_dir=tmp_path)
    assert same(weights(here), weights(there))
    assert list(tmp_path.iterdir()) == []


def test_half_precision_ends_near_full_precision() -> None:
    full, half = Classifier(), Classifier()
    fit(full, PSKD(), epochs=6)
    recipe = PSKD(dtype="float16")
    fit(half, recipe, epochs=6)
    assert recipe.state()["table"]["rows"].dtype == torch.float16
    for name, value in weights(full).items():
        assert torch.allclose(value, weights(half)[name], atol=1e-4)
    assert not same(weights(full), weights(half))


def test_one_drawn_twice_has_its_last_prediction_and_one_not_drawn_keeps_its_own() -> None:
    recipe, keeps = PSKD(1.0, 3, "constant"), Keeps()
    epochs = [[0, 1, 0, 2], [1, 1, 1, 3], [0, 1, 2, 3]]

    class Given:
        def __iter__(self) -> Any:
            return iter(epochs[len(keeps.seen) // 2])

        def __len__(self) -> int:
            return 4

    fit(Classifier(), recipe, keeps, data=DataLoader(TensorDataset(X, Y), 2, sampler=Given()))
    p = [logits.softmax(1) for _, logits, _, _ in keeps.seen]
    targets = [targets for _, _, targets, _ in keeps.seen]
    assert torch.allclose(targets[2], torch.stack([p[0][1], p[0][1]]), atol=1e-6)
    assert torch.allclose(targets[3], torch.stack([p[2][1], hot(Y[3])]), atol=1e-6), "3 was never seen: its label"
    assert torch.allclose(targets[4], torch.stack([p[1][0], p[3][0]]), atol=1e-6), "0 was not seen in epoch 1"
    assert torch.allclose(targets[5], torch.stack([p[1][1], p[3][1]]), atol=1e-6)


def test_a_weighted_sampler_and_workers_train_as_in_one_process() -> None:
    ends = []
    for workers in (0, 2):
        sampler = WeightedRandomSampler(torch.arange(16).float() + 1, 24, generator=torch.Generator().manual_seed(1))
        module = Classifier()
        fit(module, PSKD(), data=DataLoader(TensorDataset(X, Y), 4, sampler=sampler, num_workers=workers))
        ends.append(weights(module))
    assert same(*ends)


def test_a_prediction_that_overflowed_is_not_used() -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.current_epoch > 0 or batch_idx > 0:
                return super().training_step(batch, batch_idx)
            F.cross_entropy(self(batch[0]) * torch.nan, batch[1])
            return None  # the module saw it too

    keeps = Keeps()
    fit(Overflows(optimizer=still), PSKD(1.0, schedule="constant"), keeps, epochs=2)
    assert torch.allclose(keeps.seen[3][2], hot(Y[:4])), "its labels instead"
    assert torch.allclose(keeps.seen[4][2], keeps.seen[4][1].softmax(1), atol=1e-6)


# -- the module's own loss ---------------------------------------------------------------------------------------------


def test_options_of_the_modules_loss_stay() -> None:
    class Options(Classifier):
        weight = torch.tensor([1.0, 2.0, 0.5])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = batch[1].clone()
            y[0] = -100
            return F.cross_entropy(self(batch[0]), y, self.weight, label_smoothing=0.1)

    keeps = Keeps()
    fit(Options(), PSKD(), keeps)
    for number, (epoch, logits, targets, loss) in enumerate(keeps.seen):
        if not epoch:
            continue
        losses = F.cross_entropy(logits, targets, Options.weight, label_smoothing=0.1, reduction="none")
        labels = Y[number % 4 * 4 : number % 4 * 4 + 4]
        assert torch.allclose(loss, losses[1:].sum() / Options.weight[labels[1:]].sum(), atol=1e-6)
        assert torch.allclose(targets[0].sum(), torch.tensor(0.8 * (epoch + 1) / 3), atol=1e-6), "no label of its own"


def test_the_modules_metrics_go_on_seeing_labels() -> None:
    class Measures(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy, self.seen = MulticlassAccuracy(3), []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            self.accuracy(logits, batch[1])
            loss = F.cross_entropy(logits, batch[1])
            self.seen.append(batch[1].is_floating_point())
            return loss

    module = Measures()
    fit(module, PSKD())
    assert module.seen == [False] * 12


def test_soft_labels_of_the_module_are_refined_too() -> None:
    class Soft(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), 0.9 * hot(batch[1]) + 0.1 / 3)

    keeps = Keeps()
    fit(Soft(optimizer=still), PSKD(0.6), keeps, epochs=2)
    _, logits, targets, _ = keeps.seen[4]
    assert torch.allclose(targets, 0.4 * (0.9 * hot(Y[:4]) + 0.1 / 3) + 0.6 * logits.softmax(1), atol=1e-6)


def test_a_loss_of_log_probabilities_is_refined_too() -> None:
    class NLL(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])

    one, other = NLL(), Classifier()
    fit(one, PSKD())
    fit(other, PSKD())
    assert all(torch.allclose(value, weights(other)[name], atol=1e-6) for name, value in weights(one).items())


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_a_criterion_of_the_modules_own_that_takes_probabilities(mode: Any) -> None:
    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            with torch.no_grad():
                self.own(logits * 2, hot(batch[1]))  # only looked at
            return self.own(logits, hot(batch[1]))

        def own(self, logits: Tensor, targets: Tensor) -> Tensor:
            return -(targets * logits.log_softmax(1)).sum(1).mean()

    own, plain = Own(), Classifier()
    fit(own, PSKD(mode=mode, criterion="own"))
    fit(plain, PSKD(mode=mode))
    assert all(torch.allclose(value, weights(plain)[name], atol=1e-6) for name, value in weights(own).items())


class Dense(Classifier):
    """One label a place, three places a sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(
            torch.stack([logits, logits.roll(1, 1), logits.roll(2, 1)], 2), batch[1][:, None].expand(-1, 3)
        )


def test_a_snapshot_refines_one_label_a_place() -> None:
    keeps = Keeps()
    fit(Dense(optimizer=still), PSKD(0.6, mode="snapshot"), keeps, epochs=2)
    _, logits, targets, loss = keeps.seen[4]
    y = hot(Y[:4])[:, :, None].expand(-1, -1, 3)
    assert torch.allclose(targets, 0.4 * y + 0.6 * logits.softmax(1), atol=1e-6)
    assert torch.allclose(loss, -(targets * logits.log_softmax(1)).sum(1).mean(), atol=1e-6)


def test_a_snapshot_needs_no_index() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(X, Y))

    streamed, indexed = Classifier(), Classifier()
    fit(streamed, PSKD(mode="snapshot"), data=DataLoader(Stream(), 4))
    fit(indexed, PSKD(mode="snapshot"))
    assert same(weights(streamed), weights(indexed))


# -- what it says ------------------------------------------------------------------------------------------------------


def test_what_it_logs() -> None:
    logged = []
    look = Watch(on_train_batch_end=lambda trainer, *args: logged.append({**trainer.callback_metrics}))
    fit(Classifier(optimizer=still), PSKD(0.8), look, epochs=2)
    assert set(logged[3]) == {"ps_kd/alpha"}
    assert logged[3]["ps_kd/alpha"].item() == pytest.approx(0.4)
    assert logged[4]["ps_kd/alpha"].item() == pytest.approx(0.8)
    net = Classifier().net
    with torch.no_grad():
        p = net(X[:4]).softmax(1)
    q = 0.2 * hot(Y[:4]) + 0.8 * p
    assert logged[4]["ps_kd/target_entropy"].item() == pytest.approx(-(q * q.log()).sum(1).mean().item(), abs=1e-5)
    assert logged[4]["ps_kd/teacher_accuracy"].item() == pytest.approx((p.argmax(1) == Y[:4]).float().mean().item())


def test_it_says_how_much_the_table_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Classifier(), PSKD(num_classes=3), epochs=1)
    assert "PSKD: past predictions take 12 bytes a sample, 1.92e-07 GB for 16 samples of 3 columns" in caplog.text


# -- beside other recipes ----------------------------------------------------------------------------------------------


def test_labels_are_mixed_first_and_the_rows_alike(caplog: pytest.LogCaptureFixture) -> None:
    shares = []

    class Mixes(Keeps):
        def extra_loss(self, step: Any) -> Any:
            shares.append(mixes_of(step))
            return super().extra_loss(step)

    keeps = Mixes()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Classifier(), Mixup(0.5), PSKD(0.6), keeps, epochs=2)
    for number in range(4):
        (mix,), stored = shares[4 + number], keeps.seen[number][1].softmax(1)
        y = hot(Y[number * 4 : number * 4 + 4])
        label = mix.share * y + (1 - mix.share) * y[mix.partners]
        past = mix.share * stored + (1 - mix.share) * stored[mix.partners]
        assert torch.allclose(keeps.seen[4 + number][2], 0.4 * label + 0.6 * past, atol=1e-6)
    assert caplog.text.count("past predictions are mixed as the labels") == 1


def test_a_snapshot_sees_the_mixture_itself() -> None:
    keeps, module = Keeps(), Classifier(optimizer=still)
    fit(module, Mixup(0.5), PSKD(1.0, mode="snapshot", schedule="constant"), keeps, epochs=2)
    for _, logits, targets, _ in keeps.seen[4:]:
        assert torch.allclose(targets, logits.softmax(1), atol=1e-6)


def test_smoothed_labels_come_first() -> None:
    keeps = Keeps()
    recipe = BANG(1.0, label_smoothing=0.3, mixup_alpha=0.0)
    fit(Classifier(optimizer=still), recipe, PSKD(0.6), keeps, epochs=2)
    _, logits, targets, _ = keeps.seen[4]
    assert torch.allclose(targets, 0.4 * (0.7 * hot(Y[:4]) + 0.1) + 0.6 * logits.softmax(1), atol=1e-6)


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_the_prediction_is_that_of_the_loss_where_logits_are_adjusted(mode: Any) -> None:
    keeps = Keeps()
    fit(Classifier(optimizer=still), LogitAdjustment([9, 3, 1]), PSKD(1.0, 2, "constant", mode), keeps, epochs=2)
    _, logits, targets, _ = keeps.seen[4]
    assert torch.allclose(targets, logits.softmax(1), atol=1e-6)


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_an_attacks_replay_has_the_targets_of_the_step_and_stores_nothing(mode: Any) -> None:
    keeps, recipe = Keeps(), PSKD(1.0, 2, "constant", mode)
    fit(Classifier(optimizer=still), AAER(0.1, lambda1=0.0), recipe, keeps, epochs=2)
    first, second = keeps.seen[0], keeps.seen[4]
    if mode == "table":
        assert torch.allclose(second[2], first[1].softmax(1), atol=1e-6), "the adversarial example's prediction"
    else:
        assert torch.allclose(second[2], second[1].softmax(1), atol=1e-6)


@pytest.mark.parametrize("mode", ["table", "snapshot"])
def test_a_second_pass_over_the_window_has_the_targets_of_the_first(mode: Any) -> None:
    """rho 0 would give the same gradient: with rho close to 0 GLAD's weights are those without it."""
    without, with_it = Classifier(), Classifier()
    fit(without, PSKD(mode=mode), accumulate_grad_batches=2, epochs=4)
    keeps = Keeps()
    fit(with_it, PSKD(mode=mode), keeps, GLAD(1.0, 1e-7, rank=None), accumulate_grad_batches=2, epochs=4)
    for name, value in weights(without).items():
        assert torch.allclose(value, weights(with_it)[name], atol=1e-5)
    windows = [keeps.seen[i : i + 4] for i in range(0, len(keeps.seen), 4)]
    assert len(windows) == 8
    for one, two, again_one, again_two in windows:
        assert torch.equal(one[2], again_one[2])
        assert torch.equal(two[2], again_two[2])


def test_a_snapshot_of_a_network_whose_entries_train_sparsely() -> None:
    """SaRA keeps what trains beside the dense weight: both are the copy's."""
    keeps, ends = Keeps(), []
    recipe = SaRA(None, 0.5, progressive_at=None, rank_weight=0.0, target=["*.weight"])

    def end(trainer: Any, module: Any) -> None:
        with torch.no_grad():
            ends.append(module(X[:4]).softmax(1))

    module = Classifier()
    fit(module, recipe, PSKD(0.5, 3, "constant", "snapshot"), keeps, Watch(on_train_epoch_end=end))
    for epoch in (1, 2):
        assert torch.allclose(keeps.seen[4 * epoch][2], 0.5 * hot(Y[:4]) + 0.5 * ends[epoch - 1], atol=1e-6)
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)


class Rewrites(StepRecipe):
    def transform_targets(self, step: Any, logits: Tensor, targets: Tensor) -> Tensor:
        return targets


class RewritesAfter(Rewrites):
    comes_after = {"PSKD": "because"}  # noqa: RUF012


def test_another_recipe_that_rewrites_targets_needs_a_place() -> None:
    with pytest.raises(RecipeError, match="PSKD and Rewrites both rewrite the targets, and neither says which comes"):
        fit(Classifier(), Rewrites(), PSKD())
    fit(Classifier(), PSKD(), RewritesAfter(), epochs=1)


# -- resume ------------------------------------------------------------------------------------------------------------


def shuffled() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 4, shuffle=True)


def train(recipe: PSKD, folder: Path | None = None, ckpt: Path | None = None, data: Any = None) -> Classifier:
    """A run that saves after every step, or one that goes on from such a checkpoint."""
    pl.seed_everything(0 if ckpt is None else 99, verbose=False)
    module = Classifier()
    keeps = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = quiet(callbacks=[ExactResume(), recipe, *keeps], max_epochs=3, enable_checkpointing=bool(keeps))
    trainer.fit(module, shuffled() if data is None else data, ckpt_path=ckpt)
    return module


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        ({}, {}),
        ({"dtype": "float16", "num_classes": 3}, {}),
        ({"storage": "memmap"}, {"storage": "device"}),
        ({"mode": "snapshot"}, {}),
    ],
    ids=["table", "float16", "stored elsewhere", "snapshot"],
)
def test_a_resume_in_the_middle_of_an_epoch_is_the_run_itself(tmp_path: Path, arguments: Any, again: Any) -> None:
    """The table is half this epoch's, half the last one's then; after step 2 half of it is not written yet."""
    whole = train(PSKD(**arguments), tmp_path)
    for step in (2, 6, 8):
        other = train(PSKD(**{**arguments, **again}), ckpt=tmp_path / f"step={step}.ckpt")
        assert same(weights(whole), weights(other)), step


def test_without_the_table_a_checkpoint_is_small_and_a_resume_begins_with_labels(tmp_path: Path) -> None:
    whole = train(PSKD(save_table=False), tmp_path)
    path = tmp_path / "step=6.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["PSKD"]["state"]["table"] is None
    recipe = PSKD(save_table=False)
    with pytest.warns(UserWarning, match="written with save_table=False; past predictions begin again with the labels"):
        other = train(recipe, ckpt=path)
    assert not same(weights(whole), weights(other))
    assert recipe.state()["table"] is None


def test_a_run_longer_than_the_growth_keeps_alpha() -> None:
    keeps = Keeps()
    fit(Classifier(optimizer=still), PSKD(0.5, 2), keeps)
    _, logits, targets, _ = keeps.seen[-1]
    assert torch.allclose(targets, 0.5 * hot(Y[12:]) + 0.5 * logits.softmax(1), atol=1e-6)


def test_alpha_counts_the_epochs_of_the_whole_run(tmp_path: Path) -> None:
    train(PSKD(), tmp_path)
    path = tmp_path / "step=10.ckpt"
    with pytest.raises(
        RecipeError, match=r"Trainer\(max_epochs=...\) is 1 and the checkpoint has trained 2 epochs alrea"
    ):
        fit(Classifier(), PSKD(), epochs=1, ckpt_path=path)
    with pytest.warns(UserWarning, match="alpha grew over 3 epochs in the run of the checkpoint and goes on over 4"):
        fit(Classifier(), PSKD(), epochs=4, ckpt_path=path)


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    train(PSKD(), tmp_path)
    less = DataLoader(TensorDataset(X[:12], Y[:12]), 4, shuffle=True)
    trainer = quiet(callbacks=[PSKD()], max_epochs=3)
    with pytest.raises(
        RecipeError, match="the training set has 12 samples and the checkpoint's had 16; past predictions"
    ):
        trainer.fit(Classifier(), less, ckpt_path=tmp_path / "step=6.ckpt")


def test_data_that_grow_in_the_middle_of_a_fit_are_refused() -> None:
    class Grows(Classifier):
        def train_dataloader(self) -> Any:
            count = 12 + 4 * self.trainer.current_epoch
            return DataLoader(TensorDataset(X[:count], Y[:count]), 4)

    trainer = quiet(callbacks=[PSKD()], max_epochs=2, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(RecipeError, match="the training set went from 12 to 16 samples in one fit"):
        trainer.fit(Grows())


# -- steps that are not like the others --------------------------------------------------------------------------------


def test_a_batch_of_another_length_than_the_logits_is_refused() -> None:
    class Doubles(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]).repeat(2, 1), batch[1].repeat(2))

    with pytest.raises(RecipeError, match="PSKD: the batch has 4 samples and the loss got logits of 8"):
        fit(Doubles(), PSKD())


def test_steps_that_are_skipped_store_nothing() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    recipe = PSKD()
    fit(Skips(), recipe, epochs=2)
    assert recipe.state()["table"]["written"].tolist() == [True] * 4 + [False] * 4 + [True] * 8


def test_under_manual_optimization_the_table_works() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    by_hand, automatic = Manual(), Classifier()
    fit(by_hand, PSKD())
    fit(automatic, PSKD())
    assert same(weights(by_hand), weights(automatic))


def test_nothing_of_it_is_left_after_the_fit() -> None:
    data, module = loader(X, Y), Classifier()
    keys, parts = set(vars(data)), set(vars(module))
    fit(module, PSKD(), data=data)
    assert set(vars(data)) == keys
    assert set(vars(module)) <= parts | {"_trainer", "_hparams"}


class Numbers(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


def test_any_map_style_data_set_will_do() -> None:
    fit(Classifier(), PSKD(), data=DataLoader(Numbers(), 2))


# -- targets of a teacher ----------------------------------------------------------------------------------------------


def written(folder: Path, ids: Tensor | None = None, total: int = len(X), classes: int = 3, seed: int = 5) -> str:
    """A file of soft targets for those samples."""
    ids = torch.arange(total) if ids is None else ids
    log_probs = torch.randn(len(ids), classes, generator=torch.Generator().manual_seed(seed)).log_softmax(1)
    content = {"log_probs": log_probs, "ids": ids, "total": total}
    return str(Artefact(folder, "log_q", content).save(content))


def test_targets_of_a_file_are_those_of_every_epoch_and_a_sample_that_is_not_in_it_keeps_its_label(
    tmp_path: Path,
) -> None:
    ids = torch.tensor([5, 0, 3])
    path, keeps = written(tmp_path, ids), Keeps()
    fit(Classifier(), PSKD(0.5, schedule="constant", targets=path), keeps, epochs=2)
    expected = hot(Y)
    expected[ids] = (expected[ids] + torch.load(path, weights_only=True)["content"]["log_probs"].exp()) / 2
    for epoch in range(2):
        seen = torch.cat([targets for at, _, targets, _ in keeps.seen if at == epoch])
        assert torch.allclose(seen, expected, atol=1e-6)


def test_a_resume_reads_the_file_again_and_refuses_another_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    make = lambda where: PSKD(targets=where)  # noqa: E731
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = Classifier()
    fit(whole, ExactResume(), make(path), keep, enable_checkpointing=True)
    ckpt = tmp_path / "step=6.ckpt"
    assert torch.load(ckpt, weights_only=True)["callbacks"]["PSKD"]["state"]["table"] is None
    again = Classifier()
    fit(again, ExactResume(), make(written(tmp_path / "moved")), ckpt_path=ckpt)
    assert same(weights(whole), weights(again))
    for other in (written(tmp_path / "b", seed=6), None):
        with pytest.raises(RecipeError, match="holds other soft targets than the run of the checkpoint had"):
            fit(Classifier(), ExactResume(), make(other), ckpt_path=ckpt)


def test_targets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the training set has 16 samples and that of targets='.*' had 20"):
        fit(Classifier(), PSKD(targets=written(tmp_path, total=20)))
    with pytest.raises(RecipeError, match=r"targets='.*' holds 4 classes a sample and the logits have 3"):
        fit(Classifier(), PSKD(targets=written(tmp_path / "four", classes=4)))
    scores = Artefact(tmp_path / "scores", "scores", {"values": 1}).save({"values": torch.ones(16)})
    with pytest.raises(RecipeError, match=r"holds no soft targets of LangevinMixture\(distill=\.\.\.\) but values"):
        fit(Classifier(), PSKD(targets=str(scores)))

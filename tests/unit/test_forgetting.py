"""Accuracies and forgetting over tasks: figures by hand, and a monitor that sees them in any run."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import ForgettingMonitor
from lightning_recipes.callbacks.continual.forgetting import average_incremental, by_task, draw_matrix, forgetting
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule
from lightning_recipes.modules import ImageClassifier
from tests.stock import Classifier, mlp, quiet, same, weights

NAN = math.nan
MATRIX = [[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]]


def test_forgetting_is_the_mean_loss_since_each_task_was_known_best():
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.3)) / 2)
    assert forgetting(MATRIX[:2]) == pytest.approx(0.4)
    assert forgetting(MATRIX[:1]) == 0.0
    later = [[0.5], [0.7, 0.6], [0.6, 0.8, 0.9]]
    assert forgetting(later) == pytest.approx(((0.7 - 0.6) + (0.6 - 0.8)) / 2), "what got better counts as negative"
    assert forgetting([[NAN], [NAN, 0.8], [0.6, 0.3, 0.7]]) == pytest.approx(0.5)


def test_average_incremental_accuracy_is_the_mean_over_the_tasks():
    assert average_incremental([1.0, 0.5, 0.3]) == pytest.approx(0.6)
    assert average_incremental([NAN, 0.5]) == 0.5
    assert math.isnan(average_incremental([]))


def test_accuracies_by_task_weigh_every_sample_alike():
    counts = torch.tensor([[3.0, 1.0, 0.0, 8.0], [4.0, 2.0, 0.0, 10.0]])
    accuracies, seen = by_task(counts, [[0, 1], [3], [2]])
    assert accuracies[:2] == pytest.approx([4 / 6, 0.8])
    assert math.isnan(accuracies[2])
    assert seen == pytest.approx(12 / 16)


def test_the_matrix_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = draw_matrix(MATRIX, tmp_path / "deep" / "matrix.png", "a title")
    assert path.read_bytes()[:4] == b"\x89PNG"


class Fixed(Classifier):
    """Logits are the inputs; a bias trains, to no effect."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + 0 * self.bias


def logits_for(guesses, classes=4):
    return F.one_hot(torch.tensor(guesses), classes).float()


def run(monitor, train, held_out, module=None, **settings):
    module = Fixed() if module is None else module
    loader = DataLoader(TensorDataset(torch.zeros(len(train), 4), torch.tensor(train)), 2)
    trainer = quiet(callbacks=[monitor], **settings)
    trainer.fit(module, loader, [DataLoader(TensorDataset(*each), 3) for each in held_out])
    return trainer


TRUTH = torch.tensor([0, 1, 2, 3])


def test_a_run_of_two_fits_gives_the_figures_by_hand():
    monitor = ForgettingMonitor([[0, 1], [2, 3]])
    # 0 and 1 right; a vote for 2 or 3 does not count while they are still to come: the next best of 0 and 1 does
    first = torch.tensor([[0.5, 0.1, 1.0, 0.0], [0.4, 0.2, 0.0, 1.0], [0.0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    labels = torch.tensor([0, 1, 1, 3])
    trainer = run(monitor, [0, 1], [(first, labels)])
    assert monitor.matrix == [[pytest.approx(2 / 3)]]
    assert trainer.callback_metrics["forgetting/acc_seen"] == pytest.approx(2 / 3)
    assert trainer.callback_metrics["forgetting/forgetting"] == 0
    assert "forgetting/acc_task_1" not in trainer.callback_metrics

    trainer = run(monitor, [2, 3], [(logits_for([0, 2, 2, 2]), TRUTH)])
    assert monitor.matrix == [[pytest.approx(2 / 3)], [0.5, 0.5]]
    assert monitor.seen == pytest.approx([2 / 3, 0.5])
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values["forgetting/acc_task_0"] == values["forgetting/acc_task_1"] == values["forgetting/acc_seen"] == 0.5
    assert values["forgetting/acc_average"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert values["forgetting/forgetting"] == pytest.approx(2 / 3 - 0.5)


def test_the_last_validation_after_a_task_counts_and_the_check_before_training_does_not():
    monitor = ForgettingMonitor([[0, 1], [2, 3]])
    run(monitor, [0, 1], [(logits_for([0, 1, 2, 3]), TRUTH)], max_epochs=3, num_sanity_val_steps=1)
    assert monitor.matrix == [[1.0]]


def test_a_task_without_a_validation_stays_unmeasured():
    monitor = ForgettingMonitor([[0], [1], [2, 3]])
    run(monitor, [1], [(logits_for([0, 0, 0, 0]), TRUTH)])
    assert math.isnan(monitor.matrix[0][0])
    assert monitor.matrix[1] == [1.0, 0.0]


def test_a_test_logs_the_accuracies_on_its_data_and_leaves_the_history_alone():
    monitor, module = ForgettingMonitor([[0, 1], [2, 3]]), Fixed()
    run(monitor, [0, 1, 2, 3], [(logits_for([0, 1, 2, 3]), TRUTH)], module)
    Fixed.test_step = lambda self, batch, index: self(batch[0])
    try:
        trainer = quiet(callbacks=[monitor])
        trainer.test(module, DataLoader(TensorDataset(logits_for([0, 0, 0, 3]), TRUTH), 2), verbose=False)
    finally:
        del Fixed.test_step
    assert trainer.callback_metrics["forgetting/acc_task_0"] == 0.5
    assert trainer.callback_metrics["forgetting/acc_seen"] == 0.5
    assert "forgetting/forgetting" not in trainer.callback_metrics
    assert monitor.matrix[-1] == [1.0, 1.0]


def test_a_data_module_gives_the_tasks_and_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    data = ClassIncrementalDataModule(DigitsDataModule(), tasks=2, batch_size=64)
    monitor, module = ForgettingMonitor(), ImageClassifier(num_classes=10, in_chans=1)
    for task in (0, 1):
        data.task = task
        logger = CSVLogger(tmp_path, name=f"{task}", version="")
        quiet(callbacks=[monitor], logger=logger, limit_train_batches=2).fit(module, data)
        assert (tmp_path / f"{task}" / "forgetting.png").exists()
    assert [len(row) for row in monitor.matrix] == [1, 2]


def test_the_monitor_changes_nothing():
    torch.manual_seed(0)
    x, y = torch.rand(16, 6), torch.arange(16) % 3
    ends = []
    for callbacks in ([], [ForgettingMonitor([[0], [1, 2]])]):
        module = Classifier(mlp())
        loader = DataLoader(TensorDataset(x, y), 4)
        quiet(callbacks=callbacks, max_epochs=2).fit(module, loader, loader)
        ends.append(weights(module))
        assert "forward" not in vars(module)
    assert same(*ends)


@pytest.mark.parametrize(
    ("monitor", "says"),
    [
        (lambda: ForgettingMonitor(), "the Trainer's data module has no tasks; give tasks"),
        (lambda: ForgettingMonitor([[0, 1], [1, 2]]), "class 1 stands in them twice"),
        (lambda: ForgettingMonitor([[0], [1, 2]], forward="head"), "forward must be 'forward' or the name of a"),
        (lambda: ForgettingMonitor([[0], [1, 2]], forward="net.0"), r"gave logits \(4, 2\) for 4 samples of 3 classes"),
        (lambda: ForgettingMonitor([[0], [1, 2, 3]]), r"gave logits \(4, 3\) for 4 samples of 4 classes"),
        (lambda: ForgettingMonitor(0), "tasks must be None, a number of at least 1"),
    ],
)
def test_what_it_cannot_measure_is_an_error(monitor, says):
    x, y = torch.rand(8, 6), torch.arange(8) % 3
    with pytest.raises(RecipeError, match=says):
        loader = DataLoader(TensorDataset(x, y), 4)
        quiet(callbacks=[monitor()]).fit(Classifier(mlp(width=2)), loader, loader)


def test_labels_that_are_no_class_indices_are_refused_before_a_step():
    with pytest.raises(RecipeError, match=r"needs class indices \[n\] in every batch; found torch.float32 \(2,\)"):
        loader = DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4)), 2)
        quiet(callbacks=[ForgettingMonitor([[0, 1], [2, 3]])]).fit(Fixed(), loader)

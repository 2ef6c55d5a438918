"""The monitor of the Bayes error: what it measures, on which samples, when, and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from lightning_recipes.callbacks import BayesErrorMonitor
from lightning_recipes.callbacks.data.bayes_error import estimate
from lightning_recipes.core.bayes_error import bayes_error
from lightning_recipes.core.probe import some_of
from tests.stock import Classifier, Watch, in_two_ranks, loader, mlp, quiet, samples

X, Y = samples(40)
X_VAL, Y_VAL = samples(20, seed=1)


class Kept(Watch):
    """What is logged after every validation, and the module as it is then."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self.nets: list[nn.Module] = []
        super().__init__(on_validation_end=self._keep)

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            value = trainer.callback_metrics.pop("bayes_error/estimate", None)
            self.values.append(None if value is None else float(value))
            net = mlp()
            net.load_state_dict({name: value.clone() for name, value in module.net.state_dict().items()})
            self.nets.append(net)


def fitted(monitor: BayesErrorMonitor, **trainer: Any) -> Kept:
    kept = Kept()
    quiet(callbacks=[monitor, kept], **{"max_epochs": 3, "num_sanity_val_steps": 1, **trainer}).fit(
        Classifier(mlp()), loader(X, Y), loader(X_VAL, Y_VAL)
    )
    return kept


@torch.no_grad()
def by_hand(features: Tensor, y: Tensor, sigma: float = 0.3, kernel: str = "rbf") -> float:
    return float(bayes_error(features / features.abs().max(), y, 3, sigma, kernel))


def test_it_estimates_by_the_input_of_the_last_layer_on_the_training_samples() -> None:
    kept = fitted(BayesErrorMonitor())
    assert kept.values == pytest.approx([by_hand(net[:4](X), Y) for net in kept.nets], abs=1e-6)
    assert len(set(kept.values)) == 3


def test_it_estimates_by_a_named_layer_on_the_validation_samples_with_another_kernel() -> None:
    kept = fitted(BayesErrorMonitor("net.1", sigma=0.5, samples="val", every_n_epochs=2))
    assert kept.values[1] is None
    assert kept.values[::2] == pytest.approx([by_hand(net[:2](X_VAL), Y_VAL, 0.5) for net in kept.nets[::2]], abs=1e-6)
    kept = fitted(BayesErrorMonitor(kernel="sigmoid"), max_epochs=1)
    assert kept.values == pytest.approx([by_hand(kept.nets[0][:4](X), Y, kernel="sigmoid")], abs=1e-6)


def test_a_part_of_the_samples_is_drawn_once() -> None:
    kept = fitted(BayesErrorMonitor(max_samples=10), max_epochs=2)
    chosen = list(some_of(40, 10, 0, "BayesErrorMonitor"))
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and chosen != list(range(10))
    assert kept.values == pytest.approx([by_hand(net[:4](X[chosen]), Y[chosen]) for net in kept.nets], abs=1e-6)


def test_features_that_collapsed_do_not_stop_a_run() -> None:
    assert float(estimate(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))) == pytest.approx(0.25, abs=1e-6)
    assert torch.isnan(estimate(torch.full((4, 2), torch.nan), torch.tensor([0, 0, 0, 1])))


def test_its_taps_and_picture_are_left_as_they_should(tmp_path: Path) -> None:
    module = Classifier(mlp())
    trainer = quiet(callbacks=[BayesErrorMonitor()], logger=pl.loggers.CSVLogger(tmp_path), default_root_dir=tmp_path)
    trainer.fit(module, loader(X, Y), loader(X_VAL, Y_VAL))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert len(list(tmp_path.rglob("bayes_error.png"))) == 1


def test_a_fit_without_validation_is_told() -> None:
    with pytest.warns(UserWarning, match="BayesErrorMonitor measures in validations, and this fit has none"):
        quiet(callbacks=[BayesErrorMonitor()]).fit(Classifier(mlp()), loader(X, Y))


def _rank(rank: int, folder: Path) -> None:
    kept = fitted(BayesErrorMonitor(), devices=2, strategy="ddp", plugins=LightningEnvironment(), max_epochs=1)
    torch.save((kept.values, kept.nets[0].state_dict()), folder / f"{rank}.pt")


@pytest.mark.ddp
def test_features_of_both_ranks_count(tmp_path: Path) -> None:
    in_two_ranks(_rank, tmp_path)
    net = mlp()
    for rank in range(2):
        values, weights = torch.load(tmp_path / f"{rank}.pt")
        net.load_state_dict(weights)
        assert values == pytest.approx([by_hand(net[:4](X), Y)], abs=1e-6)

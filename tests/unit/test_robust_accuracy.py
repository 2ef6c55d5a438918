"""RobustAccuracyMonitor: in a fit, in a test, under every way that Lightning validates, and without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_recipes.callbacks import RobustAccuracyMonitor
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, loader, quiet, same, weights


class Linear(Classifier):
    """Two classes by the sign of x - 1/2 on one pixel: the margin of every sample is its distance from 1/2."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor([[-8.0], [8.0]]))
            net[1].bias.copy_(torch.tensor([4.0, -4.0]))
        super().__init__(net, lambda parameters: torch.optim.SGD(parameters, lr=0.0))


def data() -> Any:
    """Eight samples at distances 0.05, 0.1, ... 0.4 from the boundary, every other one on either side."""
    distance = torch.arange(1, 9) * 0.05
    y = torch.arange(8) % 2
    x = 0.5 + distance * (2 * y - 1)
    return loader(x.reshape(8, 1, 1, 1), y, size=4)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(("attack", "name"), [("fgsm", "fgsm"), ("pgd", "pgd-7-2"), ("apgd", "apgd-7-2")])
def test_a_linear_models_robust_accuracy_is_its_margins(attack: Any, name: str, inference_mode: bool) -> None:
    """A bound of 0.22 fells exactly the four samples nearer than that; on a linear model both attacks are exact."""
    monitor = RobustAccuracyMonitor(attack, epsilon=0.22, steps=7, restarts=2)
    module, trainer = Linear(), quiet(callbacks=[monitor], inference_mode=inference_mode)
    (values,) = trainer.validate(module, data(), verbose=False)
    assert values["robust_accuracy/clean"] == 1.0
    assert values[f"robust_accuracy/{name}"] == 0.5


class ByHand(Linear):
    """Takes its optimizer steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("to look is not to train")


def test_a_module_that_optimizes_manually_is_attacked_by_its_forward_and_never_trained() -> None:
    for part, inference_mode in (("forward", True), ("net", False)):
        monitor = RobustAccuracyMonitor("apgd", epsilon=0.22, steps=7, restarts=1, forward=part)
        trainer = quiet(callbacks=[monitor], inference_mode=inference_mode)
        (values,) = trainer.validate(ByHand(), data(), verbose=False)
        assert values["robust_accuracy/clean"] == 1.0
        assert values["robust_accuracy/apgd-7-1"] == 0.5
    with pytest.raises(RecipeError, match="RobustAccuracyMonitor: ByHand optimizes manually: its training step would"):
        quiet(callbacks=[RobustAccuracyMonitor("fgsm")]).validate(ByHand(), data(), verbose=False)
    with pytest.raises(RecipeError, match="forward must be 'forward' or the name of a submodule"):
        quiet(callbacks=[RobustAccuracyMonitor(forward="body")]).validate(ByHand(), data(), verbose=False)


def test_targeted_auto_pgd_needs_four_classes() -> None:
    with pytest.raises(RecipeError, match="on the targeted loss needs 4 classes; there are 2"):
        quiet(callbacks=[RobustAccuracyMonitor("apgd-t", steps=2)]).validate(Linear(), data(), verbose=False)


def test_autoattack_finds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack", reason="needs the attacks extra")

    class Images(Classifier):
        """Ten classes, one for each pixel: the largest of ten pixels wins."""

        def __init__(self) -> None:
            super().__init__(nn.Flatten(), lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(20 * self(x), y)

    # pixel y stands above the rest by 0.1 or by 0.5: a bound of 0.1 moves both by 0.2 together
    x = torch.full((8, 1, 2, 5), 0.4)
    y = torch.arange(8)
    x.flatten(1)[torch.arange(8), y] += torch.tensor([0.1, 0.5] * 4)
    monitor = RobustAccuracyMonitor("autoattack", epsilon=0.1)
    start = torch.get_rng_state()
    quiet().validate(Images(), loader(x, y, size=8), verbose=False)
    without = torch.get_rng_state()
    torch.set_rng_state(start)
    (values,) = quiet(callbacks=[monitor]).validate(Images(), loader(x, y, size=8), verbose=False)
    assert values["robust_accuracy/autoattack"] == 0.5
    assert torch.equal(torch.get_rng_state(), without)


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_fit_is_bitwise_the_same_with_it(sanity: int, tmp_path: Path) -> None:
    def train(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 2))
        module = Classifier(net)
        trainer = quiet(
            max_epochs=3,
            callbacks=callbacks,
            logger=CSVLogger(tmp_path) if callbacks else False,
            num_sanity_val_steps=sanity,
        )
        trainer.fit(module, data(), data())
        return weights(module)

    with_monitor = train([RobustAccuracyMonitor("pgd", epsilon=0.1, steps=3, restarts=1, every_n_epochs=2)])
    assert same(train([]), with_monitor)
    assert list(tmp_path.rglob("robust_accuracy_pgd-3-1.png")), "the curve is drawn where the run logs"


def test_two_attacks_and_the_test_stage() -> None:
    monitors = [RobustAccuracyMonitor("fgsm", 0.22), RobustAccuracyMonitor("pgd", 0.12, steps=5, restarts=1)]
    (values,) = quiet(callbacks=monitors).test(TestedLinear(), data(), verbose=False)
    assert values["robust_accuracy/fgsm"] == 0.5
    assert values["robust_accuracy/pgd-5-1"] == 0.75


class TestedLinear(Linear):
    __test__ = False

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_only_the_first_batches_when_limited() -> None:
    monitor = RobustAccuracyMonitor("fgsm", epsilon=0.22, limit_batches=1)
    (values,) = quiet(callbacks=[monitor]).validate(Linear(), data(), verbose=False)
    assert values["robust_accuracy/fgsm"] == 0.0  # the nearer four


# -- misuse that is no error before a fit; the rest stands in tests/conformance/misuses.py -----------------------------


def test_a_fit_without_validation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="RobustAccuracyMonitor measures in validations, and this fit has none"):
        quiet(callbacks=[RobustAccuracyMonitor("fgsm")]).fit(Linear(), data())


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_inputs_outside_the_range_are_an_error_in_the_first_validation(run: str) -> None:
    """A fit without Lightning's check before the training comes to its first validation after an epoch."""
    outside = loader(torch.full((4, 1, 1, 1), 2.0), torch.arange(4) % 2)
    trainer = quiet(callbacks=[RobustAccuracyMonitor("fgsm")])
    with pytest.raises(RecipeError, match="RobustAccuracyMonitor: inputs reach from 2 to 2, outside the range"):
        trainer.fit(Linear(), data(), outside) if run == "fit" else trainer.validate(Linear(), outside)

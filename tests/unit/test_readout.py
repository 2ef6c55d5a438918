"""The readout of a network on samples: which layer, what targets, and the same sums whether samples are kept or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.probe import samples_at_hand
from lightning_recipes.core.readout import Reading, Readout
from lightning_recipes.core.recipe import Recipe
from tests.stock import Classifier, loader, quiet, same, samples, weights


class Reads(Recipe):
    """Reads before the first step."""

    def __init__(self, head: str | None = None) -> None:
        super().__init__()
        self.head = head
        self.readout: Readout
        self.reading: Reading

    def declare(self, plan: Any) -> None:
        self.readout = Readout(self, plan.trainer, plan.module, self.head)
        plan.install(self.readout)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        probe = samples_at_hand(trainer)
        self.readout.look(probe)
        self.reading = self.readout.read(probe)


def read(module: Any, x: Tensor, y: Tensor, head: str | None = None) -> Reads:
    reads = Reads(head)
    quiet(callbacks=[reads], max_steps=1).fit(module, loader(x, y))
    return reads


def of(loss: str, **options: Any) -> type[Classifier]:
    class Of(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return getattr(F, loss)(self(batch[0]), batch[1], **options)

    return Of


X, Y = samples(32)
NUMBERS = torch.rand(32, 3, generator=torch.Generator().manual_seed(1))


def wide(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("width", [5, 40])
def test_inputs_and_targets_of_the_last_layer_are_read_whether_they_are_kept_or_not(width: int) -> None:
    module = Classifier(wide(width))
    start = weights(module)
    found = read(module, X, Y)
    assert (found.readout.path, found.readout.kind, found.readout.outputs) == ("net.2", "classes", 3)
    assert found.readout.width == width and (found.reading.sums is None) == (width > 32)
    fresh = Classifier(wide(width))
    assert same(start, weights(fresh))
    h, hot = fresh.net[:2](X).detach(), F.one_hot(Y, 3).double()
    mean_h, mean_y = found.reading.means()
    assert torch.allclose(mean_h, h.double().mean(0)) and torch.allclose(mean_y, hot.mean(0))
    spectrum = found.reading.spectrum(centred=True)
    off = (h - h.mean(0)).double()
    expected = torch.linalg.eigvalsh(off.T @ off).flip(0)[: len(spectrum.eigenvalues)]
    assert torch.allclose(spectrum.eigenvalues, expected, atol=1e-5)
    assert found.reading.tallied.error is None and found.reading.smallest == 0


def test_kinds_of_loss() -> None:
    squares = read(of("mse_loss")(wide(5)), X, NUMBERS)
    assert squares.readout.kind == "squares"
    assert squares.reading.tallied.error == pytest.approx(
        float((Classifier(wide(5))(X) - NUMBERS).square().mean()), rel=1e-5
    )
    assert read(of("huber_loss")(wide(5)), X, NUMBERS).readout.kind == "other"
    assert read(of("mse_loss", reduction="sum")(wide(5)), X, NUMBERS).readout.kind == "other"
    logits = read(of("binary_cross_entropy_with_logits")(wide(5)), X, (NUMBERS > 0.5).float())
    assert (logits.readout.kind, logits.readout.outputs) == ("classes", 3)


def test_another_layer_can_be_named_and_sizes_are_checked() -> None:
    assert read(of("mse_loss")(wide(5)), X, NUMBERS, "net.0").readout.width == 6
    with pytest.raises(RecipeError, match="8 samples say nothing of 3 outputs; it needs 12 at least"):
        read(Classifier(wide(5)), X[:8], Y[:8])


def test_features_that_are_not_finite_are_found_when_the_spectrum_is_asked_for() -> None:
    x = X.clone()
    x[9, 0] = torch.nan
    found = read(Classifier(wide(5)), x, Y, "net.0")
    with pytest.raises(
        RecipeError, match="the readout's inputs are not finite; the first such batch is 2 of the probe"
    ):
        found.reading.spectrum(centred=True)

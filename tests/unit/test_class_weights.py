"""ClassWeights: its weights against closed forms, and the loss that a stock module then trains on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_recipes.callbacks import ClassWeights, Mixup
from lightning_recipes.callbacks.robustness.class_weights import BALANCED_EUROSAT, effective_number, inverse
from lightning_recipes.core.criterion import Call
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)  # 6, 5, 5 samples of three classes
TAIL = torch.tensor([0] * 9 + [1] * 5 + [2] * 2)


# -- maths -------------------------------------------------------------------------------------------------------------


def test_the_cards_oracle_the_mean_divides_by_the_weights_that_are_present() -> None:
    """Losses 1 and 2, weights 1 and 3: (1 + 6) / 4."""
    z = torch.tensor([[0.0, float(torch.tensor(torch.e - 1).log())], [float(torch.tensor(torch.e**2 - 1).log()), 0.0]])
    y = torch.tensor([0, 1])
    assert F.cross_entropy(z, y, reduction="none").tolist() == pytest.approx([1, 2], abs=1e-6)
    call = Call("cross_entropy", F.cross_entropy, z, y, class_weights=torch.tensor([1.0, 3.0]))
    assert call.value(z, y).item() == pytest.approx(1.75, abs=1e-6)


def test_inverse_frequency_is_1_on_average_over_the_samples() -> None:
    counts = torch.tensor([8, 1, 3])
    assert inverse(counts).tolist() == pytest.approx([0.5, 4.0, 12 / 9])
    assert (inverse(counts) * counts).sum() / counts.sum() == pytest.approx(1.0)


def test_effective_numbers() -> None:
    """beta 1/2 and counts 1, 2: 1 and 3/2 effective samples."""
    assert effective_number(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8])
    assert effective_number(torch.tensor([3, 50]), 0.0).tolist() == [1.0, 1.0]
    counts = torch.tensor([10, 2000, 7])
    like_inverse = effective_number(counts, 1 - 1e-12)
    assert torch.allclose(like_inverse, inverse(counts) * 3 / inverse(counts).sum(), rtol=1e-6)
    assert effective_number(torch.tensor([10**9, 10**9]), 0.999).tolist() == pytest.approx([1.0, 1.0])


def test_the_papers_weights_in_alphabetical_order() -> None:
    classes = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
    classes += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
    assert classes == sorted(classes)
    by_name = dict(zip(classes, BALANCED_EUROSAT, strict=True))
    assert {n for n, w in by_name.items() if w == 1.3} == {"HerbaceousVegetation", "Industrial", "PermanentCrop"}
    assert {n for n, w in by_name.items() if w == 0.8} == {"Forest", "Residential", "SeaLake"}
    assert set(BALANCED_EUROSAT) == {0.8, 1.0, 1.3}


# -- in a fit ----------------------------------------------------------------------------------------------------------


class ByHand(Classifier):
    """The same training with torch's own class weights."""

    weight: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, weight=self.weight)


def trained(module: Classifier, *callbacks: Any, y: Tensor = Y, **kwargs: Any) -> dict[str, Tensor]:
    quiet(callbacks=list(callbacks), max_epochs=3, **kwargs).fit(module, loader(X, y))
    return weights(module)


def test_a_stock_module_trains_as_with_torchs_own_class_weights() -> None:
    for recipe, weight in (
        (ClassWeights("inverse"), inverse(torch.tensor([9, 5, 2]))),
        (ClassWeights(beta=0.9), effective_number(torch.tensor([9, 5, 2]), 0.9)),
        (ClassWeights([1, 2, 4]), torch.tensor([1.0, 2.0, 4.0])),
    ):
        by_hand = ByHand()
        by_hand.weight = weight
        expected, found = trained(by_hand, y=TAIL), trained(Classifier(), recipe, y=TAIL)
        assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)
        assert not same(found, trained(Classifier(), y=TAIL))


@pytest.mark.parametrize("recipe", [lambda: ClassWeights([1, 1, 1]), lambda: ClassWeights(beta=0)])
def test_equal_weights_of_1_are_bitwise_plain_training(recipe: Any) -> None:
    assert recipe().neutral
    assert same(trained(Classifier(), recipe()), trained(Classifier()))


def test_the_scale_of_the_weights_does_not_matter_for_a_mean() -> None:
    one, ten = (trained(Classifier(), ClassWeights([w, 2 * w, 3 * w])) for w in (1, 10))
    assert all(torch.allclose(one[k], ten[k], atol=1e-6) for k in one)


def test_every_micro_batch_has_a_mean_of_its_own() -> None:
    """As torch's own class weights have it: the sum over a window of means over its micro-batches."""
    found = trained(Classifier(), ClassWeights([1, 2, 4]), accumulate_grad_batches=2)
    by_hand = ByHand()
    by_hand.weight = torch.tensor([1.0, 2.0, 4.0])
    expected = trained(by_hand, accumulate_grad_batches=2)
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


def test_mixed_labels_weigh_every_class_by_its_share() -> None:
    """The loss on a mixed label is the mix of the weighted losses on both, over the mix of the weights."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watches(ClassWeights):
        def extra_loss(self, step: Any) -> Any:
            seen.append((step.logits.detach(), step.targets, step.loss.detach()))
            return {}

    trained(Classifier(), Mixup(1.0), Watches([1, 2, 4]))
    for logits, soft, loss in seen:
        assert soft.shape == (4, 3)
        w = torch.tensor([1.0, 2.0, 4.0])
        by_hand = -(soft * w * logits.log_softmax(1)).sum() / (soft * w).sum()
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert any((soft != soft.round()).any() for _, soft, _ in seen), "something was mixed"


def test_metrics_and_evaluation_see_the_plain_loss_and_the_weights_are_logged() -> None:
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = quiet(callbacks=[ClassWeights([1, 2, 4])])
    trainer.fit(module, loader(X, Y), loader(X, Y))
    plain = F.cross_entropy(mlp()(X), Y).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(plain, abs=1e-6)
    assert trainer.callback_metrics["class_weights/smallest"] == 1
    assert trainer.callback_metrics["class_weights/largest"] == 4


def test_the_last_classes_without_a_sample_count_as_such() -> None:
    with pytest.raises(RecipeError, match="class 2 has no training sample, so weights='inverse' has none for it; give"):
        trained(Classifier(), ClassWeights("inverse"), y=Y.clamp_max(1))
    trained(Classifier(), ClassWeights([1, 2, 3]), y=Y.clamp_max(1))


def test_weights_of_the_modules_own_are_not_weighed_again() -> None:
    module = ByHand()
    module.weight = torch.tensor([1.0, 2.0, 1.0])
    with pytest.raises(RecipeError, match="the module's loss has class weights of its own; take them out there"):
        trained(module, ClassWeights([1, 2, 3]))

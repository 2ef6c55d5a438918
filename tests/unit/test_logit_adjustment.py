"""LogitAdjustment: its maths against closed forms, and what reaches the loss, the metrics and the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.callbacks import AAER, LogitAdjustment
from lightning_recipes.callbacks.robustness.logit_adjustment import adjusted, kl_to_uniform, log_prior
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.step import observe
from tests.stock import Classifier, Watch, loader, quiet, same, samples, weights

# -- maths -------------------------------------------------------------------------------------------------------------


def test_the_cards_oracle() -> None:
    """Logits [1, 1], counts (90, 10), y = 1: ln 10 with the prior and ln 2 without."""
    prior = log_prior(torch.tensor([90, 10]))
    z, y = torch.tensor([[1.0, 1.0]]), torch.tensor([1])
    assert F.cross_entropy(adjusted(z, prior, 1.0), y).item() == pytest.approx(2.302585, abs=1e-6)
    assert F.cross_entropy(z, y).item() == pytest.approx(0.693147, abs=1e-6)
    assert F.cross_entropy(adjusted(z, prior, 2.0), y).item() == pytest.approx(math.log(82), abs=1e-5)  # .01/.82


def test_the_prior_is_a_natural_logarithm_and_smoothing_stands_inside_it() -> None:
    assert log_prior(torch.tensor([1, 3])).tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    smooth = log_prior(torch.tensor([0, 10]), 1e-9)
    assert smooth.tolist() == pytest.approx([-20.7233, 0.0], abs=1e-4)  # the official code's
    assert log_prior(torch.tensor([0, 10]))[0] == -math.inf


def test_balanced_counts_are_a_constant_shift_with_the_same_loss_and_gradient() -> None:
    y = torch.tensor([0, 2, 1, 1])
    grads, losses = [], []
    for prior in (None, log_prior(torch.tensor([7, 7, 7]))):
        z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = F.cross_entropy(z if prior is None else adjusted(z, prior, 1.0), y)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, z)[0])
    assert torch.allclose(*losses, atol=1e-6) and torch.allclose(*grads, atol=1e-7)


def test_log_probabilities_stay_such_and_classes_stand_in_dimension_one() -> None:
    prior, y = log_prior(torch.tensor([6, 3, 1])), torch.tensor([0, 1, 2, 0])
    z = torch.randn(4, 3)
    as_nll = F.nll_loss(adjusted(z.log_softmax(1), prior, 1.0, normalised=True), y)
    assert torch.allclose(as_nll, F.cross_entropy(z + prior, y), atol=1e-6)
    places = torch.randn(2, 3, 5)
    assert torch.equal(adjusted(places, prior, 1.0)[:, :, 4], adjusted(places[:, :, 4], prior, 1.0))


def test_16_bit_logits_are_adjusted_in_fp32() -> None:
    z = torch.ones(1, 2, dtype=torch.bfloat16)
    out = adjusted(z, log_prior(torch.tensor([9999, 1])), 1.0)
    assert out.dtype == torch.float32 and out[0, 1].item() == pytest.approx(1 + math.log(1e-4), abs=1e-6)
    assert adjusted(z.double(), log_prior(torch.tensor([1, 1])), 1.0).dtype == torch.float64


def test_divergence_from_uniform() -> None:
    assert kl_to_uniform(torch.tensor([5, 5, 5, 5])) == pytest.approx(0, abs=1e-6)
    assert kl_to_uniform(torch.tensor([8, 0, 0, 0])) == pytest.approx(math.log(4))
    assert kl_to_uniform(torch.tensor([90, 10])) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)


# -- in a fit ----------------------------------------------------------------------------------------------------------

X, Y = samples(16)  # 6, 5, 5 samples of three classes


class ByHand(Classifier):
    """The same training written into the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x) + torch.tensor([6.0, 5.0, 5.0]).div(16).log(), y)


def trained(module: Classifier, *callbacks: Any, **kwargs: Any) -> dict[str, Tensor]:
    quiet(callbacks=list(callbacks), max_epochs=3, **kwargs).fit(module, loader(X, Y))
    return weights(module)


def test_a_stock_module_trains_as_with_the_prior_written_into_its_step() -> None:
    expected = trained(ByHand())
    for recipe in (LogitAdjustment(), LogitAdjustment([6, 5, 5]), LogitAdjustment([60, 50, 50])):
        found = trained(Classifier(), recipe)
        assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)
    assert not same(found, trained(Classifier()))


def test_tau_0_is_bitwise_plain_training() -> None:
    assert same(trained(Classifier(), LogitAdjustment([1, 0, 5], tau=0)), trained(Classifier()))


def test_metrics_and_evaluation_see_the_networks_own_logits() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            seen.append((logits.detach().clone(), loss.detach(), F.cross_entropy(logits.detach(), y)))
            return loss

    module = Own(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = quiet(callbacks=[LogitAdjustment([100, 10, 1])])
    trainer.fit(module, loader(X, Y), loader(X, Y))
    plain = F.cross_entropy(module.net(X), Y)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(plain.item(), abs=1e-6)
    for (logits, adjusted_loss, raw_loss), part in zip(seen, X.split(4)):
        assert torch.equal(logits, module.net(part))
        assert adjusted_loss > raw_loss + 0.1
    kl = trainer.callback_metrics["logit_adjustment/kl_to_uniform"].item()
    assert kl == pytest.approx(kl_to_uniform(torch.tensor([100, 10, 1])), abs=1e-6)


def test_soft_labels_get_the_prior_of_the_hard_ones() -> None:
    """The data set's labels are hard; the module mixes them."""

    class Soft(Classifier):
        prior: Any = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            soft = 0.7 * F.one_hot(y, 3) + 0.3 * F.one_hot(y.flip(0), 3)
            return F.cross_entropy(self(x) + self.prior, soft)

    by_hand = Soft()
    by_hand.prior = torch.tensor([6.0, 5.0, 5.0]).div(16).log()
    expected, found = trained(by_hand), trained(Soft(), LogitAdjustment())
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


def test_a_loss_of_log_probabilities_trains_alike() -> None:
    class NLL(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])

    expected, found = trained(ByHand()), trained(NLL(), LogitAdjustment())
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


def test_an_attack_on_the_training_loss_sees_the_prior_too() -> None:
    """AAER replays the step; the prior must be in the replay as in the step itself."""
    priors: list[int] = []

    class Counts(LogitAdjustment):
        def transform_logits(self, step: Any, logits: Tensor) -> Tensor:
            priors.append(step.replaying)
            return super().transform_logits(step, logits)

    images = X[:, :, None, None]
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    recipes = [AAER(0.1), Counts()]
    quiet(callbacks=recipes, limit_train_batches=1).fit(Classifier(net), loader(images, Y))
    assert priors == [True, False]


class Graded(Dataset):
    """Says its labels, and counts how often it is read."""

    def __init__(self) -> None:
        self.targets, self.read = Y.tolist(), 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.read += 1
        return X[i], self.targets[i]


def test_counting_reads_no_sample_where_the_data_set_says_its_labels_and_shifts_nobodys_draws() -> None:
    data = Graded()
    draws = []
    watch = Watch(on_train_batch_start=lambda *_: draws.append(torch.rand(()).item()))
    for callbacks in ([watch], [LogitAdjustment(), watch]):
        torch.manual_seed(3)
        quiet(callbacks=callbacks).fit(Classifier(), DataLoader(data, 4, shuffle=True))
    assert draws[:4] == draws[4:] and data.read == 2 * len(X)


# -- errors and checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "data", "says"),
    [
        (lambda: LogitAdjustment([4, 4]), (X, Y), "there are 2 class counts and the logits have 3 classes"),
        (lambda: LogitAdjustment([4, 4, 4, 4]), (X, Y), "there are 4 class counts and the logits have 3 classes"),
        (
            lambda: LogitAdjustment(),
            (X, Y.clamp_max(1)),
            r"class 2 has no training sample; its log prior is -inf; pass",
        ),
        (lambda: LogitAdjustment(), (X, Y * 2), "there are 5 class counts and the logits have 3 classes"),
    ],
)
def test_counts_that_do_not_fit_the_logits(recipe: Any, data: Any, says: str) -> None:
    module = Classifier()
    before = weights(module)
    with pytest.raises(RecipeError, match=says):
        quiet(callbacks=[recipe()]).fit(module, loader(*data))
    assert same(weights(module), before) and "training_step" not in vars(module)


def test_a_class_without_samples_and_with_smoothing_trains() -> None:
    found = trained(Classifier(), LogitAdjustment([8, 8, 0], smoothing=1e-9))
    assert all(torch.isfinite(value).all() for value in found.values())
    with pytest.raises(RecipeError, match=r"class 1 \(and 1 more\) has no training sample"):
        LogitAdjustment([3, 0, 0])


class OtherLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())


def test_a_loss_that_classifies_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"needs a classification loss .* is mse_loss of \(4, 3\)"):
        trained(OtherLoss(), LogitAdjustment())


def test_class_weights_in_the_modules_own_loss_are_said() -> None:
    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 2.0]))

    with pytest.warns(UserWarning, match="the prior is corrected twice"):
        trained(Weighted(), LogitAdjustment())


def test_a_resume_with_other_data_is_refused_and_with_the_same_goes_on(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=2, save_top_k=-1)
    quiet(callbacks=[LogitAdjustment(), keep], enable_checkpointing=True, limit_train_batches=3).fit(
        Classifier(), loader(X, Y)
    )
    path = str(tmp_path / "last.ckpt")
    (section,) = [
        s for s in torch.load(path, weights_only=True)["callbacks"].values() if "counts" in s.get("state", {})
    ]
    assert section["state"]["counts"].tolist() == [6, 5, 5]
    quiet(callbacks=[LogitAdjustment()], max_epochs=2).fit(Classifier(), loader(X, Y), ckpt_path=path)
    with pytest.raises(RecipeError, match=r"samples a class are \[6, 6, 4\] here and were \[6, 5, 5\]"):
        other = torch.cat([Y[:14], torch.tensor([0, 1])])
        quiet(callbacks=[LogitAdjustment()], max_epochs=2).fit(Classifier(), loader(X, other), ckpt_path=path)
    with pytest.raises(RecipeError, match=r"tau=1\.0 in the checkpoint but 0\.5 here"):
        quiet(callbacks=[LogitAdjustment(tau=0.5)], max_epochs=2).fit(Classifier(), loader(X, Y), ckpt_path=path)


def test_the_step_below_the_recipe_is_the_modules_own() -> None:
    """Who observes the stock step from outside sees no prior."""
    seen = []

    def look(trainer: Any, module: Any, *rest: Any) -> None:
        replay = observe(trainer, module, (X[:4], Y[:4]), 0)
        seen.append(torch.equal(replay.logits, replay.seen))

    quiet(callbacks=[LogitAdjustment(), Watch(on_train_batch_end=look)], limit_train_batches=1).fit(
        Classifier(), loader(X, Y)
    )
    assert seen == [True]

"""Mixup and CutMix: the card's numbers, torchvision's own transforms, and what the module, its loss and replays see."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from lightning_recipes.callbacks import AAER, GLAD, CutMix, Mixup
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.mixing import Mix, as_probabilities, draw, smooth
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, weights

torch.manual_seed(0)
IMAGES = torch.rand(16, 2, 6, 10)
Y = torch.arange(16) % 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(120, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(module, *recipes, x=IMAGES, y=Y, size=4, epochs=2, **kwargs):
    trainer = quiet(callbacks=list(recipes), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(x, y, size=size))
    return trainer


# -- the draw ----------------------------------------------------------------------------------------------------------


def cut(monkeypatch, share, x, y, height=512, width=512):
    """A CutMix of that share around that pixel."""
    transform = v2.CutMix()
    monkeypatch.setattr(transform._dist, "sample", lambda shape: torch.tensor([share]))
    centre = iter([x, y])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([next(centre)]))
    return draw(transform, torch.zeros(2, 3, height, width), 2, generator())


def test_the_boxes_of_the_card(monkeypatch):
    middle = cut(monkeypatch, 0.75, 256, 256)
    assert middle.box == (128, 128, 384, 384)
    assert middle.share == 0.75
    corner = cut(monkeypatch, 0.75, 0, 0)
    assert corner.box == (0, 0, 128, 128)
    assert corner.share == 0.9375


def test_a_box_on_an_image_that_is_not_square_is_scaled_along_both_sides(monkeypatch):
    mix = cut(monkeypatch, 0.75, 200, 50, height=100, width=400)
    assert mix.box == (100, 25, 300, 75)
    x, other = torch.zeros(1, 1, 100, 400), torch.ones(1, 1, 100, 400)
    mixed = mix.inputs(x, other)
    assert mixed[0, 0, 25:75, 100:300].all() and mixed.sum() == 50 * 200
    assert mix.share == 1 - mixed.mean().item()


def test_mixup_and_smoothing_by_the_numbers_of_the_card():
    y = as_probabilities(torch.tensor([1, 2]), torch.zeros(2, 4))
    mixed = Mix(0.3, None, torch.tensor([1, 0])).targets(y, y.flip(0))
    assert torch.allclose(mixed[0], torch.tensor([0.0, 0.3, 0.7, 0.0]))
    smoothed = smooth(as_probabilities(torch.tensor([0]), torch.zeros(1, 4)), 0.1)
    assert torch.allclose(smoothed, torch.tensor([[0.925, 0.025, 0.025, 0.025]]))


@pytest.mark.parametrize("transform", [v2.MixUp(alpha=0.4, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)])
def test_with_neighbours_as_partners_a_mix_is_torchvisions_own(transform):
    mix = draw(transform, IMAGES, len(IMAGES), generator(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        images, labels = transform(IMAGES, Y)
    neighbours = torch.arange(len(IMAGES)).roll(1)
    assert torch.equal(mix.inputs(IMAGES, IMAGES[neighbours]), images)
    y = as_probabilities(Y, torch.zeros(16, 3))
    assert torch.allclose(mix.targets(y, y[neighbours]), labels)


def test_a_draw_hangs_on_its_generator_alone_and_leaves_the_global_state():
    transform = v2.CutMix(alpha=1.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw(transform, IMAGES, 16, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = draw(transform, IMAGES, 16, generator(1)), draw(transform, IMAGES, 16, generator(2))
    assert (first.share, first.box) == (again.share, again.box)
    assert torch.equal(first.partners, again.partners)
    assert (first.box, first.partners.tolist()) != (other.box, other.partners.tolist())
    assert sorted(first.partners.tolist()) == list(range(16))


# -- in a fit ----------------------------------------------------------------------------------------------------------


class Sees(Classifier):
    """Notes what its step gets, and what its loss gives."""

    def __init__(self, *args):
        super().__init__(net(), *args)
        self.batches, self.losses = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.batches.append((x.clone(), y.clone()))
        self.losses.append(loss.detach())
        return loss


class SeesTargets(StepRecipe):
    """Notes the final batch and targets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def extra_loss(self, step):
        self.seen.append((step.batch[0].clone(), step.logits.detach(), step.targets, step.hard_targets))
        return {}

    needs_criterion = True


@pytest.mark.parametrize("recipe", [Mixup(0.8), CutMix(prob=1.0)], ids=["mixup", "cutmix"])
def test_the_loss_sees_mixed_targets_and_the_module_hard_ones(recipe):
    module, watch = Sees(lambda p: torch.optim.SGD(p, lr=0.0)), SeesTargets()
    fit(module, recipe, watch, epochs=1)
    for number, (x, logits, targets, hard) in enumerate(watch.seen):
        plain = slice(4 * number, 4 * number + 4)
        assert torch.equal(module.batches[number][1], Y[plain])
        assert torch.equal(hard, Y[plain])
        assert torch.allclose(targets.sum(1), torch.ones(4))
        assert not torch.equal(x, IMAGES[plain])
        assert module.losses[number].item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
        own = targets.gather(1, Y[plain, None])[:, 0]
        share = own.min()  # of a sample whose partner has another class
        for i in range(4):  # every input is that share of its own and the rest of one other
            candidates = [share * IMAGES[plain][i] + (1 - share) * IMAGES[plain][j] for j in range(4)]
            if isinstance(recipe, Mixup):
                assert any(torch.allclose(x[i], c, atol=1e-6) for c in candidates)
            else:
                untouched = (x[i] == IMAGES[plain][i]).all(0).float().mean()
                assert untouched == 1 or untouched.item() == pytest.approx(share.item(), abs=1e-6)


def test_the_mixed_loss_is_the_mean_of_both_labels_losses_with_class_weights_and_smoothing():
    weight = torch.tensor([1.0, 2.0, 4.0])

    class Weighted(Sees):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self(x), y, weight=weight, label_smoothing=0.1)
            self.losses.append(loss.detach())
            return loss

    module, watch = Weighted(lambda p: torch.optim.SGD(p, lr=0.0)), SeesTargets()
    fit(module, Mixup(0.8, seed=2), watch, epochs=1)
    for number, (_, logits, targets, hard) in enumerate(watch.seen):
        one_hot = F.one_hot(hard, 3).float()
        share = targets.gather(1, hard[:, None]).min()
        partner = ((targets - share * one_hot) / (1 - share)).argmax(1)
        loss = lambda y: F.cross_entropy(logits, y, weight=weight, label_smoothing=0.1)  # noqa: B023, E731
        expected = share * loss(hard) + (1 - share) * loss(partner)
        assert module.losses[number].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_batch_is_mixed_with_the_probability_asked_for_and_else_left_bitwise_alone():
    module = Sees(lambda p: torch.optim.SGD(p, lr=0.0))
    watch = SeesTargets()
    fit(module, CutMix(prob=0.5), watch, epochs=25, size=8)
    untouched = [
        torch.equal(x, IMAGES[(n % 2) * 8 :][:8]) and targets is hard
        for n, (x, _, targets, hard) in enumerate(watch.seen)
        if targets.dim() == 1
    ]
    assert all(untouched)
    assert 15 <= len(untouched) <= 35  # of 50


def test_the_papers_own_loss_of_one_logit_is_mixed_too():
    class Binary(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.binary_cross_entropy_with_logits(self(x)[:, 0], y.float())

    watch = SeesTargets()
    module = Binary(nn.Sequential(nn.Flatten(), nn.Linear(120, 1)), lambda p: torch.optim.SGD(p, lr=0.0))
    fit(module, CutMix(prob=1.0), watch, y=Y % 2, epochs=1)
    assert any(((t > 0) & (t < 1)).any() for _, _, t, _ in watch.seen)
    assert all(t.shape == (4,) for _, _, t, _ in watch.seen)


def test_an_ignored_sample_lends_its_picture_and_no_label():
    mix = Mix(0.75, None, torch.tensor([1, 0]))
    y = as_probabilities(torch.tensor([2, -100]), torch.zeros(2, 3))
    assert mix.targets(y, y.flip(0)).tolist() == [[0.0, 0.0, 0.75], [0.0, 0.0, 0.25]]


@pytest.mark.parametrize("recipe", [Mixup(0.8), CutMix(prob=0.7)], ids=["mixup", "cutmix"])
def test_every_run_of_a_batch_is_mixed_alike(recipe):
    """A second pass over the window at weights that hardly moved gives the gradient of the first."""
    once, twice = Classifier(net()), Classifier(net())
    fit(once, recipe)
    fit(twice, type(recipe)(*recipe.arguments.values()), GLAD(1.0, 1e-7, rank=None))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(once.parameters(), twice.parameters()))


def test_the_attack_starts_from_the_mixed_batch_and_sees_its_targets():
    """At a radius that moves nothing AAER's loss of the start is the loss of the step."""
    seen = []

    class Looks(AAER):
        def extra_loss(self, step):
            _, l0 = step.notes[self]
            with torch.no_grad():
                seen.append((l0, step.call.per_sample(step.logits, step.targets), step.targets))
            return super().extra_loss(step)

    fit(Classifier(net()), Mixup(0.8), Looks(1e-9), epochs=1)
    for at_start, at_end, targets in seen:
        assert targets.dim() == 2
        assert torch.allclose(at_start, at_end, atol=1e-6)


def test_draws_of_others_change_nothing_and_another_seed_does():
    first, second = Classifier(net()), Classifier(net())
    fit(first, Mixup(0.4))
    fit(second, Watch(on_train_batch_start=lambda *args: torch.rand(3)), Mixup(0.4))
    assert same(weights(first), weights(second))
    other = Classifier(net())
    fit(other, Mixup(0.4, seed=1))
    assert not same(weights(first), weights(other))


def test_mixed_precision_keeps_soft_targets_in_fp32_and_half_precision_in_its_own():
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        watch = SeesTargets()
        fit(Classifier(net()), Mixup(0.4), watch, epochs=1, precision=precision)
        assert {targets.dtype for _, _, targets, _ in watch.seen} == {dtype}


def test_a_short_last_batch_of_one_is_left_with_itself_and_a_first_one_is_refused():
    fit(Classifier(net()), CutMix(prob=1.0), x=IMAGES[:5], y=Y[:5])
    with pytest.raises(RecipeError, match="Mixup needs at least 2 samples to mix; the batch has 1"):
        fit(Classifier(mlp()), Mixup(), x=torch.rand(4, 6), size=1, y=Y[:4])


def test_a_neutral_recipe_never_enters_the_step():
    plain, neutral = Classifier(net()), Classifier(net())
    fit(plain)
    fit(neutral, Mixup(0.0), CutMix(prob=0.0))
    assert same(weights(plain), weights(neutral))
    assert isinstance(neutral, pl.LightningModule) and "training_step" not in vars(neutral)


@pytest.mark.parametrize("recipe", [Mixup(1.0, from_epoch=1), CutMix(prob=1.0, from_epoch=1)], ids=["mixup", "cutmix"])
def test_epochs_before_the_first_one_to_be_mixed_are_plain(recipe):
    """One epoch is bitwise the plain one, the second is not."""
    after = {}
    for name, recipes in (("plain", []), ("mixed", [recipe])):
        module, seen = Classifier(net()), []
        fit(module, *recipes, Watch(on_train_epoch_end=lambda t, m, seen=seen: seen.append(weights(m))))
        after[name] = seen
    assert same(after["plain"][0], after["mixed"][0])
    assert not same(after["plain"][1], after["mixed"][1])

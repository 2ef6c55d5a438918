"""Seeing a module's loss and computing it anew, compared with torch's own results."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from lightning_recipes.core.criterion import OBSERVED, Call, Observation, watching, wrap_named
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, loader, mlp, quiet, samples

G = torch.Generator().manual_seed(0)
Z = torch.randn(6, 3, generator=G).requires_grad_()
Y = torch.tensor([0, 2, 1, 1, 0, 2])
SOFT = torch.rand(6, 3, generator=G).softmax(1)
W = torch.rand(6, generator=G)
CLASSES = torch.tensor([0.5, 2.0, 1.0])
ORIGINAL = {name: getattr(F, name) for name in OBSERVED}


class Stages:
    """The recipes' say, as given."""

    def __init__(self, targets=None, weights=None, logits=None):
        self.change, self.weights, self.scale = targets, weights, logits
        self.results = []

    def transform(self, call):
        logits = call.logits if self.scale is None else call.logits * self.scale
        return logits, call.targets if self.change is None else self.change, self.weights

    def computed(self, call, logits, targets, loss):
        self.results.append((call, logits, targets, loss))


def watched(run, stages=None, select=None):
    """What `run` returns while it is watched, and the watch."""
    with watching(Observation(stages or Stages(), select)) as watch:
        return run(), watch


def per_sample(call, logits=Z, targets=None):
    return call.per_sample(logits, call.targets if targets is None else targets)


# -- torch's losses -------------------------------------------------------------------------------------------------

BINARY = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
REAL = torch.randn(6, 3, generator=G)
LOSSES = {
    "F.cross_entropy": (lambda: F.cross_entropy(Z, Y), lambda: -Z.log_softmax(1)[range(6), Y]),
    "F.cross_entropy(input=)": (lambda: F.cross_entropy(target=Y, input=Z), lambda: -Z.log_softmax(1)[range(6), Y]),
    "nn.CrossEntropyLoss": (lambda: nn.CrossEntropyLoss()(Z, Y), lambda: -Z.log_softmax(1)[range(6), Y]),
    "soft targets": (lambda: F.cross_entropy(Z, SOFT), lambda: -(SOFT * Z.log_softmax(1)).sum(1)),
    "nll": (lambda: F.nll_loss(Z, Y), lambda: -Z[range(6), Y]),
    "bce with logits": (
        lambda: F.binary_cross_entropy_with_logits(Z, BINARY),
        lambda: (-(BINARY * Z.sigmoid().log() + (1 - BINARY) * (1 - Z.sigmoid()).log())).mean(1),
    ),
    "nn.BCELoss": (
        lambda: nn.BCELoss()(Z.sigmoid(), BINARY),
        lambda: (-(BINARY * Z.sigmoid().log() + (1 - BINARY) * (1 - Z.sigmoid()).log())).mean(1),
    ),
    "nn.MSELoss": (lambda: nn.MSELoss()(Z, REAL), lambda: (Z - REAL).square().mean(1)),
    "l1": (lambda: F.l1_loss(Z, REAL), lambda: (Z - REAL).abs().mean(1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_seen_with_its_value_and_its_samples(name):
    run, expected = LOSSES[name]
    plain = run()
    stages = Stages()
    loss, watch = watched(run, stages)
    assert torch.equal(loss, plain)
    call, logits, *_, computed = stages.results[0]
    assert watch.call is call and computed is loss
    assert torch.allclose(call.per_sample(logits, call.targets), expected(), atol=1e-6)
    assert torch.allclose(expected().mean(), plain, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSSES if "input" not in n])
def test_sample_weights_give_the_mean_of_weight_times_loss(name):
    run, expected = LOSSES[name]
    loss, _ = watched(run, Stages(weights=W))
    assert torch.allclose(loss, (W * expected()).mean(), atol=1e-6)


def test_reductions():
    losses = -Z.log_softmax(1)[range(6), Y]
    for weights, expected in ((None, losses), (W, W * losses)):
        summed, _ = watched(lambda: F.cross_entropy(Z, Y, reduction="sum"), Stages(weights=weights))
        each, _ = watched(lambda: F.cross_entropy(Z, Y, reduction="none"), Stages(weights=weights))
        assert torch.allclose(summed, expected.sum(), atol=1e-5)
        assert torch.allclose(each, expected, atol=1e-6)


def test_label_smoothing_and_class_weights_are_part_of_each_sample():
    run = lambda: F.cross_entropy(Z, Y, weight=CLASSES, label_smoothing=0.1)  # noqa: E731
    logp = Z.log_softmax(1)
    expected = 0.9 * -logp[range(6), Y] * CLASSES[Y] + 0.1 / 3 * -(logp * CLASSES).sum(1)
    stages = Stages()
    loss, watch = watched(run, stages)
    assert torch.allclose(per_sample(watch.call), expected, atol=1e-6)
    assert torch.allclose(loss, expected.sum() / CLASSES[Y].sum(), atol=1e-6)
    weighted, _ = watched(run, Stages(weights=W))
    assert torch.allclose(weighted, (W * expected).sum() / CLASSES[Y].sum(), atol=1e-6)


def test_ignored_targets_count_for_nothing():
    y = torch.tensor([0, -100, 1, 1, -100, 2])
    kept = torch.tensor([0, 2, 3, 5])
    losses = torch.zeros(6)
    losses[kept] = -Z.log_softmax(1)[kept, y[kept]].detach()
    run = lambda: F.cross_entropy(Z, y)  # noqa: E731
    loss, watch = watched(run)
    assert torch.allclose(per_sample(watch.call).detach(), losses, atol=1e-6)
    assert torch.allclose(loss, losses.sum() / 4, atol=1e-6)
    weighted, _ = watched(run, Stages(weights=W))
    assert torch.allclose(weighted, (W * losses).sum() / 4, atol=1e-6)
    softened, _ = watched(run, Stages(targets=SOFT))
    expected = -(SOFT * Z.log_softmax(1)).sum(1)[kept].mean()
    assert torch.allclose(softened, expected, atol=1e-6)


def test_another_index_may_be_ignored():
    loss, _ = watched(lambda: F.cross_entropy(Z, Y, ignore_index=2), Stages(weights=torch.ones(6)))
    assert torch.allclose(loss, F.cross_entropy(Z[Y != 2], Y[Y != 2]), atol=1e-6)


def test_a_sequence_of_tokens_is_one_sample():
    z = torch.randn(2, 3, 4, generator=G).requires_grad_()  # [n, classes, positions]
    y = torch.tensor([[0, 1, 2, -100], [2, 2, -100, -100]])
    run = lambda: F.cross_entropy(z, y)  # noqa: E731
    loss, watch = watched(run, Stages(weights=torch.tensor([1.0, 3.0])))
    logp = z.log_softmax(1)
    first = -(logp[0, 0, 0] + logp[0, 1, 1] + logp[0, 2, 2])
    second = -(logp[1, 2, 0] + logp[1, 2, 1])
    assert torch.allclose(loss, (first + 3 * second) / 5, atol=1e-6)
    assert torch.allclose(watch.call.per_sample(z, y), torch.stack([first / 4, second / 4]), atol=1e-6)


def test_soft_targets_in_the_place_of_hard_ones():
    loss, _ = watched(lambda: F.cross_entropy(Z, Y), Stages(targets=SOFT))
    assert torch.allclose(loss, F.cross_entropy(Z, SOFT), atol=1e-6)
    loss, _ = watched(lambda: F.cross_entropy(Z, Y, label_smoothing=0.2), Stages(targets=SOFT))
    assert torch.allclose(loss, F.cross_entropy(Z, 0.8 * SOFT + 0.2 / 3), atol=1e-6)


def test_soft_targets_of_nll_are_a_weighted_sum_of_hard_calls():
    logp = Z.log_softmax(1)
    loss, _ = watched(lambda: F.nll_loss(logp, Y), Stages(targets=SOFT))
    hard = torch.stack([F.nll_loss(logp, torch.full((6,), c), reduction="none") for c in range(3)], 1)
    assert torch.allclose(loss, (SOFT * hard).sum(1).mean(), atol=1e-6)
    weighted, _ = watched(lambda: F.nll_loss(logp, Y, weight=CLASSES), Stages(targets=SOFT))
    assert torch.allclose(weighted, (SOFT * hard * CLASSES).sum() / CLASSES[Y].sum(), atol=1e-6)


def test_one_hot_targets_in_the_place_of_hard_ones_change_nothing():
    one_hot = F.one_hot(Y, 3).float()
    for options in ({}, {"label_smoothing": 0.1}, {"weight": CLASSES}, {"weight": CLASSES, "label_smoothing": 0.1}):
        loss, _ = watched(lambda o=options: F.cross_entropy(Z, Y, **o), Stages(targets=one_hot))
        assert torch.allclose(loss, F.cross_entropy(Z, Y, **options), atol=1e-6), options


def test_the_loss_is_computed_from_the_transformed_logits():
    loss, _ = watched(lambda: F.cross_entropy(Z, Y), Stages(logits=3.0))
    assert torch.allclose(loss, F.cross_entropy(3 * Z, Y))


def test_the_gradient_goes_through_the_observed_loss():
    loss, _ = watched(lambda: F.cross_entropy(Z, Y), Stages(weights=W))
    expected = torch.autograd.grad((W * -Z.log_softmax(1)[range(6), Y]).mean(), Z)[0]
    assert torch.allclose(torch.autograd.grad(loss, Z)[0], expected, atol=1e-6)


# -- which call -------------------------------------------------------------------------------------------------------


def both():
    return F.cross_entropy(Z, Y) + 0.5 * F.mse_loss(Z, REAL)


def test_two_candidates_are_an_error_that_lists_them():
    _, watch = watched(both)
    with pytest.raises(RecipeError, match=r"computes 2 losses \(0: cross_entropy of \(6, 3\) and \(6,\); 1: mse_loss"):
        watch.check(needed=True)


@pytest.mark.parametrize("index", [0, 1])
def test_an_index_chooses(index):
    loss, watch = watched(both, Stages(weights=W), index)
    watch.check(needed=True)
    first, second = -Z.log_softmax(1)[range(6), Y], (Z - REAL).square().mean(1)
    terms = [first.mean(), 0.5 * second.mean()]
    terms[index] = [(W * first).mean(), 0.5 * (W * second).mean()][index]
    assert torch.allclose(loss, sum(terms), atol=1e-6)


def test_an_index_that_never_came_is_an_error():
    _, watch = watched(both, select=2)
    with pytest.raises(RecipeError, match=r"no loss was seen.*\(criterion=2 was never called\)"):
        watch.check(needed=True)


def test_no_loss_is_an_error_only_where_it_is_needed():
    _, watch = watched(lambda: Z.sum())
    watch.check(needed=False)
    with pytest.raises(RecipeError, match=r"no loss was seen.*criterion='dotted\.name'"):
        watch.check(needed=True)


def test_losses_without_a_gradient_are_no_candidates():
    def step():
        with torch.no_grad():
            F.cross_entropy(Z, Y)
        F.mse_loss(Z.detach(), REAL)
        return F.cross_entropy(Z, Y)

    _, watch = watched(step)
    watch.check(needed=True)
    assert [call.name for call in watch.seen] == ["cross_entropy"]


def test_a_loss_inside_a_loss_counts_once():
    class Outer(nn.Module):
        def forward(self, z, y):
            return F.cross_entropy(z, y) + F.mse_loss(z, REAL)

    module = nn.Module()
    module.criterion = Outer()
    off = wrap_named(module, "criterion")
    loss, watch = watched(lambda: module.criterion(Z, Y), select="criterion")
    watch.check(needed=True)
    assert len(watch.seen) == 1
    assert torch.allclose(loss, F.cross_entropy(Z, Y) + F.mse_loss(Z, REAL))
    off()


def test_nothing_is_seen_outside_a_watch_and_f_is_restored():
    watched(both)
    assert {name: getattr(F, name) for name in OBSERVED} == ORIGINAL
    stages = Stages(weights=W)
    with pytest.raises(ZeroDivisionError), watching(Observation(stages, None)):
        raise ZeroDivisionError
    assert {name: getattr(F, name) for name in OBSERVED} == ORIGINAL
    F.cross_entropy(Z, Y)
    assert stages.results == []


def test_another_thread_is_not_observed():
    losses = []

    def elsewhere():
        losses.append(F.cross_entropy(Z, Y))

    def step():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return F.cross_entropy(Z, Y)

    loss, watch = watched(step, Stages(weights=W))
    assert len(watch.seen) == 1
    assert torch.equal(losses[0], ORIGINAL["cross_entropy"](Z, Y))
    assert not torch.equal(loss, losses[0])


def test_an_inner_watch_hides_the_outer_one_until_it_ends():
    inner, outer = Stages(), Stages()
    with watching(Observation(outer, None)) as outside:
        with watching(Observation(inner, None)) as inside:
            F.cross_entropy(Z, Y)
        assert F.cross_entropy is not ORIGINAL["cross_entropy"]
        F.mse_loss(Z, REAL)
    assert [call.name for call in inside.seen] == ["cross_entropy"]
    assert [call.name for call in outside.seen] == ["mse_loss"]
    assert F.cross_entropy is ORIGINAL["cross_entropy"]


# -- named criteria -------------------------------------------------------------------------------------------------


class Named(Classifier):
    def __init__(self):
        super().__init__()
        self.criterion = LabelSmoothingCrossEntropy(0.1)

    def own_loss(self, logits, targets, *, power=1):
        return -logits.log_softmax(1)[torch.arange(len(targets)), targets].pow(power).mean()


def test_a_named_submodule():
    module = Named()
    logp = Z.log_softmax(1)
    expected = 0.9 * -logp[range(6), Y] - 0.1 * logp.mean(1)
    plain = module.criterion(Z, Y)
    off = wrap_named(module, "criterion")
    loss, watch = watched(lambda: module.criterion(Z, Y), select="criterion")
    assert torch.equal(loss, plain)
    assert torch.allclose(per_sample(watch.call), expected, atol=1e-6)
    weighted, _ = watched(lambda: module.criterion(Z, Y), Stages(weights=W), "criterion")
    assert torch.allclose(weighted, (W * expected).mean(), atol=1e-6)
    with pytest.raises(RecipeError, match="criterion='criterion' takes class indices"):
        watched(lambda: module.criterion(Z, Y), Stages(targets=SOFT), "criterion")
    off()
    assert "forward" not in module.criterion.__dict__


def test_a_named_method_with_an_option():
    module = Named()
    off = wrap_named(module, "own_loss")
    loss, watch = watched(lambda: module.own_loss(Z, Y, power=2), Stages(weights=W), "own_loss")
    expected = Z.log_softmax(1)[range(6), Y].square()
    assert torch.allclose(loss, -(W * expected).mean(), atol=1e-6)
    assert watch.call.options == {"power": 2}
    off()
    assert "own_loss" not in module.__dict__


def test_a_named_criterion_is_inert_outside_a_step():
    module = Named()
    off = wrap_named(module, "criterion")
    assert torch.equal(module.criterion(Z, Y), LabelSmoothingCrossEntropy(0.1)(Z, Y))
    off()


@pytest.mark.parametrize("name", ["nothing", "net.nothing", "nothing.net", "net.0.weight"])
def test_a_name_that_nothing_answers_to(name):
    with pytest.raises(RecipeError, match=f"criterion='{name}' is no submodule or method of Named"):
        wrap_named(Named(), name)


# -- in a fit ---------------------------------------------------------------------------------------------------------


class Weigh(StepRecipe):
    def __init__(self, criterion=None):
        super().__init__()
        self.criterion, self.losses = criterion, []

    def loss_weights(self, step):
        return torch.arange(1.0, 5.0)

    def extra_loss(self, step):
        self.losses.append(step.loss.item())
        return {}


def fit(module, recipe):
    x, y = samples()
    quiet(callbacks=[recipe], limit_train_batches=1).fit(module, loader(x, y))
    logits = mlp()(x[:4])
    return logits, y[:4], recipe.losses[0]


def test_a_timm_loss_by_name_in_a_fit():
    class Timm(Named):
        def training_step(self, batch, batch_idx):
            return self.criterion(self(batch[0]), batch[1])

    logits, y, loss = fit(Timm(), Weigh("criterion"))
    logp = logits.log_softmax(1)
    each = 0.9 * -logp[range(4), y] - 0.1 * logp.mean(1)
    assert loss == pytest.approx((torch.arange(1.0, 5.0) * each).mean().item(), rel=1e-5)


def test_a_loss_that_cannot_be_seen_is_an_error_in_the_first_step():
    class Hidden(Named):
        def training_step(self, batch, batch_idx):
            return self.own_loss(self(batch[0]), batch[1])

    with pytest.raises(RecipeError, match="no loss was seen"):
        fit(Hidden(), Weigh())
    logits, y, loss = fit(Hidden(), Weigh("own_loss"))
    each = logits.log_softmax(1)[range(4), y]
    assert loss == pytest.approx(-(torch.arange(1.0, 5.0) * each).mean().item(), rel=1e-5)


def test_an_auxiliary_loss_asks_for_an_index():
    class Auxiliary(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return 0.1 * F.mse_loss(self(x), F.one_hot(y, 3).float()) + F.cross_entropy(self(x), y)

    with pytest.raises(RecipeError, match="computes 2 losses"):
        fit(Auxiliary(), Weigh())
    logits, y, loss = fit(Auxiliary(), Weigh(1))
    each = -logits.log_softmax(1)[range(4), y]
    assert loss == pytest.approx((torch.arange(1.0, 5.0) * each).mean().item(), rel=1e-5)


def test_a_soft_margin_loss_is_seen_and_can_be_weighted():
    signs = (REAL > 0).float() * 2 - 1
    loss, watch = watched(lambda: F.soft_margin_loss(Z, signs), Stages(weights=W))
    assert [call.name for call in watch.seen] == ["soft_margin_loss"] and not watch.call.classifies
    by_hand = F.softplus(-signs * Z) * W.reshape(-1, *[1] * (Z.dim() - 1))
    assert torch.allclose(loss, by_hand.mean())


# -- class weights of recipes -----------------------------------------------------------------------------------------


class ByClass(StepRecipe):
    """Weighs classes, and keeps what became of the loss."""

    def __init__(self, values, criterion=None, soft=False):
        super().__init__()
        self.values, self.criterion, self.soft, self.losses = torch.tensor(values), criterion, soft, []

    def class_weights(self, step):
        return self.values

    def transform_targets(self, step, logits, targets):
        return 0.7 * F.one_hot(targets, 3) + 0.1 if self.soft else targets

    def extra_loss(self, step):
        self.losses.append(step.loss.item())
        return {}


def with_class_weights(call_loss, recipe):
    class Own(Named):
        def training_step(self, batch, batch_idx):
            return call_loss(self, self(batch[0]), batch[1])

    return fit(Own(), recipe)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"ignore_index": 1},
        {"reduction": "sum"},
        {"weight": torch.tensor([2.0, 1.0, 3.0])},
    ],
)
def test_class_weights_are_those_of_torchs_own_argument(options):
    values = [0.5, 2.0, 1.0]
    logits, y, loss = with_class_weights(lambda m, z, y: F.cross_entropy(z, y, **options), ByClass(values))
    weight = torch.tensor(values) * options.get("weight", torch.ones(3))
    assert loss == pytest.approx(F.cross_entropy(logits, y, **{**options, "weight": weight}).item(), rel=1e-6)


def test_class_weights_of_a_soft_target_weigh_every_class_by_its_share():
    values = torch.tensor([0.5, 2.0, 1.0])
    logits, y, loss = with_class_weights(lambda m, z, y: F.cross_entropy(z, y), ByClass([0.5, 2.0, 1.0], soft=True))
    shares = (0.7 * F.one_hot(y, 3) + 0.1) * values
    assert loss == pytest.approx((-(shares * logits.log_softmax(1)).sum() / shares.sum()).item(), rel=1e-6)
    _, _, of_nll = with_class_weights(
        lambda m, z, y: F.nll_loss(z.log_softmax(1), y), ByClass([0.5, 2.0, 1.0], soft=True)
    )
    assert of_nll == pytest.approx(loss, rel=1e-6)


def test_class_weights_of_a_named_criterion_and_of_several_recipes():
    class Other(ByClass):
        pass

    class Timm(Named):
        def training_step(self, batch, batch_idx):
            return self.criterion(self(batch[0]), batch[1])

    logits, y, loss = fit(Timm(), ByClass([0.5, 2.0, 1.0], "criterion"))
    logp, w = logits.log_softmax(1), torch.tensor([0.5, 2.0, 1.0])[y]
    each = 0.9 * -logp[range(4), y] - 0.1 * logp.mean(1)
    assert loss == pytest.approx(((w * each).sum() / w.sum()).item(), rel=1e-5)

    first, second = ByClass([1.0, 2.0, 1.0]), Other([3.0, 1.0, 1.0])
    quiet(callbacks=[first, second], limit_train_batches=1).fit(Classifier(), loader(*samples()))
    expected = F.cross_entropy(logits, y, weight=torch.tensor([3.0, 2.0, 1.0]))
    assert first.losses == second.losses == [pytest.approx(expected.item(), rel=1e-6)]


def test_class_weights_of_places_and_of_no_classes():
    logits, y, loss = with_class_weights(
        lambda m, z, y: F.cross_entropy(z[:, :, None].expand(-1, -1, 2), y[:, None].repeat(1, 2)),
        ByClass([0.5, 2.0, 1.0]),
    )
    assert loss == pytest.approx(F.cross_entropy(logits, y, weight=torch.tensor([0.5, 2.0, 1.0])).item(), rel=1e-6)
    with pytest.raises(RecipeError, match="class weights need a loss of class scores; the observed one is mse_loss"):
        with_class_weights(lambda m, z, y: F.mse_loss(z, F.one_hot(y, 3).float()), ByClass([1.0, 2.0, 3.0]))


def test_class_weights_are_taken_in_fp32_from_16_bit_logits():
    weight = torch.tensor([0.8, 1.3, 1.0])
    call = Call("cross_entropy", F.cross_entropy, Z.detach().bfloat16(), Y, class_weights=weight)
    expected = F.cross_entropy(Z.detach().bfloat16().float(), Y, weight=weight)
    assert torch.allclose(call.value(call.logits, Y), expected, rtol=1e-6)

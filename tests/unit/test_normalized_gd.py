"""Normalised gradient descent: the paper's counts of updates, the factor of any window, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from lightning_recipes.callbacks import AAER, ExactResume, NormalizedGD
from lightning_recipes.callbacks.regularization.normalized_gd import (
    factor,
    joined,
    margins,
    normalized_logistic_gd,
    scale_,
    tally,
)
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Recipe, StepRecipe
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)


def worst_case(n):
    """One sample of one class against n - 1 of the other: the paper's theorem 5.1."""
    a = torch.tensor([[0.5, -1.0]] + [[-0.5, -1.0]] * (n - 1), dtype=torch.float64)
    return a, torch.tensor([1] + [-1] * (n - 1))


class Logistic(Classifier):
    """The paper's model in fp64, from 0."""

    def __init__(self, features=2, lr=1.0, loss="binary_cross_entropy_with_logits"):
        net = nn.Linear(features, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(net.weight)
        super().__init__(net, lambda parameters: torch.optim.SGD(parameters, lr=lr))
        self.loss = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return getattr(F, self.loss)(self(x).squeeze(1), y.double())


def zeroed(net):
    for p in net.parameters():
        nn.init.zeros_(p)
    return net


def fit(module, recipe, x=X, y=Y, size=4, **kwargs):
    callbacks = [recipe, *kwargs.pop("callbacks", [])] if recipe is not None else kwargs.pop("callbacks", [])
    trainer = quiet(callbacks=callbacks, **kwargs)
    trainer.fit(module, loader(x, y, size=size))
    return trainer


def loose(**arguments):
    return NormalizedGD(require_full_batch=False, **arguments)


# -- the paper's own setting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "normalised", "plain"),
    [
        (1000, {100: 2, 10: 2, 1: 16, 0.1: 157}, {100: 308, 10: 729}),
        (100, {100: 2, 10: 2, 1: 11, 0.1: 110}, {100: 31, 10: 55}),
    ],
)
def test_the_worst_case_takes_as_many_updates_as_in_the_paper(n, normalised, plain):
    a, y = worst_case(n)
    for gamma, count in normalised.items():
        theta, updates = normalized_logistic_gd(a, y, gamma, 1000)
        assert updates == count
        assert (y * (a @ theta) > 0).all()
    for gamma, count in plain.items():
        assert normalized_logistic_gd(a, y, gamma, 1000, normalized=False)[1] == count


def test_the_bound_of_the_theorem_holds():
    """R^2 / mu^2 = 1.25 / 0.25 = 5 for the worst case."""
    for n in (10, 100, 1000):
        for gamma in (0.1, 1, 10, 100):
            bound = 5 + 2 * math.log(2 * n - 1) / (gamma * 0.25)
            assert normalized_logistic_gd(*worst_case(n), gamma, 10_000)[1] <= bound


def test_two_points_are_solved_after_two_updates_though_the_loss_exploded():
    a, y, gamma = torch.tensor([[1.0, -1.0], [-1.0, -4.0]]).double(), torch.tensor([1, -1]), 1e4
    path = [normalized_logistic_gd(a, y, gamma, steps, normalized=False)[0] / gamma for steps in (1, 2)]
    assert torch.allclose(path[0], torch.tensor([0.5, 0.75]).double())
    assert torch.allclose(path[1], torch.tensor([1.0, 0.25]).double(), atol=1e-4)
    assert normalized_logistic_gd(a, y, gamma, 5, normalized=False)[1] == 2
    loss = F.softplus(-y * (a @ (gamma * path[0]))).mean().item()
    assert loss == pytest.approx(gamma / 8, rel=1e-3)


def test_large_steps_are_the_batch_perceptron():
    """First (1/n) sum y a, then the mean over what is wrong."""
    a, y = worst_case(10)
    signed = a * y[:, None]
    theta = normalized_logistic_gd(a, y, 1e6, 1)[0] / 1e6
    assert torch.allclose(theta, signed.mean(0))
    wrong = signed[signed @ theta <= 0]
    assert 0 < len(wrong) < 10
    assert torch.allclose(normalized_logistic_gd(a, y, 1e6, 2)[0] / 1e6, theta + wrong.mean(0), atol=1e-5)


def test_one_sample_makes_a_perceptron_step_at_any_theta():
    a, y = torch.tensor([[3.0, 4.0]]), torch.tensor([-1])
    assert torch.equal(normalized_logistic_gd(a, y, 0.5, 5)[0], torch.tensor([-1.5, -2.0]).double())


def test_updates_are_counted_from_0_and_a_margin_of_0_is_not_right():
    a, y = worst_case(10)
    assert normalized_logistic_gd(a, y, 1.0, 0) == (pytest.approx(torch.zeros(2)), None)
    inseparable = torch.tensor([[1.0], [1.0]]), torch.tensor([1, -1])
    assert normalized_logistic_gd(*inseparable, 1.0, 50)[1] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gamma": 0.0}, "gamma must be positive; got 0.0"),
        ({"y": torch.tensor([0, 1])}, r"labels -1 or 1; got \[0, 1\]"),
    ],
)
def test_the_plain_function_refuses(arguments, says):
    given = {"a": torch.eye(2), "y": torch.tensor([1, -1]), "gamma": 1.0, "max_iter": 3}
    with pytest.raises(RecipeError, match=says):
        normalized_logistic_gd(**{**given, **arguments})


# -- margins and the factor --------------------------------------------------------------------------------------------


def test_the_margin_turns_cross_entropy_into_a_logistic_loss():
    torch.manual_seed(0)
    z, y = torch.randn(7, 5), torch.arange(7) % 5
    m = margins(z, y)
    assert torch.allclose(F.softplus(-m), F.cross_entropy(z, y, reduction="none"), atol=1e-6)
    assert torch.allclose(torch.sigmoid(-m), 1 - z.softmax(1)[torch.arange(7), y], atol=1e-6)
    places, of_places = z.view(7, 5, 1).expand(7, 5, 3), y[:, None].expand(7, 3)
    assert torch.allclose(margins(places, of_places), m[:, None].expand(7, 3))


def test_with_two_classes_the_margin_is_the_difference_of_the_logits():
    z = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert torch.equal(margins(z, torch.tensor([0, 0])), torch.tensor([-2.0, 3.0]))


@pytest.mark.parametrize("zero", [0.0, -1.0])
def test_binary_margins_have_the_sign_of_the_label(zero):
    z, y = torch.tensor([2.0, 3.0, -4.0]), torch.tensor([1.0, zero, zero])
    assert torch.equal(margins(z, y), torch.tensor([2.0, -3.0, 4.0]))


def test_a_margin_at_which_1_minus_p_is_0_in_32_bits_still_counts():
    z = torch.tensor([[30.0, 0.0]])
    assert 1 - z.softmax(1)[0, 0] == 0
    beta = factor(tally(margins(z, torch.tensor([0]))), 1e30)
    assert beta.item() == pytest.approx(1 + math.exp(30), rel=1e-9)


def test_16_bit_logits_are_widened_first():
    z = torch.tensor([[10.0, 0.0, 3.0]], dtype=torch.bfloat16)
    m = margins(z, torch.tensor([0]))
    assert m.dtype == torch.float32
    assert m.item() == pytest.approx(10 - math.log(1 + math.exp(3)), rel=1e-6)


def test_at_zero_logits_the_factor_is_exactly_2_or_that_of_the_classes():
    assert factor(tally(margins(torch.zeros(5), torch.ones(5))), 1e6) == 2
    for classes in (2, 3, 10):
        beta = factor(tally(margins(torch.zeros(4, classes), torch.arange(4) % classes)), 1e6)
        assert beta.item() == pytest.approx(classes / (classes - 1), rel=1e-6)


def test_the_tally_of_parts_is_that_of_the_whole_and_no_mean_of_reciprocals():
    m = torch.tensor([3.0, -1.0, 0.0, 5.0, 0.5, -2.0])
    whole, parts = tally(m), joined(torch.stack([tally(m[:2]), tally(m[2:3]), tally(m[3:])]))
    assert torch.allclose(whole, parts)
    s = [1 / (1 + math.exp(x)) for x in m.tolist()]
    assert whole.tolist() == pytest.approx([sum(s), 6, 3, -2])
    assert factor(whole, 1e6).item() == pytest.approx(6 / sum(s))
    mean_of_reciprocals = (2 / sum(s[:2]) + 1 / s[2] + 3 / sum(s[3:])) / 3
    assert abs(factor(whole, 1e6).item() - mean_of_reciprocals) > 0.01


def test_what_is_not_kept_does_not_count():
    m, kept = torch.tensor([3.0, -9.0, 0.5]), torch.tensor([True, False, True])
    assert torch.allclose(tally(m, kept), tally(m[kept]))
    assert tally(m, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0, math.inf]


def test_the_factor_is_capped_also_where_every_s_underflows():
    assert factor(tally(torch.tensor([800.0])), 1e6) == 1e6
    assert factor(tally(torch.tensor([math.inf, 20.0])), 1e6) == 1e6


def test_scaling_keeps_each_dtype_and_its_precision():
    beta = torch.tensor(1 / 3, dtype=torch.float64)
    gradients = [torch.ones(2), torch.ones(2).double(), torch.ones(2).bfloat16(), 3 * torch.ones(2)]
    scale_(gradients, beta)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    assert gradients[1][0].item() == 1 / 3
    assert [g[0].item() for g in gradients] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1], rel=4e-3)


# -- the callback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [100, 10, 1, 0.1])
def test_the_recipe_stops_after_as_many_updates_as_the_paper_with_its_weights(gamma):
    a, y = worst_case(1000)
    module, recipe = Logistic(lr=gamma), NormalizedGD(stop_when_separated=True)
    fit(module, recipe, a, (y + 1) // 2, size=1000, max_epochs=200, precision="64-true")
    theta, updates = normalized_logistic_gd(a, y, gamma, 200)
    assert (recipe.updates, recipe.separated) == (updates, True)
    assert torch.allclose(module.net.weight[0], theta, rtol=1e-9)


def test_plus_and_minus_one_are_labels_too():
    a, y = worst_case(100)
    module, recipe = Logistic(lr=1.0, loss="soft_margin_loss"), NormalizedGD(stop_when_separated=True)
    fit(module, recipe, a, y, size=100, max_epochs=200, precision="64-true")
    assert (recipe.updates, recipe.separated) == (11, True)


def test_a_hand_written_loss_that_is_named_gives_the_same():
    class Own(Logistic):
        def training_step(self, batch, batch_idx):
            return self.own(self(batch[0]).squeeze(1), batch[1])

        def own(self, logits, targets):
            return (1 + (-targets * logits).exp()).log().mean()

    a, y = worst_case(100)
    module, recipe = Own(lr=1.0), NormalizedGD(stop_when_separated=True, criterion="own")
    fit(module, recipe, a, y, size=100, max_epochs=200, precision="64-true")
    assert (recipe.updates, recipe.separated) == (11, True)


def test_real_digits_are_separated_after_as_many_updates_as_by_hand():
    data = load_digits()
    a, digit = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    kept = torch.cat([(digit == 4).nonzero().flatten()[:5], (digit == 9).nonzero().flatten()])
    x, y = a[kept], (digit[kept] == 4).long()
    module, recipe = Logistic(64, 10.0), NormalizedGD(stop_when_separated=True)
    fit(module, recipe, x, y, size=len(x), max_epochs=50, precision="64-true")
    assert recipe.updates == 7 == normalized_logistic_gd(x, 2 * y - 1, 10.0, 50)[1]


def test_the_step_is_beta_times_the_plain_one_and_the_logged_loss_the_plain_loss():
    module, plain, logged = (Classifier(zeroed(mlp())) for _ in range(2)), None, {}
    module, plain = module
    trainer = fit(module, NormalizedGD(), size=16)
    fit(plain, None, size=16)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, 1.5 * q, rtol=1e-6)  # 3 classes
    assert any(p.any() for p in module.parameters())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["normalized_gd/beta"] == pytest.approx(1.5)
    assert logged["normalized_gd/misclassified"] == 16  # m = -log 2 for all
    assert logged["normalized_gd/min_margin"] == pytest.approx(-math.log(2))
    assert logged["normalized_gd/updates"] == 1


def test_micro_batches_and_one_batch_end_alike():
    ends = []
    for size, accumulate in ((16, 1), (4, 4), (8, 2)):
        module = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9))
        fit(module, NormalizedGD(), size=size, accumulate_grad_batches=accumulate, max_epochs=5)
        ends.append(weights(module))
    for end in ends[1:]:
        assert all(torch.allclose(end[name], ends[0][name], atol=1e-6) for name in end)


def test_the_update_is_never_longer_than_the_step_size_times_the_largest_sample():
    torch.manual_seed(0)
    a, y = torch.randn(32, 4, dtype=torch.float64), torch.arange(32) % 2
    path = []
    watch = Watch(on_train_batch_start=lambda t, m, *rest: path.append(m.net.weight.detach().clone()))
    fit(Logistic(4, 7.0), NormalizedGD(), a, y, size=32, max_epochs=20, callbacks=[watch], precision="64-true")
    longest = 7 * a.norm(dim=1).max()
    assert all((q - p).norm() <= longest for p, q in itertools.pairwise(path))


def test_without_full_batches_the_factor_is_that_of_the_steps_own_samples():
    betas, expected = [], []

    def note(trainer, module, outputs, batch, batch_idx):
        betas.append(float(trainer.callback_metrics["normalized_gd/beta"]))

    def expect(trainer, module, batch, batch_idx):
        p = module(batch[0]).softmax(1)[torch.arange(len(batch[1])), batch[1]]
        expected.append(1 / (1 - p).mean().item())

    fit(Classifier(), loose(), callbacks=[Watch(on_train_batch_end=note, on_train_batch_start=expect)], max_epochs=2)
    assert betas == pytest.approx(expected, rel=1e-5) and len(set(betas)) == 8


def test_it_scales_before_the_clipping_and_says_that_clipping_undoes_it():
    lengths = {}
    for clip in (None, 1e-3):
        module = Classifier()
        start = torch.cat([p.detach().flatten() for p in module.parameters()])
        fit(module, loose(), limit_train_batches=1, gradient_clip_val=clip)
        lengths[clip] = (torch.cat([p.detach().flatten() for p in module.parameters()]) - start).norm().item()
    assert lengths[1e-3] == pytest.approx(1e-4, rel=1e-3) and lengths[None] > 1e-2
    with pytest.warns(UserWarning, match="NormalizedGD: gradients are clipped after they are scaled"):
        fit(Classifier(), loose(), gradient_clip_val=1.0)


def test_samples_that_the_loss_ignores_do_not_count():
    def step(y):
        module = Classifier()
        fit(module, loose(), X[: len(y)], y, size=len(y))
        return weights(module)

    ignored = torch.tensor([-100, 1, 2, -100])
    other = Classifier()
    fit(other, loose(), X[1:3], ignored[1:3], size=2)
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(step(ignored).values(), weights(other).values(), strict=True)
    )


def test_segmentation_and_several_labels_are_means_of_logistic_losses_too():
    class Places(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])[:, :, None].expand(-1, 3, 2), batch[1][:, None].expand(-1, 2))

    class Several(Classifier):
        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), F.one_hot(batch[1], 3).float())

    plain, places = Classifier(), Places()
    fit(plain, NormalizedGD(), size=16)
    fit(places, NormalizedGD(), size=16)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain.parameters(), places.parameters(), strict=True))
    trainer = fit(Several(zeroed(mlp())), NormalizedGD(), size=16)
    assert trainer.callback_metrics["normalized_gd/beta"] == 2


def test_attacked_inputs_are_normalised_by_their_own_losses():
    trainer = fit(Classifier(), AAER(0.3), callbacks=[loose()])
    assert trainer.callback_metrics["normalized_gd/beta"] > 1


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_with_mini_batches_the_fit_ends_after_an_epoch_without_a_mistake():
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 2]])
    net = nn.Linear(2, 2, bias=False)
    module = Classifier(zeroed(net), lambda p: torch.optim.SGD(p, lr=0.1))
    recipe = loose(stop_when_separated=True)
    trainer = fit(module, recipe, x, torch.tensor([0, 0, 1, 1]), size=2, max_epochs=30)
    assert recipe.separated
    assert trainer.current_epoch == 2  # all logits are 0 in the first steps
    assert recipe.updates == 4


def test_what_cannot_be_separated_is_said():
    x, y = torch.ones(4, 6), torch.tensor([0, 1, 0, 1])
    recipe = NormalizedGD(stop_when_separated=True)
    with pytest.warns(
        UserWarning, match="NormalizedGD: the fit ended with [24] training samples wrong in the last epoch"
    ):
        trainer = fit(Classifier(), recipe, x, y, size=4, max_epochs=5)
    assert trainer.current_epoch == 5 and not recipe.separated
    with pytest.warns(UserWarning, match="no other end: it never ends if the classes cannot be separated"):
        fit(Classifier(), recipe, x, y, size=4, max_epochs=-1, callbacks=[Watch(on_train_batch_end=_stop)])


def _stop(trainer, *rest):
    trainer.should_stop = True


def test_without_stopping_updates_go_on_when_all_is_right():
    a, y = worst_case(10)
    recipe = NormalizedGD()
    trainer = fit(Logistic(lr=10.0), recipe, a, (y + 1) // 2, size=10, max_epochs=6, precision="64-true")
    assert (recipe.updates, trainer.current_epoch, recipe.separated) == (6, 6, False)
    assert trainer.callback_metrics["normalized_gd/misclassified"] == 0


# -- resume ------------------------------------------------------------------------------------------------------------


class Dies(Exception):
    pass


def test_killed_in_the_middle_of_a_window_it_ends_as_the_uninterrupted_run(tmp_path):
    settings = {"size": 4, "accumulate_grad_batches": 4, "max_epochs": 3, "enable_checkpointing": True}
    whole, dying, resumed = Classifier(), Classifier(), Classifier()
    ended = NormalizedGD()
    fit(whole, ended, callbacks=[ExactResume()], **settings)

    def die(trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            raise Dies

    class Save(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(Dies):
        fit(dying, NormalizedGD(), callbacks=[ExactResume(), Save(tmp_path), Watch(on_train_batch_end=die)], **settings)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["NormalizedGD"]["state"]
    assert saved["window"][1] == 8 and (saved["size"], saved["updates"]) == (4, 1)
    recipe = NormalizedGD()
    trainer = quiet(callbacks=[ExactResume(), recipe], accumulate_grad_batches=4, max_epochs=3)
    trainer.fit(resumed, loader(X, Y), ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(whole), weights(resumed))
    assert recipe.state() == ended.state()


def test_where_lightning_forgets_the_gradients_of_a_window_its_tally_goes_too(tmp_path):
    recipe, seen = loose(), []
    state = {"updates": 3, "separated": False, "wrong": 2, "window": [1.0, 4.0, 2.0, -1.0], "size": 4}
    watch = Watch(on_train_start=lambda *args: (recipe.load_state(state), seen.append(recipe.state())))
    fit(Classifier(), recipe, callbacks=[watch])
    assert seen[0] == {**state, "window": None, "size": None}


# -- refusals ----------------------------------------------------------------------------------------------------------


def with_loss(function):
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            return function(self(batch[0]), batch[1])

    return Own()


ONE_HOT = lambda y: F.one_hot(y, 3).float()  # noqa: E731


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda z, y: F.mse_loss(z, ONE_HOT(y)), r"needs a cross-entropy of logits.*mse_loss of \(4, 3\)"),
        (lambda z, y: F.cross_entropy(z, ONE_HOT(y)), "assumes hard labels, and the targets are probabilities"),
        (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), "smooths labels by 0.1"),
        (lambda z, y: F.cross_entropy(z, y, torch.ones(3)), "the loss has weight=, and the factor is that of a plain"),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), "reduction='sum', and the factor is that of a mean"),
        (lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), "reduction='none'"),
        (
            lambda z, y: F.binary_cross_entropy_with_logits(z, 0.9 * ONE_HOT(y)),
            r"labels that are 0 or 1; among the targets are \[0.0, 0.89",
        ),
        (
            lambda z, y: F.binary_cross_entropy_with_logits(z, ONE_HOT(y), pos_weight=torch.ones(3)),
            "the loss has pos_weight=",
        ),
        (
            lambda z, y: F.soft_margin_loss(z, ONE_HOT(y)),
            r"labels that are -1 or 1; among the targets are \[0.0, 1.0\]",
        ),
    ],
)
def test_a_loss_that_is_no_mean_of_logistic_losses_is_refused_in_the_first_step(loss, says):
    module = with_loss(loss)
    before = weights(module)
    with pytest.raises(RecipeError, match=f"NormalizedGD.*{says}"):
        fit(module, loose())
    assert same(before, weights(module))


def test_a_named_loss_that_is_another_one_is_refused_by_its_value():
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            return self.own(self(batch[0]), batch[1])

        def own(self, logits, targets):
            return F.cross_entropy(logits, targets, label_smoothing=0.5)

    with pytest.raises(
        RecipeError, match=r"own is not the mean of logistic losses .*: it gave 1\.\d+, and they 1\.\d+"
    ):
        fit(Own(), loose(criterion="own"))


def test_targets_that_become_soft_later_are_refused_when_they_do():
    class Later(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1] if batch_idx == 0 else ONE_HOT(batch[1]))

    with pytest.raises(RecipeError, match="assumes hard labels"):
        fit(Later(), loose())


def test_a_recipe_that_weights_samples_is_refused():
    class Weighs(StepRecipe):
        def loss_weights(self, step):
            return torch.ones(4)

    with pytest.raises(RecipeError, match="a recipe weights the samples of the loss"):
        fit(Classifier(), loose(), callbacks=[Weighs()])


def test_terms_that_it_scales_too_are_said():
    module = with_loss(lambda z, y: F.cross_entropy(z, y) + z.square().mean())
    with pytest.warns(UserWarning, match="the module returns a loss of .* where the observed one is .* all of it"):
        fit(module, loose())

    class Penalty(StepRecipe):
        def extra_loss(self, step):
            return step.module.net[0].weight.square().sum()

    with pytest.warns(UserWarning, match="the factor scales what Penalty adds to the loss too"):
        fit(Classifier(), loose(), callbacks=[Penalty()])


@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop"]
)
def test_an_optimizer_that_takes_the_factor_out_again_is_refused(name):
    module = Classifier(optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.1))
    with pytest.raises(RecipeError, match=f"NormalizedGD has no effect under {name}, .*use torch.optim.SGD"):
        fit(module, loose())


def test_an_unknown_optimizer_is_said_to_be_unknown():
    module = Classifier(optimizer=lambda p: torch.optim.ASGD(p, lr=0.1))
    with pytest.warns(UserWarning, match="plain SGD; what it does under ASGD is not known"):
        fit(module, loose())


def test_less_than_the_whole_training_set_is_refused_with_its_numbers():
    says = (
        r"there are 16 training samples in 4 batches of 4 on 1 rank\(s\), .* accumulate_grad_batches is 1: give every"
    )
    with pytest.raises(RecipeError, match=f"NormalizedGD: require_full_batch needs .*{says}"):
        fit(Classifier(), NormalizedGD())
    for settings in (
        {"size": 4, "accumulate_grad_batches": 2},
        {"size": 4, "accumulate_grad_batches": 8},
        {"size": 4, "accumulate_grad_batches": 3, "limit_train_batches": 3},
        {"size": 16, "accumulate_grad_batches": 2},
        {"size": 6, "accumulate_grad_batches": 3},
    ):
        with pytest.raises(RecipeError, match="require_full_batch"):
            fit(Classifier(), NormalizedGD(), **settings)
    fit(Classifier(), NormalizedGD(), size=100)


def test_samples_that_are_drawn_with_replacement_or_without_end_are_refused():
    data = TensorDataset(X, Y)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(data))

    trainer = lambda: quiet(callbacks=[NormalizedGD()])  # noqa: E731
    with pytest.raises(RecipeError, match="drawn by RandomSampler"):
        trainer().fit(Classifier(), DataLoader(data, 16, sampler=RandomSampler(data, replacement=True)))
    with pytest.raises(RecipeError, match="require_full_batch"):
        trainer().fit(Classifier(), DataLoader(Stream(), 16))
    trainer().fit(Classifier(), DataLoader(data, 16, shuffle=True))


def test_batches_of_a_loader_that_does_not_tell_must_be_equal():
    class Batches:
        def __init__(self, *sizes):
            self.sizes = sizes

        def __len__(self):
            return len(self.sizes)

        def __iter__(self):
            return iter(zip(X.split(self.sizes), Y.split(self.sizes), strict=True))

    trainer = lambda: quiet(callbacks=[NormalizedGD()], accumulate_grad_batches=2)  # noqa: E731
    trainer().fit(Classifier(), Batches(8, 8))
    with pytest.raises(RecipeError, match="micro-batches of 10 and 6 samples in one optimizer step"):
        trainer().fit(Classifier(), Batches(10, 6))
    with pytest.raises(RecipeError, match="accumulate_grad_batches is 2, and an epoch has 4 batches"):
        trainer().fit(Classifier(), Batches(4, 4, 4, 4))


def test_an_accumulation_that_changes_is_seen_when_it_does():
    schedule = GradientAccumulationScheduler({0: 4, 1: 2})
    with pytest.raises(RecipeError, match=r"require_full_batch .* accumulate_grad_batches is 2"):
        fit(Classifier(), None, callbacks=[schedule, NormalizedGD()], max_epochs=3)


def _stand_in(name):
    return type(name, (Recipe,), {})()


@pytest.mark.parametrize("name", ["PSKD", "PSER", "BANG", "Mixup", "CutMix", "GLAD", "LangevinMixture"])
def test_what_softens_labels_or_changes_the_gradient_is_refused_by_its_name(name):
    reason = "plain gradient" if name in ("GLAD", "LangevinMixture") else "hard labels"
    for place in (0, 1):
        callbacks = [loose(), _stand_in(name)]
        with pytest.raises(RecipeError, match=f"NormalizedGD and {name} cannot share a Trainer: .*{reason}"):
            fit(Classifier(), None, callbacks=callbacks[::-1] if place else callbacks)


def test_under_fp16_the_unscaled_gradient_is_scaled_and_that_it_underflows_is_said():
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module, plain = Classifier(), Classifier()
    with pytest.warns(UserWarning, match="gradients of small losses underflow in fp16; use precision='32-true'"):
        fit(module, NormalizedGD(), size=16, plugins=[half])
    fit(plain, NormalizedGD(), size=16)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert not same(weights(plain), weights(Classifier()))


def test_a_margin_that_is_not_a_number_is_not_right():
    assert tally(torch.tensor([math.nan, 1.0]))[2] == 1

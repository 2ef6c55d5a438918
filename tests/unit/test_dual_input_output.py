"""The lightweight-CNN paper's modules: two branches trained side by side, joined, and unfrozen from the head down."""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_recipes import cli
from lightning_recipes.callbacks import ExactResume, ProgressiveUnfreezing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.schedule import EveryN
from lightning_recipes.modules import AugmentBatch, DualInputOutput, ImageClassifier, LightweightCNN, UnifiedClassifier
from lightning_recipes.modules.dual_input_output import warp
from tests.stock import Classifier, Watch, in_two_ranks, loader, quiet, same, weights

CONFIGS = Path(__file__).parents[2] / "configs" / "papers"
GROUPS = [["head"], ["a.conv2", "b.conv2"], ["a.conv1", "b.conv1"]]
SMALL = {"size": 8, "padding": 1}  # of the net, for 8x8 images
X = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 10


def count(net):
    return sum(p.numel() for p in net.parameters())


def dual(**arguments):
    return DualInputOutput(**{"model_args": SMALL, "optimizer": lambda p: SGD(p, 0.1, momentum=0.9), **arguments})


def branches(seed=0, **arguments):
    torch.manual_seed(seed)
    return [LightweightCNN(**{**SMALL, **arguments}) for _ in range(2)]


def flipped(images):
    return images.flip(3)


def fit(module, epochs=2, **settings):
    trainer = quiet(max_epochs=epochs, **settings)
    trainer.fit(module, loader(X, Y, size=8))
    return trainer


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_papers_model_stays_below_its_14862_parameters():
    a, b = LightweightCNN(), LightweightCNN()
    assert count(a) == 100 + 1_820 + 5_010
    assert count(UnifiedClassifier(a, b)) == 2 * 1_920 + 10_010 == 13_850 < 14_862


def test_the_unified_model_of_8x8_images_has_5450_parameters():
    unified = UnifiedClassifier(*branches())
    assert unified.a(X).shape == (24, 80)
    assert count(unified) == 2 * 1_920 + 1_610 == 5_450
    assert unified(X).shape == (24, 10)


def test_the_small_net_pools_before_its_relu_without_a_difference():
    net = LightweightCNN(size=12, widths=(3, 4))
    x = torch.rand(2, 1, 12, 12)
    by_the_book = nn.Sequential(
        net.conv1, nn.ReLU(), nn.MaxPool2d(2), net.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), net.head
    )
    assert torch.equal(net(x), by_the_book(x))


@pytest.mark.parametrize(("size", "padding"), [(10, 0), (4, 1)])
def test_the_smallest_images(size, padding):
    assert LightweightCNN(size=size, padding=padding)(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"size": 9}, "size=9: must be at least 10 with padding=0"),
        ({"size": 3, "padding": 1}, "size=3: must be at least 4 with padding=1"),
        ({"widths": (10,)}, r"widths=\(10,\): must be two numbers"),
        ({"padding": 2}, "padding=2: must be 0 or 1"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        LightweightCNN(**arguments)


# -- the augmentation -------------------------------------------------------------------------------------------------


def still(images, **changes):
    amounts = {"degrees": 0.0, "scale": 1.0, "gain": 1.0}
    amounts = {k: torch.full([len(images)], v) for k, v in amounts.items()} | {"shift": torch.zeros(len(images), 2)}
    return warp(images, **{**amounts, **changes})


def test_no_change_asked_for_gives_the_images_back():
    torch.testing.assert_close(still(X), X, rtol=0, atol=1e-6)
    torch.testing.assert_close(AugmentBatch(0, 0, 0, 0)(X), X, rtol=0, atol=1e-6)


def test_a_quarter_turn_a_shift_of_whole_pixels_and_a_gain_are_exact():
    quarter = torch.full([24], 90.0)
    torch.testing.assert_close(still(X, degrees=quarter), X.rot90(-1, (2, 3)), rtol=0, atol=1e-5)
    moved = still(X, shift=torch.tensor([2 / 8, -1 / 8]).repeat(24, 1))
    by_hand = torch.zeros_like(X)
    by_hand[:, :, :7, 2:] = X[:, :, 1:, :6]  # two to the right, one up
    torch.testing.assert_close(moved, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(still(X, gain=torch.full([24], 1.5)), 1.5 * X, rtol=0, atol=1e-5)


def test_every_image_is_warped_by_its_own_amounts_as_torchvision_does():
    images = torch.rand(5, 3, 9, 14)  # not square
    degrees, scale = torch.tensor([0.0, 10, -15, 37, 180]), torch.tensor([1.0, 0.9, 1.1, 1.3, 0.7])
    pixels = torch.tensor([[0, 0], [1, 0], [0, -2], [3, 1], [-1, 2]])
    ours = warp(images, degrees, scale, pixels / torch.tensor([14, 9]), torch.ones(5))
    for i, image in enumerate(images):
        theirs = v2.functional.affine(
            image, float(degrees[i]), pixels[i].tolist(), float(scale[i]), [0.0, 0.0], v2.InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)


def test_images_of_a_batch_are_augmented_differently_and_within_bounds():
    torch.manual_seed(0)
    light = AugmentBatch(rotation=0, zoom=0, translate=0, brightness=0.2)(torch.ones(500, 1, 4, 4))[:, 0, 1, 1]
    assert light.unique().numel() > 490
    assert 0.8 <= light.min() < 0.81 and 1.19 < light.max() <= 1.2
    column = torch.arange(100.0).expand(500, 1, 100, 100)
    centre = AugmentBatch(rotation=0, zoom=0, translate=0.1, brightness=0)(column)[:, 0, 50, 50]
    assert 40 <= centre.min() < 40.5 and 59.5 < centre.max() <= 60.01


def test_half_precision_is_warped_in_float32():
    torch.manual_seed(0)
    amounts = {"degrees": torch.rand(24) * 15, "shift": torch.rand(24, 2) / 10}
    exact = still(X, **amounts)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = still(X, **amounts)
    assert torch.equal(under_autocast, exact)
    half = still(X.bfloat16(), **amounts)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, still(X.bfloat16().float(), **amounts).bfloat16())


@pytest.mark.parametrize("argument", [{"rotation": -1}, {"zoom": 1.0}, {"translate": 1.5}, {"brightness": -0.2}])
def test_amounts_out_of_range_are_refused(argument):
    (name, value), *_ = argument.items()
    with pytest.raises(RecipeError, match=f"AugmentBatch: {name} must be between 0 and .*; got {value}"):
        AugmentBatch(**argument)


def test_bytes_are_refused():
    with pytest.raises(RecipeError, match=r"must be floating \(N,C,H,W\); got tensor \(2, 1, 8, 8\) uint8"):
        AugmentBatch()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["name", "module", "function"])
def test_branches_start_from_weights_of_their_own_that_the_seed_decides(form):
    def build(seed):
        branch = {
            "name": "lightweight_cnn",
            "module": LightweightCNN(**SMALL),
            "function": lambda: LightweightCNN(**SMALL),
        }[form]
        return DualInputOutput(branch, model_args=SMALL if form == "name" else None, seed=seed)

    torch.manual_seed(1)
    first = build(0)
    torch.manual_seed(2)
    again, other = build(0), build(1)
    assert same(weights(first), weights(again))
    for name, value in weights(first.a).items():
        assert not torch.equal(value, weights(first.b)[name]), name
        assert not torch.equal(value, weights(other.a)[name]), name


def test_the_global_seed_decides_too(monkeypatch):
    first = dual()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not same(weights(first), weights(dual()))


def test_a_module_given_is_left_alone_and_drawn_anew():
    given = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))
    given[1].running_mean.fill_(5)
    before = weights(given)
    module = DualInputOutput(given)
    assert same(weights(given), before)
    assert all(part is not given for part in module.modules())
    for branch in (module.a, module.b):
        assert not torch.equal(branch[0].weight, given[0].weight)
        assert torch.equal(branch[1].running_mean, torch.zeros(2))


def test_a_parameter_that_no_layer_draws_is_an_error():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Module()
            self.stem.token = nn.Parameter(torch.zeros(3))
            self.head = nn.Linear(3, 10)

    says = r"branch: Module cannot draw its parameter 'stem.token' anew .*; give a function that builds the network"
    with pytest.raises(RecipeError, match=says):
        DualInputOutput(Token())
    DualInputOutput(Token)  # builds two


def test_one_module_in_both_places_is_an_error():
    net = LightweightCNN(**SMALL)
    with pytest.raises(RecipeError, match=r"A and B share parameters \('conv1.weight' of A is 'conv1.weight' of B\)"):
        DualInputOutput(lambda: net)
    other = LightweightCNN(**SMALL)
    other.conv2 = net.conv2
    with pytest.raises(RecipeError, match=r"A and B share parameters \('conv2.weight' of A is 'conv2.weight' of B\)"):
        UnifiedClassifier(net, other)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"branch": nn.Conv2d(1, 2, 3), "model_args": None}, "Conv2d has no Linear layer at its end"),
        ({"branch": nn.Linear(4, 10), "model_args": None}, "Linear has no Linear layer at its end"),
        ({"features": "fc"}, r"features='fc': LightweightCNN has no such part; it has \['conv1', 'conv2', 'head'\]"),
        ({"branch": nn.Linear(4, 10)}, "model_args belong to a branch given by name"),
        ({"branch": 3, "model_args": None}, "branch must be a name, a module or a function that builds one; got 3"),
        ({"branch": lambda: 3, "model_args": None}, "branch must give a module; .* gave int"),
        ({"branch": "lenet"}, "model='lenet': must be one of small_cnn, lightweight_cnn"),
        ({"augment": 3}, "augment must be a function of images or None; got 3"),
        ({"num_classes": 1}, "num_classes=1: must be at least 2"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        dual(**arguments)


# -- stage 1 ----------------------------------------------------------------------------------------------------------


def test_equal_weights_and_no_augmentation_give_equal_losses_at_every_step():
    module = dual(augment=nn.Identity())
    module.b.load_state_dict(module.a.state_dict())
    losses = []

    def note(trainer, *_):
        losses.append(tuple(float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss_a", "loss_b", "loss")))

    fit(module, callbacks=[Watch(on_train_batch_end=note)])
    assert len(losses) == 6 and losses[0] != losses[-1]
    assert all(a == b and total == 2 * a for a, b, total in losses)


def test_it_is_bitwise_the_same_as_two_separate_runs():
    module = dual(augment=flipped)
    start = {name: weights(getattr(module, name)) for name in "ab"}
    fit(module)
    for name, images in (("a", X), ("b", flipped(X))):
        net = LightweightCNN(**SMALL)
        net.load_state_dict(start[name])
        alone = Classifier(net, lambda p: SGD(p, 0.1, momentum=0.9))
        quiet(max_epochs=2).fit(alone, loader(images, Y, size=8))
        assert same(weights(alone.net), weights(getattr(module, name)))
        assert not torch.equal(net.conv1.weight, start[name]["conv1.weight"])


def test_clipping_by_the_norm_of_all_gradients_joins_them():
    module = dual(augment=flipped)
    start = weights(module.a)
    fit(module, gradient_clip_val=0.1)
    net = LightweightCNN(**SMALL)
    net.load_state_dict(start)
    alone = Classifier(net, lambda p: SGD(p, 0.1, momentum=0.9))
    quiet(max_epochs=2, gradient_clip_val=0.1).fit(alone, loader(X, Y, size=8))
    assert not same(weights(net), weights(module.a))


def test_augmentations_differ_by_batch_epoch_stage_and_rank_and_come_back(monkeypatch):
    module = dual()
    first = module.augmented(X, 0, 0)
    assert torch.equal(module.augmented(X, 0, 0), first)
    others = [module.augmented(X, *key) for key in ((0, 1), (1, 0), ("val", 0, 0))]
    others.append(dual(seed=1).augmented(X, 0, 0))
    monkeypatch.setattr(DualInputOutput, "global_rank", 1)
    others.append(module.augmented(X, 0, 0))
    assert not any(torch.equal(each, first) for each in others)


def test_augmentations_leave_the_global_generators_alone_whatever_they_draw_from():
    def augment(images):
        return images * random.random() * float(np.random.rand()) + torch.rand_like(images)

    module = dual(augment=augment)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = module.augmented(X, 0, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(module.augmented(X, 0, 0), first)


def test_a_run_that_stops_in_mid_epoch_and_goes_on_ends_bitwise_the_same(tmp_path, monkeypatch):
    def run(module, ckpt_path=None):
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet(max_epochs=3, callbacks=[ExactResume(), keep], enable_checkpointing=True)
        trainer.fit(module, loader(X, Y, size=8), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == 9

    whole = dual()
    run(whole)
    torch.manual_seed(99)
    monkeypatch.setenv("PL_GLOBAL_SEED", "99")  # as a later process may have
    resumed = dual()
    run(resumed, tmp_path / "step=4.ckpt")
    assert same(weights(resumed), weights(whole))


def test_a_compiled_module_trains_the_same():
    eager, compiled = dual(), dual()
    fit(eager)
    fit(torch.compile(compiled, backend="eager"))
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=0, atol=1e-6)


def test_losses_are_in_float32_under_autocast():
    module = dual(augment=flipped)
    kinds = []
    original = F.cross_entropy

    def note(logits, *args, **kwargs):
        kinds.append(logits.dtype)
        return original(logits, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", note)
        fit(module, precision="bf16-mixed", max_steps=1)
    assert kinds == [torch.float32] * 2


def test_validation_measures_each_branch_on_clean_and_augmented_images_over_all_batches():
    module = dual(augment=flipped).eval()
    (found,) = quiet().validate(module, loader(X, Y, size=10), verbose=False)
    for name, net in (("a", module.a), ("b", module.b)):
        for suffix, images in (("", X), ("_augmented", flipped(X))):
            accuracy = (net(images).argmax(1) == Y).float().mean()
            assert found[f"val/acc_{name}{suffix}"] == pytest.approx(float(accuracy), abs=1e-6)
    loss_a, loss_b = F.cross_entropy(module.a(X), Y), F.cross_entropy(module.b(flipped(X)), Y)
    assert found["val/loss_a"] == pytest.approx(float(loss_a), rel=1e-5)
    assert found["val/loss_b"] == pytest.approx(float(loss_b), rel=1e-5)
    assert found["val/loss"] == pytest.approx(float(loss_a + loss_b), rel=1e-5)


def test_every_validation_sees_the_same_augmented_images():
    module = dual(optimizer=lambda p: SGD(p, 0.0))
    seen = []
    note = Watch(on_validation_end=lambda trainer, _: seen.append(float(trainer.callback_metrics["val/loss_b"])))
    quiet(max_epochs=2, callbacks=[note]).fit(module, loader(X, Y, size=8), loader(X, Y, size=8))
    assert seen[0] == seen[1]


def test_predictions_are_the_probabilities_of_both():
    module = dual().eval()
    (found,) = quiet().predict(module, loader(X, Y, size=24))
    by_hand = torch.stack([module.a(X), module.b(X)], 1).softmax(-1)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize(
    ("batch", "arrived"),
    [
        ((X,), r"list of \[tensor \(24, 1, 8, 8\) float32\]"),
        ((X, X, Y), r"list of \[tensor .*, tensor .*, tensor \(24,\) int64\]"),
        ((X, Y[:5]), r"list of \[tensor \(24, 1, 8, 8\) float32, tensor \(5,\) int64\]"),
        ({"x": X, "y": Y}, r"dict with keys \['x', 'y'\]"),
        (X, r"tensor \(24, 1, 8, 8\) float32"),
    ],
)
def test_a_batch_that_is_not_images_and_labels_says_what_arrived(batch, arrived):
    says = r"DualInputOutput needs batches \(images \(N,C,H,W\), labels \(N,\)\); got " + arrived
    with pytest.raises(RecipeError, match=says):
        quiet().fit(dual(), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(
    ("augment", "gave"),
    [
        (lambda x: x[:, :, 1:], r"tensor \(8, 1, 7, 8\) float32"),
        (lambda x: torch.cat([x, x]), r"tensor \(16, 1, 8, 8\) float32"),
        (lambda x: (x, Y), r"tuple of \[.*\]"),
        (lambda x: None, "NoneType"),
    ],
)
def test_an_augmentation_that_changes_shapes_is_an_error_before_any_update(augment, gave):
    module = dual(augment=augment)
    before = weights(module)
    says = r"augment must give images of the shape it gets; it got tensor \(8, 1, 8, 8\) float32 and gave " + gave
    with pytest.raises(RecipeError, match=says):
        fit(module)
    assert same(weights(module), before)


def _as_one_of_two(rank: int, folder: str) -> None:
    for name, augment in (("fixed", flipped), ("drawn", None)):
        module = dual(augment=augment)
        trainer = quiet(
            max_epochs=2, devices=2, strategy="ddp", plugins=LightningEnvironment(), use_distributed_sampler=False
        )
        trainer.fit(module, loader(X[rank::2], Y[rank::2], size=4))
        torch.save(weights(module), Path(folder, f"{name}{rank}.pt"))


@pytest.mark.ddp
def test_two_ranks_are_one_process_on_the_same_batches_and_stay_together_under_their_own_noise(tmp_path):
    in_two_ranks(_as_one_of_two, str(tmp_path))
    ranks = {name: torch.load(tmp_path / f"{name}.pt") for name in ("fixed0", "fixed1", "drawn0", "drawn1")}
    one = dual(augment=flipped)
    fit(one)
    for name, value in weights(one).items():
        torch.testing.assert_close(ranks["fixed0"][name], value, rtol=0, atol=1e-6)
    assert same(ranks["fixed0"], ranks["fixed1"])
    assert same(ranks["drawn0"], ranks["drawn1"])


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def test_a_head_that_averages_gives_the_mean_of_the_logits_exactly():
    a, b = branches()
    for p in (*a.parameters(), *b.parameters()):
        nn.init.constant_(p, 0)
        p.data += torch.randint(-2, 3, p.shape)
    whole = torch.randint(0, 3, (6, 1, 8, 8)).float()  # whole numbers: sums are exact in any order
    unified = UnifiedClassifier(a, b, average=True)
    assert torch.equal(unified(whole), (a(whole) + b(whole)) / 2)
    assert torch.equal(unified.head.weight, torch.cat([a.head.weight, b.head.weight], 1) / 2)
    assert torch.equal(unified.head.bias, (a.head.bias + b.head.bias) / 2)
    a, b = branches()
    torch.testing.assert_close(UnifiedClassifier(a, b, average=True)(X), (a(X) + b(X)) / 2)


def test_a_new_head_is_none_of_the_old_ones_and_one_given_is_used():
    a, b = branches()
    unified = UnifiedClassifier(a, b)
    assert not torch.equal(unified.head.weight, UnifiedClassifier(a, b, average=True).head.weight)
    own = nn.Sequential(nn.Linear(160, 6), nn.ReLU(), nn.Linear(6, 10))
    assert UnifiedClassifier(a, b, own).head is own
    assert UnifiedClassifier(a, b, own)(X).shape == (24, 10)


def test_the_branches_are_copied_without_their_classifiers_and_see_the_same_image():
    a, b = branches()
    unified = UnifiedClassifier(a, b)
    assert set(unified.a.state_dict()) == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    seen = []
    for branch in (unified.a, unified.b):
        branch.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unified(X)
    assert len(seen) == 2 and all(image is X for image in seen)
    nn.init.zeros_(unified.a.conv1.weight)
    assert a.conv1.weight.abs().max() > 0 and isinstance(a.head, nn.Linear)


def test_a_classifier_of_several_layers_is_cut_off_by_name():
    def net():
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU())
        return nn.Sequential(body, nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 10)))

    unified = UnifiedClassifier(net(), net(), nn.Linear(24, 10), features="1")
    assert unified.a(X).shape == (24, 12)
    assert UnifiedClassifier(net(), net()).a(X).shape == (24, 6)
    says = "what is cut off at features='1' is Sequential and Sequential, not one Linear layer each.*; give head"
    with pytest.raises(RecipeError, match=says):
        UnifiedClassifier(net(), net(), features="1")


def test_branches_that_differ_are_refused():
    says = r"A has 80 features and 10 classes, B has 320 and 10; the branches must be of one architecture"
    with pytest.raises(RecipeError, match=says):
        UnifiedClassifier(LightweightCNN(**SMALL), LightweightCNN(size=16, padding=1))
    with pytest.raises(RecipeError, match="A has 80 features and 10 classes, B has 80 and 4"):
        UnifiedClassifier(LightweightCNN(**SMALL), LightweightCNN(4, **SMALL))
    with pytest.raises(RecipeError, match="average=True builds the head itself"):
        UnifiedClassifier(*branches(), nn.Linear(160, 10), average=True)


def saved(folder, module):
    path = folder / "stage1.ckpt"
    fit(module, epochs=1).save_checkpoint(path)
    return str(path)


def test_the_handover_keeps_weights_and_running_statistics(tmp_path):
    module = dual(branch="small_cnn", model_args={"width": 8})
    path = saved(tmp_path, module)
    state = torch.get_rng_state()
    unified = UnifiedClassifier.from_checkpoint(path, average=True).eval()
    for old, new in ((module.a, unified.a), (module.b, unified.b)):
        kept = weights(new)
        assert any("running_mean" in name for name in kept) and "stages.0.1.num_batches_tracked" in kept
        assert all(torch.equal(value, weights(old)[name]) for name, value in kept.items())
    assert unified.a.stages[0][1].num_batches_tracked == 3
    module.eval()
    torch.testing.assert_close(unified(X), (module.a(X) + module.b(X)) / 2)
    torch.set_rng_state(state)
    head = nn.Linear(64, 10)
    torch.set_rng_state(state)
    assert torch.equal(UnifiedClassifier.from_checkpoint(path).head.weight, head.weight), "a draw besides the head's"


def test_a_checkpoint_is_read_without_pickled_code_and_by_lightning(tmp_path):
    module = dual(augment=flipped)
    path = saved(tmp_path, module)
    torch.load(path, weights_only=True)
    again = DualInputOutput.load_from_checkpoint(path, weights_only=True)
    assert same(weights(again), weights(module))


def test_a_branch_of_the_users_own_is_given_again(tmp_path):
    def build():
        return LightweightCNN(**SMALL)

    module = dual(branch=build, model_args=None)
    path = saved(tmp_path, module)
    with pytest.raises(RecipeError, match="stage 1 was not given its branch by name; give the same as branch="):
        UnifiedClassifier.from_checkpoint(path)
    for branch in (build, build()):
        assert torch.equal(UnifiedClassifier.from_checkpoint(path, branch=branch).b.conv2.weight, module.b.conv2.weight)
    with pytest.raises(RecipeError, match=r"does not fit the branch: .*size mismatch for conv1.weight"):
        UnifiedClassifier.from_checkpoint(path, branch=LightweightCNN(size=8, padding=1, widths=(4, 20)))


def test_a_file_that_is_no_stage_1_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='none.ckpt': no such file \(looked for /.*; it is what stage 1"):
        UnifiedClassifier.from_checkpoint("none.ckpt")
    other = ImageClassifier("lightweight_cnn", model_args=SMALL, in_chans=1)
    path = saved(tmp_path, other)
    with pytest.raises(RecipeError, match="is not a checkpoint of DualInputOutput: it does not hold two branches"):
        UnifiedClassifier.from_checkpoint(path)


def test_unfreezing_wakes_the_same_layer_of_both_branches_zero_biases_too():
    a, b = branches()
    for branch in (a, b):
        nn.init.zeros_(branch.conv1.bias), nn.init.zeros_(branch.conv2.bias)
    module = ImageClassifier(UnifiedClassifier(a, b), optimizer=lambda p: SGD(p, 0.1, momentum=0.9))
    at_epoch = []
    recipe = ProgressiveUnfreezing(groups=GROUPS, at=EveryN(1), lr_scale=None)
    note = Watch(on_train_epoch_start=lambda *_: at_epoch.append(weights(module.net)))
    fit(module, epochs=3, callbacks=[recipe, note])
    at_epoch.append(weights(module.net))
    epochs = itertools.pairwise(at_epoch)
    moved = [{name for name in before if not torch.equal(before[name], after[name])} for before, after in epochs]
    head, conv2 = {"head.weight", "head.bias"}, {f"{b}.conv2.{p}" for b in "ab" for p in ("weight", "bias")}
    assert moved[0] == head
    assert moved[1] == head | conv2
    assert moved[2] == set(at_epoch[0])


def test_a_group_of_layers_without_parameters_warns_and_is_an_empty_step():
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.0), nn.Linear(8, 10))

    module = ImageClassifier(net(), optimizer=lambda p: SGD(p, 0.1))
    at_epoch = []
    note = Watch(on_train_epoch_start=lambda *_: at_epoch.append(weights(module.net)))
    recipe = ProgressiveUnfreezing(groups=["3", ["net.2"], ["0", "1"]], at=EveryN(1), lr_scale=None)
    with pytest.warns(UserWarning, match=r"groups \['net.2'\] have no parameters \(pooling, dropout\): their steps"):
        fit(module, epochs=3, callbacks=[recipe, note])
    at_epoch.append(weights(module.net))
    moved = [not torch.equal(before["1.weight"], after["1.weight"]) for before, after in itertools.pairwise(at_epoch)]
    assert moved == [False, False, True]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no parameters")
        recipe = ProgressiveUnfreezing(groups=["3", ["2", "1", "0"]], at=EveryN(1), lr_scale=None)
        fit(ImageClassifier(net()), epochs=1, callbacks=[recipe])


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_papers_two_configs_run_one_after_the_other(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR, "lightning.pytorch")
    generator = np.random.default_rng(0)
    arrays = {}
    for part, number in (("train", 400), ("test", 20)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(number) % 10
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "images.npz", **arrays)
    little = ["--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
    little += ["--data=ArrayDataModule", "--data.init_args.path=data/images.npz", "--data.init_args.num_workers=0"]
    stages = [f"--config={CONFIGS}/lightweight_cnn_fashion_mnist_stage{stage}.yaml" for stage in (1, 2)]
    assert cli.main(["fit", stages[0], *little]) == 0
    (first,) = (tmp_path / "runs").rglob("*.ckpt")
    assert first == tmp_path / "runs" / "lightweight_cnn_fashion_mnist" / "stage1.ckpt"
    assert cli.main(["fit", stages[1], *little]) == 0
    checkpoints = [path for path in (tmp_path / "runs").rglob("*.ckpt") if path != first]
    assert len(checkpoints) == 1
    state = torch.load(checkpoints[0], weights_only=True)["state_dict"]
    old = torch.load(first, weights_only=True)["state_dict"]
    assert torch.equal(state["net.a.conv1.weight"], old["a.conv1.weight"])  # asleep for five epochs and more
    assert state["net.head.weight"].shape == (10, 1000)
    assert cli.main(["test", stages[1], *little, f"--ckpt_path={checkpoints[0]}"]) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_the_configs_for_mnist_are_those_for_fashion_mnist_on_other_images(stage):
    fashion, mnist = (
        (CONFIGS / f"lightweight_cnn_{images}_stage{stage}.yaml").read_text() for images in ("fashion_mnist", "mnist")
    )
    for old, new in (
        ("FashionMNIST", "MNIST"),
        ("Fashion-MNIST", "MNIST"),
        ("fashion_mnist", "mnist"),
        ("89 %", "99 %"),
    ):
        fashion = fashion.replace(old, new)
    assert mnist == fashion

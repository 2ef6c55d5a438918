"""Images that are hard to learn from: the ascent, the mixture, files for others, and an interrupted build."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image
from torch import Tensor, nn

from lightning_recipes import catalog
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.datamodules import (
    ArrayDataModule,
    CharDataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    LabelledImages,
    UnlearnableDataModule,
    unlearnable,
)
from lightning_recipes.datamodules.unlearnable import Ascent, as_uint8, linf, look, mixture, project_, protect
from lightning_recipes.modules import ImageClassifier
from tests.stock import in_two_ranks, quiet


def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


QUICK = {"epsilon": 0.3, "steps": 3, "lr": 0.1, "surrogate_epochs": 2, "surrogate_batch_size": 16}


def some_digits(count: int = 60) -> tuple[Tensor, Tensor]:
    data = DigitsDataModule()
    data.setup()
    return data.train_set.pixels()[:count].float() / 255, data.train_set.labels[:count]


def digits(tmp_path: Path, **arguments: Any) -> UnlearnableDataModule:
    base = arguments.pop("data", None) or DigitsDataModule(fraction=0.06)
    return UnlearnableDataModule(base, small_net, cache_dir=str(tmp_path), **{**QUICK, **arguments})


def ready(data: UnlearnableDataModule) -> UnlearnableDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def everything(dataset: Any) -> Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("images were protected again")

    monkeypatch.setattr(unlearnable, "protect", refuse)


# -- the ascent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [{"epsilon": 0.0}, {"steps": 0}])
def test_without_a_radius_or_a_step_images_stay_bitwise_what_they_were(nothing: dict[str, Any]) -> None:
    x, y = some_digits()
    made = protect(x, y, 10, small_net, Ascent(**{**QUICK, **nothing}))
    assert torch.equal(made["images"], x) and made["step"] == 0


@pytest.mark.parametrize("layer", [None, "1"])
def test_the_direction_is_the_gradient_of_the_dense_formula_through_the_network(layer: str | None) -> None:
    torch.manual_seed(0)
    x, y = some_digits(40)
    net = small_net().double().eval()
    found = look(net, x.double(), y, 10, Ascent(feature_layer=layer))
    x = x.double().requires_grad_()
    z = net[1](net[0](x)) if layer else net[:3](x)
    z = z / z.abs().max()
    s = torch.exp(-(z[:, None] - z[None]).square().sum(2) / (2 * 0.3**2)) * (1 - torch.eye(40))
    shares = torch.stack([s[:, y == c].sum(1) for c in range(10)], 1) / (s.sum(1, keepdim=True) + 1e-8)
    errors = 1 - shares.max(1).values
    errors.sum().backward()
    assert found.bayes_error == pytest.approx(float(errors.detach().mean()), abs=1e-6)
    assert float(x.grad.abs().max()) > 1e-3
    assert float((found.direction - x.grad).abs().max()) < 1e-5 * float(x.grad.abs().max())
    assert found.accuracy == float((net(x).argmax(1) == y).double().mean())


def test_projection_goes_to_the_ball_and_then_to_the_range_of_pixels() -> None:
    x = torch.tensor([0.9, 0.45, -0.2, 1.3])
    project_(x, torch.tensor([0.5, 0.5, 0.1, 0.9]), 0.25)
    assert x.tolist() == pytest.approx([0.75, 0.45, 0.0, 1.0])


def test_the_ascent_keeps_the_best_of_the_images_that_a_surrogate_was_trained_on() -> None:
    x, y = some_digits(100)
    before, seen = torch.random.get_rng_state(), []
    ascent = Ascent(**{**QUICK, "steps": 5, "retrain_every": 2, "surrogate_epochs": 8})
    made = protect(x, y, 10, small_net, ascent, done=lambda step, values: seen.append((step, values)))
    curve = made["curve"]
    assert curve["fresh"] == [True, False, True, False, True, True]
    assert [step for step, _ in seen] == list(range(6))
    assert [values["bayes_error"] for _, values in seen] == curve["bayes_error"]
    best = max((e, t) for t, (e, fresh) in enumerate(zip(curve["bayes_error"], curve["fresh"])) if fresh and t > 0)
    assert (curve["bayes_error"][made["step"]], made["step"]) == best
    assert best[0] > 1.5 * curve["bayes_error"][0]
    assert curve["linf"][0] == 0 and max(curve["linf"]) == pytest.approx(0.3, abs=1e-6)
    assert 0 < linf(made["images"], x) <= 0.3 + 1e-6
    assert made["images"].min() >= 0 and made["images"].max() <= 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_step_moves_every_pixel_that_has_a_direction_by_the_rate() -> None:
    x, y = some_digits()
    x = 0.25 + x / 2  # away from black and white
    made = protect(x, y, 10, small_net, Ascent(**{**QUICK, "steps": 1, "lr": 0.01}))
    moved = (made["images"] - x).abs()
    assert float((moved > 1e-3).float().mean()) > 0.9
    assert moved[moved > 1e-3].median() == pytest.approx(0.01, rel=0.01) and moved.max() <= 0.01 * 1.001


def test_weight_decay_pulls_towards_black() -> None:
    x, y = torch.full((8, 1, 8, 8), 0.5), torch.arange(8) % 2
    x[::2, :, :2] += 0.1
    with_decay, without = (
        protect(x, y, 10, small_net, Ascent(**{**QUICK, "steps": 1, "lr": 0.01, "weight_decay": decay}))["images"]
        for decay in (1.0, 0.0)
    )
    # AdamW: x (1 - lr decay) + lr direction
    assert torch.allclose(without - with_decay, 0.01 * x, atol=1e-6)


@pytest.mark.parametrize("retrain_every", [1, 3])
@pytest.mark.parametrize("steps_done", [1, 2, 4])
def test_an_ascent_that_was_interrupted_ends_bitwise_as_one_that_was_not(retrain_every: int, steps_done: int) -> None:
    x, y = some_digits()
    ascent = Ascent(**{**QUICK, "steps": 5, "retrain_every": retrain_every, "surrogate_shuffle": True})
    whole = protect(x, y, 10, small_net, ascent)

    class Killed(Exception):
        pass

    kept: list[dict[str, Any]] = []

    def keep(state: dict[str, Any]) -> None:
        kept.append(state)
        if len(kept) == steps_done:
            raise Killed

    with pytest.raises(Killed):
        protect(x, y, 10, small_net, ascent, keep=keep)
    torch.manual_seed(99)
    steps: list[int] = []
    again = protect(x, y, 10, small_net, ascent, kept=kept[-1], done=lambda step, values: steps.append(step))
    assert steps == list(range(steps_done, 6))
    assert torch.equal(again["images"], whole["images"])
    assert again["curve"] == whole["curve"] and again["step"] == whole["step"]


def test_surrogates_train_in_order_and_leave_out_a_batch_of_one_that_batch_norm_could_not_take() -> None:
    x, y = some_digits(65)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))  # noqa: E731
    made = protect(x, y, 10, net, Ascent(**{**QUICK, "steps": 1}))
    assert len(made["curve"]["bayes_error"]) == 2


# -- what cannot be protected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: ((x * 255).byte(), y), r"floating \(N,C,H,W\) in \[0, 1\]; got torch.uint8"),
        (lambda x, y: (x * 2 - 1, y), r"must lie in \[0, 1\]; they are from -1 to 1: give them not normalised"),
        (lambda x, y: (x[:1], y[:1]), "at least 2 images"),
        (lambda x, y: (x, y.float()), "labels torch.float32"),
        (lambda x, y: (x, y + 1), r"labels must be in \[0, 10\); they are from 1 to 10"),
        (lambda x, y: (x[:11], torch.tensor([0] * 10 + [7])), "class 7 has one image; every class needs two"),
    ],
)
def test_images_and_labels_that_cannot_be_protected(change: Callable, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        protect(*change(*some_digits()), 10, small_net, Ascent(**QUICK))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.flat, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Flatten(0), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.flat(x)
        return self.head(self.body(x[:, 0]).mean(1))


@pytest.mark.parametrize(
    ("net", "layer", "says"),
    [
        (small_net, "9", "'9' is no part of Sequential"),
        (Tokens, "unused", "unused was not called"),
        (Tokens, "flat", r"one feature vector a sample; it gave \(128,\) for 2 images"),
        (partial(nn.Flatten, 1), "", "no head|no linear|found"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), None, r"logits \(N,10\); it gave \(2, 3\) for 2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)), "2", "same for all"),
    ],
)
def test_surrogates_that_do_not_do(net: Callable[[], nn.Module], layer: str | None, says: str) -> None:
    def build() -> nn.Module:
        built = net()
        if says == "same for all":
            nn.init.constant_(built[1].bias, -100.0)  # every unit is dead
        return built

    with pytest.raises(RecipeError, match=says):
        protect(*some_digits(), 10, build, Ascent(**QUICK, feature_layer=layer or None))


def test_a_surrogate_that_diverges_is_said() -> None:
    with pytest.raises(RecipeError, match="the features are not finite: the network that gave them has diverged"):
        protect(*some_digits(), 10, small_net, Ascent(**QUICK, surrogate_lr=1e30))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0: must be above 0 and at most 1"),
        ({"epsilon": 8}, "epsilon=8: must be above 0 and at most 1"),
        ({"steps": -1}, "steps=-1: must be an integer of at least 0"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
        ({"sigma": 0.0}, "sigma=0.0: must be above 0"),
        ({"kernel": "linear"}, "kernel='linear': must be 'rbf' or 'sigmoid'"),
        ({"retrain_every": 0}, "retrain_every=0: must be an integer of at least 1"),
        ({"ratio": 1.5}, "ratio=1.5: must be from 0 to 1"),
        ({"mode": "both"}, "mode='both': must be one of 'replace', 'mix'"),
        ({"mode": "clean_only", "ratio": 1.0}, "ratio=1.0: must be another with mode='clean_only'"),
        ({"surrogate": 3}, "surrogate=3: must be a name, a module or a function"),
        ({"surrogate_args": {"depth": 2}}, "surrogate_args=.*: must be None for a surrogate not given by name"),
        ({"feature_layer": ""}, "feature_layer='': must be None or a part's name"),
        ({"data": [1]}, "data=.*: must be a data module"),
    ],
)
def test_bad_arguments_are_one_error(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        UnlearnableDataModule(**{"data": DigitsDataModule(), "surrogate": small_net, **arguments})


def test_data_that_are_no_images_in_pixels_are_refused(tmp_path: Path) -> None:
    class Floats(DigitsDataModule):
        def load(self) -> Any:
            sets = super().load()
            images = sets.train.pixels().float()
            sets.train = LabelledImages([(image / 255, 0) for image in images[:40]], sets.train.labels[:40])
            return sets

    for data, says in (
        (
            digits(tmp_path, data=Floats()),
            "read as float32; they must be uint8 pixels, with transforms, mean and std given",
        ),
        (digits(tmp_path, data=digits(tmp_path, steps=1)), "is ProtectedImages and must be LabelledImages"),
        (digits(tmp_path, data=CharDataModule()), "has no labelled train_set|is .* and must be LabelledImages"),
    ):
        with pytest.raises(ValueError, match=says):
            ready(data)


# -- the mixture -----------------------------------------------------------------------------------------------------


def test_the_mixture_is_drawn_once_and_a_larger_ratio_holds_the_smaller_one() -> None:
    some, more = mixture(5000, 0.1, 123), mixture(5000, 0.5, 123)
    assert some.float().mean() == pytest.approx(0.1, abs=0.02) and more.float().mean() == pytest.approx(0.5, abs=0.02)
    assert bool(more[some].all()) and torch.equal(more, mixture(5000, 0.5, 123))
    assert not torch.equal(more, mixture(5000, 0.5, 124))
    assert not mixture(50, 0.0, 123).any() and mixture(50, 1.0, 123).all()


def test_all_modes_read_one_build_and_share_one_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = ready(digits(tmp_path, mode="replace"))
    base, (build,) = replace.data, list(tmp_path.glob("*.pt"))
    clean, drawn = base.train_set, mixture(len(base.train_set), 0.5, 123)
    assert replace.protected.all() and not torch.equal(everything(replace.train_set), everything(clean))
    assert 0.09 < linf(everything(replace.train_set), everything(clean)) <= 0.3 + 1e-6
    assert replace.curve["fresh"] == [True] * 4

    monkeypatch.setattr(unlearnable, "protect", None)  # would fail
    mix, clean_only, protected_only = (
        ready(digits(tmp_path, mode=mode)) for mode in ("mix", "clean_only", "protected_only")
    )
    assert list(tmp_path.glob("*.pt")) == [build]
    assert torch.equal(mix.protected, drawn) and not clean_only.protected.any() and protected_only.protected.all()
    assert torch.equal(everything(mix.train_set)[drawn], everything(replace.train_set)[drawn])
    assert torch.equal(everything(mix.train_set)[~drawn], everything(clean)[~drawn])
    assert torch.equal(everything(clean_only.train_set), everything(clean)[~drawn])
    assert torch.equal(everything(protected_only.train_set), everything(replace.train_set)[drawn])
    for data, labels in (
        (mix, clean.labels),
        (clean_only, clean.labels[~drawn]),
        (protected_only, clean.labels[drawn]),
    ):
        assert torch.equal(data.train_set.labels, labels)
        batch = torch.cat([x for x, _ in data.evaluation_loader(data.train_set)])  # a batch at once
        assert torch.equal(batch, everything(data.train_set))
        assert torch.equal(everything(data.val_set), everything(data.data.val_set))
    assert not ready(digits(tmp_path, mode="mix", ratio=0.0)).protected.any()


def test_without_protection_the_data_are_the_other_ones_untouched(tmp_path: Path, no_build: None) -> None:
    for arguments in ({"ratio": 0.0}, {"steps": 0}, {"steps": 0, "mode": "replace"}):
        data = ready(digits(tmp_path, **arguments))
        assert data.train_set is data.data.train_set and not data.protected.any() and data.curve == {}
    assert list(tmp_path.iterdir()) == []


def test_transforms_and_normalisation_come_after_the_protection(tmp_path: Path) -> None:
    seen = []

    def flip(image: Tensor) -> Tensor:
        seen.append(image.dtype)
        return image.flip(-1)

    plain = ready(digits(tmp_path, mode="mix"))
    base = DigitsDataModule(fraction=0.06, train_transform=flip, mean=[0.5], std=[0.25])
    turned = ready(digits(tmp_path, data=base, mode="mix"))
    assert len(list(tmp_path.glob("*.pt"))) == 1, "pixels are the same before them"
    assert torch.equal(everything(turned.train_set), (everything(plain.train_set).flip(-1) - 0.5) / 0.25)
    assert seen == [torch.float32 if protected else torch.uint8 for protected in turned.protected]
    assert torch.equal(everything(turned.plain_train_set), (everything(plain.train_set) - 0.5) / 0.25)
    batch = next(iter(turned.train_dataloader()))
    assert batch[0].shape == (64, 1, 8, 8)


def test_images_that_are_read_are_copies(tmp_path: Path) -> None:
    data = ready(digits(tmp_path, mode="replace"))
    image = data.train_set[0][0].clone()
    data.train_set[0][0].zero_()
    assert torch.equal(data.train_set[0][0], image)


# -- the build -------------------------------------------------------------------------------------------------------


def test_other_images_and_other_arguments_are_other_builds(tmp_path: Path) -> None:
    for arguments in (
        {},
        {"ratio": 0.2, "batch_size": 8},  # no other build
        {"data": DigitsDataModule(fraction=0.08)},
        {"epsilon": 0.2},
        {"seed": 5},
        {"surrogate_epochs": 1},
    ):
        ready(digits(tmp_path, steps=1, **arguments))
    assert len(list(tmp_path.glob("*.pt"))) == 5
    wider = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 17), nn.ReLU(), nn.Linear(17, 10))  # noqa: E731
    ready(
        UnlearnableDataModule(DigitsDataModule(fraction=0.06), wider, cache_dir=str(tmp_path), **{**QUICK, "steps": 1})
    )
    assert len(list(tmp_path.glob("*.pt"))) == 6


def test_a_build_that_was_interrupted_goes_on_from_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ready(digits(tmp_path / "whole", mode="replace"))
    steps: list[int] = []
    original = unlearnable.protect

    def killed_after_two(*args: Any) -> Any:
        *others, done = args

        def count(step: int, values: Any) -> None:
            steps.append(step)
            done(step, values)
            if steps == [0, 1, 2]:
                raise KeyboardInterrupt

        return original(*others, count)

    monkeypatch.setattr(unlearnable, "protect", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        digits(tmp_path, mode="replace").prepare_data()
    assert [each.name.endswith(".unfinished.pt") for each in tmp_path.glob("*.pt")] == [True]
    again = ready(digits(tmp_path, mode="replace"))
    assert steps == [0, 1, 2, 2, 3], "the step that was not kept is done again"
    assert torch.equal(everything(again.train_set), everything(whole.train_set)) and again.curve == whole.curve
    assert [each.name.endswith(".unfinished.pt") for each in tmp_path.glob("*.pt")] == [False]


def test_a_fit_builds_logs_every_step_and_draws_what_it_draws_without_a_build(tmp_path: Path) -> None:
    found = []
    for _ in ("built", "read"):
        logger = pl.loggers.CSVLogger(tmp_path, version=len(found))
        torch.manual_seed(0)
        module = ImageClassifier(small_net(), optimizer=partial(torch.optim.SGD, lr=0.1))
        torch.manual_seed(1)
        quiet(max_epochs=1, logger=logger).fit(module, datamodule=digits(tmp_path, mode="mix"))
        found.append((module.state_dict(), torch.random.get_rng_state()))
        logger.save()
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert all(f"unlearnable/{name}" in rows for name in ("bayes_error", "linf", "surrogate_accuracy"))
    assert "unlearnable" not in (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text()
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values()))
    assert torch.equal(found[0][1], found[1][1])


def _rank(rank: int, folder: Path) -> None:
    data = digits(folder, mode="mix", batch_size=8)
    module = ImageClassifier(small_net(), optimizer=partial(torch.optim.SGD, lr=0.1))
    fit = quiet(devices=2, strategy="ddp", plugins=LightningEnvironment(), num_sanity_val_steps=1)
    fit.fit(module, datamodule=data)
    torch.save((everything(data.train_set), data.protected, data.curve), folder / f"rank{rank}.saved")


@pytest.mark.ddp
def test_two_ranks_train_on_one_build_and_one_draw(tmp_path: Path) -> None:
    alone = ready(digits(tmp_path / "alone", mode="mix"))
    in_two_ranks(_rank, tmp_path)
    for rank in range(2):
        images, protected, curve = torch.load(tmp_path / f"rank{rank}.saved")
        assert torch.equal(images, everything(alone.train_set))
        assert torch.equal(protected, alone.protected) and curve == alone.curve
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_an_evaluation_waits_for_no_build(tmp_path: Path, no_build: None) -> None:
    data = digits(tmp_path)
    module = ImageClassifier(small_net())
    quiet().validate(module, datamodule=data, verbose=False)
    assert data.train_set is None and len(data.test_set) > 0
    with pytest.raises(AssertionError, match="protected again"):
        quiet().fit(module, datamodule=data)


def test_a_resume_with_other_protected_images_is_refused_and_one_on_the_other_half_is_not(tmp_path: Path) -> None:
    module = ImageClassifier(small_net())
    first = quiet()
    first.fit(module, datamodule=digits(tmp_path, mode="mix", steps=1))
    first.save_checkpoint(tmp_path / "a.ckpt")
    for other in ({"mode": "mix"}, {"mode": "clean_only"}, {"mode": "protected_only"}):
        data = digits(tmp_path, steps=1, **other)
        quiet(max_epochs=2).fit(module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(RecipeError, match="the protected images are not those of the checkpoint"):
        other = digits(tmp_path, mode="mix", steps=1, epsilon=0.05)
        quiet(max_epochs=2).fit(module, datamodule=other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_no_protection_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_vain(images: Tensor, *args: Any) -> dict[str, Any]:
        return {"images": images, "step": 1, "curve": {"bayes_error": [0.2, 0.1]}}

    monkeypatch.setattr(unlearnable, "protect", in_vain)
    with pytest.warns(UserWarning, match=r"estimated Bayes error of 0\.100, the clean\s+ones of 0\.200: no protection"):
        digits(tmp_path, mode="replace").prepare_data()


@pytest.mark.parametrize("kind", ["name", "module", "lightning"])
def test_surrogates_by_name_as_a_module_and_as_a_lightning_module(tmp_path: Path, kind: str) -> None:
    given = {
        "name": "small_cnn",
        "module": small_net(),
        "lightning": ImageClassifier("small_cnn", in_chans=1),
    }[kind]
    data = UnlearnableDataModule(
        DigitsDataModule(fraction=0.03), given, cache_dir=str(tmp_path), **{**QUICK, "steps": 1, "surrogate_epochs": 1}
    )
    if kind == "module":
        before = [p.clone() for p in given.parameters()]
    assert ready(data).protected.any()
    if kind == "module":
        assert all(torch.equal(a, b) for a, b in zip(before, given.parameters()))


# -- files for others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [8 / 255, 0.1, 0.3])
def test_rounding_stays_within_epsilon_of_the_clean_image(epsilon: float) -> None:
    clean = torch.arange(256, dtype=torch.uint8)
    for direction in (-1, 1):
        moved = (clean / 255 + direction * epsilon).clamp(0, 1)
        rounded = as_uint8(moved, clean, epsilon)
        change = (rounded / 255 - clean / 255).abs()
        assert change.max() <= epsilon + 1e-6
        assert (rounded / 255 - moved).abs().max() <= (0.5 if epsilon == 8 / 255 else 1) / 255 + 1e-6
    assert math.floor(0.1 * 255) == 25 and as_uint8(torch.tensor([0.1]), clean[:1], 0.1).item() == 25  # not 26


def test_png_files_are_read_again_with_their_labels_and_within_epsilon(tmp_path: Path) -> None:
    data = ready(digits(tmp_path / "cache", mode="mix"))
    folder = data.export(tmp_path / "files")
    read = ImageFolderDataModule(str(folder), size=None)
    read.setup()
    assert len(read.train_set) == len(data.train_set) and len(read.test_set) == len(data.test_set)
    order = [int(Path(path).stem) for path, _ in read.train_set.source.samples]
    pixels = torch.empty_like(everything(data.train_set))
    pixels[order] = everything(read.train_set)[:, :1]
    assert torch.equal(read.train_set.labels, data.train_set.labels[order])
    clean, drawn = everything(data.data.train_set), data.protected
    facts = json.loads((folder / "unlearnable.json").read_text())
    assert facts["protected"] == torch.nonzero(drawn).flatten().tolist() and facts["epsilon"] == 0.3
    assert facts["largest_change"] == pytest.approx(linf(pixels, clean))
    assert 0.09 < linf(pixels, clean) <= 0.3
    assert torch.equal(pixels[~drawn], clean[~drawn])
    assert linf(pixels, everything(data.train_set)) <= 1 / 255
    with pytest.raises(FileExistsError, match="train is there already"):
        data.export(tmp_path / "files")


def test_npz_is_read_again_as_it_is(tmp_path: Path) -> None:
    data = ready(digits(tmp_path, mode="replace"))
    path = data.export(tmp_path, "npz")
    read = ArrayDataModule(str(path))
    read.setup()
    assert torch.equal(read.train_set.labels, data.train_set.labels) and read.class_names == data.class_names
    assert linf(everything(read.train_set), everything(data.train_set)) <= 1 / 255
    assert linf(everything(read.train_set), everything(data.data.train_set)) <= 0.3
    assert torch.equal(everything(read.val_set), everything(data.val_set))
    assert np.load(path)["protected"].all()
    with pytest.raises(FileExistsError, match=r"unlearnable\.npz is there already"):
        data.export(tmp_path, "npz")
    with pytest.raises(ValueError, match="format='jpeg': must be 'png' or 'npz'"):
        data.export(tmp_path, "jpeg")
    with pytest.raises(RuntimeError, match="known after setup"):
        digits(tmp_path).export(tmp_path)


def test_classes_keep_their_labels_in_folders_whatever_they_are_called(tmp_path: Path) -> None:
    data = ready(digits(tmp_path / "cache", mode="clean_only"))
    data.class_names = ["zebra", "ant/bee", *"cdefghij"]
    folder = data.export(tmp_path / "files")
    names = sorted(each.name for each in (folder / "train").iterdir())
    assert names[:3] == ["0000_zebra", "0001_ant_bee", "0002_c"]
    number = int(torch.nonzero(data.train_set.labels == 1)[0])
    image = np.asarray(Image.open(folder / "train" / "0001_ant_bee" / f"{number:06d}.png"))
    assert np.array_equal(image, data.train_set.pixels()[number, 0].numpy())


# -- the paper's setting ---------------------------------------------------------------------------------------------


def test_the_papers_config_is_its_experiment() -> None:
    path = catalog.config_folder() / "papers" / "unlearnable_cifar10.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    assert data["class_path"] == "UnlearnableDataModule"
    arguments = data["init_args"]
    assert arguments["epsilon"] == pytest.approx(8 / 255) and arguments["seed"] == 123 and arguments["ratio"] == 0.5

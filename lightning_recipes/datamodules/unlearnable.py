"""Training images that are hard to learn from, by raising their Bayes error.

Zhang, Sun, Lim, Zhang, "Towards Provably Unlearnable Examples via Bayes Error Optimisation", AAAI 2026
(https://arxiv.org/abs/2511.08191). Within an L-infinity ball of radius epsilon around the images x0 in [0, 1], ascend
on the estimated Bayes error of a network's features (`lightning_recipes.core.bayes_error`), for t = 0 .. steps - 1:

    x <- clip(clip(x, x0 - epsilon, x0 + epsilon), 0, 1)
    phi: a fresh surrogate trained on (x, y), without its classifier, in eval mode; every `retrain_every` steps
    z = phi(x) / max |phi(x)|,   e = Bayes error of (z, y)
    x <- AdamW ascent on the sum of e over the samples

and project once more at the end. An error that no classifier can avoid should stay when the images are mixed with clean
ones, where earlier unlearnable examples fail: the paper's experiment draws for every index whether a classifier trains
on the clean or the protected image, and compares with training on the clean part alone.

Where this differs from the authors' code: the estimate under a surrogate that is retrained in between is not monotone,
so the best iterate is kept, by the estimate of a surrogate that was trained on that iterate (one more is trained at the
end); the estimate of a surrogate that was reused counts for nothing, as the ascent games that network. No weight decay
towards black by default. The ascent is on the SUM of errors, as in the code: the gradient of the mean is so small in
large sets that it vanishes beside the 1e-8 in Adam's denominator.

Costs: steps / retrain_every + 1 trainings of the surrogate; every step two passes of it over the images, one of them
with a gradient, and the N x N kernel in blocks, in time O(N^2 d). Five times the images in fp32 are in memory, and in
the file that an interrupted build goes on from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from lightning_recipes.core import random
from lightning_recipes.core.artefacts import Artefact, Content, key_of
from lightning_recipes.core.bayes_error import Kernel, bayes_error, check_tell_apart, max_abs_scaled
from lightning_recipes.core.distributed import active, all_sum, from_rank_zero
from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.base import Derived, require
from lightning_recipes.datamodules.images import LabelledImages
from lightning_recipes.modules.drawn_anew import Net, build_anew

PAPER = Paper(
    "Towards Provably Unlearnable Examples via Bayes Error Optimisation",
    "R. Zhang, J. Sun, E.-P. Lim, P. Zhang",
    2026,
    "https://arxiv.org/abs/2511.08191",
    "https://github.com/cat-claws/unlearnable",
)
PASS = 128
"""Images in a pass through the surrogate that reads features."""
SLACK = 1e-6
"""What rounding may add to epsilon in fp32."""


# -- the ascent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ascent:
    """The numbers of :func:`protect`, as they are explained at `UnlearnableDataModule`."""

    epsilon: float = 8 / 255
    steps: int = 20
    lr: float = 1e-3
    weight_decay: float = 0.0
    sigma: float = 0.3
    kernel: Kernel = "rbf"
    retrain_every: int = 1
    feature_layer: str | None = None
    surrogate_epochs: int = 30
    surrogate_lr: float = 0.1
    surrogate_batch_size: int = 128
    surrogate_shuffle: bool = False
    surrogate_bf16: bool = False
    chunk_size: int = 512
    seed: int = 123


def check_images(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuse what cannot be protected.

    Raises:
        RecipeError: for images that are not floating in [0, 1], labels that are no integers from 0 to num_classes - 1,
            and a class of one sample.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise RecipeError(f"images must be floating (N,C,H,W) in [0, 1]; got {images.dtype} {tuple(images.shape)}")
    if len(images) < 2 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise RecipeError(
            f"needs at least 2 images with one int64 label each; got {len(images)} images and labels {labels.dtype}"
            f" {tuple(labels.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise RecipeError(f"images must lie in [0, 1]; they are from {low:.4g} to {high:.4g}: give them not normalised")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise RecipeError(
            f"labels must be in [0, {num_classes}); they are from {int(labels.min())} to {int(labels.max())}"
        )
    alone = torch.nonzero(labels.bincount() == 1).flatten().tolist()
    if alone:
        raise RecipeError(
            f"class {alone[0]} has one image; every class needs two, as an image is no neighbour of its own"
        )


def train_surrogate(net: nn.Module, images: Tensor, labels: Tensor, ascent: Ascent, order: torch.Generator) -> None:
    """Train a network in place as the paper does: SGD with momentum 0.9 and weight decay 5e-4, a cosine over the
    epochs, no augmentation, and in the order of the samples unless told to shuffle. Ends in eval mode, frozen.

    Args:
        net: images (N,C,H,W) to logits, on the device of the images.
        order: draws the order on the CPU.
    """
    optimizer = SGD(net.parameters(), ascent.surrogate_lr, momentum=0.9, weight_decay=5e-4)
    schedule = CosineAnnealingLR(optimizer, max(ascent.surrogate_epochs, 1))
    net.train()
    for _ in range(ascent.surrogate_epochs):
        for x, y in _batches(images, labels, ascent, order):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=ascent.surrogate_bf16):
                logits = net(x)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)


def _batches(images: Tensor, labels: Tensor, ascent: Ascent, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    size = ascent.surrogate_batch_size
    if ascent.surrogate_shuffle:
        chosen = torch.randperm(len(images), generator=order).to(images.device)
        images, labels = images[chosen], labels[chosen]
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        if len(x) > 1 or size == 1:  # batch norm takes no batch of one
            yield x, y


@torch.no_grad()
def check_surrogate(net: nn.Module, images: Tensor, num_classes: int, feature_layer: str | None) -> None:
    """Run a surrogate on two images, before it is trained.

    Raises:
        RecipeError: when it does not give logits of all classes, for a feature layer that is not there or not called,
            and for features that are not one vector a sample.
    """
    net.eval()
    with _tapped(net, feature_layer) as taps:
        logits = net(images[:2])
        fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == 2 and logits.shape[1] >= num_classes
        if not fits:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise RecipeError(f"the surrogate must give logits (N,{num_classes}); it gave {got} for 2 images")
        _vectors(taps, 2)


@dataclass(frozen=True)
class Look:
    """What a surrogate sees in the images.

    Attributes:
        bayes_error: of the set, estimated on its features.
        accuracy: of the surrogate on the images.
        direction: gradient of the summed errors by the images (N,C,H,W); None where it was not asked for.
    """

    bayes_error: float
    accuracy: float
    direction: Tensor | None


def look(
    net: nn.Module, images: Tensor, labels: Tensor, num_classes: int, ascent: Ascent, direction: bool = True
) -> Look:
    """Estimate the Bayes error of images by a network's features, and which way the images raise it.

    Args:
        net: in eval mode, so that batches do not depend on each other.
        direction: whether the gradient is wanted.

    Raises:
        RecipeError: for features that are not finite, or the same for all samples.
    """
    with _tapped(net, ascent.feature_layer) as taps:
        features, right = [], 0
        with torch.no_grad():
            for x, y in zip(images.split(PASS), labels.split(PASS), strict=True):
                right += (net(x).argmax(1) == y).sum()
                features.append(_vectors(taps, len(x)).float())
        z = torch.cat(features)
        check_tell_apart(z)
        z.requires_grad_(direction)
        errors = bayes_error(
            max_abs_scaled(z), labels, num_classes, ascent.sigma, ascent.kernel, ascent.chunk_size, reduction="none"
        )
        found = None
        if direction:
            (pull,) = torch.autograd.grad(errors.sum(), z)
            parts = []
            for x, of_x in zip(images.split(PASS), pull.split(PASS), strict=True):
                x = x.detach().requires_grad_()
                net(x)
                mine = _vectors(taps, len(x))
                parts += torch.autograd.grad(mine, x, of_x.to(mine.dtype))
            found = torch.cat(parts)
    return Look(float(errors.detach().mean()), float(right) / len(images), found)


def _tapped(net: nn.Module, feature_layer: str | None) -> Taps:
    if feature_layer is None:
        return Taps(net, {"features": (head_input(net)[0], "input")})
    return Taps(net, {"features": (feature_layer, "output")})


def _vectors(taps: Taps, rows: int) -> Tensor:
    found = taps["features"]
    if found.dim() < 2 or len(found) != rows:
        raise RecipeError(
            f"feature_layer must give one feature vector a sample; it gave {tuple(found.shape)} for {rows} images"
        )
    return found.flatten(1)


@torch.no_grad()
def project_(images: Tensor, clean: Tensor, epsilon: float) -> None:
    """Put images back, in place, into the L-infinity ball around the clean ones and into [0, 1]."""
    images.clamp_(clean - epsilon, clean + epsilon).clamp_(0, 1)


def linf(images: Tensor, clean: Tensor) -> float:
    """Largest change of a pixel."""
    return float((images - clean).abs().amax())


def protect(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    surrogate: Callable[[], nn.Module],
    ascent: Ascent,
    device: torch.device | str = "cpu",
    kept: Mapping[str, Any] | None = None,
    keep: Callable[[Content], None] = lambda state: None,
    done: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Content:
    """Raise the Bayes error of images by steps of ascent. The global random state is left alone.

    Args:
        images: floating (N,C,H,W) in [0, 1], not normalised.
        labels: int64 (N,).
        num_classes: classes.
        surrogate: builds a network with weights drawn anew from torch's global generator.
        ascent: the numbers.
        device: where to work.
        kept: what `keep` got last, to go on from there.
        keep: called after every step with all that the next one needs: tensors on the CPU and plain values.
        done: called after every step with its number and what was measured before it: ``bayes_error``, ``linf``,
            ``surrogate_accuracy``.

    Returns:
        ``images``: fp32 on the CPU, of the best iterate; ``step``: its number; ``curve``: what was measured, by name
        one number a step, the last one of the end of the ascent, and ``fresh``, whether the surrogate was trained on
        these very images. Without steps, or with epsilon 0, the images are those given.

    Raises:
        RecipeError: for what :func:`check_images`, :func:`check_surrogate` and :func:`look` refuse.
    """
    check_images(images, labels, num_classes)
    curve: dict[str, list] = {"bayes_error": [], "linf": [], "surrogate_accuracy": [], "fresh": []}
    if ascent.steps == 0 or ascent.epsilon == 0:
        return {"images": images.clone(), "step": 0, "curve": curve}
    device = torch.device(device)
    clean, labels = images.to(device, torch.float32), labels.to(device)
    moving = nn.Parameter(clean.clone())
    optimizer = AdamW([moving], ascent.lr, weight_decay=ascent.weight_decay, maximize=True)
    net, first, best, best_step = None, 0, clean, 0
    if kept is not None:
        curve = {name: list(values) for name, values in kept["curve"].items()}
        first, best, best_step = kept["next"], kept["best"].to(device), kept["best_step"]
        moving.data.copy_(kept["images"])
        optimizer.load_state_dict(kept["optimizer"])
        if kept["surrogate"] is not None:
            net = _on_device(_drawn(surrogate, ascent.seed, 0), clean)
            net.load_state_dict(kept["surrogate"])
            net.eval().requires_grad_(False)
    highest = max([e for e, fresh in list(zip(curve["bayes_error"], curve["fresh"]))[1:] if fresh], default=-1.0)
    for step in range(first, ascent.steps + 1):
        last = step == ascent.steps
        project_(moving, clean, ascent.epsilon)
        fresh = last or step % ascent.retrain_every == 0
        if fresh:
            net = _on_device(_drawn(surrogate, ascent.seed, step), clean)
            check_surrogate(net, clean, num_classes, ascent.feature_layer)
            with random.forked(device, random.key(ascent.seed, "surrogate's training", step)):
                order = random.generator(ascent.seed, "surrogate's order", step)
                train_surrogate(net, moving.detach(), labels, ascent, order)
        found = look(net, moving.detach(), labels, num_classes, ascent, direction=not last)
        values = {
            "bayes_error": found.bayes_error,
            "linf": linf(moving.detach(), clean),
            "surrogate_accuracy": found.accuracy,
        }
        for name, value in {**values, "fresh": fresh}.items():
            curve[name].append(value)
        if fresh and step > 0 and found.bayes_error > highest:
            highest, best, best_step = found.bayes_error, moving.detach().clone(), step
        done(step, values)
        if last:
            break
        moving.grad = found.direction
        optimizer.step()
        reused = (step + 1) % ascent.retrain_every != 0 and step + 1 < ascent.steps
        keep(
            {
                "images": _on_cpu(moving),
                "optimizer": _on_cpu(optimizer.state_dict()),
                "best": best.cpu(),
                "best_step": best_step,
                "curve": {name: list(values) for name, values in curve.items()},
                "next": step + 1,
                "surrogate": _on_cpu(net.state_dict()) if reused else None,
            }
        )
    return {"images": best.cpu(), "step": best_step, "curve": curve}


def _drawn(surrogate: Callable[[], nn.Module], seed: int, step: int) -> nn.Module:
    with random.forked(torch.device("cpu"), random.key(seed, "surrogate", step)):
        net = surrogate()
        if isinstance(net, LightningModule):
            net.configure_model()
    return net


def _on_device(net: nn.Module, images: Tensor) -> nn.Module:
    wide = images.device.type == "cuda"  # twice as fast there
    return net.to(images.device, memory_format=torch.channels_last if wide else torch.preserve_format)


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {name: _on_cpu(value) for name, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


# -- the mixture, and files for others -------------------------------------------------------------------------------


def mixture(count: int, ratio: float, seed: int) -> Tensor:
    """Which samples of the mixture are protected, bool (count,): each with probability `ratio`.

    A function of the seed and a sample's index alone: the same on all ranks, and of a smaller ratio part of a larger's.
    """
    return random.uniform(random.key(seed, "unlearnable mixture"), torch.arange(count), ()) < ratio


def as_uint8(images: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    """Protected images rounded to uint8, within epsilon of the clean ones after it too.

    Args:
        images: fp32 in [0, 1].
        clean: uint8, of the same shape.
        epsilon: in units of [0, 1].
    """
    most = int(255 * epsilon + 1e-4)  # whole grey levels
    clean = clean.to(torch.int16)
    rounded = images.mul(255).round().to(torch.int16)
    return rounded.clamp(clean - most, clean + most).clamp_(0, 255).to(torch.uint8)


class ProtectedImages(LabelledImages):
    """A set of labelled images with other pixels in some samples, fp32 in [0, 1]; the transform sees those.

    Args:
        of: the set.
        pixels: fp32 (M,C,H,W).
        rows: (N,), each sample's row in `pixels`, -1 where it keeps its own image.
    """

    def __init__(self, of: LabelledImages, pixels: Tensor, rows: np.ndarray) -> None:
        vars(self).update(vars(of))
        self.replaced, self.rows = pixels, np.asarray(rows)

    @property
    def protected(self) -> Tensor:
        """Which samples have other pixels, bool (N,)."""
        return torch.from_numpy(self.rows >= 0)

    def select(self, indices: np.ndarray) -> ProtectedImages:
        chosen = super().select(indices)
        chosen.rows = self.rows[np.asarray(indices)]
        return chosen

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        if row < 0:
            return super().__getitem__(index)
        image = self.replaced[row].clone()
        return self._finish(image if self.transform is None else self.transform(image)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        if self.transform is not None or not isinstance(self.source, Tensor):
            return [self[i] for i in indices]
        chosen = self.select(np.asarray(indices))
        images, replaced = chosen.pixels().float().div_(255), chosen.protected
        images[replaced] = self.replaced[torch.from_numpy(chosen.rows)[replaced]]
        return list(zip(self._finish(images), chosen.labels, strict=True))


# -- the data module -------------------------------------------------------------------------------------------------


class UnlearnableDataModule(Derived):
    """Trains on images of another data module that are protected from being learned from, on their clean originals, or
    on a mixture of both; validates and tests on clean ones.

    The protected images are made once, of the whole training set of ``data``, when a fit with this data is prepared: on
    one process, while the other ranks wait. They are kept in ``cache_dir`` under a name that depends on the images and
    on every argument but those of the mixture, so that all modes, ratios and runs share them. A build that is
    interrupted goes on from its last step of ascent. What a step measures (``bayes_error``, ``linf`` and
    ``surrogate_accuracy``) goes to the Trainer's loggers under ``unlearnable/`` by the number of the step while images
    are made, and stays in ``curve``.

    Transforms and normalisation of ``data`` act on the protected images, which are fp32 in [0, 1] then (clean ones are
    uint8 as ever). The protected images are not rounded to grey levels, unless they are saved for others
    (:meth:`export`). The surrogate sees images as they are before transforms and normalisation.

    The paper's comparison is "mix" against "clean_only" with the same seed, which trains on the clean half of the same
    draw. Its second protocol is a fit on "clean_only" and a shorter one on "protected_only" from its weights.

    Args:
        data: the data module to take images from, with their splits, transforms and normalisation. Its own loaders are
            not used. Its training set must be labelled images.
        surrogate: the network whose features tell the Bayes error: a name as of `ImageClassifier`, a function that
            builds it, or a module from images (N,C,H,W) to logits, also a LightningModule, which is copied and drawn
            anew by its layers' ``reset_parameters``; of a LightningModule only ``forward`` is used.
        surrogate_args: further arguments of a surrogate by name.
        feature_layer: the part of the surrogate whose output, flattened, are the features; None for the input of its
            last linear layer.
        epsilon: largest change of a pixel, of an image in [0, 1].
        steps: of ascent; 0 leaves the images as they are. The paper's code has 2 or 2000.
        lr: of AdamW on the images; the first steps move every pixel by about it.
        weight_decay: of AdamW; 0.01 is the code's, and pulls pixels towards black.
        sigma: width of the kernel, of features whose largest absolute value is 1.
        kernel: 'rbf', or 'sigmoid' of the features' inner product.
        retrain_every: train a new surrogate every so many steps; 1 is the paper's.
        surrogate_epochs: of a surrogate's training.
        surrogate_lr: at its start, of SGD with momentum 0.9, weight decay 5e-4 and a cosine.
        surrogate_batch_size: of its batches.
        surrogate_shuffle: shuffle its images every epoch. The paper's code does not, which is no good where the
            training set is sorted by class.
        surrogate_bf16: train surrogates in bf16 mixed precision. Features and kernel are in fp32 in any case.
        chunk_size: rows of the kernel in memory at a time; less for large sets (32 for 50,000 images on a small GPU).
        ratio: share of protected images in the mixture.
        mode: 'replace' trains on all images protected; 'mix' draws once for every image whether it is protected;
            'clean_only' and 'protected_only' leave out the other part of that draw.
        cache_dir: folder of the protected images, seen by all processes; None for ``lightning_recipes/unlearnable`` in
            the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).
        device: where the images are made; 'auto' for the device of the Trainer's rank 0, or without a Trainer a GPU if
            there is one.
        seed: of the mixture, the surrogates and (with the global seed) the order of training.
        **kwargs: those of `DataModule`: batch_size, num_workers, pin_memory, persistent_workers, drop_last.

    Attributes:
        protected: which of the training samples are protected, bool (N,); known after ``setup``.
        curve: what the build measured, by name one number a step; ``fresh`` says whether the surrogate had been trained
            on the images of that step, and only such estimates count. Empty where nothing is protected.

    Raises:
        ValueError: for bad arguments; when a fit is prepared or set up, for training data that are no labelled images
            in uint8, labels that do not go from 0 to the number of classes, a class of one image, and a surrogate that
            does not give logits or has no such feature layer.
    """

    paper = PAPER
    does = (
        "Perturbs training images within a small ball so that they are hard to learn from; mixes them with clean ones."
    )
    use_when = "You publish images that others should not train on, or want to measure what such a protection is worth."
    costs = "steps / retrain_every + 1 trainings of a surrogate and N x N kernels, once; then nothing."
    purpose = "data"

    def __init__(
        self,
        data: LightningDataModule,
        surrogate: Net,
        surrogate_args: dict[str, Any] | None = None,
        feature_layer: str | None = None,
        epsilon: float = 8 / 255,
        steps: int = 20,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        sigma: float = 0.3,
        kernel: Kernel = "rbf",
        retrain_every: int = 1,
        surrogate_epochs: int = 30,
        surrogate_lr: float = 0.1,
        surrogate_batch_size: int = 128,
        surrogate_shuffle: bool = False,
        surrogate_bf16: bool = False,
        chunk_size: int = 512,
        ratio: float = 0.5,
        mode: Literal["replace", "mix", "clean_only", "protected_only"] = "mix",
        cache_dir: str | None = None,
        device: str = "auto",
        seed: int = 123,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, seed=seed, **kwargs)
        named = isinstance(surrogate, str)
        require(named or callable(surrogate), "surrogate", surrogate, "a name, a module or a function that builds one")
        require(named or not surrogate_args, "surrogate_args", surrogate_args, "None for a surrogate not given by name")
        require(feature_layer is None or bool(feature_layer), "feature_layer", feature_layer, "None or a part's name")
        require(0 < epsilon <= 1, "epsilon", epsilon, "above 0 and at most 1, of images in [0, 1]")
        require(steps >= 0, "steps", steps, "an integer of at least 0")
        require(lr > 0, "lr", lr, "above 0")
        require(0 <= weight_decay < 1 / lr, "weight_decay", weight_decay, "at least 0 and below 1 / lr")
        require(sigma > 0, "sigma", sigma, "above 0")
        require(kernel in ("rbf", "sigmoid"), "kernel", kernel, "'rbf' or 'sigmoid'")
        require(surrogate_lr > 0, "surrogate_lr", surrogate_lr, "above 0")
        for name, value in (
            ("retrain_every", retrain_every),
            ("surrogate_epochs", surrogate_epochs),
            ("surrogate_batch_size", surrogate_batch_size),
            ("chunk_size", chunk_size),
        ):
            require(value >= 1, name, value, "an integer of at least 1")
        require(0 <= ratio <= 1, "ratio", ratio, "from 0 to 1")
        modes = ("replace", "mix", "clean_only", "protected_only")
        require(mode in modes, "mode", mode, "one of " + ", ".join(map(repr, modes)))
        empty = {("clean_only", 1), ("protected_only", 0)}
        require((mode, ratio) not in empty, "ratio", ratio, f"another with mode={mode!r}, which leaves no image")
        self.surrogate, self.surrogate_args = surrogate, surrogate_args
        self.ascent = Ascent(
            epsilon,
            steps,
            lr,
            weight_decay,
            sigma,
            kernel,
            retrain_every,
            feature_layer,
            surrogate_epochs,
            surrogate_lr,
            surrogate_batch_size,
            surrogate_shuffle,
            surrogate_bf16,
            chunk_size,
            seed,
        )
        self.ratio, self.mode, self.cache_dir, self.device = ratio, mode, cache_dir, device
        self.curve: dict[str, list] = {}
        self._fitting = True
        self._of_images: str | None = None

    @property
    def protected(self) -> Tensor:
        """Which of the training samples are protected, bool (N,)."""
        if self.train_set is None:
            raise RuntimeError("UnlearnableDataModule: protected is known after setup()")
        return getattr(self.train_set, "protected", torch.zeros(len(self.train_set), dtype=torch.bool))

    def prepare_data(self) -> None:
        super().prepare_data()
        if self.trainer is None or self.trainer.state.fn == "fit":
            self.data.setup("fit")
            self._content()

    def setup(self, stage: str | None = None) -> None:
        self._fitting = stage in (None, "fit")
        super().setup(stage)

    def derive(self) -> None:
        self.val_set, self.test_set = self.data.val_set, self.data.test_set
        if not self._fitting:  # an evaluation waits for no images that it does not read
            return
        source, content = self.data.train_set, self._content()
        drawn, found = self._drawn(source), source
        if content is not None:
            self._of_images = key_of(content["images"])
            self._same_on_all_ranks()
            self.curve = content["curve"]
            rows = np.where(drawn.numpy(), np.arange(len(source)), -1)
            found = ProtectedImages(source, content["images"], rows)
        if self.mode in ("clean_only", "protected_only"):
            kept = drawn if self.mode == "protected_only" else ~drawn
            if not bool(kept.any()):
                raise ValueError(f"mode={self.mode!r}, ratio={self.ratio}: leaves no image to train on")
            found = found.select(torch.nonzero(kept).flatten().numpy())
        self.train_set = found

    def state_dict(self) -> dict[str, Any]:
        return {"images": self._of_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        then, now = state_dict["images"], self._of_images
        if None not in (then, now) and then != now:
            raise RecipeError(
                "UnlearnableDataModule: the protected images are not those of the checkpoint; resume with its"
                " arguments, its data and its cache_dir, or start a new fit from its weights"
            )

    def export(self, folder: str | os.PathLike, format: Literal["png", "npz"] = "png") -> Path:
        """Save the images as they are trained on in this mode, for other programs; of val and test the clean ones.

        Pixels are rounded to 256 grey levels, which moves each by at most 0.5/255 (1/255 where epsilon is no whole
        number of grey levels, as what reaches beyond it goes back to the next level): the finest part of the
        protection is lost, and training on the files is not quite training on ``train_set``. No pixel is further than
        epsilon from the clean one in the files either; this is checked. Transforms and normalisation are not applied.

        Args:
            folder: is made; must not hold images of an earlier export.
            format: 'png' makes ``train/CLASS/NUMBER.png`` (and val, test) for `ImageFolderDataModule`; classes whose
                names are not in alphabetical order are numbered, so that they keep their labels. 'npz' makes
                ``unlearnable.npz`` for `ArrayDataModule`, which also has ``protected``, bool (N,).

        Returns:
            the folder of 'png', which also has ``unlearnable.json`` (epsilon, the largest change, numbers of the
            protected images), or the file.

        Raises:
            RuntimeError: before ``setup``.
            FileExistsError: when there are images already.
        """
        require(format in ("png", "npz"), "format", format, "'png' or 'npz'")
        protected = self.protected
        images, change = self._rounded()
        parts = {"train": images}
        parts |= {name: each.pixels() for name in ("val", "test") if (each := getattr(self, f"{name}_set")) is not None}
        labels = {name: getattr(self, f"{name}_set").labels for name in parts}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if format == "npz":
            return _save_npz(folder / "unlearnable.npz", parts, labels, self.class_names, protected)
        numbers = torch.nonzero(protected).flatten().tolist()
        facts = {"epsilon": self.ascent.epsilon, "largest_change": change, "protected": numbers}
        return _save_pngs(folder, parts, labels, self.class_names, facts)

    def _rounded(self) -> tuple[Tensor, float]:
        """The training images as uint8 (N,C,H,W), and their largest change."""
        clean, chosen = self.train_set.pixels(), self.protected
        if not bool(chosen.any()):
            return clean, 0.0
        images = self.train_set.replaced[torch.from_numpy(self.train_set.rows)[chosen]]
        found = clean.clone()
        found[chosen] = as_uint8(images, clean[chosen], self.ascent.epsilon)
        change = linf(found.float() / 255, clean.float() / 255)
        self._check_bound(change)
        return found, change

    def _check_bound(self, change: float) -> None:
        if change > self.ascent.epsilon + SLACK:
            raise RecipeError(
                f"UnlearnableDataModule: an image is {change:.5f} from the clean one, more than"
                f" epsilon={self.ascent.epsilon}"
            )

    # -- making them -----------------------------------------------------------------------------------------------

    def _drawn(self, source: LabelledImages) -> Tensor:
        if self.mode == "replace":
            return torch.ones(len(source), dtype=torch.bool)
        return mixture(len(source), self.ratio, self.seed)

    def _content(self) -> Content | None:
        """The protected images, made if they are not there yet; None where nobody asks for any."""
        source = self.data.train_set
        if not isinstance(source, LabelledImages) or isinstance(source, ProtectedImages):
            raise ValueError(
                f"data={type(self.data).__name__}: its training set is {type(source).__name__} and must be"
                " LabelledImages, whose transforms and normalisation come after the protection"
            )
        nothing = self.mode == "clean_only" or (self.mode == "mix" and self.ratio == 0) or self.ascent.steps == 0
        if nothing:
            return None
        pixels, classes = source.pixels(), self.data.num_classes

        def build() -> nn.Module:
            return build_anew(self.surrogate, classes, pixels.shape[1], self.surrogate_args, "surrogate")

        with speaking_for(self):
            artefact = self._artefact(pixels, source.labels, build)
            return artefact.get(lambda kept: self._make(artefact, pixels.float() / 255, source.labels, build, kept))

    def _artefact(self, pixels: Tensor, labels: Tensor, build: Callable[[], nn.Module]) -> Artefact:
        first = _drawn(build, self.seed, 0)  # its layers and first weights stand for the function that builds it
        made_from = {
            "images": pixels,
            "labels": labels,
            "ascent": asdict(self.ascent),
            "surrogate": re.sub(r"0x[0-9a-f]+", "", repr(first)),
            "weights": dict(first.state_dict()),
        }
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = self.cache_dir or os.path.join(cache, "lightning_recipes", "unlearnable")
        return Artefact(os.path.expandvars(os.path.expanduser(folder)), "unlearnable", made_from)

    def _make(
        self,
        artefact: Artefact,
        images: Tensor,
        labels: Tensor,
        build: Callable[[], nn.Module],
        kept: Content | None,
    ) -> Content:
        trainer = self.trainer
        shown = trainer is None or (
            trainer.progress_bar_callback is not None and trainer.progress_bar_callback.is_enabled
        )
        first = 0 if kept is None else kept["next"]
        total = self.ascent.steps + 1
        with tqdm(initial=first, total=total, desc="protecting images", unit="step", disable=not shown) as bar:

            def done(step: int, values: Mapping[str, float]) -> None:
                bar.set_postfix(bayes_error=f"{values['bayes_error']:.3f}")
                bar.update()
                for logger in [] if trainer is None else trainer.loggers:
                    logger.log_metrics({f"unlearnable/{name}": value for name, value in values.items()}, step=step)

            content = protect(
                images, labels, self.data.num_classes, build, self.ascent, self._where(), kept, artefact.keep, done
            )
        self._check_bound(linf(content["images"], images))
        before, after = content["curve"]["bayes_error"][0], content["curve"]["bayes_error"][content["step"]]
        if after <= before:
            rank_zero_warn(
                f"UnlearnableDataModule: the protected images have an estimated Bayes error of {after:.3f}, the clean"
                f" ones of {before:.3f}: no protection. Take more steps, a larger lr or a larger epsilon"
            )
        return content

    def _where(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _same_on_all_ranks(self) -> None:
        if not active() or self.trainer is None:
            return
        differ = float(from_rank_zero(self._of_images, self.trainer) != self._of_images)
        if float(all_sum(torch.tensor(differ, device=self.trainer.strategy.root_device))):  # an error on all ranks
            raise RecipeError(
                "UnlearnableDataModule: the protected images are not the same on all ranks: cache_dir is not one disk;"
                " give one that all nodes see"
            )


def _save_npz(
    path: Path, parts: Mapping[str, Tensor], labels: Mapping[str, Tensor], class_names: list[str], protected: Tensor
) -> Path:
    if path.exists():
        raise FileExistsError(f"{path} is there already; take another folder or remove it")
    arrays = {f"x_{name}": images.permute(0, 2, 3, 1).numpy() for name, images in parts.items()}
    arrays |= {f"y_{name}": of_part.numpy() for name, of_part in labels.items()}
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        np.savez_compressed(file, **arrays, class_names=np.array(class_names), protected=protected.numpy())
    os.replace(part, path)
    return path


def _save_pngs(
    folder: Path,
    parts: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    class_names: list[str],
    facts: Mapping[str, Any],
) -> Path:
    names = [re.sub(r"[^\w .-]", "_", name) for name in class_names]
    if names != sorted(set(names)):
        names = [f"{label:04d}_{name}" for label, name in enumerate(names)]
    if there := [name for name in parts if (folder / name).exists()]:
        raise FileExistsError(f"{folder / there[0]} is there already; take another folder or remove it")
    for part, images in parts.items():
        for label in labels[part].unique().tolist():
            (folder / part / names[label]).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels[part].tolist())):
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
                folder / part / names[label] / f"{number:06d}.png"
            )
    (folder / "unlearnable.json").write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
    return folder

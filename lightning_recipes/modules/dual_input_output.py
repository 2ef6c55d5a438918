"""Two tiny networks on two views of the same images, joined in one classifier.

Isong, "Building Efficient Lightweight CNN Models", 2025 (https://arxiv.org/abs/2501.15547; no official code). With two
branches A and B of one architecture that share no weight, images x, labels y and an augmentation:

    stage 1 (`DualInputOutput`):   loss = CE(A(x), y) + CE(B(augment(x)), y), each branch with a classifier of its own
    stage 2 (`UnifiedClassifier`): logits = head([f_A(x), f_B(x)]), f the branches without their classifiers

In stage 2 both branches see the original image. Its head is new and is trained first; `ProgressiveUnfreezing` then
wakes the layers below it, the same layer of both branches at once.

Stage 1 is the same as two trainings of one branch each, but for what joins them: clipping by the norm of all gradients,
and a schedule or an early stop that looks at both. It costs two forward and two backward passes; the unified model
costs two branches at inference.
"""

from __future__ import annotations

import copy
import os
import random as python_random
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core import random
from lightning_recipes.core.batch import describe
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Paper
from lightning_recipes.modules.classifier import NOT_SAVED, OptimizedModule
from lightning_recipes.modules.drawn_anew import Net, build_anew

# -- the second view -------------------------------------------------------------------------------------------------


def warp(images: Tensor, degrees: Tensor, scale: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    """Turn, enlarge, move and brighten every image of a batch by its own amount; what comes in from outside is 0.

    Bilinear, as torchvision's ``affine`` with the same numbers. Sampled in float32, also under autocast.

    Args:
        images: floating (N,C,H,W).
        degrees: (N,), clockwise, about the centre.
        scale: (N,), above 1 enlarges.
        shift: (N,2), to the right and down, as shares of width and height.
        gain: (N,), factor on the values, which are not clipped.

    Returns:
        (N,C,H,W) in the dtype of the images.
    """
    height, width = images.shape[-2:]
    with torch.autocast(images.device.type, enabled=False):
        angle = torch.deg2rad(degrees.float())
        cos, sin = angle.cos() / scale.float(), angle.sin() / scale.float()
        # From places in the result to places in the image, both from -1 to 1: the inverse of what is done to the image.
        x, y = shift.float().mul(2).unbind(1)
        back = torch.stack(
            [
                torch.stack([cos, sin * (height / width), -(cos * x + sin * (height / width) * y)], 1),
                torch.stack([-sin * (width / height), cos, sin * (width / height) * x - cos * y], 1),
            ],
            1,
        )
        grid = F.affine_grid(back, [len(images), 1, height, width], align_corners=False)
        warped = F.grid_sample(images.float(), grid, align_corners=False)
        return (warped * gain.float().view(-1, 1, 1, 1)).to(images.dtype)


class AugmentBatch(nn.Module):
    """Random rotation, zoom, translation and brightness, the kinds that the paper names, on a batch on its device.

    Every image has draws of its own. (A transform of torchvision draws once for a whole batch.)

    Args:
        rotation: at most so many degrees either way.
        zoom: scale between 1 - zoom and 1 + zoom.
        translate: at most this share of the width and of the height.
        brightness: factor between 1 - brightness and 1 + brightness.
    """

    def __init__(
        self, rotation: float = 15.0, zoom: float = 0.1, translate: float = 0.1, brightness: float = 0.2
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("rotation", rotation, 180.0),
            ("zoom", zoom, 0.9),
            ("translate", translate, 1.0),
            ("brightness", brightness, 1.0),
        ):
            if not 0 <= value <= most:
                raise RecipeError(f"AugmentBatch: {name} must be between 0 and {most:g}; got {value!r}")
        self.rotation, self.zoom, self.translate, self.brightness = rotation, zoom, translate, brightness

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or not images.is_floating_point():
            raise RecipeError(f"AugmentBatch: images must be floating (N,C,H,W); got {describe(images)}")
        turn, size, right, down, light = torch.rand(5, len(images), device=images.device).mul(2).sub(1)
        return warp(
            images,
            self.rotation * turn,
            1 + self.zoom * size,
            self.translate * torch.stack([right, down], 1),
            1 + self.brightness * light,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in ("rotation", "zoom", "translate", "brightness"))


# -- branches --------------------------------------------------------------------------------------------------------


def classifier_of(branch: nn.Module, features: str = "auto") -> str:
    """Dotted name of the part of a branch whose input are the features: its last Linear layer, or the part named.

    Raises:
        RecipeError: when there is no such part.
    """
    if features == "auto":
        linear = [name for name, part in branch.named_modules() if isinstance(part, nn.Linear)]
        if not linear or not linear[-1]:
            raise RecipeError(
                f"features='auto': {type(branch).__name__} has no Linear layer at its end that could be cut off; give"
                " the name of the part whose input are the features"
            )
        return linear[-1]
    if not features or features not in dict(branch.named_modules()):
        raise RecipeError(
            f"features={features!r}: {type(branch).__name__} has no such part; it has"
            f" {[name for name, _ in branch.named_children()]}"
        )
    return features


def without_classifier(branch: nn.Module, features: str = "auto") -> tuple[nn.Module, nn.Module]:
    """A copy of a branch that ends at its features (N,F), and the classifier that was cut off. The branch is left."""
    name = classifier_of(branch, features)
    copied = copy.deepcopy(branch)
    classifier = copied.get_submodule(name)
    copied.set_submodule(name, nn.Identity())
    return copied, classifier


def check_separate(a: nn.Module, b: nn.Module) -> None:
    """Refuse branches with a weight or a buffer in common.

    Raises:
        RecipeError: names it.
    """
    of_a = {id(t): name for named in (a.named_parameters(), a.named_buffers()) for name, t in named}
    for named in (b.named_parameters(), b.named_buffers()):
        for name, tensor in named:
            if id(tensor) in of_a:
                raise RecipeError(
                    f"A and B share parameters ({of_a[id(tensor)]!r} of A is {name!r} of B); give two copies"
                )


# -- stage 1 ---------------------------------------------------------------------------------------------------------


class DualInputOutput(OptimizedModule):
    """Stage 1: two branches of one architecture, A on the images as they are and B on augmented ones.

    Batches are (images (N,C,H,W), labels (N,)). Logs ``train/loss``, which is trained on, and its parts ``loss_a`` and
    ``loss_b``; for val and test the same over A on clean and B on augmented images, and ``acc_a``, ``acc_b`` on clean
    images, ``acc_a_augmented``, ``acc_b_augmented`` on augmented ones. ``predict_step`` gives both branches'
    probabilities (N,2,num_classes).

    First weights and augmentations depend on ``seed``, the global seed and (augmentations) on epoch, batch and rank,
    and leave the global random state alone. A run that goes on from a checkpoint keeps the seeds it was begun with.

    Args:
        branch: what maps images to logits: a name as of `ImageClassifier`, a function that builds it, or a module,
            which is copied and drawn anew by its layers' ``reset_parameters`` (a pre-trained one keeps nothing). With
            a name the checkpoint holds all that `UnifiedClassifier.from_checkpoint` needs.
        num_classes: classes.
        in_chans: channels of the images, for a branch by name.
        model_args: further arguments of a branch by name, for example size.
        augment: images to augmented images of the same shape, on whole batches on their device; None for
            `AugmentBatch()`. It may draw from torch's, NumPy's and Python's global generators.
        features: 'auto' for the input of the last Linear layer, or the name of the part whose input are the features.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; None for a constant rate.
        lr_interval: "epoch" or "step".
        monitor: what a ReduceLROnPlateau watches.
        seed: of first weights and augmentations, together with the global one.

    Raises:
        RecipeError: for a branch that cannot be drawn anew, has no classifier to cut off or shares weights with the
            other; in the first step for a batch that is not (images, labels) and an augmentation that changes shapes.
    """

    paper = Paper("Building Efficient Lightweight CNN Models", "N. Isong", 2025, "https://arxiv.org/abs/2501.15547")
    does = "Trains two small branches, on original and on augmented images, which UnifiedClassifier joins."
    use_when = "You want a small image classifier, and can train from scratch in two stages."
    costs = "Two networks in training, and both branches at test time."
    purpose = "modules"

    def __init__(
        self,
        branch: Net = "lightweight_cnn",
        num_classes: int = 10,
        in_chans: int = 1,
        model_args: dict[str, Any] | None = None,
        augment: Callable | None = None,
        features: str = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval, monitor=monitor)
        named = isinstance(branch, str)
        self.save_hyperparameters(ignore=[*NOT_SAVED, "augment", *([] if named else ["branch"])])
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: must be at least 2")
        if not named and model_args:
            raise RecipeError("model_args belong to a branch given by name; this one builds itself")
        if not named and not callable(branch):
            raise RecipeError(f"branch must be a name, a module or a function that builds one; got {branch!r}")
        if augment is not None and not callable(augment):
            raise RecipeError(f"augment must be a function of images or None; got {augment!r}")
        self.num_classes, self.features, self.seed = num_classes, features, seed
        self._seeds = (seed, int(os.environ.get("PL_GLOBAL_SEED", 0)))
        branches = []
        for name in "ab":
            with random.forked(torch.device("cpu"), random.key("branch", name, *self._seeds)):
                branches.append(build_anew(branch, num_classes, in_chans, model_args, "branch"))
        self.a, self.b = branches
        check_separate(self.a, self.b)
        for each in branches:
            classifier_of(each, features)  # an error now, not when stage 1 is over
        self.augment = AugmentBatch() if augment is None else augment

    def forward(self, images: Tensor, augmented: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (N,C,H,W) for A, and for B (the same if None), to the logits of each (N,num_classes)."""
        return self.a(images), self.b(images if augmented is None else augmented)

    def losses(self, images: Tensor, augmented: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of A on the images and of B on the augmented ones, in float32."""
        logits_a, logits_b = self(images, augmented)
        return F.cross_entropy(logits_a.float(), labels), F.cross_entropy(logits_b.float(), labels)

    @torch.compiler.disable  # its draws are seeded anew every time, which a graph could not hold
    def augmented(self, images: Tensor, *key: int | str) -> Tensor:
        """The augmented copies of a batch; the same for the same key, on every rank different ones."""
        key = random.key("augment", *self._seeds, self.global_rank, *key)
        with random.forked(images.device, key):
            python_random.seed(key)
            np.random.seed(key & 0xFFFFFFFF)
            made = self.augment(images)
        if not isinstance(made, Tensor) or made.shape != images.shape:
            raise RecipeError(
                f"DualInputOutput: augment must give images of the shape it gets; it got {describe(images)} and gave"
                f" {describe(made)}"
            )
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["augment_seeds"] = list(self._seeds)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A later life of the run may have a global seed of its own.
        self._seeds = tuple(checkpoint.get("augment_seeds", self._seeds))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = images_and_labels(batch)
        loss_a, loss_b = self.losses(images, self.augmented(images, self.current_epoch, batch_idx), labels)
        loss = loss_a + loss_b
        parts = {"train/loss": loss, "train/loss_a": loss_a, "train/loss_b": loss_b}
        self.log_dict(parts, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        images = batch if isinstance(batch, Tensor) else images_and_labels(batch)[0]
        return torch.stack(self(images), 1).softmax(-1)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, loader: int) -> None:
        images, labels = images_and_labels(batch)
        # The same augmented images at every epoch, so that epochs can be compared.
        augmented = self.augmented(images, stage, loader, batch_idx)
        clean, warped = self(images), self(augmented)
        loss_a = F.cross_entropy(clean[0].float(), labels)
        loss_b = F.cross_entropy(warped[1].float(), labels)
        values = {"loss": loss_a + loss_b, "loss_a": loss_a, "loss_b": loss_b}
        for suffix, logits in (("", clean), ("_augmented", warped)):
            for name, each in zip("ab", logits, strict=True):
                values[f"acc_{name}{suffix}"] = (each.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()}, batch_size=len(labels), sync_dist=True)


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The two parts of a batch.

    Raises:
        RecipeError: says what arrived.
    """
    ok = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not ok or batch[0].ndim < 2 or batch[1].ndim < 1 or len(batch[0]) != len(batch[1]):
        raise RecipeError(f"DualInputOutput needs batches (images (N,C,H,W), labels (N,)); got {describe(batch)}")
    return batch[0], batch[1]


# -- stage 2 ---------------------------------------------------------------------------------------------------------


class UnifiedClassifier(nn.Module):
    """Stage 2: both branches without their classifiers on one image, their features joined, one head on top.

    A plain module: train it in any LightningModule, with ``ProgressiveUnfreezing`` and the groups ``[["head"],
    ["a.conv2", "b.conv2"], ["a.conv1", "b.conv1"]]``. Its parts are ``a``, ``b`` and ``head``.

    Args:
        a: the first branch, with its classifier; copied. Weights and running statistics are kept.
        b: the second.
        head: from the features of both (N,F_A+F_B) to logits; None for one new Linear layer.
        features: where a branch ends, as of `DualInputOutput`.
        average: start from the mean of the two old classifiers, weight [W_A, W_B]/2 and bias (b_A + b_B)/2, so that
            the logits are the mean of the branches' logits; False for a head with weights of its own, as in the paper.

    Raises:
        RecipeError: for branches that share parameters or differ in their number of features or classes, and for a
            head that has to be built or averaged from classifiers that are not one Linear layer.
    """

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        head: nn.Module | None = None,
        features: str = "auto",
        average: bool = False,
    ) -> None:
        super().__init__()
        check_separate(a, b)
        if average and head is not None:
            raise RecipeError("UnifiedClassifier: average=True builds the head itself; leave head out")
        (self.a, old_a), (self.b, old_b) = without_classifier(a, features), without_classifier(b, features)
        if isinstance(old_a, nn.Linear) and isinstance(old_b, nn.Linear):
            sizes = [(old.in_features, old.out_features) for old in (old_a, old_b)]
            if sizes[0] != sizes[1]:
                raise RecipeError(
                    f"UnifiedClassifier: A has {sizes[0][0]} features and {sizes[0][1]} classes, B has {sizes[1][0]}"
                    f" and {sizes[1][1]}; the branches must be of one architecture"
                )
        elif head is None:
            raise RecipeError(
                f"UnifiedClassifier: what is cut off at features={features!r} is {type(old_a).__name__} and"
                f" {type(old_b).__name__}, not one Linear layer each, so it does not say how large the head must be;"
                " give head"
            )
        if head is None:
            head = nn.Linear(2 * old_a.in_features, old_a.out_features).to(old_a.weight)
            if average:
                with torch.no_grad():
                    head.weight.copy_(torch.cat([old_a.weight, old_b.weight], 1) / 2)
                    head.bias.zero_()
                    for old in (old_a, old_b):
                        head.bias += 0 if old.bias is None else old.bias / 2
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W), the same for both branches, to logits (N,num_classes)."""
        return self.head(torch.cat([self.a(images), self.b(images)], 1))

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        head: nn.Module | None = None,
        average: bool = False,
        branch: nn.Module | Callable[[], nn.Module] | None = None,
    ) -> UnifiedClassifier:
        """The unified model of the two branches in a checkpoint of `DualInputOutput`, read without unpickling code.

        Args:
            path: the ``.ckpt`` file; ``~`` and ``$VARIABLES`` are expanded.
            head: as of the class.
            average: as of the class.
            branch: the module, or the function that builds it, where stage 1 was not given a name.

        Raises:
            FileNotFoundError: when there is no such file.
            RecipeError: when it is no checkpoint of `DualInputOutput`, or the branch does not fit it.
        """
        full = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
        if not os.path.isfile(full):
            raise FileNotFoundError(f"path={path!r}: no such file (looked for {full}); it is what stage 1 saves")
        saved = torch.load(full, map_location="cpu", weights_only=True)
        state, arguments = saved.get("state_dict", {}), saved.get("hyper_parameters", {})
        states = [{k[2:]: v for k, v in state.items() if k.startswith(f"{name}.")} for name in "ab"]
        if not all(states) or "features" not in arguments:
            raise RecipeError(
                f"path={path!r} is not a checkpoint of DualInputOutput: it does not hold two branches a and b"
            )
        if branch is None and "branch" not in arguments:
            raise RecipeError(f"path={path!r}: stage 1 was not given its branch by name; give the same as branch=")
        branches = []
        for weights in states:
            with random.forked(torch.device("cpu")):  # its first weights are thrown away: no draw for them
                built = build_anew(
                    arguments["branch"] if branch is None else branch,
                    arguments["num_classes"],
                    arguments["in_chans"],
                    arguments["model_args"],
                    "branch",
                )
            try:
                built.load_state_dict(weights)
            except RuntimeError as error:
                raise RecipeError(f"path={path!r} does not fit the branch: {' '.join(str(error).split())}") from error
            branches.append(built)
        return cls(*branches, head=head, features=arguments["features"], average=average)

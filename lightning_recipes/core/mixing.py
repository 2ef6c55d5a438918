"""Mixing the samples of a batch: Mixup and CutMix, with draws that belong to the batch and to nothing else.

    Mixup     x' = l x + (1 - l) x_perm                 y' = l y + (1 - l) y_perm           l ~ Beta(alpha, alpha)
    CutMix    a box of x_perm pasted into x             y' = l' y + (1 - l') y_perm         l' = 1 - box / image

One l, one box and one permutation a batch. Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018
(https://arxiv.org/abs/1710.09412); Yun et al., "CutMix", 2019 (https://arxiv.org/abs/1905.04899).

l and the box are torchvision's (``transforms.v2.MixUp`` and ``CutMix``), drawn from a generator of our own: a box of
sides 2 int(r W / 2) and 2 int(r H / 2), r = sqrt(1 - l), around a pixel, clipped to the image. The partners are not:
torchvision pairs neighbours in a batch, here they are a random permutation, as in both papers' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_recipes.core.batch import get_input, with_input
from lightning_recipes.core.criterion import Call
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.gather import gather
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.core.step import Step


@dataclass(frozen=True)
class Mix:
    """One decision, for a whole batch.

    Attributes:
        share: l or l', what remains of a sample and its label.
        box: (x1, y1, x2, y2) in pixels, the right and lower edge outside; None for Mixup.
        partners: ``[n]`` int64, which sample each is mixed with.
        across_ranks: whether the partners are among the samples of all ranks.
    """

    share: float
    box: tuple[int, int, int, int] | None
    partners: Tensor
    across_ranks: bool = False

    def inputs(self, x: Tensor, other: Tensor) -> Tensor:
        """x' from the inputs ``[n, ...]`` and those of their partners."""
        if self.box is None:
            return other.mul(1.0 - self.share).add_(x.mul(self.share))  # as torchvision computes it
        x1, y1, x2, y2 = self.box
        mixed = x.clone()
        mixed[..., y1:y2, x1:x2] = other[..., y1:y2, x1:x2]
        return mixed

    def targets(self, y: Tensor, other: Tensor) -> Tensor:
        """y' from probabilities ``[n, classes]`` and those of their partners."""
        return self.share * y + (1 - self.share) * other

    def of_partners(self, values: Tensor) -> Tensor:
        """The rows of `values` that belong to each sample's partner; across ranks a collective call."""
        rank, world = rank_and_world() if self.across_ranks else (0, 1)
        places = self.partners[rank::world]  # sample j of rank r of W stands at place j W + r of the global batch
        rows = (places % world) * len(values) + places // world
        everybodys = gather(values) if self.across_ranks else values
        return everybodys[rows.to(values.device, non_blocking=True)]


def mixes_of(step: Step) -> list[Mix]:
    """How this run of a step mixed its batch, in the order in which it did; empty where it did not."""
    return [note for note in step.notes.values() if isinstance(note, Mix)]


def draw(transform: Any, image: Tensor, count: int, generator: torch.Generator, across_ranks: bool = False) -> Mix:
    """Draw a mix.

    Args:
        transform: torchvision's ``v2.MixUp`` or ``v2.CutMix``.
        image: a batch of inputs; its last two dimensions are those of the box.
        count: samples to permute.
        generator: a CPU generator; the global random state ends as it began.
        across_ranks: whether the samples are those of all ranks.
    """
    with _drawing_from(generator):
        decided = transform.make_params([image])
    share = decided["lam_adjusted"] if "box" in decided else decided["lam"]
    return Mix(share, decided.get("box"), torch.randperm(count, generator=generator), across_ranks)


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """What torch draws on the CPU inside comes from this generator."""
    state = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(state)


def as_probabilities(targets: Tensor, logits: Tensor) -> Tensor:
    """Class indices ``[n, ...]`` as probabilities ``[n, classes, ...]`` (an ignored index has none); others as they
    are.

    Under autocast in fp32, where the loss is computed in it; else in the dtype of the logits.
    """
    dtype = torch.float32 if torch.is_autocast_enabled(logits.device.type) else logits.dtype
    if targets.is_floating_point():
        return targets
    classes = torch.arange(logits.shape[1], device=targets.device).view(-1, *[1] * (targets.dim() - 1))
    return (targets[:, None] == classes).to(dtype)


def smooth(probabilities: Tensor, smoothing: float) -> Tensor:
    """(1 - s) y + s / classes, which with cross-entropy is (1 - s) nll + s mean over classes of -log p."""
    return (1 - smoothing) * probabilities + smoothing / probabilities.shape[1]


class Mixing:
    """Mixes a batch in the training step and its targets where the loss is computed.

    Every run of the same batch (a replay, a second pass over a window) mixes it alike.

    Args:
        kind: 'mixup' or 'cutmix'.
        alpha: of Beta(alpha, alpha), positive.
        prob: share of batches that are mixed.
        seed: of all draws.
        across_ranks: take the partners from the batches of all ranks together. Then ranks that share out a batch in
            turn mix as one process would; costs one gather of the batch. All ranks need equally many samples.
    """

    def __init__(
        self, kind: Literal["mixup", "cutmix"], alpha: float, prob: float, seed: int, across_ranks: bool
    ) -> None:
        from torchvision.transforms import v2

        self.kind, self.prob, self.seed, self.across_ranks = kind, prob, seed, across_ranks
        self._transform = (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=alpha)
        self._checked = False

    def inputs(self, recipe: StepRecipe, step: Step, batch: Any) -> Any:
        """The batch with mixed inputs; the first one is checked."""
        x = get_input(batch)
        if not self._checked:
            self._check_inputs(recipe, x)
            self._checked = True
        mix = self._of(recipe, step)
        return batch if mix is None else with_input(batch, mix.inputs(x, mix.of_partners(x)))

    def targets(self, recipe: StepRecipe, step: Step, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets mixed as the inputs of this batch are; as they are where it is not mixed.

        Args:
            logits: ``[n, classes]``, or one a sample for a binary loss.
            targets: class indices ``[n]``, or (binary) one 0 or 1 a sample.

        Returns:
            probabilities of the shape of the logits.

        Raises:
            RecipeError: for targets that cannot be softened.
        """
        mix = self._of(recipe, step)
        if mix is None:
            return targets
        check_targets(recipe, step.call, logits, targets, binary=True)
        return mix.targets(*(as_probabilities(y, logits) for y in (targets, mix.of_partners(targets))))

    def _of(self, recipe: StepRecipe, step: Step) -> Mix | None:
        """The decision for this batch; drawn again, the same, in a replay, whose batch is a mixed one already."""
        if recipe not in step.notes:
            step.notes[recipe] = self._decide(recipe, step, get_input(step.batch))
        return step.notes[recipe]

    def _decide(self, recipe: StepRecipe, step: Step, x: Tensor) -> Mix | None:
        generator = step.generator(recipe, self.seed, self.kind)
        if float(torch.rand((), generator=generator)) >= self.prob:
            return None
        world = rank_and_world()[1] if self.across_ranks else 1
        return draw(self._transform, x, len(x) * world, generator, self.across_ranks)

    def _check_inputs(self, recipe: StepRecipe, x: Tensor) -> None:
        name = type(recipe).__name__
        if self.kind == "cutmix" and x.dim() != 4:
            raise RecipeError(
                f"{name} pastes boxes into images [n, channels, height, width]; the batch's input has shape"
                f" {tuple(x.shape)}"
            )
        if self.kind == "mixup" and not x.is_floating_point():
            raise RecipeError(
                f"{name} averages inputs; the batch's input is {x.dtype}, not floating point (embed tokens first)"
            )
        world = rank_and_world()[1] if self.across_ranks else 1
        if len(x) * world < 2:
            raise RecipeError(f"{name} needs at least 2 samples to mix; the batch has {len(x)}")


def check_targets(recipe: StepRecipe, call: Call, logits: Tensor, targets: Tensor, *, binary: bool = False) -> None:
    """Refuse a loss whose targets cannot be softened; only shapes and types are looked at.

    Args:
        binary: whether one 0 or 1 a sample, for one logit a sample, will do.

    Raises:
        RecipeError: says what arrived.
    """
    name, soft = type(recipe).__name__, targets.is_floating_point()
    if call.classifies and not soft and logits.dim() == 2 and targets.shape == logits.shape[:1]:
        return
    if binary and call.name.startswith("binary_cross_entropy") and targets.numel() == len(targets) == logits.numel():
        return
    if call.classifies and soft:
        raise RecipeError(f"{name} softens class indices; the targets are probabilities {tuple(targets.shape)} already")
    raise RecipeError(
        f"{name} softens the labels of a classification, class indices [n] for logits [n, classes]; {call.name} got"
        f" targets {tuple(targets.shape)} for {tuple(logits.shape)}: several labels a sample, segmentation and"
        " regression are not supported"
    )

"""Mixup and CutMix: train on mixtures of two samples and of their labels.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018 (https://arxiv.org/abs/1710.09412); Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019
(https://arxiv.org/abs/1905.04899).

    Mixup     x' = l x + (1 - l) x_perm                   loss = l L(y) + (1 - l) L(y_perm)       l ~ Beta(alpha, alpha)
    CutMix    x' = x with a box of x_perm pasted in       loss = l' L(y) + (1 - l') L(y_perm)     l' = 1 - box / image

The maths is in ``core.mixing``; l and the box are torchvision's. The module's own step runs on the mixed batch: its
loss sees mixed labels, its metrics the labels of the data set: its training accuracy is one on mixed inputs.

Costs one pass over the inputs. Samples are mixed within the micro-batch of a rank: k accumulated micro-batches are not
one batch of k times the size, and two ranks are one process only with ``across_ranks=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_recipes.core.errors import check_argument
from lightning_recipes.core.mixing import Mixing
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step

_HARD = {
    "NormalizedGD": "its step length assumes hard labels",
    "LOOK": "it looks for neighbours of the same class, which needs hard labels",
    "SupCon": "it pairs samples of the same class, which needs hard labels",
}


class _Mixes(StepRecipe):
    """What the two share: the batch is mixed before the step, its targets where the loss is computed."""

    kind: ClassVar[Literal["mixup", "cutmix"]]
    couples_samples = True
    works_sharded = True
    _mixing: Mixing

    def _keep(
        self, alpha: float, prob: float, from_epoch: int, across_ranks: bool, criterion: str | int | None, seed: int
    ) -> None:
        check_argument(0 <= prob <= 1, self, "prob", prob, "in [0, 1]")
        check_argument(from_epoch >= 0, self, "from_epoch", from_epoch, "at least 0")
        self.alpha, self.prob, self.from_epoch = alpha, prob, from_epoch
        self.across_ranks, self.criterion, self.seed = across_ranks, criterion, seed

    def declare(self, plan: Plan) -> None:
        self._mixing = Mixing(self.kind, self.alpha, self.prob, self.seed, self.across_ranks)
        super().declare(plan)

    def transform_batch(self, step: Step, batch: Any) -> Any:
        return self._mixing.inputs(self, step, batch) if self._mixes(step) else batch

    def transform_targets(self, step: Step, logits: Tensor, targets: Tensor) -> Tensor:
        return self._mixing.targets(self, step, logits, targets) if self._mixes(step) else targets

    def _mixes(self, step: Step) -> bool:
        return step.trainer.current_epoch >= self.from_epoch


class Mixup(_Mixes):
    """Train on convex combinations of pairs of samples and of their labels.

    Inputs are floating-point tensors of any shape; the loss is a classification with class indices, or a binary one
    with one 0 or 1 a sample. The module's metrics go on seeing hard labels.

    Args:
        alpha: of Beta(alpha, alpha); 0 switches the recipe off. 0.2 is the paper's for ImageNet (0.1 to 0.4), 1 its
            for CIFAR-10.
        prob: share of batches that are mixed.
        from_epoch: the first epoch that is mixed, as after a linear probe.
        across_ranks: under DDP, mix with samples of the other ranks too, so that the ranks train as one process on the
            same global batches would. Gathers every batch; all ranks need equally many samples.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        seed: of the draws, which depend on (seed, epoch, batch index) and are the same on every rank.

    Raises:
        RecipeError: for bad arguments; in the first step for integer inputs, a batch of 1, and for targets that are
            soft already, several a sample, or none of classes.
    """

    paper = Paper(
        "mixup: Beyond Empirical Risk Minimization",
        "H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz",
        2018,
        "https://arxiv.org/abs/1710.09412",
        "https://github.com/facebookresearch/mixup-cifar10",
    )
    does = "Trains on convex combinations of pairs of inputs and of their labels."
    use_when = "A classifier is over-confident or overfits, and its inputs can be averaged."
    costs = "One pass over the inputs a step; with across_ranks a gather of the batch."
    kind = "mixup"
    refuses: ClassVar[Mapping[str, str]] = {"CutMix": "both mix the batch and soften its labels", **_HARD}

    def __init__(
        self,
        alpha: float = 0.2,
        prob: float = 1.0,
        from_epoch: int = 0,
        across_ranks: bool = False,
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(0 <= alpha < float("inf"), self, "alpha", alpha, "at least 0 and finite")
        self._keep(alpha, prob, from_epoch, across_ranks, criterion, seed)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 or self.prob == 0


class CutMix(_Mixes):
    """Paste a box of another image into each image, and mix the labels by area.

    Inputs are images ``[n, channels, height, width]``, square or not; the loss is a classification with class indices,
    or a binary one with one 0 or 1 a sample. The module's metrics go on seeing hard labels. The defaults are those with
    which progressive unfreezing was published (arXiv 2507.12269), whose released function takes height for width on
    images that are not square; this one does not.

    Args:
        alpha: of Beta(alpha, alpha), from which the share of the image that stays is drawn.
        prob: share of batches that are mixed; 0 switches the recipe off.
        from_epoch: the first epoch that is mixed, as after a linear probe.
        across_ranks: under DDP, paste from images of the other ranks too, so that the ranks train as one process on the
            same global batches would. Gathers every batch; all ranks need equally many samples.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        seed: of the draws, which depend on (seed, epoch, batch index) and are the same on every rank.

    Raises:
        RecipeError: for bad arguments; in the first step for inputs that are no images, a batch of 1, and for targets
            that are soft already, several a sample, or none of classes.
    """

    paper = Paper(
        "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
        "S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo",
        2019,
        "https://arxiv.org/abs/1905.04899",
        "https://github.com/clovaai/CutMix-PyTorch",
    )
    does = "Pastes a box of another image into each image and mixes the labels by area."
    use_when = "An image classifier overfits little data, as a fine-tuned one does."
    costs = "One pass over the inputs a step; with across_ranks a gather of the batch."
    kind = "cutmix"
    refuses: ClassVar[Mapping[str, str]] = {"Mixup": "both mix the batch and soften its labels", **_HARD}

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 0.5,
        from_epoch: int = 0,
        across_ranks: bool = False,
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(0 < alpha < float("inf"), self, "alpha", alpha, "positive and finite")
        self._keep(alpha, prob, from_epoch, across_ranks, criterion, seed)

    @property
    def neutral(self) -> bool:
        return self.prob == 0

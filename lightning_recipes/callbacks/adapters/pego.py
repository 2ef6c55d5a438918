"""PEGO: a group of orthogonal LoRA adapters for domain generalisation.

Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
Generalization", ECCV 2024 (https://arxiv.org/abs/2407.15085; code https://github.com/JudgingH/PEGO, commit fb8700b).

For the query and the value projection of every attention block, with frozen W and D_i = B_i A_i, i = 1..N:

    q   = W x + b + sum_i D_i x                                   (all N modules always act)
    L_o = sum over blocks and {q, v} of [ sum_i ||W D_i^T||_1 + sum_{i<j} ||D_i D_j^T||_1 ]
    L   = CE + lambda L_o                                          (||.||_1: the plain sum of absolute entries)

Costs no extra pass: N (N + 1) / 2 products of d x r x d a projection and step. Merges into the stock weights at the
end, so it costs nothing at test time. No domain label is needed; equal numbers a domain come from the data
(``DomainDataModule``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_recipes.core.adapters import AdapterRecipe, AdapterSpec
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.select import has_batch_norm
from lightning_recipes.core.step import Step


class _AbsoluteSum(torch.autograd.Function):
    """sum |P Q^T| by batch entry, without keeping the (d, d') product: the sign is computed again for backward.

    Shapes: P ``[m, d, r]``, Q ``[m, d', r]`` to ``[m]``.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        return (p @ q.mT).abs_().sum((1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q = ctx.saved_tensors
        sign = (p @ q.mT).sign_() * grad[:, None, None]
        return sign @ q, sign.mT @ p


def orthogonality(w: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both terms of L_o for one projection, never forming D_i.

    Args:
        w: the frozen weight ``[out, in]``.
        a, b: A_i ``[r, in]`` and B_i ``[out, r]``.

    Returns:
        (preserve, diversify): sum_i ||W D_i^T||_1 and sum_{i<j} ||D_i D_j^T||_1, in fp32.
    """
    with torch.autocast(w.device.type, enabled=False):
        a, b = [x.float() for x in a], [x.float() for x in b]
        with_w, of_pairs = _products(w.float(), a, b)
        return with_w.sum(), of_pairs.sum()


def overlaps(w: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale-free overlaps of one projection: the means of ||W D_i^T||_1 / (||W||_F ||D_i||_F) and of
    ||D_i D_j^T||_1 / (||D_i||_F ||D_j||_F); 0 where an update is 0 and where there are no pairs."""
    a, b, w = [x.detach().float() for x in a], [x.detach().float() for x in b], w.float()
    with_w, of_pairs = _products(w, a, b)
    # ||B A||_F^2 = <A A^T, B^T B>
    norms = [((x @ x.mT) * (y.mT @ y)).sum().clamp_min(0).sqrt().clamp_min(1e-12) for x, y in zip(a, b)]
    scales = [x * y for x, y in combinations(norms, 2)]
    mean_of_pairs = (of_pairs / torch.stack(scales)).mean() if scales else of_pairs.sum()
    return (with_w / (w.norm() * torch.stack(norms))).mean(), mean_of_pairs


def _products(w: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """||W D_i^T||_1 for every i, ``[N]``, and ||D_i D_j^T||_1 for every i < j, ``[N (N - 1) / 2]``."""
    with_w = _AbsoluteSum.apply(w @ torch.stack(list(a)).mT, torch.stack(list(b)))
    if len(a) == 1:
        return with_w, with_w.new_zeros(0)
    # Stacked by hand: indexing with a list would copy the index to the device, and wait, in every step.
    first_a, second_a = (torch.stack(side) for side in zip(*combinations(a, 2)))
    first_b, second_b = (torch.stack(side) for side in zip(*combinations(b, 2)))
    return with_w, _AbsoluteSum.apply(first_b @ (first_a @ second_a.mT), second_b)


class PEGO(AdapterRecipe, StepRecipe):
    """Freeze the network, give its attention a group of LoRA adapters, and keep them orthogonal to it and each other.

    Args:
        rank: r of each adapter.
        groups: N, adapters a projection.
        weight: lambda. It stands on a SUM over d^2 entries, blocks and pairs: scale it by hand for other widths than
            ViT-B's 768.
        target_modules: names of modules, 'all-linear', or roles as one word; None is 'qv', the query and value
            projections of every attention block (split, fused or packed).
        preserve, diversify: use the term against W, and the one between adapters.
        scaling: factor on the updates in the forward pass; L_o is on the plain B A.
        train_fully: what trains beside the adapters; 'head' finds the head.
        merge_on_end: fold the adapters into the stock weights when the fit ends; False keeps them in the module.
        adapter_dir: folder that gets the adapters in peft's format when the fit ends; None writes none.
        seed: of the adapters' first values.

    Raises:
        RecipeError: for bad arguments; in setup when there is no such projection, no head, a frozen head, a packed
            attention that cannot be opened, a quantised or already adapted layer, or a rank above the width.
    """

    paper = Paper(
        "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain"
        " Generalization",
        "J. Hu, J. Zhang, L. Qi, Y. Shi, Y. Gao",
        2024,
        "https://arxiv.org/abs/2407.15085",
        "https://github.com/JudgingH/PEGO",
    )
    does = "Adapts q and v by a group of LoRAs kept orthogonal to the pre-trained weights and to one another."
    use_when = "You fine-tune a pre-trained transformer on some domains and need it on unseen ones."
    costs = "No extra pass; N (N + 1) / 2 thin products a projection and step; nothing at test time."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("GLAD", "SVFit", "SaRA", "LoRA", "MakeElastic"), "both adapt the attention's weights"
    )
    of_weights_alone = True
    owns_training_set = True

    def __init__(
        self,
        rank: int = 4,
        groups: int = 4,
        weight: float = 1e-3,
        target_modules: str | list[str] | None = None,
        preserve: bool = True,
        diversify: bool = True,
        scaling: float = 1.0,
        train_fully: Sequence[str] = ("head",),
        merge_on_end: bool = True,
        adapter_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(rank >= 1, self, "rank", rank, "at least 1")
        check_argument(groups >= 1, self, "groups", groups, "at least 1")
        check_argument(weight >= 0, self, "weight", weight, "at least 0")
        check_argument(scaling > 0, self, "scaling", scaling, "positive")
        some = target_modules is None or len(target_modules) > 0
        check_argument(some, self, "target_modules", target_modules, "None or names of at least one module")
        check_argument(not isinstance(train_fully, str), self, "train_fully", train_fully, "a list of names")
        if groups == 1 and diversify and not preserve and weight > 0:
            raise RecipeError(
                "PEGO: with groups=1 there are no pairs, so diversify alone is an empty term; set preserve=True"
            )
        self.rank, self.groups, self.weight, self.target_modules = rank, groups, weight, target_modules
        self.preserve, self.diversify, self.scaling = preserve, diversify, scaling
        self.train_fully, self.merge_on_end, self.adapter_dir, self.seed = train_fully, merge_on_end, adapter_dir, seed
        self._steps = 0

    @property
    def _regularises(self) -> bool:
        return self.weight > 0 and (self.preserve or self.diversify)

    def declare(self, plan: Plan) -> None:
        names = [f"g{i}" for i in range(self.groups)]
        target = "qv" if self.target_modules is None else self.target_modules
        plan.surgery(AdapterSpec(names, self.rank, self.scaling * self.rank, 0.0, target, self.train_fully, self.seed))
        if self._regularises and plan.fitting:
            plan.step(self)
        if plan.fitting and has_batch_norm(plan.module):
            rank_zero_warn(
                "PEGO freezes weights, not batch-norm statistics: they still move unless the module keeps them"
            )

    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """lambda L_o, once an optimizer step."""
        terms = [orthogonality(*pair) for pair in self.operation.pairs()]
        preserve, diversify = (torch.stack(side).sum() for side in zip(*terms))
        step.log(self, {"preserve": preserve, "diversify": diversify})
        loss = preserve.new_zeros(())
        if self.preserve:
            loss = loss + preserve
        if self.diversify:
            loss = loss + diversify
        loss = self.weight * loss
        self._steps += 1
        if self._steps == 50:
            self._warn_if_it_dominates(loss, step.own_loss)
        return {"orthogonal_loss": loss}

    def _warn_if_it_dominates(self, penalty: Tensor, own: Tensor) -> None:
        penalty, own = float(penalty.detach()), float(own.detach())
        if penalty > 100 * own:
            rank_zero_warn(
                f"PEGO: weight x L_o is {penalty:.3g} against a loss of {own:.3g} after 50 steps; weight={self.weight}"
                " is for width 768, use less"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.operation is None or not self.operation.layers:
            return
        with torch.no_grad():
            both = [overlaps(*pair) for pair in self.operation.pairs()]
        with_w, pairwise = (torch.stack(side).mean() for side in zip(*both))
        self.log_dict({"pego/overlap_with_w": with_w, "pego/overlap_of_pairs": pairwise})

"""What is measured: one row a recipe and setting. A new recipe is one more row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import timm
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from benchmarks import loops
from lightning_recipes.callbacks import (
    AAER,
    BANG,
    GLAD,
    LEVI,
    PEGO,
    PSKD,
    SLCA,
    AdaptFormer,
    AdaptiveSmoothing,
    BackdoorAdjustment,
    BayesErrorMonitor,
    BayesGapMonitor,
    ClassWeights,
    CosineHead,
    CutMix,
    DataDiet,
    DropBlock,
    ExactResume,
    ForgettingMonitor,
    FreezeOut,
    GeneralizationMonitor,
    GradientNoise,
    GrokkingMonitor,
    GroupMask,
    Guidance,
    HypothesisWeightMonitor,
    InContextPrediction,
    InsertAttention,
    LangevinMixture,
    LogitAdjustment,
    LongTailMonitor,
    Mixup,
    MoreIsBetterMonitor,
    NormalizedGD,
    PrePostMonitor,
    ProgressiveUnfreezing,
    ProjectionHead,
    PruneTrainSet,
    RidgeRefit,
    RobustAccuracyMonitor,
    SaRA,
    SmallInit,
    SubGM,
    SVFit,
    WiSEFT,
)
from lightning_recipes.callbacks.continual.slca import begin_rows_
from lightning_recipes.callbacks.robustness.class_weights import BALANCED_EUROSAT
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import LinearPrior
from lightning_recipes.modules import ImageClassifier, PFNModule

# Per device, by name: timm's name and its arguments. On a CPU small enough for steps of some 50 ms on a few cores.
NETWORKS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cpu": {
        "resnet": ("resnet18", {"channels": (32, 64, 128, 256)}),
        "vit": (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3},
        ),
    },
    "cuda": {"resnet": ("resnet50", {}), "vit": ("vit_small_patch16_224", {})},
}
LONG_TAIL = [500.0, 300.0, 180.0, 108.0, 65.0, 39.0, 23.0, 14.0, 8.0, 5.0]  # samples a class, for 10 classes
IMAGE_SIZE = {"cpu": 32, "cuda": 224}


@dataclass(frozen=True)
class Case:
    """One recipe in one setting.

    Attributes:
        network: 'resnet' or 'vit', or makes one.
        recipes: makes fresh callbacks.
        neutral: makes them at their neutral setting, if they have one.
        loop: the same method by hand: trains a network on batches, as in :mod:`benchmarks.loops`.
        num_workers: of the dataloader.
        saves: measure what the recipe adds to a checkpoint too.
        optimizer: makes that of all variants from the parameters.
        epochs: of a run; steps are timed in the last one.
        validates: whether the fit has validation data, the training data again.
        least: samples that there must be.
        turn: what is timed: a training step; an epoch of `EPOCH` steps with its validation, for what happens once in
            one; or a batch of a prediction.
        monitors: whether it changes nothing and only looks: what counts then is its share of the run.
        module: makes the module, for a recipe of one kind of module only; None for a classifier of `network`.
        loader: makes the data, from the number of batches, their size and the variant; None for random images.
        samples: in the training set, however few of them are trained on; None for as many as are.
        image: channels and edge of an image; None for those of the device.
        reductions: gradients that the method needs from all ranks for one step.
        sends: what else it needs from them, in words, where that is much.
    """

    network: str | Callable[[], nn.Module]
    recipes: Callable[[], list[pl.Callback]]
    neutral: Callable[[], list[pl.Callback]] | None = None
    loop: Callable[[nn.Module, loops.Batches, loops.Amp], None] | None = None
    num_workers: int = 0
    saves: bool = False
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW
    epochs: int = 1
    validates: bool = False
    least: int = 0
    turn: Literal["step", "epoch", "prediction"] = "step"
    monitors: bool = False
    module: Callable[[], pl.LightningModule] | None = None
    loader: Callable[[int, int, str], DataLoader] | None = None
    samples: int | None = None
    image: tuple[int, int] | None = None
    reductions: int = 1
    sends: str = ""


EPOCH = 4
"""Training steps, and batches of a validation, of an epoch that is one turn."""


# -- prior-data fitted networks --------------------------------------------------------------------------------------

PRIOR = LinearPrior(1.0, 1.0, 0.3, -1.0, 1.0)
CONTEXT = 16


def _pfn() -> PFNModule:
    """Of two layers, some 0.2 million parameters."""
    return PFNModule(1, 128, 4, 2, 256, borders=[-4 + 0.08 * i for i in range(101)])


class _Unbatched(list):
    """Batches as they are, for a loader with ``batch_size=None``."""


def _tables(steps: int, batch: int, variant: str) -> DataLoader:
    """Batches of data sets of a prior, for training."""
    numbers = generator(0, "benchmarks/tables", 0)
    drawn = [PRIOR.sample(2 * CONTEXT, batch, 1, numbers) for _ in range(steps)]
    return DataLoader(_Unbatched({"x": x, "y": y, "n_context": CONTEXT} for x, y in drawn), batch_size=None)


def _queries(steps: int, batch: int, variant: str) -> DataLoader:
    """Queries to one context: by themselves for the recipe, behind it for the module's own prediction."""
    (x, y), queries = _context(), torch.rand(steps, batch, 1, generator=generator(0, "benchmarks/queries", 0))
    if variant == "recipe":
        return DataLoader(_Unbatched(queries), batch_size=None)
    whole = [torch.cat([x, each])[:, None] for each in queries]
    given = torch.cat([y, torch.zeros(batch)])[:, None]
    return DataLoader(_Unbatched({"x": each, "y": given, "n_context": CONTEXT} for each in whole), batch_size=None)


def _context() -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[n, 1]`` and y ``[n]`` of one data set."""
    x, y = PRIOR.sample(CONTEXT, 1, 1, generator(0, "benchmarks/context", 0))
    return x[:, 0], y[:, 0]


# -- the cases -------------------------------------------------------------------------------------------------------


def _first_rows(head: nn.Linear) -> None:
    """Those that SLCA begins its first task with."""
    begin_rows_(head.weight, head.bias, range(head.out_features), generator(0, "SLCA/rows", 0))


CASES: dict[str, Case] = {
    # What the measurement makes of no difference at all.
    "nothing": Case("resnet", list, list, loops.plain),
    "nothing, ViT": Case("vit", list, list, loops.plain),
    "AAER": Case(
        "resnet",
        lambda: [AAER()],
        lambda: [AAER(0.0)],
        lambda net, batches, amp: loops.aaer(net, batches, amp),
    ),
    "AAER n": Case(
        "resnet",
        lambda: [AAER(variant="n")],
        lambda: [AAER(0.0, "n")],
        lambda net, batches, amp: loops.aaer(
            net, batches, amp, start=2.0, alpha=1.0, project=False, lambda2=1.5, lambda3=0.15
        ),
    ),
    # In a fit it is to cost nothing.
    "AdaptiveSmoothing": Case("resnet", lambda: [AdaptiveSmoothing("torch.nn:Identity")], loop=loops.plain),
    "PEGO": Case(
        "vit",
        lambda: [PEGO()],
        loop=lambda net, batches, amp: loops.pego(loops.with_lora(net, "qv", rank=4, groups=4), batches, amp),
    ),
    "GLAD": Case(
        "vit",
        lambda: [GLAD()],
        loop=lambda net, batches, amp: loops.glad(loops.with_lora(net, "qkv", rank=4, scale=2.0), batches, amp),
        reductions=2,  # it moves along the gradient of all ranks
    ),
    "GLAD, mix 0 (plain LoRA)": Case(
        "vit",
        lambda: [GLAD(mix=0.0)],
        loop=lambda net, batches, amp: loops.plain(loops.with_lora(net, "qkv", rank=4, scale=2.0), batches, amp),
    ),
    "GLAD, all weights": Case(
        "vit",
        lambda: [GLAD(rank=None)],
        lambda: [GLAD(0.0, rank=None)],
        lambda net, batches, amp: loops.glad(net, batches, amp),
        reductions=2,
    ),
    "LEVI": Case(
        "vit",
        lambda: [LEVI()],
        loop=lambda net, batches, amp: loops.levi(net, batches, amp),
    ),
    "SVFit": Case("vit", lambda: [SVFit()], loop=lambda net, batches, amp: loops.svfit(net, batches, amp)),
    "SubGM on LoRA": Case(
        "vit",
        lambda: [GLAD(mix=0.0), SubGM(1e-2, eta=0.01, init="keep", log_spectrum=False)],
        loop=lambda net, batches, amp: loops.normalized_steps(
            loops.with_lora(net, "qkv", rank=4, scale=2.0), batches, amp
        ),
        optimizer=partial(SGD, lr=0.01),
        sends="the gradient of every product, as large as the layer, whose norm over all ranks sets the rate",
    ),
    # Re-selected before the first step: what a step costs in the second half of a fit, when it costs most.
    **{
        f"SaRA, {share:.0%}": Case(
            "vit",
            lambda share=share: [SaRA(None, share, progressive_at=1e-9, rank_min_size=16, target=["*.weight"])],
            loop=lambda net, batches, amp, share=share: loops.sara(net, batches, amp, share),
            saves=True,
        )
        for share in (0.1, 0.2)
    },
    "ProgressiveUnfreezing, head": Case(
        "resnet",
        lambda: [ProgressiveUnfreezing(at=(0,))],
        loop=lambda net, batches, amp: loops.unfreezing(net, batches, amp, rates=(1.0,)),
    ),
    "ProgressiveUnfreezing, half": Case(
        "resnet",
        lambda: [ProgressiveUnfreezing(at=(0,) * 3)],
        loop=lambda net, batches, amp: loops.unfreezing(net, batches, amp, rates=(1.0, 0.5, 0.25)),
    ),
    "ProgressiveUnfreezing, all": Case(
        "resnet",
        lambda: [ProgressiveUnfreezing(at=(0,) * 6, lr_scale=0.5)],
        lambda: [ProgressiveUnfreezing(loops.RESNET_GROUPS, (0,) * 6, lr_scale=1.0)],
        lambda net, batches, amp: loops.unfreezing(net, batches, amp, rates=[0.5**depth for depth in range(6)]),
    ),
    "FreezeOut": Case(
        "resnet", lambda: [FreezeOut()], loop=lambda net, batches, amp: loops.freeze_out(net, batches, amp)
    ),
    "SmallInit": Case(
        "resnet",
        lambda: [SmallInit(0.5)],
        lambda: [SmallInit(1.0)],
        lambda net, batches, amp: loops.small_init(net, batches, amp),
    ),
    # Half of a training set; a step is to cost nothing.
    "PruneTrainSet": Case(
        "resnet",
        lambda: [PruneTrainSet(keep=0.5, mode="random")],
        lambda: [PruneTrainSet(keep=1.0, mode="random")],
        samples=4096,
    ),
    "WiSEFT": Case(
        "resnet",
        lambda: [WiSEFT()],
        lambda: [WiSEFT(1.0)],
        lambda net, batches, amp: loops.wise_ft(net, batches, amp),
        saves=True,
    ),
    "BANG, fine-tuning": Case(
        "resnet",
        lambda: [BANG(1.0)],
        lambda: [BANG(1.0, label_smoothing=0.0, mixup_alpha=0.0)],
        lambda net, batches, amp: loops.mixing(net, batches, amp, smoothing=0.1),
    ),
    "Mixup": Case(
        "resnet", lambda: [Mixup()], lambda: [Mixup(0.0)], lambda net, batches, amp: loops.mixing(net, batches, amp)
    ),
    "CutMix": Case(
        "resnet",
        lambda: [CutMix(prob=1.0)],
        lambda: [CutMix(prob=0.0)],
        lambda net, batches, amp: loops.mixing(net, batches, amp, cut=True, alpha=1.0),
    ),
    "LogitAdjustment": Case(
        "resnet",
        lambda: [LogitAdjustment(LONG_TAIL)],
        lambda: [LogitAdjustment(LONG_TAIL, tau=0.0)],
        lambda net, batches, amp: loops.logit_adjusted(net, batches, amp, LONG_TAIL),
    ),
    "GroupMask": Case(
        "resnet",
        lambda: [GroupMask()],
        lambda: [GroupMask("all")],
        lambda net, batches, amp: loops.group_masked(net, batches, amp),
    ),
    "ClassWeights": Case(
        "resnet",
        lambda: [ClassWeights("balanced_eurosat")],
        lambda: [ClassWeights([1.0] * 10)],
        lambda net, batches, amp: loops.class_weighted(net, batches, amp, BALANCED_EUROSAT),
    ),
    "InsertAttention": Case(
        "resnet",
        lambda: [InsertAttention()],
        loop=lambda net, batches, amp: loops.with_attention(net, batches, amp),
    ),
    "DropBlock": Case(
        "resnet",
        lambda: [DropBlock()],
        lambda: [DropBlock(0.0)],
        lambda net, batches, amp: loops.drop_block(net, batches, amp),
    ),
    "AdaptFormer": Case(
        "vit",
        lambda: [AdaptFormer(8)],
        loop=lambda net, batches, amp: loops.adaptformer(net, batches, amp),
    ),
    "CosineHead": Case(
        "vit",
        lambda: [CosineHead()],
        loop=lambda net, batches, amp: loops.cosine_head(net, batches, amp),
    ),
    "ProjectionHead": Case(
        "resnet",
        lambda: [ProjectionHead("identity", discard="fit_end", refit="none")],
        lambda: [ProjectionHead("fixed", kappa=1.0)],
        lambda net, batches, amp: loops.projection_head(net, batches, amp),
    ),
    # Timed in the second epoch, when there are past predictions.
    **{
        f"PSKD, {mode}": Case(
            "resnet",
            lambda mode=mode: [PSKD(mode=mode)],
            lambda mode=mode: [PSKD(0.0, mode=mode)],
            lambda net, batches, amp, mode=mode: loops.self_distillation(net, batches, amp, table=mode == "table"),
            saves=mode == "table",
            epochs=2,
        )
        for mode in ("table", "snapshot")
    },
    "Guidance": Case(
        "resnet",
        lambda: [Guidance(loops.GUIDE, pretrained=False)],
        lambda: [Guidance(loops.GUIDE, pretrained=False, alpha=0.0)],
        lambda net, batches, amp: loops.guided(net, batches, amp),
    ),
    # A step of the slow learner; what comes between two tasks is measured by `python -m benchmarks.alignment`.
    "SLCA": Case(
        "resnet",
        lambda: [SLCA([list(range(10))], None, ca_epochs=0)],
        lambda: [SLCA(1, backbone_lr_scale=1.0)],
        lambda net, batches, amp: loops.slow_learner(net, batches, amp, begin=_first_rows),
    ),
    # A step while forgetting events are counted; what the other scores cost is measured by `python -m
    # benchmarks.scoring`.
    "DataDiet, forgetting": Case(
        "resnet",
        lambda: [DataDiet("forgetting", 1)],
        loop=lambda net, batches, amp: loops.forgetting(net, batches, amp),
        saves=True,
    ),
    "GradientNoise": Case(
        "resnet",
        lambda: [GradientNoise()],
        lambda: [GradientNoise(0.0)],
        lambda net, batches, amp: loops.noisy(net, batches, amp),
    ),
    "LangevinMixture": Case(
        "resnet",
        lambda: [LangevinMixture(train_size=1000, burn_in_steps=0, sample_every=4, max_samples=2, evaluate=[])],
        lambda: [LangevinMixture(0.0)],
        lambda net, batches, amp: loops.langevin(net, batches, amp),
        optimizer=partial(SGD, lr=0.01),
    ),
    # A chain of two steps on 16 samples, and those once more, every ten steps: a share that is counted, at a batch of
    # 32, as 12 % of the run's work.
    "HypothesisWeightMonitor, every 10 steps": Case(
        "resnet",
        lambda: [
            HypothesisWeightMonitor(n_probe=16, n_draws=2, every_n_steps=10, geometric_steps=False, budget=None),
        ],
        monitors=True,
    ),
    # 32 samples more a step: a share that is counted, at a batch of 32, as a third of the run's work.
    "GrokkingMonitor, every step": Case(
        "resnet",
        lambda: [GrokkingMonitor(16, every_n_steps=1)],
        loop=lambda net, batches, amp: loops.watched(net, batches, amp),
        validates=True,
        monitors=True,
    ),
    # 64 samples every ten steps: a share that is counted, at a batch of 32, as 7 % of the run's work.
    "GeneralizationMonitor, every 10 steps": Case(
        "resnet",
        lambda: [GeneralizationMonitor(probe_size=64, every_n_steps=10, geometric_steps=False)],
        loop=lambda net, batches, amp: loops.forecast(net, batches, amp),
        least=64,
        monitors=True,
    ),
    # 2 x 64 data sets every ten steps, at a batch of 32.
    "BayesGapMonitor, every 10 steps": Case(
        "resnet",
        lambda: [BayesGapMonitor((2, 8), 64, prior=PRIOR, every_n_steps=10, geometric_steps=False)],
        monitors=True,
        module=_pfn,
        loader=_tables,
    ),
    # What measures once an epoch: its share of an epoch of four training steps and a validation of as many batches,
    # which is far shorter than any real one.
    "LongTailMonitor, an epoch": Case(
        "resnet", lambda: [LongTailMonitor()], validates=True, turn="epoch", monitors=True
    ),
    "ForgettingMonitor, an epoch": Case(
        "resnet",
        lambda: [ForgettingMonitor([list(range(5)), list(range(5, 10))])],
        validates=True,
        turn="epoch",
        monitors=True,
    ),
    "RobustAccuracyMonitor, an epoch": Case(
        "resnet",
        lambda: [RobustAccuracyMonitor("pgd", steps=10, restarts=1, limit_batches=1)],
        validates=True,
        turn="epoch",
        monitors=True,
    ),
    "PrePostMonitor, an epoch": Case(
        "resnet", lambda: [PrePostMonitor(max_samples=64)], validates=True, turn="epoch", monitors=True
    ),
    "BayesErrorMonitor, an epoch": Case(
        "resnet", lambda: [BayesErrorMonitor(max_samples=64)], validates=True, turn="epoch", monitors=True
    ),
    # What acts in predictions only: a batch of one.
    "BackdoorAdjustment, predicting": Case(
        "resnet",
        lambda: [BackdoorAdjustment([ImageClassifier(build("resnet"))])],
        lambda: [BackdoorAdjustment()],
        turn="prediction",
    ),
    "InContextPrediction, predicting": Case(
        "resnet",
        lambda: [InContextPrediction(_context(), draw=False)],
        turn="prediction",
        module=_pfn,
        loader=_queries,
    ),
    # The same share; one eigendecomposition of 64 x 64 and a sweep of 31 ridges, and one of 240 to read the task off.
    "MoreIsBetterMonitor, every 10 steps": Case(
        "resnet",
        lambda: [MoreIsBetterMonitor(probe_size=64, every_n_steps=10, geometric_steps=False)],
        loop=lambda net, batches, amp: loops.ridge_sweep(net, batches, amp),
        least=64,
        monitors=True,
    ),
    # One pass over the training data at the end.
    "RidgeRefit": Case("resnet", lambda: [RidgeRefit()], lambda: [RidgeRefit(when="never")], least=64),
    "NormalizedGD": Case(
        "resnet",
        lambda: [NormalizedGD(require_full_batch=False)],
        loop=lambda net, batches, amp: loops.normalized(net, batches, amp),
        optimizer=partial(SGD, lr=0.01),
    ),
    "ExactResume": Case("resnet", lambda: [ExactResume()], saves=True),
    "ExactResume, 2 workers": Case("resnet", lambda: [ExactResume()], num_workers=2, saves=True),
}


def build(network: str | Callable[[], nn.Module], device: str = "cpu", **arguments: Any) -> nn.Module:
    """A network for 10 classes, as it is measured on that kind of device, with other arguments if given."""
    if callable(network):
        return network()
    name, defaults = NETWORKS[device][network]
    return timm.create_model(name, num_classes=10, **{**defaults, **arguments})

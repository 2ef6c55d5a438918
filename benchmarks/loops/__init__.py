"""Every benchmarked method once more, by hand: a plain PyTorch loop without Lightning and without this package.

What a recipe costs is held against these. Each trains `net` in place on all of `batches`, pairs of images [n, C, H, W]
and labels [n] on the network's device, with AdamW at its defaults as the stock module does, or as it says. `amp` makes
the context of a forward pass, ``torch.autocast`` for mixed precision. Nothing is logged.

The files are named as the folders of ``lightning_recipes/callbacks``; ``baseline`` is training without any recipe.
"""

from benchmarks.loops.adapters import (
    LoRA,
    glad,
    normalized_steps,
    orthogonality,
    pego,
    sara,
    svfit,
    with_attention,
    with_lora,
)
from benchmarks.loops.baseline import Amp, Batches, plain
from benchmarks.loops.continual import group_masked, slow_learner
from benchmarks.loops.data import forgetting
from benchmarks.loops.diagnostics import forecast, ridge_sweep, small_init, watched
from benchmarks.loops.finetuning import (
    RESNET_GROUPS,
    freeze_out,
    levi,
    mix,
    mixing,
    projection_head,
    unfreezing,
    wise_ft,
)
from benchmarks.loops.regularization import GUIDE, drop_block, guided, langevin, noisy, normalized, self_distillation
from benchmarks.loops.robustness import aaer, adaptformer, class_weighted, cosine_head, logit_adjusted

__all__ = [
    "GUIDE",
    "RESNET_GROUPS",
    "Amp",
    "Batches",
    "LoRA",
    "aaer",
    "adaptformer",
    "class_weighted",
    "cosine_head",
    "drop_block",
    "forecast",
    "forgetting",
    "freeze_out",
    "glad",
    "group_masked",
    "guided",
    "langevin",
    "levi",
    "logit_adjusted",
    "mix",
    "mixing",
    "noisy",
    "normalized",
    "normalized_steps",
    "orthogonality",
    "pego",
    "plain",
    "projection_head",
    "ridge_sweep",
    "sara",
    "self_distillation",
    "slow_learner",
    "small_init",
    "svfit",
    "unfreezing",
    "watched",
    "wise_ft",
    "with_attention",
    "with_lora",
]

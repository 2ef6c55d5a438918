"""BANG: fine-tuned on softened targets, the fine-tuned end is not over-confident elsewhere.

What that does for the accuracy of the mean depends on the set-up; the paper's own gain is that of CLIP on ImageNet.
Here there is none, which is reported and not asserted.
"""

from __future__ import annotations

from typing import Any

from benchmarks.claims import wise_ft
from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from lightning_recipes.callbacks import BANG

RECIPE = "BANG"
CLAIM = "Label smoothing and Mixup in fine-tuning keep the fine-tuned end from over-confidence on other distributions."
SETTING = wise_ft.SETTING.replace("alpha=1", "both softenings 0") + "; the mean at alpha 0.5"
SEEDS = 4
ARMS: dict[str, dict[str, Any]] = {
    "without": {"label_smoothing": 0.0, "mixup_alpha": 0.0},
    "smoothing 0.1": {"label_smoothing": 0.1, "mixup_alpha": 0.0},
    "mixup 0.2": {"label_smoothing": 0.0, "mixup_alpha": 0.2},
    "both": {"label_smoothing": 0.1, "mixup_alpha": 0.2},
}


def run(seed: int, **arguments: Any) -> Metrics:
    """Fine-tune on softened targets and average at alpha 0.5; returns what ``wise_ft.run`` does."""
    return wise_ft.adapt(seed, lambda: BANG(0.5, seed=seed, **arguments))[0]


def check(results: Results) -> list[Finding]:
    """Ten points less confidence of the fine-tuned end; the mean's accuracy is reported beside it."""
    findings = []
    for arm in [name for name in results if name != "without"]:
        findings.append(
            compare(
                f"The fine-tuned end is at least 10 points less confident elsewhere ({arm})",
                "mean of its largest probability elsewhere",
                *column(results, arm, "confidence"),
                lambda w, wo: wo - w - 0.1,
            )
        )
        findings.append(
            compare(
                f"The mean is more accurate elsewhere ({arm})",
                "accuracy of the mean elsewhere",
                *column(results, arm, "elsewhere"),
                lambda w, wo: w - wo,
            )
        )
    return findings

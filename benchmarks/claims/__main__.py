"""Run the claims' experiments, print a table and write the evidence that ``lightning-recipes show NAME`` prints."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

import lightning_recipes
from benchmarks.claims import (
    aaer,
    adaptive_smoothing,
    backdoor_adjustment,
    bang,
    class_weights,
    data_diet,
    drop_block,
    generalization_dynamics,
    glad,
    gradient_noise,
    group_mask,
    guidance,
    insert_attention,
    levi,
    lightweight_cnn,
    logit_adjustment,
    normalized_gd,
    overparameterization,
    pego,
    pego_pacs,
    pfn,
    progressive_unfreezing,
    projection_head,
    ps_kd,
    sara,
    scole_replay,
    slca,
    spurious_features,
    subgm,
    svfit,
    universality,
    unlearnable,
    wise_ft,
    xor_grokking,
)
from benchmarks.claims.findings import Finding, measure, spread

EXPERIMENTS: Mapping[str, Sequence[ModuleType]] = {
    "AAER": [aaer],
    "AdaptiveSmoothing": [adaptive_smoothing],
    "BANG": [bang, spurious_features],
    "ClassWeights": [class_weights],
    "DataDiet": [data_diet],
    "DropBlock": [drop_block],
    "DualInputOutput": [lightweight_cnn],
    "BackdoorAdjustment": [backdoor_adjustment],
    "GeneralizationMonitor": [generalization_dynamics],
    "GLAD": [glad],
    "GradientNoise": [gradient_noise],
    "GroupMask": [group_mask],
    "InsertAttention": [insert_attention],
    "GrokkingMonitor": [xor_grokking],
    "Guidance": [guidance],
    "LEVI": [levi],
    "LangevinMixture": [universality],
    "LogitAdjustment": [logit_adjustment],
    "MoreIsBetterMonitor": [overparameterization],
    "NormalizedGD": [normalized_gd],
    "PEGO": [pego, pego_pacs],
    "PFNModule": [pfn],
    "ProgressiveUnfreezing": [progressive_unfreezing],
    "ProjectionHead": [projection_head],
    "PSKD": [ps_kd],
    "SCoLeDataModule": [scole_replay],
    "SLCA": [slca],
    "SubGM": [subgm],
    "SVFit": [svfit],
    "SaRA": [sara],
    "UnlearnableDataModule": [unlearnable],
    "WiSEFT": [wise_ft],
}
EVIDENCE = Path(lightning_recipes.__file__).parent / "evidence.json"


def main(args: Sequence[str] | None = None) -> int:
    """Returns 0 also where a claim does not show, which is a result; 1 where an experiment lacks its data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; all if none is given")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="runs of every arm; default: as many as each experiment says"
    )
    parser.add_argument("--output", type=Path, default=EVIDENCE, metavar="FILE", help="default: %(default)s")
    parsed = parser.parse_args(args)
    by_lower = {name.lower(): name for name in EXPERIMENTS}
    unknown = [name for name in parsed.names if name.lower() not in by_lower]
    if unknown:
        parser.error(f"no experiment named {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    if parsed.seeds is not None and parsed.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {parsed.seeds}")
    chosen = [by_lower[name.lower()] for name in parsed.names] or list(EXPERIMENTS)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # advice for real runs
    evidence = json.loads(parsed.output.read_text(encoding="utf-8")) if parsed.output.is_file() else {}
    left_out = False
    for name in chosen:
        found = []
        for experiment in EXPERIMENTS[name]:
            seeds = parsed.seeds or experiment.SEEDS
            with tqdm(total=seeds * len(experiment.ARMS), desc=name, unit="run") as bar:
                try:
                    results = measure(experiment, seeds, done=lambda *_, bar=bar: bar.update())
                except FileNotFoundError as error:  # it trains on data that does not come with the package
                    bar.close()
                    print(f"{name} left out: {error}", file=sys.stderr)
                    left_out = True
                    continue
            findings = experiment.check(results)
            print(table(experiment, findings), flush=True)
            found += [finding.as_evidence(experiment.SETTING) for finding in findings]
        if not found:
            continue
        # after every recipe: what is measured is kept when the next one is stopped
        evidence[name] = found
        text = json.dumps(dict(sorted(evidence.items())), indent=2, ensure_ascii=False)
        parsed.output.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {parsed.output}", flush=True)
    return 1 if left_out else 0


def table(experiment: ModuleType, findings: Sequence[Finding]) -> str:
    """The findings of one experiment as aligned text."""
    rows = [("metric", "with", "without", "holds", "claim")]
    for f in findings:
        rows.append((f.metric, spread(f.with_recipe), spread(f.without), "yes" if f.holds else "NO", f.claim))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths)), row[4]]) for row in rows]
    seeds = len(findings[0].without)
    heading = f"{experiment.RECIPE}: {experiment.CLAIM}\n{experiment.SETTING}; {seeds} seeds, mean ± sd"
    return f"\n{heading}\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

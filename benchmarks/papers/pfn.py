"""The PFN paper's Figure 3 in small: a network's posterior over the exact one of a Gaussian process, on a CPU.

``python -m benchmarks.papers.pfn`` trains ``configs/papers/pfn_gp_1d.yaml`` over three seeds on one core (some
minutes), prints a table and writes ``pfn.json``, ``pfn_posterior.png`` (mean and central 95 % of every seed's network
on those of the exact posterior) and ``pfn_gap.png`` (what the networks lose to it, by context length) beside this file.

What is measured, on fresh data sets that are the same for all seeds: the gap in nats a target; the distance of the
network's mean from the exact one, in exact standard deviations; how many targets the 95 % intervals hold; and the time
that one forward pass takes for all data sets at once beside that of the exact posterior by Cholesky.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from benchmarks.claims.findings import deviation
from benchmarks.claims.training import seeded
from benchmarks.papers.command import Command, save
from lightning_recipes.catalog import config_folder
from lightning_recipes.core.diagnostics import draw_curves
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import GPPrior, PriorDataModule
from lightning_recipes.modules import PFNModule

CONFIG = "papers/pfn_gp_1d.yaml"
SEEDS = 3
LENGTHS = (1, 2, 5, 10, 20)
DATASETS = 1000
SHOWN = 6  # context samples of the picture
Z95 = 1.959963984540054
RESULTS = Path(__file__).with_suffix(".json")


def settings() -> dict[str, Any]:
    """The config's own."""
    config = yaml.safe_load((config_folder() / CONFIG).read_text(encoding="utf-8"))
    data = config["data"]["init_args"]
    return {
        "model": config["model"]["init_args"],
        "prior": data.pop("prior")["init_args"],
        "data": data,
        "epochs": config["trainer"]["max_epochs"],
        "clip": config["trainer"]["gradient_clip_val"],
    }


def train(seed: int, epochs: int | None = None) -> tuple[PFNModule, GPPrior]:
    """The config's network, trained."""
    given = settings()
    prior = GPPrior(**given["prior"])
    with seeded(seed):
        module = PFNModule(**given["model"], seed=seed)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=given["epochs"] if epochs is None else epochs,
            gradient_clip_val=given["clip"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=PriorDataModule(prior, **{**given["data"], "val_datasets": 0, "seed": seed}))
    return module.eval(), prior


@torch.no_grad()
def measure(module: PFNModule, prior: GPPrior) -> dict[int, dict[str, float]]:
    """Against the exact posterior, by context length."""
    found = {}
    for n in LENGTHS:
        x, y = prior.sample(n + 5, DATASETS, 1, generator("benchmarks.papers.pfn", n))
        began = time.perf_counter()
        logits = module(x, y, n)
        network = time.perf_counter() - began
        began = time.perf_counter()
        middle, variance = prior.posterior(x[:n], y[:n], x[n:])
        exact = time.perf_counter() - began
        bar, targets, spread = module.distribution, y[n:].double(), variance.sqrt()
        inside = (bar.icdf(logits, 0.025) <= targets) & (targets <= bar.icdf(logits, 0.975))
        found[n] = {
            "gap": float((bar(logits, y[n:]).double() - prior.nll(x, y, n)).mean()),
            "exact": float(prior.nll(x, y, n).mean()),
            "mean_off": float(((bar.mean(logits) - middle).abs() / spread).mean()),
            "inside_95": float(inside.double().mean()),
            "inside_95_exact": float(((targets - middle).abs() <= Z95 * spread).double().mean()),
            "ms": 1e3 * network,
            "ms_exact": 1e3 * exact,
        }
    return found


@torch.no_grad()
def posterior(module: PFNModule, x: Tensor, y: Tensor, grid: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Mean and central 95 % of the network over a grid ``[m, 1, 1]``."""
    logits, bar = module(torch.cat([x, grid]), y, len(y))[:, 0], module.distribution
    return bar.mean(logits).tolist(), bar.icdf(logits, 0.025).tolist(), bar.icdf(logits, 0.975).tolist()


def draw(modules: Sequence[PFNModule], prior: GPPrior, runs: Sequence[Any], path: Path) -> list[Path]:
    """Both pictures; the paths of those that could be drawn."""
    x, y = prior.sample(SHOWN, 1, 1, generator("benchmarks.papers.pfn", "shown"))
    grid = torch.linspace(0, 1, 200)[:, None, None]
    middle, variance = prior.posterior(x, y, grid)
    half = Z95 * variance.sqrt()
    across = grid.flatten().tolist()
    curves = {"exact": (across, middle[:, 0].tolist())}
    bands = {"exact": ((middle - half)[:, 0].tolist(), (middle + half)[:, 0].tolist())}
    for seed, module in enumerate(modules):
        own, low, high = posterior(module, x, y, grid)
        curves[f"network, seed {seed}"], bands[f"network, seed {seed}"] = (across, own), (low, high)
    curves["context"] = (x.flatten().tolist(), y.flatten().tolist())
    title = "posterior predictive of a Gaussian process: mean and central 95 %"
    drawn = [
        draw_curves(path.with_name(f"{path.stem}_posterior.png"), curves, title, "x", "y", bands, points=["context"])
    ]
    gaps = {n: [run[n]["gap"] for run in runs] for n in LENGTHS}
    middles = [mean(values) for values in gaps.values()]
    spread = [deviation(values) for values in gaps.values()]
    name = f"networks, mean and sd of {len(runs)} seeds"
    band = {name: ([m - s for m, s in zip(middles, spread)], [m + s for m, s in zip(middles, spread)])}
    title, ylabel = "what the networks lose to the exact posterior", "nats a target"
    path = path.with_name(f"{path.stem}_gap.png")
    drawn.append(draw_curves(path, {name: (list(LENGTHS), middles)}, title, "context samples", ylabel, band))
    return [each for each in drawn if each is not None]


def summary(runs: Sequence[dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds, by context length."""
    found: dict[str, dict[str, float]] = {}
    for n in LENGTHS:
        found[str(n)] = {}
        for name in runs[0][n]:
            values = [run[n][name] for run in runs]
            found[str(n)] |= {name: round(mean(values), 4), f"{name}_sd": round(deviation(values), 4)}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """As aligned text."""
    rows = [("context", "exact NLL", "gap", "mean off (sd)", "in 95 %", "ms for all", "exact ms")]
    for n, values in found.items():
        cells = [f"{values[name]:.3f} ± {values[f'{name}_sd']:.3f}" for name in ("gap", "mean_off", "inside_95")]
        rows.append((n, f"{values['exact']:.3f}", *cells, f"{values['ms']:.0f}", f"{values['ms_exact']:.0f}"))
    return "\n".join("  ".join(cell.rjust(15) for cell in row) for row in rows)


def main(args: Iterable[str] | None = None) -> int:
    command = Command(RESULTS, __doc__, seeds=SEEDS)
    command.add_argument("--epochs", type=int, metavar="N", help="of 100 steps; default: the config's")
    parsed = command.parse(args)
    modules, runs, seconds = [], [], []
    for seed in tqdm(range(parsed.seeds), "training", unit="seed"):
        began = time.time()
        module, prior = train(seed, parsed.epochs)
        seconds.append(time.time() - began)
        modules.append(module)
        runs.append(measure(module, prior))
    found = summary(runs)
    print(f"\n{table(found)}\n{mean(seconds):.0f} s of training a seed", flush=True)
    given = settings()
    results = {
        "config": CONFIG,
        "epochs": given["epochs"] if parsed.epochs is None else parsed.epochs,
        "seeds": parsed.seeds,
        "datasets": DATASETS,
        "training_seconds": round(mean(seconds)),
        "context": found,
    }
    save(parsed.output, results)
    for path in draw(modules, prior, runs, parsed.output):
        print(f"drew {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Figure of the universality lens: regret against samples for networks of any width, and the bound by prior mass.

``python -m benchmarks.papers.universality`` draws random two-layer ReLU networks on five bits, counts which of the 2^32
Boolean functions they compute, and lets the Bayes mixture of them learn four rules from labels of which a tenth is
flipped (half a minute on one core). It prints a table, draws ``universality.png`` and writes ``universality.json``
beside this file. Nothing is downloaded.

A network predicts the sign of its output and allows for the flips. What it weighs is the share of all networks that
compute the same function: -log of that bounds the cumulative regret at every n, whether the networks have 57 parameters
or 3,585. A rule has the weight of every other that differs from it by the order or the sign of the bits only, so the
draws that hit any of those are shared out among them. The parity of two bits is hit by no draw: its weight is too small
to be counted, and the mixture pays for ever, as the nearest functions are wrong on some inputs.

Weights are N(0, 1 / fan-in), hidden and output biases N(0, 0.25). Mean and standard deviation are over streams of
samples; the networks are drawn once a width.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.claims.findings import deviation
from benchmarks.papers.command import Command, save
from lightning_recipes.callbacks.regularization.hypothesis_weight import regret_bound
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.boolean_task import RULES, all_inputs, draw_task

BITS, NOISE, N, STREAMS = 5, 0.1, 128, 20
WIDTHS: Mapping[int, int] = {8: 200_000, 64: 200_000, 512: 60_000}
"""Draws by width."""
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)
RESULTS, PICTURE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".png")


def parameters(width: int) -> int:
    """Of a two-layer network with biases."""
    return (BITS + 1) * width + width + 1


def functions(width: int, draws: int) -> tuple[Tensor, Tensor]:
    """What random networks compute.

    Returns:
        the functions bool ``[functions, 2^bits]``, and how many networks compute each, int64 ``[functions]``.
    """
    x, stream = all_inputs(BITS), generator("universality", width)
    codes = []
    powers = 2 ** torch.arange(len(x))
    for start in range(0, draws, 2000):
        count = min(2000, draws - start)

        def normal(*shape: int, std: float, count: int = count) -> Tensor:
            return std * torch.randn(count, *shape, generator=stream)

        first, second = normal(BITS, width, std=BITS**-0.5), normal(width, std=width**-0.5)
        hidden = (x @ first + normal(1, width, std=0.5)).relu()
        outputs = (hidden @ second[..., None])[..., 0] + normal(1, std=0.5)
        codes.append(((outputs > 0).long() * powers).sum(1))
    found, counts = torch.cat(codes).unique(return_counts=True)
    return (found[:, None] & powers) > 0, counts


def alike(rule: str) -> Tensor:
    """All functions that are the rule but for the order and the sign of the bits, bool ``[functions, 2^bits]``: random
    networks compute each equally often, whose first weights have a law that knows neither."""
    x, true = all_inputs(BITS), RULES[rule][1](all_inputs(BITS))
    powers = 2 ** torch.arange(BITS - 1, -1, -1)
    images = []
    for order in itertools.permutations(range(BITS)):
        for signs in x:  # as many signs as inputs
            images.append(true[(((x[:, order] * signs) > 0).long() * powers).sum(1)])
    found = torch.stack(images).unique(dim=0)
    return torch.cat([found, ~found]).unique(dim=0)  # nor does the law of the last ones know the sign of the output


def shared_out(table: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The same functions and counts, in which what hit any of those that are alike counts equally for all of them.

    Returns:
        functions bool ``[functions, 2^bits]``, and counts fp64 ``[functions]`` with the same sum.
    """
    powers = 2 ** torch.arange(2**BITS)
    codes, counts = (table * powers).sum(1), counts.double()
    for rule in RULES:
        family = alike(rule)
        members = (family * powers).sum(1)
        hit = torch.isin(codes, members)
        if hit.any():
            mean_count = counts[hit].sum() / len(members)
            codes = torch.cat([codes[~hit], members])
            counts = torch.cat([counts[~hit], mean_count.expand(len(members))])
    return (codes[:, None] & powers) > 0, counts


def regrets(table: Tensor, counts: Tensor, rule: str, stream: int) -> Tensor:
    """Cumulative regret of the mixture over the rule itself after the samples of `SHOWN`: ``[len(SHOWN)]``, in nats.

    A likelihood hangs on how many labels a function gets wrong, and that is linear in its table.
    """
    places, labels = draw_task(BITS, rule, NOISE, N, generator("universality", rule, stream))
    signs = functional.one_hot(places, 2**BITS) * (
        1 - 2 * labels[:, None]
    )  # what saying 1 there adds to the wrong ones
    seen = torch.tensor(SHOWN) - 1
    wrong = table.float() @ signs.cumsum(0)[seen].float().T + labels.cumsum(0)[seen]
    off = (labels.bool() != RULES[rule][1](all_inputs(BITS))[places]).long().cumsum(0)[seen]
    odds = math.log((1 - NOISE) / NOISE)  # what every wrong label costs more than a right one
    weights = (counts / counts.sum()).double().log()
    return -(weights[:, None] - odds * wrong.double()).logsumexp(0) - odds * off


def weight(table: Tensor, counts: Tensor, rule: str) -> float | None:
    """-log of the share of networks that compute the rule; None where none computes it or one alike."""
    same = (table == RULES[rule][1](all_inputs(BITS))).all(1)
    return math.log(float(counts.sum() / counts[same].sum())) if same.any() else None


def run(streams: int) -> dict[str, dict[str, Any]]:
    """By width and rule: -log weight, the bound at the last sample, and the regret at those shown, stream by stream."""
    results: dict[str, dict[str, Any]] = {}
    for width, draws in tqdm(WIDTHS.items(), "width", unit="width"):
        table, counts = shared_out(*functions(width, draws))
        found = results[str(width)] = {"parameters": parameters(width), "draws": draws, "functions": len(counts)}
        for rule in RULES:
            cost = weight(table, counts, rule)
            paths = [regrets(table, counts, rule, stream) for stream in range(streams)]
            found[rule] = {
                "neg_log_w": cost,
                "bound": None if cost is None else regret_bound(lambda eps, cost=cost: -cost, N).regret,
                "regret": {str(n): [float(path[i]) for path in paths] for i, n in enumerate(SHOWN)},
            }
    return results


def table_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Regret and bound as aligned text."""
    rows = [("width", "parameters", "rule", f"regret at {N}", "-log W")]
    for width, found in results.items():
        for rule in RULES:
            ends, cost = found[rule]["regret"][str(N)], found[rule]["neg_log_w"]
            bound = f"above {math.log(found['draws']):.1f}" if cost is None else f"{cost:.2f}"
            rows.append((width, str(found["parameters"]), rule, f"{mean(ends):.2f} ± {deviation(ends):.2f}", bound))
    return "\n".join("  ".join(cell.rjust(14) for cell in row) for row in rows)


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> Path | None:
    """One panel a rule; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, rule in zip(figure.subplots(1, len(RULES)), RULES):
        for number, (width, found) in enumerate(results.items()):
            seen, color = found[rule]["regret"], f"C{number}"
            middle, spread = [mean(each) for each in seen.values()], [deviation(each) for each in seen.values()]
            label = f"width {width}, {found['parameters']:,} parameters"
            axes.errorbar(list(map(int, seen)), middle, spread, color=color, marker="o", ms=3, capsize=2, label=label)
            if found[rule]["bound"] is not None:
                axes.axhline(found[rule]["bound"], color=color, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="samples", title=rule.replace("_", " "), ylim=(min(0, axes.get_ylim()[0]), None))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cumulative regret, nats")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle("Regret of the mixture of random ReLU networks (dashed: -log weight of the rule)")
    figure.savefig(file, dpi=120)
    return file


def main(args: Iterable[str] | None = None) -> int:
    parsed = Command(RESULTS, __doc__, seeds=STREAMS, picture=PICTURE).parse(args)
    began = time.time()
    results = run(parsed.seeds)
    print(f"\n{table_of(results)}\n{parsed.seeds} streams, mean ± sd; {time.time() - began:.0f} s", flush=True)
    found = {"seeds": parsed.seeds, "bits": BITS, "noise": NOISE, "width": results}
    save(parsed.output, found, 4)
    drawn = draw(results, parsed.picture)
    print(f"wrote {parsed.output}" + ("" if drawn is None else f" and {drawn}"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

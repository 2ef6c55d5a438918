"""Data diet on real images: what can be left out of Fashion-MNIST and CIFAR-10, and which labels are wrong.

``LIGHTNING_RECIPES_DATA=... python -m benchmarks.papers.data_diet`` scores 10,000 training images of each set over
several runs, trains anew on what is kept by the scores, on as many at random and on the easiest, with as many steps
whatever is kept; then once more with a tenth of the labels wrong. It prints tables, writes ``data_diet.json`` beside
this file and, with ``--pictures``, draws the hardest and the easiest images. On one core Fashion-MNIST takes an MLP
three minutes and CIFAR-10 a small convolutional network a quarter of an hour. The paper's own setting, a ResNet-18 on
all of CIFAR-10, is configs/papers/data_diet_cifar10_scores.yaml and data_diet_cifar10_prune.yaml. On CIFAR-10 in small,
where the network comes to half of the test images, the claim does not show: what is hardest then teaches least.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from benchmarks.claims.data_diet import train
from benchmarks.claims.findings import deviation
from benchmarks.papers.command import Command, load, missing, save
from lightning_recipes.callbacks import DataDiet, PruneTrainSet
from lightning_recipes.callbacks.data.scores import Scores, read_scores, suspicious
from lightning_recipes.core.diagnostics import draw_images
from lightning_recipes.modules import SmallCNN

FILES = {"fashion_mnist": "fashion_mnist.npz", "cifar10": "cifar10_subset.npz"}
TRAINING, BATCH, EPOCHS, AT_EPOCH, RUNS, SEEDS, NOISE = 10_000, 128, 10, 3, 4, 2, 0.1
LR, WEIGHT_DECAY = 0.05, 5e-4
ARMS: dict[str, dict[str, object]] = {
    "all": {"keep": 1.0},
    "hardest 70%": {"keep": 0.7, "mode": "keep_max"},
    "random 70%": {"keep": 0.7, "mode": "random"},
    "hardest 50%": {"keep": 0.5, "mode": "keep_max"},
    "random 50%": {"keep": 0.5, "mode": "random"},
    "easiest 50%": {"keep": 0.5, "mode": "keep_min"},
}
NOISY_ARMS: dict[str, dict[str, object]] = {
    "all": {"keep": 1.0},
    "hardest 50%": {"keep": 0.5, "mode": "keep_max"},
    "random 50%": {"keep": 0.5, "mode": "random"},
    "window 40% to 90%": {"keep": 0.5, "mode": "offset", "offset": 0.4},
    "easiest 90%": {"keep": 0.9, "mode": "keep_min"},
}
RESULTS = Path(__file__).with_suffix(".json")


class Bytes(Dataset):
    """Images that stay uint8 in memory, a batch at a time as float32 in [0, 1]."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices].float() / 255, self.y[indices]


def mlp(pixels: int) -> nn.Module:
    """Two hidden layers, for grey images."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn(pixels: int) -> nn.Module:
    """Three convolutions for colour images, few and large steps, so that a run takes half a minute on one core."""
    return SmallCNN(in_chans=3, width=8).to(memory_format=torch.channels_last)


NETWORKS = {1: mlp, 3: cnn}  # by channels


@cache
def images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 ``[n, channels, height, width]`` and labels, and those that accuracy is measured on.

    Raises:
        FileNotFoundError: when LIGHTNING_RECIPES_DATA names no folder with them.
    """
    path = Path(os.environ.get("LIGHTNING_RECIPES_DATA", ""), FILES[name])
    if not path.is_file():
        raise FileNotFoundError(f"set LIGHTNING_RECIPES_DATA to the folder with {FILES[name]} (looked for {path})")
    file = np.load(path)
    x, y, x_test, y_test = (torch.from_numpy(file[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:TRAINING]
    x, x_test = ((each[:, None] if each.dim() == 3 else each.permute(0, 3, 1, 2)) for each in (x[order], x_test))
    return x.contiguous(), y[order], x_test.contiguous(), y_test


def with_wrong_labels(y: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of which a share is another class, and which."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=generator)[: round(NOISE * len(y))]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return torch.where(wrong, other, y), wrong


def trained(seed: int, dataset: Bytes, callback: DataDiet | PruneTrainSet) -> nn.Module:
    """A network after the steps of all arms, or after as many as a score needs."""
    steps = EPOCHS * (TRAINING // BATCH)
    network = partial(NETWORKS[dataset.x.shape[1]], math.prod(dataset.x.shape[1:]))
    cycle = lambda optimizer, _: OneCycleLR(optimizer, LR, total_steps=steps, cycle_momentum=False)  # noqa: E731
    return train(seed, dataset, callback, steps, network, BATCH, cycle, lr=LR, weight_decay=WEIGHT_DECAY)


def scored(dataset: Bytes, runs: int, score: str = "el2n") -> Scores:
    """A score over so many runs."""
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            trained(1000 + run, dataset, DataDiet(score, AT_EPOCH, batch_size=1000, out=folder, stop_after=True))
        return read_scores(folder)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images uint8 classified correctly."""
    right = [(net(part.float() / 255).argmax(1) == labels).sum() for part, labels in zip(x.split(1000), y.split(1000))]
    return int(torch.stack(right).sum()) / len(y)


def reproduce(name: str, seeds: int, runs: int, pictures: Path | None = None) -> dict[str, object]:
    """Score, prune and train, with the labels as they are and with some of them wrong.

    Returns:
        by part ('clean', 'noisy') each arm's accuracies; what the score finds of the wrong labels.
    """
    x, y, x_test, y_test = images(name)
    noisy, wrong = with_wrong_labels(y)
    found: dict[str, object] = {"test_images": len(y_test), "seeds": seeds, "runs": runs}
    total = 2 * runs + seeds * (len(ARMS) + len(NOISY_ARMS))
    with tqdm(total=total, desc=name, unit="run") as bar:
        for part, labels, arms in (("clean", y, ARMS), ("noisy", noisy, NOISY_ARMS)):
            dataset = Bytes(x, labels)
            scores = scored(dataset, runs)
            bar.update(runs)
            accuracies: dict[str, list[float]] = {arm: [] for arm in arms}
            for arm, arguments in arms.items():
                for seed in range(seeds):
                    net = trained(seed, dataset, PruneTrainSet(scores.mean, seed=seed, **arguments))
                    accuracies[arm].append(accuracy(net, x_test, y_test))
                    bar.update()
            found[part] = {
                arm: {"accuracy": round(mean(each), 4), "sd": round(deviation(each), 4)}
                for arm, each in accuracies.items()
            }
            if part == "noisy":
                first = scores.suspicious(int(wrong.sum()))
                found["auc"] = round(float(binary_auroc(scores.mean, wrong)), 4)
                found["wrong_among_most_suspicious"] = round(float(wrong[first].double().mean()), 4)
            if pictures is not None:
                draw(pictures / f"{name}_{part}.png", x, labels, scores.mean, f"{name}, {part} labels")
    return found


def draw(path: Path, x: Tensor, y: Tensor, scores: Tensor, title: str) -> None:
    """The hardest and the easiest images."""
    order = suspicious(scores, len(scores)).tolist()
    rows = {
        words: [(x[i].float() / 255, f"{int(y[i])}: {scores[i]:.2f}") for i in chosen]
        for words, chosen in (("hardest", order[:12]), ("easiest", order[::-1][:12]))
    }
    draw_images(path, rows, f"{title} (label: EL2N after {AT_EPOCH} epochs)")


def table(name: str, found: Mapping[str, object]) -> str:
    """One set's figures as aligned text."""
    lines = [f"{name}: accuracy in %, {found['seeds']} seeds, mean ± sd; scores of {found['runs']} runs"]
    for part, words in (("clean", "labels as they are"), ("noisy", f"{NOISE:.0%} of the labels wrong")):
        lines.append(f"  {words}")
        for arm, each in found[part].items():
            lines.append(f"    {arm:20}{100 * each['accuracy']:6.2f} ± {100 * each['sd']:.2f}")
    share = 100 * found["wrong_among_most_suspicious"]
    lines.append(f"  wrong labels: ROC-AUC {found['auc']:.4f}; of as many most suspicious ones {share:.1f} % are wrong")
    return "\n".join(lines)


def main(args: Iterable[str] | None = None) -> int:
    """Returns 1 where the data are missing."""
    command = Command(RESULTS, __doc__, seeds=SEEDS, names=FILES, noun="set")
    command.add_argument("--runs", type=int, default=RUNS, metavar="N", help="that are scored; default: %(default)s")
    command.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the hardest and easiest images there")
    parsed = command.parse(args)
    if parsed.runs < 1:
        command.error(f"--runs must be at least 1; got {parsed.runs}")

    results = load(parsed.output)
    for name in parsed.names:
        began = time.time()
        try:
            results[name] = reproduce(name, parsed.seeds, parsed.runs, parsed.pictures)
        except FileNotFoundError as error:
            return missing(f"{name} left out", error)
        print(f"\n{table(name, results[name])}\n{time.time() - began:.0f} s", flush=True)
        save(parsed.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

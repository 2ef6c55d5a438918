"""``python -m benchmarks.scoring``: what it takes to score training examples, and what a loop over them would take.

For each network the seconds of a thousand examples: a training step on them, for comparison; EL2N, a forward pass;
GraNd of the last layer; and GraNd of all parameters: as DataDiet computes it, by ``torch.func`` alone, and example by
example with ``autograd.grad``. The first and the last are of the same examples and are compared. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import IMAGE_SIZE, NETWORKS, build
from lightning_recipes.callbacks.data.scores import el2n, grand_last
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.sample_gradients import SampleGradients
from lightning_recipes.modules.cifar_resnet import CifarResNet

COLUMNS = ("training step", "el2n", "grand_last", "grand", "by torch.func", "one by one", "times as fast", "differ by")


def networks(device: str) -> Iterator[tuple[str, nn.Module, tuple[int, ...], int]]:
    """Name, network for 10 classes, shape of an input, and examples whose gradients are held at once."""
    mlp = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    yield "MLP 784-256-256-10", mlp, (1, 28, 28), 256
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    yield "MLP 64-128-10 (the claim's)", narrow, (1, 8, 8), 256
    yield "ResNet-20 for CIFAR", CifarResNet(20), (3, 32, 32), 32
    for name in ("resnet", "vit"):
        yield NETWORKS[device][name][0], build(name, device), (3, IMAGE_SIZE[device], IMAGE_SIZE[device]), 32


def each_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every example."""
    return F.cross_entropy(logits, targets, reduction="none")


def one_by_one(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """GraNd by a loop over the examples."""
    parameters, found = [p for p in net.parameters() if p.requires_grad], []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), parameters)
        found.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    return torch.stack(found)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median over repeats, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return median(found[1:])


def measure(net: nn.Module, shape: tuple[int, ...], chunk: int, count: int, repeats: int) -> dict[str, float]:
    """Seconds a thousand examples, and how far the two GraNds are apart, as a share of the largest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net, x, y = net.to(device).eval(), torch.rand(count, *shape, device=device), torch.arange(count, device=device) % 10
    path, head = head_input(net)

    def step() -> None:
        torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), allow_unused=True)

    def last() -> Tensor:
        with torch.no_grad(), Taps(net, {"h": (path, "input")}) as taps:
            return grand_last(net(x), y, taps["h"], head.bias is not None)

    def quick() -> Tensor:
        with torch.no_grad():
            return el2n(net(x), y)

    gradients = SampleGradients(net, each_loss, chunk)  # found out about once, as in a pass over a training set
    works: dict[str, Callable[[], object]] = {
        "training step": step,
        "el2n": quick,
        "grand_last": last,
        "grand": lambda: gradients.norms((x,), y),
        "by torch.func": lambda: SampleGradients(net, each_loss, chunk, layers=False).norms((x,), y),
        "one by one": lambda: one_by_one(net, x, y),
    }
    row = {name: 1000 / count * seconds(work, repeats) for name, work in works.items()}
    row["times as fast"] = row["one by one"] / row["grand"]
    slow, fast = one_by_one(net, x, y), gradients.norms((x,), y)
    row["differ by"] = float((slow - fast).abs().max() / slow.max())
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=256, help="examples (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; seconds a thousand examples\n\n{'network':28}" + "".join(f"{column:>15}" for column in COLUMNS))
    results = {}
    torch.manual_seed(0)
    for network, net, shape, chunk in networks(device):
        results[network] = row = measure(net, shape, chunk, options.count, options.repeats)
        print(f"{network:28}" + "".join(f"{row[column]:15.3g}" for column in COLUMNS), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": name, "networks": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

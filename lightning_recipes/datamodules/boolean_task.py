"""Boolean functions of a few bits with noisy labels: a world so small that its hypotheses can be counted.

Feder, Urbanke, Fogel, "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025
(https://arxiv.org/abs/2506.07661; no official code; the task is ours). All 2^bits inputs are equally likely:

    x uniform in {-1, +1}^bits,   y = rule(x), flipped with probability `noise`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.base import DataModule, require

PAPER = Paper(
    "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
    "M. Feder, R. Urbanke, Y. Fogel",
    2025,
    "https://arxiv.org/abs/2506.07661",
)
RULES: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "constant": (1, lambda x: torch.ones(len(x), dtype=torch.bool)),
    "first_bit": (1, lambda x: x[:, 0] > 0),
    "majority": (3, lambda x: x[:, :3].sum(1) > 0),
    "parity": (2, lambda x: x[:, :2].prod(1) > 0),
}
"""By name, the least number of bits and the rule: inputs ``[n, bits]`` of -1 and 1 to bool ``[n]``."""


def all_inputs(bits: int) -> Tensor:
    """Every input once: fp32 ``[2^bits, bits]`` of -1 and 1, the first bit the slowest."""
    places = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)
    return (places & 1).float() * 2 - 1


def draw_task(bits: int, rule: str, noise: float, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples of a task.

    Returns:
        indices into :func:`all_inputs` int64 ``[n]``, and labels int64 ``[n]``, 0 and 1.
    """
    places = torch.randint(2**bits, (n,), generator=draws)
    flips = torch.rand(n, generator=draws) < noise
    return places, (RULES[rule][1](all_inputs(bits))[places] != flips).long()


class BooleanTaskDataModule(DataModule):
    """A Boolean rule of some bits with noisy training labels; every input once, with clean ones, to validate and test.

    Args:
        bits: of an input.
        rule: 'constant' (true), 'first_bit', 'majority' of the first three bits, or 'parity' (equality) of the first
            two.
        noise: probability that a training label is flipped, below 1/2.
        n: training samples, drawn with replacement.
        batch_size: of all loaders.
        seed: of the draws, and with the global seed of the order.
        num_workers: worker processes of each loader.

    Raises:
        ValueError: for bad arguments.
    """

    paper = PAPER
    does = "Draws a Boolean rule of a few bits with noisy labels."
    use_when = "You want a task on which the prior mass of a hypothesis can be counted, with LangevinMixture."
    costs = "Nothing to speak of."
    purpose = "datamodules"

    def __init__(
        self,
        bits: int = 5,
        rule: str = "first_bit",
        noise: float = 0.1,
        n: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        require(rule in RULES, "rule", rule, f"one of {', '.join(map(repr, RULES))}")
        least = RULES[rule][0]
        require(least <= bits <= 20, "bits", bits, f"from {least} to 20 for {rule!r}")
        require(0 <= noise < 0.5, "noise", noise, "at least 0 and below 0.5: at a half nothing is left of the rule")
        require(n >= 1, "n", n, "at least 1")
        self.bits, self.rule, self.noise, self.n = bits, rule, noise, n
        self.class_names = ["false", "true"]

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        inputs = all_inputs(self.bits)
        places, labels = draw_task(self.bits, self.rule, self.noise, self.n, generator(self.seed, "Boolean task"))
        self.train_set = TensorDataset(inputs[places], labels)
        clean = RULES[self.rule][1](inputs).long()
        self.val_set = self.test_set = TensorDataset(inputs, clean)

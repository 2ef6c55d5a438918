"""What a network says of its targets, as a log-probability, and what several say together: for whatever weighs networks
by their likelihood.

A log-probability is any function ``log_prob(outputs, targets) -> [n]`` of what the network puts out and the targets of
the batch. One that also has ``mixture(outputs)``, from the outputs of M networks ``[M, n, ...]`` to ``[n, ...]``, says
which single output stands for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_recipes.core.errors import RecipeError, check_argument

LogProb = Callable[[Any, Tensor], Tensor]
"""From outputs and targets to one number a sample, ``[n]``, in nats."""


@dataclass(frozen=True)
class GaussianLogProb:
    """Targets that are normal around the network's output.

    The loss whose mean this is the negative of is ``mse_loss / (2 std^2)`` plus a constant; ``mse_loss`` itself goes
    with std = sqrt(1/2). Of targets ``[n, d]`` the log-probabilities of the d numbers are summed.

    Args:
        std: of a target, in its units; None where the network gives it: the last axis of its outputs then holds as many
            means as there are targets and after them as many log standard deviations.

    Raises:
        RecipeError: for a bad `std`, and for outputs that are not of the size of the targets.
    """

    std: float | None = 1.0

    def __post_init__(self) -> None:
        fits = self.std is None or 0 < self.std < math.inf
        check_argument(fits, self, "std", self.std, "None or positive and finite")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log N(targets; mean, std^2), ``[n]``.

        Args:
            outputs: ``[n, ...]``.
            targets: as many numbers; ``[n]`` beside ``[n, 1]`` will do.
        """
        mean, log_std = self._moments(outputs)
        if mean.numel() != targets.numel() or len(mean) != len(targets):
            raise RecipeError(
                f"{type(self).__name__}: the outputs {tuple(outputs.shape)} give {tuple(mean.shape)} means, and the"
                f" targets are {tuple(targets.shape)}"
            )
        z = (targets.reshape(mean.shape) - mean) * (-log_std).exp()
        each = -z.square() / 2 - log_std - math.log(2 * math.pi) / 2
        return each.reshape(len(each), -1).sum(1)

    def mixture(self, outputs: Tensor) -> Tensor:
        """The mean of the mixture, and its standard deviation where the network gives one.

        Args:
            outputs: of M networks, ``[M, n, ...]``.
        """
        if self.std is not None:
            return outputs.mean(0)
        mean, log_std = self._moments(outputs)
        variance = (2 * log_std).exp().mean(0) + mean.var(0, correction=0)
        return torch.cat([mean.mean(0), variance.log() / 2], -1)

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.std is not None:
            return outputs, outputs.new_tensor(self.std).log()
        if outputs.shape[-1] % 2:
            raise RecipeError(
                f"{type(self).__name__}(std=None) takes means and log standard deviations from the last axis of the"
                f" outputs, which are {tuple(outputs.shape)}"
            )
        mean, log_std = outputs.chunk(2, -1)
        return mean, log_std


# -- mixtures of M networks -------------------------------------------------------------------------------------------


def mixture_log_prob(log_probs: Tensor) -> Tensor:
    """log of the mean of probabilities.

    Args:
        log_probs: ``[M, ...]``, the log-probabilities of M members, normalised.

    Returns:
        ``[...]``.
    """
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mixture_sums(log_probs: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
    """What a batch adds to the figures of a mixture.

    Args:
        log_probs: of the members, ``[M, n, classes]``.
        log_q: of the mixture, ``[n, classes]``.
        labels: int64 ``[n]``; None where they are not known.

    Returns:
        fp64 ``[5]``: sums over samples of the mixture's log-loss, of the members' mean log-loss, of the mean of
        KL(member || mixture); the number of samples with a label, and of all.
    """
    apart = (log_probs.exp() * (log_probs - log_q)).nan_to_num(nan=0.0).sum(-1).mean(0).double().sum()
    n = log_q.new_tensor(len(log_q), dtype=torch.float64)
    if labels is None:
        zero = torch.zeros_like(n)
        return torch.stack([zero, zero, apart, zero, n])
    at = labels[:, None]
    mixed = -log_q.gather(1, at).double().sum()
    mean = -log_probs.gather(2, at.expand(len(log_probs), -1, 1)).mean(0).double().sum()
    return torch.stack([mixed, mean, apart, n, n])


def likelihood_sums(log_probs: Tensor) -> Tensor:
    """:func:`mixture_sums` where members give log-probabilities of the targets alone; of KL(member || mixture) nothing
    is known.

    Args:
        log_probs: of the members, ``[M, n]``.
    """
    mixed, mean = -mixture_log_prob(log_probs).double().sum(), -log_probs.mean(0).double().sum()
    n = torch.full_like(mixed, log_probs.shape[1])
    return torch.stack([mixed, mean, torch.zeros_like(mixed), n, n])


def code_lengths(log_probs: Tensor) -> Tensor:
    """What a batch adds to the code, before it is trained on.

    Args:
        log_probs: of its targets ``[M, n]``, the last member the weights at hand.

    Returns:
        fp64 ``[3]``: nats by the mixture, nats by the weights at hand alone, and n.
    """
    mixed, last = -mixture_log_prob(log_probs).double().sum(), -log_probs[-1].double().sum()
    return torch.stack([mixed, last, torch.full_like(mixed, log_probs.shape[1])])

"""Contrastive losses in fp32 with the negatives of all ranks, and a LightningModule that pre-trains with any of them.

With s_ij = cos(u_i, u_j) / tau over all views of all samples:

    SimCLR      L_i = -s_ip + log sum_{j != i} exp(s_ij)                      p: the other view of the same sample
    SupCon      L_i = -mean_{j != i: y_j = y_i} s_ij + log sum_{j != i} exp(s_ij)
    spectral    L   = -2 mean_i u_i'u_i+  +  mean_{i != j} (u_i'u_j+)^2       u itself, not normalised

The first two are means over the anchors. Chen et al. 2020 (https://arxiv.org/abs/2002.05709), Khosla et al. 2020
(https://arxiv.org/abs/2004.11362), HaoChen et al. 2021 (https://arxiv.org/abs/2106.04156).

Negatives come from the batch at hand on all ranks; accumulating gradients makes no larger batch of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.gather import first_of_own, gather, mean_over_ranks
from lightning_recipes.modules.classifier import NOT_SAVED, OptimizedModule

Views = tuple[Tensor, Tensor, Tensor | None]


class _CosineLoss(nn.Module):
    def __init__(self, tau: float = 0.5, gather: bool = True) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau={tau!r}: must be positive")
        self.tau, self.gather = tau, gather

    def extra_repr(self) -> str:
        return f"tau={self.tau}, gather={self.gather}"

    def _similarities(self, anchors: Tensor, keys: Tensor) -> Tensor:
        return anchors @ keys.mT / self.tau


class SupConLoss(_CosineLoss):
    """Supervised contrastive loss: every sample of the same class is a positive, in one view of each or in two.

    Args:
        tau: temperature.
        gather: compare with the samples of all ranks, which must have equal batches; else with this rank's alone.
    """

    def forward(self, first: Tensor, second: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Mean over the anchors that have a positive, of all ranks where it gathers.

        With two views every anchor has one. With one view the check that any has costs a wait for the device.

        Args:
            first: u of the first views ``[n, q]``.
            second: u of the second views ``[n, q]``, or None.
            labels: classes ``[n]``.

        Returns:
            a scalar in fp32; under DDP this rank's share, whose mean over ranks is the loss.

        Raises:
            RecipeError: without labels, and when no class of the batch has two samples.
        """
        if labels is None:
            raise RecipeError("SupConLoss needs labels: batches of (x1, x2, y)")
        with torch.autocast(first.device.type, enabled=False):
            u = F.normalize((first if second is None else torch.cat([first, second])).float(), dim=1)
            y = labels if second is None else torch.cat([labels, labels])
            keys, of_keys = (gather(u), gather(y)) if self.gather else (u, y)
            itself = torch.arange(len(u), device=u.device) + (first_of_own(len(u)) if self.gather else 0)
            s = self._similarities(u, keys)
            others = torch.ones_like(s, dtype=torch.bool).scatter_(1, itself[:, None], False)
            positive = (y[:, None] == of_keys) & others
            count = positive.sum(1)
            pull = torch.where(positive, s, 0.0).sum(1) / count.clamp_min(1)
            each = torch.logsumexp(s.masked_fill(~others, -torch.inf), 1) - pull
            has = count > 0
            if second is None and not bool(all_sum(has.sum()) if self.gather else has.any()):
                raise RecipeError(
                    f"SupConLoss: no class has two samples in a batch of {len(keys)}, so no anchor has a positive; use"
                    " larger batches, batches with several samples of a class, or two views"
                )
            if self.gather:
                return mean_over_ranks(each, has)
            return torch.where(has, each, 0.0).sum() / has.sum().clamp_min(1)


class NTXentLoss(_CosineLoss):
    """SimCLR's loss: the one positive of a view is the other view of the same sample. Labels are not looked at.

    Args:
        tau: temperature.
        gather: compare with the samples of all ranks, which must have equal batches; else with this rank's alone.
    """

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean over both views of all samples: u of the first and of the second views ``[n, q]`` to a fp32 scalar."""
        with torch.autocast(first.device.type, enabled=False):
            views = [F.normalize(u.float(), dim=1) for u in (first, second)]
            keys = torch.cat([gather(u) if self.gather else u for u in views])
            n, half = len(first), len(keys) // 2
            place = torch.arange(n, device=first.device) + (first_of_own(n) if self.gather else 0)
            itself, other = torch.cat([place, place + half]), torch.cat([place + half, place])
            s = self._similarities(torch.cat(views), keys)
            pull = s.gather(1, other[:, None])[:, 0]
            return (torch.logsumexp(s.scatter(1, itself[:, None], -torch.inf), 1) - pull).mean()


class SpectralContrastiveLoss(nn.Module):
    """Spectral contrastive loss, whose minimum factorises the graph of augmentations. Labels are not looked at.

    Args:
        gather: compare with the samples of all ranks, which must have equal batches; else with this rank's alone.
    """

    def __init__(self, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
        """u of the first and of the second views ``[n, q]`` to a fp32 scalar.

        Raises:
            RecipeError: for a batch of a single sample, which has no negatives.
        """
        with torch.autocast(first.device.type, enabled=False):
            first, second = first.float(), second.float()
            keys = gather(second) if self.gather else second
            if len(keys) < 2:
                raise RecipeError("SpectralContrastiveLoss needs batches of at least two samples: one has no negative")
            own = torch.arange(len(first), device=first.device) + (first_of_own(len(first)) if self.gather else 0)
            products = first @ keys.mT
            pull = products.gather(1, own[:, None])
            push = (products.square().sum() - pull.square().sum()) / (len(first) * (len(keys) - 1))
            return push - 2 * pull.mean()


def two_views(batch: Any) -> Views | None:
    """The two views and the labels, if any, of a batch (x1, x2), (x1, x2, y) or ((x1, x2), y); None for any other.

    A pair is two views when both have the same shape; a tensor beside its class indices is none.
    """
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], (tuple, list)) and len(batch[0]) == 2:
            return (*batch[0], batch[1] if len(batch) > 1 else None)
        pair = len(batch) in (2, 3) and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor)
        if pair and batch[0].shape == batch[1].shape:
            return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    return None


class ContrastivePretraining(OptimizedModule):
    """Trains an encoder through a projection head by a contrastive loss on two views of every sample.

    Batches are (x1, x2), (x1, x2, y) or ((x1, x2), y). Logs train/loss, and val/loss where validation batches have two
    views too; a validation batch (x, y) is only encoded, for monitors that look on.

    Args:
        encoder: x to z ``[n, p]``: a module, or the name of a timm model, built without its classifier.
        head: z to u ``[n, q]``; None for u = z.
        loss: of (u1, u2, labels): SupConLoss, NTXentLoss, SpectralContrastiveLoss or your own.
        keep: what ``forward`` and ``predict_step`` give downstream: z ('pre'), u ('post') or both as a pair.
        model_args: arguments of a timm model, for example in_chans, img_size.
        optimizer: makes the optimizer from the parameters; None for AdamW at its defaults.
        lr_scheduler: makes the schedule from the optimizer; None for a constant rate.
        lr_interval: "epoch" or "step".
        monitor: what a ReduceLROnPlateau watches.

    Raises:
        ValueError: for a bad argument.
        RecipeError: in the first step for a batch without two views.
    """

    def __init__(
        self,
        encoder: nn.Module | str,
        head: nn.Module | None = None,
        loss: nn.Module | None = None,
        keep: Literal["pre", "post", "both"] = "pre",
        model_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "train/loss",
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, lr_interval=lr_interval, monitor=monitor)
        if keep not in ("pre", "post", "both"):
            raise ValueError(f"keep={keep!r}: must be 'pre', 'post' or 'both'")
        own = [name for name, part in (("encoder", encoder), ("head", head), ("loss", loss)) if not _plain(part)]
        self.save_hyperparameters(ignore=[*NOT_SAVED, *own])
        if isinstance(encoder, nn.Module) and model_args:
            raise ValueError("model_args belong to an encoder given by name; this one is built already")
        if isinstance(encoder, str):
            import timm  # only here: importing the recipes imports this file

            encoder = timm.create_model(encoder, num_classes=0, **(model_args or {}))
        self.encoder = encoder
        self.head = nn.Identity() if head is None else head
        self.loss = NTXentLoss() if loss is None else loss
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x to what is kept for downstream."""
        z = self.encoder(x)
        if self.keep == "pre":
            return z
        return self.head(z) if self.keep == "post" else (z, self.head(z))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = two_views(batch)
        if views is None:
            raise RecipeError(
                "ContrastivePretraining needs batches (x1, x2), (x1, x2, y) or ((x1, x2), y) of two views"
            )
        loss = self._loss(views)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(views[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        views = two_views(batch)
        if views is None:
            self.head(self.encoder(batch[0] if isinstance(batch, (tuple, list)) else batch))
        else:
            self.log("val/loss", self._loss(views), prog_bar=True, batch_size=len(views[0]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | tuple[Tensor, Tensor]:
        views = two_views(batch)
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self(x if views is None else views[0])

    def sides(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """z, u and the labels, if any, of a batch; of the first views where there are two. For PrePostMonitor."""
        views = two_views(batch)
        x = views[0] if views is not None else batch if isinstance(batch, Tensor) else batch[0]
        labels = views[2] if views is not None else None if isinstance(batch, Tensor) else batch[1]
        z = self.encoder(x)
        return z, self.head(z), labels

    def _loss(self, views: Views) -> Tensor:
        first, second, labels = views
        u = self.head(self.encoder(torch.cat([first, second])))  # one pass: batch norms see both views
        return self.loss(*u.chunk(2), labels)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str)

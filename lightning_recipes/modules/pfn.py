"""A transformer that is trained once, on data sets drawn from a prior, and then predicts for any data set in its input.

Mueller, Hollmann, Pineda Arango, Grabocka, Hutter, "Transformers Can Do Bayesian Inference", ICLR 2022
(https://arxiv.org/abs/2112.10510, code: https://github.com/automl/TransformersCanDoBayesianInference). With a data set
of the prior cut into a context D = (x_1, y_1) .. (x_n, y_n) and queries (x_i, y_i), i > n:

    loss   = mean over queries of -log q(y_i | x_i, D)
           = E KL(p(. | x, D) || q(. | x, D)) + what no network can change

so the optimum is the posterior predictive p of that prior. q is a bar distribution whose borders are quantiles of the
prior's targets (`modules/bar_distribution.py`), a Gaussian, or class probabilities. The network:

    tokens      E_x(x_i) + E_y(y_i) for the context, E_x(x_i) for a query; no positions, so order does not matter
    attention   every token sees the context; a query sees itself too, and nobody sees a query
    encoder     post-norm transformer layers with GELU, the last map of every residual branch 0 at the start
    decoder     Linear, GELU, Linear on the queries

It costs attention over T^2 pairs of tokens, and the drawing of the data sets, which for a Gaussian process with its
T^3 is often more. The rate warms up and falls with the cosine after every step; the original's stays the same for an
"epoch" of 100 steps, and is 0 in the first. The original sums gradients over micro-batches before it clips them at 1,
Lightning averages them: with ``accumulate_grad_batches`` choose the rate anew and leave the clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.priors import Prior, draw
from lightning_recipes.modules.bar_distribution import BarDistribution, check_borders, quantile_borders

PAPER = Paper(
    "Transformers Can Do Bayesian Inference",
    "S. Mueller, N. Hollmann, S. Pineda Arango, J. Grabocka, F. Hutter",
    2022,
    "https://arxiv.org/abs/2112.10510",
    "https://github.com/automl/TransformersCanDoBayesianInference",
)
BORDER_SAMPLE = 100_000
"""Targets of the prior that the borders are estimated from, at least; and at least a hundred a bucket."""


# -- the network -----------------------------------------------------------------------------------------------------


def attention_mask(tokens: int, n_context: int, device: torch.device | str = "cpu") -> Tensor:
    """Which token may look at which, bool ``[T, T]``, True where it must not (torch's convention)."""
    place = torch.arange(tokens, device=device)
    return (place[None, :] >= n_context) & (place[None, :] != place[:, None])


def warm_up_cosine(step: int, warm: float, total: float) -> float:
    """Factor on the rate of step 0, 1, ...: up in a straight line over `warm` steps, then down with the cosine."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(total - warm, 1))))


class PFNTransformer(nn.Module):
    """From a context and queries to what the decoder says of each query.

    Args:
        num_features: F.
        num_outputs: of the decoder.
        emsize, nhead, nlayers, nhid: width, heads, layers and hidden width.
        dropout: of the encoder.
    """

    def __init__(
        self, num_features: int, num_outputs: int, emsize: int, nhead: int, nlayers: int, nhid: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed_x, self.embed_y = nn.Linear(num_features, emsize), nn.Linear(1, emsize)
        # one by one: nn.TransformerEncoder copies a layer, and all begin with the same weights
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(emsize, nhead, nhid, dropout, activation="gelu", batch_first=True)
            for _ in range(nlayers)
        )
        for layer in self.layers:
            for last in (layer.linear2, layer.self_attn.out_proj):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        self.decoder = nn.Sequential(nn.Linear(emsize, nhid), nn.GELU(), nn.Linear(nhid, num_outputs))

    def forward(self, x: Tensor, y: Tensor, n_context: int) -> Tensor:
        """x ``[T, B, F]``, y ``[n or more, B]`` (the rest is not read), to ``[T - n, B, outputs]``."""
        tokens = self.embed_x(x)
        context = tokens[:n_context] + self.embed_y(y[:n_context, :, None].to(x.dtype))
        tokens = torch.cat([context, tokens[n_context:]]).transpose(0, 1)
        mask = attention_mask(x.shape[0], n_context, x.device)
        for layer in self.layers:
            tokens = layer(tokens, src_mask=mask)
        return self.decoder(tokens[:, n_context:].transpose(0, 1))


# -- what it predicts ------------------------------------------------------------------------------------------------


class Normal(nn.Module):
    """A Gaussian of mean and variance, the variance being the size of the second output."""

    num_outputs = 2

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood: logits ``[..., 2]``, y ``[...]`` to ``[...]``."""
        mean, variance = logits[..., 0].float(), self.variance(logits)
        return ((y - mean).square() / variance + (2 * math.pi * variance).log()) / 2

    def mean(self, logits: Tensor) -> Tensor:
        return logits[..., 0].float()

    def variance(self, logits: Tensor) -> Tensor:
        return logits[..., 1].float().abs() + 1e-6

    def icdf(self, logits: Tensor, q: float) -> Tensor:
        return self.mean(logits) + self.variance(logits).sqrt() * torch.special.ndtri(torch.tensor(q)).to(logits.device)


class Classes(nn.Module):
    """Class probabilities; two classes may have one output (binary cross-entropy)."""

    def __init__(self, num_classes: int, binary: bool) -> None:
        super().__init__()
        self.binary, self.num_outputs = binary, 1 if binary else num_classes

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy: logits ``[..., outputs]``, classes y ``[...]`` of any number type, to ``[...]``."""
        logits = logits.float()
        if self.binary:
            return F.binary_cross_entropy_with_logits(logits[..., 0], y.float(), reduction="none")
        return F.cross_entropy(logits.flatten(0, -2), y.long().flatten(), reduction="none").view(y.shape)

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[..., classes]``."""
        logits = logits.float()
        if self.binary:
            one = logits.sigmoid()
            return torch.cat([1 - one, one], -1)
        return logits.softmax(-1)


# -- the module ------------------------------------------------------------------------------------------------------


class PFNModule(LightningModule):
    """A prior-data fitted network: trained on a `PriorDataModule`, it predicts from a context without further training.

    Batches are dict(x [T, B, F], y [T, B], n_context). Logs ``pfn/nll`` and, with bars, ``pfn/outside_support`` (share
    of targets beyond the borders) in training, ``val/loss`` and ``test/loss``; ``predict_step`` returns the logits of
    the queries [T - n, B, outputs] with their mean or the class probabilities. `InContextPrediction` predicts on a
    table of one's own.

    Borders, and what the prior's x and y look like, are estimated from the data module's prior when the fit is set up,
    the same on all ranks, and kept in the checkpoint.

    Args:
        num_features: F; a table may have fewer.
        emsize: width of the tokens.
        nhead: attention heads; a divisor of emsize.
        nlayers: encoder layers.
        nhid: hidden width; None for twice emsize.
        dropout: in the encoder; 0.5 in the paper's tabular models, else 0.
        output: "bar" (a bar distribution), "gaussian" (mean and variance), "ce" (classes) or "bce" (two classes).
        num_buckets: K of "bar".
        num_classes: of "ce".
        full_support: of the bar distribution, tails beyond the outer borders.
        borders: K + 1 numbers, for a training on other data than a PriorDataModule's; None estimates them.
        lr: rate of Adam after the warm-up; None for 0.003239 - 0.0001395 ln(number of parameters).
        warmup: share of all optimizer steps over which the rate rises.
        seed: of what is drawn to estimate borders.

    Raises:
        RecipeError: for bad arguments; in the set-up of a fit for "bar" without borders or a prior to estimate them
            from, and for a prior with constant targets; before a prediction for borders that were never estimated.
    """

    paper = PAPER
    purpose = "data"
    does = "A transformer trained on data sets of a prior does Bayesian inference for any other in one pass."
    use_when = "many small data sets, or many posteriors of one prior: Gaussian processes, networks, your own sampler."
    costs = "one training per prior, attention over T^2 pairs of tokens; then one forward pass a data set."

    distribution: BarDistribution | Normal | Classes
    x_mean: Tensor
    trained: ClassVar[Sequence[str]] = ("x_mean", "x_std", "x_low", "x_high", "y_mean", "y_std", "y_low", "y_high")
    """Buffers that say what the prior's inputs (of each feature) and targets look like."""

    def __init__(
        self,
        num_features: int = 1,
        emsize: int = 512,
        nhead: int = 4,
        nlayers: int = 6,
        nhid: int | None = None,
        dropout: float = 0.0,
        output: Literal["bar", "gaussian", "ce", "bce"] = "bar",
        num_buckets: int = 1000,
        num_classes: int = 2,
        full_support: bool = True,
        borders: Sequence[float] | None = None,
        lr: float | None = 3e-4,
        warmup: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("emsize", emsize), ("nhead", nhead), ("nlayers", nlayers)):
            check_argument(value >= 1, self, name, value, "at least 1")
        check_argument(emsize % nhead == 0, self, "nhead", nhead, f"a divisor of emsize ({emsize})")
        check_argument(nhid is None or nhid >= 1, self, "nhid", nhid, "None or at least 1")
        check_argument(0 <= dropout < 1, self, "dropout", dropout, "in [0, 1)")
        kinds = ("bar", "gaussian", "ce", "bce")
        check_argument(output in kinds, self, "output", output, f"one of {kinds}")
        check_argument(num_buckets >= 2, self, "num_buckets", num_buckets, "at least 2")
        check_argument(num_classes >= 2, self, "num_classes", num_classes, "at least 2")
        check_argument(lr is None or lr > 0, self, "lr", lr, "None or positive")
        check_argument(0 <= warmup < 1, self, "warmup", warmup, "in [0, 1)")
        if borders is not None:
            borders = [float(border) for border in borders]
            num_buckets = len(borders) - 1
        self.save_hyperparameters()
        self.num_features, self.output, self.lr, self.warmup, self.seed = num_features, output, lr, warmup, seed
        if output == "bar":
            begin = torch.linspace(-3, 3, num_buckets + 1) if borders is None else torch.tensor(borders)
            self.distribution = BarDistribution(begin, full_support)
        else:
            self.distribution = Normal() if output == "gaussian" else Classes(num_classes, output == "bce")
        self.network = PFNTransformer(
            num_features, self.distribution.num_outputs, emsize, nhead, nlayers, nhid or 2 * emsize, dropout
        )
        self.register_buffer("has_borders", torch.tensor(output != "bar" or borders is not None))
        self.register_buffer("max_context", torch.tensor(0))  # 0 where no prior was seen
        for name in self.trained:
            self.register_buffer(name, torch.zeros(num_features if name.startswith("x") else ()))

    def forward(self, x: Tensor, y: Tensor, n_context: int) -> Tensor:
        """x ``[T, B, F]`` and y ``[n or more, B]`` to the logits of the queries, ``[T - n, B, outputs]``."""
        return self.network(x, y, n_context)

    # -- what the prior looks like -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "predict":
            return
        data = self.trainer.datamodule
        prior = getattr(data, "prior", None)
        if isinstance(prior, Prior):
            if data.num_features != self.num_features:
                raise RecipeError(
                    f"PFNModule: num_features is {self.num_features}, that of the PriorDataModule {data.num_features};"
                    " they must be the same"
                )
            self.estimate(prior, data.seq_len, data.max_context)
        elif not bool(self.has_borders) and stage == "fit":
            raise RecipeError(
                "PFNModule: output='bar' needs borders, or a PriorDataModule whose prior they are estimated from; the"
                f" data module is {type(data).__name__}"
            )

    @torch.no_grad()
    def estimate(self, prior: Prior, seq_len: int, max_context: int) -> None:
        """Take borders and moments from data sets of a prior; borders that were given stay.

        Raises:
            RecipeError: for a prior that gives other shapes, or targets that repeat too often for so many buckets.
        """
        wanted = max(BORDER_SAMPLE, 100 * self.distribution.num_outputs)
        rounds, done = [], 0
        while done < wanted:
            numbers = generator(self.seed, "PFNModule/borders", len(rounds))
            rounds.append(draw(prior, seq_len, max(2, min(1000, wanted // seq_len)), self.num_features, numbers))
            done += rounds[-1][1].numel()
        x = torch.cat([x.flatten(0, 1) for x, _ in rounds])
        y = torch.cat([y.flatten() for _, y in rounds])
        found = {"x_mean": x.mean(0), "x_std": x.std(0), "x_low": x.amin(0), "x_high": x.amax(0)}
        found |= {"y_mean": y.mean(), "y_std": y.std(), "y_low": y.min(), "y_high": y.max()}
        for name, value in found.items():
            getattr(self, name).copy_(value)
        self.max_context.fill_(max_context)
        if self.hparams.borders is None and self.output == "bar":
            borders = quantile_borders(y[torch.randperm(len(y), generator=generator(self.seed, "PFNModule/order"))],
                                       self.distribution.num_buckets)  # fmt: skip
            try:
                check_borders(borders)
            except RecipeError as error:
                raise RecipeError(
                    f"PFNModule: the targets of {type(prior).__name__} make no borders: {error}"
                ) from None
            self.distribution.set_borders(borders)
            self.has_borders.fill_(True)

    def on_predict_start(self) -> None:
        if not bool(self.has_borders):
            raise RecipeError(
                "PFNModule: its borders were never estimated: it was not trained, and no checkpoint was loaded; give"
                " ckpt_path=, or PFNModule.load_from_checkpoint"
            )

    # -- steps -------------------------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean negative log likelihood of the batch's queries."""
        n = batch["n_context"]
        return self.distribution(self(batch["x"], batch["y"], n), batch["y"][n:]).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, size = self.loss(batch), batch["x"].shape[1]
        self.log("pfn/nll", loss, prog_bar=True, batch_size=size)
        if self.output == "bar":
            outside = self.distribution.outside(batch["y"]).float().mean()
            self.log("pfn/outside_support", outside, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True, batch_size=batch["x"].shape[1], sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=batch["x"].shape[1], sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        logits = self(batch["x"], batch["y"], batch["n_context"])
        if isinstance(self.distribution, Classes):
            return {"logits": logits, "probabilities": self.distribution.probabilities(logits)}
        return {"logits": logits, "mean": self.distribution.mean(logits)}

    def configure_optimizers(self) -> Any:
        lr = self.lr
        if lr is None:
            lr = 0.003239 - 0.0001395 * math.log(sum(p.numel() for p in self.parameters()))
            if lr <= 0:
                raise RecipeError("PFNModule: lr=None has no rate for a network of this size; give a number")
        optimizer = Adam(self.parameters(), lr)
        total = self.trainer.estimated_stepping_batches
        if total == math.inf or total < 1:
            raise RecipeError("PFNModule: its schedule needs an end; give the Trainer max_epochs or max_steps")
        warm = self.warmup * total
        schedule = LambdaLR(optimizer, lambda step: warm_up_cosine(step, warm, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

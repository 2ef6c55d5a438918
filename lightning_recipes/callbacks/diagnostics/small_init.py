"""Smaller (or larger) first weights: the one number that decides whether a network groks.

Xu, Wang, Frei, Vardi, Hu, "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data", 2024
(https://arxiv.org/abs/2310.02541; no official code). The paper's network starts from weights w ~ N(0, omega^2) that are
tiny against its first step. For any network and chosen parameters:

    w(0) <- scale * w(0)

Costs nothing in training. Weights that are followed by a normalisation layer do not change what the network computes,
and those of a normalisation layer change how strong its output is.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.surgery import Writing

TINY = 1e-5
"""Below this standard deviation weights do not train in half precision."""


def matching(module: nn.Module, patterns: Sequence[str], argument: str) -> list[str]:
    """Names of the parameters whose whole name one of the regular expressions matches.

    Raises:
        RecipeError: for one that matches none; lists the names.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise RecipeError(f"{argument}={pattern!r} matches no parameter; the module has {', '.join(names)}")
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


class SmallInit(Recipe):
    """Multiply chosen weights once, before training; weights that a checkpoint brings are left as they are.

    A module is scaled once, also when it is fitted again. Adapters that another recipe adds stand on the scaled
    weights and are not scaled themselves.

    Args:
        scale: factor on the first weights, positive; 1 leaves them.
        match: regular expressions for whole parameter names, one or several.
        freeze: regular expressions for parameters that shall not train, such as the second layer's.

    Raises:
        RecipeError: for bad arguments; in setup for a pattern that matches no parameter, and when nothing would train.
    """

    paper = Paper(
        "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data",
        "Z. Xu, Y. Wang, S. Frei, G. Vardi, W. Hu",
        2024,
        "https://arxiv.org/abs/2310.02541",
    )
    does = "Scales the first weights, on which it hangs whether features are learnt late, early or not."
    use_when = "You train from scratch and want to see, or to rule out, that the size of the first weights matters."
    costs = "Nothing."

    def __init__(self, scale: float, match: str | Sequence[str] = ".*weight", freeze: Sequence[str] = ()) -> None:
        super().__init__()
        self.scale, self.match, self.freeze = scale, match, freeze
        positive = 0 < scale < float("inf")
        check_argument(positive, self, "scale", scale, "positive: at 0 no ReLU has a sign to begin from")
        for name, patterns in (("match", self._match), ("freeze", freeze)):
            ok = not isinstance(patterns, str) and all(_compiles(pattern) for pattern in patterns)
            what = "regular expressions for parameter names"
            check_argument(ok and (name == "freeze" or len(patterns) > 0), self, name, getattr(self, name), what)
        self._scaled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._writing: Writing | None = None

    @property
    def _match(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else list(self.match)

    @property
    def neutral(self) -> bool:
        return self.scale == 1 and not self.freeze

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        matching(plan.module, self._match, "match")
        if self.freeze:
            frozen = frozenset(matching(plan.module, self.freeze, "freeze"))
            plan.parameters(lambda: Claim(frozen=frozen))
        if plan.module not in self._scaled and self.scale != 1:
            self._writing = plan.write_weights(lambda: self._values(plan.module, plan.trainer.precision))
            plan.at_end(self._let_go)

    def _values(self, module: nn.Module, precision: Any) -> Mapping[str, Tensor]:
        parameters = dict(module.named_parameters())
        values = {name: parameters[name].detach() * self.scale for name in matching(module, self._match, "match")}
        if "16" in str(precision):
            smallest = min((float(v.float().std()) for v in values.values() if v.numel() > 1), default=1.0)
            if smallest < TINY:
                rank_zero_warn(
                    f"SmallInit: weights of standard deviation {smallest:.1g} in precision={precision!r}: in half"
                    f" precision gradients may vanish below {TINY:g}; train in 32-true"
                )
        return values

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keep(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Weights that have been trained stand there now: a run that has no batch left must not take them back."""
        self._keep(pl_module)

    def _keep(self, module: pl.LightningModule) -> None:
        if self._writing is not None:
            self._writing.settle()
            self._writing = None
            self._scaled.add(module)

    def _let_go(self) -> None:
        self._writing = None


def _compiles(pattern: Any) -> bool:
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        return False
    return True

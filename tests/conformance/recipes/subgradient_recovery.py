"""SubGM: its card in the conformance tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_recipes.callbacks import GLAD, PEGO, SubGM, SVFit
from lightning_recipes.modules import FactorProduct
from tests.conformance import table
from tests.conformance.misuse import Misuse, NoLayers, argument, manual, with_net
from tests.conformance.table import ConvNet, Row, small_hybrid
from tests.stock import Classifier


class LowRank(nn.Module):
    """A linear layer whose weight is U V^T, formed by a part of its own."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.randn(outputs, rank) / outputs**0.5)
        self.V = nn.Parameter(torch.randn(inputs, rank) / inputs**0.5)
        self.product = FactorProduct()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product(self.U, self.V))


class Residual(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LowRankConvNet(ConvNet):
    """Its widest linear layer as a product of factors."""

    def __init__(self) -> None:
        super().__init__()
        self[2][1] = LowRank(256, 16, 4)


def low_rank_hybrid() -> nn.Module:
    """:func:`small_hybrid` with a product of factors in its last block."""
    net = small_hybrid()
    net.blocks[1].ls2 = Residual(16, 16, 4)
    return net


class Factored(nn.Module):
    """Logits by a product of factors that no part forms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight_u, self.weight_v = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight_u @ self.weight_v).T


ROWS = [
    Row(
        "subgm",
        lambda: [SubGM(0.3, eta=0.05)],
        lambda: [SubGM(init="keep", schedule_lr=False, log_spectrum=False)],
        network=LowRankConvNet,
        optimizer="plain",
    ),
    Row(
        "subgm_lora",
        lambda: [
            GLAD(0.0, rank=4, lora_alpha=4, target_modules=["2.1"], train_fully=["3"]),
            SubGM(0.3, eta=0.05, pairs=[(r".*lora_B\..*", r".*lora_A\..*")]),
        ],
        optimizer="plain",
        trainer={"gradient_clip_val": 0.5},
    ),
]
MEMBERS = {"SubGM": lambda: SubGM(0.5, eta=0.02)}
NETWORK = {"SubGM": low_rank_hybrid}
OPTIMIZER = {"SubGM": "plain"}
AUTOMATIC = ["SubGM"]
REFUSED = {
    ("SubGM", "SVFit"): "there are no factors left",
    ("SubGM", "SaRA"): "there are no factors left",
    ("SubGM", "PEGO"): "must start and stay orthogonal",
    ("SubGM", "AdaptFormer"): "none of the factors trains (AdaptFormer trains what it adds",
}
OTHER = {"SubGM": {"eta": 0.3}}


def _on(optimizer: Any, **arguments: Any) -> Callable[..., Misuse]:
    """On factors that something else than plain SGD trains."""
    return functools.partial(
        Misuse,
        "SubGM",
        callbacks=lambda: [SubGM(0.1, **arguments)],
        module=lambda: Classifier(Factored(), optimizer=optimizer),
    )


def _scheduled(parameters: Any) -> dict[str, Any]:
    optimizer = SGD(parameters, lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1)}


def misuses() -> list[Misuse]:
    factored = with_net(Factored)
    bad = functools.partial(Misuse, "SubGM")
    found = r"the module has net\.0\.weight \[5, 6\], net\.0\.bias \[5\], "
    expressions = "pairs must be 'auto' or pairs of regular expressions; got "
    return [
        argument(SubGM, r"init_scale must be positive \(zero is a saddle: U = 0 never moves\); got 0", init_scale=0),
        argument(SubGM, "init_scale must be positive .* got -0.1", init_scale=-0.1),
        argument(SubGM, "eta must be positive; got 0", eta=0),
        argument(SubGM, r"eta must be below 2 log\(1/init_scale\) \+ 4 where rho is None; got 99", eta=99),
        argument(SubGM, r"rho must be None or in \(0, 1\); got 1.0", rho=1.0),
        argument(SubGM, r"rho must be None or in \(0, 1\); got 0", rho=0),
        argument(
            SubGM,
            r"eta=0.1, rho=0.99 sum to 10, and from init_scale=1e-06 they need log\(1/init_scale\) = 13.8: the iterate"
            " cannot leave the initialisation; raise eta, rho or init_scale",
            init_scale=1e-6,
            eta=0.1,
            rho=0.99,
        ),
        argument(SubGM, "normalize must be 'matrix', 'param' or 'none'; got 'u'", normalize="u"),
        argument(SubGM, "init must be 'random', 'keep' or 'spectral'; got 'zero'", init="zero"),
        argument(SubGM, expressions + "'lora'", pairs="lora"),
        argument(SubGM, expressions + r"\[\]", pairs=[]),
        argument(SubGM, expressions + r"\['UV'\]", pairs=["UV"]),
        argument(SubGM, expressions + r"\[\('\(U', 'V'\)\]", pairs=[("(U", "V")]),
        bad("no factors", rf"no pair of factors was found .*{found}.*pairs=\[\[B, A\], ...\]", lambda: [SubGM()]),
        bad(
            "an expression that matches nothing",
            rf"pairs: 'nothing' matches no parameter; {found}",
            lambda: [SubGM(pairs=[("nothing", ".*0.weight")])],
        ),
        bad(
            "a factor without a partner",
            r"pairs: '\.\*weight' matches 3 parameters and 'net\.0\.weight' 1; each factor needs its partner",
            lambda: [SubGM(pairs=[(".*weight", "net.0.weight")])],
        ),
        bad(
            "shapes that do not multiply",
            r"pairs: net\.4\.weight \[3, 5\] and net\.0\.bias \[5\] are no factors of one product",
            lambda: [SubGM(pairs=[("net.4.weight", "net.0.bias")])],
        ),
        bad(
            "a factor twice",
            r"pairs: net\.2\.weight is in two pairs",
            lambda: [SubGM(pairs=[("net.2.weight", "net.0.weight"), ("net.4.weight", "net.2.weight")])],
        ),
        bad(
            "factors that are frozen",
            r"none of the factors trains, net\.weight_u is the first of them; unfreeze both of a pair",
            lambda: [SubGM()],
            with_net(lambda: Factored().requires_grad_(False)),
        ),
        _on(lambda p: SGD(p, lr=0.1, momentum=0.9))(
            wrong="momentum",
            says=r"net\.weight_u is trained by SGD\(momentum=0\.9\), .* use SGD without momentum, schedule_lr=False, or"
            " allow_any_optimizer=True",
        ),
        _on(AdamW)(wrong="AdamW", says=r"net\.weight_u is trained by AdamW, on top of which normalised steps are mean"),
        _on(LBFGS)(wrong="LBFGS", says="LBFGS takes one flat step over all parameters"),
        _on(_scheduled)(
            wrong="a scheduler",
            says=r"StepLR sets the rate of net\.weight_u and SubGM does too; train the factors without a scheduler",
        ),
        _on(lambda p: SGD(p, lr=0.0))(
            wrong="no rate", says="net.weight_u's group must be positive to be scaled; got 0"
        ),
        bad("manual optimization", "needs automatic optimization", lambda: [SubGM()], manual(factored)),
        bad(
            "a spectral start without measurements",
            r"init='spectral' needs one pair of factors and a data module with `measurements`, .*no measurements: use",
            lambda: [SubGM(init="spectral")],
            factored,
        ),
        bad(
            "adapters that are added after it",
            "GLAD must stand before SubGM .*it starts the adapters that they add",
            lambda: [SubGM(), GLAD(target_modules=["2"])],
        ),
        bad("singular values", "cannot share a Trainer: .*no factors left", lambda: [SubGM(), SVFit()], factored),
        bad("orthogonal adapters", "start and stay orthogonal", lambda: [PEGO(target_modules=["2"]), SubGM()]),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    if row.name != "subgm":
        return []  # its first recipe is another one
    bare = lambda: table.Classifier(NoLayers(), row.optimizer)  # noqa: E731
    says = r"no pair of factors was found .*network\.scale \[10\]"
    return [
        Misuse("SubGM", "subgm on a module without factors", says, row.recipes, bare, lambda: table.digits()),
    ]

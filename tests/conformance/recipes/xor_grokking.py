"""GrokkingMonitor and SmallInit: their card in the conformance tests."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from lightning_recipes.callbacks import GrokkingMonitor, SmallInit
from tests.conformance.misuse import Embeds, Misuse, MultiLabel, Regression, X, Y, argument, sees_no_loss
from tests.conformance.table import Row
from tests.stock import loader

ROWS = [
    Row(
        "grokking",
        lambda: [GrokkingMonitor(40, every_n_steps=3, linear_share=True, budget=0.8)],
        monitors=True,
        validation=True,
    ),
    Row("small_init", lambda: [SmallInit(0.5, freeze=[r"network\.0\.0\.bias"])], lambda: [SmallInit(1.0)]),
]
MEMBERS = {
    "GrokkingMonitor": lambda: GrokkingMonitor(20),
    "SmallInit": lambda: SmallInit(0.5, [r".*attn\..*weight", r".*mlp\..*weight"]),
}
VALIDATES = ["GrokkingMonitor"]
OTHER = {"GrokkingMonitor": {"gen_threshold": 0.8}, "SmallInit": {"scale": 0.25}}


class Batches:
    """Validation data that are no DataLoader."""

    def __iter__(self) -> Any:
        return iter(loader(X, Y))


def of_monitor() -> list[Misuse]:
    monitor = GrokkingMonitor
    look = functools.partial(Misuse, "GrokkingMonitor", validation=lambda: loader(X, Y))
    directions = r"directions must be \(K, p\) with p=6, the first layer's in_features; got "
    kinds = "'classes', 'kmeans:K', or the path of a .pt file"
    return [
        argument(monitor, "probe_size must be at least 1; got 0", probe_size=0),
        argument(monitor, r"fit_threshold must be in \(0, 1\]; got 1\.5", fit_threshold=1.5),
        argument(monitor, r"gen_threshold must be in \(0, 1\]; got 0\.0", gen_threshold=0.0),
        argument(monitor, "every_n_steps must be None or at least 1; got 0", every_n_steps=0),
        argument(monitor, "geometric_steps must be true where every_n_steps is not given", geometric_steps=False),
        argument(monitor, "budget must be None or a positive share, as 0.1; got 0", budget=0),
        argument(monitor, "linear_share must be 'auto', True or False; got 'always'", linear_share="always"),
        argument(monitor, f"directions must be {kinds}; got 'kmeans:0'", directions="kmeans:0"),
        argument(monitor, f"directions must be {kinds}; got 'means'", directions="means"),
        Misuse(
            "GrokkingMonitor",
            "no validation data",
            "GrokkingMonitor needs validation data to see generalisation",
            lambda: [monitor()],
        ),
        look(
            "validation that is switched off",
            "GrokkingMonitor needs validation data to see generalisation",
            lambda: [monitor()],
            trainer={"limit_val_batches": 0},
        ),
        look(
            "a threshold at chance",
            r"gen_threshold=0\.33 is at or below chance for 3 classes",
            lambda: [monitor(gen_threshold=0.33)],
        ),
        look(
            "directions of another width",
            directions + r"\(2, 5\)",
            lambda: [monitor(directions=torch.ones(2, 5))],
        ),
        look("one direction", directions + r"\(6,\)", lambda: [monitor(directions=torch.ones(6))]),
        look(
            "directions for a layer of another width",
            r"directions must be \(K, p\) with p=5, the first layer's in_features; got \(3, 6\)",
            lambda: [monitor(directions="classes", first_layer="net.2")],
        ),
        look(
            "a first layer without rows",
            r"first_layer='net\.1' is a ReLU without a weight of rows",
            lambda: [monitor(directions="classes", first_layer="net.1")],
        ),
        look(
            "a file of directions that is not there",
            r"directions='nothing\.pt': no such file \(looked for .*nothing\.pt\)",
            lambda: [monitor(directions="nothing.pt")],
        ),
        look(
            "more centroids than samples",
            "directions='kmeans:99' of a probe of 16 samples",
            lambda: [monitor(directions="kmeans:99")],
        ),
        look(
            "validation data that are not read by index",
            "needs the validation data as a DataLoader over a data set read by index; got Batches",
            lambda: [monitor()],
            validation=Batches,
        ),
        look(
            "training data that are not read by index",
            "needs the training data as one DataLoader over a data set read by index; got Batches",
            lambda: [monitor()],
            data=Batches,
        ),
        look("a regression", r"needs a classification loss, .*\(mse_loss\) got", lambda: [monitor()], Regression),
        look("several labels a sample", r"needs a classification loss, .* got", lambda: [monitor()], MultiLabel),
        look(
            "a linear share of integer inputs",
            "linear_share=True reflects inputs; the batch has no input tensor of floating point",
            lambda: [monitor(linear_share=True)],
            Embeds,
            data=lambda: loader((X > 0.5).long(), Y),
            validation=lambda: loader((X > 0.5).long(), Y),
        ),
    ]


def of_init() -> list[Misuse]:
    names = r"net\.0\.weight, net\.0\.bias, net\.2\.weight"
    positive = "scale must be positive: at 0 no ReLU has a sign to begin from; got "
    expressions = "regular expressions for parameter names; got "
    return [
        argument(SmallInit, positive + r"0\.0", scale=0.0),
        argument(SmallInit, positive + "-1", scale=-1),
        argument(SmallInit, positive + "inf", scale=math.inf),
        argument(SmallInit, positive + "nan", scale=math.nan),
        argument(SmallInit, r"match must be " + expressions + r"'\(weight'", scale=0.5, match="(weight"),
        argument(SmallInit, r"match must be " + expressions + r"\[\]", scale=0.5, match=[]),
        argument(SmallInit, r"freeze must be " + expressions + r"'.*bias'", scale=0.5, freeze=".*bias"),
        Misuse(
            "SmallInit",
            "a pattern that matches nothing",
            f"match='nothing' matches no parameter; the module has {names}",
            lambda: [SmallInit(0.5, "nothing")],
        ),
        Misuse(
            "SmallInit",
            "a part of a name",
            f"match='weight' matches no parameter; the module has {names}",
            lambda: [SmallInit(0.5, ["weight"])],
        ),
        Misuse(
            "SmallInit",
            "a pattern to freeze that matches nothing",
            f"freeze='out.*' matches no parameter; the module has {names}",
            lambda: [SmallInit(0.5, freeze=["out.*"])],
        ),
        Misuse(
            "SmallInit",
            "everything frozen",
            "SmallInit: every parameter would be frozen; nothing is left to train",
            lambda: [SmallInit(0.5, freeze=[".*"])],
        ),
    ]


def misuses() -> list[Misuse]:
    return of_monitor() + of_init()


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=True)] if row.monitors else []

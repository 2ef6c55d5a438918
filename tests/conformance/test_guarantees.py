"""The guarantees, over every row of the table; those that take processes of their own are in ``test_lives.py``."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Recipe, plain
from lightning_recipes.trainer_cli import run as run_command

from .lives import ended, lively
from .recipes import ROWS
from .table import (
    BATCH,
    EPOCHS,
    LIGHTNINGS_OWN,
    Classifier,
    ConvNet,
    Row,
    batches,
    differing,
    furthest,
    same,
    stock,
    train,
    trained,
    weights,
)

ROOT = Path(__file__).parents[2]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


# -- 1. neutral ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.neutral], ids=lambda row: row.name)
def test_at_its_neutral_setting_the_fit_is_bitwise_the_fit_without_it(row: Row) -> None:
    without, _ = train(row, callbacks=[])
    neutral, _ = train(row, callbacks=row.neutral())
    assert same(weights(without), weights(neutral))
    assert not same(weights(without), weights(trained(row))), "the recipe itself must make a difference"


@pytest.mark.parametrize("row", [row for row in ROWS if row.monitors], ids=lambda row: row.name)
def test_a_monitor_changes_nothing_at_any_setting(row: Row) -> None:
    """Shuffled data, dropout, a validation and a plateau scheduler: everything that a monitor could disturb."""
    without, with_it = (ended(*lively(row, callbacks, exact=False)) for callbacks in ([], row.recipes()))
    for ends in (without, with_it):
        del ends["callbacks"]
    with_it["metrics"] = {k: v for k, v in with_it["metrics"].items() if k in without["metrics"]}  # others are its own
    assert differing(without, with_it) == []


@pytest.mark.parametrize("name", ["pego", "glad"])
def test_an_adapters_neutral_setting_is_plain_peft(name: str) -> None:
    """Weight 0 (mix 0) equals the adapter injected with plain peft, from the same seed."""
    from peft import LoraConfig, inject_adapter_in_model

    from lightning_recipes.callbacks import GLAD, PEGO

    torch.manual_seed(0)
    module = Classifier(ConvNet(), "filter")
    recipe = (
        PEGO(2, 1, 0.0, target_modules=["2.1"], train_fully=["3"])
        if name == "pego"
        else GLAD(0.0, rank=2, lora_alpha=2, target_modules=["2.1"], train_fully=["3"])
    )
    row = Row(name, lambda: [recipe], optimizer="filter")
    ours, _ = train(row, module=copy.deepcopy(module))
    torch.manual_seed(0)  # the recipes' default seed
    holder = torch.nn.Module()
    holder.add_module("inner", module)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["2.1"]), holder)
    module.network[3].requires_grad_(True)
    theirs, _ = train(row, callbacks=[], module=module)
    theirs.network[2][1].merge()
    assert torch.equal(ours.network[2][1].weight, theirs.network[2][1].base_layer.weight)
    assert torch.equal(ours.network[3].weight, theirs.network[3].weight)


# -- 2. resume -------------------------------------------------------------------------------------------------------


@rows
def test_a_resume_at_any_epoch_ends_with_the_same_weights(row: Row, tmp_path: Path) -> None:
    """Every stage of a schedule is resumed from; the data come in a fixed order and nothing else is random."""
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    through, fit = train(row, enable_checkpointing=True, callbacks=[*row.recipes(), keep])
    for epoch in range(EPOCHS - 1):
        torch.manual_seed(123)  # nothing may hang on the global state
        resumed, again = train(row, ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
        assert same(weights(through), weights(resumed)), f"resumed after epoch {epoch}"
        assert differing(fit.optimizers[0].state_dict(), again.optimizers[0].state_dict()) == []


def test_lightnings_own_finetuning_freezes_again_on_resume(tmp_path: Path) -> None:
    """What ProgressiveUnfreezing mends: the contrast that shows the resume test can fail."""
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    through, _ = train(LIGHTNINGS_OWN, enable_checkpointing=True, callbacks=[*LIGHTNINGS_OWN.recipes(), keep])
    resumed, _ = train(LIGHTNINGS_OWN, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert not same(weights(through), weights(resumed))
    assert torch.equal(saved["network.0.0.weight"], resumed.network[0][0].weight), "the backbone did not move again"


@rows
def test_checkpoints_load_with_weights_only(row: Row, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    train(row, enable_checkpointing=True, callbacks=[*row.recipes(), keep], max_epochs=2)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert {recipe.state_key for recipe in row.recipes()} <= set(checkpoint["callbacks"])


# -- 4. precision ----------------------------------------------------------------------------------------------------


ON_GPU = pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@rows
@pytest.mark.parametrize("accelerator", ["cpu", ON_GPU])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_trains_in_mixed_precision(row: Row, precision: str, accelerator: str) -> None:
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # Lightning's own scaler overflows and skips the first steps, which 32 bits do not
        device = "cuda" if accelerator == "gpu" else "cpu"
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        settings = {"plugins": [MixedPrecision("16-mixed", device, scaler)]}
    module, fit = train(row, accelerator=accelerator, **settings)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    full = trained(row, accelerator)
    start = stock(row)
    if row.keeps is not None:  # what is kept was not there at the start: after one step it is
        start, _ = train(row, max_steps=1, accelerator=accelerator)
    moved = _distance(full, start)
    assert moved > 0
    assert _distance(module, full) < 0.25 * moved, "it ends where the 32-bit run ends, seen from where both began"
    assert torch.isfinite(fit.callback_metrics["loss"])


# -- 5. accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if not row.couples], ids=lambda row: row.name)
def test_accumulated_micro_batches_equal_one_batch(row: Row) -> None:
    parts, _ = train(row, batch=BATCH // 4, accumulate_grad_batches=4)
    assert furthest(weights(trained(row)), weights(parts)) < 1e-5


# -- 6. compiled -----------------------------------------------------------------------------------------------------


def to_compile() -> list[tuple[Row, str]]:
    """Every recipe once, in the first row that has it alone; further rows that take hold of other sockets."""
    further = ("guidance_noise", "more_is_better_ntk", "projection_fixed", "ps_kd_snapshot", "unfreeze_every")
    first: dict[frozenset[type], Row] = {}
    for row in [row for row in ROWS if "+" not in row.name]:
        first.setdefault(frozenset(map(type, row.recipes())), row)
    single = [*first.values(), *(row for row in ROWS if row.name in further)]
    return [(row, "module") for row in single] + [(row, "network") for row in single if row.name in ("aaer_rs", "glad")]


@pytest.mark.parametrize(("row", "what"), to_compile(), ids=lambda value: getattr(value, "name", value))
def test_works_compiled(row: Row, what: str) -> None:
    """Dynamo and AOTAutograd are what a recipe can break; the eager backend below them needs no C++ compiler."""
    eager, _ = train(row, max_epochs=2)
    torch._dynamo.reset()
    module = stock(row)
    compiled: Any = module
    if what == "module":
        compiled = torch.compile(module, backend="aot_eager")
    else:
        module.network.compile(backend="aot_eager")
    train(row, module=compiled, max_epochs=2)
    assert furthest(weights(eager), weights(module)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fullgraph": True, "backend": "aot_eager"}, r"fullgraph=True\) has inside its one graph.*net.compile"),
        ({"mode": "reduce-overhead"}, "CUDA graphs .* write over it in the next pass; use mode='default'"),
        ({"mode": "max-autotune"}, "CUDA graphs .* write over it in the next pass; use mode='default'"),
    ],
)
def test_graphs_that_a_loss_cannot_be_seen_in_are_refused(settings: dict[str, Any], message: str) -> None:
    for row in [row for row in ROWS if any(getattr(each, "needs_criterion", False) for each in row.recipes())]:
        torch.manual_seed(0)
        module = Classifier(row.network(), row.optimizer)
        before = weights(module)
        with pytest.raises(RecipeError, match=message):
            train(row, module=torch.compile(module, **settings))
        assert same(before, weights(module))


# -- 7. detach -------------------------------------------------------------------------------------------------------


class _Stop(Callback):
    """Ends the fit from within, in a way of its own; takes a deepcopy of the module before."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.copy = error, None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 6:
            trainer_of_module, pl_module._trainer = pl_module._trainer, None
            self.copy = copy.deepcopy(pl_module)
            pl_module._trainer = trainer_of_module
            if self.error is not None:
                raise self.error


@rows
@pytest.mark.parametrize(
    "error", [None, RuntimeError("in mid-run"), KeyboardInterrupt()], ids=["end", "error", "interrupt"]
)
def test_afterwards_the_module_is_stock(row: Row, error: BaseException | None) -> None:
    module = stock(row)
    kind = type(module)
    keys, flags, own = list(module.state_dict()), [p.requires_grad for p in module.parameters()], set(module.__dict__)
    classes = [type(part) for part in module.modules()]
    stop = _Stop(error)
    try:
        train(row, callbacks=[*row.recipes(), stop], module=module)
    except (RuntimeError, SystemExit) as raised:
        assert error is not None
        assert str(raised) in (str(error), "1")
    if row.keeps is not None:
        assert list(module.state_dict()) != keys, "it keeps something"
        row.keeps(module)
    assert list(module.state_dict()) == keys
    assert [type(part) for part in module.modules()] == classes
    assert [p.requires_grad for p in module.parameters()] == flags
    assert set(module.__dict__) <= own | {"_trainer", "_hparams"}
    assert type(module) is kind
    assert module.training_step.__func__ is kind.training_step
    assert stop.copy.training_step.__self__ is stop.copy, (
        "a deepcopy runs its own step, not the wrapper of the original"
    )
    module._trainer = None
    with torch.no_grad():
        module.training_step(next(iter(batches(row))), 0)


@rows
def test_a_failed_setup_leaves_the_module_as_it_was(row: Row) -> None:
    module = stock(row)

    class Fails(type(module)):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no optimizer today")

    module.__class__ = Fails
    before, parts, own = weights(module), list(module.modules()), set(module.__dict__)
    with pytest.raises(RuntimeError, match="no optimizer today"):
        train(row, module=module)
    assert same(before, weights(module))
    assert all(a is b for a, b in zip(parts, module.modules(), strict=True))
    assert set(module.__dict__) <= own | {"_trainer", "_hparams"}


def test_every_other_strategy_is_refused() -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Sharded(SingleDeviceStrategy):
        """Stands for FSDP, DeepSpeed and the rest, which need a GPU to be built."""

    for row in ROWS:
        with pytest.raises(RecipeError, match=r"Trainer\(strategy=...\) is Sharded"):
            train(row, strategy=Sharded(torch.device("cpu")), accelerator="auto")


# -- 8. command line -------------------------------------------------------------------------------------------------


def test_what_the_command_line_prints_builds_every_recipe_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows' recipes in one config: what --print_config makes of it builds the same recipes, and prints the same."""
    built = [recipe for row in ROWS for recipe in row.recipes()]
    config = {"trainer": {"callbacks": [_in_yaml(recipe) for recipe in built]}}
    monkeypatch.chdir(tmp_path)
    Path("rows.yaml").write_text(yaml.safe_dump(config))
    seen: list[list[Callback]] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **kwargs: seen.append(self.callbacks))
    connector = "lightning.pytorch.trainer.connectors.callback_connector"
    monkeypatch.setattr(f"{connector}._validate_callbacks_list", lambda callbacks: None)  # many of a kind, never run
    command = ["fit", "--config", "base/digits_cnn.yaml", "--config"]
    printed = []
    for name in ("rows.yaml", "printed.yaml"):
        with pytest.raises(SystemExit):
            run_command([*command, name, "--print_config"])
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    run_command(["fit", "--config", "printed.yaml"])
    again = [callback for callback in seen[0] if isinstance(callback, Recipe)]
    assert [(type(recipe), plain(recipe.arguments)) for recipe in again] == [
        (type(recipe), plain(recipe.arguments)) for recipe in built
    ]


def _in_yaml(value: Any) -> Any:
    """A recipe, or one of its arguments, as somebody writes it into a config."""
    if isinstance(value, Recipe):
        return {"class_path": type(value).__name__, "init_args": _in_yaml(value.arguments)}
    if dataclasses.is_dataclass(value):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        given = {field.name: _in_yaml(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"class_path": path, "init_args": given}
    if isinstance(value, dict):
        return {key: _in_yaml(each) for key, each in value.items()}
    return [_in_yaml(each) for each in value] if isinstance(value, (list, tuple)) else value


def _distance(a: pl.LightningModule, b: pl.LightningModule) -> float:
    """L2 over all parameters."""
    return torch.cat([(p - q).flatten() for p, q in zip(a.parameters(), b.parameters(), strict=True)]).norm().item()

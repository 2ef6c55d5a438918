"""Bad use: every misuse gives one clear error before the first step, and nothing is half-applied or written over."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from lightning_recipes import callbacks, cli
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, quiet, same, samples, weights

from .misuses import MISUSES, Misuse

CROSS_ENTROPY, DATA_LOADER = F.cross_entropy, DataLoader.__init__
OF_LIGHTNING = {"_trainer", "_hparams"}  # attributes that it leaves on a module


@contextmanager
def counted_steps() -> Iterator[dict[str, int]]:
    """How many steps of any optimizer began and ended meanwhile; one that began asks for its gradient and may fail."""
    count = {"began": 0, "ended": 0}

    def count_up(name: str) -> Any:
        def hook(*args: Any) -> None:
            count[name] += 1

        return hook

    hooks = [register_optimizer_step_pre_hook(count_up("began")), register_optimizer_step_post_hook(count_up("ended"))]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def look(module: LightningModule) -> dict[str, Any]:
    """Everything of a module that a recipe could leave changed, its weights aside."""
    parts = dict(module.named_modules())
    return {
        "parts": {path: (id(part), type(part)) for path, part in parts.items()},
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "attributes": {path: set(vars(part)) - OF_LIGHTNING for path, part in parts.items()},
        "hooks": {
            (path, name): list(table)
            for path, part in parts.items()
            for name, table in vars(part).items()
            if name.endswith("hooks")
        },
    }


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file under a folder with its bytes and the time it was written."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("misuse", MISUSES, ids=str)
def test_one_clear_error_and_nothing_half_applied(
    misuse: Misuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if misuse.missing is not None:
        monkeypatch.setitem(sys.modules, misuse.missing, None)
    module = misuse.module()
    before, start = look(module), weights(module)
    earlier = tmp_path / "on_exception.ckpt"
    earlier.write_bytes(b"of an earlier run" if misuse.checkpoint is None else misuse.checkpoint())
    (tmp_path / "last.ckpt").write_bytes(b"of an earlier run")
    there = files(tmp_path)
    batches: list[int] = []
    others = [
        Watch(on_train_batch_start=lambda *args: batches.append(1)),
        ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=1, save_on_exception=True),
    ]
    if misuse.checkpoint is not None:
        others.append(OnExceptionCheckpoint(tmp_path))  # without a path Lightning resumes from its file by itself
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path, **misuse.trainer}

    with counted_steps() as steps, pytest.raises(misuse.error, match=misuse.says) as raised:
        trainer = quiet(callbacks=[*misuse.callbacks(), *others], **settings)
        validation = None if misuse.validation is None else misuse.validation()
        resume = None if misuse.checkpoint is None else earlier
        trainer.fit(module, misuse.data(), validation, ckpt_path=resume, weights_only=True)

    error, message = raised.value, str(raised.value)
    assert type(error) is misuse.error
    assert error.__context__ is error.__cause__, "a second error came while the first was handled"
    assert misuse.recipe in message
    assert "\n" not in message
    assert steps["ended"] == 0
    assert (steps["began"], len(batches)) == ((1, 1) if misuse.in_step else (0, 0))
    assert look(module) == before
    held = torch.load(earlier, weights_only=True)["state_dict"] if misuse.loads else start
    assert same(weights(module), held)
    assert F.cross_entropy is CROSS_ENTROPY
    assert DataLoader.__init__ is DATA_LOADER
    assert files(tmp_path) == there


@pytest.mark.parametrize("error", [RuntimeError, RecipeError])
def test_a_run_that_breaks_off_later_still_saves(error: type[Exception], tmp_path: Path) -> None:
    """Callbacks that save on an exception are held back only where no step was taken."""

    def fail(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise error("in mid-run")

    saving = [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path, save_on_exception=True, filename="{step}")]
    recipe = callbacks.PEGO(1, 2, target_modules=["0"])
    trainer = quiet(callbacks=[recipe, Watch(on_train_batch_end=fail), *saving], enable_checkpointing=True)
    with pytest.raises(error, match="in mid-run"):
        trainer.fit(Classifier(), loader(*samples()))
    for name in ("on_exception.ckpt", "step=3.ckpt"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        assert checkpoint["global_step"] == 3
        assert "net.0.lora_A.g0.weight" in checkpoint["state_dict"]


# -- the command line ------------------------------------------------------------------------------------------------


STOCK = ["--model=lightning.pytorch.demos.boring_classes.BoringModel"]
STOCK += ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"]


@dataclass(frozen=True)
class Slip:
    """One thing written wrong for the command.

    Attributes:
        wrong: what, in a few words.
        says: regular expression for the name and the value at fault, also over several lines.
        config: the user's config, as a dict or as its text.
        options: further options.
    """

    wrong: str
    says: str
    config: dict[str, Any] | str | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.wrong


def a_callback(wrong: str, says: str, name: str, **arguments: Any) -> Slip:
    """A slip in the entry of one callback."""
    return Slip(wrong, says, {"trainer": {"callbacks": [{"class_path": name, "init_args": arguments}]}})


def misspelt(name: str) -> Slip:
    """One letter too many in a recipe's first argument; a recipe without any is given one."""
    taken = list(inspect.signature(getattr(callbacks, name)).parameters.values())
    right = next((each.name for each in taken if each.kind == each.POSITIONAL_OR_KEYWORD), None)
    slip = f"{right or 'rank'}s"
    says = f"{name}.*'{slip}' is not accepted" + (f".*did you mean {right}\\?" if right else "")
    return a_callback(f"a misspelt argument of {name}", says, name, **{slip: 1})


SLIPS = [
    *(misspelt(name) for name in callbacks.__all__),
    a_callback("a misspelt recipe", r"there is no 'AEAR'; did you mean AAER\?", "AEAR", epsilon=0.1),
    a_callback("a word for a number", "epsilon.*float.*a lot", "AAER", epsilon="a lot"),
    a_callback("a sum for a number", "epsilon.*float.*8/255", "AAER", epsilon="8/255"),
    a_callback("a fraction for a count", r"groups.*int.*2\.5", "PEGO", groups=2.5),
    a_callback("a word that is not allowed", "variant.*'rs', 'n', 'zero'.*fgsm", "AAER", variant="fgsm"),
    a_callback("a word for a list", "train_fully.*Sequence.*head", "PEGO", train_fully="head"),
    a_callback("a value that is not allowed", r"error: AAER: epsilon must be in .*; got 8\.0\n$", "AAER", epsilon=8),
    Slip("a misspelt section", r"does not accept option 'trainr\.max_epochs'", {"trainr": {"max_epochs": 1}}),
    Slip("a config that is no YAML", "Problems parsing config", "trainer: {max_epochs: [1\n"),
    Slip("an unknown option", "unrecognized arguments: --epsilon=1", options=("--epsilon=1",)),
    Slip("a misspelt option", r"did you mean --trainer\.max_epochs\?", options=("--trainer.max_epoch=1",)),
    Slip(
        "a misspelt option of a recipe",
        r"GLAD has no argument 'roh'; did you mean rho\?",
        options=("--trainer.callbacks+=GLAD", "--trainer.callbacks.roh=0.1"),
    ),
]


@pytest.mark.parametrize("slip", SLIPS, ids=str)
def test_a_slip_on_the_command_line(
    slip: Slip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the current folder
    args = [*STOCK, *slip.options]
    if slip.config is not None:
        Path("mine.yaml").write_text(slip.config if isinstance(slip.config, str) else yaml.safe_dump(slip.config))
        args.append("--config=mine.yaml")
    there = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *args])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert re.search(slip.says, err, re.DOTALL), err
    assert files(tmp_path) == there

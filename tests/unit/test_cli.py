"""The command line: the table and cards of recipes, where configs are found, how they are laid over each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_recipes import callbacks, catalog, cli
from lightning_recipes.core.errors import check_argument
from lightning_recipes.core.recipe import Paper, Recipe

STOCK = ["--model=lightning.pytorch.demos.boring_classes.BoringModel"]
STOCK += ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"]
TINY = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
TINY += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
USERS_OWN = """
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class TheirModule(BoringModel):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width

class TheirData(BoringDataModule):
    def __init__(self, size: int = 8) -> None:
        super().__init__()

class Told(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        names = [type(c).__name__ for c in trainer.callbacks]
        print("TOLD", pl_module.width, type(trainer.datamodule).__name__, "AAER" in names)
"""


class Shrinkage(Recipe):
    """Shrink things.

    Args:
        rate: how much, in units of
            things.
        kind, size: which way.
    """

    paper = Paper("On shrinking | growing", "A. Author", 1999, "https://example.org/paper", "https://example.org/code")
    does = "Shrinks what is large."
    use_when = "Things are too large."
    costs = "Nothing to speak of."

    def __init__(self, rate: float, kind: str = "up", size: "int | None" = None) -> None:
        check_argument(rate > 0, self, "rate", rate, "> 0")
        self.rate, self.kind, self.size = rate, kind, size

    def setup(self, trainer, pl_module, stage):
        if self.kind == "refuse":
            check_argument(False, self, "kind", self.kind, "anything else")

    def on_fit_start(self, trainer, pl_module): ...

    def teardown(self, trainer, pl_module, stage): ...

    def on_exception(self, trainer, pl_module, exception): ...


class Expansion(Shrinkage):
    """Expand things."""


FAKE = {"Shrinkage": Shrinkage, "Expansion": Expansion}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(catalog, "recipes", lambda: FAKE)
    return f"{__name__}.Shrinkage"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, not on ``sys.path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def printed_config(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *args, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return out


def callback_names(config):
    return [c["class_path"].rsplit(".", 1)[-1] for c in yaml.safe_load(config)["trainer"]["callbacks"]]


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    assert stop.value.code == 2
    return capsys.readouterr().err


# -- help, list and show ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_lists_every_command(args, capsys):
    try:
        code = cli.main(args)
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert code == 0
    for command in ("fit", "validate", "test", "predict", "list", "show NAME"):
        assert f"\n    {command.split()[0]} " in out


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from lightning_recipes.cli import build_parser; build_parser().format_help()\n"
        "print([m for m in ('torch', 'lightning', 'peft', 'timm', 'jsonargparse') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_list_imports_no_peft():
    code = "import sys; from lightning_recipes.cli import main; main(['list']); print('peft' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    assert all(name in out for name in catalog.recipes())


def test_recipes_are_the_public_callbacks_and_the_modules_that_a_paper_brings():
    found = catalog.recipes()
    assert [name for name, cls in found.items() if cls.paper is None] == ["ExactResume"]
    assert {name: cls for name, cls in found.items() if name in callbacks.__all__} == {
        name: getattr(callbacks, name) for name in callbacks.__all__
    }
    assert sorted(name for name in found if name not in callbacks.__all__) == [
        "AdaptiveSmoothingModule",
        "BalancedCNN",
        "BooleanTaskDataModule",
        "DualInputOutput",
        "GaussianRFDataModule",
        "LinearStudent",
        "LowRankRecovery",
        "MatrixSensingDataModule",
        "PFNModule",
        "RandomFeatureRegressor",
        "SCoLeDataModule",
        "StudentTeacherDataModule",
        "TwoLayerReLU",
        "UnlearnableDataModule",
        "XORClusterDataModule",
    ]
    for cls in found.values():
        assert cls.paper is None or isinstance(cls.paper, Paper)
        assert cls.does and cls.use_when and cls.costs and catalog.purpose(cls)


@pytest.mark.parametrize("columns", ["60", "100", "200"])
def test_table_wraps_to_the_terminal(columns, fake, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["RECIPE", "FOR", "YEAR", "DOES", "PAPER"]
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == ["Expansion", "Shrinkage"]
    assert max(map(len, lines)) <= max(int(columns), 70)


def test_table_as_markdown(fake, capsys):
    assert cli.main(["list", "--markdown"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == (
        "| `Shrinkage` |  | Shrinks what is large. | [On shrinking \\| growing](https://example.org/paper), 1999 |"
    )


def test_show_prints_the_card(fake, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "configs"
    (folder / "recipes").mkdir(parents=True)
    config = "# a comment\ntrainer:\n  callbacks+:\n    - class_path: Shrinkage\n      init_args: {rate: 2}\n"
    (folder / "recipes" / "shrinkage.yaml").write_text(config)
    (folder / "recipes" / "other.yaml").write_text("trainer: {callbacks+: [Timer, Shrinkage, Expansion]}\n")
    monkeypatch.setattr(catalog, "config_folder", lambda: folder)
    assert [path.name for path in catalog.config_files(Shrinkage)] == ["shrinkage.yaml"]
    assert [path.name for path in catalog.config_files(Expansion)] == ["other.yaml"]
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    facts = {"claim": "It shrinks.", "with": 0.9, "without": 0.5, "seeds": 5, "data": "digits"}
    (tmp_path / "evidence.json").write_text(json.dumps({"Shrinkage": [facts]}))
    assert cli.main(["show", "shrinkage"]) == 0
    out = capsys.readouterr().out
    for part in ("Shrinks what is large.", "Things are too large.", "Nothing to speak of.", "A. Author, 1999.",
                 "https://example.org/paper", "https://example.org/code"):  # fmt: skip
        assert part in out
    assert "  rate: float  (required)\n      how much, in units of things.\n" in out
    assert "  kind: str = 'up'\n      which way.\n  size: int | None = None\n      which way.\n" in out
    assert "--config recipes/shrinkage.yaml\n  # a comment\n  trainer:\n" in out and "Timer" not in out
    assert "  - It shrinks.\n    Shrinkage: 0.9; without: 0.5; seeds: 5; data: digits\n" in out


def test_show_says_where_a_recipe_runs(capsys):
    for name, sharded in (("CutMix", True), ("GLAD", False)):
        cli.main(["show", name])
        runs = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  Runs on"))
        assert "(strategy=ddp)" in runs
        assert ("sharded weights" in runs) == sharded
    cli.main(["show", "PFNModule"])
    assert "Runs on" not in capsys.readouterr().out


def test_show_without_evidence_says_so(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    monkeypatch.setattr(catalog, "config_files", lambda recipe: [])
    cli.main(["show", "Expansion"])
    assert capsys.readouterr().out.endswith("Evidence\n  none recorded yet\n")


def test_show_of_an_unknown_name(fake, capsys):
    assert "no recipe named 'shrinkaeg': did you mean Shrinkage?" in refused(capsys, "show", "shrinkaeg")
    assert "no recipe named 'qq': there are Expansion, Shrinkage." in refused(capsys, "show", "qq")


@pytest.mark.parametrize("name", sorted(catalog.recipes()))
def test_every_recipe_has_a_card_with_documented_arguments_and_a_config(name, capsys):
    assert cli.main(["show", name]) == 0
    out = capsys.readouterr().out
    assert "--config recipes/" in out or (name not in callbacks.__all__ and "--config papers/" in out)
    for lines in catalog.arguments(catalog.recipes()[name]):
        assert len(lines) > 1, f"{name}: the argument in {lines[0]!r} has no line in the docstring"


# -- where configs are found -----------------------------------------------------------------------------------------


def test_a_config_here_comes_before_a_shipped_one(elsewhere, monkeypatch):
    shipped = elsewhere / "shipped"
    (shipped / "recipes").mkdir(parents=True)
    (shipped / "recipes" / "a.yaml").touch()
    monkeypatch.setattr(catalog, "config_folder", lambda: shipped)
    assert catalog.find_config("recipes/a.yaml") == str(shipped / "recipes" / "a.yaml")
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "a.yaml").touch()
    assert catalog.find_config("recipes/a.yaml") == "recipes/a.yaml"
    for other in ("trainer: {max_epochs: 1}", "s3://bucket/a.yaml", str(shipped / "recipes" / "a.yaml")):
        assert catalog.find_config(other) == other


def test_a_config_that_is_nowhere(elsewhere, capsys):
    err = refused(capsys, "fit", "--config", "recipes/aear.yaml")
    assert "'recipes/aear.yaml' not found" in err
    assert str(elsewhere) in err and str(catalog.config_folder()) in err
    for path in catalog.config_folder().rglob("*.yaml"):
        assert f"\n  {path.relative_to(catalog.config_folder()).as_posix()}\n" in err


# -- laying configs over each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["", "trainer: {callbacks: null}", "trainer: {callbacks: {class_path: ModelSummary}}",
                                  "trainer: {callbacks: [{class_path: ModelSummary}]}"])  # fmt: skip
def test_recipes_are_laid_one_after_the_other(base, fake, elsewhere, capsys):
    args = list(STOCK)
    if base:
        Path("base.yaml").write_text(base)
        args += ["--config=base.yaml"]
    Path("one.yaml").write_text(f"trainer:\n  callbacks+:\n    - class_path: {fake}\n      init_args: {{rate: 2}}\n")
    Path("two.yaml").write_text("trainer:\n  callbacks+:\n    class_path: LearningRateMonitor\n")
    args += ["--config=one.yaml", "--config=two.yaml", "--trainer.callbacks+=ModelCheckpoint"]
    out = printed_config(capsys, *args)
    first = ["ModelSummary"] if "ModelSummary" in base else []
    assert callback_names(out) == [*first, "Shrinkage", "LearningRateMonitor", "ModelCheckpoint"]
    recipe = yaml.safe_load(out)["trainer"]["callbacks"][len(first)]
    assert recipe["init_args"] == {"rate": 2.0, "kind": "up", "size": None}


def test_a_printed_config_builds_the_same_run(fake, elsewhere, capsys):
    out = printed_config(capsys, *STOCK, *TINY, f"--trainer.callbacks+={fake}", "--trainer.callbacks.rate=0.1")
    Path("again.yaml").write_text(out)
    assert printed_config(capsys, "--config=again.yaml") == out


def shipped(folder):
    root = catalog.config_folder()
    return sorted(p.relative_to(root).as_posix() for p in (root / folder).glob("*.yaml"))


def test_an_optimizer_that_a_config_names_has_its_own_defaults(capsys):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    model = {"class_path": "ImageClassifier", "init_args": {"model": "small_cnn", "optimizer": optimizer}}
    config = yaml.safe_load(printed_config(capsys, "--model", json.dumps(model), "--data", "DigitsDataModule"))
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0, "not AdamW's"


def test_a_recipe_takes_a_log_probability_by_its_class(elsewhere, capsys):
    given = {"class_path": "lightning_recipes.core.likelihood.GaussianLogProb", "init_args": {"std": 2.0}}
    recipe = {"class_path": "LangevinMixture", "init_args": {"log_prob": given}}
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [recipe]}}))
    out = printed_config(capsys, *STOCK, "--config=mine.yaml")
    assert yaml.safe_load(out)["trainer"]["callbacks"][0]["init_args"]["log_prob"] == given
    Path("again.yaml").write_text(out)
    assert printed_config(capsys, "--config=again.yaml") == out


@pytest.mark.parametrize("recipe", shipped("recipes"))
def test_recipe_configs_lie_over_a_base_config(recipe, elsewhere, capsys):
    base = shipped("base")[0]  # which one makes no difference to the parser
    own = callback_names(printed_config(capsys, *STOCK, f"--config={recipe}"))
    out = printed_config(capsys, f"--config={base}", f"--config={recipe}")
    assert own and callback_names(out)[-len(own) :] == own
    Path("again.yaml").write_text(out)
    assert printed_config(capsys, "--config=again.yaml") == out


@pytest.mark.parametrize("whole", shipped("base") + shipped("papers"))
def test_base_and_paper_configs_are_whole(whole, elsewhere, capsys):
    out = printed_config(capsys, f"--config={whole}")
    Path("again.yaml").write_text(out)
    assert printed_config(capsys, "--config=again.yaml") == out


# -- bad usage -------------------------------------------------------------------------------------------------------


def test_misspelt_arguments(fake, elsewhere, capsys):
    assert "--trainer.max_epoch" in refused(capsys, "fit", *STOCK, "--trainer.max_epoch=3")
    assert "invalid choice: 'fitt'" in refused(capsys, "fitt")
    err = refused(capsys, "fit", *STOCK, f"--trainer.callbacks+={fake}", "--trainer.callbacks.raet=1")
    assert "'raet' is not accepted" in err


@pytest.mark.parametrize("append", ["+", ""])
def test_a_recipe_s_own_error_is_the_one_shown(append, fake, elsewhere, capsys):
    args = ["fit", *STOCK, f"--trainer.callbacks{append}={fake}", "--trainer.callbacks.rate=-1"]
    err = refused(capsys, *args)
    assert err.strip().endswith("Shrinkage: rate must be > 0; got -1.0")
    assert "Union" not in err


def test_a_recipe_that_refuses_the_run(fake, elsewhere, capsys):
    args = [f"--trainer.callbacks+={fake}", "--trainer.callbacks.rate=1", "--trainer.callbacks.kind=refuse"]
    assert cli.main(["fit", *STOCK, *TINY, *args]) == 1
    assert "error: Shrinkage: kind must be anything else; got 'refuse'\n" in capsys.readouterr().err


# -- running ---------------------------------------------------------------------------------------------------------


def test_fit_then_evaluate_from_the_saved_config(fake, elsewhere):
    args = [f"--trainer.callbacks+={fake}", "--trainer.callbacks.rate=1", "--trainer.default_root_dir=runs"]
    assert cli.main(["fit", *STOCK, *TINY, *args, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]) == 0
    (saved,) = elsewhere.rglob("config.yaml")
    (checkpoint,) = elsewhere.rglob("*.ckpt")
    for command in ("validate", "test", "predict"):
        options = {"predict": ["--return_predictions=false"]}.get(command, [])
        assert cli.main([command, *STOCK, *TINY, *args, *options, f"--ckpt_path={checkpoint}"]) == 0
    assert cli.main(["fit", f"--config={saved}", "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]) == 0


def test_a_run_without_a_logger_leaves_the_users_config_alone(elsewhere):
    Path("config.yaml").write_text("seed_everything: 3\n")
    assert cli.main(["fit", "--config=config.yaml", *STOCK, *TINY, "--trainer.logger=false"]) == 0
    assert Path("config.yaml").read_text() == "seed_everything: 3\n"


def test_a_run_into_the_same_folder_again_replaces_its_config(elsewhere):
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=0"]
    for epochs in (1, 2):
        assert cli.main(["fit", *STOCK, *TINY, *logger, f"--trainer.max_epochs={epochs}"]) == 0
    (saved,) = elsewhere.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["max_epochs"] == 2


def test_a_users_own_module_and_data_by_import_path(elsewhere):
    Path("theirs.py").write_text(USERS_OWN)
    script = f"import sys; sys.path.remove(''); sys.path.append({str(Path(cli.__file__).parents[1])!r})\n"
    script += "from lightning_recipes.cli import main; sys.exit(main())"  # like a console script: no '' on sys.path
    args = ["--model=theirs.TheirModule", "--model.width=5", "--data=theirs.TheirData", "--data.size=4"]
    command = [sys.executable, "-c", script, "fit", *args, *TINY, "--trainer.callbacks+=theirs.Told"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TOLD 5 TheirData False" in done.stdout


def test_a_recipe_in_a_users_own_lightning_cli(elsewhere, monkeypatch):
    config = {"trainer": {"callbacks": [{"class_path": "lightning_recipes.callbacks.AAER"}]}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    monkeypatch.setattr(sys, "argv", ["theirs.py", "--config", "config.yaml"])
    theirs = LightningCLI(BoringModel, BoringDataModule, run=False)
    assert callbacks.AAER in {type(c) for c in theirs.trainer.callbacks}

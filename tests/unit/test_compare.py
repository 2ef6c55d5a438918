"""What a comparison runs, and that nothing but the recipes differs between its runs."""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from lightning_recipes import cli
from lightning_recipes.compare import command, engines, run
from lightning_recipes.compare.plan import BASE, Budget, make_plan, mode_of, seeds_of
from lightning_recipes.core.artefacts import Artefact
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

THEIRS = """
import os, signal, threading
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

class Theirs(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, width)
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
    def test_step(self, batch, batch_idx):
        raise RuntimeError("no labels here")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class TheirData(pl.LightningDataModule):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.set = TensorDataset(torch.rand(size, 4, generator=draws), torch.arange(size) % 3)
    def train_dataloader(self):
        return DataLoader(self.set, batch_size=4, shuffle=True)
    def val_dataloader(self):
        return DataLoader(self.set, batch_size=8)
    def test_dataloader(self):
        return DataLoader(self.set, batch_size=8)

class Counts(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        with open("trained.txt", "a") as file:
            file.write("once\\n")

class Draws(pl.Callback):
    def on_train_batch_end(self, *args):
        torch.rand(7)

class KilledOnce(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if not os.path.exists("killed.txt"):
            open("killed.txt", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

class Hangs(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        open("hangs.txt", "w").close()
        threading.Event().wait()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of a user's: their module, a base config and some recipes of theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "theirs_of_compare", raising=False)
    Path("theirs_of_compare.py").write_text(THEIRS, encoding="utf-8")
    trainer = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_model_summary": False}
    trainer["callbacks"] = [{"class_path": "theirs_of_compare.Counts"}]
    base = {"model": {"class_path": "theirs_of_compare.Theirs"}, "data": {"class_path": "theirs_of_compare.TheirData"}}
    Path("base.yaml").write_text(yaml.safe_dump({**base, "trainer": trainer}), encoding="utf-8")
    for name in ("Draws", "KilledOnce", "Hangs"):
        laid = {"trainer": {"callbacks+": [{"class_path": f"theirs_of_compare.{name}"}]}}
        Path(f"{name.lower()}.yaml").write_text(yaml.safe_dump(laid), encoding="utf-8")
    yield tmp_path
    sys.modules.pop("theirs_of_compare", None)


def planned(*recipes, seeds=1, **other):
    return make_plan("base.yaml", recipes or ["draws.yaml"], "val/acc", Path("out"), seeds, **other)


def callbacks(arm):
    return [each["class_path"].rsplit(".", 1)[-1] for each in arm.config["trainer"]["callbacks"]]


# -- the arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("5 epochs", {"max_epochs": 5, "max_steps": -1, "max_time": None}),
        ("1 epoch", {"max_epochs": 1, "max_steps": -1, "max_time": None}),
        ("300steps", {"max_epochs": -1, "max_steps": 300, "max_time": None}),
        ("90 seconds", {"max_epochs": -1, "max_steps": -1, "max_time": "00:00:01:30"}),
        ("1.5 hours", {"max_epochs": -1, "max_steps": -1, "max_time": "00:01:30:00"}),
        ("25 h", {"max_epochs": -1, "max_steps": -1, "max_time": "01:01:00:00"}),
    ],
)
def test_a_budget_in_words(words, settings):
    assert settings.items() <= Budget.read(words).settings().items()


@pytest.mark.parametrize("words", ["5", "epochs", "0 epochs", "1.5 epochs", "-3 steps", "3 fortnights", "1.2.3 h"])
def test_a_budget_that_is_none_names_what_would_be(words):
    with pytest.raises(RecipeError, match=r"budget must be .* as '5 epochs'"):
        Budget.read(words)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/acc", "max"), ("val_loss", "min"), ("test/acc/dataloader_idx_0", "max"), ("robust_accuracy/pgd", "max")],
)
def test_the_mode_is_guessed_from_the_name(metric, mode):
    assert mode_of(metric, None) == mode and mode_of(metric, "min") == "min"


def test_a_mode_that_cannot_be_guessed_is_asked_for():
    with pytest.raises(RecipeError, match="give --mode max or --mode min"):
        mode_of("val/score", None)


def test_seeds_are_a_number_or_a_list():
    assert seeds_of(3) == [0, 1, 2] and seeds_of([4, 2]) == [4, 2]
    for bad in (0, [], [1, 1], [-1]):
        with pytest.raises(RecipeError, match="seeds must be"):
            seeds_of(bad)


# -- the plan --------------------------------------------------------------------------------------------------------


def test_arms_are_laid_over_the_base_one_or_several_with_a_name(here):
    mapping = {"name": "inline", "configs": "draws.yaml", "trainer": {"gradient_clip_val": 0.5}}
    plan = planned("draws.yaml", "both=draws.yaml+recipes/mixup.yaml", mapping, seeds=[3, 1], budget="7 steps")
    assert [arm.name for arm in plan.arms] == [BASE, "draws", "both", "inline"]
    assert [callbacks(arm) for arm in plan.arms[:3]] == [["Counts"], ["Counts", "Draws"], ["Counts", "Draws", "Mixup"]]
    assert plan.arms[3].config["trainer"]["gradient_clip_val"] == 0.5
    assert {arm.config["trainer"]["max_steps"] for arm in plan.arms} == {7}
    assert [(each.arm, each.seed) for each in plan.runs] == [
        (arm, seed) for seed in (3, 1) for arm in (BASE, "draws", "both", "inline")
    ]
    assert not Path("out").exists(), "a plan writes nothing"


def test_a_run_is_known_by_what_decides_it_and_by_nothing_else(here):
    keys = [each.artefact.key for each in planned(seeds=2).runs]
    assert len(set(keys)) == 4
    assert [each.artefact.key for each in planned("other_name=draws.yaml", seeds=2).runs] == keys
    assert [each.artefact.key for each in planned(seeds=3).runs][:4] == keys
    assert not set(keys) & {each.artefact.key for each in planned(seeds=2, budget="3 epochs").runs}
    source = Path("theirs_of_compare.py")
    source.write_text(source.read_text(encoding="utf-8").replace("lr=0.1", "lr=0.2"), encoding="utf-8")
    assert not set(keys) & {each.artefact.key for each in planned(seeds=2).runs}, "their module is another now"


def test_a_renamed_arm_finds_the_folder_that_it_had(here):
    before = planned().of("draws")[0]
    run.prepare(before)
    assert planned("other=draws.yaml").of("other")[0].folder == before.folder


def test_what_a_run_reads_has_the_key_of_its_folder(here):
    one = planned("recipes/aaer.yaml").of("aaer")[0]
    run.prepare(one)
    told = json.loads((one.folder / "run.json").read_text(encoding="utf-8"))
    assert Artefact(one.folder, "result", told["made_from"]).path == one.artefact.path
    assert one.artefact.key[:16] in one.folder.name


def test_everything_that_a_run_writes_is_in_its_own_folder(here):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    laid = {"name": "saves", "configs": "recipes/exact_resume.yaml", "trainer": {"logger": logger}}
    one = planned(laid).of("saves")[0]
    run.prepare(one)
    trainer = yaml.safe_load((one.folder / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    whole = str(one.folder.resolve())
    assert trainer["default_root_dir"] == whole
    assert trainer["callbacks"][-1]["init_args"]["dirpath"] == f"{whole}/checkpoints"
    assert trainer["logger"]["init_args"]["save_dir"] == f"{whole}/logs"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--recipe=aaer.yaml"], "config file 'aaer.yaml' not found"),
        (["--recipe=recipes/aaer.yaml", "--recipe=recipes/aaer.yaml"], "two arms of the name 'aaer'"),
        (["--recipe=again=base.yaml"], "'again' changes nothing of the base"),
        (["--recipe=wrong.yaml"], "the config of 'wrong' cannot be read: "),
        (["--recipe=refused.yaml"], "the config of 'refused' cannot be used: AAER: epsilon must be"),
        (["--recipe=draws.yaml", "--budget=5"], "budget must be"),
        (["--recipe=draws.yaml", "--jobs=0"], "jobs must be at least 1; got 0"),
        (["--recipe=draws.yaml", "--only=4"], "only must be from 0 to 1"),
        (["--recipe=draws.yaml", "--seeds=0"], "seeds must be"),
        (["--recipe=draws.yaml", "--sedes=2"], "--sedes"),
        (["--recipe=draws.yaml", "--engine=cloud"], "cloud"),
        ([], "give --recipe once or several times"),
    ],
)
def test_wrong_arguments_give_one_error_before_anything_runs(here, capsys, args, says):
    for name, arguments in (("wrong", {"epsilonn": 1}), ("refused", {"epsilon": -1.0})):
        laid = {"trainer": {"callbacks+": [{"class_path": "AAER", "init_args": arguments}]}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(laid), encoding="utf-8")
    options = ["--base=base.yaml", "--metric=val/acc", "--out=out"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *options, *(args if "--seeds=0" in args else ["--seeds=1", *args])])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not Path("out").exists()


# -- one run ---------------------------------------------------------------------------------------------------------


def orders(seed, recipe, control=False):
    """Which samples a stock loader hands out, epoch by epoch, beside a recipe that draws random numbers."""
    x, y = samples(12)
    torch.manual_seed(seed)
    seen = []
    watch = Watch(on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch[0][:, 0].tolist()), **recipe)
    trainer = quiet(max_epochs=3, callbacks=[watch])
    order = run.SameOrder(seed)
    if not control:
        order.install(trainer, ExitStack())
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    trainer.fit(Classifier(mlp()), shuffled)
    return seen, order.started


def draw(*args):
    torch.rand(5)


def test_the_order_is_the_same_whatever_a_recipe_draws():
    plain, told = orders(0, {})
    drawn, told_too = orders(0, {"on_train_batch_end": draw})
    assert plain == drawn and told == told_too
    assert len(told) == 3 and all(sorted(epoch) == list(range(12)) for epoch in told)
    assert told[0] != told[1] != told[2], "another one in each epoch"
    assert orders(1, {})[0] != plain, "and for each seed"
    assert orders(0, {}, control=True)[0] != orders(0, {"on_train_batch_end": draw}, control=True)[0], "Lightning alone"


def test_a_loader_without_shuffling_keeps_its_order():
    trainer, order, seen = quiet(max_epochs=2), run.SameOrder(0), []
    trainer.callbacks.append(Watch(on_train_batch_start=lambda t, m, batch, i: seen.extend(batch[0][:, 0].tolist())))
    order.install(trainer, ExitStack())
    x, y = samples(8)
    trainer.fit(Classifier(mlp()), loader(x, y))
    assert seen == 2 * x[:, 0].tolist() and order.started == 2 * [list(range(8))]


def test_looking_on_changes_nothing():
    ends = []
    for extra in ([], [run.Measure()]):
        module = Classifier(mlp())
        torch.manual_seed(0)
        quiet(max_epochs=2, callbacks=extra).fit(module, loader(*samples()), loader(*samples()))
        ends.append((weights(module), torch.rand(3)))
    assert same(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_what_is_measured():
    module, measure = Classifier(mlp()), run.Measure()
    module.net[0].requires_grad_(False)
    trainer = quiet(max_epochs=3, callbacks=[measure])
    trainer.fit(module, loader(*samples(16)), loader(*samples(16)))
    # mlp: 6*5+5 + 5*5+5 + 5*3+3 = 83 parameters, the first layer's 35 frozen
    assert (measure.parameters, measure.trainable) == (83, 48)
    assert len(measure.intervals) == 3 * 3, "four batches an epoch, three from one to the next, none over a validation"
    assert [point["step"] for point in measure.curve] == [4, 8, 12]
    assert [point["epoch"] for point in measure.curve] == [1, 2, 3]
    assert measure.curve[-1]["val/loss"] == trainer.callback_metrics["val/loss"].item()
    assert measure.peak >= 2**20 and measure.before >= 2**20 and measure.seconds > 0


def test_a_step_takes_the_mean_without_warming_up_and_with_pauses_cut():
    measure = run.Measure()
    measure.intervals = [50.0] * 5 + [0.1] * 10 + [0.3] * 10 + [1000.0]
    # the median of the 21 that count is 0.3, so the pause counts as 3: (1 + 3 + 3) / 21
    assert measure.step_seconds() == pytest.approx(7 / 21)
    measure.intervals = []
    assert measure.step_seconds() == 0.0


def test_a_run_that_is_there_is_not_run_again(here):
    one = planned().of(BASE)[0]
    run.prepare(one)
    for _ in range(2):
        run.execute(one.folder)
    assert Path("trained.txt").read_text() == "once\n"
    found = engines.result(one)
    assert 0 <= found["metrics"]["val/acc"] <= 1 and found["steps"] == 12
    assert found["trainable"] == 15 and len(found["curve"]) == 2
    assert found["notes"] == ["the test failed: RuntimeError: no labels here"]


def test_a_full_disk_loses_the_run_in_flight_and_nothing_else(here, monkeypatch):
    first, second = planned(seeds=2).of(BASE)
    for each in (first, second):
        run.prepare(each)
    run.execute(first.folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run.execute(second.folder)
    assert engines.result(first) is not None and engines.result(second) is None
    assert not list(second.folder.glob("*.part"))
    run.execute(second.folder)
    assert engines.result(second) is not None


def test_base_and_recipes_begin_with_the_same_weights_and_data(here):
    plan = planned()
    for each in plan.runs:
        run.prepare(each)
        run.execute(each.folder)
    base, draws = (engines.result(each) for each in plan.runs)
    assert base["order"] == draws["order"] and len(base["order"]) == 2
    assert base["metrics"] == draws["metrics"], "nothing but random numbers was drawn beside it"


# -- all of them -----------------------------------------------------------------------------------------------------


def test_a_comparison_in_which_a_run_is_killed_goes_on_when_it_is_called_again(here, capsys):
    args = ["compare", "--base=base.yaml", "--recipe", "killedonce.yaml", "--recipe", "draws.yaml", "--metric=val/acc"]
    args += ["--seeds=1", "--jobs=2", "--out=out"]
    assert cli.main(args) == 1
    out, err = capsys.readouterr()
    assert "killedonce, seed 0: failed: it was ended by SIGKILL (out of memory?)" in err
    assert "base, seed 0: done" in err and "draws, seed 0: done" in err
    assert "1 of 3 runs failed" in out and "Give --seeds 5 or more" in out
    assert Path("trained.txt").read_text() == "once\n" * 3
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert "2 of 3 runs are there already; 1 to do" in err and "failed" not in out
    assert Path("trained.txt").read_text() == "once\n" * 4, "only the one that was killed"
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert [row["order"] for row in summary["rows"]] == ["same"] * 3
    assert summary["rows"][1]["difference"]["mean"] == 0.0 and not summary["rows"][1]["failed"]

    # another metric, a SLURM script and one number of it need no run any more
    options = [word for word in args if not word.startswith("--metric")]
    assert cli.main([*options, "--metric=val/accuracy"]) == 1
    assert "metric 'val/accuracy' is not logged; the base logs val/acc; the test failed" in capsys.readouterr().err
    assert cli.main([*args, "--seeds=3", "--engine=slurm"]) == 0
    assert "6 of 9 runs to do. Submit them:\n\n  sbatch out/compare.sbatch" in capsys.readouterr().out
    script = Path("out/compare.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --array=3-8%2\n" in script
    subprocess.run(["bash", "-n", "out/compare.sbatch"], check=True)
    words = shlex.split(script.splitlines()[-1])
    assert words[:4] == ["exec", sys.executable, "-m", "lightning_recipes.cli"]
    assert cli.main([word.replace("$SLURM_ARRAY_TASK_ID", "2") for word in words[4:]]) == 0
    assert Path("trained.txt").read_text() == "once\n" * 4


def test_a_run_ends_with_the_process_that_started_it(here):
    one = planned("hangs.yaml").of("hangs")[0]
    run.prepare(one)
    process = engines.launch(one.folder, {})
    until = time.monotonic() + 120
    while not Path("hangs.txt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert Path("hangs.txt").exists(), (one.folder / "log.txt").read_text()
    process.stdin.close()  # what becomes of it when its parent dies in whatever way
    assert process.wait(timeout=60) == -9
    assert engines.result(one) is None


def test_what_a_failed_run_says_last(here):
    one = planned().of(BASE)[0]
    run.prepare(one)
    log = one.folder / "log.txt"
    log.write_text("much before\n\nlightning-recipes: error: AAER: this is why\nand how\n", encoding="utf-8")
    engines.settle(one.folder, 1)
    told = engines.failure(one)
    assert told == {"what": "it ended with code 1", "lines": ["lightning-recipes: error: AAER: this is why", "and how"]}
    log.write_text("\n".join(f"line {i}" for i in range(50)), encoding="utf-8")
    engines.settle(one.folder, 3)
    assert engines.failure(one)["lines"] == [f"line {i}" for i in range(38, 50)]


def test_runs_share_the_cores_and_the_gpus(monkeypatch):
    config = {"trainer": {"devices": "auto", "accelerator": "auto"}}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [engines.environment_of(slot, 4, config)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == [
        "3",
        "5",
        "3",
        "5",
    ]
    assert int(engines.environment_of(0, 1, config)["OMP_NUM_THREADS"]) >= 1
    assert "CUDA_VISIBLE_DEVICES" not in engines.environment_of(0, 1, config), "all of them, where it is alone"
    for other in ({"devices": 2, "accelerator": "auto"}, {"devices": 1, "accelerator": "cpu"}):
        assert "CUDA_VISIBLE_DEVICES" not in engines.environment_of(0, 2, {"trainer": other})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in engines.environment_of(0, 2, config)


def test_what_ray_is_asked_to_keep_for_a_run():
    assert engines.resources_of({"CPU": 16.0, "GPU": 2.0}, 4) == {"num_cpus": 4, "num_gpus": 1}
    assert engines.resources_of({"CPU": 2.0}, 8) == {"num_cpus": 1, "num_gpus": 0}


def test_ray_does_runs_and_tells_of_those_that_fail(here):
    pytest.importorskip("ray", reason="no Ray here: pip install 'lightning_recipes[ray]'")
    plan, ended = planned("killedonce.yaml"), []
    for each in plan.runs:
        run.prepare(each)
    engines.run_ray(plan.runs, 2, ended.append)
    assert {each.arm for each in ended} == {BASE, "killedonce"}
    assert engines.result(plan.runs[0]) is not None
    assert engines.failure(plan.runs[1])["what"].startswith("it was ended by SIGKILL")


def test_without_ray_it_says_how_to_install_it(here, monkeypatch, capsys):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'lightning_recipes\[ray\]'"):
        engines.need_ray()


def test_all_options_may_stand_in_a_config(here):
    whole = {"base": "base.yaml", "recipe": ["draws.yaml", {"name": "inline", "configs": ["draws.yaml"]}]}
    Path("mine.yaml").write_text(yaml.safe_dump({**whole, "metric": "val/acc", "seeds": [0, 4]}), encoding="utf-8")
    parser = command.build_parser()
    found = parser.parse_args(["--config=mine.yaml", "--recipe+=more.yaml", "--jobs=3"])
    assert [each if isinstance(each, str) else dict(each)["name"] for each in found.recipe] == [
        "draws.yaml",
        "inline",
        "more.yaml",
    ]
    assert (found.seeds, found.jobs, found.metric) == ([0, 4], 3, "val/acc")

"""What README says is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 10
    quick = code.replace("max_epochs=5", "max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False")
    assert quick != code
    run = subprocess.run([sys.executable, "-c", quick], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_generated_parts_are_up_to_date() -> None:
    run = [sys.executable, "-m", "benchmarks.readme", "--check"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_two_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_quickstart_goes_through(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    run = [sys.executable, "-m", "lightning_recipes.quickstart", "--quick", "--picture", str(picture)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("AAER", "ProgressiveUnfreezing", "PEGO", "Next:", "lightning-recipes list"):
        assert name in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "papers").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configs_are_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed and printed whole, and what is printed is read again; nothing is built, so nothing is downloaded."""
    from lightning_recipes import catalog
    from lightning_recipes.trainer_cli import run

    with pytest.raises(SystemExit) as done:
        run(["fit", "--config", str(path), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    pieces = [*(printed["trainer"]["callbacks"] or []), printed["model"], printed["data"] or {"class_path": ""}]
    names = {piece["class_path"].rpartition(".")[2] for piece in pieces}
    assert names & catalog.recipes().keys(), "a paper's own setting has its recipe in it"

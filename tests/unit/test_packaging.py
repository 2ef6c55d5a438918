"""The wheel and the sdist hold what they should, and the wheel works away from the checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_recipes

ROOT = Path(lightning_recipes.__file__).parents[1]
VERSION = lightning_recipes.__version__
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of an sdist and of the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """A folder with the wheel in it and nothing of what it depends on."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)], check=True)
    return target


def run_installed(installed, cwd, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"lightning_recipes-{VERSION}-py3-none-any.whl"
    info = f"lightning_recipes-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lightning_recipes").rglob("*.py")}
    assert modules | {"lightning_recipes/py.typed"} | {f"lightning_recipes/{c}" for c in CONFIGS} <= names
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"lightning_recipes", info}
    assert "lightning-recipes = lightning_recipes.cli:main" in entry_points
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", f"Version: {VERSION}"):
        assert line in metadata.splitlines()


def test_sdist(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("pyproject.toml", "Makefile", "README.md", "LICENSE", "lightning_recipes/py.typed", *CONFIGS):
        assert name in names
    assert f"tests/unit/{Path(__file__).name}" in names
    assert not [name for name in names if name.startswith(".venv") or "__pycache__" in name]


def test_installed_wheel_has_the_command_and_the_configs(installed, tmp_path):
    where = run_installed(installed, tmp_path, "-c", "import lightning_recipes; print(lightning_recipes.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    command = str(installed / "bin" / "lightning-recipes")
    assert run_installed(installed, tmp_path, command, "--version").strip() == f"lightning-recipes {VERSION}"
    base = next(c.removeprefix("configs/") for c in CONFIGS if c.startswith("configs/base/"))
    recipe = next(c.removeprefix("configs/") for c in CONFIGS if c.startswith("configs/recipes/"))
    printed = run_installed(installed, tmp_path, command, "fit", "-c", base, "-c", recipe, "--print_config")
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["class_path"].startswith("lightning_recipes.")


def test_no_upper_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    assert not [d for d in asked if "<" in d or "==" in d or "~=" in d]

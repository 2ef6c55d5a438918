"""What `import lightning_recipes.callbacks` brings with it: nothing heavy that Lightning did not load already."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "diffusers", "matplotlib", "pandas", "peft", "pyautoattack", "scipy", "sklearn", "timm", "torchvision",
    "transformers",
)  # fmt: skip
PROBE = f"""
import sys, json
import lightning
before = [name for name in {HEAVY} if name in sys.modules]
import lightning_recipes.callbacks
print(json.dumps([before, [name for name in {HEAVY} if name in sys.modules]]))
import lightning_recipes.modules as modules, lightning_recipes.datamodules as datamodules
net = modules.ImageClassifier("resnet18", num_classes=3).net
small = modules.ImageClassifier("cifar_resnet18").net
encoder = modules.ContrastivePretraining("resnet18", head=None).encoder
digits = datamodules.DigitsDataModule()
digits.setup("fit")
words = sum(map(len, datamodules.text.descriptions().values()))
print(json.dumps([type(each).__module__ for each in (net, small, encoder)] + [len(digits.train_set), words]))
"""


@pytest.fixture(scope="module")
def told():
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_importing_the_recipes_loads_no_heavy_package_that_lightning_does_not_load_itself(told):
    before, after = told[0]
    assert sorted(after) == sorted(before)
    assert not {"timm", "sklearn", "peft"} & set(after)  # so the list above does not stand there for nothing


def test_what_is_imported_late_is_there_when_a_module_or_data_set_needs_it(told):
    *nets, digits, words = told[1]
    assert nets == ["timm.models.resnet"] * 3
    assert digits > 1000 and words > 10_000

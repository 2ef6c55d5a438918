"""The command that reproduces the PFN paper's figure goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import pfn


def test_the_command_writes_figures_and_pictures(tmp_path, monkeypatch, capsys):
    given = pfn.settings()
    given["data"] |= {"steps_per_epoch": 3, "batch_size": 4}
    given["model"] |= {"emsize": 16, "nhead": 2, "nlayers": 1, "nhid": 32, "num_buckets": 20}
    monkeypatch.setattr(pfn, "settings", lambda: json.loads(json.dumps(given)))
    monkeypatch.setattr(pfn, "DATASETS", 20)
    path = tmp_path / "found.json"
    assert pfn.main(["--seeds", "2", "--epochs", "1", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["seeds"] == 2 and found["epochs"] == 1 and list(found["context"]) == [str(n) for n in pfn.LENGTHS]
    for values in found["context"].values():
        assert values["gap"] > 0 and 0 <= values["inside_95"] <= 1 and values["mean_off"] > 0
    assert {each.name for each in tmp_path.iterdir()} == {"found.json", "found_posterior.png", "found_gap.png"}
    assert "context" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        pfn.main(["--seeds", "0"])
    assert "--seeds must be at least 1; got 0" in capsys.readouterr().err


def test_the_figures_on_file_are_of_the_config_and_close_to_the_exact_posterior():
    found = json.loads(pfn.RESULTS.read_text(encoding="utf-8"))
    assert found["config"] == pfn.CONFIG and found["seeds"] == pfn.SEEDS
    assert found["epochs"] == pfn.settings()["epochs"]
    assert found["context"].keys() == {str(n) for n in pfn.LENGTHS}
    for values in found["context"].values():
        assert values["inside_95_exact"] == pytest.approx(0.95, abs=0.02), "the exact posterior is calibrated"

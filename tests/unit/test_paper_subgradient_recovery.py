"""The command that recovers matrices by sub-gradients goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import subgradient_recovery


@pytest.fixture
def few(monkeypatch):
    small = {"d": 6, "r": 1, "m": 90, "steps": 30}
    figures = {
        "scale": {"absolute errors": [(at, {"init_scale": at, **small}) for at in (1.0, 1e-3)]},
        "rank": {"of size 1": [(rank, {"rank": rank, "init_scale": 1.0, **small}) for rank in (3, 5)]},
    }
    monkeypatch.setattr(subgradient_recovery, "FIGURES", figures)


def test_the_subgradient_recovery_command_writes_and_draws_both_figures(few, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert subgradient_recovery.main(["--seeds", "2", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found.keys() == {"scale", "rank"}
    for name, curve in (("scale", "absolute errors"), ("rank", "of size 1")):
        assert found[name]["seeds"] == 2
        points = found[name]["curves"][curve]
        assert len(points["at"]) == len(points["median"]) == 2
        assert all(low <= middle <= high for low, middle, high in zip(*(points[k] for k in ("low", "median", "high"))))
        assert (tmp_path / f"found_{name}.png").stat().st_size > 1000
    assert "smallest and largest" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        subgradient_recovery.main(["width"])
    assert "no figure named 'width'; there are scale, rank" in capsys.readouterr().err


def test_the_subgradient_recovery_figures_on_file_show_the_small_start_and_not_the_rank():
    found = json.loads(subgradient_recovery.RESULTS.read_text(encoding="utf-8"))
    assert found.keys() == subgradient_recovery.FIGURES.keys()
    scale = found["scale"]["curves"]["absolute errors"]
    assert scale["at"] == list(subgradient_recovery.SCALES)
    assert scale["median"][0] > 0.1 and scale["median"][3] < 5e-3, "from size 1 and from 1e-3"
    small = found["rank"]["curves"]["first factors of size 1e-6"]["median"]
    assert max(small) < 1.25 * min(small), "the rank does not matter"

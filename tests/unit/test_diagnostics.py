"""The socket of monitors: when they measure, for how much, what they say, and that nothing of it changes the run."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.batch import size_of
from lightning_recipes.core.diagnostics import Budget, Moments, Monitor, draw_curves, draw_images, is_picture, log_text
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, quiet, samples

X, Y = samples(16)


class Norm(Monitor):
    """The norm of all weights, for the price of `price` forward passes."""

    ylabel = "norm"

    def __init__(
        self,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        budget: float | None = None,
        draw: bool = True,
        price: int = 6,
    ) -> None:
        super().__init__()
        self.every_n_steps, self.geometric_steps, self.budget, self.draw = every_n_steps, geometric_steps, budget, draw
        self.price = price
        self.check_moments()

    def forwards(self, trainer: Any) -> int:
        return self.price

    def measure(self, trainer: Any, module: Any) -> dict[str, float]:
        return {"norm": float(sum(p.detach().square().sum() for p in module.parameters()).sqrt())}

    def derived(self) -> dict[str, float]:
        return {"measured": len(self.history.steps)}

    def conclude(self) -> str:
        self.limit("nothing is known of norms")
        return f"The norm is {self.history.values['norm'][-1]:.1f}."


def fit(monitor: Monitor, epochs: int = 3, size: int = 4, **trainer: Any) -> Any:
    """Four steps an epoch on 16 samples."""
    run = quiet(callbacks=[monitor, *trainer.pop("callbacks", [])], max_epochs=epochs, **trainer)
    run.fit(Classifier(), loader(X, Y, size=size))
    return run


# -- when --------------------------------------------------------------------------------------------------------------


def moments(rule: Moments, until: int) -> list[int]:
    found, step = [], -1
    while (step := rule.after(step)) <= until:
        found.append(step)
    return found


def test_geometric_moments_are_one_two_three_five_of_every_power_of_ten() -> None:
    assert moments(Moments(), 700) == [0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500]
    assert Moments().after(10**9) == 2 * 10**9


def test_moments_every_n_steps_and_both() -> None:
    assert moments(Moments(4, geometric=False), 12) == [0, 4, 8, 12]
    assert moments(Moments(4), 12) == [0, 1, 2, 3, 4, 5, 8, 10, 12]


def test_steps_that_a_run_jumps_over_are_not_lost() -> None:
    assert Moments().passed(2, 4)
    assert not Moments().passed(3, 4)
    assert Moments().passed(-1, 5000), "a monitor that joins a run in its middle measures at once"


def test_it_measures_at_the_start_at_its_moments_and_after_the_last_step() -> None:
    monitor = Norm()
    run = fit(monitor)
    assert monitor.history.steps == [0, 1, 2, 3, 5, 10, 12]
    assert run.callback_metrics["norm/norm"] == pytest.approx(monitor.history.values["norm"][-1])
    assert run.callback_metrics["norm/measured"] == 7


def test_accumulated_batches_are_one_step() -> None:
    monitor = Norm()
    fit(monitor, accumulate_grad_batches=2)
    assert monitor.history.steps == [0, 1, 2, 3, 5, 6]
    assert len(set(monitor.history.values["norm"])) == 6


def test_a_monitor_says_what_is_wrong_with_its_arguments() -> None:
    for arguments, says in (
        ({"every_n_steps": 0}, "every_n_steps must be None or at least 1; got 0"),
        ({"geometric_steps": False}, "geometric_steps must be true where every_n_steps is not given; got False"),
        ({"budget": 0.0}, "budget must be None or a positive share, as 0.1; got 0.0"),
    ):
        with pytest.raises(RecipeError, match=says):
            Norm(**arguments)


# -- for how much ------------------------------------------------------------------------------------------------------


def test_a_budget_counts_a_trained_sample_as_three_passes() -> None:
    budget = Budget(0.1, trained=100, looked=20)
    assert budget.allows(10)
    assert not budget.allows(11)
    assert budget.spent == pytest.approx(20 / 300)
    assert Budget(None).allows(10**9)
    assert not Budget(0.5).allows(1), "nothing has been trained yet"


def test_what_the_budget_does_not_allow_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """A step trains on 4 samples, worth 12 passes; a measurement costs 6; a quarter of the work is 3 passes a step."""
    monitor = Norm(every_n_steps=1, geometric_steps=False, budget=0.25)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(monitor, epochs=2)
    assert monitor.history.steps == [2, 4, 6, 8]
    assert monitor.left_out == 5
    assert monitor.spent == pytest.approx(24 / 96)
    assert "5 of 9 measurements were left out for budget=0.25, at steps 0, 1, 3, 5, 7." in monitor.verdict
    assert monitor.verdict in caplog.text


def test_a_budget_that_allows_nothing_is_said() -> None:
    """4 steps of 4 samples are 48 passes, of which a measurement is an eighth."""
    monitor = Norm(budget=1e-9)
    fit(monitor, epochs=1)
    assert monitor.verdict.startswith(
        "Nothing was measured: one measurement is 0.12 of this run's work; give a larger budget, a smaller probe or"
        " more steps. 5 of 5 measurements were left out for budget=1e-09, at st"
    )


def test_samples_are_counted_in_batches_of_any_form() -> None:
    assert size_of((torch.zeros(3, 2), torch.zeros(3))) == 3
    assert size_of({"text": ["a", "b"], "x": torch.zeros(2, 5)}) == 2
    assert size_of([{"a": torch.tensor(1.0)}, (torch.zeros(7),)]) == 7
    assert size_of("nothing") == 0


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_resumed_run_measures_and_skips_what_the_whole_run_did(at: int, tmp_path: Any) -> None:
    arguments = {"every_n_steps": 2, "budget": 0.2}
    whole = Norm(**arguments)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, callbacks=[ExactResume(), keep], enable_checkpointing=True)
    resumed = Norm(**arguments)
    quiet(callbacks=[resumed, ExactResume()], max_epochs=3).fit(
        Classifier(), loader(X, Y, size=4), ckpt_path=str(tmp_path / f"step={at}.ckpt")
    )
    assert resumed.state() == whole.state()
    assert whole.left_out and whole.history.steps
    assert resumed.verdict == whole.verdict


def test_another_schedule_on_a_resume_is_refused(tmp_path: Any) -> None:
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=3)
    fit(Norm(), callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(RecipeError, match=r"every_n_steps=None in the checkpoint but 2 here"):
        quiet(callbacks=[Norm(2)]).fit(Classifier(), loader(X, Y), ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_second_fit_begins_a_history_of_its_own() -> None:
    monitor = Norm()
    for epochs in (3, 1):
        fit(monitor, epochs)
    assert monitor.history.steps == [0, 1, 2, 3, 4]


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_verdict_stands_in_the_console_and_over_a_picture(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    monitor = Norm()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        run = fit(monitor, logger=CSVLogger(tmp_path))
    assert monitor.verdict == f"The norm is {monitor.history.values['norm'][-1]:.1f}. Nothing is known of norms."
    assert f"Norm: {monitor.verdict}" in caplog.text
    assert (tmp_path / "lightning_logs" / "version_0" / "norm.png").stat().st_size > 1000
    assert run.log_dir == str(tmp_path / "lightning_logs" / "version_0")


def test_a_run_that_logs_nowhere_leaves_no_picture(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(Norm())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_fit_has_a_verdict_and_a_failed_setup_has_none() -> None:
    def stop(trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt

    monitor = Norm()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(monitor, callbacks=[Watch(on_train_batch_start=stop)])
    assert monitor.history.steps == [0, 1, 2, 3, 5]
    assert monitor.verdict.startswith("The norm is")

    def refuse(_: Any) -> Any:
        raise RuntimeError("no optimizer today")

    with pytest.raises(RuntimeError, match="no optimizer today"):
        quiet(callbacks=[monitor]).fit(Classifier(optimizer=refuse), loader(X, Y))
    assert monitor.verdict is None


class Blind(Norm):
    """Cannot measure after the steps of `blind`."""

    blind = (0,)

    def measure(self, trainer: Any, module: Any) -> dict[str, float]:
        if trainer.global_step in self.blind:
            raise RecipeError("the weights cannot be seen")
        return super().measure(trainer, module)


def test_a_first_measurement_that_cannot_be_made_ends_the_fit_and_a_later_one_is_a_limit() -> None:
    with pytest.raises(RecipeError, match=r"^Blind: the weights cannot be seen"):
        fit(Blind())
    monitor = Blind()
    monitor.blind = (2, 3)
    assert fit(monitor).global_step == 12
    assert [math.isnan(value) for value in monitor.history.values["norm"][:5]] == [False, False, True, True, False]
    assert monitor.verdict.startswith("The norm is")
    assert "At step 2 the weights cannot be seen." in monitor.verdict


def test_a_monitor_that_says_nothing_of_what_it_measures_cannot_be_made() -> None:
    with pytest.raises(TypeError, match=r"abstract methods .*conclude.*forwards.*measure"):
        type("Nothing", (Monitor,), {})()


def test_loggers_that_take_texts_get_the_verdict() -> None:
    said: list[Any] = []
    board = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *given: said.append(given)))
    weights_and_biases = SimpleNamespace(experiment=object(), log_text=lambda **given: said.append(given))
    none = SimpleNamespace(experiment=object())
    log_text(SimpleNamespace(loggers=[board, weights_and_biases, none], global_step=7), "norm/verdict", "large")
    assert said == [("norm/verdict", "large", 7), {"key": "norm/verdict", "columns": ["text"], "data": [["large"]]}]


def test_curves_are_drawn_with_bands_on_a_log_axis(tmp_path: Any) -> None:
    path = draw_curves(
        tmp_path / "a" / "b.png",
        {"test": ([0, 1, 10], [0.5, 0.5, 1.0])},
        "what it shows " * 20,
        "step",
        "accuracy",
        bands={"test": ([0.4, 0.4, 0.9], [0.6, 0.6, 1.0])},
        log_x=True,
        log_y=True,
    )
    assert path.stat().st_size > 1000


def test_images_are_drawn_in_rows_whatever_their_channels_and_values(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    grey, colour, normalised = torch.rand(8, 8), torch.rand(3, 8, 8), 5 * torch.randn(1, 8, 8)
    rows = {"first": [(grey, "one"), (colour, "two"), (normalised, "three")], "second": [(colour, "four")], "none": []}
    path = draw_images(tmp_path / "there" / "images.png", rows, "a title")
    assert path is not None and path.stat().st_size > 5000
    assert draw_images(tmp_path / "nothing.png", {"none": []}, "a title") is None
    assert not (tmp_path / "nothing.png").exists()
    assert is_picture(grey) and is_picture(colour) and not is_picture(torch.rand(6)) and not is_picture("an image")
    assert not is_picture(torch.rand(4, 8, 8))

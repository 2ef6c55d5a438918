"""What a fit with progressive unfreezing says only later; its other misuses stand in tests/conformance/misuses.py."""

from __future__ import annotations

import pytest

from lightning_recipes.callbacks import ProgressiveUnfreezing
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.schedule import Plateau
from tests.stock import Classifier, loader, quiet, samples

X, Y = samples(16)
GROUPS = ["net.4", "net.2", "net.0"]  # of the mlp, the head first


def test_a_group_that_never_wakes_is_named_in_a_warning():
    trainer = quiet(callbacks=[ProgressiveUnfreezing(GROUPS, (0, 4, 7), None)], max_epochs=4)
    with pytest.warns(UserWarning, match=r"groups \['net.2', 'net.0'\] never wake"):
        trainer.fit(Classifier(), loader(X, Y))


def test_a_metric_that_was_never_logged_is_an_error_in_the_first_validation():
    """A metric may also come from the training, so that nothing can be said before it."""
    trainer = quiet(callbacks=[ProgressiveUnfreezing(GROUPS, Plateau("val/f1"), None)], max_epochs=4)
    message = r"ProgressiveUnfreezing: Plateau monitors 'val/f1', which was not logged; logged are .*val/loss"
    with pytest.raises(RecipeError, match=message):
        trainer.fit(Classifier(), loader(X, Y), loader(X, Y))
    assert trainer.current_epoch == 0

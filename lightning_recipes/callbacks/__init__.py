"""The recipes, by name: ``from lightning_recipes.callbacks import AAER``. The folders are for the reader."""

from lightning_recipes.callbacks.adapters.glad import GLAD
from lightning_recipes.callbacks.adapters.pego import PEGO
from lightning_recipes.callbacks.finetuning.progressive_unfreezing import ProgressiveUnfreezing
from lightning_recipes.callbacks.resume.exact_resume import ExactResume
from lightning_recipes.callbacks.robustness.aaer import AAER
from lightning_recipes.callbacks.robustness.robust_accuracy import RobustAccuracyMonitor

__all__ = ["AAER", "GLAD", "PEGO", "ExactResume", "ProgressiveUnfreezing", "RobustAccuracyMonitor"]

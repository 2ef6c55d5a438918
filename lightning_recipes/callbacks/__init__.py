"""The recipes, by name: ``from lightning_recipes.callbacks import AAER``. The folders are for the reader."""

from lightning_recipes.callbacks.adapters.glad import GLAD
from lightning_recipes.callbacks.adapters.insert_attention import InsertAttention
from lightning_recipes.callbacks.adapters.pego import PEGO
from lightning_recipes.callbacks.adapters.sara import SaRA
from lightning_recipes.callbacks.adapters.subgm import SubGM
from lightning_recipes.callbacks.adapters.svfit import SVFit
from lightning_recipes.callbacks.continual.forgetting import ForgettingMonitor
from lightning_recipes.callbacks.continual.group_mask import GroupMask
from lightning_recipes.callbacks.continual.slca import SLCA
from lightning_recipes.callbacks.data.bayes_error import BayesErrorMonitor
from lightning_recipes.callbacks.data.bayes_gap import BayesGapMonitor
from lightning_recipes.callbacks.data.data_diet import DataDiet
from lightning_recipes.callbacks.data.in_context_prediction import InContextPrediction
from lightning_recipes.callbacks.data.prune_train_set import PruneTrainSet
from lightning_recipes.callbacks.diagnostics.generalization_dynamics import GeneralizationMonitor
from lightning_recipes.callbacks.diagnostics.grokking import GrokkingMonitor
from lightning_recipes.callbacks.diagnostics.overparameterization import MoreIsBetterMonitor, RidgeRefit
from lightning_recipes.callbacks.diagnostics.small_init import SmallInit
from lightning_recipes.callbacks.finetuning.bang import BANG, WiSEFT
from lightning_recipes.callbacks.finetuning.freezeout import FreezeOut
from lightning_recipes.callbacks.finetuning.levi import LEVI
from lightning_recipes.callbacks.finetuning.mixing import CutMix, Mixup
from lightning_recipes.callbacks.finetuning.pre_post_monitor import PrePostMonitor
from lightning_recipes.callbacks.finetuning.progressive_unfreezing import ProgressiveUnfreezing
from lightning_recipes.callbacks.finetuning.projection_head import ProjectionHead
from lightning_recipes.callbacks.regularization.drop_block import DropBlock
from lightning_recipes.callbacks.regularization.gradient_noise import GradientNoise
from lightning_recipes.callbacks.regularization.guidance import Guidance
from lightning_recipes.callbacks.regularization.hypothesis_weight import HypothesisWeightMonitor
from lightning_recipes.callbacks.regularization.langevin_mixture import LangevinMixture
from lightning_recipes.callbacks.regularization.normalized_gd import NormalizedGD
from lightning_recipes.callbacks.regularization.ps_kd import PSKD
from lightning_recipes.callbacks.resume.exact_resume import ExactResume
from lightning_recipes.callbacks.robustness.aaer import AAER
from lightning_recipes.callbacks.robustness.adaptformer import AdaptFormer
from lightning_recipes.callbacks.robustness.adaptive_smoothing import AdaptiveSmoothing
from lightning_recipes.callbacks.robustness.backdoor_adjustment import BackdoorAdjustment
from lightning_recipes.callbacks.robustness.class_weights import ClassWeights
from lightning_recipes.callbacks.robustness.cosine_head import CosineHead
from lightning_recipes.callbacks.robustness.logit_adjustment import LogitAdjustment
from lightning_recipes.callbacks.robustness.long_tail import LongTailMonitor
from lightning_recipes.callbacks.robustness.robust_accuracy import RobustAccuracyMonitor

__all__ = [
    "AAER",
    "BANG",
    "GLAD",
    "LEVI",
    "PEGO",
    "PSKD",
    "SLCA",
    "AdaptFormer",
    "AdaptiveSmoothing",
    "BackdoorAdjustment",
    "BayesErrorMonitor",
    "BayesGapMonitor",
    "ClassWeights",
    "CosineHead",
    "CutMix",
    "DataDiet",
    "DropBlock",
    "ExactResume",
    "ForgettingMonitor",
    "FreezeOut",
    "GeneralizationMonitor",
    "GradientNoise",
    "GrokkingMonitor",
    "GroupMask",
    "Guidance",
    "HypothesisWeightMonitor",
    "InContextPrediction",
    "InsertAttention",
    "LangevinMixture",
    "LogitAdjustment",
    "LongTailMonitor",
    "Mixup",
    "MoreIsBetterMonitor",
    "NormalizedGD",
    "PrePostMonitor",
    "ProgressiveUnfreezing",
    "ProjectionHead",
    "PruneTrainSet",
    "RidgeRefit",
    "RobustAccuracyMonitor",
    "SVFit",
    "SaRA",
    "SmallInit",
    "SubGM",
    "WiSEFT",
]

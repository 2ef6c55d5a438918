"""Stock LightningModules, which know nothing of recipes, and the nets and metrics that they use."""

from lightning_recipes.core.group_accuracy import LongTailAccuracy
from lightning_recipes.modules.adaptive_smoothing import AdaptiveSmoothingModule
from lightning_recipes.modules.balanced_attention import BalancedAttention, CoordinateAttention, SqueezeExcitation
from lightning_recipes.modules.balanced_cnn import BalancedCNN, BalancedNet
from lightning_recipes.modules.bar_distribution import BarDistribution, quantile_borders
from lightning_recipes.modules.cifar_resnet import CifarResNet
from lightning_recipes.modules.contrastive import (
    ContrastivePretraining,
    NTXentLoss,
    SpectralContrastiveLoss,
    SupConLoss,
)
from lightning_recipes.modules.deep_mlp import DeepMLP
from lightning_recipes.modules.drop_block import DropBlock2d
from lightning_recipes.modules.dual_input_output import AugmentBatch, DualInputOutput, UnifiedClassifier
from lightning_recipes.modules.image_classifier import ImageClassifier
from lightning_recipes.modules.language import CausalLM, TextClassifier
from lightning_recipes.modules.levi_ensemble import LEVIEnsemble
from lightning_recipes.modules.lightweight_cnn import LightweightCNN
from lightning_recipes.modules.linear_student import LinearStudent
from lightning_recipes.modules.low_rank_recovery import FactorProduct, LowRankRecovery
from lightning_recipes.modules.metrics import AURC, BaseToNovelAccuracy, aurc, harmonic_mean
from lightning_recipes.modules.mixer import Mixer, MixingNetwork
from lightning_recipes.modules.mlp import MLP
from lightning_recipes.modules.pfn import PFNModule
from lightning_recipes.modules.preact_resnet import PreActResNet18
from lightning_recipes.modules.projection import FixedReweighting, IdentityHead, MLPHead, SymmetricReLU
from lightning_recipes.modules.random_feature_regressor import RandomFeatureRegressor
from lightning_recipes.modules.small_cnn import SmallCNN
from lightning_recipes.modules.two_layer_relu import TwoLayerReLU

__all__ = [
    "AURC",
    "MLP",
    "AdaptiveSmoothingModule",
    "AugmentBatch",
    "BalancedAttention",
    "BalancedCNN",
    "BalancedNet",
    "BarDistribution",
    "BaseToNovelAccuracy",
    "CausalLM",
    "CifarResNet",
    "ContrastivePretraining",
    "CoordinateAttention",
    "DeepMLP",
    "DropBlock2d",
    "DualInputOutput",
    "FactorProduct",
    "FixedReweighting",
    "IdentityHead",
    "ImageClassifier",
    "LEVIEnsemble",
    "LightweightCNN",
    "LinearStudent",
    "LongTailAccuracy",
    "LowRankRecovery",
    "MLPHead",
    "Mixer",
    "MixingNetwork",
    "NTXentLoss",
    "PFNModule",
    "PreActResNet18",
    "RandomFeatureRegressor",
    "SmallCNN",
    "SpectralContrastiveLoss",
    "SqueezeExcitation",
    "SupConLoss",
    "SymmetricReLU",
    "TextClassifier",
    "TwoLayerReLU",
    "UnifiedClassifier",
    "aurc",
    "harmonic_mean",
    "quantile_borders",
]

"""Stock LightningModules, which know nothing of recipes, and the nets and metrics that they use."""

from lightning_recipes.modules.cifar_resnet import CifarResNet
from lightning_recipes.modules.image_classifier import ImageClassifier
from lightning_recipes.modules.language import CausalLM, TextClassifier
from lightning_recipes.modules.metrics import BaseToNovelAccuracy, harmonic_mean
from lightning_recipes.modules.preact_resnet import PreActResNet18
from lightning_recipes.modules.small_cnn import SmallCNN

__all__ = [
    "BaseToNovelAccuracy",
    "CausalLM",
    "CifarResNet",
    "ImageClassifier",
    "PreActResNet18",
    "SmallCNN",
    "TextClassifier",
    "harmonic_mean",
]

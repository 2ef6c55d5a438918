"""LightningDataModules: embedded real data, files, public sets by name, and wrappers that make a protocol of them."""

from lightning_recipes.datamodules.arrays import ArrayDataModule
from lightning_recipes.datamodules.base import DataModule
from lightning_recipes.datamodules.boolean_task import BooleanTaskDataModule
from lightning_recipes.datamodules.class_incremental import ClassIncrementalDataModule
from lightning_recipes.datamodules.digits import DigitsDataModule
from lightning_recipes.datamodules.domains import DomainDataModule, RotatedDigitsDataModule
from lightning_recipes.datamodules.few_shot import FewShotDataModule
from lightning_recipes.datamodules.folders import ImageFolderDataModule
from lightning_recipes.datamodules.gaussian_rf import GaussianRFDataModule
from lightning_recipes.datamodules.images import ImageDataModule, LabelledImages
from lightning_recipes.datamodules.long_tailed import LongTailedDataModule
from lightning_recipes.datamodules.matrix_sensing import MatrixSensingDataModule
from lightning_recipes.datamodules.prior_data import PriorDataModule
from lightning_recipes.datamodules.priors import GaussianPrior, GPPrior, LinearPrior, MLPPrior, Prior, SampledGPPrior
from lightning_recipes.datamodules.scole import SCoLeDataModule
from lightning_recipes.datamodules.student_teacher import StudentTeacherDataModule
from lightning_recipes.datamodules.superclasses import SuperclassDataModule
from lightning_recipes.datamodules.table import TableDataModule
from lightning_recipes.datamodules.text import ByteTokenizer, CharDataModule, TextDataModule
from lightning_recipes.datamodules.torchvision_sets import TorchvisionDataModule
from lightning_recipes.datamodules.two_classes import TwoClassDataModule
from lightning_recipes.datamodules.unlearnable import UnlearnableDataModule
from lightning_recipes.datamodules.xor_clusters import XORClusterDataModule

__all__ = [
    "ArrayDataModule",
    "BooleanTaskDataModule",
    "ByteTokenizer",
    "CharDataModule",
    "ClassIncrementalDataModule",
    "DataModule",
    "DigitsDataModule",
    "DomainDataModule",
    "FewShotDataModule",
    "GPPrior",
    "GaussianPrior",
    "GaussianRFDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "LabelledImages",
    "LinearPrior",
    "LongTailedDataModule",
    "MLPPrior",
    "MatrixSensingDataModule",
    "Prior",
    "PriorDataModule",
    "RotatedDigitsDataModule",
    "SCoLeDataModule",
    "SampledGPPrior",
    "StudentTeacherDataModule",
    "SuperclassDataModule",
    "TableDataModule",
    "TextDataModule",
    "TorchvisionDataModule",
    "TwoClassDataModule",
    "UnlearnableDataModule",
    "XORClusterDataModule",
]

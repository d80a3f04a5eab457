"""Pure-functional Flax modules: classifiers and generators."""

from skd_jax.models.delegator import HIGH_RESOLUTION, LOW_RESOLUTION, Delegator
from skd_jax.models.norm import MOMENTS, BatchNorm, moments_by_layer
from skd_jax.models.resnet import Classifier, ResNet, align_head, grow_head, resnet

__all__ = [
    "HIGH_RESOLUTION",
    "LOW_RESOLUTION",
    "MOMENTS",
    "BatchNorm",
    "Classifier",
    "Delegator",
    "ResNet",
    "align_head",
    "grow_head",
    "moments_by_layer",
    "resnet",
]

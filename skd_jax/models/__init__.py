"""Pure-functional Flax modules: classifiers and generators."""

from skd_jax.models.delegator import HIGH_RESOLUTION, LOW_RESOLUTION, Delegator
from skd_jax.models.head import CosineHead, align_head, grow_head, head_logits, is_cosine
from skd_jax.models.norm import MOMENTS, BatchNorm, moments_by_layer
from skd_jax.models.resnet import IMAGENET, Classifier, ResNet, resnet

__all__ = [
    "HIGH_RESOLUTION",
    "IMAGENET",
    "LOW_RESOLUTION",
    "MOMENTS",
    "BatchNorm",
    "Classifier",
    "CosineHead",
    "Delegator",
    "ResNet",
    "align_head",
    "grow_head",
    "head_logits",
    "is_cosine",
    "moments_by_layer",
    "resnet",
]

"""Frozen features and nearest class means: F_0 never learns again, each class keeps its mean.

m_c is the mean of f(x) over the class's training images, unaugmented, in eval mode. An image is of
the class whose mean is nearest: by distance, argmin ||f - m_c||, or by cosine.

Keeps the means, F numbers a class. Published: 46.3 at the end of 11 tasks on CIFAR-100 (SDC's
paper, its own network); none for 50 base classes.

References:
  Rebuffi et al., "iCaRL", CVPR 2017, whose NCM takes means of unit-length features; here they are
  of the features as they are.
"""

import dataclasses
from typing import Any

import jax

from skd_jax import steps
from skd_jax.config import Limits
from skd_jax.methods.class_means import RULES, KeptMeans, Sums, add, joined, nearness, no_sums
from skd_jax.methods.phase import Method, Phase, Setting, logits
from skd_jax.methods.phases import features, sweep


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nearest class means."""

    name: str = "ncm"
    rule: str = "cosine"  # what is near: "cosine" or "distance"


def scores(static: Settings, nets: steps.Networks, kept: KeptMeans, images: jax.Array) -> jax.Array:
    """Minus the squared distance to each mean, or the cosine, [B, K]."""
    if kept.means is None:  # T_0 before the base's means are known
        return logits(static, nets, kept, images)
    assert kept.classifier is not None
    return nearness(features(nets, kept.classifier, images), kept.means, static.rule)


def keep(state: Sums, kept: Any, take: Any) -> Any:
    """Keeps the means of the task's classes beside the others': a phase's ``finish``."""
    del take
    return dataclasses.replace(kept, means=joined(kept.means, state.means()))


def phases(setting: Setting, task: int) -> list[Phase]:
    """One pass over the task's images, the base's included."""
    return [sweep(setting, task, "means", add, None, no_sums(setting, task), keep, ends_task=True)]


METHOD = Method(
    "ncm",
    Settings,
    phases,
    kept=KeptMeans,
    scores=scores,
    check=Limits("method.", choices={"rule": RULES}).check,
    family="frozen features",
    keeps="class means",
)

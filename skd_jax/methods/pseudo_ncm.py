"""Frozen features and nearest class means, those of the base classes from the delegator's images.

As ``ncm`` with cosines, but the means of the base classes need none of their images: D_0 is trained
from T_0 alone, and m_c is the mean of f(D(z)) over what T_0 takes for class c. The means of later
classes are of their images. The largest cosine is the largest product with m_c / ||m_c||, so the
head itself holds the means: a linear head without bias. No paper; it shows what nothing but a
pass over the new images would give, once D_0 is there.

A class that D_0 never draws has a mean of zero, and its output is 0. Features that end in a ReLU
have no product below that with a mean, so that it is the answer only where all are 0. With
``model.last_relu=False`` it is the answer wherever all other products are negative.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from skd_jax.losses import unit
from skd_jax.methods.class_means import Sums, add, no_sums
from skd_jax.methods.drawn import drawn as pass_over
from skd_jax.methods.phase import Method, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.phases import KeptDelegator, depends_with_d_0, describe, stage_one
from skd_jax.methods.skd.settings import Delegator, StageOne, check_stage_one
from skd_jax.state import Network


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nearest class means, and the delegator's training."""

    name: str
    delegator: Delegator
    stage_one: StageOne


def with_means(kept: KeptDelegator, sums: Sums, num_old: int) -> KeptDelegator:
    """The head with its first ``num_old`` outputs, and then the means of some classes."""
    assert kept.classifier is not None
    head = kept.classifier.params["head"]
    kernel = jnp.concatenate([head["kernel"][:, :num_old], unit(sums.means()).T], axis=1)
    head = {**head, "kernel": kernel}
    if "bias" in head:
        head["bias"] = jnp.zeros(kernel.shape[1])
    params = {**kept.classifier.params, "head": head}
    return dataclasses.replace(kept, classifier=Network(params, kept.classifier.batch_stats))


def drawn(setting: Setting) -> Phase:
    """The means of the base classes, of what D_0 draws."""

    def finish(state: Sums, kept: KeptDelegator, take: Any) -> KeptDelegator:
        del take
        return with_means(kept, state, 0)

    return pass_over(setting, 0, "drawn", add, None, no_sums(setting, 0), finish)


def means(setting: Setting, task: int) -> Phase:
    """The means of a task's classes, of its images."""
    old = setting.seen(task - 1)

    def finish(state: Sums, kept: KeptDelegator, take: Any) -> KeptDelegator:
        del take
        return with_means(kept, state, old)

    return sweep(setting, task, "means", add, None, no_sums(setting, task), finish, ends_task=True)


def phases(setting: Setting, task: int) -> list[Phase]:
    """D_0 and the base classes' means once, then a pass over each task's images."""
    if not task:
        return []
    first = [stage_one(setting, 0), drawn(setting)] if task == 1 else []
    return [*first, means(setting, task)]


METHOD = Method(
    "pseudo_ncm",
    Settings,
    phases,
    kept=KeptDelegator,
    check=check_stage_one,
    depends=depends_with_d_0,
    describe=describe,
    remarks=quality.remarks,
    family="frozen features",
    keeps="the delegator, class means",
)

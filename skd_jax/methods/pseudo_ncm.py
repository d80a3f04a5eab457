"""Frozen features and nearest class means, those of the base classes from the delegator's images.

As ``ncm`` with cosines, but the means of the base classes need none of their images: D_0 is trained
from T_0 alone, and m_c is the mean of f(D(z)) over what T_0 takes for class c. The means of later
classes are of their images. The largest cosine is the largest product with m_c / ||m_c||, so the
head itself holds the means: a linear head without bias. No paper; it shows what nothing but a
pass over the new images would give, once D_0 is there.

A class that D_0 never draws has a mean of zero, and is never the nearest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import parallel, steps
from skd_jax.methods import ncm
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.methods.skd.phases import KeptDelegator, delegator_module, describe, stage_one
from skd_jax.methods.skd.settings import Delegator, StageOne, check_stage_one
from skd_jax.methods.skd.steps import latent
from skd_jax.models import Delegator as Generator
from skd_jax.state import Batch, Network
from skd_jax.steps import eval_mode

DRAWN = 5  # the number of the pass over pseudo images in random keys
STEPS = 40  # batches of pseudo images that the means are of


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nearest class means, and the delegator's training."""

    name: str
    delegator: Delegator
    stage_one: StageOne


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """What a step over pseudo images depends on that is no array."""

    delegator: Generator
    batch: int


def drawn_step(
    static: _Drawing,
    nets: steps.Networks,
    state: ncm.Sums,
    kept: KeptDelegator,
    batch: None,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[ncm.Sums, Metrics]:
    """Adds a batch of pseudo images to the sums of the classes that T_0 takes them for."""
    del batch
    assert kept.classifier is not None and kept.delegator is not None
    size = parallel.local_batch(static.batch, nets.axis_name)
    z = latent(key, parallel.example_index(size, nets.axis_name), static.delegator.z_dim)
    pseudo = eval_mode(static.delegator, kept.delegator, z)
    _, logits = eval_mode(nets.classifier(kept.classifier.params), kept.classifier, pseudo)
    drawn = Batch(pseudo, jnp.argmax(logits, axis=-1), jnp.ones(size, bool))
    return ncm.step(None, nets, state, kept, drawn, key, rates)


def with_means(kept: KeptDelegator, sums: ncm.Sums, num_old: int) -> KeptDelegator:
    """The head with its first ``num_old`` outputs, and then the means of some classes."""
    assert kept.classifier is not None
    means = sums.features / jnp.maximum(sums.count, 1)[:, None]
    head = kept.classifier.params["head"]
    kernel = jnp.concatenate([head["kernel"][:, :num_old], ncm.unit(means).T], axis=1)
    head = {**head, "kernel": kernel}
    if "bias" in head:
        head["bias"] = jnp.zeros(kernel.shape[1])
    params = {**kept.classifier.params, "head": head}
    return dataclasses.replace(kept, classifier=Network(params, kept.classifier.batch_stats))


def drawn(setting: Setting) -> Phase:
    """The means of the base classes, of what D_0 draws."""
    one = setting.config.method.stage_one
    return Phase(
        name="drawn",
        task=0,
        number=DRAWN,
        steps=STEPS,
        batch=one.batch,
        field="method.stage_one.batch",
        reads="nothing",
        static=_Drawing(delegator_module(setting.config), one.batch),
        init=ncm.no_sums(setting, 0),
        step=drawn_step,
        rates=lambda numbers: np.zeros(len(numbers), np.float32),
        finish=lambda state, kept, take: with_means(kept, state, 0),
    )


def means(setting: Setting, task: int) -> Phase:
    """The means of a task's classes, of its images."""
    old = setting.seen(task - 1)

    def finish(state: ncm.Sums, kept: KeptDelegator, take: Any) -> KeptDelegator:
        del take
        return with_means(kept, state, old)

    return sweep(
        setting, task, "means", ncm.step, None, ncm.no_sums(setting, task), finish, ends_task=True
    )


def phases(setting: Setting, task: int) -> list[Phase]:
    """D_0 and the base classes' means once, then a pass over each task's images."""
    if not task:
        return []
    first = [stage_one(setting, 0), drawn(setting)] if task == 1 else []
    return [*first, means(setting, task)]


METHOD = Method(
    "pseudo_ncm", Settings, phases, kept=KeptDelegator, check=check_stage_one, describe=describe
)

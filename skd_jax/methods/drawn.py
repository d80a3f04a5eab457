"""A pass over what D_0 draws, in place of the base classes' images, which may not be at hand.

A phase made by :func:`drawn` does with pseudo images what one made by
:func:`skd_jax.methods.phases.sweep` does with a task's images: the step is the same. A pseudo image
is of the class that T_0 gives it (Eq. 5).

It draws ``STEPS`` batches of ``stage_one.batch``, whatever the number of images that the base had.
So where statistics add up over classes (ridge's products, LDA's scatter), a base class weighs by
how often D_0 draws it, and a later class by its images: with CIFAR-100's 50 base classes and
batches of 256, 205 pseudo images in the mean beside 500 images. Means do not depend on it.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import parallel, steps
from skd_jax.methods.phase import Metrics, Phase, Setting
from skd_jax.methods.skd.phases import KeptDelegator, delegator_module
from skd_jax.methods.skd.steps import draw, with_delegator
from skd_jax.models import Delegator
from skd_jax.state import Batch
from skd_jax.steps import eval_mode

DRAWN = 5  # the phase's number in random keys
STEPS = 40  # batches of pseudo images


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """What a step over pseudo images depends on that is no array."""

    delegator: Delegator
    batch: int
    step: Callable
    static: Hashable


def _step(
    static: _Drawing,
    nets: steps.Networks,
    state: Any,
    kept: KeptDelegator,
    batch: None,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Any, Metrics]:
    """Makes the step on a batch of pseudo images."""
    del batch
    assert kept.classifier is not None and kept.delegator is not None
    size = parallel.local_batch(static.batch, nets.axis_name)
    pseudo = draw(with_delegator(nets, static.delegator), kept.delegator, key, size)
    _, logits = eval_mode(nets.classifier(kept.classifier.params), kept.classifier, pseudo)
    found = Batch(pseudo, jnp.argmax(logits, axis=-1), jnp.ones(size, bool))
    return static.step(static.static, nets, state, kept, found, key, rates)


def drawn(
    setting: Setting,
    task: int,
    name: str,
    step: Callable,
    static: Hashable,
    init: Callable,
    finish: Callable,
    **more: Any,
) -> Phase:
    """The same as :func:`skd_jax.methods.phases.sweep`, of pseudo images; ``task`` is 0.

    The method's settings have ``delegator`` and ``stage_one``, whose batch is taken.
    """
    batch = setting.config.method.stage_one.batch
    return Phase(
        name=name,
        task=task,
        number=DRAWN,
        steps=STEPS,
        batch=batch,
        field="method.stage_one.batch",
        reads="nothing",
        static=_Drawing(delegator_module(setting.config), batch, step, static),
        init=init,
        step=_step,
        rates=lambda numbers: np.zeros(len(numbers), np.float32),
        finish=finish,
        **more,
    )

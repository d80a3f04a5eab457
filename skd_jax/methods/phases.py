"""Phases that methods share: T_0's training, learning by SGD, and a pass over the images."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import steps
from skd_jax.config import Supervised
from skd_jax.methods.phase import BASE, LEARN, SWEEP, Metrics, Phase, Setting
from skd_jax.models import Classifier, grow_head
from skd_jax.state import Batch, Kept, Network, Params, Trained


def base(setting: Setting) -> Phase:
    """T_0's training on the base classes, which all methods share."""
    return anew(setting, 0, setting.config.base, "base", "base.batch", setting.images[0], BASE)


def anew(
    setting: Setting,
    task: int,
    config: Supervised,
    name: str,
    field: str,
    images: int,
    number: int,
) -> Phase:
    """Trains a new classifier of all classes up to a task.

    Args:
      setting: of the run.
      task: its number.
      config: of the training.
      name: of the phase.
      field: the config field of the batch's size.
      images: how many there are to learn from.
      number: of the phase in random keys.
    """
    init_key, _ = setting.keys(task, number)
    data, classes = setting.config.data, setting.seen(task)

    def init(kept: Kept) -> Trained:
        del kept
        shape = (1, data.image_size, data.image_size, data.channels)
        classifier = Classifier(setting.nets.features, classes, setting.config.model.head)
        network = steps.initial(classifier, init_key, shape)
        return Trained(network, steps.sgd(config).init(network.params))

    return by_sgd(config, classify, config, init, images, name, task, number, field)


def learn(
    setting: Setting,
    task: int,
    config: Supervised,
    step: Callable,
    static: Hashable,
    field: str = "method.batch",
    images: int | None = None,
    grown: Callable[[Any, Params], Params] = lambda kept, params: params,
    **more: Any,
) -> Phase:
    """T_n's head grows, and all of it learns the task's images by SGD.

    Args:
      setting: of the run.
      task: its number, 1 or more.
      config: epochs, batch and rates.
      step: see :class:`Phase`; its rates are SGD's, unless ``more`` has others.
      static: see :class:`Phase`.
      field: the config field of the batch's size.
      images: how many it learns from, where these are not the task's.
      grown: (kept, params with the new outputs) to the params that learning begins with.
      more: other fields of :class:`Phase`.
    """
    init_key, _ = setting.keys(task, LEARN)

    def init(kept: Kept) -> Trained:
        assert kept.classifier is not None
        old = jax.tree.map(jnp.copy, kept.classifier)  # T_n stays whole; the state is donated
        params = grown(kept, grow_head(old.params, init_key, setting.classes[task]))
        return Trained(dataclasses.replace(old, params=params), steps.sgd(config).init(params))

    images = setting.images[task] if images is None else images
    return by_sgd(config, step, static, init, images, "learn", task, LEARN, field, **more)


def by_sgd(
    config: Supervised,
    step: Callable,
    static: Hashable,
    init: Callable,
    images: int,
    name: str,
    task: int,
    number: int,
    field: str,
    **more: Any,
) -> Phase:
    """A phase that ends a task, of epochs over its shuffled images, at rates that drop."""
    steps_per_epoch = images // config.batch

    def rates(numbers: np.ndarray) -> np.ndarray:
        return steps.dropped(config.lr, numbers // steps_per_epoch, config.drop_epochs)

    def finish(state: Trained, kept: Any, take: Callable) -> Any:
        del take
        return dataclasses.replace(kept, classifier=state.network)

    return Phase(
        name=name,
        task=task,
        number=number,
        steps=config.epochs * steps_per_epoch,
        batch=config.batch,
        field=field,
        reads="shuffled",
        static=static,
        init=init,
        step=step,
        **{"rates": rates, "finish": finish, "ends_task": True, **more},
    )


def classify(
    static: Supervised,
    nets: steps.Networks,
    state: Trained,
    kept: Any,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """A step of plain cross-entropy over all outputs."""
    del kept, key
    return steps.supervised(nets, static, state, batch.images, batch.labels, rates)


def sweep(
    setting: Setting,
    task: int,
    name: str,
    step: Callable,
    static: Hashable,
    init: Callable,
    finish: Callable,
    number: int = SWEEP,
    images: int | None = None,
    **more: Any,
) -> Phase:
    """A pass over the task's images, in order and unaugmented, to the last one.

    It takes them ``base.batch`` at a time; the last batch is filled up with images that do not
    count, see :class:`Batch`. ``images`` is how many there are, where these are not the task's. A
    step's ``rates`` is its number, int32.
    """
    batch = setting.config.base.batch
    images = setting.images[task] if images is None else images
    return Phase(
        name=name,
        task=task,
        number=number,
        steps=-(-images // batch),
        batch=batch,
        field="base.batch",
        reads="in_order",
        static=static,
        init=init,
        step=step,
        rates=lambda numbers: np.asarray(numbers, np.int32),
        finish=finish,
        **more,
    )


def features(nets: steps.Networks, classifier: Network, images: jax.Array) -> jax.Array:
    """F(x) in eval mode, float32 [B, F]."""
    return steps.eval_mode(nets.classifier(classifier.params), classifier, images)[0]

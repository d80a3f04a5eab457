"""SKD, Algorithm 1: train the delegator from T_n alone, then learn task n + 1 beside its replay.

With ``config.stage_two.delegator`` off, stage one is skipped and the rest stays as it is: the "w/o
SKD" rows of Table III.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from skd_jax import parallel, steps, terms
from skd_jax.config import Config, Data, StageOne
from skd_jax.data import TaskImages, epoch_batches
from skd_jax.losses import adaptive_loss_weight
from skd_jax.methods.phase import Metrics, Phase
from skd_jax.models import Classifier, Delegator, align_head, grow_head, resnet
from skd_jax.state import Carry, Network, StageOneState, Trained

BASE, DELEGATOR, LEARN = range(3)  # the phase's number in its random keys


def networks(config: Config) -> steps.Networks:
    """The architectures a configuration names."""
    model, data = config.model, config.data
    common = {"bn_momentum": model.bn_momentum, "dtype": model.dtype}
    return steps.Networks(
        features=resnet(model.family, model.depth, model.width, **common),
        delegator=Delegator(
            image_size=data.image_size,
            channels=data.channels,
            widths=config.delegator.widths,
            upsample=config.delegator.upsample,
            helper_bn=config.delegator.helper_bn,
            z_dim=config.delegator.z_dim,
            **common,
        ),
    )


def phases(
    config: Config,
    classes_per_task: Sequence[int],
    images_per_task: Sequence[int],
    mesh: Mesh | None = None,
) -> list[Phase]:
    """The phases of a whole run: base training, then stage one and stage two of every task.

    Args:
      config: the configuration.
      classes_per_task: |C_0| .. |C_N|.
      images_per_task: training images of task 0 .. N.
      mesh: the devices to compute on.
    """
    nets = networks(config)
    run = [_base(config, nets, mesh, classes_per_task[0], images_per_task[0])]
    for task in range(1, len(classes_per_task)):
        if config.stage_two.delegator:
            run.append(_delegator(config, nets, mesh, task - 1))
        run.append(learn(config, nets, mesh, classes_per_task, images_per_task, task))
    return run


def phase_keys(seed: int, task: int, phase: int) -> tuple[jax.Array, jax.Array]:
    """(initialisation key, step key) of a phase: a function of (seed, task, phase) alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), phase)
    init, step = jax.random.split(key)
    return init, step


def dropped(rate: float, epochs: np.ndarray, drop_epochs: Sequence[int]) -> np.ndarray:
    """``rate`` / 10 for each of ``drop_epochs`` that has passed: float32, one an epoch given."""
    drops = np.searchsorted(np.asarray(sorted(drop_epochs)), epochs, side="right")
    return np.asarray(rate / 10.0**drops, np.float32)


def _initial(module: nn.Module, key: jax.Array, shape: tuple[int, ...]) -> Network:
    """A module's first variables; not jitted: compiling would take longer than drawing them."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables: Any = module.lazy_init(key, x, False)
    return Network(variables["params"], variables["batch_stats"])


def _image_shape(data: Data) -> tuple[int, ...]:
    return (1, data.image_size, data.image_size, data.channels)


def _fetch(
    key: tuple[int, int, int], images: TaskImages, batch: int, start: int, stop: int, last: int
) -> tuple:
    """Images for steps ``start`` to ``stop`` - 1; the next call's, before ``last``, are begun."""

    def batches(start: int, stop: int) -> np.ndarray:
        return epoch_batches(*key, start, stop, images.n, batch)

    found = images.fetch(batches(start, stop))
    if stop < last:
        images.prefetch(batches(stop, min(2 * stop - start, last)))
    return found


def _base(
    config: Config, nets: steps.Networks, mesh: Mesh | None, classes: int, images: int
) -> Phase:
    base, data = config.base, config.data
    init_key, step_key = phase_keys(config.seed, 0, BASE)
    step_key = parallel.replicate(mesh, step_key)
    steps_per_epoch = images // base.batch
    last = base.epochs * steps_per_epoch

    def init(carry: Carry) -> Trained:
        del carry
        classifier = Classifier(nets.features, classes)
        network = _initial(classifier, init_key, _image_shape(data))
        return Trained(network, steps.sgd(base).init(network.params))

    def call(
        state: Trained, carry: Carry, task: TaskImages | None, start: int, stop: int
    ) -> tuple[Trained, Metrics]:
        assert task is not None
        numbers = np.arange(start, stop, dtype=np.int32)
        x, y = _fetch((config.seed, 0, BASE), task, base.batch, start, stop, last)
        rates = dropped(base.lr, numbers // steps_per_epoch, base.drop_epochs)
        return steps.run_supervised(
            nets, base, data, state, x, y, step_key, numbers, rates, mesh=mesh
        )

    def finish(state: Trained, carry: Carry) -> Carry:
        return dataclasses.replace(carry, classifier=state.network)

    return Phase("base", 0, last, True, "step", init, call, finish)


def stage_one_rounds(config: StageOne, task: int) -> tuple[int, range]:
    """(number of rounds, epochs after which the rates drop) of stage one of task n."""
    epochs = config.finetune_epochs if task else config.epochs
    every = config.finetune_drop_every if task else config.drop_every
    return epochs * config.rounds_per_epoch, range(every, epochs, every)


def _delegator(config: Config, nets: steps.Networks, mesh: Mesh | None, task: int) -> Phase:
    one = config.stage_one
    init_key, step_key = phase_keys(config.seed, task, DELEGATOR)
    step_key = parallel.replicate(mesh, step_key)
    rounds, drop_epochs = stage_one_rounds(one, task)
    functions = terms.lookup(one)
    weights = {name: np.float32(dict(one.terms)[name]) for name, _ in functions}

    def init(carry: Carry) -> StageOneState:
        student_key, delegator_key = jax.random.split(init_key)
        student = _initial(nets.features, student_key, _image_shape(config.data))
        if carry.delegator is None:  # D_0
            delegator = _initial(nets.delegator, delegator_key, (1, config.delegator.z_dim))
        else:  # D_n starts as D_{n-1}; a copy, since the state is donated
            delegator = jax.tree.map(jnp.copy, carry.delegator)
        return StageOneState(
            Trained(student, steps.sgd(one).init(student.params)),
            Trained(delegator, steps.adam().init(delegator.params)),
        )

    def call(
        state: StageOneState, carry: Carry, images: TaskImages | None, start: int, stop: int
    ) -> tuple[StageOneState, Metrics]:
        del images  # stage one sees no image at all
        assert carry.classifier is not None
        numbers = np.arange(start, stop, dtype=np.int32)
        epochs = numbers // one.rounds_per_epoch
        return steps.run_rounds(
            nets,
            one,
            functions,
            state,
            carry.classifier,
            step_key,
            numbers,
            weights,
            dropped(one.student_lr, epochs, drop_epochs),
            dropped(one.delegator_lr, epochs, drop_epochs),
            mesh=mesh,
        )

    def finish(state: StageOneState, carry: Carry) -> Carry:
        return dataclasses.replace(
            carry, delegator=state.delegator.network, student=state.student.network
        )

    return Phase("delegator", task, rounds, False, "round", init, call, finish)


def learn(
    config: Config,
    nets: steps.Networks,
    mesh: Mesh | None,
    classes_per_task: Sequence[int],
    images_per_task: Sequence[int],
    task: int,
) -> Phase:
    """Stage two of one task: T_n learns its classes beside what D_n draws (Eq. 9-12).

    Args:
      config: the configuration.
      nets: the architectures; for analyses, another delegator than the configuration's.
      mesh: the devices to compute on.
      classes_per_task: |C_0| .. |C_N|.
      images_per_task: training images of task 0 .. N.
      task: its number, 1 or more.
    """
    two = config.stage_two
    init_key, step_key = phase_keys(config.seed, task, LEARN)
    step_key = parallel.replicate(mesh, step_key)
    images = images_per_task[task]
    steps_per_epoch = images // two.batch
    last = two.epochs * steps_per_epoch
    gamma = two.gamma
    if two.adaptive:
        num_tasks = len(classes_per_task) - 1
        beta = two.beta or 0.1 * sum(classes_per_task[1:])
        gamma = adaptive_loss_weight(beta, num_tasks, classes_per_task[1 : task + 1])
    weight = np.float32(gamma)

    def init(carry: Carry) -> Trained:
        assert carry.classifier is not None
        old = jax.tree.map(jnp.copy, carry.classifier)  # T_n stays whole; the state is donated
        params = grow_head(old.params, init_key, classes_per_task[task])
        return Trained(dataclasses.replace(old, params=params), steps.sgd(two).init(params))

    def call(
        state: Trained, carry: Carry, new: TaskImages | None, start: int, stop: int
    ) -> tuple[Trained, Metrics]:
        assert new is not None and carry.classifier is not None
        numbers = np.arange(start, stop, dtype=np.int32)
        x, y = _fetch((config.seed, task, LEARN), new, two.batch, start, stop, last)
        return steps.run_cil(
            nets,
            two,
            config.data,
            state,
            carry.classifier,
            carry.delegator if two.delegator else None,
            x,
            y,
            step_key,
            numbers,
            weight,
            dropped(two.lr, numbers // steps_per_epoch, two.drop_epochs),
            mesh=mesh,
        )

    def finish(state: Trained, carry: Carry) -> Carry:
        network = state.network
        if two.align_head:
            params = align_head(network.params, sum(classes_per_task[:task]))
            network = dataclasses.replace(network, params=params)
        return dataclasses.replace(carry, classifier=network, student=None)

    return Phase("learn", task, last, True, "step", init, call, finish)

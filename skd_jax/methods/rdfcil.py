"""R-DFCIL: relation-guided representation learning, then the head alone.

A generator D is trained from T_n (see :mod:`skd_jax.methods.inversion`). Then each step takes B
real images of the n_N new classes and B of D. With alpha = log2(n_N / 2 + 1) and beta =
sqrt(n_O / n_N),

    L = 0.5 (1 + 1 / alpha) / beta  CE of real images over the new outputs
      + 0.15 alpha beta             mean |z - z'| over the old outputs, of D's images
      + 0.5 alpha beta              relation loss of real images

The relation loss compares the angles of T_{n+1}'s features with those of T_n's, each seen through a
linear map of its own, F to 2 F (64 to 128), that learns beside them. At last the features are held
fixed, in eval mode, and the head learns all classes: 0.5 CE over all outputs of both kinds of
images, each class weighted by the inverse of how often it has come so far, and the hard
distillation as before. Nothing is kept but T_n. The largest output is the class.

Published: 200 epochs, rate 0.1 / 10 at 80 and 120, decay 5e-4, the head alone in the last 40 at
rate 0.005; 5,000 steps of D, anew for each task. Here all methods of a benchmark share epochs and
rates (160, with these drops), and the head's 40 follow. The paper's head has no bias; here T_0 is
every method's, and has one. Not verified: that real and drawn images share a forward pass, that the
weighted mean divides by the sum of the weights (PyTorch's, so that their scale does not matter),
the maps' first weights; the paper was read through its code and notes.

References:
  Gao, Zhao, Ghanem and Zhang, "R-DFCIL: Relation-Guided Representation Learning for Data-Free Class
  Incremental Learning", ECCV 2022.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skd_jax import losses, parallel, steps
from skd_jax.config import Config, Supervised, learning
from skd_jax.methods import inversion
from skd_jax.methods.inversion import GENERATOR, Inversion, beside, invert
from skd_jax.methods.phase import LEARN, Method, Metrics, Phase, Setting
from skd_jax.methods.phases import by_sgd, features, learn
from skd_jax.methods.skd.phases import KeptDelegator, delegator_module
from skd_jax.methods.skd.settings import Delegator as DelegatorSettings
from skd_jax.models import Delegator
from skd_jax.state import Batch, Network, Trained
from skd_jax.steps import dropped, guard, head, sgd, train_mode, update

HEAD = 4  # the head's phase in random keys
INVERSION = Inversion(steps=5000)


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """R-DFCIL."""

    name: str = "rdfcil"
    local: float = 0.5  # before alpha and beta
    hard: float = 0.15
    relation: float = 0.5
    head: float = 0.5  # the cross-entropy in the head's own epochs
    head_epochs: int = 40  # after the others
    head_lr: float = 0.005
    delegator: DelegatorSettings = GENERATOR
    inversion: Inversion = INVERSION


def loss_weights(settings: Settings, old: int, new: int) -> dict[str, float]:
    """What the three losses weigh where ``new`` classes follow ``old`` ones."""
    alpha, beta = math.log2(new / 2 + 1), math.sqrt(old / new)
    return {
        "local": settings.local * (1 + 1 / alpha) / beta,
        "hard": settings.hard * alpha * beta,
        "relation": settings.relation * alpha * beta,
    }


def hard_distillation_loss(old: jax.Array, new: jax.Array) -> jax.Array:
    """Mean |z - z'| over D's images and the old outputs, [B, n_O] each."""
    return jnp.mean(jnp.abs(new - old))


def relations(points: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The cosine at each point i between j - i and k - i; a zero difference has no direction: 0.

    Args:
      points: [B, D].
      axis_name: mapped axis the batch is split over: j and k run over all of it.

    Returns:
      float32 [B, n, n] with n points in the whole batch.
    """
    every = points
    if axis_name is not None:
        every = jax.lax.all_gather(points, axis_name, tiled=True)
    directions = losses.unit(every[None] - points[:, None])
    return jnp.einsum("ijd,ikd->ijk", directions, directions, precision="highest")


def relation_loss(
    teacher: jax.Array, student: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Mean difference of two sets' relations, over all n^3 triples of images; [B, D] each."""
    return jnp.mean(jnp.abs(relations(student, axis_name) - relations(teacher, axis_name)))


def class_weights(counts: jax.Array) -> jax.Array:
    """Inverse frequencies: the class that has come most often weighs 1, [K] from counts [K]."""
    counts = jnp.maximum(counts, 1)
    return jnp.max(counts) / counts


@struct.dataclass
class KeptPair(KeptDelegator):
    """T_n and D; until the head has learned T_{n+1} and D, with T_n as ``teacher``.

    ``counts`` says how often each class has come in this task, float32 [K].
    """

    teacher: Network | None = None
    counts: jax.Array | None = None


@struct.dataclass
class Relating:
    """T_{n+1}, the maps of its features and of T_n's, and how often each class has come."""

    classifier: Trained
    maps: Trained
    counts: jax.Array


@struct.dataclass
class Refining:
    """H_{n+1}, and how often each class has come."""

    head: Trained
    counts: jax.Array


@dataclasses.dataclass(frozen=True)
class _Learning:
    """What a step depends on that is no array."""

    settings: Settings
    delegator: Delegator


def _counted(counts: jax.Array, one_hot: jax.Array, axis_name: str | None) -> jax.Array:
    return counts + parallel.total(jnp.sum(one_hot, axis=0), axis_name)


def step(
    static: _Learning,
    nets: steps.Networks,
    state: Relating,
    kept: KeptPair,
    batch: Batch,
    key: jax.Array,
    rates: dict[str, jax.Array],
) -> tuple[Relating, Metrics]:
    """One step on real images and as many of D."""
    teacher, network, real = kept.classifier, state.classifier.network, len(batch.labels)
    assert teacher is not None
    classifier = nets.classifier(network.params)
    drawn, old_logits = beside(static.delegator, nets, kept, batch, key)
    old = old_logits.shape[-1]
    new = jnp.arange(classifier.num_classes) >= old
    images = jnp.concatenate([batch.images, drawn])
    labels = jnp.concatenate([batch.labels, jnp.argmax(old_logits, axis=-1)])
    one_hot = jax.nn.one_hot(labels, classifier.num_classes)
    target = features(nets, teacher, batch.images)

    def mapped(maps: Any, name: str, found: jax.Array) -> jax.Array:
        return jnp.matmul(found, maps[name], precision="highest")

    def loss_fn(params):
        weights, maps = params
        (found, logits), stats, _ = train_mode(classifier, weights, network.batch_stats, images)
        ours, theirs = mapped(maps, "student", found[:real]), mapped(maps, "teacher", target)
        parts = {
            "local": losses.classification_loss(logits[:real], one_hot[:real], new),
            "hard": hard_distillation_loss(old_logits, logits[real:, :old]),
            "relation": relation_loss(theirs, ours, nets.axis_name),
        }
        loss = losses.explore_objective(parts, {name: rates[name] for name in parts})
        accuracy = jnp.mean(logits[:real].argmax(-1) == batch.labels)
        return loss, ({"loss": loss, **parts, "train_accuracy": accuracy}, stats)

    (_, (metrics, stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        (network.params, state.maps.network.params)
    )
    optimiser = sgd(static.settings)
    trained = Relating(
        update(state.classifier, grads[0], stats, optimiser, rates["rate"]),
        update(state.maps, grads[1], {}, optimiser, rates["rate"]),
        _counted(state.counts, one_hot, nets.axis_name),
    )
    return guard(trained, state, parallel.mean(metrics, nets.axis_name))


def refine(
    static: _Learning,
    nets: steps.Networks,
    state: Refining,
    kept: KeptPair,
    batch: Batch,
    key: jax.Array,
    rates: dict[str, jax.Array],
) -> tuple[Refining, Metrics]:
    """One step of the head alone, on real images and as many of D."""
    teacher, learned, real = kept.teacher, kept.classifier, len(batch.labels)
    assert teacher is not None and learned is not None
    before = dataclasses.replace(kept, classifier=teacher)
    drawn, old_logits = beside(static.delegator, nets, before, batch, key)
    old = old_logits.shape[-1]
    found = features(nets, learned, jnp.concatenate([batch.images, drawn]))
    labels = jnp.concatenate([batch.labels, jnp.argmax(old_logits, axis=-1)])
    one_hot = jax.nn.one_hot(labels, len(state.counts))
    counts = _counted(state.counts, one_hot, nets.axis_name)
    weights = class_weights(counts)[labels]
    weights /= parallel.mean(jnp.mean(weights), nets.axis_name)

    def loss_fn(params):
        logits = head(nets, Network({"head": params}, {}), found)
        parts = {
            "head": losses.classification_loss(logits, one_hot, weights=weights),
            "hard": hard_distillation_loss(old_logits, logits[real:, :old]),
        }
        loss = losses.explore_objective(parts, {name: rates[name] for name in parts})
        return loss, {"loss": loss, **parts}

    (_, metrics), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        state.head.network.params
    )
    trained = update(state.head, grads, {}, sgd(static.settings), rates["rate"])
    return guard(Refining(trained, counts), state, parallel.mean(metrics, nets.axis_name))


def _relate(setting: Setting, task: int) -> Phase:
    """The phase in which features and head learn."""
    settings = setting.config.method
    static = _Learning(settings, delegator_module(setting.config))
    classes, width = setting.seen(task), setting.nets.features.num_features
    key = jax.random.fold_in(setting.keys(task, LEARN)[0], 1)  # the head's is the key itself
    weights = loss_weights(settings, setting.seen(task - 1), setting.classes[task])
    steps_per_epoch = setting.images[task] // settings.batch

    def rates(numbers: np.ndarray) -> dict[str, np.ndarray]:
        rate = dropped(settings.lr, numbers // steps_per_epoch, settings.drop_epochs)
        each = {name: np.full(len(numbers), w, np.float32) for name, w in weights.items()}
        return {"rate": rate, **each}

    def finish(state: Relating, kept: KeptPair, take: Any) -> KeptPair:
        del take
        return dataclasses.replace(
            kept,
            classifier=state.classifier.network,
            teacher=kept.classifier,
            counts=state.counts,
        )

    phase = learn(
        setting,
        task,
        settings,
        step,
        static,
        rates=rates,
        finish=finish,
        draws=True,
        ends_task=False,
    )

    def init(kept: KeptPair) -> Relating:
        drawn = nn.initializers.lecun_normal()
        maps = {
            name: drawn(k, (width, 2 * width), jnp.float32)
            for name, k in zip(("student", "teacher"), jax.random.split(key), strict=True)
        }
        trained = Trained(Network(maps, {}), sgd(settings).init(maps))
        return Relating(phase.init(kept), trained, jnp.zeros(classes))

    return dataclasses.replace(phase, init=init)


def _refine(setting: Setting, task: int) -> Phase:
    """The phase in which the head learns alone; then D and T_n are gone."""
    settings = setting.config.method
    static = _Learning(settings, delegator_module(setting.config))
    alone = Supervised(
        epochs=settings.head_epochs,
        batch=settings.batch,
        lr=settings.head_lr,
        drop_epochs=(),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    weights = {
        "rate": settings.head_lr,
        "head": settings.head,
        "hard": loss_weights(settings, setting.seen(task - 1), setting.classes[task])["hard"],
    }

    def rates(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.full(len(numbers), value, np.float32) for name, value in weights.items()}

    def init(kept: KeptPair) -> Refining:
        assert kept.classifier is not None and kept.counts is not None
        params, counts = jax.tree.map(jnp.copy, (kept.classifier.params["head"], kept.counts))
        return Refining(Trained(Network(params, {}), sgd(settings).init(params)), counts)

    def finish(state: Refining, kept: KeptPair, take: Any) -> KeptPair:
        del take
        assert kept.classifier is not None
        params = {**kept.classifier.params, "head": state.head.network.params}
        return KeptPair(dataclasses.replace(kept.classifier, params=params))

    more = {"rates": rates, "finish": finish, "draws": True}
    of = setting.images[task], "head", task, HEAD, "method.batch"
    return by_sgd(alone, refine, static, init, *of, **more)


def phases(setting: Setting, task: int) -> list[Phase]:
    """The generator of T_{n-1}, a learning phase, and one of the head."""
    if not task:
        return []
    return [invert(setting, task - 1), _relate(setting, task), _refine(setting, task)]


def check(config: Config) -> None:
    """Checks what can be checked without images.

    Raises:
      UserError: a value is out of range; the message names the field.
    """
    limits = learning(
        "method.",
        not_negative=("local", "hard", "relation", "head"),
        positive=("head_lr",),
    )
    more = (*limits.at_least_one, "head_epochs")
    dataclasses.replace(limits, at_least_one=more).check(config)
    inversion.check(config)


METHOD = Method(
    "rdfcil",
    Settings,
    phases,
    kept=KeptPair,
    check=check,
    family="generator",
    tricks="the head learns alone for more epochs, classes balanced",
)

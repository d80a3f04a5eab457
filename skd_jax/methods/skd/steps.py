"""SKD's training steps as pure functions to (state, metrics).

A step is what one device does with its share of the batch; with ``nets.over(axis_name)`` its means
are those of the whole batch. One that meets a number that is not finite leaves its state as it was,
to the bit, and counts itself in the metric ``skipped``.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct

from skd_jax import flat, losses, parallel, steps
from skd_jax.compiler import compiled
from skd_jax.config import Data
from skd_jax.data import augment_normalised
from skd_jax.methods.skd.settings import StageOne, StageTwo
from skd_jax.methods.skd.terms import Explored, Term
from skd_jax.models import MOMENTS, Delegator
from skd_jax.state import Network, Trained
from skd_jax.steps import Metrics, eval_mode, guard, head, moments, sgd, train_mode, update


@dataclasses.dataclass(frozen=True)
class Networks(steps.Networks):
    """The architectures: T_n's and S_n's feature extractor, and D_n."""

    delegator: Delegator

    def over(self, axis_name: str | None) -> "Networks":
        """The same for a batch that is split over a mapped axis."""
        return Networks(
            self.features.clone(axis_name=axis_name), self.delegator.clone(axis_name=axis_name)
        )


def with_delegator(nets: steps.Networks, delegator: Delegator) -> Networks:
    """The architectures with D_n's, over the same devices."""
    return Networks(nets.features, delegator.clone(axis_name=nets.axis_name))


# What T_n and S_n see of D_n's images [B, S, S, C], of the same shape and dtype; the paper has them
# as they are.
Altered = Callable[[jax.Array], jax.Array]
NO_EXAMPLE = 2**31 - 1  # beyond any example's place in a batch, whose latent has that in its key


def _as_drawn(images: jax.Array) -> jax.Array:
    return images


@struct.dataclass
class StageOneState:
    """S_n (its feature extractor; it needs no head) and D_n."""

    student: Trained
    delegator: Trained


def adam() -> optax.GradientTransformation:
    """Adam without the rate."""
    return optax.scale_by_adam()


def latent(key: jax.Array, index: jax.Array, z_dim: int) -> jax.Array:
    """Draws z ~ N(0, I), [B, z_dim], for the examples at ``index`` (int32 [B]) of the batch."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    return jax.vmap(lambda k: jax.random.normal(k, (z_dim,)))(keys)


def draw(nets: Networks, delegator: Network, key: jax.Array, count: int) -> jax.Array:
    """What a frozen D, in eval mode, draws beside ``count`` images of this device: [count, ...]."""
    index = parallel.example_index(count, nets.axis_name)
    z = latent(key, index, nets.delegator.z_dim)
    return eval_mode(nets.delegator, delegator, z)


def spread(logits: jax.Array, axis_name: str | None) -> Metrics:
    """How T_n's outputs [B, K] on pseudo images fall on the classes.

    Returns:
      ``label_entropy``, of Eq. 6's w, in nats, and ``label_shares`` [K], the share of the batch
      that T_n gives each class. Both are NaN where an output is.
    """
    unknown = jnp.any(jnp.isnan(logits))  # its largest would be the first
    labels = jnp.where(unknown, jnp.nan, jnp.mean(losses.pseudo_label(logits), axis=0))
    return {
        "label_entropy": -losses.diversity_loss(jax.nn.softmax(logits), axis_name),
        "label_shares": parallel.mean(labels, axis_name),
    }


def imitate(
    nets: Networks,
    config: StageOne,
    state: StageOneState,
    teacher: Network,
    z: jax.Array,
    rate: jax.Array,
    altered: Altered = _as_drawn,
) -> tuple[StageOneState, Metrics]:
    """S_n minimises Eq. 2 on D(z); D_n's weights are fixed (its running moments follow).

    The metric "imitation" is Eq. 2 alone; with ``config.feature_length`` there is "feature_length"
    beside it, before it is weighed.
    """
    generator = state.delegator.network
    drawn, stats, _ = train_mode(nets.delegator, generator.params, generator.batch_stats, z)
    images = altered(drawn)
    target = eval_mode(nets.classifier(teacher.params), teacher, images)

    def loss_fn(params):
        features, stats, _ = train_mode(
            nets.features, params, state.student.network.batch_stats, images
        )
        outputs = features, head(nets, teacher, features)
        total = losses.discrepancy(target, outputs, config.discrepancy)
        values = {"imitation": total}
        if config.feature_length:
            values["feature_length"] = losses.length_discrepancy(target[0], features)
            total = total + config.feature_length * values["feature_length"]
        return total, (values, stats)

    (_, (values, student_stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        state.student.network.params
    )
    student = update(state.student, grads, student_stats, sgd(config), rate)
    delegator = dataclasses.replace(
        state.delegator, network=dataclasses.replace(generator, batch_stats=stats)
    )
    values = parallel.mean(values, nets.axis_name)
    return guard(StageOneState(student, delegator), state, values)


def explore(
    nets: Networks,
    config: StageOne,
    terms: tuple[tuple[str, Term], ...],
    state: StageOneState,
    teacher: Network,
    z: jax.Array,
    weights: dict[str, jax.Array],
    student_rate: jax.Array,
    delegator_rate: jax.Array,
    altered: Altered = _as_drawn,
) -> tuple[StageOneState, Metrics]:
    """D_n and, if ``config.student_explores``, S_n minimise Eq. 8 (Algorithm 1, line 12).

    Metrics besides the terms': see :func:`spread`.
    """
    student, generator = state.student.network, state.delegator.network
    teacher = parallel.varying(teacher, nets.axis_name)
    running = moments(teacher.batch_stats)

    def loss_fn(params):
        student_params, delegator_params = params
        drawn, delegator_stats, _ = train_mode(
            nets.delegator, delegator_params, generator.batch_stats, z
        )
        images = altered(drawn)
        (features, logits), seen = nets.classifier(teacher.params).apply(
            teacher.variables(), images, False, mutable=[MOMENTS]
        )
        student_features, student_stats, student_moments = train_mode(
            nets.features, student_params, student.batch_stats, images
        )
        explored = Explored(
            images=images,
            teacher_features=features,
            teacher_logits=logits,
            student_features=student_features,
            student_logits=head(nets, teacher, student_features),
            teacher_moments=moments(seen[MOMENTS]),
            student_moments=moments(student_moments),
            running_moments=running,
            config=config,
            axis_name=nets.axis_name,
        )
        values = {name: term(explored) for name, term in terms}
        total = losses.explore_objective(values, weights)
        return total, (values, logits, student_stats, delegator_stats)

    (total, (values, logits, student_stats, delegator_stats)), grads = parallel.value_and_grad(
        loss_fn, nets.axis_name
    )((student.params, generator.params))
    values = parallel.mean(values, nets.axis_name)
    seen = spread(logits, nets.axis_name)
    new_delegator = update(state.delegator, grads[1], delegator_stats, adam(), delegator_rate)
    new_student = state.student
    if config.student_explores:
        new_student = update(state.student, grads[0], student_stats, sgd(config), student_rate)
    new = StageOneState(new_student, new_delegator)
    return guard(new, state, {"explore": total, **values, **seen})


def round_(
    nets: Networks,
    config: StageOne,
    terms: tuple[tuple[str, Term], ...],
    state: StageOneState,
    teacher: Network,
    key: jax.Array,
    weights: dict[str, jax.Array],
    student_rate: jax.Array,
    delegator_rate: jax.Array,
    data: Data | None = None,
) -> tuple[StageOneState, Metrics]:
    """One round of Algorithm 1: the imitate steps, each with a new z, then one explore step.

    With ``data`` what D_n draws is changed as that section says of training images.
    """
    teacher = nets.rounded(teacher)
    batch = parallel.local_batch(config.batch, nets.axis_name)
    index = parallel.example_index(batch, nets.axis_name)

    def z(i: jax.Array | int) -> jax.Array:
        return latent(jax.random.fold_in(key, i), index, nets.delegator.z_dim)

    def altered(i: jax.Array | int) -> Altered:
        if data is None:
            return _as_drawn
        augment_key = jax.random.fold_in(key, config.imitate_steps + 1 + i)  # after those of all z
        return partial(augment_normalised, data, augment_key, index)

    def body(state: StageOneState, i: jax.Array) -> tuple[StageOneState, Metrics]:
        return imitate(nets, config, state, teacher, z(i), student_rate, altered(i))

    state, metrics = flat.scan(body, state, jnp.arange(config.imitate_steps))
    state, explored = explore(
        nets,
        config,
        terms,
        state,
        teacher,
        z(config.imitate_steps),
        weights,
        student_rate,
        delegator_rate,
        altered(config.imitate_steps),
    )
    skipped = jnp.sum(metrics.pop("skipped")) + explored["skipped"]
    return state, {**explored, **jax.tree.map(jnp.mean, metrics), "skipped": skipped}


def cil(
    nets: Networks,
    config: StageTwo,
    state: Trained,
    teacher: Network,
    delegator: Network | None,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    gamma: jax.Array,
    rate: jax.Array,
    data: Data | None = None,
) -> tuple[Trained, Metrics]:
    """T_{n+1} minimises Eq. 11 on new images [B, ...] and as many pseudo images of the frozen D_n.

    With ``data`` these are changed as that section says of training images, as the new ones are.
    Without a delegator x^ holds the new images only. Labels are int32 [B] among all classes seen.

    With ``config.classification`` "local", "real", or either with "_old_head_fixed", Eq. 10 is
    another loss, after R-DFCIL (Gao et al., ECCV 2022) and ABD (Smith et al., ICCV 2021): half the
    cross-entropy of new images among the new classes, and that of all images among all classes.
    With "local" the second teaches the head alone: features learn to tell new classes from each
    other. With "real" it teaches the features of new images too, to tell them from the old outputs.
    In both no feature learns the class of a pseudo image, and where T_n's outputs stay as they are,
    these are not fitted to pseudo images either.

    With ``config.head_at_full_rate`` the head's step is divided by gamma, its weight decay too: it
    comes to where gamma leads it as fast as without gamma.
    """
    network = state.network
    classifier = nets.classifier(network.params)
    old_outputs = teacher.params["head"]["kernel"].shape[-1]
    one_hot = jax.nn.one_hot(labels, classifier.num_classes)
    weights = None
    if delegator is not None:
        pseudo = draw(nets, delegator, key, images.shape[0])
        if data is not None:
            index = parallel.example_index(len(pseudo), nets.axis_name)
            pseudo = augment_normalised(data, jax.random.fold_in(key, NO_EXAMPLE), index, pseudo)
        images = jnp.concatenate([pseudo.astype(images.dtype), images])
    target, old_logits = eval_mode(nets.classifier(teacher.params), teacher, images)
    if delegator is not None:
        pseudo_labels = losses.pseudo_label(old_logits[: labels.shape[0]])
        no_new_class = ((0, 0), (0, classifier.num_classes - old_outputs))
        one_hot = jnp.concatenate([jnp.pad(pseudo_labels, no_new_class), one_hot])
        if config.balanced:  # half the batch is of the old classes, however many they are
            share = 0.5 + config.balanced * (old_outputs / classifier.num_classes - 0.5)
            is_pseudo = jnp.arange(len(one_hot)) < len(pseudo_labels)
            weights = 2 * jnp.where(is_pseudo, share, 1 - share)

    is_new = jnp.arange(classifier.num_classes) >= old_outputs
    outputs = is_new if config.classification == "new" else None

    def classification_of(params, features, logits):
        if not config.classification.startswith(("local", "real")):
            return losses.classification_loss(logits, one_hot, outputs, weights)
        batch = labels.shape[0]  # of new images, which come last
        local = losses.classification_loss(logits[-batch:], one_hot[-batch:], is_new)
        held = len(features) - (batch if config.classification.startswith("real") else 0)
        parts = jax.lax.stop_gradient(features[:held]), features[held:]
        every = head(nets, Network(params, {}), jnp.concatenate(parts))
        return 0.5 * local + losses.classification_loss(every, one_hot, None, weights)

    def loss_fn(params):
        (features, logits), stats, _ = train_mode(classifier, params, network.batch_stats, images)
        classification = classification_of(params, features, logits)
        consolidation = losses.feature_consolidation_loss(target, features)
        total = losses.cil_objective(classification, consolidation, gamma)
        return total, (classification, consolidation, stats)

    (total, (classification, consolidation, stats)), grads = parallel.value_and_grad(
        loss_fn, nets.axis_name
    )(network.params)
    new = update(state, grads, stats, sgd(config), rate)
    if config.head_at_full_rate:
        new = _with_head(new, network, lambda a, b: b + (a - b) / gamma)
    if config.classification.endswith("old_head_fixed"):
        new = _with_head(new, network, partial(_new_outputs, is_new))
    parts = {"classification": classification, "consolidation": consolidation}
    return guard(new, state, {"cil": total, **parallel.mean(parts, nets.axis_name)})


def _with_head(
    new: Trained, old: Network, of: Callable[[jax.Array, jax.Array], jax.Array]
) -> Trained:
    """``new`` with a head whose arrays are made of its own and those before the step."""
    head = jax.tree.map(of, new.network.params["head"], old.params["head"])
    network = dataclasses.replace(new.network, params={**new.network.params, "head": head})
    return dataclasses.replace(new, network=network)


def _new_outputs(is_new: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new outputs of ``new``, the others of ``old``; and its sigma, which scales them all."""
    where = is_new.reshape((1,) * (new.ndim - 1) + (-1,))
    return jnp.where(where, new, old) if new.ndim else old


@compiled(static_argnames=("nets", "count"))
def pseudo_images(
    nets: Networks, delegator: Network, key: jax.Array, count: int, start: jax.Array | int = 0
) -> jax.Array:
    """D(z) in eval mode of z number ``start`` to ``start + count - 1``.

    Returns:
      float32 [count, S, S, C], in normalised image space.
    """
    z = latent(key, start + jnp.arange(count), nets.delegator.z_dim)
    return eval_mode(nets.delegator, delegator, z)

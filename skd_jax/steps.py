"""The training steps as pure functions: (state, batch, key, rates) -> (state, metrics).

A step is what one device does with its share of the batch; with ``nets.over(axis_name)`` its means
are those of the whole batch. Randomness comes from a key and an example's place in the whole batch,
never from a stream. The ``run_*`` functions at the end are the compiled entry points, mapped over
the devices of a mesh; they scan a step over consecutive step numbers, so that one call may hold one
step or a hundred. What is static there is hashable (modules, config sections, the mesh), and head
sizes are read off the params, so a grown head is the only recompilation.

A step that meets a number that is not finite leaves its state as it was, to the bit, and counts
itself in the metric ``skipped``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.linen import Module
from jax.sharding import Mesh

from skd_jax import losses, parallel
from skd_jax.compiler import compiled
from skd_jax.config import Data, StageOne, StageTwo, Supervised
from skd_jax.data import augment, prepare
from skd_jax.models import MOMENTS, Classifier, Delegator, ResNet, moments_by_layer
from skd_jax.parallel import SPLIT, WHOLE
from skd_jax.state import Network, StageOneState, Trained
from skd_jax.terms import Explored, Term

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The architectures: T_n's and S_n's feature extractor, and D_n."""

    features: ResNet
    delegator: Delegator

    @property
    def axis_name(self) -> str | None:
        """The mapped axis a batch is split over, or None."""
        return self.features.axis_name

    def over(self, axis_name: str | None) -> "Networks":
        """The same for a batch that is split over a mapped axis."""
        return Networks(
            self.features.clone(axis_name=axis_name), self.delegator.clone(axis_name=axis_name)
        )

    def classifier(self, params: dict[str, Any]) -> Classifier:
        """The classifier whose head has as many outputs as ``params``."""
        return Classifier(self.features, params["head"]["bias"].shape[0])


def sgd(config: Supervised | StageOne | StageTwo) -> optax.GradientTransformation:
    """PyTorch's SGD without the rate: weight decay on every parameter, then heavy-ball momentum."""
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))


def adam() -> optax.GradientTransformation:
    """Adam without the rate."""
    return optax.scale_by_adam()


def latent(key: jax.Array, index: jax.Array, z_dim: int) -> jax.Array:
    """Draws z ~ N(0, I), [B, z_dim], for the examples at ``index`` (int32 [B]) of the batch."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    return jax.vmap(lambda k: jax.random.normal(k, (z_dim,)))(keys)


def imitate(
    nets: Networks,
    config: StageOne,
    state: StageOneState,
    teacher: Network,
    z: jax.Array,
    rate: jax.Array,
) -> tuple[StageOneState, Metrics]:
    """S_n minimises Eq. 2 on D(z); D_n's weights are fixed (its running moments follow)."""
    generator = state.delegator.network
    images, stats, _ = _train_mode(nets.delegator, generator.params, generator.batch_stats, z)
    target = _eval_mode(nets.classifier(teacher.params), teacher, images)

    def loss_fn(params):
        features, stats, _ = _train_mode(
            nets.features, params, state.student.network.batch_stats, images
        )
        outputs = features, _head(teacher, features)
        return losses.discrepancy(target, outputs, config.discrepancy), stats

    (loss, student_stats), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        state.student.network.params
    )
    student = _update(state.student, grads, student_stats, sgd(config), rate)
    delegator = dataclasses.replace(
        state.delegator, network=dataclasses.replace(generator, batch_stats=stats)
    )
    return _if_finite(StageOneState(student, delegator), state, {"imitation": loss})


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
) -> tuple[StageOneState, Metrics]:
    """D_n and, if ``config.student_explores``, S_n minimise Eq. 8 (Algorithm 1, line 12).

    Metrics besides the terms': ``label_entropy``, of Eq. 6's w, in nats, and ``label_shares`` [K],
    the share of the batch that T_n gives each class.
    """
    student, generator = state.student.network, state.delegator.network
    teacher = parallel.own(teacher, nets.axis_name)
    running = _moments(teacher.batch_stats)

    def loss_fn(params):
        student_params, delegator_params = params
        images, delegator_stats, _ = _train_mode(
            nets.delegator, delegator_params, generator.batch_stats, z
        )
        (features, logits), seen = nets.classifier(teacher.params).apply(
            teacher.variables(), images, False, mutable=[MOMENTS]
        )
        student_features, student_stats, moments = _train_mode(
            nets.features, student_params, student.batch_stats, images
        )
        explored = Explored(
            images=images,
            teacher_features=features,
            teacher_logits=logits,
            student_features=student_features,
            student_logits=_head(teacher, student_features),
            teacher_moments=_moments(seen[MOMENTS]),
            student_moments=_moments(moments),
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
    labels = jnp.mean(losses.pseudo_label(logits), axis=0)
    seen = {
        "label_entropy": -losses.diversity_loss(jax.nn.softmax(logits), nets.axis_name),
        "label_shares": parallel.mean(labels, nets.axis_name),
    }
    new_delegator = _update(state.delegator, grads[1], delegator_stats, adam(), delegator_rate)
    new_student = state.student
    if config.student_explores:
        new_student = _update(state.student, grads[0], student_stats, sgd(config), student_rate)
    new = StageOneState(new_student, new_delegator)
    return _if_finite(new, state, {"explore": total, **values, **seen})


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
) -> tuple[StageOneState, Metrics]:
    """One round of Algorithm 1: the imitate steps, each with a new z, then one explore step."""
    batch = parallel.local_batch(config.batch, nets.axis_name)
    index = parallel.example_index(batch, nets.axis_name)

    def z(i: jax.Array | int) -> jax.Array:
        return latent(jax.random.fold_in(key, i), index, nets.delegator.z_dim)

    def body(state: StageOneState, i: jax.Array) -> tuple[StageOneState, Metrics]:
        return imitate(nets, config, state, teacher, z(i), student_rate)

    state, metrics = jax.lax.scan(body, state, jnp.arange(config.imitate_steps))
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
    )
    skipped = jnp.sum(metrics["skipped"]) + explored["skipped"]
    return state, {**explored, "imitation": jnp.mean(metrics["imitation"]), "skipped": skipped}


def supervised(
    nets: Networks,
    config: Supervised,
    state: Trained,
    images: jax.Array,
    labels: jax.Array,
    rate: jax.Array,
) -> tuple[Trained, Metrics]:
    """T_0 minimises the cross-entropy of the base classes; labels int32 [B]."""
    network = state.network
    classifier = nets.classifier(network.params)

    def loss_fn(params):
        (_, logits), stats, _ = _train_mode(classifier, params, network.batch_stats, images)
        one_hot = jax.nn.one_hot(labels, classifier.num_classes)
        return losses.classification_loss(logits, one_hot), (logits, stats)

    (loss, (logits, stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        network.params
    )
    accuracy = parallel.mean(jnp.mean(logits.argmax(-1) == labels), nets.axis_name)
    metrics = {"classification": loss, "train_accuracy": accuracy}
    return _if_finite(_update(state, grads, stats, sgd(config), rate), state, metrics)


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
) -> tuple[Trained, Metrics]:
    """T_{n+1} minimises Eq. 11 on new images [B, ...] and as many pseudo images of the frozen D_n.

    Without a delegator x^ holds the new images only. Labels are int32 [B] among all classes seen.
    """
    network = state.network
    classifier = nets.classifier(network.params)
    old_outputs = teacher.params["head"]["bias"].shape[0]
    one_hot = jax.nn.one_hot(labels, classifier.num_classes)
    weights = None
    if delegator is not None:
        index = parallel.example_index(images.shape[0], nets.axis_name)
        z = latent(key, index, nets.delegator.z_dim)
        pseudo = _eval_mode(nets.delegator, delegator, z)
        images = jnp.concatenate([pseudo.astype(images.dtype), images])
    target, old_logits = _eval_mode(nets.classifier(teacher.params), teacher, images)
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

    def loss_fn(params):
        (features, logits), stats, _ = _train_mode(classifier, params, network.batch_stats, images)
        classification = losses.classification_loss(logits, one_hot, outputs, weights)
        consolidation = losses.feature_consolidation_loss(target, features)
        total = losses.cil_objective(classification, consolidation, gamma)
        return total, (classification, consolidation, stats)

    (total, (classification, consolidation, stats)), grads = parallel.value_and_grad(
        loss_fn, nets.axis_name
    )(network.params)
    new = _update(state, grads, stats, sgd(config), rate)
    if config.classification == "old_head_fixed":
        new = _keep_head(new, network, is_new)
    parts = {"classification": classification, "consolidation": consolidation}
    return _if_finite(new, state, {"cil": total, **parallel.mean(parts, nets.axis_name)})


def _if_finite(new: Any, old: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    """``new``, or ``old`` if a number in ``new`` or ``metrics`` is not finite."""
    numbers = [
        x.ravel() for x in jax.tree.leaves((new, metrics)) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    finite = jnp.all(jnp.isfinite(jnp.concatenate(numbers)))
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return kept, {**metrics, "skipped": 1.0 - finite.astype(jnp.float32)}


def _keep_head(new: Trained, old: Network, is_new: jax.Array) -> Trained:
    """``new`` with the head's old outputs as they were."""
    head = jax.tree.map(
        lambda a, b: jnp.where(is_new.reshape((1,) * (a.ndim - 1) + (-1,)), a, b),
        new.network.params["head"],
        old.params["head"],
    )
    network = dataclasses.replace(new.network, params={**new.network.params, "head": head})
    return dataclasses.replace(new, network=network)


def _train_mode(
    module: Module, params: Any, batch_stats: Any, x: jax.Array
) -> tuple[Any, Any, Any]:
    """(output, new running moments, moments of this batch) of a module in train mode."""
    out, new = module.apply(
        {"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats", MOMENTS]
    )
    return out, new["batch_stats"], new[MOMENTS]


def _eval_mode(module: Module, network: Network, x: jax.Array) -> Any:
    """Output of a module with its BN in eval mode."""
    return module.apply(network.variables(), x, False)


def _head(teacher: Network, features: jax.Array) -> jax.Array:
    """T_n's head on features [B, F]: logits [B, K]."""
    head = teacher.params["head"]
    return features @ head["kernel"] + head["bias"][None]


def _moments(tree: Any) -> list[losses.Moments]:
    """The (mean, variance) pairs of a batch_stats or moments collection, in key order."""
    return list(moments_by_layer(tree).values())


def _update(
    state: Trained, grads: Any, batch_stats: Any, optimiser: optax.GradientTransformation, rate
) -> Trained:
    updates, opt_state = optimiser.update(grads, state.optimiser, state.network.params)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    params: Any = optax.apply_updates(state.network.params, updates)
    return Trained(Network(params, batch_stats), opt_state)


@compiled(static_argnames=("nets", "config", "terms", "mesh"), donate_argnames="state")
def run_rounds(
    nets: Networks,
    config: StageOne,
    terms: tuple[tuple[str, Term], ...],
    state: StageOneState,
    teacher: Network,
    key: jax.Array,
    steps: jax.Array,
    weights: dict[str, jax.Array],
    student_rates: jax.Array,
    delegator_rates: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[StageOneState, Metrics]:
    """Rounds ``steps`` (int32 [n]) with their rates (float32 [n]); metrics come back as [n]."""
    nets = _on(nets, mesh)

    def per_device(state, teacher, key, weights, inputs):
        def body(state, inputs):
            step, student_rate, delegator_rate = inputs
            step_key = jax.random.fold_in(key, step)
            return round_(
                nets, config, terms, state, teacher, step_key, weights, student_rate, delegator_rate
            )

        return jax.lax.scan(body, state, inputs)

    return parallel.over_devices(
        per_device,
        mesh,
        (state, WHOLE),
        (teacher, WHOLE),
        (key, WHOLE),
        (weights, WHOLE),
        ((steps, student_rates, delegator_rates), WHOLE),
    )


@compiled(static_argnames=("nets", "config", "data", "mesh"), donate_argnames="state")
def run_supervised(
    nets: Networks,
    config: Supervised,
    data: Data,
    state: Trained,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    steps: jax.Array,
    rates: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Trained, Metrics]:
    """Supervised steps ``steps`` (int32 [n]) on uint8 images [n, B, ...], to be augmented."""
    nets = _on(nets, mesh)

    def per_device(state, images, labels, key, inputs):
        def body(state, inputs):
            images, labels, step, rate = inputs
            images = _augmented(nets, data, jax.random.fold_in(key, step), images)
            return supervised(nets, config, state, images, labels, rate)

        return jax.lax.scan(body, state, (images, labels, *inputs))

    return parallel.over_devices(
        per_device,
        mesh,
        (state, WHOLE),
        (images, SPLIT),
        (labels, SPLIT),
        (key, WHOLE),
        ((steps, rates), WHOLE),
    )


@compiled(static_argnames=("nets", "config", "data", "mesh"), donate_argnames="state")
def run_cil(
    nets: Networks,
    config: StageTwo,
    data: Data,
    state: Trained,
    teacher: Network,
    delegator: Network | None,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    steps: jax.Array,
    gamma: jax.Array,
    rates: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Trained, Metrics]:
    """CIL steps ``steps`` (int32 [n]) on uint8 images [n, B, ...], to be augmented."""
    nets = _on(nets, mesh)

    def per_device(state, teacher, delegator, images, labels, key, gamma, inputs):
        def body(state, inputs):
            images, labels, step, rate = inputs
            image_key, z_key = jax.random.split(jax.random.fold_in(key, step))
            images = _augmented(nets, data, image_key, images)
            return cil(nets, config, state, teacher, delegator, images, labels, z_key, gamma, rate)

        return jax.lax.scan(body, state, (images, labels, *inputs))

    return parallel.over_devices(
        per_device,
        mesh,
        (state, WHOLE),
        (teacher, WHOLE),
        (delegator, WHOLE),
        (images, SPLIT),
        (labels, SPLIT),
        (key, WHOLE),
        (gamma, WHOLE),
        ((steps, rates), WHOLE),
    )


def _on(nets: Networks, mesh: Mesh | None) -> Networks:
    return nets if mesh is None else nets.over(parallel.AXIS)


def _augmented(nets: Networks, data: Data, key: jax.Array, images: jax.Array) -> jax.Array:
    return augment(data, key, parallel.example_index(len(images), nets.axis_name), images)


@compiled(static_argnames=("nets", "data", "mesh"))
def predict(
    nets: Networks, data: Data, network: Network, images: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Predicted classes, int32 [n, B], of uint8 images [n, B, H, W, C]."""

    def per_device(network, images):
        prepared = prepare(data, images.reshape(-1, *images.shape[2:]))
        _, logits = _eval_mode(nets.classifier(network.params), network, prepared)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(images.shape[:2])

    found = parallel.over_devices(per_device, mesh, (network, WHOLE), (images, SPLIT), out=SPLIT)
    return parallel.gathered(found, mesh)


@compiled(static_argnames=("nets", "count"))
def pseudo_images(
    nets: Networks, delegator: Network, key: jax.Array, count: int, start: jax.Array | int = 0
) -> jax.Array:
    """D(z) in eval mode of z number ``start`` to ``start + count - 1``.

    Returns:
      float32 [count, S, S, C], in normalised image space.
    """
    z = latent(key, start + jnp.arange(count), nets.delegator.z_dim)
    return _eval_mode(nets.delegator, delegator, z)

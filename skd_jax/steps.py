"""What every method's training steps are made of, and the one place that runs them.

A step is what one device does with its share of the batch: (static, nets, state, kept, batch, key,
rates) to (state, metrics). With ``nets.over(axis_name)`` its means are those of the whole batch.
Randomness comes from a key and an example's place in the whole batch, never from a stream.
:func:`advance` scans any such step over consecutive step numbers, mapped over the devices of a
mesh. What is static there is hashable, and a head's kind and size are read off the params, so a
grown head is the only recompilation.

A step that meets a number that is not finite leaves its state as it was, to the bit, and counts
itself in the metric ``skipped``.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import Module
from jax.sharding import Mesh

from skd_jax import flat, groups, losses, parallel
from skd_jax.compiler import compiled, platform
from skd_jax.config import Data, Model
from skd_jax.data import augment, prepare
from skd_jax.groups import EACH, REPLICAS
from skd_jax.models import (
    MOMENTS,
    Classifier,
    ResNet,
    head_logits,
    is_cosine,
    moments_by_layer,
    resnet,
)
from skd_jax.parallel import SPLIT, WHOLE
from skd_jax.state import Batch, Network, Trained

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The architecture of T_n: its feature extractor, and from that its classifier."""

    features: ResNet

    @property
    def axis_name(self) -> str | None:
        """The mapped axis a batch is split over, or None."""
        return self.features.axis_name

    def over(self, axis_name: str | None) -> "Networks":
        """The same for a batch that is split over a mapped axis."""
        return dataclasses.replace(self, features=self.features.clone(axis_name=axis_name))

    def classifier(self, params: dict[str, Any]) -> Classifier:
        """The classifier whose head is of the kind of ``params`` and has as many outputs."""
        head = "cosine" if is_cosine(params) else "linear"
        return Classifier(self.features, params["head"]["kernel"].shape[-1], head)

    def rounded(self, network: Network) -> Network:
        """A classifier that is not trained, with kernels [h, w, I, O] in the activations' dtype.

        As each convolution would round them, for a loop that would do so over and over. (Not for a
        delegator, whose doubling convolutions round sums of taps.) All else stays float32.
        """
        params = jax.tree.map(
            lambda x: x.astype(self.features.dtype) if x.ndim == 4 else x, network.params
        )
        return dataclasses.replace(network, params=params)


def networks(model: Model) -> Networks:
    """The architecture that a configuration's ``model`` section names."""
    names = ("bn_momentum", "dtype", "precision", "last_relu", "shortcut")
    options = {name: getattr(model, name) for name in names}
    return Networks(resnet(model.family, model.depth, model.width, **options))


class HasDecay(Protocol):
    """Settings of SGD."""

    @property
    def momentum(self) -> float:
        """Of the heavy ball."""
        ...

    @property
    def weight_decay(self) -> float:
        """On every parameter."""
        ...


def sgd(config: HasDecay) -> optax.GradientTransformation:
    """PyTorch's SGD without the rate: weight decay on every parameter, then heavy-ball momentum."""
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))


def dropped(rate: float, epochs: np.ndarray, drop_epochs: Sequence[int]) -> np.ndarray:
    """``rate`` / 10 for each of ``drop_epochs`` that has passed: float32, one an epoch given."""
    drops = np.searchsorted(np.asarray(sorted(drop_epochs)), epochs, side="right")
    return np.asarray(rate / 10.0**drops, np.float32)


def half_cosine(rate: float, numbers: np.ndarray, steps: int) -> np.ndarray:
    """``rate`` (1 + cos(pi n / steps)) / 2 at the steps n in ``numbers`` [C]: float32 [C]."""
    return np.asarray(rate * 0.5 * (1 + np.cos(np.pi * numbers / steps)), np.float32)


def initial(module: nn.Module, key: jax.Array, shape: tuple[int, ...]) -> Network:
    """A module's first variables; not jitted: compiling would take longer than drawing them."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables: Any = module.lazy_init(key, x, False)
    return Network(variables["params"], variables["batch_stats"])


def supervised(
    nets: Networks,
    config: HasDecay,
    state: Trained,
    images: jax.Array,
    labels: jax.Array,
    rate: jax.Array,
    penalty: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    outputs: jax.Array | None = None,
) -> tuple[Trained, Metrics]:
    """The classifier minimises cross-entropy, and what else a method asks for.

    Args:
      nets: the architecture.
      config: of SGD.
      state: the classifier in training.
      images: normalised, [B, S, S, C].
      labels: int32 [B], positions in the head.
      rate: of SGD.
      penalty: (features [B, F], logits [B, K]) to a scalar that is added to the loss.
      outputs: bool [K]: those that the softmax runs over; None is all of them.
    """
    one_hot = jax.nn.one_hot(labels, state.network.params["head"]["kernel"].shape[-1])

    def objective(features: jax.Array, logits: jax.Array) -> tuple[jax.Array, Metrics]:
        loss = losses.classification_loss(logits, one_hot, outputs)
        if penalty is None:
            return loss, {"classification": loss}
        added = penalty(features, logits)
        return loss + added, {
            "loss": loss + added,
            "classification": loss,
            "penalty": added,
        }

    new, metrics = minimise(nets, config, state, images, labels, rate, objective)
    return guard(new, state, metrics)


def minimise(
    nets: Networks,
    config: HasDecay,
    state: Trained,
    images: jax.Array,
    labels: jax.Array,
    rate: jax.Array,
    objective: Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]],
) -> tuple[Trained, Metrics]:
    """The classifier takes a step of SGD down a loss of a method's own; see :func:`gradients`."""
    grads, stats, metrics = gradients(nets, state.network, images, labels, objective)
    return update(state, grads, stats, sgd(config), rate), metrics


def gradients(
    nets: Networks,
    network: Network,
    images: jax.Array,
    labels: jax.Array,
    objective: Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]],
) -> tuple[Any, Any, Metrics]:
    """What a classifier in train mode learns from a batch, of the whole batch.

    Args:
      nets: the architecture.
      network: the classifier.
      images: normalised, [B, S, S, C].
      labels: int32 [B], positions in the head; for the metric ``train_accuracy`` alone.
      objective: (features [B, F], logits [B, K]) to (loss, scalars to log).

    Returns:
      The loss's gradient by the params, the new running moments, and what to log.
    """
    classifier = nets.classifier(network.params)

    def loss_fn(params):
        (features, logits), stats, _ = train_mode(classifier, params, network.batch_stats, images)
        loss, parts = objective(features, logits)
        return loss, (logits, parts, stats)

    (_, (logits, parts, stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(
        network.params
    )
    accuracy = jnp.mean(logits.argmax(-1) == labels)
    metrics = parallel.mean({**parts, "train_accuracy": accuracy}, nets.axis_name)
    return grads, stats, metrics


def guard(new: Any, old: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    """``new``, or ``old`` if a number in ``new`` or ``metrics`` is not finite.

    What of ``new`` is ``old``'s own is left alone: arrays, and on a GPU whole dicts of them, see
    :func:`skd_jax.flat.parts`.
    """
    found, treedef = flat.parts(new)
    before = treedef.flatten_up_to(old)
    changed = [
        n
        for n, both in enumerate(zip(found, before, strict=True))
        if not jax.tree.all(jax.tree.map(operator.is_, *both))
    ]
    joined = {n: flat.joined(found[n]) for n in changed}
    finite = _finite([*jax.tree.leaves([x for x, _ in joined.values()]), *metrics.values()])
    for n, (x, restore) in joined.items():
        y, _ = flat.joined(before[n])
        found[n] = restore(jax.tree.map(functools.partial(jnp.where, finite), x, y))
    return treedef.unflatten(found), {**metrics, "skipped": 1.0 - finite.astype(jnp.float32)}


def _finite(arrays: Sequence[jax.Array]) -> jax.Array:
    """Whether all numbers are finite, bool []."""
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not numbers:
        return jnp.array(True)
    if platform() == "cpu":  # one array, and so one loop
        return jnp.all(jnp.isfinite(jnp.concatenate([x.ravel() for x in numbers])))
    # Nothing is copied, and arrays of one shape are gone over together: kernels are few.
    by_shape: dict[tuple[int, ...], jax.Array] = {}
    for x in numbers:
        by_shape[x.shape] = by_shape.get(x.shape, True) & jnp.isfinite(x)
    return functools.reduce(jnp.logical_and, map(jnp.all, by_shape.values()))


def train_mode(module: Module, params: Any, batch_stats: Any, x: jax.Array) -> tuple[Any, Any, Any]:
    """(output, new running moments, moments of this batch) of a module in train mode."""
    out, new = module.apply(
        {"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats", MOMENTS]
    )
    return out, new["batch_stats"], new[MOMENTS]


def eval_mode(module: Module, network: Network, x: jax.Array) -> Any:
    """Output of a module with its BN in eval mode."""
    return module.apply(network.variables(), x, False)


def head(nets: Networks, classifier: Network, features: jax.Array) -> jax.Array:
    """A classifier's head on features [B, F]: logits [B, K]."""
    return head_logits(classifier.params, features, nets.features.precision)


def moments(tree: Any) -> list[losses.Moments]:
    """The (mean, variance) pairs of a batch_stats or moments collection, in key order."""
    return list(moments_by_layer(tree).values())


def update(
    state: Trained, grads: Any, batch_stats: Any, optimiser: optax.GradientTransformation, rate
) -> Trained:
    """The next state of a network, by its gradients and its new running moments.

    The optimiser has to work element by element, or by norms of all: on a GPU it is given one
    vector [N] in place of the params' tree, see :mod:`skd_jax.flat`.
    """
    params, restore = flat.end_to_end(state.network.params)
    opt_state, restore_opt = flat.end_to_end(state.optimiser)
    updates, opt_state = optimiser.update(flat.end_to_end(grads)[0], opt_state, params)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    params = restore(optax.apply_updates(params, updates))
    return Trained(Network(params, batch_stats), restore_opt(opt_state))


@compiled(
    static_argnames=("step", "static", "nets", "data", "reads", "draws", "mesh"),
    donate_argnames="state",
)
def advance(
    step: Callable,
    static: Hashable,
    nets: Networks,
    data: Data,
    reads: str,
    draws: bool,
    state: Any,
    kept: Any,
    batches: Any,
    key: jax.Array,
    numbers: jax.Array,
    rates: Any,
    count: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Metrics]:
    """Makes the steps ``numbers`` (int32 [n]) of a phase; metrics come back as [n] or [n, K].

    With ``count`` only the first so many are made, and the metrics of the rest are 0: one program
    for calls of any length, so that what a step computes cannot depend on it.

    Of R replicas the state, what is kept, the key and the metrics have a leading axis [R, ...], and
    the batches are [n, R, B, ...]; the rest they share.

    Args:
      step: see ``Phase``, as for static, reads and draws.
      static: what the step depends on that is no array.
      nets: the architectures.
      data: how images become a batch.
      reads: "nothing", "shuffled" or "in_order".
      draws: whether the step draws random numbers beside those of the augmentation.
      state: in training; donated.
      kept: from earlier phases.
      batches: uint8 images [n, B, ...], labels int32 [n, B] and which of them count, bool [n, B];
        None where nothing is read.
      key: of the phase, []; [R] of replicas.
      numbers: of the steps.
      rates: arrays [n, ...].
      count: int32, how many of the steps are made; None is all.
      mesh: the devices.
    """
    nets = nets if mesh is None else nets.over(parallel.batch_axis(mesh))

    def per_device(state, kept, batches, key, inputs, count):
        def body(state, inputs):
            stored, (number, rates) = inputs
            own_key, batch = jax.random.fold_in(key, number), None
            if stored is not None:
                images, labels, valid = stored
                image_key, own_key = own_key, None  # no step draws what the augmentation draws
                if draws:
                    image_key, own_key = jax.random.split(image_key)
                if reads == "shuffled":
                    index = parallel.example_index(len(images), nets.axis_name)
                    images = augment(data, image_key, index, images)
                else:
                    images = prepare(data, images)
                batch = Batch(images, labels, valid)
            new, metrics = step(static, nets, state, kept, batch, own_key, rates)
            return (new, metrics) if "skipped" in metrics else guard(new, state, metrics)

        inputs = batches, inputs
        if count is None:
            return flat.scan(body, state, inputs)
        once = jax.jit(body, inline=True)  # traced for the metrics' shapes, and not again
        _, shapes = jax.eval_shape(once, state, jax.tree.map(lambda x: x[0], inputs))
        made = jax.tree.map(lambda x: jnp.zeros((len(numbers), *x.shape), x.dtype), shapes)
        made = parallel.varying(made, REPLICAS)

        start, restore = flat.end_to_end(state)

        def one(place, carried):
            state, made = carried
            state, metrics = once(restore(state), jax.tree.map(lambda x: x[place], inputs))
            made = jax.tree.map(lambda all_, x: all_.at[place].set(x), made, metrics)
            return flat.end_to_end(state)[0], made

        state, made = jax.lax.fori_loop(0, count, one, (start, made))
        return restore(state), made

    lies = EACH if key.ndim else WHOLE
    if key.ndim:
        per_device = groups.each_replica(per_device, (0, 0, 1, 0, None, None))
    return parallel.over_devices(
        per_device,
        mesh,
        (state, lies),
        (kept, lies),
        (batches, parallel.of_batches(mesh)),
        (key, lies),
        ((numbers, rates), WHOLE),
        (count, WHOLE),
        out=lies,
    )


@compiled(static_argnames=("scores", "static", "nets", "data", "mesh"))
def predict(
    scores: Callable,
    static: Hashable,
    nets: Networks,
    data: Data,
    kept: Any,
    images: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Predicted classes, int32 [n, B], of uint8 images [n, B, H, W, C], by a method's scores."""

    def per_device(kept, images):
        prepared = prepare(data, images.reshape(-1, *images.shape[2:]))
        found = scores(static, nets, kept, prepared)
        return jnp.argmax(found, axis=-1).astype(jnp.int32).reshape(images.shape[:2])

    found = parallel.over_devices(per_device, mesh, (kept, WHOLE), (images, SPLIT), out=SPLIT)
    return parallel.gathered(found, mesh)

"""TPCIL: a graph of exemplars in the feature space, whose edges keep their cosines.

Written from the abstract of the paper, which says that an elastic Hebbian graph, built by
competitive Hebbian learning, models the feature space, and that a topology-preserving loss
penalises changes of its neighbour relations. No code was found. All else here is not verified, and
no published number is claimed to be reproduced.

The vertices are the exemplars; v_i is an exemplar's unit feature by T_n. Competitive Hebbian
learning joins the two vertices nearest to a feature: each vertex has one edge, to the vertex that
is most often second where it is first among the images of its task; to the nearest, where it never
is. With s_ij = cos(v_i, v_j) by T_n and s~_ij by T_{n+1}, over edges that a step draws,

    L = CE(z) - lambda Pearson(s, s~).

After a task the vertices of its classes are inserted and the old ones follow the network, so s is
measured anew. The trainer is LUCIR's, its cosine head, imprinting and old weights, without its two
other terms. The vertices of a step are read as they are, in eval mode. lambda is 1; a later graph
method of the same group has 15, which here drowns the cross-entropy (on digits, seed 1, 23.6 % at
the end in place of 84.6 %). An image is of the class with the largest output.

Kept: 20 exemplars a class, their features, and an edge each.

References:
  Tao, Chang, Hong, Wei, Gong, "Topology-Preserving Class-Incremental Learning", ECCV 2020.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Data
from skd_jax.data import prepare
from skd_jax.errors import UserError
from skd_jax.losses import unit
from skd_jax.methods import exemplars
from skd_jax.methods.exemplars import learn, select
from skd_jax.methods.lucir import KeptImprint, cosine_head, descend, grown, imprint, learned
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import features
from skd_jax.state import Batch, Network, Params, Trained


@dataclasses.dataclass(frozen=True)
class Settings(exemplars.Settings):
    """TPCIL."""

    name: str = "tpcil"
    weight: float = 1.0  # lambda
    edges: int = 32  # that a step draws


@struct.dataclass
class KeptGraph(KeptImprint):
    """T_n, exemplars, and a vertex for each: features [M, F] at length 1, and its edge's end [M].

    None before there are exemplars.
    """

    vertices: jax.Array | None = None
    ends: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a step depends on that is no array."""

    settings: Settings
    data: Data


def topology_loss(old: jax.Array, new: jax.Array) -> jax.Array:
    """Minus the Pearson correlation of two sets of similarities, [E] each.

    0, with gradient 0, where it is not defined: of one edge, or where all of a set are equal.
    """
    a, b = old - jnp.mean(old), new - jnp.mean(new)
    squares = jnp.sum(a**2) * jnp.sum(b**2)
    defined = squares > 1e-12
    root = jnp.sqrt(jnp.where(defined, squares, 1.0))
    return jnp.where(defined, -jnp.sum(a * b) / root, 0.0)


def hebbian(vertices: jax.Array, found: jax.Array) -> jax.Array:
    """The other end of each vertex's edge, int32 [M].

    Args:
      vertices: at length 1, [M, F], two or more.
      found: unit features that compete for them, [n, F]; one that is 0 does not.
    """
    number = len(vertices)
    _, pairs = jax.lax.top_k(jnp.matmul(found, vertices.T, precision="highest"), 2)
    competes = jnp.any(found != 0, axis=1).astype(jnp.float32)
    votes = jnp.zeros((number, number)).at[pairs[:, 0], pairs[:, 1]].add(competes)
    cosines = jnp.matmul(vertices, vertices.T, precision="highest")
    cosines = jnp.where(jnp.eye(number, dtype=bool), -jnp.inf, cosines)
    voted = jnp.sum(votes, axis=1) > 0
    ends = jnp.where(voted, jnp.argmax(votes, axis=1), jnp.argmax(cosines, axis=1))
    return ends.astype(jnp.int32)


def with_graph(kept: KeptGraph, found: jax.Array, own: jax.Array) -> KeptGraph:
    """Inserts vertices for new exemplars; the old ones keep their edges and follow the network."""
    vertices = unit(found)
    ends = hebbian(vertices, unit(own))
    if kept.ends is not None:
        ends = ends.at[: len(kept.ends)].set(kept.ends)
    return dataclasses.replace(kept, vertices=vertices, ends=ends)


def step(
    static: _Static,
    nets: steps.Networks,
    state: Trained,
    kept: KeptGraph,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on new images, exemplars, and edges of the graph, the same on every device."""
    assert kept.exemplars is not None and kept.vertices is not None and kept.ends is not None
    settings = static.settings
    one = jax.random.randint(key, (settings.edges,), 0, len(kept.ends))
    both = jnp.concatenate([one, kept.ends[one]])
    images = parallel.varying(prepare(static.data, kept.exemplars.images[both]), nets.axis_name)

    def similarities(found: jax.Array) -> jax.Array:
        return jnp.sum(found[: settings.edges] * found[settings.edges :], axis=-1)

    before = similarities(kept.vertices[both])

    def terms(params: Params, found: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        del found, z
        now = features(nets, Network(params, state.network.batch_stats), images)
        return {"topology": settings.weight * topology_loss(before, similarities(unit(now)))}

    return descend(settings, nets, state, kept, batch, rates, terms)


def phases(setting: Setting, task: int) -> list[Phase]:
    """Imprinting and learning, but for the base, and the choice of exemplars with their graph."""
    if setting.of_classes and exemplars.count(setting, 1) < 2:  # which only a run's setting has
        raise UserError(
            "config.data: the base has one image, and tpcil's graph two vertices or more; give "
            "data with more images of its classes"
        )
    chosen = select(setting, task, leave=with_graph)
    if not task:
        return [chosen]
    static = _Static(setting.config.method, setting.config.data)
    more = {"grown": grown, "finish": learned, "draws": True, "ends_task": False}
    return [imprint(setting, task), learn(setting, task, step, static, **more), chosen]


METHOD = Method(
    "tpcil",
    Settings,
    phases,
    kept=KeptGraph,
    check=cosine_head(exemplars.limits(("edges",), ("exemplars",), not_negative=("weight",))),
    family="exemplars",
    keeps="images and their features",
)

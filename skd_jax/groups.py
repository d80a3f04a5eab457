"""Replicas: runs of other seeds that are trained at once, on groups of devices.

Their arrays are one, with a leading axis [R, ...]. The devices lie in groups, each of which has
some of the replicas and splits their batches among its devices (:mod:`skd_jax.parallel`): nothing
passes from one group to another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from skd_jax import parallel
from skd_jax.compiler import platform
from skd_jax.parallel import AXIS

REPLICAS = "replicas"
EACH = P(REPLICAS)  # [R, ...], each on its group's devices


def in_groups(mesh: Mesh | None, replicas: int) -> Mesh | None:
    """The devices of a mesh in groups that train some of the replicas each.

    There are as many groups as divide the devices and the replicas; fewer, if a process's devices
    would lie in parts of several. A group of one device has no axis of the batch, and so no
    collective.

    Args:
      mesh: the devices, in one row.
      replicas: R; 1 leaves the mesh as it is.
    """
    if mesh is None or replicas == 1:
        return mesh
    own = mesh.size // jax.process_count()

    def fits(groups: int) -> bool:
        size, rest = divmod(mesh.size, groups)
        return rest == replicas % groups == 0 and 0 in (size % own, own % size)

    groups = max(filter(fits, range(1, min(replicas, mesh.size) + 1)))
    if groups == mesh.size:
        return Mesh(mesh.devices, (REPLICAS,))
    return Mesh(mesh.devices.reshape(groups, -1), (REPLICAS, AXIS))


def each_replica(step: Callable, axes: tuple[int | None, ...]) -> Callable:
    """Per-device code for some replicas at once, from that for one.

    An accelerator makes their steps side by side, which fills it where one batch does not. A CPU
    has nothing to fill, and makes one after the other: to the bit what each is alone.

    Args:
      step: for one replica.
      axes: the axis of the replicas in each argument, None where it has none; the results have it
        first.
    """

    def of_all(*args: Any) -> Any:
        pairs = list(zip(args, axes, strict=True))
        first = [  # the axis of the replicas, in what has one
            None if axis is None else jax.tree.map(lambda x, a=axis: jnp.moveaxis(x, a, 0), x)
            for x, axis in pairs
        ]

        def of_one(own: list) -> Any:
            given = zip(own, pairs, strict=True)
            return step(*(x if axis is None else mine for mine, (x, axis) in given))

        if len(jax.tree.leaves(first)[0]) == 1:  # a convolution by one kernel stays one
            found = of_one(jax.tree.map(lambda x: x[0], first))
            return jax.tree.map(lambda x: x[None], found)
        return jax.lax.map(of_one, first) if platform() == "cpu" else jax.vmap(of_one)(first)

    return of_all


def distribute(mesh: Mesh | None, trees: Sequence[Any]) -> Any:
    """The replicas' pytrees as one, [R, ...], on the device or on each one's group of them."""
    if mesh is None:
        return jax.tree.map(lambda *each: jnp.stack(each), *trees)
    sharding = NamedSharding(mesh, EACH)

    def place(*each: Any) -> jax.Array:
        if isinstance(each[0], jax.Array) and jnp.issubdtype(each[0].dtype, jax.dtypes.prng_key):
            placed = place(*map(jax.random.key_data, each))
            return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(each[0]))
        whole = np.stack([np.asarray(x) for x in each])
        return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i].copy())

    return jax.tree.map(place, *trees)


def collect(mesh: Mesh | None, tree: Any, replicas: int) -> list[Any]:
    """Each replica's part of a pytree [R, ...], on one device, for work outside the mesh."""
    if mesh is not None:
        tree = jax.device_get(parallel.reachable(tree))
    return [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), tree) for i in range(replicas)]

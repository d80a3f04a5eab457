"""Data parallelism: a step is per-device code with a named axis, mapped here over a mesh.

Every device holds all weights and a slice of the batch. Means over the batch are means over the
named axis too, so a step computes on any number of devices, of one host or of many, what it
computes on one: batch moments, losses and gradients are those of the whole batch, and random
numbers follow an example's place in the whole batch.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from skd_jax.errors import UserError

T = TypeVar("T")
AXIS = "batch"
WHOLE, SPLIT = P(), P(None, AXIS)  # on every device; [steps, B, ...] with B split over them


def join_processes(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int = 100
) -> None:
    """Makes the devices of all processes known to each; before anything else is done with JAX.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which one this is, from 0.
      timeout: seconds without a sign of life after which a process counts as dead, and the others
        end.

    The first three are None where JAX can tell: TPU pods, Slurm, Kubernetes, Open MPI.

    Raises:
      UserError: the processes did not come together.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=timeout
        )
    except (ValueError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"--distributed: {reason}; give --coordinator=HOST:PORT, --processes=N and --process=I "
            "with I from 0 to N - 1, the same but for I in every process"
        ) from error


def in_every_process(work: Callable[[], T], fingerprint: Callable[[T], str] = lambda _: "") -> T:
    """Does ``work`` in every process; where it fails in one, none goes on.

    Args:
      work: what each does by itself; it must not wait for another.
      fingerprint: of its result, what has to be the same in all.

    Returns:
      What ``work`` returned here.

    Raises:
      UserError: another process failed, or found something else.
      Exception: what ``work`` raised here.
    """
    result, error, found = None, None, ""
    try:
        result = work()
        found = fingerprint(result)
    except Exception as problem:
        error = problem
    check_processes(found, error)
    return cast(T, result)


def all_agree(yes: bool) -> bool:
    """Whether every process says yes; every process asks."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def slowest(seconds: float) -> float:
    """The longest of what every process has measured; every process asks."""
    if jax.process_count() == 1:
        return seconds
    return float(np.max(multihost_utils.process_allgather(np.float32(seconds))))


def check_processes(fingerprint: str, error: Exception | None) -> None:
    """Checks that all processes are about to do the same; every process calls this.

    Args:
      fingerprint: what has to be the same in all.
      error: what stops this process, if anything does.

    Raises:
      UserError: ``error``, or that another process cannot go on or is about to do something else.
    """
    if jax.process_count() > 1:
        digest = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:4], "big")
        mine = np.array([digest, error is not None], np.uint32)
        everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2)
        failed = np.flatnonzero(everyone[:, 1])
        if error is None and len(failed):
            error = UserError(f"process {failed[0]} cannot go on; its own message says why")
        differs = np.flatnonzero(everyone[:, 0] != everyone[0, 0])
        if error is None and len(differs):
            error = UserError(
                f"process {differs[0]} differs from process 0 in its config (run included), its "
                "images or the newest checkpoint it sees; start all with the same flags, data and "
                "shared workdir"
            )
    if error is not None:
        if isinstance(error, UserError):
            error.agreed = True
        raise error


def is_first_process() -> bool:
    """Whether this process is the one that writes reports."""
    return jax.process_index() == 0


def make_mesh(count: int = 0) -> Mesh | None:
    """The devices to compute on, in one row, or None for a single one.

    Args:
      count: the number of devices; 0 is all, those of other processes included.

    Raises:
      UserError: there are not that many, or processes would be left without one.
    """
    devices = jax.devices()
    if count > len(devices):
        raise UserError(f"config.run.devices: {count}, but there are {len(devices)}; give 0 (all)")
    if 0 < count < len(devices) and jax.process_count() > 1:
        raise UserError(f"config.run.devices: {count} of {len(devices)}; several processes need 0")
    # A process's devices side by side, whatever the topology, so that its examples are too.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    devices = devices[: count or len(devices)]
    return Mesh(np.array(devices), (AXIS,)) if len(devices) > 1 else None


def over_devices(step: Callable, mesh: Mesh | None, *args: tuple[Any, P], out: Any = WHOLE) -> Any:
    """Calls ``step`` on every device of the mesh, or as it is without one.

    Args:
      step: per-device code, with collectives over ``AXIS`` where there is a mesh.
      mesh: the devices.
      *args: pairs of an argument of the step and how it lies on the devices.
      out: how the result lies. A result that is said to be the same everywhere, but for a mean that
        was left out, does not trace.
    """
    values, specs = zip(*args, strict=True)
    if mesh is None:
        return step(*values)
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out)(*values)


def mean(x: Any, axis_name: str | None) -> Any:
    """Mean of each leaf over the named axis, if there is one."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def total(x: Any, axis_name: str | None) -> Any:
    """Sum of each leaf over the named axis, if there is one."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def largest(x: Any, axis_name: str | None) -> Any:
    """Largest of each number of each leaf over the named axis, if there is one."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def together(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The whole batch [B, ...] on every device, from each one's share [B / devices, ...]."""
    if axis_name is None:
        return x
    whole = jnp.zeros((jax.lax.axis_size(axis_name) * len(x), *x.shape[1:]), x.dtype)
    return jax.lax.psum(whole.at[example_index(len(x), axis_name)].set(x), axis_name)


def example_index(batch: int, axis_name: str | None) -> jax.Array:
    """Places in the whole batch, int32 [batch], of this device's ``batch`` examples."""
    index = jnp.arange(batch)
    return index if axis_name is None else index + batch * jax.lax.axis_index(axis_name)


def local_batch(batch: int, axis_name: str | None) -> int:
    """This device's share of a batch."""
    return batch if axis_name is None else batch // jax.lax.axis_size(axis_name)


def varying(tree: Any, axis_name: str | None) -> Any:
    """The same values, but each device's own: what ``jax.shard_map`` differentiates by singly.

    Under ``jax.vmap``, which has no mesh, they are so anyway.
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def cast(x: jax.Array) -> jax.Array:
        if axis_name in jax.typeof(x).manual_axis_type.varying:
            return x
        return jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def value_and_grad(loss: Callable, axis_name: str | None) -> Callable:
    """``jax.value_and_grad(loss, has_aux=True)`` of the mean loss over the named axis.

    Args:
      loss: params to (this device's loss, anything else).
      axis_name: mapped axis, or None.
    """
    if axis_name is None:
        return jax.value_and_grad(loss, has_aux=True)

    def own(params: Any) -> tuple[jax.Array, Any]:
        value, aux = loss(params)
        return varying(value, axis_name), aux

    differentiated = jax.value_and_grad(own, has_aux=True)

    def over_axis(params: Any) -> Any:
        # shard_map sums the gradient of a weight that is the same on every device by itself, and a
        # mean of sums is n times too much. So each device differentiates by a weight of its own.
        # Likewise the loss: one that is a mean over the axis already counts as this device's own.
        params = varying(params, axis_name)
        (value, aux), grads = differentiated(params)
        return (jax.lax.pmean(value, axis_name), aux), jax.lax.pmean(grads, axis_name)

    return over_axis


def check_divisible(sizes: dict[str, int], mesh: Mesh | None) -> None:
    """Checks that each batch can be split evenly.

    Args:
      sizes: batch sizes by config field.
      mesh: the devices.

    Raises:
      UserError: the field, the number of devices, and sizes that would do.
    """
    count = batch_devices(mesh)
    for field, size in sizes.items():
        if size % count:
            below, above = size // count * count, round_up(size, mesh)
            near = f"{below} or {above}" if below else str(above)
            raise UserError(
                f"config.{field}: {size} examples do not divide among {count} devices; give "
                f"{near}, or fewer devices with config.run.devices"
            )


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """A pytree on every device of the mesh, or on the one; each process gives the same values."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, WHOLE)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                place(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        # A copy on this process's devices, whatever is done with the original.
        return jax.make_array_from_process_local_data(sharding, np.array(x), np.shape(x))

    return jax.tree.map(place, tree)


def to_host(mesh: Mesh | None, tree: Any) -> Any:
    """A replicated pytree on one device, for work outside the mesh; as it is without one."""
    return tree if mesh is None else jax.tree.map(jnp.asarray, jax.device_get(tree))


def reachable(tree: Any) -> Any:
    """The same, whole in every process; every process asks."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def local_part(mesh: Mesh | None, sizes: Sequence[int]) -> tuple[slice, ...]:
    """Which of a batch's examples lie on this process's devices.

    Args:
      mesh: the devices.
      sizes: (B,), or (R, B) of R replicas, where the mesh has groups.

    Returns:
      A slice for each size.
    """
    if mesh is None:
        return tuple(slice(0, size) for size in sizes)
    places = NamedSharding(mesh, P(*mesh.axis_names)).addressable_devices_indices_map(tuple(sizes))
    indices = [index for index in places.values() if index]
    found = []
    for axis, size in enumerate(sizes):
        spans = [index[axis].indices(size) for index in indices]
        found.append(slice(min(span[0] for span in spans), max(span[1] for span in spans)))
    return tuple(found)


def split(mesh: Mesh | None, array: np.ndarray, sizes: Sequence[int]) -> np.ndarray | jax.Array:
    """Lays batches [steps, B, ...] or [steps, R, B, ...] on the devices, split over them.

    Args:
      mesh: the devices.
      array: this process's part of the batches, see :func:`local_part`.
      sizes: (B,) or (R, B).
    """
    if mesh is None:
        return array
    whole = (array.shape[0], *sizes, *array.shape[1 + len(sizes) :])
    sharding = NamedSharding(mesh, of_batches(mesh))
    return jax.make_array_from_process_local_data(sharding, array, whole)


def gathered(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """All of an array on every device, so that every process can read it; under ``jax.jit``."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, WHOLE))


def round_up(batch: int, mesh: Mesh | None) -> int:
    """The least number of examples, not below ``batch``, that divides among the devices."""
    count = batch_devices(mesh)
    return math.ceil(batch / count) * count


def batch_devices(mesh: Mesh | None) -> int:
    """How many devices a batch is split over."""
    return 1 if mesh is None else mesh.shape.get(AXIS, 1)


def batch_axis(mesh: Mesh | None) -> str | None:
    """The axis of a mesh that a batch is split over, or None."""
    return AXIS if mesh is not None and AXIS in mesh.axis_names else None


def of_batches(mesh: Mesh | None) -> P:
    """How batches lie on a mesh: [steps, B, ...], or [steps, R, B, ...] of R replicas."""
    return SPLIT if mesh is None else P(None, *mesh.axis_names)

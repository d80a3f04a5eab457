"""Small arrays end to end, where each of them would cost a kernel of its own.

A network is hundreds of arrays of a few KiB. On a GPU a kernel that goes over one of them costs
little but its start, and fused kernels read a slice of a vector where it lies: so parameters,
running moments and an optimiser's moments go from step to step as one vector each. Elsewhere arrays
stay as they are: on a CPU kernels cost nothing to start, on a TPU a slice of a vector is a copy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from skd_jax.compiler import platform


def parts(tree: Any) -> tuple[list[Any], Any]:
    """What :func:`joined` takes one by one, and the tree of it: dicts on a GPU, else arrays.

    So a state is best a dataclass of dicts, one for what changes together.
    """
    is_leaf = (lambda node: isinstance(node, dict)) if platform() == "gpu" else None
    return jax.tree.flatten(tree, is_leaf)


def joined(part: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A dict of float32 arrays as one vector, and the way back; anything else as it is."""
    arrays = jax.tree.leaves(part)
    if len(arrays) < 2 or any(x.dtype != jnp.float32 for x in arrays):
        return part, lambda same: same
    return ravel_pytree(part)


def end_to_end(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree with each of its :func:`parts` joined, and the way back."""
    found, treedef = parts(tree)
    pairs = [joined(part) for part in found]

    def restore(flat: Any) -> Any:
        ways = (way for _, way in pairs)
        return treedef.unflatten(
            [way(x) for way, x in zip(ways, treedef.flatten_up_to(flat), strict=True)]
        )

    return treedef.unflatten([x for x, _ in pairs]), restore


def scan(body: Callable, init: Any, xs: Any) -> tuple[Any, Any]:
    """``jax.lax.scan`` whose carry goes end to end from step to step."""
    start, restore = end_to_end(init)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, out = body(restore(carry), x)
        return end_to_end(carry)[0], out

    carry, out = jax.lax.scan(step, start, xs)
    return restore(carry), out

"""How steps are compiled: XLA's options, and where compiled programs are kept."""

import contextlib
import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import jax

# XLA's CPU backend hands convolutions to a library (YNNPACK) that takes twice as long as Eigen.
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


CACHE_BYTES = 4 * 2**30  # of compiled programs in the user's cache folder
_made: "weakref.WeakSet[Compiled]" = weakref.WeakSet()


@functools.cache
def options() -> dict[str, str]:
    """XLA's options for the default backend; those that this version does not know are left out."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_EIGEN_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _EIGEN_CONVOLUTIONS


class Compiled:
    """``jax.jit`` of a function with :func:`options`, which are asked for at the first call.

    Not when the function is defined: asking starts the backend, which has to wait until several
    processes have come together.
    """

    def __init__(self, function: Callable, **arguments: Any):
        """Takes the arguments of ``jax.jit``."""
        self._function = function
        self._arguments = arguments
        functools.update_wrapper(self, function)
        _made.add(self)

    @functools.cached_property
    def jitted(self) -> Any:
        """What ``jax.jit`` returns."""
        return jax.jit(self._function, compiler_options=options(), **self._arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled function."""
        return self.jitted(*args, **kwargs)


def compiled(**arguments: Any) -> Callable[[Callable], Compiled]:
    """Decorator: :class:`Compiled` with these arguments of ``jax.jit``."""
    return lambda function: Compiled(function, **arguments)


def drop_programs() -> None:
    """Drops the programs of all :class:`Compiled` functions from memory.

    A grown head needs others. Those of earlier heads are never called again, and one takes tens of
    MiB.
    """
    for function in _made:
        if "jitted" in vars(function):
            function.jitted.clear_cache()


def keep_compiled() -> None:
    """Keeps what XLA compiles in the user's cache folder, so that a second start compiles nothing.

    Of more than :data:`CACHE_BYTES` there, the programs that were not read for longest are removed.
    ``JAX_COMPILATION_CACHE_DIR`` names another folder, which is left to its owner;
    ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps nothing.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "skd_jax")
        bound(folder, CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def bound(folder: str, size: int) -> None:
    """Removes compiled programs from a folder, those not read for longest first, down to a size.

    JAX's own bound needs another package, and locks the folder at every look.
    """
    with contextlib.suppress(OSError):  # another process may be doing the same
        files = [entry for entry in os.scandir(folder) if entry.name.endswith("-cache")]
        found = [(max(x.stat().st_atime, x.stat().st_mtime), x.stat().st_size, x) for x in files]
        left = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, file in sorted(found, key=lambda item: item[:2]):
            if left <= size:
                break
            os.remove(file)
            left -= bytes_

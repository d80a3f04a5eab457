"""How steps are compiled: XLA's options, and where compiled programs are kept."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# XLA's CPU backend hands convolutions to a library (YNNPACK) that takes twice as long as Eigen.
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


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


def keep_compiled() -> None:
    """Keeps what XLA compiles in the user's cache folder, so that a second start compiles nothing.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps
    nothing.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "skd_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

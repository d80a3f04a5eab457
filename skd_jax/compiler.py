"""How steps are compiled: for which platform, XLA's options, where compiled programs are kept."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

# XLA's CPU backend hands convolutions to a library (YNNPACK) that takes twice as long as Eigen.
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

# Part of the keys of JAX's caches, so that no trace for one platform serves another.
_described = jax.make_user_context(None)


def platform() -> str:
    """What steps are compiled for: "cpu", "gpu" or "tpu"; unless said otherwise, what is here.

    Asking starts the backend.
    """
    named = _described.value or jax.default_backend()
    return "gpu" if named in ("cuda", "rocm") else named


def compiling_for(name: str) -> AbstractContextManager[None]:
    """Within it, what this thread traces and lowers is for devices that need not be here.

    For ahead-of-time compilation of :attr:`Compiled.jitted` and other jitted functions. What is
    lowered has to be told its devices, too, by the shardings of its arguments or its mesh.

    Args:
      name: of their platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
    """
    return _described(name)


def options() -> dict[str, str]:
    """XLA's options for :func:`platform`; those that this version does not know are left out.

    None but for a CPU. What a GPU's loop of small kernels could ask for is there already or changes
    nothing in the compiled programs (jaxlib 0.10.2): kernels between convolutions are in command
    buffers, cuDNN's convolutions cannot be; a step's gradients are one all-reduce; those of batch
    normalisation have nothing beside them that the latency-hiding scheduler could move.
    """
    return _cpu_options() if platform() == "cpu" else {}


@functools.cache
def _cpu_options() -> dict[str, str]:
    if jax.default_backend() != "cpu":  # nobody to ask which it knows; a lowered text needs none
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
        self._jitted: dict[str, Any] = {}  # by platform
        functools.update_wrapper(self, function)

    @property
    def jitted(self) -> Any:
        """What ``jax.jit`` returns for :func:`platform`."""
        named = platform()
        if named not in self._jitted:
            self._jitted[named] = jax.jit(
                self._function, compiler_options=options(), **self._arguments
            )
        return self._jitted[named]

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

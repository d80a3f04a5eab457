"""How steps are compiled: for which platform, XLA's options, where compiled programs are kept."""

import contextlib
import ctypes
import functools
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer

CACHE_BYTES = 4 * 2**30  # of compiled programs in the user's cache folder

# XLA's CPU backend hands convolutions to a library (YNNPACK) that takes twice as long as Eigen.
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

# Part of the keys of JAX's caches, so that no trace for one platform serves another.
_described = jax.make_user_context(None)
_made: "weakref.WeakSet[Compiled]" = weakref.WeakSet()


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

    def __init__(self, function: Callable, stays: bool = False, **arguments: Any):
        """Takes the arguments of ``jax.jit``.

        Args:
          function: that is compiled.
          stays: its programs do, when a task is over; those of a model that is in use elsewhere.
          arguments: of ``jax.jit``.
        """
        self._function = function
        self._arguments = arguments
        self._jitted: dict[str, Any] = {}  # by platform
        functools.update_wrapper(self, function)
        if not stays:
            _made.add(self)

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
        """Calls the compiled function; with traced arguments, it is part of another program.

        JAX takes options for whole programs alone.
        """
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self._function(*args, **kwargs)
        return self.jitted(*args, **kwargs)

    def drop(self) -> None:
        """Drops its programs from memory; the next call compiles, or reads the cache folder."""
        for jitted in self._jitted.values():
            jitted.clear_cache()


def compiled(stays: bool = False, **arguments: Any) -> Callable[[Callable], Compiled]:
    """Decorator: :class:`Compiled` with these arguments."""
    return lambda function: Compiled(function, stays, **arguments)


def drop_programs(all_of_them: bool = False) -> None:
    """Drops the programs of all :class:`Compiled` functions of training from memory.

    A grown head needs others. Those of earlier heads are never called again, and one takes tens of
    MiB. What compiling freed goes back to the system, too: glibc keeps it, scattered over the heaps
    of XLA's threads, and takes more for the next.

    Args:
      all_of_them: also all others of this process: JAX keeps what it has traced and compiled for
        single operations on a head's arrays, some MiB a task, and can drop that only with all
        else. What is used again is compiled, or read from the cache folder, once more.
    """
    for function in _made:
        function.drop()
    if all_of_them:
        jax.clear_caches()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
    found = []
    for file in Path(folder).glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            status = file.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    left = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, file in sorted(found, key=lambda item: item[:2]):
        if left <= size:
            break
        with contextlib.suppress(OSError):  # somebody else's, perhaps
            file.unlink(missing_ok=True)
            left -= bytes_

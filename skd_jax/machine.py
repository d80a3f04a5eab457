"""What the bits of a result depend on beside the configuration and the images.

Floating-point sums depend on their order. XLA chooses it by the CPU's instructions and cores, by
the kind and number of devices, by the versions of itself and of a GPU's libraries, and by its
flags; this package and Flax choose what XLA is given; and libraries decode and scale images each in
their own way. None of it makes results better or worse.
"""

import contextlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL

from skd_jax import __version__
from skd_jax.errors import printable

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "NPROC")  # and JAX's, but for
_TOLD_ELSEWHERE = (  # where it computes, which is above; what it keeps; what it says
    *("JAX_PLATFORM", "JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR", "JAX_CUDA_VISIBLE_DEVICES"),
    *("JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"),
    *("JAX_LOG", "JAX_TRACEBACK", "JAX_DUMP", "JAX_EXPLAIN", "JAX_DEBUG", "JAX_RAISE_PERSISTENT"),
)
_SHOWN = 5  # differences on one line
_GPU_LIBRARIES = (  # what pip brings, for CUDA 12 and 13; the system's own are no packages
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("nvidia-cublas-cu12", "nvidia-cublas"),
)
_INSTRUCTIONS = ("avx", "fma", "amx", "sve", "asimd")  # flags of a CPU that XLA asks for


def cpu_cores() -> int:
    """The cores that this process may use, which are those that XLA uses."""
    may_use = getattr(os, "sched_getaffinity", None)
    return len(may_use(0)) if may_use else os.cpu_count() or 1


def machine(devices: int, steps_per_call: int) -> dict[str, Any]:
    """All that a run's bits depend on here, by names for people; plain JSON.

    Args:
      devices: how many the run computes on.
      steps_per_call: how many steps one compiled call makes.
    """
    return {
        "devices": devices,
        "device kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "CPU cores": cpu_cores(),
        "CPU": _cpu(),
        "steps a call": steps_per_call,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "optax": version("optax"),
        "numpy": np.__version__,
        "Pillow": PIL.__version__,
        "skd_jax": __version__,
        **_libraries(),
        **{name: value for name, value in sorted(os.environ.items()) if value and _is_flag(name)},
    }


def changes(before: Any, now: Mapping[str, Any]) -> str | None:
    """What differs between two machines, on one line for people; None if nothing does.

    Args:
      before: what :func:`machine` gave when a checkpoint was saved; anything else, as of a version
        that saved nothing of the kind, tells nothing.
      now: what it gives now.
    """
    if not isinstance(before, Mapping):
        return None
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    words = [
        f"{_short(name)} {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in names[:_SHOWN]
    ]
    more = [f"{len(names) - _SHOWN} more differ"] if names[_SHOWN:] else []
    return "; ".join(words + more) or None


def _is_flag(name: str) -> bool:
    return name in _FLAGS or (name.startswith("JAX_") and not name.startswith(_TOLD_ELSEWHERE))


def _libraries() -> dict[str, str]:
    """Versions of what a GPU computes by, by name; none on a CPU."""
    if jax.default_backend() != "gpu":
        return {}
    found = {"GPU platform": " ".join(jax.devices()[0].client.platform_version.split())}
    for distribution in _GPU_LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[distribution] = version(distribution)
    return found


def _short(value: Any) -> str:
    text = printable("none" if value is None else str(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cpu() -> str:
    """The kind of CPU, with what of its instructions matters; a virtual machine may hide some."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    said = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = (said.get("flags") or said.get("Features") or "").split()
    kept = sorted(flag for flag in flags if flag.startswith(_INSTRUCTIONS))
    return " ".join((said.get("model name", platform.machine()), *kept))

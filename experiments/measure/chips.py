"""Chips that need not be here: their public numbers, and how XLA is told to compile for them."""

import dataclasses
import importlib.metadata
import os
from math import prod
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from skd_jax.errors import UserError

# For libtpu, where there is no TPU: it asks nobody, and several processes may compile.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",  # not the cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's peaks.

    Attributes:
      bfloat16: 10^12 flops a second.
      float32: the same for float32 of precision "highest": on a TPU six passes in bfloat16.
      bandwidth: 10^9 bytes a second of its memory.
      memory: 2^30 bytes.
      clock: 10^9 cycles a second: the peak over what the MXUs do in a cycle, 2 flops for each of
        128 x 128 places, in 4 MXUs (v5e) or 8 (v4, v5p); None where that is not public.
      source: of the peaks.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    clock: float | None
    source: str


def _tpu(peak: float, bandwidth: float, memory: float, clock: float | None, page: str) -> Chip:
    source = f"https://docs.cloud.google.com/tpu/docs/{page}"
    return Chip(peak, peak / 6, bandwidth, memory, clock, source)


CHIPS = {
    "v4": _tpu(275, 1200, 32, 1.05, "v4"),
    "v5e": _tpu(197, 819, 16, 1.5, "v5e"),
    "v5p": _tpu(459, 2765, 95, 1.75, "v5p"),
    "v6e": _tpu(918, 1600, 32, None, "v6e"),
    "h100": Chip(989, 67, 3350, 80, None, "NVIDIA H100 data sheet, SXM, without sparsity"),
}
_MOST = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "h100": 1}  # dimensions of a topology


def chip_of(topology: str) -> Chip:
    """The chip of "v5e:4x4"."""
    return CHIPS[topology.partition(":")[0]]


def shape_of(topology: str) -> tuple[int, ...]:
    """(4, 4) of "v5e:4x4", one of "v5e:1".

    Raises:
      UserError: it is none of ours.
    """
    kind, _, size = topology.partition(":")
    sizes = size.split("x")
    if kind not in CHIPS or not all(part.isdigit() and int(part) for part in sizes):
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={topology}: give CHIP:AxB, such as v5e:4x4; chips are {known}")
    if len(sizes) > _MOST[kind]:
        raise UserError(f"--topology={topology}: {kind} has up to {_MOST[kind]} dimensions")
    return tuple(map(int, sizes))


def devices(topology: str) -> list[Any]:
    """The devices of a described topology, one a chip: "v5e:4x4", "v4:2x2x1", "h100:8".

    Raises:
      UserError: the name is none, or what compiles for it is not installed.
    """
    dims, kind = shape_of(topology), topology.partition(":")[0]
    try:
        if kind == "h100":
            target = Path(__file__).with_name("h100_sxm.txtpb").read_text()
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=kind,
                target_config=target,
                topology=f"1x1x{prod(dims)}",
            )
        else:
            for name, value in _ALONE.items():
                os.environ.setdefault(name, value)
            dims += (1,) * (_MOST[kind] - len(dims))
            options = {}
            if prod(dims) < 4:  # a part of a host, which has 2x2 otherwise
                options["chips_per_host_bounds"] = dims + (1,) * (3 - len(dims))
            if kind == "v4":
                options["chip_config_name"] = "megacore"  # one device a chip, as JAX has them
            size = "x".join(map(str, dims))
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{size}", **options
            )
    except (RuntimeError, NotImplementedError) as error:
        extra = "cuda-compile" if kind == "h100" else "tpu-compile"
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0]}; "
            f"is it installed? pip install -e '.[{extra}]'"
        ) from error
    return list(found.devices)


def compiler_versions() -> dict[str, str]:
    """Of what compiles."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

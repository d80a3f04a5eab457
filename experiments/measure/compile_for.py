r"""Compiles a run's real steps for chips that are not here, and reads what XLA made of them.

    pip install -e '.[tpu-compile]'     # or, in a venv of its own (6 GB), '.[cuda-compile]'
    python -m experiments.measure.compile_for --topology=v5e:4x4 --config=configs/cifar100.py \
        --dtype=bfloat16 --step=round --out=experiments/results/compile/after
    python -m experiments.measure.compile_for --table     # what lies in the results, before | after

Topologies are v4, v5e, v5p and v6e of any size ("v5e:1", "v5e:4x4", "v5p:2x2x2"), and H100s in one
host ("h100:1", "h100:8"). Nothing runs: these are readings, not measurements. All numbers are of
one chip and one step; cycles are libtpu's own estimate of what computes. A round of CIFAR-100 takes
libtpu several CPU minutes; ``--fast``, its least effort, takes one: memory, flops, types and
collectives are right then, but bytes and the estimate are several times too high.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from experiments.measure import chips, hlo
from skd_jax import config_files, groups, parallel, steps
from skd_jax.compiler import compiling_for
from skd_jax.config import Config
from skd_jax.errors import UserError, first_line
from skd_jax.experiment import planned
from skd_jax.groups import EACH
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import Phase, Setting, logits, setting_of
from skd_jax.parallel import AXIS, SPLIT, WHOLE
from skd_jax.state import Kept
from skd_jax.stepping import Stepping

RESULTS = Path("experiments/results/compile")
PHASES = {"round": "delegator", "cil": "learn"}  # the phases that SKD's steps are of
IMAGES = 500  # of each class; no program depends on it
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Described:
    """Images of a task that only have a shape: what :class:`skd_jax.stepping.Stepping` reads."""

    n: int
    shape: tuple[int, ...]

    def fetch(
        self, batches: np.ndarray, rows: int = 0
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of what ``TaskImages.fetch`` returns."""
        shape = (max(rows, len(batches)), *batches.shape[1:])
        images = jax.ShapeDtypeStruct((*shape, *self.shape), np.uint8)
        return images, jax.ShapeDtypeStruct(shape, np.int32)

    def prefetch(self, batches: np.ndarray) -> None:
        """Nothing to do."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A compiled entry point and what the loop calls it with: shapes, laid out on its devices."""

    function: Any
    arguments: tuple
    mesh: Mesh | None

    def lower(self, platform: str, platforms: Sequence[str] | None = None) -> Any:
        """Traces and lowers it for a platform.

        Args:
          platform: that the steps are compiled for.
          platforms: that the program is lowered for; None: that of its devices.
        """
        with compiling_for(platform):
            traced = self.function.jitted.trace(*self.arguments, mesh=self.mesh)
            return traced.lower(lowering_platforms=platforms) if platforms else traced.lower()


def setting(config: Config) -> Setting:
    """That of a data set of as many classes as the configuration speaks of, 100 if of none."""
    data = config.data
    new = (data.max_classes or data.subset or 100) - data.base_classes
    classes = (data.base_classes, *[max(1, new // data.tasks)] * data.tasks)
    return setting_of(config, classes, [IMAGES * count for count in classes])


def phases(here: Setting) -> Iterable[tuple[Phase, Any, Any, Any]]:
    """Each phase of a run, and shapes: what is in training, what was kept before, and after."""
    data = here.config.data

    def take(indices: Any) -> jax.Array:
        return jnp.zeros((len(indices), data.load_size, data.load_size, data.channels), jnp.uint8)

    kept = method_of(here.config).kept()
    for phase in planned(here):
        state = jax.eval_shape(phase.init, kept)
        after = jax.eval_shape(lambda s, k, p=phase: p.finish(s, k, take), state, kept)
        yield phase, state, kept, after
        kept = after


def call(config: Config, step: str, devices: Sequence[Any] | None = None, count: int = 1) -> Call:
    """What the loop calls for steps of a kind.

    Args:
      config: the configuration.
      step: "round", "cil", "predict", or a phase of the method by name, such as "base"; the first
        of that name.
      devices: described or real; None: any one.
      count: how many steps.

    Raises:
      UserError: there is no such step, or its batch does not divide among the devices.
    """
    here, data, replicas = setting(config), config.data, config.run.replicas
    row = Mesh(np.array(devices), (AXIS,)) if devices and len(devices) > 1 else None
    pixels = (data.load_size, data.load_size, data.channels)

    def laid(tree: Any, lies: Any = WHOLE, mesh: Mesh | None = row) -> Any:
        sharding = None
        if devices:
            sharding = NamedSharding(mesh, lies) if mesh else SingleDeviceSharding(devices[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    names = []
    for phase, state, kept, after in phases(here):
        names.append(phase.name)
        if step == "predict" and phase.ends_task:
            size = parallel.round_up(config.run.eval_batch, row)
            scores = method_of(config).scores
            kept = Kept(after.classifier) if scores is logits else after
            batch = jax.ShapeDtypeStruct((1, size, *pixels), np.uint8)
            static = (scores, config.method, here.nets, data)
            return Call(steps.predict, (*static, laid(kept), laid(batch, SPLIT)), row)
        if phase.name == PHASES.get(step, step):
            mesh, seeds = groups.in_groups(row, replicas), range(replicas if replicas > 1 else 0)
            parallel.check_divisible({phase.field: phase.batch}, mesh)
            images: Any = None
            if phase.reads != "nothing":
                images = Described(here.images[phase.task], pixels)
            stepping = Stepping(phase, here, None, images, count, seeds)
            if seeds:
                state, kept = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct((replicas, *x.shape), x.dtype), (state, kept)
                )
            *static, state, kept, batches, key, numbers, rates, _ = stepping.arguments(
                state, kept, 0, count
            )
            lies = EACH if seeds else WHOLE
            own = laid((state, kept), lies, mesh)
            batches, key = laid(batches, parallel.of_batches(mesh), mesh), laid(key, lies, mesh)
            # All are made: the text of a loop to a number that is an argument tells no count.
            rest = (key, *laid((numbers, rates), mesh=mesh), None)
            return Call(steps.advance, (*static, *own, batches, *rest), mesh)
    known = ", ".join(dict.fromkeys([*PHASES, *names, "predict"]))
    raise UserError(f"--step={step}: config.method has {known}")


def compiled(lowered: Any, chip: chips.Chip, count: int, save: Path | None = None) -> dict:
    """Compiles, and reads the program; where it does not fit into memory, only that.

    Raises:
      UserError: the program has a loop of unknown length.
    """
    since, cpu = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": first_line(error)}
    seconds, cpu_seconds = time.perf_counter() - since, time.process_time() - cpu
    text = program.as_text()
    if save:
        save.write_text(text)
    readings, needs = hlo.read(text, count), memory(program.memory_analysis())
    if readings["unknown_loops"]:
        raise UserError(
            f"{readings['unknown_loops']} loops of the program do not tell how often they go "
            "round, so nothing can be read from it; --save=FILE writes its text"
        )
    found: dict[str, Any] = {"compile_seconds": seconds, "compile_cpu_seconds": cpu_seconds}
    if needs["total"] > chip.memory * 1024:  # the GPU's compiler does not mind
        found["does_not_fit"] = f"needs {needs['total'] / 1024:.1f} of {chip.memory} GiB"
    return found | {"memory_mib": needs, **readings, "bounds_ms": bounds(chip, readings)}


def memory(analysis: Any) -> dict[str, float]:
    """MiB a chip needs for a call; what is donated counts once."""
    parts = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {part: getattr(analysis, f"{part}_size_in_bytes") / MIB for part in parts}
    return {"total": sum(sizes.values()) - 2 * sizes["alias"], **sizes}


def bounds(chip: chips.Chip, readings: dict[str, Any]) -> dict[str, float]:
    """Milliseconds: what flops and bytes take at the chip's peaks, and the compiler's estimate."""
    flops = 0.0
    for types, amount in readings["products"].items():
        exact = types.startswith("f32") and types.endswith(("high", "highest"))
        flops += amount / (chip.float32 if exact else chip.bfloat16)
    found = {"flops": flops, "bytes": readings["gb"] / chip.bandwidth * 1e3}
    if chip.clock and readings["mcycles"]:
        found["estimated"] = sum(readings["mcycles"].values()) / chip.clock
    return found


def rounded(value: Any) -> Any:
    """With numbers of four digits, which is more than readings have."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


COLUMNS: dict[str, Callable[[dict], float | None]] = {
    "memory, MiB": lambda r: r["memory_mib"]["total"],
    "temporary": lambda r: r["memory_mib"]["temp"],
    "code": lambda r: r["memory_mib"]["generated_code"],
    "GFLOP": lambda r: r["gflop"],
    "GB": lambda r: None if _rough(r) else r["gb"],
    "operations": lambda r: r["operations"],
    "collectives": lambda r: sum(c["calls"] for c in r["collectives"].values()) or None,
    "their MB": lambda r: sum(c["mb"] for c in r["collectives"].values()) or None,
    "padding": lambda r: r["padding"],
    "flops, ms": lambda r: r["bounds_ms"]["flops"],
    "bytes, ms": lambda r: None if _rough(r) else r["bounds_ms"]["bytes"],
    "estimated, ms": lambda r: None if _rough(r) else r["bounds_ms"].get("estimated"),
}


def _rough(report: dict) -> bool:
    """Whether bytes and cycles are of a program that libtpu made with its least effort."""
    return report["fast"] and "libtpu" in report["versions"]


def table(results: Path) -> str:
    """Markdown of all readings in the folders ``before`` and ``after``, side by side."""
    found = {
        when: {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for when in ("before", "after")
        if (folder := results / when).is_dir()
    }
    lines = [f"| program | chips | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(name for some in found.values() for name in some):
        both = [some[name] for some in found.values() if name in some]
        any_ = both[0]
        program = f"{any_['config']}, {any_['step']}, {any_['dtype']}{', fast' * any_['fast']}"
        program += f", {any_['steps_a_call']} a call" * (any_["steps_a_call"] > 1)
        program += f", {any_['replicas']} replicas" * (any_.get("replicas", 1) > 1)
        if any("does_not_fit" in each for each in both):
            said = " → ".join("does not fit" if "does_not_fit" in r else "fits" for r in both)
            lines.append(f"| {program} | {any_['topology']} | {said} |{' |' * (len(COLUMNS) - 1)}")
            continue
        values = ([column(report) for report in both] for column in COLUMNS.values())
        cells = (" → ".join(map(_shown, each)) if any(each) else "" for each in values)
        lines.append(f"| {program} | {any_['topology']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:1", help="CHIP:SIZE (%(default)s)")
    parser.add_argument("--config", default="configs/cifar100.py", help="%(default)s")
    parser.add_argument("--dtype", help="of activations; the config's if not given")
    parser.add_argument("--step", default="round", help="round, cil, base, predict, or a phase")
    parser.add_argument("--count", type=int, default=1, help="steps a call (%(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="of the run (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="the compiler's least effort")
    parser.add_argument("--out", type=Path, default=Path("runs/compile"), help="folder")
    parser.add_argument("--save", type=Path, help="file to write the compiled program's text to")
    parser.add_argument("--table", action="store_true", help=f"print the table of {RESULTS}")
    given = parser.parse_args()
    if given.table:
        print(table(RESULTS))
        return 0
    # The CPU is the one backend that is surely here; nothing runs on it.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # so that compiling is timed
    if given.fast:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        report = report_of(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = "_".join(report[part] for part in ("config", "step", "dtype", "topology"))
    name = re.sub(r"[^\w.]+", "_", name) + f"_x{given.count}" * (given.count > 1)
    name += f"_r{given.replicas}" * (given.replicas > 1)
    name += "_fast" * given.fast
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(report), indent=1)
    (given.out / f"{name}.json").write_text(text + "\n")
    print(text)
    return 0


def report_of(given: argparse.Namespace) -> dict[str, Any]:
    """Reads the program that the command line names."""
    fields = config_files.read(given.config)
    path, _, argument = given.config.partition(":")
    if given.dtype:
        fields.update_from_flattened_dict({"model.dtype": given.dtype})
    fields.update_from_flattened_dict({"run.replicas": given.replicas})
    config = from_config_dict(fields)
    devices = chips.devices(given.topology)
    program = call(config, given.step, devices, given.count)
    lowered = program.lower(devices[0].platform)
    return {
        "topology": given.topology,
        "chips": len(devices),
        "kind": devices[0].device_kind,
        "config": ":".join(filter(None, (Path(path).stem, argument))),
        "dtype": config.model.dtype,
        "precision": config.model.precision,
        "step": given.step,
        "steps_a_call": given.count,
        "replicas": given.replicas,
        "fast": given.fast,
        "versions": chips.compiler_versions(),
        **compiled(lowered, chips.chip_of(given.topology), given.count, given.save),
    }


if __name__ == "__main__":
    sys.exit(main())

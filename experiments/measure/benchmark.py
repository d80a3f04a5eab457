r"""How fast a round and a CIL step are, beside the same in PyTorch, at CIFAR-100's shapes.

    pip install torch==2.13.0
    python -m experiments.measure.benchmark --out=experiments/results/benchmark

ResNet-32, Table IV's delegator, pseudo batches of 128 and 256, 50 old and 10 new classes. A round
is 5 imitate steps and 1 explore step; a CIL step takes 128 new images and as many pseudo images;
ours also gathers and augments the new ones. Every contender lives in a process of its own, with
empty compile caches, and they run in turns, so that what else the machine does falls on all alike;
the medians of the turns are compared. Without PyTorch, only ours run.

The share of the machine's measured matrix-product peak counts PyTorch's operations for all: those
that ours avoids (the delegator's doubling convolutions) count as done.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments.framework.scripts import exit_code
from skd_jax.paths import given_path

GIB = 2**30
OLD, NEW, NEW_BATCH, DEPTH = 50, 10, 128, 32
UNITS = ("round", "cil")


def images_per(unit: str, batch: int) -> int:
    """Images that pass through a unit of work."""
    return 6 * batch if unit == "round" else 2 * NEW_BATCH


class Ours:
    """skd_jax's compiled steps: D_{task - 1}'s rounds and the learning of a task, untrained."""

    def __init__(
        self, batch: int, dtype: str, tasks: int = 5, task: int = 1, devices: int = 1, **_: object
    ):
        import jax

        from configs import cifar100
        from experiments.measure.full_scale import MockSource, peak_memory
        from skd_jax import parallel
        from skd_jax.evaluate import device_description
        from skd_jax.experiment import open_experiment
        from skd_jax.loop import no_images, steps_per_call
        from skd_jax.methods import from_config_dict, method_of
        from skd_jax.stepping import Stepping

        fields = cifar100.get_config(f"tasks={tasks}")
        changes = {"model.dtype": dtype, "method.stage_one.batch": batch, "run.devices": devices}
        fields.update_from_flattened_dict(changes)
        config = from_config_dict(fields)
        experiment = open_experiment(config, MockSource(config))
        *earlier, delegator, learn = experiment.phases[: 2 * task + 1]
        kept = method_of(config).kept()
        for phase in earlier:
            kept = phase.finish(phase.init(kept), kept, no_images)
        rounds = delegator.init(kept)
        kept = delegator.finish(rounds, kept, no_images)
        held = (kept, rounds, learn.init(kept))
        self.arrays = sum(x.nbytes for x in jax.tree.leaves(held))
        held = jax.tree.map(jax.numpy.copy, held)  # rounds and kept share D; states are donated
        self.kept, *states = parallel.replicate(experiment.mesh, held)
        self.states: dict[str, Any] = dict(zip(UNITS, states, strict=True))
        setting, mesh = experiment.setting, experiment.mesh
        phases = {"round": (delegator, None), "cil": (learn, experiment.stream.open(task))}
        self.most = {unit: steps_per_call(config, phase) for unit, (phase, _) in phases.items()}
        self.steppings: dict[str, Any] = {
            unit: Stepping(phase, setting, mesh, images, self.most[unit])  # as training does
            for unit, (phase, images) in phases.items()
        }
        self.step = {"round": 0, "cil": 0}
        self.jax, self.description = jax, device_description()
        self.on_cpu = jax.default_backend() == "cpu"
        self.available = len(jax.devices())
        self.peak_memory = lambda: peak_memory() / GIB

    def run(self, unit: str, count: int) -> None:
        start, most, seen = self.step[unit], self.most[unit], None
        for first in range(start, start + count, most):
            state, stepping = self.states[unit], self.steppings[unit]
            stop = min(first + most, start + count)
            self.states[unit], seen = stepping(state, self.kept, first, stop)
        self.jax.block_until_ready(seen)
        self.step[unit] += count

    def matmul_peak(self, dtype: str) -> float:
        """Multiply-adds of a large matrix product, counted twice, a second."""
        n = 2048 if self.on_cpu else 8192
        a = self.jax.numpy.ones((n, n), dtype)
        product = self.jax.jit(lambda x: x @ x)
        seconds = []
        for _ in range(10):
            since = time.perf_counter()
            self.jax.block_until_ready(product(a))
            seconds.append(time.perf_counter() - since)
        return 2 * n**3 / min(seconds)


class PyTorchs:
    """The port in experiments/measure/pytorch_port.py."""

    def __init__(self, batch: int, dtype: str, compiled: bool, **_: object):
        torch = importlib.import_module("torch")
        from experiments.measure.pytorch_port import Steps

        self.torch, self.batch = torch, batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        bfloat16 = dtype == "bfloat16"
        options = {"depth": DEPTH, "old": OLD, "new": NEW, "bfloat16": bfloat16}
        self.steps = Steps(device=self.device, compiled=compiled, **options)
        images = torch.randn(NEW_BATCH, 3, 32, 32, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = OLD + torch.arange(NEW_BATCH, device=self.device) % NEW
        self.description = f"{self.device}, torch {torch.__version__}"

    def run(self, unit: str, count: int) -> None:
        loss = None
        for _ in range(count):
            if unit == "round":
                loss = self.steps.round(self.batch)
            else:
                loss = self.steps.cil(self.images, self.labels)
        if loss is not None:
            loss.item()  # waits

    def peak_memory(self) -> float:
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def flops(self, unit: str) -> int:
        """Of convolutions and matrix products, forward and backward, as PyTorch counts them."""
        counter = importlib.import_module("torch.utils.flop_counter")
        with counter.FlopCounterMode(display=False) as counter:
            self.run(unit, 1)
        return counter.get_total_flops()


def serve(options: dict[str, Any]) -> None:
    """A contender's process: answers requests [method, *arguments], one a line, until the end."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    contender = (Ours if options["library"] == "skd_jax" else PyTorchs)(**options)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        since = time.perf_counter()
        value = getattr(contender, method)
        value = value(*arguments) if callable(value) else value
        answer = {"seconds": time.perf_counter() - since, "value": value}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Contender:
    """A process that runs units of work when it is told to."""

    def __init__(self, **options: Any):
        self.ours, self.dtype = options["library"] == "skd_jax", options["dtype"]
        compiled = ["compiled"] if options.get("compiled") else []
        self.name = " ".join([options["library"], *compiled, self.dtype])
        flags, devices = os.environ.get("XLA_FLAGS", ""), options.get("devices", 1)
        self.kernels = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.measure.benchmark", "--serve", json.dumps(options)],
            env={
                **os.environ,
                # On a CPU; an accelerator has what it has. With fewer threads than devices a
                # collective can wait for ever.
                "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
                **({"NPROC": "16"} if devices > 1 else {}),
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several share one accelerator
                "JAX_ENABLE_COMPILATION_CACHE": "0",
                "TORCHINDUCTOR_CACHE_DIR": self.kernels.name,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended before it answered; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.kernels.cleanup()


def machine() -> tuple[str, bool, int]:
    """(what JAX computes on here in words, whether that is a CPU, how many devices there are)."""
    probe = Contender(library="skd_jax", batch=8, dtype="float32")
    found = [probe.ask(name)["value"] for name in ("description", "on_cpu", "available")]
    probe.close()
    return found[0], found[1], found[2]


def contenders(batch: int, accelerator: bool, torch: bool) -> list[Contender]:
    """All there are on this machine; bfloat16 where there is an accelerator for it."""
    dtypes = ("float32", "bfloat16") if accelerator else ("float32",)
    found = [Contender(library="skd_jax", batch=batch, dtype=dtype) for dtype in dtypes]
    for dtype in dtypes if torch else ():
        for compiled in (False, True):
            options = {"batch": batch, "dtype": dtype, "compiled": compiled}
            found.append(Contender(library="PyTorch", **options))
    return found


def in_turns(
    running: dict[Any, Contender], unit: str, turns: int, count: int
) -> dict[Any, dict[str, float]]:
    """Seconds a unit of work takes each contender, who take turns, each of ``count`` units."""
    first = {name: c.ask("run", unit, count)["seconds"] for name, c in running.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in running}
    for turn in range(turns):
        for name, contender in running.items():
            seconds[name].append(contender.ask("run", unit, count)["seconds"] / count)
            print(f"{unit}, turn {turn}: {name} {seconds[name][-1]:.4f} s", file=sys.stderr)
    return {
        name: {
            "first_seconds": first[name],
            "seconds": statistics.median(taken),
            "fastest_seconds": min(taken),
            "slowest_seconds": max(taken),
            "compile_seconds": max(first[name] - count * statistics.median(taken), 0.0),
        }
        for name, taken in seconds.items()
    }


def measure(
    batch: int, units: Sequence[str], turns: int, count: int, accelerator: bool, torch: bool
) -> list[dict[str, Any]]:
    """One row for each unit of work and contender."""
    running = contenders(batch, accelerator, torch)
    rows = {}
    for unit in units:
        found = in_turns({c.name: c for c in running}, unit, turns, count)
        for contender in running:
            row: dict[str, Any] = {"contender": contender.name, "unit": unit, "batch": batch}
            row["device"] = contender.ask("description")["value"]
            row |= found[contender.name]
            row["images_per_second"] = images_per(unit, batch) / row["seconds"]
            # Of this process so far: the round's, then the greater of both.
            row["peak_memory_gib"] = contender.ask("peak_memory")["value"]
            rows[contender.name, unit] = row
    eager = next((c for c in running if not c.ours and "compiled" not in c.name), None)
    flops = {unit: eager.ask("flops", unit)["value"] if eager else None for unit in units}
    ours = next(c for c in running if c.ours)
    peak = {dtype: ours.ask("matmul_peak", dtype)["value"] for dtype in {c.dtype for c in running}}
    for contender in running:
        for unit in units:
            row = rows[contender.name, unit]
            if flops[unit]:
                share = flops[unit] / row["seconds"] / peak[contender.dtype]
                row["share_of_matmul_peak"] = share
            rivals = [
                r for (name, u), r in rows.items() if u == unit and name.startswith("PyTorch")
            ]
            if contender.ours and rivals:
                best = min(r["seconds"] for r in rivals)
                row["times_as_fast_as_best_pytorch"] = best / row["seconds"]
        contender.close()
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| batch | unit | | seconds | images/s | compiling, s | share of peak | memory, GiB "
        "| PyTorch's best / ours |",
        "| --- " * 9 + "|",
    ]
    for r in sorted(rows, key=lambda r: (r["batch"], UNITS.index(r["unit"]))):
        share = r.get("share_of_matmul_peak")
        ratio = r.get("times_as_fast_as_best_pytorch")
        lines.append(
            f"| {r['batch']} | {r['unit']} | {r['contender']} | {r['seconds']:.3g} "
            f"| {r['images_per_second']:.0f} | {r['compile_seconds']:.0f} "
            f"| {'' if share is None else f'{share:.0%}'} | {r['peak_memory_gib']:.2f} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A round and a CIL step, timed beside PyTorch's.")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=given_path, default="runs/benchmark", help="folder of the report"
    )
    parser.add_argument("--batches", default="128,256", help="pseudo images a step")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--count", type=int, default=0, help="units a turn; 0: 1 on CPU, else 25")
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(json.loads(arguments.serve))
    torch = importlib.util.find_spec("torch") is not None
    device, on_cpu, _ = machine()
    count = arguments.count or (1 if on_cpu else 25)
    report: dict[str, Any] = {
        "device": device,
        "date": date.today().isoformat(),
        "turns": arguments.turns,
        "units_a_turn": count,
        "rows": [],
    }
    units = UNITS
    for batch in map(int, arguments.batches.split(",")):
        report["rows"] += measure(batch, units, arguments.turns, count, not on_cpu, torch)
        write(arguments.out, device, report, table(report["rows"]))
        units = ("round",)  # a CIL step is the same whatever the pseudo batch of stage one


def write(out: Path, device: str, report: dict[str, Any], markdown: str) -> None:
    """Writes a report named after its device, as JSON and as a table, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    name = device.split(",")[0].replace(" ", "_").lower()
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text(f"{device}, {report['date']}\n\n{markdown}\n")
    print(markdown)


if __name__ == "__main__":
    sys.exit(exit_code(main))

r"""What a round and a CIL step cost by task number, pseudo batch and number of devices.

    python -m experiments.measure.sweep --out=experiments/results/sweep

CIFAR-100's shapes, as in :mod:`experiments.measure.benchmark`: ResNet-32, Table IV's delegator,
float32.
One teacher, one student and one delegator are held however many tasks there were, so time and
memory should stay flat over tasks but for the head. The points of a sweep run in turns, each in a
process of its own; on a CPU the devices are virtual and share its cores.
"""

import argparse
import sys
from datetime import date
from typing import Any

from experiments.framework.scripts import exit_code
from experiments.measure.benchmark import GIB, UNITS, Contender, in_turns, machine, write
from skd_jax.paths import given_path

SWEEPS = {"task": (1, 10), "batch": (64, 128, 256), "devices": (1, 2, 4)}


def sweep(name: str, values: tuple[int, ...], turns: int, count: int) -> list[dict[str, Any]]:
    """One row for each value of ``name``, all else at task 1 of 10, a batch of 128, one device."""
    setting = {"library": "skd_jax", "dtype": "float32", "tasks": 10, "batch": 128}
    running = {value: Contender(**{**setting, name: value}) for value in values}
    rows = {value: {"sweep": name, "value": value} for value in values}
    for unit in UNITS:
        for value, found in in_turns(running, unit, turns, count).items():
            rows[value][unit] = found
    for value, contender in running.items():
        rows[value]["arrays_gib"] = contender.ask("arrays")["value"] / GIB
        rows[value]["peak_memory_gib"] = contender.ask("peak_memory")["value"]
        contender.close()
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | | round, s | CIL step, s | compiling both, s | weights and optimisers, MiB "
        "| peak memory, GiB |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        compiling = sum(row[unit]["compile_seconds"] for unit in UNITS)
        lines.append(
            f"| {row['sweep']} | {row['value']} | {row['round']['seconds']:.2f} "
            f"| {row['cil']['seconds']:.2f} | {compiling:.0f} | {1024 * row['arrays_gib']:.1f} "
            f"| {row['peak_memory_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A round and a CIL step by tasks, batch, devices.")
    parser.add_argument("--out", type=given_path, default="runs/sweep", help="folder of the report")
    parser.add_argument("--only", default=",".join(SWEEPS), help="sweeps, of: %(default)s")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--count", type=int, default=0, help="units a turn; 0: 1 on CPU, else 25")
    arguments = parser.parse_args()
    device, on_cpu, available = machine()
    count = arguments.count or (1 if on_cpu else 25)
    report: dict[str, Any] = {"device": device, "date": date.today().isoformat(), "rows": []}
    for name in arguments.only.split(","):
        values = SWEEPS[name]
        if name == "devices" and not on_cpu:
            values = tuple(value for value in values if value <= available)
        print(f"{name}: {values}", file=sys.stderr)
        report["rows"] += sweep(name, values, arguments.turns, count)
        write(arguments.out, device, report, table(report["rows"]))


if __name__ == "__main__":
    sys.exit(exit_code(main))

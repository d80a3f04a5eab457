r"""Kills digits runs at random moments, hundreds of times, and holds what they end with to the bit.

    python -m experiments.measure.kills --kills=200 --out=experiments/results/kills

A run is killed (SIGKILL, and now and then SIGTERM or Ctrl-C), started again with the same command,
killed again, until it gets to its end; then it has to have ended like one that nobody touched:
weights of all networks, accuracy matrix, and every logged number, bit for bit. Moments are drawn
from the whole life of a process, its start, its saves and its last pictures included; every second
run saves after each step, so that many kills fall into a save.
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments.framework.scripts import exit_code
from skd_jax.checkpoint import Checkpoints
from skd_jax.paths import given_path

SIGNALS = ([signal.SIGKILL] * 8) + [signal.SIGTERM, signal.SIGINT]
EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
# Far fewer steps than configs/digits.py has, so that a run may be killed often and yet end soon.
DIGITS = (
    "--config=configs/digits.py",
    "--config.base.epochs=4",
    "--config.method.stage_one.epochs=2",
    "--config.method.stage_one.finetune_epochs=2",
    "--config.method.stage_two.epochs=12",
)
SAVING = (25, 1)  # config.run.checkpoint_every, run by run


def start(workdir: Path, flags: Sequence[str], **options: Any) -> subprocess.Popen:
    """Starts, or goes on with, a run in a process of its own."""
    command = [sys.executable, "-m", "skd_jax.main", *flags, f"--workdir={workdir}"]
    # Shells start what runs in the background with Ctrl-C ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def outcome(workdir: Path) -> dict[str, Any]:
    """What a finished run ended with, but for what the clock says."""
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["seconds"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
        last = checkpoints.read(checkpoints.steps()[0])
    weights = {path: array.tobytes() for path, array in sorted(last.arrays.items())}
    logged = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    return {"summary": summary, "rows": logged, "weights": weights, "step": last.step}


def half_saved(workdir: Path) -> set[int]:
    """Orbax's temporary folders of checkpoints that were not completed: their inode numbers."""
    folders = workdir.glob("checkpoints/*orbax-checkpoint-tmp*")
    return {path.stat().st_ino for path in folders}


def kill_until_done(
    workdir: Path, flags: Sequence[str], draw: random.Random, seconds: float, kills: int
) -> Counter:
    """Starts a run again and again, and kills it up to ``kills`` times, until it ends by itself.

    Args:
      workdir: of the run.
      flags: of the run.
      draw: of moments and signals.
      seconds: a process is killed within this time.
      kills: after as many it is left alone.

    Returns:
      How often each signal ended a process, and how often with a checkpoint half written.

    Raises:
      AssertionError: a process ended otherwise than by its signal, or could not go on.
    """
    done: Counter = Counter()
    log = workdir.with_suffix(".log")
    while True:
        left_before = half_saved(workdir)
        with log.open("ab") as said:
            process = start(workdir, flags, stdout=said, stderr=subprocess.STDOUT)
            number = draw.choice(SIGNALS)
            code = None
            try:
                code = process.wait(draw.uniform(0, seconds) if done.total() < kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                code = process.wait(600)
                # A signal may come before Python listens, or after the run has ended.
                if code in (EXIT_CODES[number], -number):
                    early = number != signal.SIGKILL and code == -number
                    what = number.name + (" before it was listened to" if early else "")
                    done[what + (" in a save" if half_saved(workdir) - left_before else "")] += 1
                    continue
        assert code == 0, f"ended with {code}; see {log}"
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills digits runs, and compares how they end.")
    parser.add_argument("--out", type=given_path, default="runs/kills", help="folder of the report")
    add = functools.partial(parser.add_argument, type=int)
    add("--kills", default=200, help="in all (%(default)s)")
    add("--each", default=40, help="of one run, at most (%(default)s)")
    add("--seed", default=1, help="of the moments and signals (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=11, help="a process is killed within so many (%(default)s)"
    )
    arguments = parser.parse_args()
    draw, killed, runs = random.Random(arguments.seed), Counter(), []
    report: dict[str, Any] = {}
    since = time.perf_counter()
    os.environ.setdefault("TQDM_MININTERVAL", "60")
    with tempfile.TemporaryDirectory(prefix="skd_jax_kills_") as name:
        folder, wanted = Path(name), {}
        for saving in SAVING:
            flags = (*DIGITS, f"--config.run.checkpoint_every={saving}")
            workdir = folder / f"untouched_{saving}"
            assert start(workdir, flags, stdout=subprocess.DEVNULL).wait() == 0
            wanted[saving] = outcome(workdir)
        while killed.total() < arguments.kills:
            saving = SAVING[len(runs) % 2]
            untouched = wanted[saving]
            workdir = folder / f"run_{len(runs)}"
            flags = (*DIGITS, f"--config.run.checkpoint_every={saving}")
            left = min(arguments.each, arguments.kills - killed.total())
            sent = kill_until_done(workdir, flags, draw, arguments.seconds, left)
            found = outcome(workdir)
            same = {part: found[part] == untouched[part] for part in untouched}
            killed += sent
            runs.append({"checkpoint_every": saving, "signals": dict(sent), "same": same})
            print(
                f"run {len(runs)}: {sent.total()} kills, "
                f"{'the same bits' if all(same.values()) else 'DIFFERS'}",
                flush=True,
            )
            report = {
                "date": date.today().isoformat(),
                "seed": arguments.seed,
                "kills": dict(killed),
                "runs": runs,
                "runs_killed": sum(bool(run["signals"]) for run in runs),
                "survived": sum(all(run["same"].values()) for run in runs if run["signals"]),
                "minutes": (time.perf_counter() - since) / 60,
            }
            out = arguments.out
            out.mkdir(parents=True, exist_ok=True)
            (out / f"seed{arguments.seed}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{killed.total()} kills of {report['runs_killed']} runs, {report['survived']} the same")
    if not all(all(run["same"].values()) for run in runs):
        raise SystemExit("a run that was killed did not end like one that nobody touched")


if __name__ == "__main__":
    sys.exit(exit_code(main))

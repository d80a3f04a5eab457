"""The runs behind the paper's tables and figures: which there are, and how missing ones are made.

A run lies in ``RESULTS/SCALE/DATASET/seedN/NAME``, and that is its workdir. It is finished once its
``summary.json`` is there; what takes up a finished run's phases (``config.run.start_from``) needs
its checkpoints too, which are not kept in git, so on a fresh clone those runs are made again.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import Table
from skd_jax.config import Config, from_config_dict, to_dict
from skd_jax.data import open_source
from skd_jax.errors import UserError
from skd_jax.experiment import check_same_config, what_is_computed
from skd_jax.writer import read_json, say

RESULTS = Path(__file__).parent / "results" / "paper"
DATASETS = ("cifar100", "imagenet_subset", "caltech101", "flowers102")
SETTINGS = "settings.json"
SECONDS = 60.0  # between two lines about the runs under way

# Table II: one technique off at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "skd": {},
    "no_category": {"stage_one.terms.category": 0.0},
    "no_diversity": {"stage_one.terms.diversity": 0.0},
    "no_feature_statistics": {"stage_one.terms.feature_statistics": 0.0},
    "no_helper_bn": {"delegator.helper_bn": False},
}
# Table III; the last two are other readings of its "w/o SKD".
LEARNERS: dict[str, dict[str, Any]] = {
    "skd": {},
    "no_alw": {"stage_two.adaptive": False},
    "no_skd": {"stage_two.delegator": False},
    "no_skd_no_alw": {"stage_two.delegator": False, "stage_two.adaptive": False},
    "no_skd_new_outputs": {"stage_two.delegator": False, "stage_two.classification": "new"},
    "no_skd_old_head_fixed": {
        "stage_two.delegator": False,
        "stage_two.classification": "old_head_fixed",
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of ``skd_jax.main``.

    Attributes:
      dataset: the config's file, without its ending, unless ``file`` is another.
      scale: "mini" or "paper".
      seed: of the run.
      name: of its folder.
      argument: of the config, besides the scale.
      fields: config fields set on the command line, by path.
      phases: see ``config.run.phases``.
      start: the run whose phases it takes up, if any.
      file: the config's file, without its ending.
    """

    dataset: str
    scale: str
    seed: int
    name: str
    argument: str = ""
    fields: tuple[tuple[str, Any], ...] = ()
    phases: int = 0
    start: "Run | None" = None
    file: str = ""

    def folder(self, results: Path) -> Path:
        """Where it lies."""
        return results / self.scale / self.dataset / f"seed{self.seed}" / self.name

    def config(self, results: Path, data_dir: str) -> Config:
        """Its configuration."""
        module = importlib.import_module(f"configs.{self.file or self.dataset}")
        config = module.get_config(self._argument())
        values = {**dict(self.fields), **self._how(results), "data.data_dir": data_dir}
        config.update_from_flattened_dict({"seed": self.seed, **values})
        return from_config_dict(config)

    def command(self, results: Path, data_dir: str) -> list[str]:
        """The command line, without Python."""
        values = {"seed": self.seed, **dict(self.fields), **self._how(results)}
        if data_dir:
            values["data.data_dir"] = data_dir
        settings = [f"--config.{path}={value}" for path, value in values.items()]
        config = f"--config=configs/{self.file or self.dataset}.py:{self._argument()}"
        return ["-m", "skd_jax.main", config, f"--workdir={self.folder(results)}", *settings]

    def _argument(self) -> str:
        scale = "scale=mini" if self.scale == "mini" else ""
        return ",".join(filter(None, (self.argument, scale)))

    def _how(self, results: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.phases:
            values["run.phases"] = self.phases
        if self.start:
            values["run.start_from"] = str(self.start.folder(results))
        return values

    def __str__(self) -> str:
        return f"{self.dataset} {self.scale} seed {self.seed} {self.name}"


def base(dataset: str, scale: str, seed: int) -> Run:
    """T_0."""
    return Run(dataset, scale, seed, "base", phases=1)


def student(dataset: str, scale: str, seed: int, ablation: str = "skd") -> Run:
    """D_0 and S_0, of one of ``ABLATIONS``."""
    fields = tuple(ABLATIONS[ablation].items())
    start = base(dataset, scale, seed)
    return Run(dataset, scale, seed, f"student/{ablation}", "", fields, 2, start)


def recipe(dataset: str, scale: str, seed: int, name: str) -> Run:
    """D_0 and S_0 by one of the recipes in ``configs/recipes.py``."""
    if name == "skd":
        return student(dataset, scale, seed)
    start = base(dataset, scale, seed)
    argument = f"dataset={dataset},recipe={name}"
    return Run(dataset, scale, seed, f"recipe/{name}", argument, (), 2, start, "recipes")


def learner(dataset: str, scale: str, seed: int, tasks: int, name: str = "skd") -> Run:
    """All tasks, by one of ``LEARNERS``."""
    fields = LEARNERS[name]
    without = not fields.get("stage_two.delegator", True)
    start = base(dataset, scale, seed) if without else student(dataset, scale, seed)
    folder = f"tasks{tasks}/{name}"
    return Run(dataset, scale, seed, folder, f"tasks={tasks}", tuple(fields.items()), 0, start)


def changed(run: Run, folder: str, name: str, fields: Mapping[str, Any]) -> Run:
    """The same run but for some fields, in a folder named after the change; itself without any."""
    if not fields:
        return run
    letters = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    whole = (*run.fields, *fields.items())
    return dataclasses.replace(run, name=f"{folder}/{letters}", fields=whole)


@dataclasses.dataclass(frozen=True)
class Options:
    """What every script of a table or figure is told."""

    scale: str
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]
    results: Path
    data_dir: str
    jobs: int

    @property
    def out(self) -> Path:
        """Where tables and figures of this scale are written."""
        return self.results / self.scale

    def command(self, module: str) -> str:
        """The command that makes what ``module`` makes, for the report."""
        seeds = ",".join(map(str, self.seeds))
        return f"python -m experiments.{module} --scale={self.scale} --seeds={seeds}"


def options(description: str) -> Options:
    """Reads the command line of a script.

    Raises:
      UserError: a value is not one that can be used.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--scale", choices=("mini", "paper"), default="mini", help="of the networks and data")
    add("--seeds", default="0,1,2", help="of the runs, with commas between them")
    add("--datasets", default="", help=f"of {','.join(DATASETS)}; without it: all that are there")
    add("--results", type=Path, default=RESULTS, help="where everything is written")
    add("--data_dir", default="", help="TFDS's data directory; its own default without it")
    add("--jobs", type=int, default=0, help="runs at a time; 0: one a core, on a GPU or TPU one")
    given = parser.parse_args()
    try:
        seeds = tuple(int(seed) for seed in given.seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds={given.seeds}: give numbers with commas between them") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds={given.seeds}: give each once, and none below 0")
    named = tuple(filter(None, given.datasets.split(",")))
    for name in named:
        if name not in DATASETS:
            raise UserError(f"--datasets={name}: give some of {', '.join(DATASETS)}")
    return Options(given.scale, seeds, named, given.results, given.data_dir, given.jobs)


def summary(run: Run, results: Path) -> dict[str, Any] | None:
    """What a finished run has found; None if it is not finished."""
    return read_json(run.folder(results) / "summary.json")


def summaries(
    runs: Sequence[Run], told: Options, dataset: str | None = None
) -> list[dict[str, Any]]:
    """What the finished ones among these runs have found, of one data set or of all."""
    wanted = (run for run in runs if dataset in (None, run.dataset))
    return [found for run in wanted if (found := summary(run, told.results))]


def make(wanted: Sequence[Run], told: Options, with_checkpoints: bool = False) -> None:
    """Makes those runs that are not finished, and what they start from.

    Args:
      wanted: the runs.
      told: of the command line.
      with_checkpoints: their checkpoints are needed too.

    Raises:
      UserError: one cannot be made; or there are results of other settings in its place.
    """
    missing: dict[Run, None] = {}  # in the order they are to be made in

    def want(run: Run, with_checkpoint: bool) -> None:
        if run in missing or _is_finished(run, told, with_checkpoint):
            return
        if run.start:
            want(run.start, True)
        missing[run] = None

    there = _prepared({run.dataset: None for run in wanted}, told)
    for run in wanted:
        if run.dataset in there:
            want(run, with_checkpoints)
    if missing:
        _make(list(missing), told)


def _prepared(datasets: Iterable[str], told: Options) -> set[str]:
    """Those whose images are there. Says of the others that they are left out, unless named."""
    found = set()
    for name in datasets:
        if told.datasets and name not in told.datasets:
            continue
        config = base(name, told.scale, 0).config(told.results, told.data_dir)
        try:
            open_source(config.data)
            found.add(name)
        except UserError as error:
            if told.datasets:
                raise
            say(f"{name} is left out: {error}")
    return found


def _is_finished(run: Run, told: Options, with_checkpoint: bool) -> bool:
    folder = run.folder(told.results)
    config, started = run.config(told.results, told.data_dir), read_json(folder / SETTINGS)
    if started:
        try:
            check_same_config(config, started, folder)
        except UserError as error:
            raise UserError(f"{error}, or delete that folder") from error
    return summary(run, told.results) is not None and (
        not with_checkpoint or _has_checkpoint(folder)
    )


def _has_checkpoint(folder: Path) -> bool:
    steps = folder / "checkpoints"
    return steps.is_dir() and any(re.fullmatch(r"\d+", path.name) for path in steps.iterdir())


def _make(missing: list[Run], told: Options) -> None:
    """Runs them, several at a time where that pays, each in a process of its own."""
    on_cpu = _backend() == "cpu"
    cores: list[int | None] = [None]
    if on_cpu and told.jobs != 1 and hasattr(os, "sched_getaffinity"):
        # Two small runs with a core each take less time than one after the other with both.
        free: list[int | None] = [*sorted(os.sched_getaffinity(0))]
        cores = free[: told.jobs or None]
    elif told.jobs > 1:
        cores = [None] * told.jobs
    waiting, running, total = list(missing), {}, len(missing)
    say(f"{total} runs to make, {len(cores)} at a time")
    told_at = time.perf_counter()
    try:
        while waiting or running:
            for run in [run for run in waiting if run.start not in (*waiting, *running)]:
                if not cores:
                    break
                core = cores.pop()
                running[run] = _start(run, told, core), core, time.perf_counter()
                waiting.remove(run)
                say(f"{run}: started")
            time.sleep(0.5)
            for run, (process, core, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                cores.append(core)
                if process.returncode:
                    raise UserError(
                        f"{run} ended with exit code {process.returncode}: {_last_line(run, told)} "
                        f"({run.folder(told.results) / 'log.txt'})"
                    )
                minutes = (time.perf_counter() - since) / 60
                left = len(waiting) + len(running)
                say(f"{run}: done in {minutes:.1f} min; {left} of {total} left")
            if time.perf_counter() - told_at > SECONDS:
                told_at = time.perf_counter()
                for run in running:
                    say(f"  {run}: {_last_line(run, told)}")
    finally:
        for process, *_ in running.values():  # they save where they are
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def _start(run: Run, told: Options, core: int | None) -> subprocess.Popen:
    folder = run.folder(told.results)
    folder.mkdir(parents=True, exist_ok=True)
    if not _has_checkpoint(folder):  # what was left of a run that was deleted in part
        (folder / "config.json").unlink(missing_ok=True)
    # What is kept in git: config.json holds paths of this machine.
    write(folder / SETTINGS, what_is_computed(to_dict(run.config(told.results, told.data_dir))))
    command = [sys.executable, *run.command(told.results, told.data_dir)]
    with _on(core), (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def _on(core: int | None) -> Iterator[None]:
    """Processes started meanwhile compute on this core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _last_line(run: Run, told: Options) -> str:
    log = run.folder(told.results) / "log.txt"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:160]


def _backend() -> str:
    """Asked in another process: this one must not hold the device."""
    ask = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"JAX does not start: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.split()[-1]


def script(module: Any) -> int:
    """Makes what is missing of a table or figure, draws it, and returns the exit code.

    Args:
      module: with ``make(told)`` and ``draw(told)``.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the runs save where they are
        signal.signal(number, signal.default_int_handler)
    try:
        told = options(module.__doc__.splitlines()[0])
        module.make(told)
        module.draw(told)
        if hasattr(module, "table"):
            say(module.table(told).markdown())
        say(f"written to {told.out}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def write_table(told: Options, name: str, table: Table) -> None:
    """Writes a table as Markdown and JSON."""
    write(told.out / f"{name}.json", table.json())
    (told.out / f"{name}.md").write_text(table.markdown())


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a small JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")

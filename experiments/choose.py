r"""Chooses weights of methods that come without one that fits all: on held-out training images.

    python -m experiments.choose --scale=mini --seeds=0 --datasets=cifar100 --tasks=5 \
        --results=experiments/results/methods

A tenth of each class's training images is held out of the base and of the first task, T_0 is
trained on the rest, and the first task is learned with each value; the one with the best accuracy
on the held-out images of all these classes is taken. Test images, and later tasks, are not read.
``experiments.figure5 --methods=...`` runs a method with what was chosen for it.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.framework import chosen, study
from experiments.framework.making import make_runs
from experiments.framework.scripts import command, read_options
from experiments.framework.study import Options, Run
from experiments.framework.tables import Cell, Table, source
from skd_jax.data import class_schedule, open_source
from skd_jax.errors import UserError
from skd_jax.methods import METHODS
from skd_jax.writer import say

HELD_OUT = 0.1

# Fields in the order they are chosen in, each with those before it as chosen.
CANDIDATES: dict[str, dict[str, tuple[float, ...]]] = {
    "lwf": {"method.weight": (0.3, 1.0, 3.0, 10.0, 30.0)},
    "ewc": {"method.weight": (1.0, 10.0, 100.0, 1e3, 1e4)},
    "mas": {"method.weight": (0.01, 0.1, 1.0, 10.0, 100.0)},
    "si": {"method.weight": (0.01, 0.1, 1.0, 10.0, 100.0)},
    "sdc": {
        "method.weight": (1.0, 10.0, 100.0, 1e3, 1e4),
        "method.sigma": (0.1, 0.2, 0.4, 0.8),
    },
    "ridge": {"method.penalty": (0.01, 0.1, 1.0, 10.0, 100.0)},
}
NOTE = (
    f"Accuracy in % on a held-out tenth ({HELD_OUT:g}) of the training images of the base and of "
    "the first task, after the first task; the mean over the seeds. No test image, and no later "
    "task, is read. A value at the end of its row may be short of the best."
)


def choose(options: Options) -> None:
    """Chooses for every method, data set and number of tasks that are named, and draws it.

    Raises:
      UserError: a method has nothing to choose; or a run cannot be made.
    """
    names = options.methods or tuple(CANDIDATES)
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise UserError(
            f"--methods={unknown[0]}: has nothing to choose; {', '.join(CANDIDATES)} do"
        )
    if not (options.datasets and options.tasks):
        raise UserError("give --datasets and --tasks: settings are chosen for each benchmark")
    if options.dry_run:
        make_runs(_first_trials(names, options), options)
        return
    for dataset in options.datasets:
        for tasks in options.tasks:
            found, made = chosen.read(dataset, tasks, options), []
            for name in names:
                found[name], summaries = _choose(dataset, tasks, name, options)
                made += summaries
                chosen.write(dataset, tasks, options, found)
            shown = table(dataset, tasks, found, options, made)
            study.write_table(options, f"{chosen.name(dataset, tasks)}_table", shown)
            say(shown.markdown())
    say(f"written to {options.out}")


def _choose(
    dataset: str, tasks: int, name: str, options: Options
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of one method with their best values and all that was tried; and the summaries."""
    best: dict[str, float] = {}
    tried, made = [], []
    for field, values in CANDIDATES[name].items():
        runs = {
            value: trials(dataset, tasks, name, {**best, field: value}, options) for value in values
        }
        make_runs([run for some in runs.values() for run in some], options)
        accuracy = {}
        for value, some in runs.items():
            made += (found := study.summaries(some, options))
            accuracy[value] = statistics.fmean(summary["final_accuracy"] for summary in found)
        tried += [{"field": field, "value": v, "accuracy": a} for v, a in accuracy.items()]
        best[field] = max(accuracy, key=lambda value: accuracy[value])
    seeds = list(options.seeds)
    return {"fields": best, "tried": tried, "seeds": seeds, "held_out": HELD_OUT}, made


def _first_trials(names: Sequence[str], options: Options) -> list[Run]:
    """The runs that wait for no choice: those of each method's first field."""
    return [
        run
        for dataset in options.datasets
        for tasks in options.tasks
        for name in names
        for field, values in list(CANDIDATES[name].items())[:1]
        for value in values
        for run in trials(dataset, tasks, name, {field: value}, options)
    ]


def trials(
    dataset: str, tasks: int, name: str, values: Mapping[str, float], options: Options
) -> list[Run]:
    """The runs of one method with these values of its fields, one a seed.

    Args:
      dataset: of the benchmark.
      tasks: of the benchmark, of which the base and the first are taken.
      name: of the method.
      values: by path, "method.weight".
      options: of the command line.
    """
    classes = _classes(dataset, tasks, options)
    few = (("data.held_out", HELD_OUT), ("data.max_classes", classes), ("data.tasks", 1))
    found = []
    for seed in options.seeds:
        run = study.method(dataset, options.scale, seed, tasks, name, tuple(values.items()))
        start = run.start and dataclasses.replace(
            run.start, name=f"held_out/{run.start.name}_{classes}", fields=(*run.start.fields, *few)
        )
        said = ",".join(f"{path.removeprefix('method.')}={v:g}" for path, v in values.items())
        folder = f"held_out/tasks{tasks}/{name}/{said}"
        found.append(dataclasses.replace(run, name=folder, start=start, fields=(*run.fields, *few)))
    return found


@functools.cache
def _classes(dataset: str, tasks: int, options: Options) -> int:
    """How many the base and the first task have."""
    run = study.method(dataset, options.scale, 0, tasks, "finetune")
    data = run.config(options.results, options.data_dir).data
    schedule = class_schedule(data, open_source(data).class_names)
    return len(schedule[0]) + len(schedule[1])


def table(
    dataset: str,
    tasks: int,
    found: Mapping[str, Any],
    options: Options,
    made: Sequence[dict[str, Any]],
) -> Table:
    """What was tried and chosen."""
    rows = []
    for name, one in found.items():
        defaults = {
            field.name: field.default for field in dataclasses.fields(METHODS[name].settings)
        }
        for path, value in one["fields"].items():
            short = path.removeprefix("method.")
            tried = ((t["value"], 100 * t["accuracy"]) for t in one["tried"] if t["field"] == path)
            cells = (
                Cell(said="; ".join(f"{value:g}: {accuracy:.1f}" for value, accuracy in tried)),
                Cell(said=f"{value:g}"),
                Cell(said=f"{defaults[short]:g}"),
                Cell(said=", ".join(map(str, one["seeds"]))),
            )
            rows.append((f"{name}: {short}", cells))
    title = f"Settings chosen on held-out training images: {dataset}, {tasks} tasks"
    columns = ("value: accuracy", "chosen", "default", "seeds")
    where = source("choose", options, made, f"{dataset} --tasks={tasks}")
    return Table(title, columns, tuple(rows), where, NOTE)


if __name__ == "__main__":
    sys.exit(command(lambda: choose(read_options(str(__doc__).splitlines()[0], compares=True))))

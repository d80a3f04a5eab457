"""The resumable loop over (task, phase, step), the same for every method, and its reports."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from skd_jax import metrics, parallel, plots, steps
from skd_jax.checkpoint import Checkpoints
from skd_jax.config import Config, to_dict
from skd_jax.data import (
    Schedule,
    Source,
    TestImages,
    TrainingStream,
    check,
    check_batches,
    class_schedule,
    open_source,
)
from skd_jax.errors import UserError
from skd_jax.methods import skd
from skd_jax.methods.phase import Phase
from skd_jax.state import Carry, Network
from skd_jax.writer import Progress, Writer

PICTURE = 3  # the number in the random key of the pseudo images' picture, after the phases'


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration with its data opened and every check passed; nothing has been written."""

    config: Config
    source: Source
    schedule: Schedule
    stream: TrainingStream
    test: TestImages
    phases: list[Phase]
    mesh: Mesh | None


@dataclasses.dataclass
class Records:
    """What has been measured so far; it is saved with every checkpoint."""

    rows: list[metrics.Row] = dataclasses.field(default_factory=list)
    delegator: list[metrics.DelegatorRow] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Records":
        """Reads what ``dataclasses.asdict`` and JSON made of it."""
        rows = [metrics.Row(tuple(row["correct"]), tuple(row["total"])) for row in values["rows"]]
        delegator = [metrics.DelegatorRow(**row) for row in values["delegator"]]
        return cls(rows, delegator, dict(values["seconds"]))

    def add_seconds(self, name: str, since: float) -> float:
        """Books the time since ``since`` (``time.perf_counter``) under ``name``; returns now."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since
        return now


def open_experiment(config: Config, source: Source | None = None) -> Experiment:
    """Opens the data and checks that the whole run can be done.

    Args:
      config: the configuration.
      source: images to use instead of those that ``config.data`` names.

    Raises:
      UserError: what is wrong, and how to mend it.
    """
    check(config.data)
    mesh = parallel.make_mesh(config.run.devices)
    sizes = {"base.batch": config.base.batch, "stage_two.batch": config.stage_two.batch}
    if config.stage_two.delegator:
        sizes["stage_one.batch"] = config.stage_one.batch
    parallel.check_divisible(sizes, mesh)
    try:
        skd.networks(config)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    source = source or open_source(config.data)
    schedule = class_schedule(config.data, source.class_names)
    stream = TrainingStream(source, schedule, config.data.in_memory, mesh)
    counts = stream.counts()
    check_batches(counts, config.base.batch, config.stage_two.batch)
    phases = skd.phases(config, [len(classes) for classes in schedule], counts, mesh)
    return Experiment(config, source, schedule, stream, TestImages(source, schedule), phases, mesh)


def train(config: Config, workdir: str | Path, say: Callable[[str], None] = print) -> dict:
    """Runs, or goes on with, a whole experiment.

    Args:
      config: the configuration.
      workdir: everything the run writes goes here; a run already there is gone on with.
      say: prints a line for people.

    Returns:
      The summary, as written to ``workdir/summary.json``.

    Raises:
      UserError: wrong input, before anything is written; or a loss that is not finite.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder")
    with Checkpoints(workdir / "checkpoints", config.run.keep_checkpoints) as checkpoints:
        experiment = _opened_by_all(config, workdir, checkpoints)
        return _Run(experiment, workdir, checkpoints, say).go()


def _opened_by_all(config: Config, workdir: Path, checkpoints: Checkpoints) -> Experiment:
    """Opens the experiment in every process, or in none."""
    experiment, error, found = None, None, ""
    try:
        _check_same_config(config, workdir)
        experiment = open_experiment(config)
        fields = to_dict(config)
        fields["data"].pop("data_dir")
        found = json.dumps([fields, _data(experiment), checkpoints.newest()])
    except Exception as problem:
        error = problem
    parallel.check_processes(found, error)
    assert experiment is not None
    return experiment


class _Run:
    """One process's part of a run: from the newest checkpoint to the end."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.phases = experiment.phases
        self.nets = skd.networks(self.config)
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.say = say if parallel.leads() else lambda line: None
        self.starts = np.cumsum([0, *(phase.steps for phase in self.phases)]).tolist()

    def go(self) -> dict:
        carry, state, first, step, records = self._restored()
        if first == len(self.phases):
            self.say(f"this run is finished; its results are in {self.workdir}")
            self.say(metrics.table(records.rows, records.delegator))
            written = self.workdir / "summary.json"
            return json.loads(written.read_text()) if written.exists() else self._report(records)
        if first or step:
            self.say(f"going on at {self._where(first, step)}")
        context, error = None, None
        try:
            context = self._writer(self.starts[first] + step)
        except Exception as problem:
            error = problem
        parallel.check_processes("", error)
        assert context is not None
        with context as writer:
            for index, phase in list(enumerate(self.phases))[first:]:
                carry = self._phase(index, carry, state, step, records, writer)
                state, step = None, 0
                carry = self._measured(phase, carry, records)
                self._save(index + 1, 0, carry, None, records)
        self.say(f"finished; results are in {self.workdir}")
        return self._report(records)

    def _writer(self, global_step: int) -> contextlib.AbstractContextManager[Writer | None]:
        """Opens the workdir, in the one process that writes to it."""
        if not parallel.leads():
            return contextlib.nullcontext()
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.workdir}: {error.strerror}; name another") from error
        _write_json(self.workdir / "config.json", to_dict(self.config))
        return Writer(self.workdir, global_step)

    def _phase(
        self,
        index: int,
        carry: Carry,
        state: Any,
        step: int,
        records: Records,
        writer: Writer | None,
    ) -> Carry:
        """Runs one phase from ``step`` (``state`` is None at 0) and returns what it leaves."""
        phase, run = self.phases[index], self.config.run
        since = time.perf_counter()
        task = self.experiment.stream.open(phase.task) if phase.reads_images else None
        if state is None:
            mesh = self.experiment.mesh
            state = parallel.replicate(mesh, phase.init(parallel.to_host(mesh, carry)))
        length = run.steps_per_call or (1 if jax.default_backend() == "cpu" else 25)
        pending: list[dict[str, jax.Array]] = []
        logged, due = step, None

        def log(values: list[dict[str, jax.Array]], done: int, step: int) -> None:
            means = _means(values)
            _check_finite(means, phase, step)
            if writer:
                position = {"task": phase.task, "phase": phase.name, "step": step}
                writer.write(means, **position, global_step=self.starts[index] + step)
            progress.update(done, means)

        with Progress(
            total=phase.steps,
            initial=step,
            task=phase.task,
            phase=phase.name,
            unit=phase.unit,
            shown=parallel.leads(),
        ) as progress:
            while step < phase.steps:
                # Calls end on one grid wherever a run began, so that a resumed one makes the same.
                stop = min(step - step % length + length, phase.steps)
                state, values = phase.call(state, carry, task, step, stop)
                if due:  # now that the devices have the next call to work on
                    log(*due)
                    due = None
                pending.append(values)
                saves = stop // run.checkpoint_every > step // run.checkpoint_every
                logs = stop // run.log_every > step // run.log_every
                step = stop
                if logs or saves or step == phase.steps:
                    due = pending, step - logged, step
                    pending, logged = [], step
                if due and (saves or step == phase.steps):  # nothing is saved unlogged
                    log(*due)
                    due = None
                if saves and step < phase.steps:
                    since = records.add_seconds(phase.name, since)
                    self._save(index, step, carry, state, records)
        carry = jax.block_until_ready(phase.finish(state, carry))
        if task is not None:
            task.close()
        records.add_seconds(phase.name, since)
        return carry

    def _measured(self, phase: Phase, carry: Carry, records: Records) -> Carry:
        """Takes the test accuracies a phase calls for, for the report only."""
        since = time.perf_counter()
        tasks = len(records.rows)  # learned before this phase
        assert carry.classifier is not None
        if phase.name == "delegator":
            assert carry.student is not None and carry.delegator is not None
            # S_n's features under T_n's head (Table I).
            head = carry.classifier.params["head"]
            student = Network(
                {"features": carry.student.params, "head": head},
                {"features": carry.student.batch_stats},
            )
            teacher_row = records.rows[-1]
            student_row = self._accuracy(student, tasks)
            records.delegator.append(
                metrics.DelegatorRow(phase.task, teacher_row.top1, student_row.top1)
            )
            self._picture(carry.delegator, phase.task)
            carry = dataclasses.replace(carry, student=None)
        else:
            records.rows.append(self._accuracy(carry.classifier, tasks + 1))
            self.say(metrics.table(records.rows, records.delegator))
        records.add_seconds("evaluate", since)
        return carry

    def _accuracy(self, network: Network, tasks: int) -> metrics.Row:
        mesh = self.experiment.mesh
        size = parallel.round_up(self.config.run.eval_batch, mesh)
        mine = parallel.local_columns(mesh, size)
        correct, total = [], []
        for task in range(tasks):
            images, labels = self.experiment.test.task(task)
            right = 0
            for start in range(0, len(labels), size):
                batch = images[start : start + size]
                padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
                padded[: len(batch)] = batch
                predicted = steps.predict(
                    self.nets,
                    self.config.data,
                    network,
                    parallel.split(mesh, padded[None, mine], size),
                    mesh=mesh,
                )
                wanted = labels[start : start + size]
                right += int(np.sum(np.asarray(predicted)[0, : len(batch)] == wanted))
            correct.append(right)
            total.append(len(labels))
        return metrics.Row(tuple(correct), tuple(total))

    def _picture(self, delegator: Network, task: int) -> None:
        count, data = self.config.run.pseudo_images, self.config.data
        if count:
            _, key = skd.phase_keys(self.config.seed, task, PICTURE)
            key = parallel.replicate(self.experiment.mesh, key)
            images = np.asarray(steps.pseudo_images(self.nets, delegator, key, count))
            if parallel.leads():
                path = self.workdir / f"pseudo_images_{task}.png"
                plots.image_grid(images, path, mean=data.mean, std=data.std)

    def _save(self, index: int, step: int, carry: Carry, state: Any, records: Records) -> None:
        if not _all_finite((carry, state)):
            raise UserError(
                f"weights are not finite at {self._where(index, step)}, so they are not saved; "
                "lower the rates and start in another workdir"
            )
        meta = {
            "phase": index,
            "step": step,
            "records": dataclasses.asdict(records),
            "data": _data(self.experiment),
        }
        self.checkpoints.save(self.starts[index] + step, {"carry": carry, "state": state}, meta)

    def _where(self, index: int, step: int) -> str:
        if index == len(self.phases):
            return "the end"
        phase = self.phases[index]
        return f"task {phase.task}, {phase.name}, {phase.unit} {step}"

    def _restored(self) -> tuple[Carry, Any, int, int, Records]:
        """(carry, state or None, phase, step, records) of the newest checkpoint or a new run."""
        newest = self.checkpoints.latest()
        if newest is None:
            return Carry(), None, 0, 0, Records()
        meta = self.checkpoints.meta(newest)
        if meta["data"] != _data(self.experiment):
            raise UserError(
                f"--workdir={self.workdir} holds a run on other images: its classes or their "
                "counts differ from what config.data names now; restore them or use another workdir"
            )
        index, step = meta["phase"], meta["step"]
        carry: Any = Carry()
        for phase in self.phases[:index]:
            carry = jax.eval_shape(lambda c, p=phase: p.finish(p.init(c), c), carry)
            carry = dataclasses.replace(carry, student=None)
        state = jax.eval_shape(self.phases[index].init, carry) if step else None
        restored = self.checkpoints.restore(newest, {"carry": carry, "state": state})
        restored = parallel.replicate(self.experiment.mesh, restored)
        records = Records.from_dict(meta["records"])
        return restored["carry"], restored["state"], index, step, records

    def _report(self, records: Records) -> dict:
        """The summary; the process that writes reports also writes it and the plots."""
        config, schedule = self.config, self.experiment.schedule
        summary = metrics.summary(
            method="skd" if config.stage_two.delegator else "skd without delegator",
            dataset=config.data.name,
            seed=config.seed,
            classes_per_task=[len(classes) for classes in schedule],
            class_order=[c for classes in schedule for c in classes],
            rows=records.rows,
            delegator=records.delegator,
            seconds=records.seconds,
            device=device_description(),
        )
        summary["class_names"] = _data(self.experiment)["classes"]
        if not parallel.leads():
            return summary
        plots.accuracy_curve(summary, self.workdir / "accuracy_curve.png")
        plots.accuracy_matrix(summary, self.workdir / "accuracy_matrix.png")
        _write_json(self.workdir / "summary.json", summary)  # last: it says that all is there
        return summary


def _data(experiment: Experiment) -> dict[str, Any]:
    """What a resumed run must find again: each task's classes and number of images."""
    names = experiment.source.class_names
    classes = [[names[c] for c in task] for task in experiment.schedule]
    return {"classes": classes, "images": list(experiment.stream.counts())}


def device_description() -> str:
    """What this process computes on, in words."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, jax {jax.__version__}"


def _check_same_config(config: Config, workdir: Path) -> None:
    """Raises UserError if the workdir holds a run of another configuration."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); restore it or use another workdir"
        ) from error
    here = json.loads(json.dumps(to_dict(config)))
    if different := _differences(_what_is_computed(saved), _what_is_computed(here)):
        field, there, now = different[0]
        raise UserError(
            f"--workdir={workdir} holds a run with config.{field}={there}, not {now}; "
            "give the config it was started with, or another workdir"
        )


def _what_is_computed(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what may differ between starts of one run."""
    kept = {name: part for name, part in fields.items() if name != "run"}  # how a run goes
    if "data" in kept:  # the same images may have moved
        kept["data"] = {name: x for name, x in kept["data"].items() if name != "data_dir"}
    return kept


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        prefix = f"{path}." if path else ""
        found = [_differences(a.get(n), b.get(n), prefix + n) for n in names]
        return [difference for differences in found for difference in differences]
    return [] if a == b else [(path, a, b)]


def _means(pending: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric over all steps of the calls since the last log."""
    fetched = jax.device_get(list(pending))
    return {name: float(np.mean(np.concatenate([f[name] for f in fetched]))) for name in fetched[0]}


def _check_finite(means: dict[str, float], phase: Phase, step: int) -> None:
    for name, value in means.items():
        if not np.isfinite(value):
            raise UserError(
                f"{name} is {value} near task {phase.task}, {phase.name}, {phase.unit} {step}; "
                "lower the rates or the term's weight, in another workdir"
            )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _write_json(path: Path, values: dict) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)

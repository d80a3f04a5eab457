"""The resumable loop over (task, phase, step), the same for every method, and its reports."""

import contextlib
import dataclasses
import datetime
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import evaluate, metrics, parallel, plots
from skd_jax.calls import Calls
from skd_jax.checkpoint import Checkpoint, Checkpoints
from skd_jax.compiler import compiled, drop_programs, platform
from skd_jax.config import Config, to_dict
from skd_jax.data import TaskImages
from skd_jax.errors import Interrupted, UserError
from skd_jax.experiment import Experiment
from skd_jax.machine import machine
from skd_jax.measured import Measured, Window, scalars
from skd_jax.methods import method_of
from skd_jax.methods.phase import Phase, Watched
from skd_jax.progress import Progress
from skd_jax.stepping import Stepping
from skd_jax.stopping import StopSignals
from skd_jax.timing import whole_run
from skd_jax.writer import LOG, Writer, drawing, keep_rows, read_json, write_json, writing

MEASURED_SECONDS = 10.0  # of a phase's steps, before a run's time is said from them
DROP_ALL = 5  # tasks between two times that all programs are dropped
CALL_BYTES = 64 * 2**20  # of the images of one compiled call: they are filled up to its length


@contextlib.contextmanager
def of_this_version(saved: Checkpoint) -> Iterator[None]:
    """Makes what is amiss in a sound checkpoint's meta, which someone else wrote, a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"checkpoint {saved.path} was not saved by this version of skd_jax "
            f"({type(error).__name__} in its meta); use the version it was saved with, or another "
            "workdir"
        ) from error


@dataclasses.dataclass
class Position:
    """Where a run is, and all that it needs to go on from there: what a checkpoint holds.

    After a phase's last step comes its evaluation, so a phase of n steps has n + 1 positions.
    """

    phase: int
    kept: Any  # what earlier phases have left: the method's own ``kept``
    step: int = 0  # to be made next; as many as the phase has: the evaluation is next
    state: Any = None  # in training; None at a phase's start
    window: Window = dataclasses.field(default_factory=Window)  # the steps that are not logged yet
    measured: Measured = dataclasses.field(default_factory=Measured)


class Run:
    """One process's part of a run: from the newest checkpoint to the end."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        saved: Checkpoint | None,
        origin: Checkpoint | None = None,
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.method = method_of(experiment.config)
        self.phases = experiment.phases
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.say = say
        self.starts = np.cumsum([0, *(phase.steps for phase in self.phases)]).tolist()
        self.saved = saved
        self.newest = saved.step if saved else -1
        self.first, kept = experiment.start()
        self.last = min(self.config.run.phases or len(self.phases), len(self.phases))
        self.at = Position(self.first, kept)
        if found := saved or origin:
            self.at = self._restored(found)
        if not saved:
            self.at.measured.logged = 0  # what ``origin`` logged is not in this run's log
        self.told: set[int] = set()  # phases in which the time was said
        self.stop = StopSignals()

    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.at.phase >= self.last

    def results(self) -> dict:
        """What a run that is over has found."""
        assert self.saved
        self.say(f"this run is finished; its results are in {self.workdir}")
        with of_this_version(self.saved):
            summary = self._summary()
            self._say_table()
        if parallel.is_first_process():
            with writing(self.workdir / LOG):
                self._tell_lost_rows(keep_rows(self.workdir / LOG, self._global_step()))
        found = read_json(self.workdir / "summary.json")
        if found and found == {**summary, "device": found.get("device"), "date": found.get("date")}:
            return found
        return self._report()

    def go(self) -> dict:
        """Trains from what was saved, or from the start, to the end."""
        at = self.at
        if self.saved:
            self.say(f"going on at {self._where()}")
        else:
            if self.experiment.given:
                at.kept = parallel.replicate(self.experiment.mesh, at.kept)
                at.measured.rows = [self._row(at.kept, 1)]
            # Before all else, so that a run without a checkpoint has lost it.
            self._save()
            self.checkpoints.wait()
        with parallel.in_every_process(self._writer) as writer, self.stop:
            while not self.is_finished():
                phase = self.phases[at.phase]
                with self.experiment.opened(phase, at.kept) as images:
                    self._train(phase, images, writer)
                    self._end(phase, images)
                self._save()
                if not self.is_finished():
                    self._stop_if_told()
                    if (task := self.phases[at.phase].task) > phase.task:
                        drop_programs(all_of_them=task % DROP_ALL == 0)
        self.checkpoints.wait()
        self.say(f"finished; results are in {self.workdir}")
        return self._report()

    def _stop_if_told(self) -> None:
        if code := self.stop.poll():
            self._save()
            raise self._interrupted(code)

    def _writer(self) -> contextlib.AbstractContextManager[Writer | None]:
        """Opens the log, in the one process that writes it."""
        if not parallel.is_first_process():
            return contextlib.nullcontext()
        write_json(self.workdir / "config.json", to_dict(self.config))
        if files := self.experiment.files():
            write_json(self.workdir / "files.json", files)
        writer = Writer(self.workdir, self._global_step())
        self._tell_lost_rows(writer.rows)
        return writer

    def _tell_lost_rows(self, found: int) -> None:
        if lost := self.at.measured.logged - found:
            self.say(f"warning: {lost} of the rows in {self.workdir / LOG} are lost or damaged")

    def _train(self, phase: Phase, images: TaskImages | None, writer: Writer | None) -> None:
        """Makes the rest of a phase's steps."""
        at, run, mesh = self.at, self.config.run, self.experiment.mesh
        since = time.perf_counter()
        most = steps_per_call(self.config, phase)
        stepping = Stepping(phase, self.experiment.setting, mesh, images, most)
        if at.state is None:
            at.state = parallel.replicate(mesh, phase.init(parallel.to_host(mesh, at.kept)))
        due = None  # steps to be logged, and the step they end before

        with Progress(
            total=phase.steps,
            initial=at.step,
            task=phase.task,
            phase=phase.name,
            unit=phase.unit,
            first=("skipped", *phase.shown),
            shown=parallel.is_first_process(),
        ) as progress:

            def ended(step: int) -> None:
                progress.reach(step)
                self._tell_time(phase, progress)

            calls = Calls(most, ended)

            def end(step: int) -> int:
                """Where a call from this step ends: none passes a step that is logged or saved."""
                every = run.log_every, run.checkpoint_every
                nexts = (step // n * n + n for n in every)
                return min(step + calls.length, phase.steps, *nexts)

            while at.step < phase.steps:
                stop = end(at.step)
                at.state, values = calls.begin(
                    lambda stop=stop: stepping(at.state, at.kept, at.step, stop, end(stop)), stop
                )
                if due:  # now that the devices have the next call to work on
                    self._log(*due, writer, progress)
                    due = None
                at.window.calls.append((stop - at.step, values))
                saves = stop // run.checkpoint_every > at.step // run.checkpoint_every
                logs = stop // run.log_every > at.step // run.log_every
                at.step = stop
                ends = stop == phase.steps
                if logs or saves or ends:
                    due, at.window = (at.window, stop), Window()
                stop_code = self.stop.poll()
                if due and (saves or stop_code is not None or ends):  # nothing is saved unlogged
                    self._log(*due, writer, progress)
                    due = None
                if stop_code is not None or (saves and not ends):
                    since = at.measured.add_seconds(phase.name, since)
                    self._save()
                if stop_code is not None:
                    raise self._interrupted(stop_code)
            calls.wait()
        at.measured.add_seconds(phase.name, since)

    def _tell_time(self, phase: Phase, progress: Progress) -> None:
        """Says once a phase how long the run will take, as soon as its steps are known."""
        at = self.at
        if at.phase in self.told or progress.measured < MEASURED_SECONDS or not progress.seconds:
            return
        self.told.add(at.phase)
        phases, number = self.phases[self.first : self.last], at.phase - self.first
        done = Counter({p.name: 0 for p in phases})
        for earlier in phases[:number]:
            done[earlier.name] += earlier.steps
        spent = at.measured.seconds
        known = {name: spent[name] / n for name, n in done.items() if n and name in spent}
        known[phase.name] = progress.seconds
        device = None if self.experiment.given else platform()
        for line in whole_run(phases, known, number, at.step, device):
            progress.say(line, self.say)

    def _log(self, window: Window, step: int, writer: Writer | None, progress: Progress) -> None:
        """Logs the steps of a window, which ends before ``step``, and looks whether all is well."""
        phase, run, values = self.phases[self.at.phase], self.config.run, window.steps()
        means = scalars(values)
        watched = phase.watch(values) if phase.watch else None
        if watched:  # which has its own words for vectors
            means = scalars({name: x for name, x in values.items() if x.ndim == 1})
            means |= watched.logged
        self.at.measured.logged += 1
        if writer:
            position = {"task": phase.task, "phase": phase.name, "step": step}
            writer.write(means, **position, global_step=self.starts[self.at.phase] + step)
        shown = {name: x for name, x in means.items() if x or name != "skipped"}
        progress.reach(step, shown)
        where = f"task {phase.task}, {phase.name}, {phase.unit}"
        if missed := self.at.measured.count_skipped(
            values["skipped"], where, step, run.max_skipped
        ):
            progress.say(
                f"warning: {missed} of the {len(values['skipped'])} {phase.unit}s up to {where} "
                f"{step} met numbers that are not finite, and left them out",
                self.say,
            )
        if watched:
            self._heed(phase, step, watched, progress)

    def _heed(self, phase: Phase, step: int, watched: Watched, progress: Progress) -> None:
        """Remembers what a phase has seen, and tells of what alarms it."""
        run, measured = self.config.run, self.at.measured
        measured.remembered |= watched.remembered
        if not watched.alarm or step <= phase.steps // 10:  # at first all looks alike
            return
        words = f"{watched.alarm} at task {phase.task}, {phase.name}, {phase.unit} {step}: "
        words += watched.why
        if run.stop_at_collapse:
            raise UserError(
                f"{words}; {watched.advice}, in another workdir, or "
                "give --config.run.stop_at_collapse=False to go on"
            )
        if measured.alarmed != self.at.phase:
            measured.alarmed = self.at.phase
            progress.say(f"warning: {words}", self.say)

    def _end(self, phase: Phase, images: TaskImages | None) -> None:
        """Ends a phase: what it leaves, and what is measured, which is for the report only."""
        since = time.perf_counter()
        at, measured, mesh = self.at, self.at.measured, self.experiment.mesh
        take = images.take if images else no_images
        state, kept = parallel.to_host(mesh, (at.state, at.kept))
        kept = phase.finish(state, kept, take)
        kept = parallel.replicate(mesh, kept)
        # Nothing of the position changes before all is measured.
        tasks = phase.task + 1 if phase.ends_task else len(measured.rows)
        report = row = None
        if phase.ends_task:
            row = self._row(kept, phase.task + 1)
        if phase.report:
            probe = evaluate.Probe(self.experiment, tasks, self.workdir, self._stop_if_told)
            report = phase.report(at.state, kept, measured.remembered, probe)
        if row:  # a later phase of the same task measures it anew
            measured.rows[phase.task :] = [row]
        if report is not None:
            measured.reports.setdefault(phase.name, []).append(report)
        if row:
            self._say_table()
        measured.remembered = {}
        at.kept, at.phase, at.step, at.state = kept, at.phase + 1, 0, None
        measured.add_seconds("evaluate", since)

    def _row(self, kept: Any, tasks: int) -> metrics.Row:
        """The accuracies on the first tasks' test images."""
        predicted = evaluate.predictions(self.experiment, kept, tasks, self._stop_if_told)
        return evaluate.accuracy(self.experiment, predicted)

    def _say_table(self) -> None:
        lines = metrics.table(self.at.measured.rows)
        more = self.method.describe(self.at.measured.reports)
        self.say(f"{lines}\n{more}" if more else lines)

    def _save(self) -> None:
        """Saves where the run is, unless that is saved already."""
        at = self.at
        if self.newest == self._number():
            return
        arrays = {"kept": at.kept, "state": at.state}
        if not all_finite(arrays):
            raise UserError(
                f"weights are not finite at {self._where()}, so they are not saved; "
                "lower the rates and start in another workdir"
            )
        meta = {
            "phase": at.phase,
            "step": at.step,
            "window": at.window.to_lists(),
            "measured": dataclasses.asdict(at.measured),
            "data": self.experiment.data(),
            "config": to_dict(self.config),
            "machine": self.machine(),
        }
        self.checkpoints.save(self._number(), arrays, meta)
        self.newest = self._number()

    def machine(self) -> dict[str, Any]:
        """What the bits of this run depend on here, see :func:`skd_jax.machine.machine`."""
        mesh = self.experiment.mesh
        return machine(mesh.size if mesh else 1, steps_per_call(self.config))

    def _restored(self, saved: Checkpoint) -> Position:
        first, kept = self.experiment.start()
        with of_this_version(saved):
            index, step = operator.index(saved.meta["phase"]), operator.index(saved.meta["step"])
            window = Window.from_lists(saved.meta["window"])
            measured = Measured.from_dict(saved.meta["measured"])
            last = self.phases[index].steps if index < len(self.phases) else 0
            if not (first <= index <= len(self.phases) and 0 <= step <= last):
                raise IndexError("phase or step")
            if saved.step != self._number(index, step):
                raise ValueError("step")
            reporting = Counter(phase.name for phase in self.phases[:index] if phase.report)
            if {name: len(rows) for name, rows in measured.reports.items()} != reporting:
                raise ValueError("reports")
            self.method.describe(measured.reports)  # raises if they are not the method's
        for phase in self.phases[first:index]:
            kept = jax.eval_shape(lambda k, p=phase: p.finish(p.init(k), k, self._shapes), kept)
        state = jax.eval_shape(self.phases[index].init, kept) if step else None
        arrays = saved.into({"kept": kept, "state": state})
        arrays = parallel.replicate(self.experiment.mesh, arrays)
        return Position(index, arrays["kept"], step, arrays["state"], window, measured)

    def _shapes(self, indices: Any) -> jax.Array:
        """In place of images where only shapes count."""
        data = self.config.data
        shape = (len(indices), data.load_size, data.load_size, data.channels)
        return jnp.zeros(shape, jnp.uint8)

    def _global_step(self) -> int:
        return self.starts[self.at.phase] + self.at.step

    def _number(self, phase: int | None = None, step: int | None = None) -> int:
        """A position's number among all of the run, which is its checkpoint's."""
        phase = self.at.phase if phase is None else phase
        step = self.at.step if step is None else step
        return self.starts[phase] + phase + step

    def _where(self) -> str:
        if self.is_finished():
            return "the end"
        phase = self.phases[self.at.phase]
        return f"task {phase.task}, {phase.name}, {phase.unit} {self.at.step}"

    def _interrupted(self, exit_code: int) -> Interrupted:
        self.checkpoints.wait()
        return Interrupted(
            f"stopped at {self._where()}, which is saved in {self.workdir / 'checkpoints'}; "
            "the same command goes on from there",
            exit_code,
        )

    def _summary(self) -> dict[str, Any]:
        config, schedule, measured = self.config, self.experiment.schedule, self.at.measured
        names = self.experiment.data()["classes"]
        remarks = self.method.remarks(names, measured.reports)
        return metrics.summary(
            method=self.method.title(config.method),
            dataset=config.data.name,
            seed=config.seed,
            classes_per_task=[len(classes) for classes in schedule],
            class_order=[c for classes in schedule for c in classes],
            class_names=names,
            rows=measured.rows,
            reports={p.name: [] for p in self.phases if p.report} | measured.reports,
            kept_bytes=kept_bytes(self.at.kept) + self._stored_bytes(),
            skipped_steps=measured.skipped,
            seconds=measured.seconds,
            device=evaluate.device_description(),
            date=datetime.date.today().isoformat(),
            remarks=[*remarks, *metrics.failed(measured.rows[-1], names)],
        )

    def _stored_bytes(self) -> int:
        """Bytes of old images, of a method that keeps them all."""
        data = self.config.data
        images = sum(self.experiment.stream.counts()) if self.method.reads_old_images else 0
        return images * data.load_size**2 * data.channels

    def _report(self) -> dict[str, Any]:
        """The summary; the process that writes reports also writes it and the plots."""
        summary = self._summary()
        if parallel.is_first_process():
            for draw in (plots.accuracy_curve, plots.accuracy_matrix):
                with drawing(path := self.workdir / f"{draw.__name__}.png"):
                    draw(summary, path)
            write_json(self.workdir / "summary.json", summary)  # last: it says that all is there
        return summary


def steps_per_call(config: Config, phase: Phase | None = None) -> int:
    """How many steps one compiled call makes, at most.

    No call passes a step that is logged or saved, and where the number is chosen here, a call's
    images take no more than ``CALL_BYTES``, unless one batch does.

    Args:
      config: of the run.
      phase: whose steps they are; None: any that reads no images.
    """
    run, data = config.run, config.data
    most = run.steps_per_call
    if not most:
        most = 1 if platform() == "cpu" else 25
        if phase and phase.reads != "nothing":
            batch = phase.batch * data.load_size**2 * data.channels
            most = max(1, min(most, CALL_BYTES // batch))
    return min(most, run.log_every, run.checkpoint_every)


def no_images(indices: Any) -> Any:
    """What a phase that reads no image is given to take images by."""
    raise RuntimeError(f"images {indices} were asked for by a phase that reads none")


def kept_bytes(kept: Any) -> int:
    """Bytes of what a method keeps between tasks beside the classifier."""
    beside = jax.tree.leaves(dataclasses.replace(kept, classifier=None))
    return sum(leaf.nbytes for leaf in beside)


@compiled()
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack([jnp.array(True), *leaves]))

"""The resumable loop over (task, phase, step), the same for every method, and its reports."""

import contextlib
import dataclasses
import datetime
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import evaluate, metrics, parallel, plots, quality
from skd_jax.checkpoint import Checkpoint, Checkpoints
from skd_jax.config import to_dict
from skd_jax.errors import Interrupted, UserError
from skd_jax.experiment import Experiment
from skd_jax.measured import Measured, Window, collapse, scalars
from skd_jax.methods.phase import Phase
from skd_jax.state import Carry
from skd_jax.stopping import StopSignals
from skd_jax.writer import LOG, Progress, Writer, keep_rows, read_json, write_json, writing


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

    phase: int = 0
    step: int = 0  # to be made next; as many as the phase has: the evaluation is next
    carry: Carry = dataclasses.field(default_factory=Carry)
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
        self.phases = experiment.phases
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.say = say
        self.starts = np.cumsum([0, *(phase.steps for phase in self.phases)]).tolist()
        self.saved = saved
        self.newest = saved.step if saved else -1
        self.at = Position()
        if found := saved or origin:
            self.at = self._restored(found)
        if not saved:
            self.at.measured.logged = 0  # what ``origin`` logged is not in this run's log
        self.stop = StopSignals()

    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.at.phase >= min(self.config.run.phases or len(self.phases), len(self.phases))

    def results(self) -> dict:
        """What a run that is over has found."""
        assert self.saved
        measured = self.at.measured
        self.say(f"this run is finished; its results are in {self.workdir}")
        with of_this_version(self.saved):
            summary = self._summary()
            self.say(metrics.table(measured.rows, measured.delegator))
        if parallel.leads():
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
            # Before all else, so that a run without a checkpoint is one that has lost it.
            self._save()
            self.checkpoints.wait()
        with parallel.together(self._writer) as writer, self.stop:
            while not self.is_finished():
                self._train(self.phases[at.phase], writer)
                self._evaluate(self.phases[at.phase])
                self._save()
                if not self.is_finished():
                    self._stop_if_told()
        self.checkpoints.wait()
        self.say(f"finished; results are in {self.workdir}")
        return self._report()

    def _stop_if_told(self) -> None:
        if code := self.stop.poll():
            self._save()
            raise self._interrupted(code)

    def _writer(self) -> contextlib.AbstractContextManager[Writer | None]:
        """Opens the log, in the one process that writes it."""
        if not parallel.leads():
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

    def _train(self, phase: Phase, writer: Writer | None) -> None:
        """Makes the rest of a phase's steps."""
        at, run = self.at, self.config.run
        since = time.perf_counter()
        task = self.experiment.stream.open(phase.task) if phase.reads_images else None
        if at.state is None:
            mesh = self.experiment.mesh
            at.state = parallel.replicate(mesh, phase.init(parallel.to_host(mesh, at.carry)))
        length = run.steps_per_call or (1 if jax.default_backend() == "cpu" else 25)
        due = None  # steps to be logged, and the step they end before

        open_task = contextlib.closing(task) if task else contextlib.nullcontext()
        with (
            open_task,
            Progress(
                total=phase.steps,
                initial=at.step,
                task=phase.task,
                phase=phase.name,
                unit=phase.unit,
                shown=parallel.leads(),
            ) as progress,
        ):
            while at.step < phase.steps:
                # Calls end on one grid wherever a run began, so that a resumed one makes the same.
                stop = min(at.step - at.step % length + length, phase.steps)
                at.state, values = phase.call(at.state, at.carry, task, at.step, stop)
                if due:  # now that the devices have the next call to work on
                    self._log(*due, writer, progress)
                    due = None
                at.window.calls.append(values)
                saves = stop // run.checkpoint_every > at.step // run.checkpoint_every
                logs = stop // run.log_every > at.step // run.log_every
                at.step = stop
                ends = stop == phase.steps
                if logs or saves or ends:
                    due, at.window = (at.window, stop), Window()
                told = self.stop.poll()
                if due and (saves or told or ends):  # nothing is saved unlogged
                    self._log(*due, writer, progress)
                    due = None
                if told or (saves and not ends):
                    since = at.measured.add_seconds(phase.name, since)
                    self._save()
                if told:
                    raise self._interrupted(told)
        jax.block_until_ready(at.state)
        at.measured.add_seconds(phase.name, since)

    def _log(self, window: Window, step: int, writer: Writer | None, progress: Progress) -> None:
        """Logs the steps of a window, which ends before ``step``, and looks whether all is well."""
        phase, run, values = self.phases[self.at.phase], self.config.run, window.steps()
        means = scalars(values)
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
            self.say(
                f"warning: {missed} of the {len(values['skipped'])} {phase.unit}s up to {where} "
                f"{step} met numbers that are not finite, and left them out"
            )
        if "label_shares" in values:
            self._watch(phase, step, values)

    def _watch(self, phase: Phase, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Looks whether the delegator's images all fall into one class."""
        run, measured = self.config.run, self.at.measured
        labels, found = collapse(values, run.collapse_share)
        if math.isfinite(labels["label_entropy"]):  # not so if all the rounds were skipped
            measured.labels = labels
        if not found or step <= phase.steps // 10:  # a new delegator's images look all alike
            return
        where = f"task {phase.task}, {phase.name}, {phase.unit} {step}"
        if run.stop_at_collapse:
            raise UserError(
                f"the delegator has collapsed at {where}: {found}; weigh "
                "config.stage_one.terms.diversity more or lower the rates, in another workdir, or "
                "give --config.run.stop_at_collapse=False to go on"
            )
        if measured.collapsed != phase.task:
            measured.collapsed = phase.task
            self.say(f"warning: the delegator has collapsed at {where}: {found}")

    def _evaluate(self, phase: Phase) -> None:
        """Ends a phase with the test accuracies it calls for, which are for the report only."""
        since = time.perf_counter()
        carry, measured = phase.finish(self.at.state, self.at.carry), self.at.measured
        predict = functools.partial(
            evaluate.predictions, self.experiment, between=self._stop_if_told
        )
        tasks = len(measured.rows)  # learned before this phase
        assert carry.classifier is not None
        # Nothing of the position changes before all is measured.
        if phase.name == "delegator":
            teacher = predict(carry.classifier, tasks)
            student = predict(evaluate.student(carry), tasks)
            row = metrics.DelegatorRow(
                task=phase.task,
                teacher_accuracy=measured.rows[-1].top1,
                student_accuracy=evaluate.accuracy(self.experiment, student).top1,
                agreement=evaluate.agreement(teacher, student),
                **measured.labels,
            )
            self._examine(carry, row)
            measured.delegator.append(row)
            carry = dataclasses.replace(carry, student=None)
        else:
            predicted = predict(carry.classifier, tasks + 1)
            measured.rows.append(evaluate.accuracy(self.experiment, predicted))
            self.say(metrics.table(measured.rows, measured.delegator))
        at = self.at
        at.carry, at.phase, at.step, at.state = carry, at.phase + 1, 0, None
        measured.add_seconds("evaluate", since)

    def _examine(self, carry: Carry, row: metrics.DelegatorRow) -> None:
        """Pictures what D_n draws and writes down what T_n makes of it."""
        run, task, tasks = self.config.run, row.task, len(self.at.measured.rows)
        count = max(run.pseudo_images, run.quality_images)
        if not count:
            return
        assert carry.classifier is not None and carry.delegator is not None
        images = evaluate.pseudo_images(self.experiment, carry.delegator, task, count)
        mean, std = self.config.data.mean, self.config.data.std
        if run.pseudo_images and parallel.leads():
            path = self.workdir / f"pseudo_images_{task}.png"
            with writing(path):
                plots.image_grid(images[: run.pseudo_images], path, mean, std)
        if not run.quality_images:
            return
        look = functools.partial(quality.look, self.experiment, carry.classifier)
        pseudo = look(images[: run.quality_images], between=self._stop_if_told)
        real = quality.real_images(self.experiment, tasks, run.quality_images)
        found = quality.report(carry.classifier, pseudo, look(real, between=self._stop_if_told))
        if parallel.leads():
            names = [name for names in self.experiment.data()["classes"][:tasks] for name in names]
            write_json(
                self.workdir / f"delegator_{task}.json",
                {
                    "teacher_accuracy": row.teacher_accuracy,
                    "student_accuracy": row.student_accuracy,
                    "agreement": row.agreement,
                    "classes": names,
                    **found,
                },
            )
            path = self.workdir / f"pseudo_images_by_class_{task}.png"
            with writing(path):
                plots.class_grid(
                    images[: len(pseudo.labels)], pseudo.labels, names, path, mean, std
                )

    def _save(self) -> None:
        """Saves where the run is, unless that is saved already."""
        at = self.at
        if self.newest == self._number():
            return
        arrays = {"carry": at.carry, "state": at.state}
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
        }
        self.checkpoints.save(self._number(), arrays, meta)
        self.newest = self._number()

    def _restored(self, saved: Checkpoint) -> Position:
        with of_this_version(saved):
            index, step = operator.index(saved.meta["phase"]), operator.index(saved.meta["step"])
            window = Window.from_lists(saved.meta["window"])
            measured = Measured.from_dict(saved.meta["measured"])
            last = self.phases[index].steps if index < len(self.phases) else 0
            if not (0 <= index <= len(self.phases) and 0 <= step <= last):
                raise IndexError("phase or step")
            if saved.step != self._number(index, step):
                raise ValueError("step")
        carry: Any = Carry()
        for phase in self.phases[:index]:
            carry = jax.eval_shape(lambda c, p=phase: p.finish(p.init(c), c), carry)
            carry = dataclasses.replace(carry, student=None)
        state = jax.eval_shape(self.phases[index].init, carry) if step else None
        arrays = saved.into({"carry": carry, "state": state})
        arrays = parallel.replicate(self.experiment.mesh, arrays)
        return Position(index, step, arrays["carry"], arrays["state"], window, measured)

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
        return metrics.summary(
            method="skd" if config.stage_two.delegator else "skd without delegator",
            dataset=config.data.name,
            seed=config.seed,
            classes_per_task=[len(classes) for classes in schedule],
            class_order=[c for classes in schedule for c in classes],
            class_names=self.experiment.data()["classes"],
            rows=measured.rows,
            delegator=measured.delegator,
            skipped_steps=measured.skipped,
            seconds=measured.seconds,
            device=evaluate.device_description(),
            date=datetime.date.today().isoformat(),
        )

    def _report(self) -> dict[str, Any]:
        """The summary; the process that writes reports also writes it and the plots."""
        summary = self._summary()
        if parallel.leads():
            with writing(self.workdir):
                plots.accuracy_curve(summary, self.workdir / "accuracy_curve.png")
                plots.accuracy_matrix(summary, self.workdir / "accuracy_matrix.png")
            write_json(self.workdir / "summary.json", summary)  # last: it says that all is there
        return summary


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack([jnp.array(True), *leaves]))

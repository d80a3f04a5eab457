"""One run of those that are trained at once: what is measured and said of it, and where."""

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from skd_jax import evaluate, metrics, parallel, plots
from skd_jax.config import to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import Experiment
from skd_jax.files import GO_ON, read_json, write_json, writing
from skd_jax.measured import Measured, scalars
from skd_jax.methods import method_of
from skd_jax.methods.phase import Phase, Watched
from skd_jax.paths import replica_folder
from skd_jax.state import CLASSIFIES
from skd_jax.writer import LOG, Writer, drawing, keep_rows


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is measured at the end of a phase.

    Attributes:
      phase: it.
      row: the accuracies, if a task has been learned.
      report: the phase's, if it gives one.
    """

    phase: Phase
    row: metrics.Row | None
    report: dict[str, Any] | None


class Replica:
    """What belongs to one seed.

    Attributes:
      experiment: with the seed's own random keys and phases.
      phases: these.
      workdir: where its log, pictures and summary go.
      measured: what has been measured so far.
    """

    def __init__(
        self, experiment: Experiment, workdir: Path, say: Callable[[str], None], alone: bool
    ):
        """Nothing has been measured yet.

        Args:
          experiment: of one seed, see :meth:`Experiment.replicas`.
          workdir: of the whole run.
          say: prints a line for people.
          alone: whether it is the only one, so that nobody has to be told which it is.
        """
        seed = experiment.config.seed
        self.experiment = experiment
        self.phases = experiment.phases
        self.workdir = workdir if alone else replica_folder(workdir, seed)
        self.measured = Measured()
        self._say = say
        self._alone = alone
        self._label = "" if alone else f"seed {seed}: "
        self._method = method_of(experiment.config)
        self._writer: Writer | None = None

    def open_log(self, global_step: int) -> Writer:
        """Opens its log, to go on behind a global step; in the one process that writes it."""
        if not self._alone:
            with writing(self.workdir, GO_ON):
                self.workdir.mkdir(exist_ok=True)
            write_json(self.workdir / "config.json", to_dict(self.experiment.config))
        self._writer = Writer(self.workdir, global_step)
        self._tell_lost_rows(self._writer.rows)
        return self._writer

    def _tell_lost_rows(self, found: int) -> None:
        if lost := self.measured.logged - found:
            self._say(f"warning: {lost} of the rows in {self.workdir / LOG} are lost or damaged")

    def log(
        self, number: int, values: dict[str, np.ndarray], step: int, global_step: int
    ) -> tuple[dict[str, float], Watched | None]:
        """Logs some steps.

        Args:
          number: of their phase.
          values: their metrics, by name [n] or [n, K].
          step: the one behind them.
          global_step: the same within the run.

        Returns:
          What is logged, and what the phase makes of them.
        """
        phase = self.phases[number]
        means = scalars(values)
        watched = phase.watch(values) if phase.watch else None
        if watched:  # which has its own words for vectors
            means = scalars({name: x for name, x in values.items() if x.ndim == 1})
            means |= watched.logged
        self.measured.logged += 1
        if self._writer:
            position = {"task": phase.task, "phase": phase.name, "step": step}
            self._writer.write(means, **position, global_step=global_step)
        return means, watched

    def look(
        self,
        number: int,
        values: dict[str, np.ndarray],
        watched: Watched | None,
        step: int,
        say: Callable[[str, Callable[[str], None]], None],
    ) -> None:
        """Looks whether all is well after some steps, see :meth:`log`.

        Args:
          number: as there.
          values: as there.
          watched: as that returned it.
          step: as there.
          say: has a line said, by what prints it.

        Raises:
          UserError: the run is to stop.
        """
        phase, run, measured = self.phases[number], self.experiment.config.run, self.measured
        where = f"{self._label}task {phase.task}, {phase.name}, {phase.unit}"
        if missed := measured.count_skipped(values["skipped"], where, step, run.max_skipped):
            say(
                f"warning: {missed} of the {len(values['skipped'])} {phase.unit}s up to {where} "
                f"{step} met numbers that are not finite, and left them out",
                self._say,
            )
        if not watched:
            return
        measured.remembered |= watched.remembered
        if not watched.alarm or step <= phase.steps // 10:  # at first all looks alike
            return
        words = f"{watched.alarm} at {where} {step}: {watched.why}"
        if run.stop_at_collapse:
            raise UserError(
                f"{words}; {watched.advice}, in another workdir, or "
                "give --config.run.stop_at_collapse=False to go on"
            )
        if measured.alarmed != number:
            measured.alarmed = number
            say(f"warning: {words}", self._say)

    def measure(self, number: int, state: Any, kept: Any, between: Callable[[], None]) -> Ended:
        """Measures what is measured at the end of a phase; nothing of the replica changes.

        Args:
          number: of the phase.
          state: as its last step left it.
          kept: what it leaves.
          between: called now and then; it may raise to stop.
        """
        phase, measured, mesh = self.phases[number], self.measured, self.experiment.mesh
        tasks = phase.task + 1 if phase.ends_task else len(measured.rows)
        kept, row, report = parallel.replicate(mesh, kept), None, None
        if phase.ends_task:
            row = self.row(kept, tasks, between)
        if phase.report:
            probe = evaluate.Probe(self.experiment, tasks, self.workdir, between)
            state = parallel.replicate(mesh, state)
            report = phase.report(state, kept, measured.remembered, probe)
        return Ended(phase, row, report)

    def row(self, kept: Any, tasks: int, between: Callable[[], None] = lambda: None) -> metrics.Row:
        """The accuracies on the first tasks' test images."""
        predicted = evaluate.predictions(self.experiment, kept, tasks, between)
        return evaluate.accuracy(self.experiment, predicted)

    def end(self, ended: Ended) -> None:
        """Ends a phase."""
        if ended.row:  # a later phase of the same task measures it anew
            self.measured.rows[ended.phase.task :] = [ended.row]
        if ended.report is not None:
            self.measured.reports.setdefault(ended.phase.name, []).append(ended.report)
        if ended.row:
            self.say_table()
        self.measured.remembered = {}

    def say_table(self) -> None:
        """Says the accuracies so far, and what the method adds."""
        lines = metrics.table(self.measured.rows)
        more = self._method.describe(self.measured.reports)
        words = f"{lines}\n{more}" if more else lines
        self._say(f"{self._label}\n{words}" if self._label else words)

    def summary(self, kept_bytes: int) -> dict[str, Any]:
        """The results, of which ``kept_bytes`` is what the method keeps beside the classifier."""
        config, schedule, measured = self.experiment.config, self.experiment.schedule, self.measured
        names = self.experiment.data()["classes"]
        remarks = self._method.remarks(names, measured.reports)
        return metrics.summary(
            method=self._method.title(config.method),
            dataset=config.data.name,
            seed=config.seed,
            classes_per_task=[len(classes) for classes in schedule],
            class_order=[c for classes in schedule for c in classes],
            class_names=names,
            rows=measured.rows,
            reports={p.name: [] for p in self.phases if p.report} | measured.reports,
            kept_bytes=kept_bytes + self._stored_bytes(),
            skipped_steps=measured.skipped,
            seconds=measured.seconds,
            device=evaluate.device_description(),
            date=datetime.date.today().isoformat(),
            remarks=[*remarks, *metrics.failed(measured.rows[-1], names)],
        )

    def _stored_bytes(self) -> int:
        """Bytes of old images, of a method that keeps them all."""
        data = self.experiment.config.data
        images = sum(self.experiment.stream.counts()) if self._method.reads_old_images else 0
        return images * data.load_size**2 * data.channels

    def found(self, summary: dict[str, Any], global_step: int) -> dict[str, Any]:
        """The summary of a run that is over, as it is written down; it is, where it is not yet."""
        if parallel.is_first_process():
            with writing(self.workdir / LOG, GO_ON):
                self._tell_lost_rows(keep_rows(self.workdir / LOG, global_step))
        found = read_json(self.workdir / "summary.json")
        if found and found == {**summary, "device": found.get("device"), "date": found.get("date")}:
            return found
        return self.report(summary)

    def report(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The summary; the process that writes reports also writes it and the plots."""
        if parallel.is_first_process():
            with writing(self.workdir, GO_ON):
                self.workdir.mkdir(exist_ok=True)
            for draw in (plots.accuracy_curve, plots.accuracy_matrix):
                with drawing(path := self.workdir / f"{draw.__name__}.png"):
                    draw(summary, path)
            write_json(self.workdir / "summary.json", summary)  # last: it says that all is there
        return summary


def kept_bytes(kept: Any) -> int:
    """Bytes of what a method keeps between tasks beside what it classifies with."""
    beside = [
        getattr(kept, field.name)
        for field in dataclasses.fields(kept)
        if not field.metadata.get(CLASSIFIES)
    ]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(beside))

"""The resumable loop over (task, phase, step), the same for every method, of all replicas."""

import contextlib
import dataclasses
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import groups, metrics, parallel
from skd_jax.calls import Calls
from skd_jax.checkpoint import Checkpoint, Checkpoints
from skd_jax.compiler import drop_programs, platform
from skd_jax.config import Config, to_dict
from skd_jax.data import ReplicaImages, TaskImages
from skd_jax.errors import Interrupted, UserError
from skd_jax.experiment import Experiment
from skd_jax.files import read_json, write_json
from skd_jax.machine import machine
from skd_jax.measured import Measured, Window
from skd_jax.methods import method_of
from skd_jax.methods.phase import Phase
from skd_jax.progress import Progress
from skd_jax.replica import Replica, kept_bytes
from skd_jax.stepping import Stepping
from skd_jax.stopping import StopSignals
from skd_jax.timing import whole_run

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
    """Where a run is, and what it needs to go on from there beside what its replicas have measured.

    What is kept and the state have a leading axis [R, ...] where there are R replicas, not one.
    After a phase's last step comes its evaluation, so a phase of n steps has n + 1 positions.
    """

    phase: int
    kept: Any  # what earlier phases have left: the method's own ``kept``
    step: int = 0  # to be made next; as many as the phase has: the evaluation is next
    state: Any = None  # in training; None at a phase's start
    window: Window = dataclasses.field(default_factory=Window)  # the steps that are not logged yet


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
        each = experiment.replicas()
        self.alone = len(each) == 1
        self.replicas = [Replica(one, workdir, say, self.alone) for one in each]
        self.grid = experiment.grid
        self.at = Position(self.first, self._together([kept] * len(each)), window=self._window())
        if found := saved or origin:
            self.at = self._restored(found)
        if not saved:
            for replica in self.replicas:  # what ``origin`` logged is not in this run's log
                replica.measured.logged = 0
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
            summaries = self._summaries()
            for replica in self.replicas:
                replica.say_table()
        pairs = zip(self.replicas, summaries, strict=True)
        return self._report([one.found(summary, self._global_step()) for one, summary in pairs])

    def go(self) -> dict:
        """Trains from what was saved, or from the start, to the end."""
        at = self.at
        if self.saved:
            self.say(f"going on at {self._where()}")
        else:
            if self.experiment.given:
                kept = parallel.replicate(self.experiment.mesh, self.experiment.given.kept)
                for replica in self.replicas:
                    replica.measured.rows = [replica.row(kept, 1)]
            # Before all else, so that a run without a checkpoint has lost it.
            self._save()
            self.checkpoints.wait()
        with parallel.in_every_process(self._logs), self.stop:
            while not self.is_finished():
                phase = self.phases[at.phase]
                with self._opened() as images:
                    self._train(phase, images)
                    self._end(images)
                self._save()
                if not self.is_finished():
                    self._stop_if_told()
                    if (task := self.phases[at.phase].task) > phase.task:
                        drop_programs(all_of_them=task % DROP_ALL == 0)
        self.checkpoints.wait()
        self.say(f"finished; results are in {self.workdir}")
        pairs = zip(self.replicas, self._summaries(), strict=True)
        return self._report([one.report(summary) for one, summary in pairs])

    def _stop_if_told(self) -> None:
        if code := self.stop.poll():
            self._save()
            raise self._interrupted(code)

    def _logs(self) -> contextlib.ExitStack:
        """Opens the logs, in the one process that writes them."""
        with contextlib.ExitStack() as logs:
            if parallel.is_first_process():
                write_json(self.workdir / "config.json", to_dict(self.config))
                if files := self.experiment.files():
                    write_json(self.workdir / "files.json", files)
                for replica in self.replicas:
                    logs.enter_context(replica.open_log(self._global_step()))
            return logs.pop_all()

    def _opened(self) -> contextlib.AbstractContextManager[TaskImages | ReplicaImages | None]:
        """The images that the phase reads."""
        at = self.at
        if self.alone:
            return self.experiment.opened(self.phases[at.phase], at.kept)
        phases = [replica.phases[at.phase] for replica in self.replicas]
        kept = self._apart(at.kept) if phases[0].replay else [None] * len(phases)
        return self.experiment.opened_to_all(phases, kept)

    def _apart(self, tree: Any) -> list[Any]:
        """Each replica's part, on one device, for work outside the mesh."""
        if self.alone:
            return [parallel.to_host(self.grid, tree)]
        return groups.collect(self.grid, tree, len(self.replicas))

    def _together(self, trees: list[Any]) -> Any:
        """The replicas' parts, on the devices that step them."""
        if self.alone:
            return parallel.replicate(self.grid, trees[0])
        return groups.distribute(self.grid, trees)

    def _window(self) -> Window:
        return Window(replicas=len(self.replicas))

    def _train(self, phase: Phase, images: TaskImages | ReplicaImages | None) -> None:
        """Makes the rest of a phase's steps."""
        at, run = self.at, self.config.run
        since = time.perf_counter()
        most = steps_per_call(self.config, phase)
        seeds = () if self.alone else [one.experiment.config.seed for one in self.replicas]
        stepping = Stepping(phase, self.experiment.setting, self.grid, images, most, seeds)
        if at.state is None:
            pairs = zip(self.replicas, self._apart(at.kept), strict=True)
            at.state = self._together([one.phases[at.phase].init(kept) for one, kept in pairs])
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
                    self._log(*due, progress)
                    due = None
                at.window.calls.append((stop - at.step, values))
                saves = stop // run.checkpoint_every > at.step // run.checkpoint_every
                logs = stop // run.log_every > at.step // run.log_every
                at.step = stop
                ends = stop == phase.steps
                if logs or saves or ends:
                    due, at.window = (at.window, stop), self._window()
                stop_code = self.stop.poll()
                if due and (saves or stop_code is not None or ends):  # nothing is saved unlogged
                    self._log(*due, progress)
                    due = None
                if stop_code is not None or (saves and not ends):
                    since = self._add_seconds(phase.name, since)
                    self._save()
                if stop_code is not None:
                    raise self._interrupted(stop_code)
            calls.wait()
        self._add_seconds(phase.name, since)

    def _add_seconds(self, name: str, since: float, until: float | None = None) -> float:
        """Books the time since then, until now or what is given, for every replica: they share it.

        Returns:
          The time until which it is.
        """
        until = time.perf_counter() if until is None else until
        for replica in self.replicas:
            replica.measured.add_seconds(name, until - since)
        return until

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
        spent = self.replicas[0].measured.seconds
        known = {name: spent[name] / n for name, n in done.items() if n and name in spent}
        known[phase.name] = progress.seconds
        device = None if self.experiment.given else platform()
        for line in whole_run(phases, known, number, at.step, device):
            progress.say(line, self.say)

    def _log(self, window: Window, step: int, progress: Progress) -> None:
        """Logs the steps of a window, which ends before ``step``, and looks whether all is well."""
        number, each = self.at.phase, window.each()
        pairs = list(zip(self.replicas, each, strict=True))
        global_step = self.starts[number] + step
        logged = [replica.log(number, values, step, global_step) for replica, values in pairs]
        every = [means for means, _ in logged]
        common = [name for name in every[0] if all(name in one for one in every)]
        terms = {name: sum(one[name] for one in every) / len(every) for name in common}
        progress.reach(step, {name: x for name, x in terms.items() if x or name != "skipped"})
        for (replica, values), (_, watched) in zip(pairs, logged, strict=True):
            replica.look(number, values, watched, step, progress.say)

    def _end(self, images: TaskImages | ReplicaImages | None) -> None:
        """Ends a phase: what it leaves, and what is measured, which is for the report only."""
        since = time.perf_counter()
        at, number = self.at, self.at.phase
        apart, left = self._apart((at.state, at.kept)), []
        for place, (state, kept) in enumerate(apart):
            take = no_images
            if images:
                take = images.of(place) if isinstance(images, ReplicaImages) else images.take
            left.append(self.replicas[place].phases[number].finish(state, kept, take))
        jax.block_until_ready(left)  # it may still be at work on the phase's end
        finished = time.perf_counter()
        ended = [
            replica.measure(number, state, after, self._stop_if_told)
            for replica, (state, _), after in zip(self.replicas, apart, left, strict=True)
        ]
        # Nothing has changed before all is measured.
        for replica, found in zip(self.replicas, ended, strict=True):
            replica.end(found)
        at.kept, at.phase, at.step, at.state = self._together(left), number + 1, 0, None
        self._add_seconds(self.phases[number].name, since, finished)
        self._add_seconds("evaluate", finished)

    def _save(self) -> None:
        """Saves where the run is, unless that is saved already."""
        at = self.at
        if self.newest == self._number():
            return
        arrays = parallel.reachable({"kept": at.kept, "state": at.state})
        measured = [dataclasses.asdict(replica.measured) for replica in self.replicas]
        if not all_finite(arrays):
            raise UserError(
                f"weights are not finite at {self._where()}{self._whose(arrays)}, so they are not "
                "saved; lower the rates and start in another workdir"
            )
        meta = {
            "phase": at.phase,
            "step": at.step,
            "window": at.window.to_lists(),
            "measured": measured[0] if self.alone else measured,
            "data": self.experiment.data(),
            "config": to_dict(self.config),
            "machine": self.machine(),
        }
        self.checkpoints.save(self._number(), arrays, meta)
        self.newest = self._number()

    def _whose(self, arrays: Any) -> str:
        """In words, of which of several seeds some numbers are not finite."""
        if self.alone:
            return ""
        parts = zip(self.replicas, groups.collect(None, arrays, len(self.replicas)), strict=True)
        seeds = [one.experiment.config.seed for one, part in parts if not all_finite(part)]
        return f", of seed {', '.join(map(str, seeds))} (leave it out, and train the others anew)"

    def machine(self) -> dict[str, Any]:
        """What the bits of this run depend on here, see :func:`skd_jax.machine.machine`."""
        mesh = self.experiment.mesh
        return machine(mesh.size if mesh else 1, steps_per_call(self.config))

    def _restored(self, saved: Checkpoint) -> Position:
        first, kept = self.experiment.start()
        replicas, alone = len(self.replicas), self.alone
        with of_this_version(saved):
            index, step = operator.index(saved.meta["phase"]), operator.index(saved.meta["step"])
            window = Window.from_lists(saved.meta["window"], replicas)
            found = [saved.meta["measured"]] if alone else list(saved.meta["measured"])
            for replica, values in zip(self.replicas, found, strict=True):
                replica.measured = Measured.from_dict(values)
            last = self.phases[index].steps if index < len(self.phases) else 0
            if not (first <= index <= len(self.phases) and 0 <= step <= last):
                raise IndexError("phase or step")
            if saved.step != self._number(index, step):
                raise ValueError("step")
            reporting = Counter(phase.name for phase in self.phases[:index] if phase.report)
            for measured in (replica.measured for replica in self.replicas):
                if {name: len(rows) for name, rows in measured.reports.items()} != reporting:
                    raise ValueError("reports")
                self.method.describe(measured.reports)  # raises if they are not the method's
        for phase in self.phases[first:index]:
            kept = jax.eval_shape(lambda k, p=phase: p.finish(p.init(k), k, self._shapes), kept)
        state = jax.eval_shape(self.phases[index].init, kept) if step else None
        shapes = {"kept": kept, "state": state}
        if not alone:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((replicas, *x.shape), x.dtype), shapes
            )
        arrays = saved.into(shapes)
        each = [arrays] if alone else groups.collect(None, arrays, replicas)
        arrays = self._together(each)
        return Position(index, arrays["kept"], step, arrays["state"], window)

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

    def _summaries(self) -> list[dict[str, Any]]:
        size = kept_bytes(self.at.kept) // len(self.replicas)
        return [replica.summary(size) for replica in self.replicas]

    def _report(self, summaries: list[dict[str, Any]]) -> dict[str, Any]:
        """The run's summary, by those of its replicas, which are written down."""
        if self.alone:
            return summaries[0]
        summary, path = metrics.over_seeds(summaries), self.workdir / "summary.json"
        self.say(metrics.spread_in_words(summary))
        if parallel.is_first_process() and read_json(path) != summary:
            write_json(path, summary)
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
            batch = run.replicas * phase.batch * data.load_size**2 * data.channels
            most = max(1, min(most, CALL_BYTES // batch))
    return min(most, run.log_every, run.checkpoint_every)


def no_images(indices: Any) -> Any:
    """What a phase that reads no image is given to take images by."""
    raise RuntimeError(f"images {indices} were asked for by a phase that reads none")


def all_finite(tree: Any) -> bool:
    """Whether every number of a pytree is finite; told on the host, so nothing is compiled."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))

"""A configuration with its data opened: what has to hold before a run may start or go on."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from skd_jax import groups, parallel, steps
from skd_jax.checkpoint import digest_of, flatten
from skd_jax.config import Config, late_drops, to_dict, with_defaults
from skd_jax.data import (
    ReplicaImages,
    Schedule,
    Source,
    TaskImages,
    TestImages,
    TrainingStream,
    changed_files,
    check,
    check_batches,
    check_tests,
    check_trains,
    class_schedule,
    open_source,
)
from skd_jax.errors import UserError, warn
from skd_jax.methods import METHODS, method_of
from skd_jax.methods.phase import Phase, Setting
from skd_jax.methods.phases import base
from skd_jax.metrics import SUMMARY
from skd_jax.writer import LOG


@dataclasses.dataclass(frozen=True)
class Given:
    """What a run goes on from instead of training T_0: a model, and no image of its classes.

    Attributes:
      kept: what the method begins with: T_0 as ``classifier``, and what else is at hand.
      source: the images of the new classes; of the old ones test images only, or none.
      schedule: the labels of each task's classes; those of task 0 are the model's outputs.
    """

    kept: Any
    source: Source
    schedule: Schedule

    def digest(self) -> str:
        """Of the model's arrays."""
        return digest_of(flatten({"kept": self.kept}))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration with its data opened and every check passed; nothing has been written.

    ``given`` is None unless the run goes on from a model that was trained elsewhere.
    """

    config: Config
    source: Source
    schedule: Schedule
    stream: TrainingStream
    test: TestImages
    setting: Setting
    phases: list[Phase]
    mesh: Mesh | None
    given: Given | None = None

    @property
    def grid(self) -> Mesh | None:
        """The devices as the steps use them: in groups, if several replicas are trained."""
        return groups.in_groups(self.mesh, self.config.run.replicas)

    def replicas(self) -> list["Experiment"]:
        """One for each seed that is trained, with random keys of its own, on the same images.

        Raises:
          UserError: their steps would not be of one program.
        """
        count, first = self.config.run.replicas, self.config.seed
        if count == 1:
            return [self]
        run, found = dataclasses.replace(self.config.run, replicas=1), []
        for seed in range(first, first + count):
            config = dataclasses.replace(self.config, seed=seed, run=run)
            setting = dataclasses.replace(self.setting, config=config)
            own = {"config": config, "setting": setting, "phases": planned(setting)}
            found.append(dataclasses.replace(self, **own))
        programs = [[_program(phase) for phase in one.phases] for one in found]
        if any(one != programs[0] for one in programs):
            raise UserError(
                f"config.run.replicas: what {self.config.method.name} computes depends on the seed "
                "beyond random keys and images; give 1, and run one seed after the other"
            )
        return found

    def start(self) -> tuple[int, Any]:
        """The first phase to train, and what the method has kept before it."""
        return (1, self.given.kept) if self.given else (0, method_of(self.config).kept())

    def data(self) -> dict[str, Any]:
        """What a resumed run must find again: classes and numbers of images by task, and files."""
        return dict(self._data)

    @functools.cached_property
    def _data(self) -> dict[str, Any]:
        names = self.source.class_names
        classes = [[names[c] for c in task] for task in self.schedule]
        found = json.dumps(self.files(), sort_keys=True).encode()
        return {
            "classes": classes,
            "images": list(self.stream.counts()),
            "files": hashlib.sha256(found).hexdigest(),
            **({"model": self.given.digest()} if self.given else {}),
        }

    @contextlib.contextmanager
    def opened(self, phase: Phase, kept: Any) -> Iterator[TaskImages | None]:
        """The images that a phase reads, let go of at the end; None if it reads none.

        Args:
          phase: one of the run's.
          kept: what earlier phases have left; an image of an earlier task comes from here alone.
        """
        if phase.reads == "nothing":
            yield None
            return
        with contextlib.closing(self.stream.open(phase.task)) as images:
            if phase.own is not None:
                images.narrow(phase.own)
            if phase.replay:
                images.extend(*phase.replay.of(parallel.to_host(self.mesh, kept)))
            yield images

    @contextlib.contextmanager
    def opened_to_all(
        self, phases: Sequence[Phase], kept: Sequence[Any]
    ) -> Iterator[ReplicaImages | None]:
        """The images that the replicas read in a phase, as :meth:`opened` has them of one.

        Args:
          phases: the phase as each replica has it.
          kept: what each one's earlier phases have left, on one device.
        """
        first = phases[0]
        if first.reads == "nothing":
            yield None
            return
        with contextlib.closing(self.stream.open(first.task)) as images:
            own = np.arange(images.n)
            places = [own if phase.own is None else np.asarray(phase.own, int) for phase in phases]
            replays = [phase.replay for phase in phases if phase.replay]
            if replays:
                found = [replay.of(one) for replay, one in zip(replays, kept, strict=True)]
                behind = images.n + np.arange(len(found) * replays[0].count)
                images.extend(*(np.concatenate(some) for some in zip(*found, strict=True)))
                pairs = zip(places, np.split(behind, len(found)), strict=True)
                places = [np.concatenate(pair) for pair in pairs]
            yield ReplicaImages(images, places)

    def files(self) -> dict[str, list[int]] | None:
        """Size and CRC-32 of every image file by path, if it is a folder of images."""
        return getattr(self.source, "files", None)


def open_experiment(
    config: Config, source: Source | None = None, given: Given | None = None
) -> Experiment:
    """Opens the data and checks that the whole run can be done.

    Args:
      config: the configuration.
      source: images to use instead of those that ``config.data`` names.
      given: the model to go on from, with its own images; None trains T_0.

    Raises:
      UserError: what is wrong, and how to fix it.
    """
    check(config.data)
    if config.seed + config.run.replicas > 2**32:  # random keys have no more bits
        raise UserError(
            f"config.seed: seeds {config.seed} to {config.seed + config.run.replicas - 1} are not "
            f"below 2**32 ({2**32}); give a smaller one"
        )
    mesh = parallel.make_mesh(config.run.devices)
    method = method_of(config)
    try:
        nets = steps.networks(config.model)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    # What can be said before the images are opened, which may take long.
    known = given.schedule[0] if given else range(config.data.base_classes)
    classes = max(1, len(known)), 1  # of task 0, and any later one
    first = planned(Setting(config, nets, classes, images=classes))
    grid = groups.in_groups(mesh, config.run.replicas)
    parallel.check_divisible({phase.field: phase.batch for phase in first}, grid)
    for phase in first:
        if phase.try_out and phase.task == 0:
            phase.try_out()
    if given:
        source, schedule = given.source, given.schedule
    else:
        source = source or open_source(config.data)
        schedule = class_schedule(config.data, source.class_names)
    stream = TrainingStream(
        source, schedule, config.data.in_memory, grid, forgets=not method.reads_old_images
    )
    test = TestImages(source, schedule)
    learned = schedule[1:] if given else schedule
    counts = stream.class_counts()
    check_trains({c: counts[c] for task in learned for c in task}, source.class_names)
    names = [[source.class_names[c] for c in classes] for classes in learned]
    check_tests(test.counts()[-len(learned) :], names)
    classes = tuple(len(classes) for classes in schedule)
    of_classes = tuple(tuple(counts[c] for c in classes) for classes in schedule)
    setting = Setting(config, nets, classes, tuple(stream.counts()), of_classes)
    phases = planned(setting)
    needs = any(phase.task == 0 and phase.reads != "nothing" for phase in phases[1:])
    if given and (needs or method.base):
        raise UserError(
            f"config.method.name: {method.name} needs the images that the model was trained on, "
            "and there are none; take a method that needs nothing but the model, such as skd"
        )
    for phase in phases[1:] if given else phases:
        if phase.reads == "shuffled":
            count = phase.count(stream.available(phase.task))
            check_batches(phase.field, phase.batch, phase.task, count)
    for phase in phases:
        if phase.try_out and phase.task > 0:
            phase.try_out()
    if not given and parallel.is_first_process():
        for line in (*late_drops(config), *method.warnings(setting)):
            warn(line)
    return Experiment(config, source, schedule, stream, test, setting, phases, mesh, given)


def _program(phase: Phase) -> tuple:
    """What a phase's compiled steps depend on, images and random keys aside, and their rates."""
    size = phase.steps, phase.batch, phase.count(0)
    rates = digest_of(flatten(phase.rates(np.arange(phase.steps, dtype=np.int32))))
    return (phase.name, phase.step, phase.static, phase.reads, phase.draws, *size, rates)


def planned(setting: Setting) -> list[Phase]:
    """The phases of a whole run: T_0's training, then the method's for each task.

    Raises:
      ValueError: two phases of a task have the same number, and so the same random keys; or one
        is called what the log or the summary calls something else.
    """
    method = method_of(setting.config)
    phases = [(method.base or base)(setting)]
    for task in range(len(setting.classes)):
        phases += method.phases(setting, task)
    taken = [(phase.task, phase.number) for phase in phases]
    if len(set(taken)) < len(taken):
        raise ValueError(f"two phases of {method.name} share a task and a number: {taken}")
    if reserved := {phase.name for phase in phases[1:]} & {"base", "evaluate", *SUMMARY}:
        raise ValueError(f"phases of {method.name} may not be called {', '.join(reserved)}")
    return phases


def check_same_config(config: Config, saved: Mapping[str, Any], workdir: Path) -> None:
    """Checks that a run may go on with this configuration.

    Args:
      config: the one given now.
      saved: the one the run was started with, as ``to_dict`` gave it.
      workdir: where the run is.

    Raises:
      UserError: they differ in what is computed; the message names the fields. The section
        ``run``, but for its ``replicas``, and where the data lies may differ.
    """
    here = json.loads(json.dumps(to_dict(config)))
    if found := _differences(_what_is_saved(saved), _what_is_saved(here)):
        raise UserError(
            f"--workdir={workdir} holds a run with {_shown(found)}; give the config it was started "
            f"with, or another workdir{_unless_finished(workdir)}"
        )


def _unless_finished(workdir: Path) -> str:
    if (workdir / "summary.json").exists():
        return ""
    return (
        "; that run is not finished, and if nobody needs it, its checkpoints/, config.json and "
        f"{LOG} may be deleted"
    )


def check_same_start(experiment: Experiment, meta: Mapping[str, Any]) -> None:
    """Checks that what another run has done so far is what this one would have done.

    Args:
      experiment: this run.
      meta: of the other run's checkpoint, which lies between two phases.

    Raises:
      UserError: the fields, or the images, that those phases depend on differ; or they are all
        that this run would train.
    """
    config, phases, data = experiment.config, meta["phase"], meta["data"]
    where = f"config.run.start_from={config.run.start_from}"
    here = json.loads(json.dumps(to_dict(config)))
    done = experiment.phases[:phases]
    of = {phase.name for phase in done}, max(phase.task for phase in done if phase.ends_task)
    name, other = config.method.name, meta["config"]["method"]["name"]
    if method_of(config).base and name != other:
        raise UserError(
            f"{where} holds a run with config.method.name={other}, and {name} has to watch the "
            "training of T_0; leave config.run.start_from empty"
        )
    found = _differences(_what_is_saved(meta["config"], *of), _what_is_saved(here, *of))
    if found:
        raise UserError(
            f"{where} holds a run with {_shown(found)}, which its {phases} phases depend on; "
            "name another run, or leave config.run.start_from empty"
        )
    last = min(config.run.phases or len(experiment.phases), len(experiment.phases))
    if phases >= last:
        raise UserError(
            f"{where} has trained {phases} phases already, which is all that this run would; raise "
            "config.run.phases, or leave config.run.start_from empty"
        )
    now = experiment.data()
    if any((now[name][0], now["files"]) != (data[name][0], data["files"]) for name in _COUNTED):
        raise UserError(f"{where} holds a run on other base images; name another run")


_COUNTED = ("classes", "images")


def check_same_data(
    experiment: Experiment,
    data: Mapping[str, Any],
    files: dict[str, list[int]] | None,
    workdir: Path,
) -> None:
    """Checks that a run may go on with these images.

    Args:
      experiment: what it would go on with.
      data: what ``data()`` was when it started.
      files: what ``files()`` was.
      workdir: where the run is.

    Raises:
      UserError: a file, the classes or the number of their images is another.
    """
    if experiment.data() == data:
        return
    if experiment.data().get("model") != data.get("model"):
        raise UserError(
            f"--workdir={workdir} holds a run that went on from another model; give that one, or "
            "use another workdir"
        )
    now = experiment.files()
    if files and now and (change := changed_files(files, now)):
        raise UserError(
            f"--workdir={workdir} holds a run on other images: {change}, in config.data.data_dir="
            f"{experiment.config.data.data_dir!r}; restore them or use another workdir"
        )
    raise UserError(
        f"--workdir={workdir} holds a run on other images: its files, its classes or their "
        "counts differ from what config.data names now; restore them or use another workdir"
    )


def what_is_computed(
    fields: Mapping[str, Any], phases: Collection[str] | None = None, learned: int = 0
) -> dict[str, Any]:
    """A configuration without what may differ between starts of one run.

    Args:
      fields: as :func:`to_dict` gives it; a field that was added since then has its default.
      phases: their names, if only what these depend on is wanted.
      learned: how many tasks after the base they have learned.
    """
    kept = {n: part for n, part in with_defaults(fields, METHODS).items() if n != "run"}
    left_out = {"data_dir"}  # the same images may have moved
    if phases is not None:
        done, method = frozenset(phases), kept.pop("method", None)
        named = isinstance(method, Mapping)
        known = METHODS.get(method.get("name", "")) if named else None
        if not (known and known.base):  # T_0's training is that of all methods
            done -= {"base"}
        if not learned:
            left_out.add("tasks")
        if done and named:
            kept["method"] = known.depends(dict(method), done) if known else method
    if isinstance(data := kept.get("data"), Mapping):
        kept["data"] = {field: x for field, x in data.items() if field not in left_out}
    return kept


def _what_is_saved(fields: Mapping[str, Any], *of: Any) -> dict[str, Any]:
    """The same, and how many replicas a checkpoint has the arrays of."""
    run = fields.get("run")
    replicas = run.get("replicas", 1) if isinstance(run, Mapping) else 1
    return {**what_is_computed(fields, *of), "run": {"replicas": replicas}}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what two configurations, as :func:`to_dict` gives them, differ; "" if in nothing."""
    return _shown(_differences(there, here))


def _shown(differences: Sequence[tuple[str, Any, Any]]) -> str:
    shown = ", ".join(
        f"config.{_short(field)}={_short(there)}, not {_short(now)}"
        for field, there, now in differences[:5]
    )
    return shown + (f" ({len(differences) - 5} more fields differ)" if differences[5:] else "")


def _short(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        prefix = f"{path}." if path else ""
        found = [_differences(a.get(n), b.get(n), prefix + n) for n in names]
        return [difference for differences in found for difference in differences]
    return [] if a == b else [(path, a, b)]

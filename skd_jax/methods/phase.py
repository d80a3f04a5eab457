"""The seam between the loop and the methods: a run is a list of phases.

A :class:`Phase` is one stretch of steps; a :class:`Method` names the phases of each task. The loop,
the compiled steps, the checkpoints and the summary know nothing else of a method.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from skd_jax.config import Config
from skd_jax.state import Kept, Network
from skd_jax.steps import Networks, eval_mode, networks

if TYPE_CHECKING:
    from skd_jax.evaluate import Probe

State = Any
Metrics = dict[str, jax.Array]
Rates = Any
Take = Callable[[Any], Any]
Family = Literal["bound", "regularisation", "exemplars", "generator", "frozen features"]

# Numbers in random keys: those of phases below, and one that belongs to no phase. A method gives
# each of its phases within a task a number of its own.
BASE, LEARN, PICTURES, SWEEP = 0, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method knows of a run before it begins; no image.

    Attributes:
      config: the configuration; ``config.method`` are the method's own settings.
      nets: the architectures.
      classes: |C_0| .. |C_N|.
      images: numbers of training images of task 0 .. N.
      of_classes: those of each class of each task; where it is left out, they are as even as can
        be.
    """

    config: Config
    nets: Networks
    classes: tuple[int, ...]
    images: tuple[int, ...]
    of_classes: tuple[tuple[int, ...], ...] = ()

    def seen(self, task: int) -> int:
        """The number of classes up to a task, its own included."""
        return sum(self.classes[: task + 1])

    def by_class(self, task: int) -> tuple[int, ...]:
        """The number of training images of each class of a task, whose images lie in this order."""
        if self.of_classes:
            return self.of_classes[task]
        classes, images = self.classes[task], self.images[task]
        return tuple((images + i) // classes for i in range(classes))

    def keys(self, task: int, number: int) -> tuple[jax.Array, jax.Array]:
        """(initialisation key, step key) of a phase: a function of (seed, task, number) alone."""
        return phase_keys(self.config.seed, task, number)


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a phase makes of some logged steps.

    Attributes:
      logged: scalars to log in place of the metrics that are vectors.
      remembered: plain JSON values that the phase's report is given.
      alarm: what is wrong, for instance "the classes have collapsed"; "" if nothing is.
      why: in numbers.
      advice: what to change.
    """

    logged: Mapping[str, float]
    remembered: Mapping[str, Any]
    alarm: str = ""
    why: str = ""
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Kept images that a phase reads behind those of its task, as if they were of it.

    Attributes:
      count: m, how many there are.
      of: what is kept to uint8 images [m, S, S, C] and their labels, int32 [m].
    """

    count: int
    of: Callable[[Any], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of steps, resumable at any of them.

    Attributes:
      name: what the log and the report call it.
      task: the task whose images it reads; of a phase that reads none, the task of T_n.
      number: its number in random keys; see ``BASE``.
      steps: how many steps it takes.
      batch: B, examples a step.
      field: the config field that says B.
      reads: "nothing"; "shuffled": the task's images in random order, augmented, without the last
        partial batch; "in_order": each image once, as it is.
      static: what the step depends on that is no array; hashable.
      init: what is in training at step 0, from what earlier phases left; traceable. Its arrays are
        its own, not those of what was left, since the state is donated.
      step: pure: (static, nets, state, kept, batch or None, key or None, rates) to (state,
        metrics). Metrics are scalars or vectors, of the whole batch. One that meets a number that
        is not finite leaves the state as it was; a step that sees to that itself says so in a
        metric ``skipped``.
      rates: int [n] of step numbers to a pytree of arrays [n, ...]; a step gets its row.
      finish: what the phase leaves to the next, from (state, kept, take); ``take`` gives the images
        at int32 [m] indices of this task as uint8 [m, S, S, C], and raises RuntimeError where
        nothing is read. Traceable.
      draws: whether a step that reads images draws random numbers beside those of the
        augmentation; else it has no key. One that reads nothing always has.
      ends_task: whether its task has been learned then: then there is an accuracy row.
      own: which of the task's images it reads, by their index; None is all of them.
      replay: the kept images that it reads too; None is none.
      unit: what a step is called in the progress bar.
      report: plain JSON values about a finished phase, from (state, kept, what ``watch``
        remembered, probe); the summary lists them under the phase's name.
      watch: looks at the metrics of some steps, by name [n] or [n, K].
      shown: the metrics that come first in the progress bar.
      passes: roughly how many images go forward through T_n's network in a step (a gradient counts
        as two more); for the estimated time of a phase that has not been measured. 0: 3 a B.
      try_out: traces what people have written themselves, before anything starts; raises UserError.
    """

    name: str
    task: int
    number: int
    steps: int
    batch: int
    field: str
    reads: Literal["nothing", "shuffled", "in_order"]
    static: Hashable
    init: Callable[[Any], State]
    step: Callable[..., tuple[State, Metrics]]
    rates: Callable[[np.ndarray], Rates]
    finish: Callable[[State, Any, Take], Any]
    draws: bool = False
    ends_task: bool = False
    own: tuple[int, ...] | None = None
    replay: Replay | None = None
    unit: str = "step"
    report: "Callable[[State, Any, Mapping[str, Any], Probe], dict[str, Any]] | None" = None
    watch: Callable[[Mapping[str, np.ndarray]], Watched] | None = None
    shown: tuple[str, ...] = ()
    passes: int = 0
    try_out: Callable[[], None] | None = None

    @property
    def cost(self) -> int:
        """``passes``, or what it is unless it is said."""
        return self.passes or 3 * self.batch

    def count(self, images: int) -> int:
        """How many images it reads, where its task has so many."""
        own = images if self.own is None else len(self.own)
        return own + (self.replay.count if self.replay else 0)


def logits(static: Hashable, nets: Networks, kept: Any, images: jax.Array) -> jax.Array:
    """How a class is told unless a method says otherwise: the head's outputs, [B, K]."""
    del static
    classifier: Network = kept.classifier
    return eval_mode(nets.classifier(classifier.params), classifier, images)[1]


def everything(settings: dict[str, Any], phases: frozenset[str]) -> dict[str, Any]:
    """What phases of a method depend on, unless it says otherwise: all of its settings."""
    del phases
    return settings


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to learn new classes.

    Attributes:
      name: as ``config.method.name`` has it.
      settings: the frozen dataclass that ``config.method`` is read into; it has a field
        ``name``.
      phases: the phases of task n, in order. For n = 0, those after T_0's training, which all
        methods share.
      kept: what is kept between phases: :class:`Kept` or more.
      scores: (static, nets, kept, normalised images [B, S, S, C]) to scores [B, K]; the largest is
        the class. ``static`` are the settings.
      check: raises UserError if the configuration cannot be used.
      warnings: what of a run that can be made will not be as its user may expect, a line each.
      title: the method's name in the summary.
      depends: what of its settings, as JSON has them, the phases of these names depend on.
      describe: text about the summary's reports, for people.
      remarks: what in them wants attention, and what to do about it, a line each; from the names of
        each task's classes and the reports.
      reads_old_images: whether its phases are given the images of earlier tasks too.
      family: what comparisons group it by.
      keeps: what of earlier tasks it keeps beside T_n, in a word or two: "class means", "images";
        "nothing", if ``kept_bytes`` is 0.
      tricks: what its training has that others' could have too and has not, for instance "classes
        are balanced"; "" if nothing. Epochs and rates are in its settings.
      base: T_0's training, of a method that has to watch it; None is that of all methods. It trains
        T_0 by the same steps, equal to rounding, which training amplifies; a run cannot begin from
        a T_0 that is trained already.
    """

    name: str
    settings: type
    phases: Callable[[Setting, int], list[Phase]]
    kept: type = Kept
    scores: Callable[..., jax.Array] = logits
    check: Callable[[Config], None] = lambda config: None
    warnings: Callable[[Setting], list[str]] = lambda setting: []
    title: Callable[[Any], str] = lambda settings: settings.name
    depends: Callable[[dict[str, Any], frozenset[str]], dict[str, Any]] = everything
    describe: Callable[[Mapping[str, list]], str] = lambda reports: ""
    remarks: Callable[[Sequence[Sequence[str]], Mapping[str, list]], list[str]] = (
        lambda names, reports: []
    )
    reads_old_images: bool = False
    family: Family = "regularisation"
    keeps: str = "nothing"
    tricks: str = ""
    base: Callable[[Setting], Phase] | None = None


def setting_of(config: Config, classes: Sequence[int] = (), images: Sequence[int] = ()) -> Setting:
    """A setting without a data set, to step phases by hand; see :class:`Setting`."""
    return Setting(config, networks(config.model), tuple(classes), tuple(images))


def phase_keys(seed: int, task: int, number: int) -> tuple[jax.Array, jax.Array]:
    """(initialisation key, step key) of a phase: a function of (seed, task, number) alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), number)
    init, step = jax.random.split(key)
    return init, step

"""Methods side by side on one benchmark, all from one T_0: their curves, and a table.

What is said of a method is what it declares (:class:`skd_jax.methods.phase.Method`), what its
configuration says, and what its runs have found; nothing here knows one by name.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from experiments.framework import chosen, halts, kept, study
from experiments.framework.curves import curve, finish, kept_as_it_is
from experiments.framework.exhibit import Exhibit
from experiments.framework.panels import row_by_row, save
from experiments.framework.study import Options, Run
from experiments.framework.tables import Cell, Picture, Table, source
from skd_jax.config import Config, Supervised
from skd_jax.methods import from_config_dict
from skd_jax.methods.phase import Family, Method, logits, setting_of

ABOVE = "average less that of T_0 kept, points"
COLUMNS = (
    *("average, %", ABOVE, "average without the base, %", "final, %", "forgetting"),
    "base classes at the end, %",
    *("new classes at the end, %", "bytes beside T_n", "what it keeps", "phases of a task"),
    "steps x batch, at the first task",
    *("training, where it differs", "chosen on held-out images", "seconds", "seeds"),
    "published at full scale, %",
)
NOTE = (
    "Methods of one network start from one T_0, but for those that train it themselves, and all "
    "see the same tasks. Steps x batch says how many images each phase reads or draws at the first "
    "task, if its classes have as many images as the data set's have on average. An epoch reads "
    "each image of the task once; a method that keeps old images reads these too, and one that "
    "holds some images out reads fewer. The average is over the base step and every later one, "
    "each on all classes seen. NCM, LDA, ridge, iCaRL, SDC and others classify even the base "
    "classes by a rule of their own and not by T_0's head, so that their first accuracy is not "
    "T_0's; therefore there is the average without the base step. What T_0 kept has is taken off "
    "seed by seed, also where a method starts from another T_0 or trains it itself; rows of "
    "different seeds still differ by their seeds. Accuracy on the new classes counts each class "
    "alike; forgetting is in points. Seconds are by the runs' own clocks, of "
    "training after T_0, without tests; other work may have shared the core. Time in which a run "
    f"was halted is left out ({halts.WORDS}). Solid curves keep images of old classes, dashed ones "
    "do not, dotted ones are bounds; the black one is a T_0 that is kept as it is and learns "
    "nothing. Published numbers are averages, of other programs and class orders, unless they say "
    "otherwise."
)
LINES = "osD^vPX*<>hpd"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods on one benchmark.

    Attributes:
      script: of its script.
      dataset: the config's file, without its ending.
      tasks: N.
      each: training images of a class in the mean, for numbers of steps.
      published: average and backbone, in words, by the method's name.
    """

    script: str
    dataset: str
    tasks: int
    each: int
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.script}_{self.dataset}_{self.tasks}"

    @property
    def title(self) -> str:
        """Of the table and of the figure."""
        many = "task" if self.tasks == 1 else "tasks"
        return f"All methods from one T_0: {self.dataset}, {self.tasks} {many}"

    @property
    def exhibit(self) -> Exhibit:
        """As its script and the report take it."""
        return Exhibit(
            self.name,
            self.title,
            self.runs,
            draw=self.draw,
            table=self.table,
            pictures=self.pictures,
        )

    def runs(self, options: Options) -> list[Run]:
        """Those of the methods and numbers of tasks that are named; of all, if none is."""
        if options.tasks and self.tasks not in options.tasks:
            return []
        if not study.has_scale(self.dataset, options.scale):
            return []
        names = options.methods or tuple(study.compared())
        return [run for name in names for run in self._of(name, options)]

    def table(self, options: Options) -> Table | None:
        """A row for each method that has been run, whether it is named or not."""
        found = self._found(options)
        if not found:
            return None
        same = [kept.summary_of(summary) for summary in self._of_t_0(found, options)]
        of_t_0 = {summary["seed"]: study.average(summary) for summary in same}
        rows = [(n, tuple(self._cells(n, s, of_t_0, options))) for n, s in found.items()]
        if same:
            rows.insert(0, (kept.LABEL, tuple(_of_kept(same, of_t_0))))
        return Table(self.title, ("family", *COLUMNS), tuple(rows), self._source(options), NOTE)

    def draw(self, options: Options) -> None:
        """The curves of all methods that have been run; no picture, if none has."""
        path, found = self._path(options), self._found(options)
        if not found:
            path.unlink(missing_ok=True)
            return
        same = self._of_t_0(found, options)
        shown = panels(list(found))
        columns, most = min(2, len(shown)), max(map(len, shown.values()))
        figure, grid = row_by_row(len(shown), columns, height=3.4 + 0.2 * most * columns / 2)
        for axes, (title, names) in zip(grid, shown.items(), strict=True):
            for number, name in enumerate(names):
                line = LINES[number % len(LINES)] + style(study.compared()[name])
                curve(axes, found[name], name, line, f"C{number % 10}", markersize=4)
            if same:
                kept_as_it_is(axes, same)
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
            finish(axes, title or self.title, **below, ncols=3 - columns)
        highest = max(axes.get_ylim()[1] for axes in grid)
        for axes in grid:
            axes.set_ylim(0, highest)
        save(figure, path)

    def pictures(self, options: Options) -> list[Picture]:
        """The one that ``draw`` draws."""
        if not self._found(options):
            return []
        return [Picture(self._path(options), self.title, self._source(options))]

    def _of(self, name: str, options: Options) -> list[Run]:
        fields = chosen.fields(self.dataset, self.tasks, name, options)
        return [
            study.method(self.dataset, options.scale, seed, self.tasks, name, fields)
            for seed in options.seeds
        ]

    def _found(self, options: Options) -> dict[str, list[dict[str, Any]]]:
        """The summaries of the methods that have been run, by family; of one alone if named."""
        if not study.has_scale(self.dataset, options.scale):
            return {}
        found = {name: study.summaries(self._of(name, options), options) for name in by_family()}
        found = {name: summaries for name, summaries in found.items() if summaries}
        return found if options.methods or len(found) > 1 else {}

    def _of_t_0(
        self, found: Mapping[str, list[dict[str, Any]]], options: Options
    ) -> list[dict[str, Any]]:
        """A run of each seed that takes up the benchmark's T_0, and classifies by its head."""
        same: dict[int, dict[str, Any]] = {}
        for name, summaries in found.items():
            method, config, usual = study.compared()[name], *self._configs(name, options)
            if method.scores is logits and not method.base and config.model == usual.model:
                same = {summary["seed"]: summary for summary in summaries} | same
        return [same[seed] for seed in sorted(same)]

    def _configs(self, name: str, options: Options) -> tuple[Config, Config]:
        """A method's, and SKD's."""
        return self._config(name, options), self._config("skd", options)

    def _path(self, options: Options) -> Path:
        return options.out / f"{self.name}.png"

    def _source(self, options: Options) -> str:
        found = self._found(options)
        every = [{**s, "method": name} for name, summaries in found.items() for s in summaries]
        more = f"{self.dataset} --tasks={self.tasks} --methods={','.join(found)}"
        networks = {name: self._config(name, options).model for name in found}
        seeds = {name: [s["seed"] for s in summaries] for name, summaries in found.items()}
        differ = len(set(map(tuple, seeds.values()))) > 1
        before = "Each row is of the seeds in its column. " if differ else ""
        return source(self.script, options, every, more, networks, before)

    def _config(self, name: str, options: Options) -> Config:
        return from_config_dict(self._of(name, options)[0].config_dict())

    def _cells(
        self,
        name: str,
        found: Sequence[dict[str, Any]],
        of_t_0: Mapping[int, float],
        options: Options,
    ) -> Iterator[Cell]:
        method = study.compared()[name]
        config, usual = self._configs(name, options)
        yield Cell(said=method.family)
        yield from _accuracies(found, of_t_0)
        yield Cell(said=f"{found[0]['kept_bytes']:,}")
        yield Cell(said=method.keeps)
        classes = tuple(found[0]["classes_per_task"])
        yield Cell(said=phases(method, config, classes))
        yield Cell(said=lengths(method, config, classes, self.each))
        own = "trains T_0 itself" if method.base else ""
        recipe = study.VARIANTS.get(name, "")
        differs = filter(None, (own, recipe, schedule(config, usual), method.tricks))
        yield Cell(said="; ".join(differs) or "-")
        yield Cell(said=chosen.words(self.dataset, self.tasks, name, options))
        spent = [s for run in self._of(name, options) if (s := halts.seconds(run, options))]
        yield Cell((float(np.mean([after_t_0(s) for s in spent])),), of_seeds=False)
        yield Cell(said=", ".join(str(s["seed"]) for s in found))
        yield Cell(said=self.published.get(name, "-"))


def _accuracies(found: Sequence[dict[str, Any]], of_t_0: Mapping[int, float]) -> Iterator[Cell]:
    """Of the runs of a row, one a seed; ``of_t_0`` has the average of T_0 kept, by seed."""
    yield Cell(tuple(map(study.average, found)))
    above = tuple(study.average(s) - of_t_0[s["seed"]] for s in found if s["seed"] in of_t_0)
    yield Cell(above, said="" if above else "-")
    for measure in (
        lambda s: 100 * s["average_incremental_accuracy_without_base"],
        lambda s: 100 * s["final_accuracy"],
        lambda s: 100 * s["forgetting"],
        lambda s: 100 * s["accuracy_matrix"][-1][0],
        of_new_classes,
    ):
        yield Cell(tuple(measure(s) for s in found))


def _of_kept(found: Sequence[dict[str, Any]], of_t_0: Mapping[int, float]) -> Iterator[Cell]:
    """The row of a T_0 that is kept as it is, from its summaries."""
    yield Cell(said="bound")
    yield from _accuracies(found, of_t_0)
    yield Cell(said="0")
    yield Cell(said="nothing")
    yield from [Cell(said="-")] * 4
    yield Cell(applies=False)
    yield Cell(said=", ".join(str(s["seed"]) for s in found))
    yield Cell(said="-")


def by_family() -> list[str]:
    """The names of all methods, families together."""
    families, every = get_args(Family), study.compared()
    return sorted(every, key=lambda name: families.index(every[name].family))


def panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Which methods are drawn together, by the panel's title: a family each, where they are many.

    Bounds are drawn in each panel.
    """
    if len(names) <= len(LINES):
        return {"": list(names)}
    of = {name: study.compared()[name].family for name in names}
    bounds = [name for name in names if of[name] == "bound"]
    families = {of[name]: None for name in names if name not in bounds}
    return {family: bounds + [name for name in names if of[name] == family] for family in families}


def style(method: Method) -> str:
    """Solid with images of old classes, dashed without, dotted for a bound."""
    if method.family == "bound":
        return ":"
    return "-" if "images" in method.keeps else "--"


def of_new_classes(summary: Mapping[str, Any]) -> float:
    """Accuracy on the classes of all later tasks at the end, in percent; each class counts."""
    last, classes = summary["accuracy_matrix"][-1][1:], summary["classes_per_task"][1:]
    return 100 * float(np.average(last, weights=classes)) if classes else float("nan")


def after_t_0(seconds: Mapping[str, float]) -> float:
    """Those of training after T_0, of those by phase."""
    return sum(s for phase, s in seconds.items() if phase not in ("base", "evaluate"))


def phases(method: Method, config: Config, classes: Sequence[int]) -> str:
    """The names of the phases that follow T_0's training, if any, and of a later task's."""
    images = (10**6,) * len(classes)  # how many there are changes no name
    setting = setting_of(config, classes, images)
    first, later = (
        ", ".join(phase.name for phase in method.phases(setting, task)) for task in (0, 1)
    )
    return f"after T_0 {first}; then {later}" if first else later


def lengths(method: Method, config: Config, classes: Sequence[int], each: int) -> str:
    """The same phases, with the numbers of steps and of images in one."""
    setting = setting_of(config, classes, [n * each for n in classes])
    first, later = (
        ", ".join(
            f"{phase.name} {phase.steps:,} x {phase.batch:,}"
            for phase in method.phases(setting, task)
        )
        for task in (0, 1)
    )
    return f"after T_0 {first}; then {later}" if first else later


def schedule(config: Config, usual: Config) -> str:
    """In what network and SGD differ from those of another method, in words; "" if in nothing."""
    ours, theirs = learning(config.method), learning(usual.method)
    words = differing(vars(config.model), vars(usual.model))
    found = [f"another T_0: {words}"] if words else []
    if not ours:
        return "; ".join([*found, "nothing learns by SGD"])
    return "; ".join(filter(None, [*found, differing(ours, theirs or {})]))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The fields that both have, and that differ, in words."""
    return ", ".join(
        f"{name} {value}, not {theirs[name]}"
        for name, value in ours.items()
        if name in theirs and value != theirs[name]
    )


def learning(settings: Any) -> dict[str, Any] | None:
    """What of a method's settings are those of SGD: its own, or a section's; None if none are."""
    names = {field.name: None for field in dataclasses.fields(Supervised)}  # in their order
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if names.keys() <= values.keys():
        return {name: values[name] for name in names}
    sections = (learning(value) for value in values.values() if dataclasses.is_dataclass(value))
    return next(filter(None, sections), None)

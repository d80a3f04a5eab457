"""One change of the configuration at a time, beside the configuration as it is."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from experiments.framework import kept, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.study import Options, Run
from experiments.framework.tables import Cell, Table, source

AS_IT_IS = "as it is"
CHANGE = "change, points"
Change = Callable[[Any], Mapping[str, Any]]  # from a ConfigDict to fields of another


@dataclasses.dataclass(frozen=True)
class Changes:
    """A table of changes, on the seeds that any of them has been tried on.

    Attributes:
      script: of its script.
      name: of its files and runs' folder.
      title: of the table.
      whole: the run as it is, of a scale and a seed.
      changes: what is changed, by name.
      measures: a column each: its name, and the number it takes from a run's summary; None where
        that run did not measure it.
      compared: the column, where more is better, whose difference from the run as it is, seed by
        seed, is one more; every run has it.
      remark: what the columns are, where their names do not say it.
      beside_kept: a T_0 that is kept as it is, is a row too.
      phases: that the changed runs end after, where the first ones are all that is measured.
      starts: of changes to what a run begins with: that, of a scale and a seed.
      made: of changes whose whole runs another table has too: that run, of a scale and a seed.
    """

    script: str
    name: str
    title: str
    whole: Callable[[str, int], Run]
    changes: Mapping[str, Change]
    measures: Mapping[str, Callable[[dict[str, Any]], float | None]]
    compared: str
    remark: str = ""
    beside_kept: bool = False
    phases: int = 0
    starts: Mapping[str, Callable[[str, int], Run]] = dataclasses.field(default_factory=dict)
    made: Mapping[str, Callable[[str, int], Run]] = dataclasses.field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """That it is of."""
        return self.whole("mini", 0).dataset

    @property
    def exhibit(self) -> Exhibit:
        """The table, as its script and the report take it."""
        rows = tuple(map(folder, (AS_IT_IS, *self.changes)))
        return Exhibit(self.name, self.title, self.runs, table=self.table, rows=rows)

    def run(self, scale: str, seed: int, name: str = AS_IT_IS) -> Run:
        """The run as it is, or of one change, in a folder named after that, or another's."""
        whole = self.whole(scale, seed)
        if name == AS_IT_IS:
            return whole
        if name in self.made:
            return self.made[name](scale, seed)
        fields = (*whole.fields, *self.changes[name](whole.config_dict()).items())
        start = self.starts[name](scale, seed) if name in self.starts else whole.start
        name, phases = f"{self.name}/{folder(name)}", self.phases or whole.phases
        return dataclasses.replace(whole, name=name, fields=fields, start=start, phases=phases)

    def runs(self, options: Options) -> list[Run]:
        """The runs whose results it shows; of some rows, where those are named."""
        if not study.has_scale(self.dataset, options.scale):
            return []
        names = (AS_IT_IS, *self.changes)
        if options.rows:
            names = [name for name in names if folder(name) in options.rows]
        return [self.run(options.scale, seed, name) for name in names for seed in options.seeds]

    def table(self, options: Options) -> Table | None:
        """What has been run of it; None where there is no such benchmark."""
        if not study.has_scale(self.dataset, options.scale):
            return None
        tried = [
            self.run(options.scale, seed, name)
            for seed in options.seeds
            for name in self.changes
            if name not in self.made  # whose seeds another table has chosen
        ]
        options = study.on_seeds_of(tried, options)

        def found(name: str) -> list[dict[str, Any]]:
            return study.summaries(
                [self.run(options.scale, seed, name) for seed in options.seeds], options
            )

        def compare(summary: dict[str, Any]) -> float:
            value = self.measures[self.compared](summary)
            assert value is not None
            return value

        first = {s["seed"]: compare(s) for s in found(AS_IT_IS)}

        def cells(summaries: Sequence[dict[str, Any]]) -> Iterator[Cell]:
            for column, measure in self.measures.items():
                values = tuple(x for s in summaries if (x := measure(s)) is not None)
                yield Cell(values, applies=bool(values) or not summaries)
                if column == self.compared:
                    pairs = [(compare(s), first.get(s["seed"])) for s in summaries]
                    yield Cell(tuple(x - y for x, y in pairs if y is not None))

        columns = list(self.measures)
        columns.insert(columns.index(self.compared) + 1, CHANGE)
        rows = [(name, tuple(cells(found(name)))) for name in (AS_IT_IS, *self.changes)]
        if self.beside_kept:  # of T_0, which all rows of a seed begin with
            every = [s for name in (*self.changes, AS_IT_IS) for s in found(name)]
            every.sort(key=lambda summary: len(summary["accuracy_matrix"]))  # whole ones count
            of_t_0 = {summary["seed"]: summary for summary in every}
            of_seeds = [kept.summary_of(of_t_0[seed]) for seed in sorted(of_t_0)]
            rows.insert(0, (kept.LABEL, tuple(cells(of_seeds))))
        summaries = study.summaries(self.runs(options), options)
        where = source(self.script, options, summaries, self.dataset)
        return Table(self.title, tuple(columns), tuple(rows), where, self.note(options.scale))

    def note(self, scale: str) -> str:
        """What the columns are and each row sets, as a table says it."""
        config = self.whole(scale, 0).config_dict()
        words = in_words({name: change(config) for name, change in self.changes.items()})
        return f"{self.remark} {words}".strip()


def in_words(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The fields that rows set, by the rows' names, as a sentence.

    Args:
      rows: the fields of each, by path; what all paths begin with is said once.
    """
    sections = zip(*(path.split(".")[:-1] for row in rows.values() for path in row), strict=False)
    same = ".".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, sections))

    def said(path: str, value: Any) -> str:
        shown = f"{value:.3g}" if isinstance(value, float) else value
        return f"{path.removeprefix(f'{same}.')}={shown}"

    every = (
        f'"{name}": {", ".join(said(path, value) for path, value in row.items())}'
        for name, row in rows.items()
    )
    return f"The fields of {same} that the rows set: {'; '.join(every)}."


def folder(change: str) -> str:
    """What a change's runs lie in, and what it is called on the command line."""
    return re.sub(r"[^a-z0-9]+", "_", change.lower()).strip("_")

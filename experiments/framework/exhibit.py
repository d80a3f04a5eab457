"""A table or figure, as the scripts, the report and its last table take it."""

import dataclasses
from collections.abc import Callable

from experiments.framework.study import Options, Run
from experiments.framework.tables import Picture, Table


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table, a figure, or both.

    Attributes:
      name: of its files, and in the report's last table.
      title: of it.
      runs: those whose results it shows.
      make: makes what is missing, where runs are not all that it is made of.
      draw: draws its pictures, and removes those of what is not there.
      table: what has been run of it; None if it is not worth a table.
      pictures: those that ``draw`` draws.
      rows: of a table of changes: what each is called on the command line.
    """

    name: str
    title: str
    runs: Callable[[Options], list[Run]]
    make: Callable[[Options], None] | None = None
    draw: Callable[[Options], None] | None = None
    table: Callable[[Options], Table | None] | None = None
    pictures: Callable[[Options], list[Picture]] | None = None
    rows: tuple[str, ...] = ()

"""What was found, in up to five sentences a scale: the report opens with them.

Every number, and every "above", "below" and "most", is taken from the runs' results. A sentence
whose runs have not been made is left out.
"""

from collections.abc import Sequence

from experiments import forgetting, table1, table2, table3
from experiments.framework import study
from experiments.framework.changes import AS_IT_IS
from experiments.framework.kept import LABEL
from experiments.framework.tables import Cell, Table, difference

TASKS = table3.TASKS[0]
MEANS = {
    "no_feature_statistics": "T_0's moments in each BN layer",
    "no_helper_bn": "normalised pseudo images",
    "no_category": "a class that T_0 is sure of",
    "no_diversity": "all classes alike",
}
CIFAR100 = study.TITLES["cifar100"]


def sentences(options: study.Options) -> list[str]:
    """Those whose runs have been made at a scale."""
    every = (of_student, of_techniques, of_parts, of_t_0_kept, of_changes)
    return [sentence for say in every if (sentence := say(options))]


def of_student(options: study.Options) -> str:
    """Table I: what S_0 learns of D_0's images alone."""
    found = [
        f"{gap.mean:.1f} points of it on {study.TITLES[dataset]} ({student.mean:.1f} of "
        f"{teacher.mean:.1f} %, n={gap.seeds}; in the paper {gap.paper:.1f} points)"
        for dataset, (teacher, student, gap, _) in table1.table(options).rows
        if gap.ours
    ]
    if not found:
        return ""
    return (
        "T_0 is a classifier trained on real images of its base classes, and S_0 a student that "
        "has seen only what the delegator D_0 draws, which is trained from T_0 alone; S_0 lacks "
        f"{_list(found)}."
    )


def of_techniques(options: study.Options) -> str:
    """Table II: which technique S_0 cannot do without."""
    rows = _column(table2.table(options), 0)
    whole, parts = rows[table2.NAMES["skd"]], {name: rows[table2.NAMES[name]] for name in MEANS}
    if not whole.ours or not all(cell.ours for cell in parts.values()):
        return ""
    lost = [
        (round(whole.mean - cell.mean, 1) + 0.0, f"{table2.NAMES[name]} ({MEANS[name]})")
        for name, cell in parts.items()
    ]
    lost.sort(reverse=True)
    (most, name), *others = lost
    return (
        f"Of what D_0 is trained with, S_0 needs one technique most: {name} it loses {most:.1f} "
        f"points on {CIFAR100}, "
        f"{_list([f'{name} {points:.1f}' for points, name in others])} "
        f"({_seeds([whole, *parts.values()])})."
    )


def of_parts(options: study.Options) -> str:
    """Table III: what the delegator and ALW are worth."""
    rows = _column(table3.table(options), 0)
    skd, alw = (rows[table3.NAMES[name]] for name in ("skd", "no_alw"))
    readings = [rows[name] for key, name in table3.NAMES.items() if key.startswith("no_skd_")]
    readings = [rows[table3.NAMES["no_skd"]], *readings]
    readings.remove(rows[table3.NAMES["no_skd_no_alw"]])
    if not all(cell.ours for cell in (skd, alw, *readings)):
        return ""
    without = sorted(cell.mean for cell in readings)
    return (
        f"Over {TASKS} tasks of new classes SKD's accuracy on all classes seen is {_percent(skd)} "
        f"on average on {CIFAR100}; without adaptive loss weighting (ALW) it is {alw.mean:.1f} %, "
        f"and without the delegator {without[0]:.1f} to {without[-1]:.1f} %, as one reads what the "
        "paper leaves out."
    )


def of_t_0_kept(options: study.Options) -> str:
    """Where SKD stands beside a T_0 that learns nothing."""
    found = []
    for dataset in study.DATASETS:
        kept = table3.nothing_learned(options, dataset, TASKS)
        if kept.ours:
            runs = [study.learner(dataset, options.scale, seed, TASKS) for seed in options.seeds]
            averages = [x["average_incremental_accuracy"] for x in study.summaries(runs, options)]
            skd = Cell(tuple(100 * average for average in averages))
            found.append(
                f"{difference(skd.mean, kept.mean)} its {_percent(kept)} on {study.TITLES[dataset]}"
            )
    if not found:
        return ""
    return (
        "What counts beside that is a T_0 that is simply kept and learns no new class: over "
        f"{TASKS} tasks SKD as the paper has it is {_list(found)}."
    )


def of_changes(options: study.Options) -> str:
    """The best of the changes to SKD in the tables on forgetting, as far as they have been run."""
    found = []
    for changes in forgetting.TABLES:
        table = changes.table(options)
        if table is None:
            continue
        rows = _column(table, 0)
        for name in (AS_IT_IS, LABEL):
            rows.pop(name, None)
        tried = {name: cell for name, cell in rows.items() if cell.ours}
        if not tried:
            continue
        best = max(tried, key=lambda name: tried[name].mean)
        runs = [changes.run(options.scale, seed, best) for seed in options.seeds]
        same_seeds = study.on_seeds_of(runs, options)
        kept = table3.nothing_learned(same_seeds, changes.dataset, TASKS)
        beside = f", {difference(tried[best].mean, kept.mean)} T_0" if kept.ours else ""
        found.append(f"{_percent(tried[best])} on {study.TITLES[changes.dataset]} ({best}{beside})")
    if not found:
        return ""
    return (
        "Of the changes to SKD that the tables on forgetting have numbers of, none of them in the "
        f"paper, the best reaches {_list(found)}."
    )


def _column(table: Table, column: int) -> dict[str, Cell]:
    return {name: cells[column] for name, cells in table.rows}


def _percent(cell: Cell) -> str:
    """A mean over seeds, with the deviation or that it is of one seed."""
    spread = f" ± {cell.deviation:.1f}" if cell.deviation is not None else ""
    return f"{cell.mean:.1f}{spread} % (n={cell.seeds})"


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({cell.seeds for cell in cells})
    return f"n={counts[0]}" if len(counts) == 1 else f"n={counts[0]} to {counts[-1]}"


def _list(words: Sequence[str]) -> str:
    """Several with commas and an "and"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last

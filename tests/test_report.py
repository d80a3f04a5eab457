"""The report: what it says first, and what it shows beside what."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_study import Page, options, place, summary

from experiments import (
    beside_real,
    everything,
    figure5,
    findings,
    first_task,
    forgetting,
    gap,
    heads,
    report,
    table2,
    table3,
)
from experiments.framework import cost, halts, kept, making, scripts, study
from experiments.framework.changes import AS_IT_IS, CHANGE
from experiments.framework.tables import Cell, Table
from skd_jax import page, plots
from skd_jax.files import read_json, write_json


@pytest.fixture(scope="module")
def committed() -> study.Options:
    """The results that are kept in git, at mini scale."""
    return study.with_all_seeds(study.Options("mini", (), (), study.RESULTS, "", 1))


@pytest.mark.parametrize(("scale", "told"), [("mini", 5), ("midi", 3)])
def test_the_committed_report_is_of_the_committed_results(scale, told):
    committed = study.with_all_seeds(study.Options(scale, (), (), study.RESULTS, "", 1))
    written = (study.RESULTS / "report.md").read_text()
    for exhibit in report.EXHIBITS:
        if exhibit.table and (table := exhibit.table(committed)):
            # "Not run" is what a table says of results that it does not recognise any more.
            assert table.markdown() == (committed.out / f"{exhibit.name}.md").read_text()
            assert table.markdown() in written
    sentences = findings.sentences(committed)
    assert len(sentences) == told
    assert written.index(sentences[0]) < written.index("## Contents") < written.index("### Table I")
    for number, sentence in enumerate(sentences, 1):
        assert f"{number}. {sentence}\n" in written


@pytest.mark.parametrize(
    ("folder", "scale", "shown"),
    [("methods", "mini", 2), ("translated", "mini", 2), ("translated", "midi", 1)],
)
def test_committed_comparisons_are_of_their_results(folder, scale, shown):
    results = study.RESULTS.parent / folder
    given = study.with_all_seeds(study.Options(scale, (), (), results, "", 1))
    found = {one.name: table for one in figure5.COMPARISONS if (table := one.table(given))}
    assert len(found) == shown
    for name, table in found.items():
        assert table.markdown() == (given.out / f"{name}.md").read_text()
        assert json.loads(json.dumps(table.json())) == read_json(given.out / f"{name}.json")


def test_readme_has_the_numbers_of_the_report(committed, repo):
    text = (repo / "experiments" / "README.md").read_text()
    tables = {table2: 0, table3: 0}
    cells = [cell for t in tables for _, row in t.EXHIBIT.table(committed).rows for cell in row]
    said = {str(cell) for cell in cells if cell.ours}
    here = text[text.index("### Mini scale") : text.index("| seed 0, mini scale")]
    shown = set(re.findall(r"\d+\.\d\d ± \d+\.\d\d", here))
    assert shown <= said
    assert len(shown) > 12
    end = text.index("## The mini scales")
    by_seed = dict(re.findall(r"\| ([\w-]+) \| ([\d. |]+) \|", text[:end]))
    for changes in forgetting.TABLES:
        dataset = changes.dataset
        first = dataclasses.replace(committed, seeds=(0,))
        both = forgetting.HALF_WAY if dataset == "cifar100" else list(changes.changes)[-1]
        delegator = study.summary(study.student(dataset, "mini", 0), first)["delegator"][0]
        learners = [study.learner(dataset, "mini", 0, 5), changes.run("mini", 0, both)]
        learners.append(study.learner(dataset, "mini", 0, 5, "no_skd"))
        numbers = [delegator["teacher_accuracy"], delegator["student_accuracy"]]
        numbers += [study.summary(r, first)["average_incremental_accuracy"] for r in learners]
        numbers = [100 * x for x in numbers] + [table3.nothing_learned(first, dataset, 5).mean]
        assert by_seed[study.TITLES[dataset]] == " | ".join(f"{x:.1f}" for x in numbers)


def test_readme_has_the_numbers_of_the_midi_tables(repo):
    text = (repo / "experiments" / "README.md").read_text()
    here = text[text.index("### Midi scale") : text.index("**`recipe=translated`** (")]  # below
    folder = study.RESULTS / "midi"
    names = ("table1", "table3", "figure5_cifar100_5", "first_task", "gap", "forgetting", "heads")
    every = "".join((folder / f"{name}.md").read_text() for name in names)
    said = {f"{float(number):.1f}" for number in re.findall(r"-?\d+\.\d+", every)}
    rows = [line for line in here.splitlines() if re.match(r"\| .* \d", line)]
    shown = [number for row in rows for number in re.findall(r"-?\d+\.\d\b", row)]
    assert len(shown) > 30 and set(shown) <= said


KEEPING = ("iCaRL", "EEIL", "BiC", "LUCIR")  # 20 images a class
AT_MIDI = {  # rows of the table of methods at midi scale, without the seed
    "all images of all classes": "joint",
    "fine-tuning": "finetune",
    "LwF": "lwf",
    "EWC": "ewc",
    "LwF.MC": "lwf_mc",
    "SKD": "skd",
    "SKD, `recipe=ours`": "ours",
    "T_0 kept": kept.LABEL,
    "SKD, `recipe=translated`": "translated",
    "ABD": "abd",
    "R-DFCIL": "rdfcil",
    **{f"frozen features: {name}": name.lower() for name in ("NCM", "ridge", "FeTrIL", "LDA")},
    "the same with D_0's images of the base classes: NCM": "pseudo_ncm",
    **{f"with D_0's images: {x}": f"pseudo_{x.lower()}" for x in ("ridge", "FeTrIL", "LDA")},
    **{f"{name}, 20 images a class kept": name.lower() for name in KEEPING},
}


def test_readme_has_the_methods_at_midi_scale(repo):
    shown = rows_of((repo / "experiments" / "README.md").read_text(), "| five tasks, %")
    found = numbers_of("paper/midi/figure5_cifar100_5")
    written = read_json(study.RESULTS / "midi" / "figure5_cifar100_5.json")
    place = written["columns"].index("seeds")
    seeds = {re.sub("; n=.*", "", x["name"]): x["cells"][place]["shown"] for x in written["rows"]}
    assert len(shown) == len(AT_MIDI) == len(found)
    measures = ("average, %", "average less that of T_0 kept, points", "final, %")
    measures += ("base classes at the end, %", "new classes at the end, %")
    for said, cells in shown.items():
        name = re.sub(r" \((joint; )?seed 1[^)]*\)", "", said)
        of = found[AT_MIDI[name]]
        assert seeds[AT_MIDI[name]] == ("1" if "seed 1" in said else "0, 1")
        means = [np.mean(of[measure]) for measure in measures]
        # A mean of two may lie midway between two tenths.
        np.testing.assert_allclose([float(x) for x in cells], means, atol=0.05 + 1e-9, err_msg=said)


def test_readme_has_the_number_of_runs(committed, repo):
    """Of ``everything`` on the data sets that are at hand; a new row of a table is a run more."""
    text = (repo / "experiments" / "README.md").read_text()
    words = (
        r"has (\d+) runs on the three .*?; (\d+) of them have been\s+made, in ([\d.]+) core hours"
    )
    said = re.search(rf"{words}. The other (\d+) .* they take ([\d.]+) more", text, re.DOTALL)
    assert said
    here = [run for run in everything.planned(committed) if run.dataset != "imagenet_subset"]
    runs = cost._with_starts(here)
    found = [minutes for run in runs if (minutes := cost.minutes(run, committed)) is not None]
    lacking = len(runs) - len(found)
    hours, more = sum(found) / 60, sum(found) / len(found) * lacking / 60
    numbers = [str(len(runs)), str(len(found)), f"{hours:.1f}", str(lacking), f"{more:.1f}"]
    assert list(said.groups()) == numbers


def test_what_runs_of_midi_start_from_is_there():
    """With its checkpoints: nothing is made again before a run of any method."""
    wanted = [(study.RESULTS, study.method("cifar100", "midi", 1, 5, x)) for x in ("lwf", "ours")]
    wanted += [
        (study.RESULTS, first_task.TABLE.run("midi", 1, name)) for name in first_task.WITH_AUGMENTED
    ]
    of_translated = study.RESULTS.parent / "translated"
    wanted += [
        (of_translated, study.method("cifar100", "midi", 2, 5, name)) for name in ("lwf", "ours")
    ]
    for results, run in wanted:
        given = study.Options("midi", (run.seed,), ("cifar100",), results, "", 1)
        assert run.start and study.summary(run.start, given) and making.is_over(run.start, given)


def test_readme_has_the_minutes_of_halts(repo):
    text = (repo / "experiments" / "README.md").read_text()
    methods, paper = study.RESULTS.parent / "methods", study.RESULTS
    halted = {}

    def minutes(run: study.Run | None, given: study.Options) -> float:
        """Those in which a finished run was halted, in the run that it starts from too."""
        if not run or not (found := study.summary(run, given)):
            return 0.0
        left = halts.seconds(run, given) or {}
        return (sum(found["seconds"].values()) - sum(left.values())) / 60

    for results, scale in ((methods, "mini"), (paper, "midi")):
        given = study.with_all_seeds(study.Options(scale, (), (), results, "", 1))
        for run in cost._with_starts(everything.runs(given)):
            found = minutes(run, given)
            if found and (lost := round(found - minutes(run.start, given))):
                halted[run.name.split("/")[-1], run.seed] = lost
    assert halted == {
        **{("finetune", 0): 55, ("si", 0): 55, ("skd", 2): 12, ("bic", 1): 12},
        **{("lwf", 0): 5, ("joint", 0): 5},
        ("skd", 1): 30,  # midi's D_0
        **{("the_rates_fall_as_a_cosine", 0): 245, ("rdfcil", 0): 62},
        ("real_images_old_head_fixed_as_classes_do", 1): 11,
    }
    assert "halted for 245 minutes" in text and "R-DFCIL's of seed 0 for 62" in text
    assert "a first task of seed 1 for 11" in text
    assert "55 minutes of finetune and of si, 12 of SKD's and of BiC's" in text


def words_of(path: Path) -> str:
    """A text in one line."""
    return " ".join(path.read_text().split())


def rows_of(text: str, begins: str) -> dict[str, list[str]]:
    """The cells of the table in a Markdown text whose first line begins so, by row."""
    lines = text[text.index(begins) :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def numbers_of(name: str) -> dict[str, dict[str, tuple[float, ...]]]:
    """The numbers of a committed table of methods, by row and column."""
    found = json.loads((study.RESULTS.parent / f"{name}.json").read_text())
    return {
        re.sub("; n=.*", "", row["name"]): {
            column: tuple(cell["ours"])
            for column, cell in zip(found["columns"], row["cells"], strict=True)
        }
        for row in found["rows"]
    }


def test_readmes_say_what_the_delegator_is_worth(committed, repo):
    """Where Eq. 10 runs over all outputs, and where it does not."""
    first, text = (words_of(repo / name) for name in ("README.md", "experiments/README.md"))
    five, ten = ({name: row[n].mean for name, row in table3.table(committed).rows} for n in (0, 1))
    skd, alw, all_outputs, new, fixed = (
        table3.NAMES[name]
        for name in ("skd", "no_alw", "no_skd", "no_skd_new_outputs", "no_skd_old_head_fixed")
    )
    worth = [of[skd] - of[alw] for of in (five, ten)]
    assert "ALW is worth {:.1f} points over five tasks and {:.1f} over".format(*worth) in text
    words = f"from {five[skd]:.1f} % to {five[all_outputs]:.1f} or {five[fixed]:.1f} %"
    assert words in text
    assert f"{five[new]:.1f} % over five tasks, and {ten[new]:.1f} over ten, where SKD" in text
    assert f"has {five[new]:.1f} % on CIFAR-100, mini, where SKD has {five[skd]:.1f}" in first
    runs = [study.learner("cifar100", "mini", s, 5, "no_skd_new_outputs") for s in committed.seeds]
    ends = [100 * np.array(s["accuracy_matrix"][-1]) for s in study.summaries(runs, committed)]
    base, later = np.mean([row[0] for row in ends]), np.mean([row[1:] for row in ends])
    assert f"right on {later:.1f} % of the new" in text
    assert f"({base:.1f} % of the base classes' images" in text


def test_readme_has_the_numbers_of_frozen_features_and_of_our_recipe(repo):
    text = words_of(repo / "experiments" / "README.md")
    mini, midi = (
        numbers_of("methods/mini/figure5_cifar100_5"),
        numbers_of("paper/midi/figure5_cifar100_5"),
    )

    def mean(of: dict, name: str, column: str = "average, %") -> str:
        return f"{np.mean(of[name][column]):.1f}"

    t_0, ours = mean(mini, kept.LABEL), f"{mini['ours']['average, %'][0]:.1f}"
    for words in (
        f"ridge has {mean(mini, 'ridge')} %, and on seed 0 LDA {mean(mini, 'lda')} and FeTrIL "
        f"{mean(mini, 'fetril')}, where that T_0 kept has {t_0} "
        f"(seed 0: {mini[kept.LABEL]['average, %'][0]:.1f};",
        f"From the same T_0 SKD has {mean(mini, 'skd')} and `recipe=ours` {mean(mini, 'ours')}.",
        f"for {mean(mini, 'lda')} % with LDA (seed 0), {mean(mini, 'ridge')} with ridge and "
        f"{mean(mini, 'fetril')} with FeTrIL (seed 0), where it has {t_0} when it is kept",
        f"R-DFCIL has {mean(mini, 'rdfcil')} where it has {ours} (seed 0)",
        f"real means (LDA {mean(midi, 'lda')}, FeTrIL {mean(midi, 'fetril')}) and R-DFCIL "
        f"({mean(midi, 'rdfcil')}, with",
        f"LDA has {mean(midi, 'lda', 'final, %')} where it has {mean(midi, 'ours', 'final, %')}",
    ):
        assert words in text, words
    without = "average without the base, %"
    for title, name in (("NCM", "ncm"), ("FeTrIL", "fetril"), ("LDA", "lda"), ("ridge", "ridge")):
        both = (mini[one][without][0] for one in (f"pseudo_{name}", name))
        assert "{} {:.1f} of {:.1f}".format(title, *both) in text


OF_README = {  # of the table of recipe=ours: its rows, and its columns' rows in those
    "CIFAR-100, midi": "paper/midi/figure5_cifar100_5",
    "CIFAR-100, mini": "methods/mini/figure5_cifar100_5",
    "digits": "methods/mini/figure5_digits_3",
}
COLUMNS = ("skd", "ours", kept.LABEL, "rdfcil", "lda", "lucir")


def test_readme_has_the_numbers_of_the_comparisons(repo):
    text = (repo / "README.md").read_text()
    shown = rows_of(text, "| data | SKD | `recipe")
    assert len(shown) == len(OF_README)
    for (said, cells), (name, path) in zip(shown.items(), OF_README.items(), strict=True):
        found = numbers_of(path)
        means = [np.mean(found[column]["average, %"]) for column in COLUMNS]
        assert said.startswith(name) and cells == [f"{mean:.1f}" for mean in means]


def test_readme_has_the_means_of_midi_scale(repo):
    (said,) = re.findall(r"^\| CIFAR-100, midi \|(.*)\|$", (repo / "README.md").read_text(), re.M)
    found = numbers_of("paper/midi/figure5_cifar100_5")
    given = study.Options("midi", (0, 1), ("cifar100",), study.RESULTS, "", 1)
    runs = [study.student("cifar100", "midi", seed) for seed in given.seeds]
    first = [summary["delegator"][0] for summary in study.summaries(runs, given)]
    assert len(first) == 2
    numbers = [
        100 * np.mean([row["teacher_accuracy"] for row in first]),
        100 * np.mean([row["student_accuracy"] for row in first]),
        *(np.mean(found[name]["average, %"]) for name in ("skd", kept.LABEL)),
    ]
    assert re.findall(r"[\d.]+", said) == [f"{number:.1f}" for number in numbers]


def test_readme_has_the_numbers_of_other_heads(repo):
    text = (repo / "experiments" / "README.md").read_text()
    found = numbers_of("paper/midi/heads")
    plain = ("fine-tuning", "LwF", "EWC", "LwF.MC", "SKD", "ABD", "R-DFCIL")
    names = {"T_0": "T_0"} | {name: AT_MIDI[name] for name in plain}
    names |= {f"`recipe={name}`": name for name in ("ours", "translated")}
    names |= {f"{name}, 20 images a class kept": name.lower() for name in KEEPING}
    shown = rows_of(text, "| features of |")
    assert shown.keys() == names.keys() and len(found) == len(names)
    for name, cells in shown.items():
        numbers = [f"{found[names[name]][f'{head}: all, %'][0]:.1f}" for head in heads.HEADS]
        assert cells == numbers
    more = {
        name: of[f"{heads.HEADS[-1]}: all, %"][0] - of[f"{heads.HEADS[0]}: all, %"][0]
        for name, of in found.items()
    }
    some = [round(more[name]) for name in ("icarl", "rdfcil", "ours", "translated")]
    order = ("bic", "lucir", "eeil", "ewc", "T_0", "lwf", "lwf_mc", "abd", "skd")
    said = [round(more[name]) for name in order]
    said[3:3] = [min(some), max(some)]
    words = (
        "is {} points for BiC, {} for LUCIR, {} for EEIL, {} to {} for iCaRL, R-DFCIL, ours and "
        "translated, {} for EWC, {} for a T_0 that is kept, {} for LwF, {} for LwF.MC, {} for ABD, "
        "and {} for SKD."
    )
    assert words.format(*said) in " ".join(text.split())


def test_readmes_have_the_numbers_of_translated(repo):
    text = (repo / "experiments" / "README.md").read_text()
    shown = rows_of(text, "| `recipe=translated` beside")
    found, columns = {}, (kept.LABEL, "skd", "ours", "translated")
    for name, where, seed in (
        ("CIFAR-100, midi (seed 1)", "paper/midi/figure5_cifar100_5", -1),
        ("CIFAR-100, mini (seeds 0 and 1)", "translated/mini/figure5_cifar100_5", slice(None)),
        ("digits (seeds 0 and 1)", "translated/mini/figure5_digits_3", slice(None)),
    ):
        of = numbers_of(where)
        found[name] = [np.mean(of[column]["average, %"][seed]) for column in columns]
        for measure in ("final, %", "forgetting"):
            found[name] += [np.mean(of[column][measure][seed]) for column in columns[2:]]
    assert shown == {name: [f"{x:.1f}" for x in cells] for name, cells in found.items()}
    midi, mini, digits = found.values()
    first = words_of(repo / "README.md")
    assert f"{digits[3]:.1f} % on digits (ours {digits[2]:.1f};" in first
    assert f"{mini[3]:.1f} at mini scale (ours {mini[2]:.1f};" in first
    assert f"{midi[3]:.1f} on midi seed 1 (ours {midi[2]:.1f};" in first


def test_readmes_have_the_numbers_of_a_seed_that_nothing_was_chosen_on(repo):
    text, first = (words_of(repo / name) for name in ("experiments/README.md", "README.md"))
    found = numbers_of("translated/midi/figure5_cifar100_5")
    names = {"`translated`": "translated", "R-DFCIL": "rdfcil", "FeTrIL": "fetril"}
    names |= {"LDA": "lda", "NCM": "ncm", "a T_0 that is kept": kept.LABEL}
    assert {*names.values()} == {*found}
    average = {name: found[of]["average, %"][0] for name, of in names.items()}
    end = {name: found[of]["final, %"][0] for name, of in names.items()}
    (begin, *others, last) = names
    said = [f"{average[begin]:.1f} and {end[begin]:.1f} % with {begin}"]
    said += [f"{average[name]:.1f} and {end[name]:.1f} with {name}" for name in others]
    said.append(f"and {average[last]:.1f} and {end[last]:.1f} with {last}.")
    assert f"at the end are {', '.join(said)}" in text
    own = average[begin]
    assert f"does not hold here ({average['R-DFCIL'] - own:.1f} below)" in text
    more, fewer = own - average["FeTrIL"], end["FeTrIL"] - end[begin]
    words = (
        f"Beside FeTrIL it has {more:.1f} points more on average and {fewer:.1f} fewer at the end"
    )
    assert f"{words}, where LDA has the most." in text and end["LDA"] == max(end.values())
    numbers = [end[name] for name in (begin, "R-DFCIL", "FeTrIL", "LDA")]
    assert (
        f"on which nothing was chosen, it has {own:.1f} %, R-DFCIL {average['R-DFCIL']:.1f}, "
        f"FeTrIL {average['FeTrIL']:.1f} and LDA {average['LDA']:.1f}, and at the end "
        f"{numbers[0]:.1f}, {numbers[1]:.1f}, {numbers[2]:.1f} and {numbers[3]:.1f}." in first
    )
    run = study.method("cifar100", "midi", 2, 5, "translated")
    given = study.Options("midi", (2,), ("cifar100",), study.RESULTS.parent / "translated", "", 1)
    (remark,) = study.summaries([run], given)[0]["remarks"]
    hardly = dict(re.findall(r"(D_\d): ([^;)]*)", remark))
    more = {name: int(n) for name, n in re.findall(r"(D_\d): [^;)]*and (\d+) more", remark)}
    count = {name: len(x.split(", ")) for name, x in hardly.items()}
    assert count == {"D_2": 3, "D_3": 9, "D_4": 10} and more == {"D_4": 11}
    assert "in D_2 three of 70, in D_3 nine of 80 and in D_4 21 of 90 (seed 1: 19)" in text
    (of_seed_1,) = midi_run(study.method("cifar100", "midi", 1, 5, "translated"))["remarks"]
    assert re.search(r"D_4: (?:[^;),]*, ){9}[^;),]* and 9 more", of_seed_1)


def midi_run(run: study.Run) -> dict[str, Any]:
    """The summary of a committed run at midi scale."""
    given = study.Options("midi", (run.seed,), ("cifar100",), study.RESULTS, "", 1)
    (summary,) = study.summaries([run], given)
    return summary


def test_readmes_have_the_numbers_of_augmented_pseudo_images_in_stage_one(repo):
    text = words_of(repo / "experiments" / "README.md")
    changes = (AS_IT_IS, gap.STUDENT_COSINE, gap.AUGMENTED, gap.TWICE_AUGMENTED)
    runs = [gap.CIFAR100.run("midi", 1, name) for name in changes]
    measures = ("teacher_accuracy", "student_accuracy", "student_accuracy_at_length")
    teacher, student, at_length = (
        [midi_run(run)["delegator"][0].get(measure) for run in runs] for measure in measures
    )
    _, cosine, augmented, twice = range(len(runs))

    def points(of: list[float], at: int) -> str:
        return f"{100 * of[at]:.1f}"

    def last(at: int, term: str) -> float:
        lines = (runs[at].folder(study.RESULTS) / "metrics.jsonl").read_text().splitlines()
        return [row[term] for row in map(json.loads, lines) if term in row][-1]

    def kl(at: int, images: str) -> str:
        path = runs[at].folder(study.RESULTS) / "delegator_0.json"
        return f"{np.mean([layer[images]['kl'] for layer in read_json(path)['layers']]):.3f}"

    below = [100 * (teacher[twice] - of[twice]) for of in (at_length, student)]
    minutes = midi_run(runs[twice])["seconds"]["delegator"] / 60
    for words in (
        f"S_0 has {points(student, cosine)} % ({points(student, 0)} as it is), and "
        f"{points(at_length, cosine)} at T_0's length",
        f"{points(student, augmented)} and {points(at_length, augmented)}.",
        f"S_0 has {points(student, twice)} %, and {points(at_length, twice)} at T_0's length",
        "That is {:.1f} points below T_0 once its features are as long, and {:.1f} as".format(
            *below
        ),
        f"R_feature ends at {last(augmented, 'feature_statistics'):.1f}, of cropped images, and "
        f"without at {last(cosine, 'feature_statistics'):.1f}.",
        f"*The same over twice the rounds* ({minutes:.0f} minutes, others beside)",
        f"L_imi ends at {last(twice, 'imitation'):.3f}.",
        f"of {kl(augmented, 'pseudo')} and {kl(augmented, 'real')}; without {kl(cosine, 'pseudo')}",
    ):
        assert words in text, words
    first = words_of(repo / "README.md")
    for words in (
        f"T_0 has {points(teacher, 0)} %, S_0 has {points(student, 0)};",
        f"falls to nothing, {points(student, augmented)}, and over twice the rounds "
        f"{points(student, twice)}, or {points(at_length, twice)} once its features",
    ):
        assert words in first, words
    (remark,) = midi_run(runs[augmented])["remarks"]
    assert "(D_0: oak_tree)" in remark and "One class, oak_tree, it hardly draws" in text


def test_readmes_have_the_numbers_of_what_s_n_learns_of_length(repo):
    text, first = (words_of(repo / name) for name in ("experiments/README.md", "README.md"))
    names = (gap.AUGMENTED, gap.LENGTH, gap.TWICE_AUGMENTED, gap.TWICE_TENTH_OF_LENGTH)
    runs = [gap.CIFAR100.run("midi", 1, name) for name in names]
    reports = [midi_run(run)["delegator"][0] for run in runs]
    minutes = [round(midi_run(run)["seconds"]["delegator"] / 60) for run in runs]
    teacher, student, at_length, agreement = (
        [100 * report[name] for report in reports]
        for name in (
            "teacher_accuracy",
            "student_accuracy",
            "student_accuracy_at_length",
            "agreement",
        )
    )
    logs = [(run.folder(study.RESULTS) / "metrics.jsonl").read_text().splitlines() for run in runs]
    imitation = [json.loads(log[-1])["imitation"] for log in logs]
    for words in (
        f"({minutes[1]} minutes), S_0 has {student[1]:.1f} % as it is, "
        f"{student[1] - student[0]:.1f} points more than without, and {at_length[1]:.1f} at T_0's "
        f"length, {at_length[0] - at_length[1]:.1f} fewer",
        f"(L_imi ends at {imitation[1]:.3f}, not {imitation[0]:.3f})",
        f"({minutes[3]} minutes), {student[3]:.1f} and {at_length[3]:.1f}, so "
        f"{teacher[3] - student[3]:.1f} points below T_0 as it is",
        f"of {agreement[3]:.0f} % of the test images ({agreement[2]:.0f} % without)",
        f"still gives the most: {at_length[2]:.1f}.",
    ):
        assert words in text, words
    assert f"(`stage_one.feature_length`), {student[3]:.1f}." in first


def test_readmes_have_the_numbers_of_augmented_pseudo_images_in_stage_two(repo):
    text = words_of(repo / "experiments" / "README.md")
    changed, ours = f"{first_task.OURS}, {gap.AUGMENTED}", first_task.whole_of_ours("midi", 1)
    new, as_it_is = (midi_run(run) for run in (first_task.TABLE.run("midi", 1, changed), ours))
    whole = midi_run(forgetting.CIFAR100.run("midi", 1, changed))
    others = [midi_run(study.method("cifar100", "midi", 1, 5, x)) for x in ("rdfcil", "translated")]
    other_seed = midi_run(ours.with_seed(0))

    def percent(*shares: float) -> list[float]:
        return [100 * share for share in shares]

    def of_first_task(summary: dict[str, Any]) -> list[float]:
        return percent(summary["top1_seen"][1], *summary["accuracy_matrix"][1][:2])

    def of_five(summary: dict[str, Any]) -> list[float]:
        return percent(summary["average_incremental_accuracy"], summary["final_accuracy"])

    pairs = [*zip(of_first_task(new), of_first_task(as_it_is), strict=True)]
    averages, ends = zip(of_five(whole), of_five(as_it_is), strict=True)
    seeds = of_first_task(other_seed)[0] - of_first_task(as_it_is)[0]
    (hardly,) = re.findall(r"D_4: ([^;)]*)", *whole["remarks"])
    assert len(hardly.split(", ")) == 5 and "D_4 hardly draws five of the 90 classes." in text
    for words in (
        "has {:.1f} % in place of {:.1f} after the first task (base classes {:.1f} and {:.1f}, new "
        "ones {:.1f} and {:.1f})".format(*itertools.chain(*pairs)),
        f"differs by {abs(seeds):.1f} between two seeds",
        "R-DFCIL has {:.1f} there and `recipe=translated` {:.1f}".format(
            *(of_first_task(other)[0] for other in others)
        ),
        "it is {:.1f} in place of {:.1f} on average and".format(*averages),
        "{:.1f} in place of {:.1f} at the end".format(*ends),
        "(R-DFCIL {:.1f} and {:.1f}, translated {:.1f} and {:.1f};".format(
            *itertools.chain(*(of_five(other) for other in others))
        ),
        "S_1 has {:.0f} % still where T_1 has {:.0f}".format(
            *percent(*(whole["delegator"][1][f"{of}_accuracy"] for of in ("student", "teacher")))
        ),
    ):
        assert words in text, words
    gained = f"{averages[0] - averages[1]:.1f} points on average."
    assert gained in words_of(repo / "README.md")


def test_findings_follow_the_results(tmp_path):
    given = options(tmp_path, seeds=(0,))
    assert findings.sentences(given) == []
    row = {"task": 0, "teacher_accuracy": 0.6, "gap": 0.1, "agreement": 0.7}
    right = {"skd": 0.5, "no_category": 0.3, "no_diversity": 0.49}
    for name in study.ABLATIONS:
        found = summary(0, delegator=[{**row, "student_accuracy": right.get(name, 0.45)}])
        place(study.student("cifar100", "mini", 0, name), tmp_path, found)
    first, second = findings.sentences(given)
    assert "lacks 10.0 points of it on CIFAR-100 (50.0 of 60.0 %, n=1; in the paper 0.2" in first
    assert "needs one technique most: without L_cat" in second
    assert re.search(r"L_cat \(.*?\) it loses 20.0 points .* L_div \(.*?\) 1.0 \(n=1\)", second)
    for average, words in ((0.3, "12.3 points below"), (0.5, "7.7 points above")):
        run = study.learner("cifar100", "mini", 0, 5)
        shutil.rmtree(run.folder(tmp_path), ignore_errors=True)
        place(run, tmp_path, summary(0, average_incremental_accuracy=average))
        beside = findings.of_t_0_kept(given)
        assert f"{words} its 42.3 % (n=1) on CIFAR-100" in beside
        note = table3.table(given).note
        assert f"SKD is {words} it over 5 tasks" in note


def test_findings_say_that_the_best_change_is_of_those_in_the_tables(tmp_path):
    given = options(tmp_path, seeds=(0,))
    for name, average in (("as it is", 0.3), (forgetting.HALF_WAY, 0.4), ("beta x 3", 0.35)):
        found = summary(0, average_incremental_accuracy=average)
        place(forgetting.CIFAR100.run("mini", 0, name), tmp_path, found)
    (said,) = (s for s in findings.sentences(given) if "the best reaches" in s)
    assert said.startswith("Of the changes to SKD that the tables on forgetting have numbers of")
    assert f"40.0 % (n=1) on CIFAR-100 ({forgetting.HALF_WAY}, 2.3 points below T_0)" in said


def test_a_kept_t_0_is_right_on_its_own_classes_alone():
    images = np.array([1.0, 0.5, 0.25, 2.0])  # the base step's being 1
    matrix = np.tril(np.random.default_rng(0).uniform(size=(4, 4)))
    top1 = [row[: n + 1] @ images[: n + 1] / images[: n + 1].sum() for n, row in enumerate(matrix)]
    found = summary(0, accuracy_matrix=matrix, top1_seen=top1, classes_per_task=[4, 2, 2, 2])
    assert kept.test_images(found) == pytest.approx(images)
    assert kept.accuracies(found) == pytest.approx(top1[0] / np.cumsum(images))
    # Where all accuracies are the same, weights are left open: classes have as many images then.
    found = {**found, "accuracy_matrix": np.full((4, 4), 0.5), "top1_seen": [0.5] * 4}
    assert kept.test_images(found) == pytest.approx([1, 0.5, 0.5, 0.5])


def test_the_number_of_seeds_is_said_once():
    def table(*rows: tuple[int, int]) -> str:
        cells = [tuple(Cell((1.0,) * n) for n in row) for row in rows]
        named = tuple((f"row {k}", row) for k, row in enumerate(cells))
        return Table("a title", ("x", "y"), named, "").markdown()

    same, by_row, mixed = table((2, 2), (2, 0)), table((2, 2), (1, 0)), table((2, 1))
    assert same.count("n=2") == 1
    assert "| row 0; n=2 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in by_row
    assert "| row 1; n=1 | 1.00 | not run |" in by_row
    assert "| row 0 | 1.00 ± 0.00; n=2 | 1.00; n=1 |" in mixed


def test_every_change_is_positive_where_it_helps(committed):
    """The column that is compared is one of which more is better."""
    for exhibit in report.EXHIBITS:
        table = exhibit.table and exhibit.table(committed)
        if table and CHANGE in table.columns:
            at = table.columns.index(CHANGE)
            first = dict(table.rows)[AS_IT_IS][at - 1]
            assert "gap" not in table.columns[at - 1]
            for _, cells in table.rows:
                if first.ours and len(cells[at].ours) == len(first.ours):
                    assert cells[at].mean == pytest.approx(cells[at - 1].mean - first.mean)


def test_contents_lead_to_every_part(tmp_path):
    place(study.learner("cifar100", "mini", 0, 5), tmp_path, summary(0))
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "report.html").read_text()
    links = [load[1:] for load in Page(text).loads if load.startswith("#")]
    assert len(links) == len(set(links)) > 15
    assert all(text.count(f"id='{link}'") == 1 for link in links)
    markdown = (tmp_path / "report.md").read_text()
    assert all(markdown.count(f'id="{link}"') == 1 for link in links)
    assert "--data_dir=DIR" in text  # that there could be real images


def test_many_columns_stand_below_each_other_on_a_narrow_page():
    def html(columns: int) -> str:
        names = tuple(f"column {k}" for k in range(columns))
        return Table("a title", names, (("row", (Cell((1.0,)),) * columns),), "").html()

    assert "class=many" not in html(page.COLUMNS)
    assert "class=many" in html(page.COLUMNS + 1)
    assert 'data-column="column 8"' in html(page.COLUMNS + 1)
    turned = Table("a title", ("x", "y"), (("row", (Cell((1.0,)), Cell((2.0,)))),), "").turned()
    assert turned.columns == ("row",)
    assert [(name, str(*cells)) for name, cells in turned.rows] == [("x", "1.00"), ("y", "2.00")]


def test_pseudo_images_stand_beside_real_ones_of_their_class(tmp_path):
    run, given = study.student("digits", "mini", 0), options(tmp_path)
    assert beside_real.by_class(run, given, tmp_path) is None
    folder = place(run, tmp_path, summary(0, dataset="digits"))
    classes, shares = ["4", "2", "7", "6"], np.array([0.4, 0.3, 0.2, 0.1])
    delegator = {**read_json(folder / "delegator_0.json"), "classes": classes}
    write_json(folder / "delegator_0.json", {**delegator, "label_shares": shares.tolist()})
    path = folder / "pseudo_images_by_class_0.png"
    drawn, labels = np.full((40, 8, 8, 1), 0.2), np.repeat(np.arange(4), 10)
    plots.class_grid(drawn, labels, classes, path, (0,), (1,), shares=shares)
    picture = beside_real.by_class(run, given, tmp_path / "new" / "page")
    assert picture
    with Image.open(picture.path) as image:
        both = np.asarray(image.convert("L"))
    grey = both == 51
    columns = np.flatnonzero(grey.mean(axis=0) > 0.5)
    runs = 1 + np.count_nonzero(np.diff(columns) > 1)
    assert runs == 5  # of ten, and no other is cut
    right = both[60:, columns.max() + 60 :]
    assert np.count_nonzero((right < 100).mean(axis=0) > 0.1) > 100
    assert not grey[:, columns.max() + 60 :].mean(axis=0).max() > 0.3


def test_digits_are_shown_beside_real_ones(tmp_path):
    given = options(tmp_path / "paper")
    assert beside_real.digits(given) is None
    shutil.copytree(study.RESULTS.parent / "digits", tmp_path / "digits")
    given.results.mkdir()
    picture = beside_real.digits(given)
    assert picture
    assert picture.path == tmp_path / "paper" / "beside_real_digits.png"
    assert "seed 1" in picture.source
    with (
        Image.open(picture.path) as image,
        Image.open(study.RESULTS / "beside_real_digits.png") as shown,
        Image.open(tmp_path / "digits" / beside_real.DRAWN) as drawn,
    ):
        assert image.size == shown.size
        assert drawn.width < image.width < 2 * drawn.width
    (tmp_path / "digits" / beside_real.DRAWN).unlink()
    assert beside_real.digits(given) is None


def test_real_images_do_not_come_to_lie_among_the_results(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report", f"--results={tmp_path}", f"--data_dir={tmp_path}"])
    assert scripts.exit_code(report.main) == 2
    assert "--out" in capsys.readouterr().err


def test_a_field_that_has_its_default_is_in_no_digest():
    run = study.learner("cifar100", "mini", 0, 5)
    found = study.beyond_defaults(run)
    assert "precision" in study.plain(run)["model"]
    assert "precision" not in found["model"]
    assert found["model"]["depth"] == 8
    half = dataclasses.replace(run, fields=(("method.stage_two.balanced", 0.5),))
    assert study.beyond_defaults(half)["method"]["stage_two"]["balanced"] == 0.5
    assert study.beyond_defaults(half) != found

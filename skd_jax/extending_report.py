"""What became of an extension: numbers, and one page that needs no other file."""

import dataclasses
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from skd_jax import evaluate, metrics, page, parallel, plots, steps
from skd_jax.config import to_dict
from skd_jax.experiment import Experiment
from skd_jax.loop import no_images, steps_per_call
from skd_jax.methods import pseudo_ncm
from skd_jax.methods.phase import phase_keys
from skd_jax.methods.skd.phases import KeptDelegator, networks
from skd_jax.methods.skd.steps import pseudo_images
from skd_jax.model import Model
from skd_jax.state import Network
from skd_jax.stepping import Stepping
from skd_jax.writer import LOG

COMPARED = 1000  # pseudo images that the old and the new model are compared on
AGREEMENT = 6  # the number of these images in random keys


def in_words(experiment: Experiment, model: Model) -> str:
    """What will be done, in a line for people."""
    schedule, images = experiment.schedule, experiment.stream.counts()
    tests = experiment.test.counts()
    of_old = f"{tests[0]} to check the old ones with" if tests[0] else "no images of old classes"
    return (
        f"{_network(model)} of {len(schedule[0])} classes learns {len(schedule[1])} more from "
        f"{images[1]} images, with {tests[1]} held out and {of_old}, by "
        f"{experiment.config.method.name}"
    )


def _network(model: Model) -> str:
    architecture = model.config.model
    name = "ResNet" if architecture.family == "imagenet" else "CIFAR ResNet"
    return f"{name}-{architecture.depth} of width {architecture.width}"


def _architecture(model: Model) -> str:
    """What a wrong reading of a file would get wrong, so that a person sees it."""
    architecture = model.config.model
    shortcuts = {
        "conv": "1x1 convolutions as shortcuts",
        "pad": "shortcuts that stride and pad zeros on both sides",
        "pad_end": "shortcuts that stride and pad zeros at the end",
    }
    last = "a last ReLU" if architecture.last_relu else "no last ReLU"
    return f"{shortcuts[architecture.shortcut]}, {last}, a {architecture.head} head"


def look_back(experiment: Experiment, old: Model, new: Model) -> dict[str, Any]:
    """What an extension has kept and learned, as JSON can hold it.

    Keys:
      before: accuracy on the images to check old classes with; None without any.
      after: ``old``, ``new`` and ``all``: accuracies of the new model on these images, on those
        held out of the new classes, and on both. Without such images ``old`` and ``all`` are None.
      frozen: the same of the cheap road: frozen features and nearest class means, those of the old
        classes from the delegator's images; None without a delegator.
      agreement: on the delegator's images: how many there are (``images``), and the share to which
        the new model gives the old one's class (``same``), another old class (``other_old``) or a
        new class (``called_new``); None without a delegator.
      recall: of each class with test images, by name.
      parameters: of the new model.
    """
    old_classifier, classifier = old.kept.classifier, new.kept.classifier
    predicted = evaluate.predictions(experiment, new.kept, 2)
    before = evaluate.accuracy(experiment, evaluate.predictions(experiment, old.kept, 1))
    delegator = getattr(new.kept, "delegator", None)
    frozen = agreement = None
    if delegator is not None:
        frozen = _row(frozen_road(experiment, KeptDelegator(old_classifier, delegator)))
        agreement = _agreement(experiment, delegator, old_classifier, classifier)
    return {
        "before": before.top1,
        "after": _row(evaluate.accuracy(experiment, predicted)),
        "frozen": frozen,
        "agreement": agreement,
        "recall": _recall(experiment, predicted, new.class_names),
        "parameters": sum(x.size for x in jax.tree.leaves(classifier.params)),
    }


def _row(row: metrics.Row) -> dict[str, float | None]:
    old, new = row.accuracies
    return {"old": old, "new": new, "all": None if old is None else row.top1}


def frozen_road(experiment: Experiment, kept: KeptDelegator) -> metrics.Row:
    """Accuracy of ``pseudo_ncm`` with a delegator that is there."""
    config, mesh = experiment.config, experiment.mesh
    method = config.method
    settings = pseudo_ncm.Settings("pseudo_ncm", method.delegator, method.stage_one)
    config = dataclasses.replace(config, method=settings)
    setting = dataclasses.replace(experiment.setting, config=config)
    kept = parallel.replicate(mesh, kept)
    for phase in (pseudo_ncm.drawn(setting), pseudo_ncm.means(setting, 1)):
        with experiment.opened(phase, kept) as images:
            length = steps_per_call(config, phase)
            stepping = Stepping(phase, setting, mesh, images, length)
            state = parallel.replicate(mesh, phase.init(kept))
            for start in range(0, phase.steps, length):
                state, _ = stepping(state, kept, start, min(start + length, phase.steps))
            take = images.take if images else no_images
            kept = parallel.replicate(
                mesh, phase.finish(*parallel.to_host(mesh, (state, kept)), take)
            )
    found = evaluate.predictions(dataclasses.replace(experiment, config=config), kept, 2)
    return evaluate.accuracy(experiment, found)


def _agreement(
    experiment: Experiment, delegator: Network, old: Network, new: Network
) -> dict[str, Any]:
    config, mesh = experiment.config, experiment.mesh
    nets, (_, key) = networks(config), phase_keys(config.seed, 0, AGREEMENT)
    size, known = min(COMPARED, config.run.eval_batch), old.params["head"]["kernel"].shape[-1]
    same = other = called_new = 0
    classify = jax.jit(lambda n, x: steps.eval_mode(nets.classifier(n.params), n, x)[1].argmax(-1))
    for start in range(0, COMPARED, size):
        drawn = pseudo_images(nets, delegator, parallel.replicate(mesh, key), size, start)
        before, after = (np.asarray(classify(network, drawn)) for network in (old, new))
        same += int(np.sum(before == after))
        called_new += int(np.sum(after >= known))
        other += int(np.sum((before != after) & (after < known)))
    total = same + other + called_new
    shares = {"same": same, "other_old": other, "called_new": called_new}
    return {"images": total, **{name: count / total for name, count in shares.items()}}


def _recall(
    experiment: Experiment, predicted: Sequence[np.ndarray], names: Sequence[str]
) -> dict[str, float]:
    labels = np.concatenate([experiment.test.task(task)[1] for task in range(len(predicted))])
    right = np.concatenate(predicted) == labels
    return {name: float(np.mean(right[labels == k])) for k, name in enumerate(names) if k in labels}


def write(path: Path, workdir: Path, old: Model, new: Model, summary: Mapping[str, Any]) -> None:
    """Writes the page.

    Args:
      path: of the page.
      workdir: of the run.
      old: the model before.
      new: the model after.
      summary: with the result of :func:`look_back` as ``extension``.
    """
    sections = [
        page.section("What was there", _what_was_there(old, new, summary)),
        page.section("What is known now", _results(summary)),
    ]
    drawn = workdir / "pseudo_images_by_class_0.png"
    if drawn.exists():
        title = "What the delegator draws, by the old model's class"
        where = "none of these images is real: they come from the old model's weights alone"
        sections.append(page.picture(drawn, title, where))
    sections.append(page.section("Each class", _classes(summary, len(old.class_names))))
    for phase, values in _logged(workdir).items():
        buffer = io.BytesIO()
        plots.loss_terms(values, buffer)
        title = f"Training: {phase}"
        sections.append(page.section(title, page.image(buffer.getvalue(), title)))
    sections.append(page.section("Time", _time(summary)))
    sections.append(page.section("Settings", _settings(new)))
    page.write(
        path, f"{len(new.class_names)} classes, {len(old.class_names)} of them old", sections
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, row: Sequence[str]) -> str:
        first, *others = (html.escape(cell) for cell in row)
        return f"<tr><th>{first}</th>{''.join(f'<{kind}>{x}</{kind}>' for x in others)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return (
        f"<div class=wide><table><thead>{cells('th', head)}</thead><tbody>{body}</tbody></table>"
        "</div>"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _what_was_there(old: Model, new: Model, summary: Mapping[str, Any]) -> str:
    data = old.config.data
    learned = new.class_names[len(old.class_names) :]
    channels = {1: "grey", 3: "colour"}[data.channels]
    facts = [
        ("network", _network(old)),
        ("as its file was read", _architecture(old)),
        ("parameters now", f"{summary['extension']['parameters']:,}"),
        ("images", f"{channels}, {data.image_size}x{data.image_size} pixels, {data.fit}"),
        ("classes before", _names(old.class_names)),
        ("classes learned", _names(learned)),
    ]
    rows = "".join(f"<tr><th>{n}</th><td>{html.escape(fact)}</td></tr>" for n, fact in facts)
    return f"<table class=facts><tbody>{rows}</tbody></table>"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{len(names)}: {', '.join(names[:20])}{more}"


def _results(summary: Mapping[str, Any]) -> str:
    found = summary["extension"]
    roads = [(f"this model ({summary['method']})", found["after"])]
    if found["frozen"]:
        roads.append(("the cheap road: frozen features, class means", found["frozen"]))
    rows = [("the old model, as it was", _percent(found["before"]), "", "")]
    rows += [(name, *(_percent(row[p]) for p in ("old", "new", "all"))) for name, row in roads]
    text = _table(("accuracy", "old classes", "new classes", "all"), rows)
    if found["before"] is None:
        text += (
            "<p>No images of old classes were given (<code>--check=folder/</code>), so neither they"
            " nor all classes together were measured.</p>"
        )
    if agreement := found["agreement"]:
        text += (
            f"<p>Of {agreement['images']} images that the delegator draws, the new model gives "
            f"{_percent(agreement['same'])} the same class as the old one, "
            f"{_percent(agreement['other_old'])} another old class, and "
            f"{_percent(agreement['called_new'])} a new class.</p>"
        )
    if found["frozen"]:
        text += f"<p>{_worth(found)}</p>"
    return text + f"<p>{_recipe(summary)}</p>"


def _worth(found: Mapping[str, Any]) -> str:
    mine, cheap = found["after"]["all"], found["frozen"]["all"]
    if mine is None:  # on new classes alone, whatever forgets the old ones looks best
        return (
            "Whether the cheap road, which trains nothing but the delegator, would have done as "
            "well cannot be said without images of old classes: give <code>--check=folder/</code>."
        )
    points = 100 * (mine - cheap)
    if points >= 1:
        return f"Training the whole network was worth {points:.1f} points over the cheap road."
    if points > -1:
        return (
            "The cheap road, which trains nothing but the delegator, is as good within a point "
            "(<code>--method=pseudo_ncm</code>)."
        )
    return (
        f"The cheap road is better by {-points:.1f} points: take "
        "<code>--method=pseudo_ncm</code> for these classes."
    )


def _recipe(summary: Mapping[str, Any]) -> str:
    if not summary["method"].startswith("skd"):
        return f"Learned by {html.escape(summary['method'])}, for comparison."
    return (
        "Settings are not the paper's but what has worked best: new images teach the features the "
        "new classes among themselves, the head learns all classes on features that are held "
        "fixed, old classes weigh more the more of them there are, and at the end a linear head's "
        "new weights are made as long as its old ones "
        "(<code>method.stage_two.classification</code>, <code>.balanced</code>, "
        "<code>.align_head</code>); lengths are for this device."
    )


def _classes(summary: Mapping[str, Any], old: int) -> str:
    names = [name for task in summary["class_names"] for name in task]
    recall = summary["extension"]["recall"]
    rows = [
        (name, "old" if k < old else "new", _percent(recall[name]))
        for k, name in enumerate(names)
        if name in recall
    ]
    return _table(("class", "", "found of its test images"), rows)


def _time(summary: Mapping[str, Any]) -> str:
    rows = [(phase, f"{seconds:.0f} s") for phase, seconds in summary["seconds"].items()]
    on = html.escape(f"{summary['device']}, {summary['date']}")
    return f"{_table(('phase', 'time'), rows)}<p class=source>{on}</p>"


def _settings(new: Model) -> str:
    text = html.escape(json.dumps(to_dict(new.config), indent=2))
    return f"<details><summary>every setting</summary><pre>{text}</pre></details>"


def _logged(workdir: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(step, value) of each logged number, by phase and name."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with (workdir / LOG).open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            phase, step = row["phase"], row["step"]
            for name in row.keys() - {"time", "task", "phase", "step", "global_step", "skipped"}:
                if row[name] is not None:
                    found.setdefault(phase, {}).setdefault(name, []).append((step, row[name]))
    return found

"""Teaching a trained model new classes when its own images are gone.

:func:`extend` reads a model, trains a delegator from it alone, learns the new classes, and writes a
folder with a model that knows both and a report. It is one run with T_0 given: a killed one goes on
from where it was.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skd_jax import extending_report, parallel
from skd_jax.checkpoint import flatten
from skd_jax.compiler import platform
from skd_jax.config import Config, Data, late_drops, to_dict
from skd_jax.data import check as check_data
from skd_jax.data import check_workdir
from skd_jax.data.extended import extended_source
from skd_jax.data.sources import Source
from skd_jax.defaults import data_settings, settings
from skd_jax.errors import UserError, warn
from skd_jax.experiment import Experiment, Given, open_experiment, what_is_computed
from skd_jax.files import ELSEWHERE, GO_ON, read_json, whole, write_json
from skd_jax.lock import LOCK
from skd_jax.loop import no_images, steps_per_call
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import logits
from skd_jax.methods.skd.phases import KeptDelegator
from skd_jax.model import Model, load
from skd_jax.paths import given_path, looking
from skd_jax.stepping import Stepping
from skd_jax.timing import DAY, duration
from skd_jax.train import restore, train
from skd_jax.writer import drawing
from skd_jax.writer import say as _say

RUN, SUMMARY, REPORT, EXPORTED = "run", "summary.json", "report.html", "model.stablehlo"
_FIXED = {  # fields that are said elsewhere or mean nothing here, by why they cannot be changed
    "the model says what it is and takes, or a flag beside it, such as --image-size or --mean": (
        *("data.image_size", "data.channels", "data.mean", "data.std"),
        *("model.family", "model.depth", "model.width", "model.shortcut"),
        *("model.last_relu", "model.head"),
    ),
    "the new classes are the folders of --images, and are learned all at once": (
        *("data.name", "data.data_dir", "data.exclude_classes", "data.class_order"),
        *("data.subset", "data.order_seed", "data.max_classes", "data.base_classes", "data.tasks"),
    ),
    "the new classes have images held out": ("data.held_out",),
    "the model is trained, and config.method says how it learns the new classes": (
        *("base.epochs", "base.lr", "base.drop_epochs", "base.momentum", "base.weight_decay"),
    ),
    "--method says it": ("method.name",),
    "the delegator is trained once, as config.method.stage_one.epochs and .drop_every say": (
        *("method.stage_one.finetune_epochs", "method.stage_one.finetune_drop_every"),
    ),
    "an extension begins with --model and goes to the end; Ctrl-C stops it": (
        *("run.start_from", "run.phases"),
    ),
    "one model is to come of it": ("run.replicas",),
}


@dataclasses.dataclass(frozen=True)
class Extended:
    """What an extension gives.

    Attributes:
      model: that knows the old and the new classes.
      summary: of the run, as ``summary.json`` has it, with ``extension`` in it, see
        :func:`skd_jax.extending_report.look_back`.
    """

    model: Model
    summary: dict[str, Any]


def extend(
    model: Model | str | Path,
    images: str | Path,
    out: str | Path,
    *,
    check: str | Path | None = None,
    method: str = "skd",
    batch: int | None = None,
    effort: float = 1.0,
    seed: int = 0,
    flip: bool | None = None,
    changes: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = _say,
) -> Extended:
    """Teaches a model the classes of a folder.

    Args:
      model: a :class:`Model`, or the path of one, see :func:`skd_jax.model.load`.
      images: a folder with one sub-folder a new class; a fifth of each is held out for testing,
        unless the folder is split into ``train`` and ``test``.
      out: a new folder for the model, its report and the run; or one in which the same call was
        interrupted, which goes on.
      check: the same kind of folder with images of old classes, to see what the model keeps of
        them; nothing is learned from it.
      method: "skd"; or another that needs nothing but the model, to compare: "pseudo_ncm",
        "finetune", "lwf".
      batch: new images a step; None chooses.
      effort: what the lengths of training are multiplied by.
      seed: of all random numbers.
      flip: whether a mirrored image shows the same class; None: as the model says, else it does.
      changes: other values of fields of the configuration, by path
        ("method.stage_two.balanced"); those that something else says cannot be changed so.
      say: prints a line for people.

    Raises:
      UserError: something given is wrong, and nothing has been written; or a file cannot be.
      Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    out, model = given_path(out, "--out"), model if isinstance(model, Model) else load(model)
    begun = check_free(out)
    images = given_path(images, "--images")
    check = given_path(check, "--check") if check else None
    for folder in filter(None, (images, check)):
        read = dataclasses.replace(model.config.data, name="folder", data_dir=str(folder))
        check_workdir(out, read, "--out")
    said = {"method": method, "batch": batch, "effort": effort, "seed": seed}
    data = _data(model.config.data, flip)
    settings_of = functools.partial(_settings, model, data, changes or {}, **said)
    data = settings_of(images=0, on_cpu=True).data  # with its changes, which images are read by
    source = extended_source(data, model.class_names, images, check)
    count = int(np.sum(source.labels("train") >= len(model.class_names)))
    config = _as_begun(out, functools.partial(settings_of, images=count))
    if config.base.batch > count:
        raise UserError(
            f"--images: {count} images to learn from do not fill a batch of {config.base.batch}; "
            f"add images, or give --batch={count}"
        )
    given = _given(model, config, source)
    experiment = open_experiment(config, given=given)
    for line in (*late_drops(config), *method_of(config).warnings(experiment.setting)):
        warn(line.replace("--config.", "--set=").replace("set config.", "give --set="))
    say(extending_report.in_words(experiment, model))
    if not begun:
        say(time_in_words(estimate(experiment)))
    with _as_out(out):
        summary = train(config, out / RUN, say, given)
    config, kept = restore(out / RUN)
    extended = Model(config, kept, source.class_names, model.names)
    measured = extending_report.look_back(experiment, model, extended)
    summary = {**summary, "extension": measured}
    with _as_out(out):
        extended.save(out)
        with whole(out / EXPORTED, mode="wb") as file:
            file.write(extended.export())
    with drawing(out / REPORT):
        extending_report.write(out / REPORT, out / RUN, model, extended, summary)
    write_json(out / SUMMARY, summary)  # last: it says that all is there
    say(f"the model is in {out}; {out / REPORT} tells what became of it")
    return Extended(extended, summary)


def check_free(out: str | Path) -> bool:
    """Whether an extension was begun in a folder; one that was ended at once does not count.

    Raises:
      UserError: something else is there.
    """
    out = given_path(out, "--out")
    at_once = {LOCK, "checkpoints", "config.json.partial"}  # is there before config.json
    with looking(out):
        if (out / RUN / "config.json").is_file():
            return True
        if not out.exists():
            return False
        if out.is_dir() and _names(out) <= {RUN} and _names(out / RUN) <= at_once:
            return False
    raise UserError(f"--out={out} exists, and holds no extension that was begun; name a new folder")


def _names(folder: Path) -> set[str]:
    """What lies in a folder; nothing if there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _data(data: Data, flip: bool | None) -> Data:
    """How new images become the model's input: as its own did."""
    return data_settings(
        data.image_size,
        data.mean,
        data.std,
        data.load_size,
        data.fit,
        data.flip if flip is None else flip,
        interpolation=data.interpolation,
    )


def _settings(
    model: Model,
    data: Data,
    changes: Mapping[str, Any],
    *,
    images: int,
    on_cpu: bool,
    effort: float,
    **said: Any,
) -> Config:
    """The configuration for so many images of new classes, on a CPU or an accelerator."""
    if method_of(model.config).scores is not logits:
        raise UserError(
            f"the model classifies by {model.config.method.name}, not by a head; only a network "
            "with a head can be extended"
        )
    if not 0 < effort <= 100:
        raise UserError(f"--effort={effort}: give a number above 0, such as 0.5")
    had = getattr(model.kept, "delegator", None)
    config = settings(
        model.config.model,
        data,
        delegator=model.config.method.delegator if had is not None else None,
        images=images,
        on_cpu=on_cpu,
        effort=effort,
        **said,
    )
    return _changed(config, changes)


def _as_begun(out: Path, settings_of: Callable[..., Config]) -> Config:
    """The configuration for this platform or, if the same command began on another, for that one.

    The section ``run`` is for this platform in any case.

    Args:
      out: where it may have begun.
      settings_of: the configuration, by whether it is for a CPU.
    """
    on_cpu = platform() == "cpu"
    here, there = (settings_of(on_cpu=on) for on in (on_cpu, not on_cpu))
    begun = read_json(out / RUN / "config.json")
    if begun and _unlike(there, begun) < _unlike(here, begun):
        here = dataclasses.replace(there, run=here.run)
    return here


def _unlike(config: Config, begun: Mapping[str, Any]) -> int:
    """In how many fields of what is computed a saved configuration differs."""
    fields = (flatten(what_is_computed(each)) for each in (to_dict(config), begun))
    one, other = (each.items() for each in fields)
    return len(one ^ other)


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some fields, by path."""
    if not changes:
        return config
    fields = ConfigDict(to_dict(config), type_safe=False)
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = fields
        for section in sections:
            node = node.get(section) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict):
            raise UserError(f"config.{path}: unknown field")
        node[name] = value  # the schema says what is wrong with a name or a value
    changed = from_config_dict(fields)
    for why, paths in _FIXED.items():
        for path in paths:
            if _field(config, path) != _field(changed, path):
                raise UserError(f"config.{path}: {why}; leave it out")
    check_data(changed.data)
    if not changed.data.test_fraction:
        raise UserError(
            "config.data.test_fraction: the new classes have images held out; give the share of "
            "them, such as 0.2"
        )
    return changed


def _field(config: Config, path: str) -> Any:
    """The value of a field, by path; None if this method has none of that name."""
    return functools.reduce(lambda node, name: getattr(node, name, None), path.split("."), config)


def _given(model: Model, config: Config, source: Source) -> Given:
    kind = method_of(config).kept
    kept = kind(model.kept.classifier)
    delegator = getattr(model.kept, "delegator", None)
    if isinstance(kept, KeptDelegator) and delegator is not None:
        if config.method.delegator != model.config.method.delegator:
            raise UserError(
                "config.method.delegator: the model comes with its delegator; leave it as it is, "
                "or take the delegator away (delegator.safetensors in a model folder)"
            )
        kept = dataclasses.replace(kept, delegator=delegator)
    old, all_ = len(model.class_names), len(source.class_names)
    return Given(kept, source, (tuple(range(old)), tuple(range(old, all_))))


@contextlib.contextmanager
def _as_out(out: Path) -> Iterator[None]:
    """Names the folder that a person gave, where a message names the run's within it.

    And the same folder again, not another, where the model is not written: its run is there.
    """
    try:
        yield
    except UserError as error:
        said = str(error).replace(f"--workdir={out / RUN}", f"--out={out}")
        said = said.replace(ELSEWHERE, GO_ON)
        raise UserError(said.replace("another workdir", "another folder")) from error


def estimate(experiment: Experiment) -> dict[str, tuple[int, float]]:
    """How long the phases will take: some steps of each are made, and forgotten.

    Their programs are compiled then, and need not be again.

    Returns:
      For each phase by name (number of steps, seconds a step).
    """
    mesh, setting = experiment.mesh, experiment.setting
    first, kept = experiment.start()
    kept, found = parallel.replicate(mesh, kept), dict[str, tuple[int, float]]()
    for phase in experiment.phases[first:]:
        with experiment.opened(phase, kept) as images:
            most = steps_per_call(experiment.config, phase)
            stepping = Stepping(phase, setting, mesh, images, most)
            state = parallel.replicate(mesh, phase.init(parallel.to_host(mesh, kept)))
            took = 0.0
            for _ in range(2):  # the first compiles
                since = time.perf_counter()
                state, _ = jax.block_until_ready(stepping(state, kept, 0, 1))
                took = time.perf_counter() - since
            count, each = found.get(phase.name, (0, 0.0))  # of phases of one name all count
            steps = count + phase.steps
            found[phase.name] = steps, (count * each + phase.steps * took) / steps
            take = images.take if images else no_images
            kept = parallel.replicate(
                mesh, phase.finish(*parallel.to_host(mesh, (state, kept)), take)
            )
    return found


def time_in_words(phases: Mapping[str, tuple[int, float]]) -> str:
    """What :func:`estimate` found, for people."""
    seconds = {name: count * each for name, (count, each) in phases.items()}
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {duration(s)}" for name, s in seconds.items())
    line = f"this will take about {duration(total)} ({parts})"
    if total > DAY / 2:
        line += (
            "; on this device that is long: --effort=0.1 takes a tenth, and an accelerator or a "
            "smaller --image-size is faster"
        )
    return line

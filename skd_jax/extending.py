"""Teaching a trained model new classes when its own images are gone.

:func:`extend` reads a model, trains a delegator from it alone, learns the new classes, and writes a
folder with a model that knows both and a report. It is one run with T_0 given: a killed one goes on
from where it was.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skd_jax import extending_report, parallel
from skd_jax.compiler import platform
from skd_jax.config import Config, Data, late_drops, to_dict
from skd_jax.data import check_workdir
from skd_jax.data.extended import extended_source
from skd_jax.data.sources import Source
from skd_jax.defaults import data_settings, settings
from skd_jax.errors import UserError, warn
from skd_jax.experiment import Experiment, Given, open_experiment
from skd_jax.loop import no_images, steps_per_call
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import logits
from skd_jax.methods.skd.phases import KeptDelegator
from skd_jax.model import Model, load
from skd_jax.output import whole
from skd_jax.paths import given_path
from skd_jax.stepping import Stepping
from skd_jax.timing import DAY, duration
from skd_jax.train import restore, train
from skd_jax.writer import drawing, write_json
from skd_jax.writer import say as _say

RUN, SUMMARY, REPORT, EXPORTED = "run", "summary.json", "report.html", "model.stablehlo"


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
        ("method.stage_two.balanced").
      say: prints a line for people.

    Raises:
      UserError: something given is wrong, and nothing has been written; or a file cannot be.
      Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    out, model = given_path(out, "--out"), model if isinstance(model, Model) else load(model)
    begun = check_free(out)
    data = _data(model.config.data, flip)
    images = given_path(images, "--images")
    check = given_path(check, "--check") if check else None
    for folder in filter(None, (images, check)):
        check_workdir(out, dataclasses.replace(data, name="folder", data_dir=str(folder)), "--out")
    source = extended_source(data, model.class_names, images, check)
    config = _settings(model, data, source, method, batch, effort, seed, changes or {})
    given = _given(model, config, source)
    experiment = open_experiment(config, given=given)
    say(extending_report.in_words(experiment, model))
    if not begun:
        say(time_in_words(estimate(experiment)))
    with _as_out(out):
        summary = train(config, out / RUN, say, given)
    config, kept = restore(out / RUN)
    extended = Model(config, kept, source.class_names, model.names)
    measured = extending_report.look_back(experiment, model, extended)
    summary = {**summary, "extension": measured}
    extended.save(out)
    with whole(out / EXPORTED, mode="wb") as file:
        file.write(extended.export())
    with drawing(out / REPORT):
        extending_report.write(out / REPORT, out / RUN, model, extended, summary)
    write_json(out / SUMMARY, summary)  # last: it says that all is there
    say(f"the model is in {out}; {out / REPORT} tells what became of it")
    return Extended(extended, summary)


def check_free(out: str | Path) -> bool:
    """Whether an extension was begun in a folder.

    Raises:
      UserError: something else is there.
    """
    out = given_path(out, "--out")
    if not out.exists():
        return False
    if (out / RUN / "config.json").is_file():
        return True
    raise UserError(f"--out={out} exists, and holds no extension that was begun; name a new folder")


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
    source: Source,
    method: str,
    batch: int | None,
    effort: float,
    seed: int,
    changes: Mapping[str, Any],
) -> Config:
    """The configuration, and that there are images enough for it."""
    if method_of(model.config).scores is not logits:
        raise UserError(
            f"the model classifies by {model.config.method.name}, not by a head; only a network "
            "with a head can be extended"
        )
    if not 0 < effort <= 100:
        raise UserError(f"--effort={effort}: give a number above 0, such as 0.5")
    count = int(np.sum(source.labels("train") >= len(model.class_names)))
    had = getattr(model.kept, "delegator", None)
    config = settings(
        model.config.model,
        data,
        method=method,
        delegator=model.config.method.delegator if had is not None else None,
        images=count,
        on_cpu=platform() == "cpu",
        batch=batch,
        effort=effort,
        seed=seed,
    )
    if config.base.batch > count:
        raise UserError(
            f"--images: {count} images to learn from do not fill a batch of {config.base.batch}; "
            f"add images, or give --batch={count}"
        )
    return _changed(config, changes)


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
    config = from_config_dict(fields)
    if config.data.held_out:
        raise UserError("config.data.held_out: the new classes have images held out; leave it at 0")
    if config.run.replicas > 1:
        raise UserError("config.run.replicas: one model is to come of it; leave it at 1")
    for line in late_drops(config):
        warn(line.replace("--config.", "--set="))
    return config


def _given(model: Model, config: Config, source: Source) -> Given:
    kind = method_of(config).kept
    kept = kind(model.kept.classifier)
    delegator = getattr(model.kept, "delegator", None)
    if isinstance(kept, KeptDelegator) and delegator is not None:
        kept = dataclasses.replace(kept, delegator=delegator)
    old, all_ = len(model.class_names), len(source.class_names)
    return Given(kept, source, (tuple(range(old)), tuple(range(old, all_))))


@contextlib.contextmanager
def _as_out(out: Path) -> Iterator[None]:
    """Names the folder that a person gave, where a message names the run's within it."""
    try:
        yield
    except UserError as error:
        said = str(error).replace(f"--workdir={out / RUN}", f"--out={out}")
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

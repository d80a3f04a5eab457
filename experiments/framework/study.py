"""The runs behind the paper's tables and figures: which there are, and what they have found.

A run lies in ``RESULTS/SCALE/DATASET/seedN/NAME``, and that is its workdir. It is finished once its
``summary.json`` and the rest of what it leaves are there; what takes up a finished run's phases
(``config.run.start_from``) needs its checkpoints too, which are not kept in git, so on a fresh
clone those runs are made again.
"""

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.framework.tables import Table
from skd_jax.config import Config, to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import differences, what_is_computed
from skd_jax.files import GO_ON, read_json, replacing, write_json, writing
from skd_jax.methods import METHODS, from_config_dict
from skd_jax.methods.phase import Method

RESULTS = Path(__file__).parents[1] / "results" / "paper"
SETTINGS = "settings.json"  # of a run, as config.json is, but without paths of the machine
DATASETS = ("cifar100", "imagenet_subset", "caltech101", "flowers102")
TITLES = {
    "cifar100": "CIFAR-100",
    "imagenet_subset": "ImageNet-Subset",
    "caltech101": "Caltech-101",
    "flowers102": "Flowers-102",
    "digits": "digits",
}
BENCHMARKS = (*DATASETS, "digits")  # no data set of the paper, but the quickest
MIDI = ("cifar100",)  # the data sets that have such a scale

# Table II: one technique off at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "skd": {},
    "no_category": {"method.stage_one.terms.category": 0.0},
    "no_diversity": {"method.stage_one.terms.diversity": 0.0},
    "no_feature_statistics": {"method.stage_one.terms.feature_statistics": 0.0},
    "no_helper_bn": {"method.delegator.helper_bn": False},
}
# Table III; the last two are other readings of its "w/o SKD".
LEARNERS: dict[str, dict[str, Any]] = {
    "skd": {},
    "no_alw": {"method.stage_two.adaptive": False},
    "no_skd": {"method.stage_two.delegator": False},
    "no_skd_no_alw": {"method.stage_two.delegator": False, "method.stage_two.adaptive": False},
    "no_skd_new_outputs": {
        "method.stage_two.delegator": False,
        "method.stage_two.classification": "new",
    },
    "no_skd_old_head_fixed": {
        "method.stage_two.delegator": False,
        "method.stage_two.classification": "old_head_fixed",
    },
}


# What is compared as a method is, but is SKD by a recipe of ``configs/recipes.py``: how it differs.
VARIANTS = {
    "ours": "SKD with T_n's outputs held, features that learn new classes from new images alone, "
    "a head without gamma, and images that weigh as their classes do (recipe=ours)",
    "translated": "the same as ours, and new outputs that are learned anew on the features of new "
    "images, some moved to where old classes' are (recipe=translated)",
    "kept_means": "the same as translated, and means of real images of later classes are kept, by "
    "which outputs of all classes but the base's are learned anew (recipe=kept_means)",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of ``skd_jax.main``.

    Attributes:
      dataset: the config's file, without its ending, unless ``file`` is another.
      scale: one of ``SCALES``.
      seed: of the run.
      name: of its folder.
      argument: of the config, besides the scale.
      fields: config fields set on the command line, by path.
      phases: see ``config.run.phases``.
      start: the run whose phases it takes up, if any.
      file: the config's file, without its ending.
    """

    dataset: str
    scale: str
    seed: int
    name: str
    argument: str = ""
    fields: tuple[tuple[str, Any], ...] = ()
    phases: int = 0
    start: "Run | None" = None
    file: str = ""

    def folder(self, results: Path) -> Path:
        """Where it lies."""
        return results / self.scale / self.dataset / f"seed{self.seed}" / self.name

    def with_seed(self, seed: int) -> "Run":
        """The same of another seed, and so of another start."""
        start = self.start and self.start.with_seed(seed)
        return dataclasses.replace(self, seed=seed, start=start)

    def config_dict(self) -> Any:
        """Its configuration as a ``ConfigDict``, but for the paths in it."""
        module = importlib.import_module(f"configs.{self.file or self.dataset}")
        config = module.get_config(self._argument())
        fields = {"seed": self.seed, "run.phases": self.phases, **dict(self.fields)}
        config.update_from_flattened_dict(fields)
        return config

    def config(self, results: Path, data_dir: str) -> Config:
        """Its configuration."""
        config = self.config_dict()
        config.data.data_dir = data_dir
        if self.start:
            config.run.start_from = str(self.start.folder(results))
        return from_config_dict(config)

    def settings(self) -> dict[str, Any]:
        """What its phases depend on, as plain JSON types."""
        return self.depends_on(to_dict(from_config_dict(self.config_dict())))

    def depends_on(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a configuration its phases depend on."""
        # T_0, D_0 and S_0 after it, T_1; or all tasks.
        if not self.phases:
            return what_is_computed(config)
        first = ("base", "delegator", "learn")[: self.phases]
        return what_is_computed(config, first, learned=int("learn" in first))

    def command(self, results: Path, data_dir: str, workdir: Path) -> list[str]:
        """The command line, without Python."""
        values = {"seed": self.seed, "run.phases": self.phases, **dict(self.fields)}
        if self.start:
            values["run.start_from"] = str(self.start.folder(results))
        if data_dir:
            values["data.data_dir"] = data_dir
        settings = [f"--config.{path}={value}" for path, value in values.items()]
        config = f"--config=configs/{self.file or self.dataset}.py:{self._argument()}"
        return ["-m", "skd_jax.main", config, f"--workdir={workdir}", *settings]

    def leaves(self) -> tuple[str, ...]:
        """What there is in its folder once it is finished, of what is kept and shown."""
        of_delegator = ("delegator_0.json", "pseudo_images_by_class_0.png")
        return ("summary.json", "metrics.jsonl", *(of_delegator if self.phases == 2 else ()))

    def lacks(self, folder: Path) -> list[str]:
        """What it leaves and a folder does not have: nothing, once it is finished there."""
        return [name for name in self.leaves() if not (folder / name).exists()]

    def _argument(self) -> str:
        scale = "" if self.scale == "paper" else f"scale={self.scale}"
        return ",".join(filter(None, (self.argument, scale)))

    def __str__(self) -> str:
        return f"{self.dataset} {self.scale} seed {self.seed} {self.name}"


def has_scale(dataset: str, scale: str) -> bool:
    """Whether there is such a benchmark."""
    return scale != "midi" or dataset in MIDI


def base(dataset: str, scale: str, seed: int) -> Run:
    """T_0."""
    return Run(dataset, scale, seed, "base", phases=1)


def student(dataset: str, scale: str, seed: int, ablation: str = "skd") -> Run:
    """D_0 and S_0, of one of ``ABLATIONS``."""
    fields = tuple(ABLATIONS[ablation].items())
    start = base(dataset, scale, seed)
    return Run(dataset, scale, seed, f"student/{ablation}", "", fields, 2, start)


def recipe(dataset: str, scale: str, seed: int, name: str) -> Run:
    """D_0 and S_0 by one of the recipes in ``configs/recipes.py``."""
    if name == "skd":
        return student(dataset, scale, seed)
    start = base(dataset, scale, seed)
    argument = f"dataset={dataset},recipe={name}"
    return Run(dataset, scale, seed, f"recipe/{name}", argument, (), 2, start, "recipes")


def learner(dataset: str, scale: str, seed: int, tasks: int, name: str = "skd") -> Run:
    """All tasks, by one of ``LEARNERS``."""
    fields = LEARNERS[name]
    without = not fields.get("method.stage_two.delegator", True)
    start = base(dataset, scale, seed) if without else student(dataset, scale, seed)
    folder = f"tasks{tasks}/{name}"
    return Run(dataset, scale, seed, folder, f"tasks={tasks}", tuple(fields.items()), 0, start)


@functools.cache
def method(
    dataset: str,
    scale: str,
    seed: int,
    tasks: int,
    name: str,
    fields: tuple[tuple[str, Any], ...] = (),
) -> Run:
    """All tasks by one of the methods, from the T_0 that all of its network share.

    Methods that train SKD's D_0 first start from that; one that has to watch T_0's training starts
    with that training.

    Args:
      dataset: the config's file, without its ending.
      scale: one of ``SCALES``.
      seed: of the run.
      tasks: N.
      name: of the method, or one of ``VARIANTS``.
      fields: of the config, by path, that have other values than its file gives.
    """
    if name == "skd" and not fields:  # whose D_0 other tables share
        return learner(dataset, scale, seed, tasks)
    argument, file = f"tasks={tasks},method={name}", ""
    if name in VARIANTS:
        argument, file = f"tasks={tasks},dataset={dataset},recipe={name}", "recipes"
    run = Run(dataset, scale, seed, f"tasks{tasks}/{name}", argument, fields, file=file)
    if compared()[name].base:
        return run
    start = student(dataset, scale, seed)
    same_d_0 = dataclasses.replace(run, phases=start.phases).settings() == start.settings()
    return dataclasses.replace(run, start=start if same_d_0 else _base_of(run))


def compared() -> dict[str, Method]:
    """What can stand side by side, by name."""
    return {**METHODS, **dict.fromkeys(VARIANTS, METHODS["skd"])}


def _base_of(run: Run) -> Run:
    """T_0 of a run's network: the benchmark's, unless its method needs another."""
    first = base(run.dataset, run.scale, run.seed)
    usual = first.config_dict().model
    changed = {f: value for f, value in run.config_dict().model.items() if value != usual[f]}
    if not changed:
        return first
    name = "_".join(f"{field}_{value}" for field, value in changed.items()).lower()
    fields = tuple((f"model.{field}", value) for field, value in changed.items())
    return dataclasses.replace(first, name=f"base_{name}", fields=fields)


@dataclasses.dataclass(frozen=True)
class Options:
    """What every script of a table or figure is options.

    Attributes:
      scale: one of ``SCALES``.
      seeds: of the runs.
      datasets: those named on the command line; empty: all that are there.
      results: where everything is written.
      data_dir: TFDS's data directory; "" is its default.
      jobs: runs at a time; 0: one a core on a CPU, else one.
      methods: those named on the command line, of a script that compares methods.
      tasks: numbers of tasks named there; empty: all that the script has.
      rows: of a table of changes, those named there; empty: all.
      slurm: what every job is given, by sbatch's names, if Slurm makes the runs; empty: they are
        made on this machine.
      dry_run: the runs that are missing are told, not made.
    """

    scale: str
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]
    results: Path
    data_dir: str
    jobs: int
    methods: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    slurm: tuple[tuple[str, Any], ...] = ()
    dry_run: bool = False

    @property
    def out(self) -> Path:
        """Where tables and figures of this scale are written."""
        return self.results / self.scale

    @property
    def elsewhere(self) -> str:
        """What a command in the repository's root has to give as --results; "": the default.

        DIR where that lies outside: no table shows the paths of a machine.
        """
        root, results = RESULTS.parents[2], self.results.absolute()
        if results == RESULTS.absolute():
            return ""
        return str(results.relative_to(root)) if results.is_relative_to(root) else "DIR"


def summary(run: Run, options: Options) -> dict[str, Any] | None:
    """What a finished run has found.

    None if it is not finished, is one of other settings, or lacks what it left.
    """
    folder = run.folder(options.results)
    if run.lacks(folder):
        return None
    found = _summary(folder, _stamp(folder))
    return found if found and read_settings(run, options) == plain(run) else None


def report(run: Run, options: Options) -> dict[str, Any] | None:
    """The quality of a finished run's D_0."""
    if not summary(run, options):
        return None
    return read_json(run.folder(options.results) / "delegator_0.json")


def summaries(
    runs: Sequence[Run], options: Options, dataset: str | None = None
) -> list[dict[str, Any]]:
    """What the finished ones among these runs have found, of one data set or of all."""
    wanted = (run for run in runs if dataset in (None, run.dataset))
    return [found for run in wanted if (found := summary(run, options))]


def average(summary: Mapping[str, Any]) -> float:
    """Average incremental accuracy, in percent."""
    return 100 * summary["average_incremental_accuracy"]


def with_all_seeds(options: Options) -> Options:
    """The same, but with all seeds that there are results of besides: no table loses any."""
    names = {path.name for path in options.out.glob("*/seed*") if path.is_dir()}
    seeds = {int(n.removeprefix("seed")) for n in names if re.fullmatch(r"seed\d{1,9}", n)}
    return dataclasses.replace(options, seeds=tuple(sorted({*seeds, *options.seeds})))


def on_seeds_of(runs: Sequence[Run], options: Options) -> Options:
    """The same, but on the seeds alone that some of these runs are finished of, if any is.

    For tables that hold runs beside each other: all rows are of the same seeds then.
    """
    seeds = {found["seed"] for found in summaries(runs, options)}
    kept = tuple(seed for seed in options.seeds if seed in seeds)
    return dataclasses.replace(options, seeds=kept or options.seeds)


def check_settings(run: Run, options: Options) -> None:
    """Checks that what lies in a run's folder is of its settings.

    Raises:
      UserError: it is of others, or one cannot tell.
    """
    folder = run.folder(options.results)
    there = read_settings(run, options)
    fix = "delete that folder, or give another --results"
    if there is None:
        if _stamp(folder):
            raise UserError(f"{folder} holds results but no {SETTINGS} that can be read; {fix}")
        return
    if found := differences(there, plain(run)):
        raise UserError(f"{folder} holds results of other settings: {found}; {fix}")


def read_settings(run: Run, options: Options) -> dict[str, Any] | None:
    """The settings that the run in a run's folder was made with."""
    folder = run.folder(options.results)
    names = (
        (SETTINGS, "config.json") if _stamp(folder) else (SETTINGS,)
    )  # by hand: see keep_settings
    found = next(filter(None, (read_json(folder / name) for name in names)), None)
    return run.depends_on(found) if found else None


def keep_settings(run: Run, options: Options) -> None:
    """Writes the settings of a finished run where its command alone made it, and no script."""
    path = run.folder(options.results) / SETTINGS
    if not path.exists():
        write_json(path, run.settings())


@functools.cache
def plain(run: Run) -> dict[str, Any]:
    """A run's settings as JSON gives them back."""
    return json.loads(json.dumps(run.settings()))


def beyond_defaults(run: Run) -> dict[str, Any]:
    """A run's settings but for fields that have their defaults, so that a new field changes none.

    For digests of settings; those that are kept whole are completed when they are read.
    """

    def changed(part: Any) -> Any:
        if not dataclasses.is_dataclass(part):
            return part
        fields = [(field, getattr(part, field.name)) for field in dataclasses.fields(part)]
        return {field.name: changed(value) for field, value in fields if value != field.default}

    config = from_config_dict(run.config_dict())
    return json.loads(json.dumps({name: changed(getattr(config, name)) for name in plain(run)}))


def _stamp(folder: Path) -> int:
    path = folder / "summary.json"
    return path.stat().st_mtime_ns if path.exists() else 0


@functools.lru_cache(maxsize=10_000)
def _summary(folder: Path, stamp: int) -> dict[str, Any] | None:
    del stamp  # another one, another summary
    return read_json(folder / "summary.json")


def write_table(options: Options, name: str, table: Table) -> None:
    """Writes a table as Markdown and JSON."""
    with writing(options.out, GO_ON):
        options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / f"{name}.md", mode="w", encoding="utf-8") as file:
        file.write(table.markdown())
    write_json(options.out / f"{name}.json", table.json())

"""Settings that were chosen on held-out training images (:mod:`experiments.choose`)."""

from typing import Any

from experiments.framework.study import Options
from skd_jax.files import read_json, write_json


def name(dataset: str, tasks: int) -> str:
    """Of the files of one benchmark's choices."""
    return f"chosen_{dataset}_{tasks}"


def read(dataset: str, tasks: int, options: Options) -> dict[str, Any]:
    """What is known of each method: ``fields``, those chosen, by path; ``tried``, all values."""
    return read_json(options.out / f"{name(dataset, tasks)}.json") or {}


def write(dataset: str, tasks: int, options: Options, found: dict[str, Any]) -> None:
    """Writes that."""
    write_json(options.out / f"{name(dataset, tasks)}.json", found)


def fields(dataset: str, tasks: int, method: str, options: Options) -> tuple[tuple[str, Any], ...]:
    """The config fields that were chosen for a method; none if it has its published ones."""
    return tuple(read(dataset, tasks, options).get(method, {}).get("fields", {}).items())


def words(dataset: str, tasks: int, method: str, options: Options) -> str:
    """The same, to be read."""
    chosen = fields(dataset, tasks, method, options)
    return ", ".join(f"{path.removeprefix('method.')} {value:g}" for path, value in chosen) or "-"

"""Models as files that others read too: safetensors under PyTorch's names, and what they lack.

A model folder holds ``model.safetensors``, ``labels.txt``, ``config.json`` in the style of timm,
and perhaps ``delegator.safetensors``. Nothing in it is code, names a module, or names a path.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import config as schema
from skd_jax import tensors, weights
from skd_jax.checkpoint import flatten, unflatten
from skd_jax.config import Data
from skd_jax.defaults import data_settings, settings
from skd_jax.errors import UserError
from skd_jax.files import ELSEWHERE, json_text, whole, writing
from skd_jax.methods.skd.phases import KeptDelegator, delegator_module
from skd_jax.model_config import MAX_SIZE, Said, is_a_line, read_config, read_text, timm_config
from skd_jax.paths import given_path
from skd_jax.state import Kept, Network

if TYPE_CHECKING:
    from skd_jax.model import Model

WEIGHTS, LABELS, CONFIG, DELEGATOR = (
    *("model.safetensors", "labels.txt", "config.json", "delegator.safetensors"),
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a file or a folder holds: the fields of a :class:`skd_jax.model.Model`."""

    config: schema.Config
    kept: Kept
    class_names: tuple[str, ...]
    names: weights.Names


def read(path: Path, said: Said) -> Parts:
    """Reads a model folder, or a safetensors file and what lies beside it.

    Args:
      path: of the folder or the file.
      said: what is said on the command line, which comes first.

    Raises:
      UserError: something is missing, damaged or contradictory; the message names it.
    """
    folder = path if path.is_dir() else path.parent
    file = _inside(path, WEIGHTS) if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(
            f"{path} is no model folder: there is no {WEIGHTS} in it; name one, a .safetensors "
            "file, or the workdir of a run"
        )
    beside = read_config(_inside(folder, CONFIG))
    if beside.classes is None and (labels := _inside(folder, LABELS)).exists():
        beside = dataclasses.replace(beside, classes=labels)
    said = said.over(beside)
    found = weights.read(file, said.last_relu)
    data = _data(said, found.channels, found.classes, file)
    class_names = _class_names(said.classes, found.classes, file)
    if not said.delegator:
        config = settings(found.model, data, method="finetune")
        return Parts(config, Kept(found.network), class_names, found.names)
    config = settings(found.model, data, delegator=said.delegator)
    delegator = _read_delegator(_inside(folder, DELEGATOR), config)
    return Parts(config, KeptDelegator(found.network, delegator), class_names, found.names)


def write(folder: Path, model: "Model") -> None:
    """Writes a model folder, which may be there; each file whole or not at all.

    Raises:
      UserError: something cannot be written, or a class's name in no file of lines.
    """
    if wrong := [name for name in model.class_names if not is_a_line(name)]:
        raise UserError(
            f"{folder}: {wrong[0]!r} is no name of one line in UTF-8, as {LABELS} needs it; give "
            "the model others (dataclasses.replace(model, class_names=...))"
        )
    with writing(folder, ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
    kept, names = model.kept, model.class_names
    assert kept.classifier is not None
    delegator = getattr(kept, "delegator", None)
    if delegator is not None:
        named = {n: np.asarray(x) for n, x in flatten(delegator.variables()).items()}
        tensors.write(folder / DELEGATOR, named)
    _write(folder / LABELS, "".join(f"{name}\n" for name in names).encode())
    config = timm_config(model.config, names, delegator is not None)
    _write(folder / CONFIG, json_text(config).encode())
    of_tensors = model.names or weights.names_of(model.config.model)
    weights.write(folder / WEIGHTS, kept.classifier, of_tensors)


def _write(path: Path, content: bytes) -> None:
    with whole(path, mode="wb") as file:
        file.write(content)


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; a link that leads out of it is refused."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link to a place outside the folder; copy the file there")
    return path


def _class_names(
    said: str | Path | Sequence[str] | None, count: int, model: Path
) -> tuple[str, ...]:
    if said is None:
        raise UserError(
            f"{model} says nothing of its {count} classes' names: give --classes=labels.txt with a "
            f"name a line, or put {LABELS} beside it"
        )
    if isinstance(said, str | Path):
        where = f"--classes={said}"
        text = read_text(given_path(said, "--classes"), where)
        names = tuple(line.strip() for line in text.strip().splitlines())
    else:
        where, names = "the class names", tuple(said)
    if len(names) != count:
        raise UserError(f"{where}: {len(names)} names for a model of {count} classes; give {count}")
    if wrong := [k for k, name in enumerate(names, 1) if name.splitlines() != [name]]:
        raise UserError(f"{where}: name {wrong[0]} is empty or has a line break; name every class")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: {twice[0]!r} names two classes; give each a name of its own")
    return names


def _data(said: Said, channels: int, classes: int, model: Path) -> Data:
    """How images become the model's input."""
    missing = [
        f"--{flag.replace('_', '-')}"
        for flag in ("mean", "std", "image_size")
        if getattr(said, flag) is None
    ]
    if missing:
        example = {1: "--mean=0.29 --std=0.35", 3: "--mean=0.49,0.48,0.45 --std=0.25,0.24,0.26"}
        names = "" if said.classes is not None else f", and its {classes} classes' names"
        flag = "" if said.classes is not None else " --classes=labels.txt"
        raise UserError(
            f"{model} does not say what images it takes{names}: give {', '.join(missing)}"
            f"{', --classes' if flag else ''} (for instance {example[channels]} --image-size=32"
            f"{flag}; means and deviations are of images scaled to [0, 1]), or a {CONFIG} beside "
            "it, as timm writes it"
        )
    assert said.mean is not None and said.std is not None and said.image_size is not None
    for name, values in (("mean", said.mean), ("std", said.std)):
        if len(values) != channels:
            raise UserError(
                f"{model} takes images of {channels} channel{'s' * (channels > 1)}, and --{name} "
                f"has {len(values)} values; give {channels}"
            )
        if not all(abs(x) < 1e4 for x in values) or (name == "std" and min(values) <= 0):
            raise UserError(f"{model}: --{name} {tuple(values)} are of no images")
    if said.fit == "border":
        raise UserError(
            f"{model}: its {CONFIG} says crop_mode 'border', which pads images to a square, and "
            "that cannot be done here; give --fit=crop or --fit=squash, if either will do"
        )
    load_size = said.load_size or said.image_size
    if not said.image_size <= load_size <= MAX_SIZE or said.image_size < 8:
        raise UserError(
            f"{model}: --image-size={said.image_size} and --load-size={load_size}: give sides from "
            f"8 to {MAX_SIZE} pixels, the second not smaller"
        )
    more = {"interpolation": said.interpolation} if said.interpolation else {}
    return data_settings(
        said.image_size,
        tuple(said.mean),
        tuple(said.std),
        load_size,
        said.fit or "crop",
        said.flip is not False,
        **more,
    )


def _read_delegator(path: Path, config: schema.Config) -> Network | None:
    """The delegator's variables; None if there is no file."""
    if not path.exists():
        return None
    module = delegator_module(config)
    z = jax.ShapeDtypeStruct((1, module.z_dim), jnp.float32)
    shapes: Any = jax.eval_shape(lambda z: module.init(jax.random.key(0), z, False), z)
    wanted = {n: (x.shape, "F32") for n, x in flatten(dict(shapes)).items()}
    if tensors.header(path) != wanted:
        raise UserError(
            f"{path} holds other tensors than config.json names; bring the right file back, or "
            "take it away: an extension then trains another delegator"
        )
    arrays = tensors.load(path, wanted)
    tree = unflatten({name: jnp.array(array) for name, array in arrays.items()})
    return Network(tree["params"], tree["batch_stats"])

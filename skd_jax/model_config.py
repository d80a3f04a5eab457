"""What is said of a model beside its weights: flags, and a ``config.json`` in the style of timm."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_jax.config import Config
from skd_jax.data.check import FITS, INTERPOLATIONS
from skd_jax.errors import UserError
from skd_jax.methods.skd.settings import Delegator

MAX_SIZE = 4096  # pixels
_LARGEST = 1 << 24  # bytes of a text file that is read


@dataclasses.dataclass(frozen=True)
class Said:
    """What is said of a model beside its weights; None is not said.

    Attributes:
      classes: a file of class names, one a line, or the names.
      mean: per channel, of images scaled to [0, 1].
      std: per channel.
      image_size: height and width the network takes, pixels.
      load_size: what images are resized to before their centre is cut out.
      fit: how an image becomes square, "squash" or "crop"; or "border", timm's, which is refused.
      last_relu: whether the last block ends in a ReLU.
      interpolation: how images are resized.
      flip: whether a mirrored image shows the same class.
      delegator: the architecture of the delegator beside it.
    """

    classes: str | Path | Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    load_size: int | None = None
    fit: str | None = None
    last_relu: bool | None = None
    interpolation: str | None = None
    flip: bool | None = None
    delegator: Delegator | None = None

    def over(self, other: "Said") -> "Said":
        """These, and the other's where this says nothing.

        With an image size of its own it takes the other's ``load_size`` in proportion, so that as
        much of an image is seen.
        """
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {name: value for name, value in mine.items() if value is not None}
        if self.image_size and other.image_size and other.load_size:
            load_size = self.image_size * other.load_size // other.image_size
            found = {"load_size": load_size, **found}
        return dataclasses.replace(other, **found)


def timm_config(config: Config, names: Sequence[str], with_delegator: bool) -> dict[str, Any]:
    """The same file of a model of ours.

    Args:
      config: of the model.
      names: of its classes.
      with_delegator: whether its delegator is kept beside it.
    """
    data, model = config.data, config.model
    size, prefix = data.image_size, "resnet" if model.family == "imagenet" else "cifar_resnet"
    own: dict[str, Any] = {
        **{"load_size": data.load_size, "fit": data.fit, "flip": data.flip},
        "last_relu": model.last_relu,
    }
    if with_delegator:
        own["delegator"] = dataclasses.asdict(config.method.delegator)
    return {
        "architecture": f"{prefix}{model.depth}",
        "num_classes": len(names),
        "label_names": list(names),
        "pretrained_cfg": {
            "input_size": [data.channels, size, size],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": data.interpolation,
            "crop_pct": size / data.load_size,
            "crop_mode": "center" if data.fit == "crop" else "squash",
            "num_classes": len(names),
        },
        "skd_jax": own,
    }


def is_a_line(name: str) -> bool:
    """Whether a class name can stand in a file with a name a line; a folder's may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.splitlines() == [name]


def read_text(path: Path, said: str | None = None) -> str:
    """The text of a small file.

    Args:
      path: of the file.
      said: what errors call it; None is its path.

    Raises:
      UserError: it cannot be read, is large, or is not UTF-8.
    """
    said = said or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UserError(f"{said} has more than {_LARGEST >> 20} MiB; that is no such file")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{said}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{said} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{said} is not text in UTF-8 (byte {error.start}); save it so") from error


def read_config(path: Path) -> Said:
    """What a ``config.json`` says; nothing if there is none.

    Raises:
      UserError: a field is of the wrong type, or out of range.
    """
    if not path.exists():
        return Said()
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); mend it, or take it away") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config of a model: give an object with fields, as timm does")
    fields = _Fields(path, {**values, **_object(path, values, "pretrained_cfg")})
    own = _Fields(path, _object(path, values, "skd_jax"))
    size = fields.numbers("input_size", int)
    if size and not (len(size) == 3 and size[1] == size[2] and 0 < size[1] <= MAX_SIZE):
        raise UserError(f"{path}: input_size {list(size)} is not [channels, side, side]")
    image_size = size[1] if size else None
    crop = fields.number("crop_pct")
    if crop is not None and not 0.05 <= crop <= 1:
        raise UserError(f"{path}: crop_pct {crop} is not in [0.05, 1]")
    load_size = own.size("load_size")
    if load_size is None and crop is not None and image_size:
        load_size = math.floor(image_size / crop)
    mode = fields.text("crop_mode", ("center", "squash", "border"))
    of_mode = {"center": "crop", "squash": "squash", "border": "border", None: None}
    return Said(
        classes=fields.names("label_names"),
        mean=fields.numbers("mean", float),
        std=fields.numbers("std", float),
        image_size=image_size,
        load_size=load_size,
        fit=own.text("fit", FITS) or of_mode[mode],
        last_relu=own.flag("last_relu"),
        interpolation=fields.text("interpolation", INTERPOLATIONS),
        flip=own.flag("flip"),
        delegator=_delegator(path, values),
    )


def _object(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} is not an object with fields")
    return found


def _delegator(path: Path, values: Mapping[str, Any]) -> Delegator | None:
    section = _object(path, values, "skd_jax")
    found = _Fields(path, _object(path, section, "delegator"))
    if not found.values:
        return None
    z_dim, widths = found.size("z_dim"), found.numbers("widths", int)
    upsample = found.text("upsample", ("resize", "transposed"))
    helper_bn = found.flag("helper_bn")
    if z_dim is None or widths is None or upsample is None or helper_bn is None:
        raise UserError(f"{path}: skd_jax.delegator lacks a field")
    if not all(0 < width <= MAX_SIZE for width in widths) or not 2 <= len(widths) <= 12:
        raise UserError(f"{path}: skd_jax.delegator.widths {list(widths)} are of no delegator")
    return Delegator(z_dim, widths, upsample, helper_bn)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Fields of a JSON file that anyone may have written, each of its type or None."""

    path: Path
    values: Mapping[str, Any]

    def _wrong(self, name: str, wanted: str) -> UserError:
        shown = repr(self.values[name])[:60]
        return UserError(f"{self.path}: {name} is {shown}, not {wanted}")

    def numbers(self, name: str, kind: type) -> Any:
        found = self.values.get(name)
        if found is None:
            return None
        kinds = (int,) if kind is int else (int, float)
        if not isinstance(found, list) or not all(type(x) in kinds for x in found):
            raise self._wrong(name, "a list of numbers")
        if not all(abs(x) < 1e9 for x in found):  # NaN, too, is not
            raise self._wrong(name, "a list of finite numbers")
        return tuple(kind(x) for x in found)

    def number(self, name: str) -> float | None:
        found = self.values.get(name)
        if found is None:
            return None
        if type(found) not in (int, float) or not abs(found) < 1e9:
            raise self._wrong(name, "a number")
        return float(found)

    def size(self, name: str) -> int | None:
        found = self.values.get(name)
        if found is None:
            return None
        if type(found) is not int or not 0 < found <= MAX_SIZE:
            raise self._wrong(name, f"a whole number from 1 to {MAX_SIZE}")
        return found

    def flag(self, name: str) -> bool | None:
        found = self.values.get(name)
        if found is not None and type(found) is not bool:
            raise self._wrong(name, "true or false")
        return found

    def text(self, name: str, choices: Sequence[str]) -> Any:
        found = self.values.get(name)
        if found is not None and found not in choices:
            raise self._wrong(name, f"one of {', '.join(choices)}")
        return found

    def names(self, name: str) -> tuple[str, ...] | None:
        found = self.values.get(name)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
            raise self._wrong(name, "a list of names")
        return tuple(found)

"""The typed configuration: one frozen dataclass a section, checked before any work starts.

A file under ``configs/`` returns an ``ml_collections.ConfigDict``; :func:`from_config_dict` turns
it into :class:`Config`. The dataclasses are the schema: a field that is not here is unknown, and
the instances are hashable, so that the parts a compiled step depends on are static arguments of
it.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from skd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images, which classes in which order, and how a batch of them is made."""

    name: str  # "digits", "folder" or a TFDS name, such as cifar100 or imagenet2012
    data_dir: str  # TFDS's data directory, or the image folder; "" is TFDS's default directory
    image_size: int  # height and width the networks see, pixels
    channels: int  # 3, or 1 for digits
    load_size: int  # height and width images are stored at before augmentation, pixels
    fit: str  # how an image becomes square: "squash", or "crop" (short side, then the centre)
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]
    augment: str  # "none", "crop" (pad, random crop, flip) or "resized_crop" (and flip)
    pad: int  # pixels of zero padding of "crop"
    flip: bool  # random horizontal flips
    in_memory: bool  # keep a task's images on the device; False decodes each batch as it is needed
    # > 0: all images split anew, stratified, but for a folder that comes split; 0: the own split
    test_fraction: float
    split_seed: int
    exclude_classes: tuple[str, ...]  # class names left out
    subset: int  # > 0: choose this many classes by np.random.seed(order_seed), as LUCIR does
    order_seed: int  # numpy seed of the class order
    max_classes: int  # > 0: only the first so many of the order
    base_classes: int  # classes of task 0
    tasks: int  # N, the number of incremental tasks
    # The classes to learn first, by name with commas between, or a file with a name a line; the
    # rest follow in the order of order_seed.
    class_order: str = ""
    interpolation: str = "bilinear"  # of resizing to load_size; or bicubic, nearest or lanczos
    # > 0: this share of each class's training images is tested on in place of the test images,
    # which are not read: to choose settings on.
    held_out: float = 0.0


@dataclasses.dataclass(frozen=True)
class Model:
    """The classifier T_n, S_n."""

    family: str  # "cifar" (three stages) or "imagenet" (four stages)
    depth: int  # 6n + 2 (cifar), or 10, 18, 34, 50, 101, 152 (imagenet)
    width: int  # channels of the first stage: 16 (cifar) or 64 (imagenet) in the paper
    bn_momentum: float  # share of the old running statistic that is kept
    dtype: str  # of activations: "float32" or "bfloat16"; all else stays float32
    # Of the networks' products of float32: "highest" is float32; with "high" and "default",
    # JAX's own, accelerators may round the factors to TensorFloat-32 or bfloat16, and are faster.
    precision: str = "highest"
    # Of blocks that change the shape: "conv" (1x1 and BN), or without parameters "pad" or
    # "pad_end": every second pixel, and zeros for new channels around the old ones or after them.
    shortcut: str = "conv"
    last_relu: bool = True  # the last block ends in one; without it features may be negative
    head: str = "linear"  # or "cosine" (LUCIR): sigma * cos(features, weights), without a bias


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Training by SGD: of T_0 on the base classes, and of methods that learn so."""

    epochs: int
    batch: int
    lr: float
    drop_epochs: tuple[int, ...]  # the rate is divided by 10 at each
    momentum: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run goes, not what it computes: but for ``replicas`` they may change at a resume."""

    log_every: int  # steps
    checkpoint_every: int  # steps; and at every phase's end
    keep_checkpoints: int
    steps_per_call: int  # at most, in half a second; 0: 1 on CPU, else 25 or 64 MiB of images
    eval_batch: int
    devices: int  # to compute on; 0: all, of all processes
    pseudo_images: int  # in the picture of pseudo images
    max_skipped: int  # steps in a row left out for a number that is not finite; then a run stops
    collapse_share: float  # of pseudo labels in one class: from here on it counts as a collapse
    stop_at_collapse: bool  # stop there; else warn and go on
    quality_images: int = 0  # pseudo images a generator's quality is measured on; 0: it is not
    phases: int = 0  # to train before it ends (1: T_0; 2: and what follows it); 0: all
    start_from: str = ""  # workdir of an ended run whose phases this one takes over; "": none
    replicas: int = 1  # runs of seed, seed + 1, .. that are trained at once


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment: one section each for the parts below."""

    seed: int
    data: Data
    model: Model
    base: Supervised
    method: Any  # a method's own settings, a frozen dataclass; its ``name`` says which method's
    run: Run


Methods = Mapping[str, Any]  # by name, with ``settings``, a dataclass, and ``check``


def from_config_dict(config: ConfigDict, methods: Methods | None = None) -> Config:
    """The typed configuration, every value checked.

    Args:
      config: as a file under ``configs/`` returns it.
      methods: those that ``config.method.name`` may name; None is all there are.

    Raises:
      UserError: an unknown or missing field, a value of the wrong type or out of range; the message
        names the field.
    """
    if methods is None:
        from skd_jax.methods import METHODS as methods  # they are built on this module

    return checked(_section(Config, config, "config", methods), methods)


def checked(config: Config, methods: Methods) -> Config:
    """The same configuration, if its values can be used.

    Raises:
      UserError: one is out of range, or two contradict each other; the message names the field.
    """
    _check(config)
    methods[config.method.name].check(config)
    return config


def late_drops(config: Config) -> list[str]:
    """What to say of rates that never drop, since epochs were lowered and nothing else.

    Returns:
      A line for each field; none where every drop lies before the end, or no drop is wanted.
    """
    lines = []

    def look(section: Any, path: str) -> None:
        for epochs, every in (("epochs", "drop_every"), ("finetune_epochs", "finetune_drop_every")):
            length, at = getattr(section, epochs, 0), getattr(section, every, 0)
            if at > length and getattr(section, "schedule", "drops") != "cosine":
                lines.append(_late(f"{path}.{every}", at, f"{path}.{epochs}", length, length // 2))
        drops = getattr(section, "drop_epochs", ())
        if drops and max(drops) >= section.epochs:
            half = (section.epochs // 2, 3 * section.epochs // 4) if section.epochs > 3 else ()
            end, drops = f"{path}.epochs", tuple(drops)
            lines.append(_late(f"{path}.drop_epochs", drops, end, section.epochs, half))
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(part := getattr(section, field.name)):
                look(part, f"{path}.{field.name}")

    look(config, "config")
    return lines


def _late(field: str, at: Any, epochs: str, length: int, better: Any) -> str:
    better = str(better or 1 if isinstance(better, int) else better).replace(" ", "")
    return (
        f"{field}={at} lies beyond {epochs}={length}, so that the rate does not drop then: set "
        f'both, for instance --{field}="{better}"'
    )


def unknown_field(path: str, methods: Methods) -> str | None:
    """What is wrong with ``path`` ("config.method.rouns"); None if there may be such a field."""
    hint: Any = Config
    done, *names = path.split(".")
    for name in names:
        hints = _fields(hint, methods)
        if hint != PAIRS and name not in hints:
            return _unknown(done, name, hints, methods)
        hint, done = hints.get(name, float), f"{done}.{name}"
    return None


def field_paths(methods: Methods) -> list[str]:
    """The path of every field: "config.seed", "config.data.name"; of all methods together."""
    found = []

    def add(hint: Any, path: str) -> None:
        fields = _fields(hint, methods)
        for name, kind in fields.items():
            add(kind, f"{path}.{name}")
        if not fields:
            found.append(path)

    add(Config, "config")
    return found


def same_name(name: str, methods: Methods) -> str | None:
    """The path of the one field that has this name, whatever section it is in."""
    paths = [path for path in field_paths(methods) if path.endswith(f".{name}")]
    return paths[0] if len(paths) == 1 else None


def wrong_value(path: str, value: str, methods: Methods) -> str:
    """What is wrong with a ``value`` that cannot be read as one of ``path``."""
    hint: Any = Config
    for name in path.split(".")[1:]:
        hint = _fields(hint, methods).get(name, float)  # a weight by name, where it is no field
    return unknown_field(path, methods) or f"{path}: expected {_kind(hint)}, got {value!r}"


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON types, for the workdir's config.json."""
    return _plain(config)


def with_defaults(saved: Mapping[str, Any], methods: Methods) -> dict[str, Any]:
    """A saved configuration, as :func:`to_dict` gave it, with the fields that were added since."""
    method = saved.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    hints = typing.get_type_hints(Config)
    hints["method"] = methods[name].settings if name and name in methods else Any
    return {field: _with_defaults(value, hints.get(field)) for field, value in saved.items()}


def _with_defaults(saved: Any, hint: Any) -> Any:
    if not (dataclasses.is_dataclass(hint) and isinstance(saved, Mapping)):
        return saved
    fields, hints = dataclasses.fields(hint), typing.get_type_hints(hint)
    known = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {name: _with_defaults(x, hints.get(name)) for name, x in {**known, **saved}.items()}


def _plain(value: Any, hint: Any = None) -> Any:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return {name: _plain(getattr(value, name), hints[name]) for name in hints}
    return dict(value) if hint == PAIRS else value


def _section(cls: type, values: Any, path: str, methods: Methods) -> Any:
    if not isinstance(values, ConfigDict | dict):
        raise UserError(f"{path}: expected {_kind(cls)}, got {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(_unknown(path, name, hints, methods))
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path}.{field.name}: missing from the config; add it")
    if cls is Config:
        hints["method"] = _settings(values["method"], methods)
    found = {
        n: _value(h, values[n], f"{path}.{n}", methods) for n, h in hints.items() if n in values
    }
    return cls(**found)


def _settings(values: Any, methods: Methods) -> type:
    """The type of a method's section."""
    name = values.get("name") if isinstance(values, ConfigDict | dict) else None
    if not isinstance(name, str) or name not in methods:
        raise UserError(
            f"config.method.name: {name!r} is not one of {', '.join(methods)}; give a config's "
            "argument method=NAME, or a section with that name"
        )
    return methods[name].settings


def _fields(hint: Any, methods: Methods) -> dict[str, Any]:
    if hint is Any:  # the section of a method: a field of any
        every = [typing.get_type_hints(method.settings) for method in methods.values()]
        return {name: kind for hints in every for name, kind in hints.items()}
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def _unknown(path: str, name: str, hints: dict[str, Any], methods: Methods) -> str:
    close = difflib.get_close_matches(name, hints, n=1)
    fix = f"did you mean {path}.{close[0]}?" if close else f"fields: {', '.join(hints) or 'none'}"
    if path == "config.method" and not close:
        fix += "; another method is chosen by the config's argument method=NAME"
    if path == "config" and name in _fields(Any, methods):
        fix = f"did you mean config.method.{name}?"
    elif path == "config" and (meant := same_name(name, methods)):
        fix = f"did you mean {meant}?"
    return f"{path}.{name}: unknown field; {fix}"


def _kind(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or hint is Any:
        return "a section with fields"
    if hint == PAIRS:
        return "names with weights"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {typing.get_args(hint)[0].__name__}"
    return hint.__name__


def _value(hint: Any, value: Any, path: str, methods: Methods) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:  # thousands of digits cannot even be shown
        raise UserError(f"{path}: the number is too large; give one of at most 64 bits")
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, path, methods)
    if hint == PAIRS:
        if isinstance(value, ConfigDict | dict):
            return tuple(
                (k, _value(float, v, f"{path}.{k}", methods)) for k, v in sorted(value.items())
            )
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, tuple | list):
            item = typing.get_args(hint)[0]
            return tuple(_value(item, v, f"{path}[{i}]", methods) for i, v in enumerate(value))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise UserError(f"{path}: expected {_kind(hint)}, got {value!r}")


PAIRS = tuple[tuple[str, float], ...]  # names with weights


@dataclasses.dataclass(frozen=True)
class Limits:
    """What values some fields may have; paths are relative to ``prefix``.

    Attributes:
      prefix: "method." or "", for instance.
      choices: the values that a field may have.
      at_least_one: fields that are 1 or more; here and below, of several numbers each.
      at_least_two: fields that are 2 or more.
      not_negative: fields that are 0 or more.
      positive: fields above 0.
      below_one: fields in [0, 1).
      at_most: the largest value that a field may have.
    """

    prefix: str = ""
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    at_least_one: tuple[str, ...] = ()
    at_least_two: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    below_one: tuple[str, ...] = ()
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def check(self, config: Config) -> None:
        """Raises UserError for the first field that is outside its limits."""

        def get(path: str) -> tuple[str, Any]:
            value: Any = config
            for name in f"{self.prefix}{path}".split("."):
                value = getattr(value, name)
            return f"config.{self.prefix}{path}", value

        for path, choices in self.choices.items():
            name, value = get(path)
            if value not in choices:
                raise UserError(f"{name}: {value!r} is not one of {', '.join(choices)}")
        least_of = (self.at_least_one, 1), (self.at_least_two, 2), (self.not_negative, 0)
        for paths, least in least_of:
            for name, value in map(get, paths):
                for one in value if isinstance(value, tuple) else (value,):
                    if not least <= one < float("inf"):
                        what = f"below {least}" if one < least else "not finite"
                        raise UserError(f"{name}: {one} is {what}; give {least} or more")
        for name, value in map(get, self.positive):
            if not 0 < value < float("inf"):
                raise UserError(f"{name}: {value} is not a positive number")
        for name, value in map(get, self.below_one):
            if not 0 <= value < 1:
                raise UserError(f"{name}: {value} is not in [0, 1)")
        for path, most in self.at_most.items():
            name, value = get(path)
            if value > most:
                raise UserError(f"{name}: {value} is too large; give {most:g} or less")


def learning(
    section: str = "",
    choices: Mapping[str, tuple[str, ...]] | None = None,
    not_negative: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    below_one: tuple[str, ...] = (),
) -> Limits:
    """The limits of a section with the fields of :class:`Supervised`, and of more fields."""
    return Limits(
        prefix=section,
        choices=choices or {},
        at_least_one=("epochs", "batch"),
        not_negative=("weight_decay", "drop_epochs", *not_negative),
        positive=("lr", *positive),
        below_one=("momentum", *below_one),
    )


_LIMITS = Limits(
    choices={
        "model.family": ("cifar", "imagenet"),
        "model.dtype": ("float32", "bfloat16"),
        "model.head": ("linear", "cosine"),
        "model.precision": ("default", "high", "highest"),
        "model.shortcut": ("conv", "pad", "pad_end"),
    },
    at_least_one=(
        *("model.width", "run.log_every", "run.checkpoint_every", "run.keep_checkpoints"),
        *("run.eval_batch", "run.max_skipped", "run.replicas"),
    ),
    not_negative=(
        *("seed", "run.steps_per_call", "run.devices", "run.pseudo_images"),
        *("run.phases", "run.quality_images"),
    ),
    below_one=("model.bn_momentum",),
)


def _check(config: Config) -> None:
    _LIMITS.check(config)
    learning("base.").check(config)
    if config.run.quality_images == 1:
        raise UserError("config.run.quality_images: 1 has no neighbour; give 0, or 2 or more")
    if not 0 < config.run.collapse_share <= 1:
        raise UserError(f"config.run.collapse_share: {config.run.collapse_share} is not in (0, 1]")

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
    test_fraction: (
        float  # > 0: all images, split anew, stratified; 0: the data set's own test split
    )
    split_seed: int
    exclude_classes: tuple[str, ...]  # class names left out
    subset: int  # > 0: choose this many classes by np.random.seed(order_seed), as LUCIR does
    order_seed: int  # numpy seed of the class order
    max_classes: int  # > 0: only the first so many of the order
    base_classes: int  # classes of task 0
    tasks: int  # N, the number of incremental tasks


@dataclasses.dataclass(frozen=True)
class Model:
    """The classifier T_n, S_n."""

    family: str  # "cifar" (depth 6n+2, three stages) or "imagenet" (depth 10 or 18, four stages)
    depth: int
    width: int  # channels of the first stage: 16 (cifar) or 64 (imagenet) in the paper
    bn_momentum: float  # share of the old running statistic that is kept
    dtype: str  # of activations, D's too: "float32" or "bfloat16"; all else stays float32
    # Of the networks' products of float32: "highest" is float32; with "high" and "default",
    # JAX's own, accelerators may round the factors to TensorFloat-32 or bfloat16, and are faster.
    precision: str = "highest"


@dataclasses.dataclass(frozen=True)
class Delegator:
    """The delegator D_n (Tables IV and V)."""

    z_dim: int
    widths: tuple[int, ...]  # channels after the FC layer, then after each x2 block
    upsample: str  # "resize" (nearest x2, then conv) or "transposed"
    helper_bn: bool


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Training of T_0 on the base classes."""

    epochs: int
    batch: int
    lr: float
    drop_epochs: tuple[int, ...]  # the rate is divided by 10 at each
    momentum: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class StageOne:
    """Training of the delegator: rounds of imitate steps and one explore step."""

    epochs: int  # for D_0
    finetune_epochs: int  # for D_n, n > 0, which starts from D_{n-1}
    rounds_per_epoch: int
    imitate_steps: int  # a round
    batch: int  # pseudo images a step
    student_lr: float  # SGD
    delegator_lr: float  # Adam
    drop_every: int  # epochs of D_0; both rates are divided by 10 at each multiple
    finetune_drop_every: int  # the same for D_n, n > 0
    momentum: float
    weight_decay: float
    student_explores: bool  # S_n learns in the explore step too (Algorithm 1, line 12)
    terms: tuple[tuple[str, float], ...]  # weight of each term of Eq. 8, by function name
    term_modules: tuple[str, ...]  # modules the terms' functions are looked up in, in this order
    feature_source: str  # Eq. 7: batch moments inside the "teacher" or the "student"
    feature_distance: str  # Eq. 7: "variance", "std", "squared", "kl", "kl_of_running"
    # Of T_n and S_n, in Eq. 2 and 3: "cosine" (Eq. 1), or "l1" or "kl" of their outputs.
    discrepancy: str = "cosine"


@dataclasses.dataclass(frozen=True)
class StageTwo:
    """Learning the new classes (Eq. 9-12)."""

    epochs: int
    batch: int  # new images a step, and as many pseudo images
    lr: float
    drop_epochs: tuple[int, ...]
    momentum: float
    weight_decay: float
    delegator: bool  # False: stage one is skipped and x^ holds new images only (Table III)
    beta: float  # Eq. 12; 0: a tenth of the number of new classes, so that gamma_1 is 0.1
    adaptive: bool  # Eq. 12 (ALW); False: gamma_n = gamma
    gamma: float
    classification: str  # Eq. 10 over "all" outputs, "new" outputs only, or "old_head_fixed"
    # Not in the paper: what pseudo images weigh against new ones in Eq. 10. 0: the same, as there;
    # 1: as old classes to new ones, by their number; between: in proportion.
    balanced: float = 0.0
    align_head: bool = False  # not in the paper: after a task, new weights as long as old ones


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run goes, not what it computes: these may change when a run is resumed."""

    log_every: int  # steps
    checkpoint_every: int  # steps; and at every phase's end
    keep_checkpoints: int
    steps_per_call: int  # steps of one compiled call; 0: 1 on CPU, 25 elsewhere
    eval_batch: int
    devices: int  # to compute on; 0: all, of all processes
    pseudo_images: int  # in the picture of pseudo images
    max_skipped: int  # steps in a row left out for a number that is not finite; then a run stops
    collapse_share: float  # of the pseudo labels in one class: from here on it counts as a collapse
    stop_at_collapse: bool  # stop there; else warn and go on
    quality_images: int = 0  # pseudo images each delegator's quality is measured on; 0: it is not
    phases: int = 0  # to train before it ends (1: T_0; 2: and its delegator); 0: all
    start_from: str = ""  # workdir of an ended run whose phases this one takes over; "": none


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment: one section each for the parts below."""

    seed: int
    data: Data
    model: Model
    delegator: Delegator
    base: Supervised
    stage_one: StageOne
    stage_two: StageTwo
    run: Run


def from_config_dict(config: ConfigDict) -> Config:
    """The typed configuration, every value checked.

    Raises:
      UserError: an unknown or missing field, a value of the wrong type or out of range; the message
        names the field.
    """
    typed = _section(Config, config, "config")
    _check(typed)
    return typed


def unknown_field(path: str) -> str | None:
    """What is wrong with ``path`` ("config.stage_one.rouns"); None if there may be such a field."""
    hint: Any = Config
    done, *names = path.split(".")
    for name in names:
        hints = _fields(hint)
        if hint != _PAIRS and name not in hints:
            return _unknown(done, name, hints)
        hint, done = hints.get(name, float), f"{done}.{name}"
    return None


def wrong_value(path: str, value: str) -> str:
    """What is wrong with a ``value`` that cannot be read as one of ``path``."""
    hint: Any = Config
    for name in path.split(".")[1:]:
        hint = _fields(hint).get(name, float)  # the weight of a term, where it is no field
    return unknown_field(path) or f"{path}: expected {_kind(hint)}, got {value!r}"


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON types, for the workdir's config.json."""
    plain = dataclasses.asdict(config)
    plain["stage_one"]["terms"] = dict(config.stage_one.terms)
    return plain


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration, as :func:`to_dict` gave it, with the fields that were added since."""
    whole = dict(saved)
    for name, section in typing.get_type_hints(Config).items():
        if isinstance(whole.get(name), Mapping):
            fields = dataclasses.fields(section)
            known = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
            whole[name] = {**known, **whole[name]}
    return whole


def _section(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, ConfigDict | dict):
        raise UserError(f"{path}: expected {_kind(cls)}, got {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(_unknown(path, name, hints))
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path}.{field.name}: missing from the config; add it")
    return cls(**{n: _value(h, values[n], f"{path}.{n}") for n, h in hints.items() if n in values})


def _fields(hint: Any) -> dict[str, Any]:
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def _unknown(path: str, name: str, hints: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, hints, n=1)
    mend = f"did you mean {path}.{close[0]}?" if close else f"fields: {', '.join(hints) or 'none'}"
    return f"{path}.{name}: unknown field; {mend}"


def _kind(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a section with fields"
    if hint == _PAIRS:
        return "names with weights"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {typing.get_args(hint)[0].__name__}"
    return hint.__name__


def _value(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:  # thousands of digits cannot even be shown
        raise UserError(f"{path}: the number is too large; give one of at most 64 bits")
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, path)
    if hint == _PAIRS:
        if isinstance(value, ConfigDict | dict):
            return tuple((k, _value(float, v, f"{path}.{k}")) for k, v in sorted(value.items()))
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, tuple | list):
            item = typing.get_args(hint)[0]
            return tuple(_value(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise UserError(f"{path}: expected {_kind(hint)}, got {value!r}")


_PAIRS = tuple[tuple[str, float], ...]  # names with weights
_CHOICES = {
    "model.family": ("cifar", "imagenet"),
    "model.dtype": ("float32", "bfloat16"),
    "model.precision": ("default", "high", "highest"),
    "delegator.upsample": ("resize", "transposed"),
    "stage_one.discrepancy": ("cosine", "l1", "kl"),
    "stage_one.feature_source": ("teacher", "student"),
    "stage_one.feature_distance": ("variance", "std", "squared", "kl", "kl_of_running"),
    "stage_two.classification": ("all", "new", "old_head_fixed"),
}
_AT_LEAST_ONE = (
    *("delegator.z_dim", "model.width", "base.epochs", "base.batch"),
    *("stage_one.epochs", "stage_one.finetune_epochs", "stage_one.rounds_per_epoch"),
    *("stage_one.imitate_steps", "stage_one.batch", "stage_one.drop_every"),
    *("stage_one.finetune_drop_every", "stage_two.epochs", "stage_two.batch"),
    *("run.log_every", "run.checkpoint_every", "run.keep_checkpoints", "run.eval_batch"),
    "run.max_skipped",
)
_NOT_NEGATIVE = (
    *("seed", "run.steps_per_call", "run.devices", "run.pseudo_images", "stage_two.gamma"),
    *("run.phases", "run.quality_images"),
    "stage_two.beta",
    *("base.weight_decay", "stage_one.weight_decay", "stage_two.weight_decay"),
)
_POSITIVE = ("base.lr", "stage_one.student_lr", "stage_one.delegator_lr", "stage_two.lr")
_BELOW_ONE = ("model.bn_momentum", "base.momentum", "stage_one.momentum", "stage_two.momentum")


def _check(config: Config) -> None:
    def get(path: str) -> Any:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        return value

    for path, choices in _CHOICES.items():
        if get(path) not in choices:
            raise UserError(f"config.{path}: {get(path)!r} is not one of {', '.join(choices)}")
    for paths, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for path in paths:
            if not least <= get(path) < float("inf"):
                raise UserError(
                    f"config.{path}: {get(path)} is too small or infinite; give {least} or more"
                )
    for path in _POSITIVE:
        if not 0 < get(path) < float("inf"):
            raise UserError(f"config.{path}: {get(path)} is not a positive number")
    for path in _BELOW_ONE:
        if not 0 <= get(path) < 1:
            raise UserError(f"config.{path}: {get(path)} is not in [0, 1)")
    if config.run.quality_images == 1:
        raise UserError("config.run.quality_images: 1 has no neighbour; give 0, or 2 or more")
    if not 0 < config.run.collapse_share <= 1:
        raise UserError(f"config.run.collapse_share: {config.run.collapse_share} is not in (0, 1]")
    if not 0 <= config.stage_two.balanced <= 1:
        raise UserError(f"config.stage_two.balanced: {config.stage_two.balanced} is not in [0, 1]")
    for name, weight in config.stage_one.terms:
        if not abs(weight) < float("inf"):
            raise UserError(f"config.stage_one.terms.{name}: {weight} is not a finite number")
    if config.stage_two.classification == "new" and config.stage_two.delegator:
        raise UserError(
            "config.stage_two.classification='new' leaves pseudo images without a label; "
            "set config.stage_two.delegator=False or classification='all'"
        )
    if config.stage_two.balanced and not config.stage_two.delegator:
        raise UserError(
            f"config.stage_two.balanced={config.stage_two.balanced} weighs pseudo images against "
            "new ones; set config.stage_two.delegator=True, or balanced=0"
        )
    if min(config.delegator.widths, default=1) < 1:
        raise UserError(f"config.delegator.widths: {config.delegator.widths}; give positive ones")
    doublings = len(config.delegator.widths) - 1
    if doublings < 1 or config.data.image_size % 2**doublings:
        raise UserError(
            f"config.delegator.widths: {doublings} doublings cannot reach "
            f"config.data.image_size={config.data.image_size}; the size must be divisible by "
            "2 ** (len(widths) - 1)"
        )
    if not config.stage_one.terms:
        raise UserError("config.stage_one.terms: empty; give at least one term a weight")

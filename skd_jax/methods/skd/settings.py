"""What SKD can be told: ``config.method``, with the delegator and both stages in it."""

import dataclasses

from skd_jax.config import Config, Limits, learning
from skd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Delegator:
    """The delegator D_n (Tables IV and V)."""

    z_dim: int
    widths: tuple[int, ...]  # channels after the FC layer, then after each x2 block
    upsample: str  # "resize" (nearest x2, then conv) or "transposed"
    helper_bn: bool


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
    # Of both rates: "drops" at the epochs above; or, not in the paper, "cosine": half a period of
    # it, which would reach 0 after the last round, and no drops; or "student_cosine": S_n's rate
    # falls so, D_n's drops.
    schedule: str = "drops"
    # Not in the paper: wherever a network learns from what D_n draws, D_n itself and stage two too,
    # it is changed as data.augment says of training images, of which T_n's running moments are.
    augment: bool = False
    # Not in the paper: the weight of losses.length_discrepancy beside Eq. 2, in the imitate step
    # alone: S_n learns the length of T_n's features too, which Eq. 1 leaves free.
    feature_length: float = 0.0


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
    # Eq. 10 over "all" outputs, "new" outputs only, or "old_head_fixed": over all, while T_n's stay
    # as they are. Not in the paper: "local", by which features learn new classes among themselves,
    # and "real", by which they learn them among all; "_old_head_fixed" may follow either. Pseudo
    # images teach the head alone then.
    classification: str
    # Not in the paper: what pseudo images weigh against new ones in Eq. 10. 0: the same, as there;
    # 1: as old classes to new ones, by their number; between: in proportion.
    balanced: float = 0.0
    # Not in the paper: the head's steps are divided by gamma_n, which slows the features alone.
    head_at_full_rate: bool = False
    # Not in the paper: the new outputs are learned anew once the features are, with no more of
    # pseudo images than their class means (new_outputs.py): the weight decay; 0: they are not.
    new_outputs_decay: float = 0.0
    # Not in the paper: with it, the means of real images of a task's classes are kept, and later
    # tasks learn the outputs of these classes anew too.
    keep_means: bool = False
    align_head: bool = False  # not in the paper: after a task, new weights as long as old ones


@dataclasses.dataclass(frozen=True)
class Settings:
    """SKD: a section each for the delegator and the two stages."""

    name: str
    delegator: Delegator
    stage_one: StageOne
    stage_two: StageTwo


LEAST_DECAY = 1e-5  # of new outputs: some 3,000 steps


_DELEGATOR = Limits(
    prefix="method.delegator.",
    choices={"upsample": ("resize", "transposed")},
    at_least_one=("z_dim",),
)
_STAGE_ONE = Limits(
    prefix="method.",
    choices={
        "stage_one.discrepancy": ("cosine", "l1", "kl"),
        "stage_one.schedule": ("drops", "cosine", "student_cosine"),
        "stage_one.feature_source": ("teacher", "student"),
        "stage_one.feature_distance": ("variance", "std", "squared", "kl", "kl_of_running"),
    },
    at_least_one=(
        *("stage_one.epochs", "stage_one.finetune_epochs"),
        *("stage_one.rounds_per_epoch", "stage_one.imitate_steps", "stage_one.batch"),
        *("stage_one.drop_every", "stage_one.finetune_drop_every"),
    ),
    not_negative=("stage_one.weight_decay", "stage_one.feature_length"),
    positive=("stage_one.student_lr", "stage_one.delegator_lr"),
    below_one=("stage_one.momentum",),
)
_CLASSIFICATIONS = (
    *("all", "new", "old_head_fixed"),
    *("local", "local_old_head_fixed", "real", "real_old_head_fixed"),
)
_STAGE_TWO = learning(
    "method.stage_two.",
    choices={"classification": _CLASSIFICATIONS},
    not_negative=("gamma", "beta", "new_outputs_decay"),
)


def check(config: Config) -> None:
    """Checks what can be checked without images.

    Raises:
      UserError: a value is out of range, or two contradict each other; the message names the field.
    """
    check_stage_one(config)
    _STAGE_TWO.check(config)
    two, where = config.method.stage_two, "config.method.stage_two"
    if not 0 <= two.balanced <= 1:
        raise UserError(f"{where}.balanced: {two.balanced} is not in [0, 1]")
    if two.classification == "new" and two.delegator:
        raise UserError(
            f"{where}.classification='new' leaves pseudo images without a label; "
            f"set {where}.delegator=False or classification='all'"
        )
    if two.align_head and config.model.head == "cosine":
        raise UserError(
            f"{where}.align_head=True has no effect on config.model.head='cosine', whose outputs "
            f"do not depend on the weights' length; set {where}.align_head=False"
        )
    if two.head_at_full_rate and not (two.adaptive or two.gamma):
        raise UserError(
            f"{where}.head_at_full_rate=True divides the head's steps by gamma, and "
            f"{where}.gamma is 0; give it a value, or set {where}.adaptive=True"
        )
    if two.new_outputs_decay:
        _check_new_outputs(config, f"{where}.new_outputs_decay")
    elif two.keep_means:
        raise UserError(
            f"{where}.keep_means=True is for outputs that are learned anew; set "
            f"{where}.new_outputs_decay (recipe=translated has 2e-4), or keep_means=False"
        )
    if two.balanced and not two.delegator:
        raise UserError(
            f"{where}.balanced={two.balanced} weighs pseudo images against "
            f"new ones; set {where}.delegator=True, or balanced=0"
        )


def _check_new_outputs(config: Config, field: str) -> None:
    two, where = config.method.stage_two, "config.method.stage_two"
    decay = two.new_outputs_decay
    if decay < LEAST_DECAY:
        raise UserError(
            f"{field}: {decay} would take too many steps; give {LEAST_DECAY:g} or more, or 0"
        )
    if not two.delegator:
        raise UserError(
            f"{field}={decay} takes old classes' means from what the delegator draws; set "
            f"{where}.delegator=True, or new_outputs_decay=0"
        )
    if config.model.head == "cosine":
        raise UserError(
            f"{field}={decay} learns linear outputs, and config.model.head='cosine' has others; "
            f"set {field}=0"
        )
    if two.align_head:
        raise UserError(
            f"{where}.align_head=True has no effect where {field}={decay} learns the outputs anew; "
            "set one of them alone"
        )


def check_stage_one(config: Config) -> None:
    """Checks the delegator and its training alone.

    Raises:
      UserError: see :func:`check`.
    """
    _STAGE_ONE.check(config)
    one, data = config.method.stage_one, config.data
    changes_none = data.augment == "crop" and not (data.pad or data.flip)
    if one.augment and (data.augment == "none" or changes_none):
        raise UserError(
            "config.method.stage_one.augment=True has no effect where config.data.augment="
            f"{data.augment!r} changes no image; set config.method.stage_one.augment=False"
        )
    for name, weight in one.terms:
        if not abs(weight) < float("inf"):
            raise UserError(
                f"config.method.stage_one.terms.{name}: {weight} is not a finite number"
            )
    if not any(weight for _, weight in one.terms):
        raise UserError(
            "config.method.stage_one.terms: no term has a weight, and the delegator would learn "
            "nothing; give at least one"
        )
    check_delegator(config)


def check_delegator(config: Config) -> None:
    """Checks the delegator's architecture alone.

    Raises:
      UserError: see :func:`check`.
    """
    _DELEGATOR.check(config)
    delegator = config.method.delegator
    if min(delegator.widths, default=1) < 1:
        raise UserError(f"config.method.delegator.widths: {delegator.widths}; give positive ones")
    doublings = len(delegator.widths) - 1
    if doublings < 1 or config.data.image_size % 2**doublings:
        raise UserError(
            f"config.method.delegator.widths: {doublings} doublings cannot reach "
            f"config.data.image_size={config.data.image_size}; the size must be divisible by "
            "2 ** (len(widths) - 1)"
        )

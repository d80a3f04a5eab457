"""Frozen-feature methods that saw no base image: what they lack comes from the delegator's images.

Ridge, LDA and FeTrIL need statistics of the base classes, which had to be taken while those images
were there. Here D_0 is trained from T_0 alone, and the base's pass runs over what D_0 draws, each
pseudo image of the class that T_0 gives it. All else is the method's own: later classes' statistics
are of their images. No paper; beside the methods themselves, it measures what D_0 is worth to
them. ``pseudo_ncm`` is the same for class means, in a form that lies in the head.

A class that D_0 never draws has no statistics, so that its weights are 0: it is never the answer,
and counts as forgotten.
"""

import dataclasses
from collections.abc import Callable

from flax import struct

from skd_jax.config import Config
from skd_jax.methods import fetril, lda, ridge
from skd_jax.methods.drawn import drawn
from skd_jax.methods.phase import Method, Phase, Setting
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.phases import KeptDelegator, depends_with_d_0, describe, stage_one
from skd_jax.methods.skd.settings import Delegator, StageOne, check_stage_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge(ridge.Settings):
    """A ridge head, and the delegator's training."""

    name: str = "pseudo_ridge"
    delegator: Delegator
    stage_one: StageOne


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lda(lda.Settings):
    """A head of linear discriminants, and the delegator's training."""

    name: str = "pseudo_lda"
    delegator: Delegator
    stage_one: StageOne


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetril(fetril.Settings):
    """FeTrIL, and the delegator's training."""

    name: str = "pseudo_fetril"
    delegator: Delegator
    stage_one: StageOne


@struct.dataclass
class KeptRidge(ridge.KeptRidge, KeptDelegator):
    """What ridge keeps, and D_0."""


@struct.dataclass
class KeptLda(lda.KeptScatter, KeptDelegator):
    """What LDA keeps, and D_0."""


@struct.dataclass
class KeptFetril(fetril.KeptFetril, KeptDelegator):
    """What FeTrIL keeps, and D_0."""


def from_delegator(
    method: Method, own_phases: Callable[..., list[Phase]], settings: type, kept: type
) -> Method:
    """A frozen-feature method whose pass over the base's images is one over D_0's.

    Args:
      method: that takes real images.
      own_phases: its phases, by (setting, task) and what makes its pass over a task's images.
      settings: its own, and the delegator's.
      kept: what it keeps, and D_0.
    """

    def phases(setting: Setting, task: int) -> list[Phase]:
        if task:
            return own_phases(setting, task)
        return [stage_one(setting, 0), *own_phases(setting, 0, drawn)]

    def check(config: Config) -> None:
        method.check(config)
        check_stage_one(config)

    return dataclasses.replace(
        method,
        name=f"pseudo_{method.name}",
        settings=settings,
        phases=phases,
        kept=kept,
        check=check,
        depends=depends_with_d_0,
        describe=describe,
        remarks=quality.remarks,
        keeps=f"the delegator, {method.keeps}",
    )


METHODS = (
    from_delegator(ridge.METHOD, ridge.phases, Ridge, KeptRidge),
    from_delegator(lda.METHOD, lda.phases, Lda, KeptLda),
    from_delegator(fetril.METHOD, fetril.phases, Fetril, KeptFetril),
)

"""The terms of the explore objective (Eq. 8), by the names the config weighs them with.

A term is a pure function of an :class:`Explored` to a scalar. To add one, write such a function in
a module of your own, add the module to ``config.stage_one.term_modules`` and the function's name,
with a weight, to ``config.stage_one.terms``. A term whose weight is 0 is not computed at all.
"""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import losses
from skd_jax.config import StageOne
from skd_jax.errors import UserError


@struct.dataclass
class Explored:
    """All that an explore step knows of its pseudo batch; B images, K classes, F features.

    Attributes:
      images: D(z), [B, S, S, C], in T_n's normalised image space.
      teacher_features: F_n(D(z)), [B, F].
      teacher_logits: T_n's outputs before the softmax, [B, K].
      student_features: F'_n(D(z)), [B, F].
      teacher_moments: (mean, variance) of the batch at each BN layer of T_n, [C_l] each.
      student_moments: the same at each BN layer of S_n.
      running_moments: the running ones that the BN layers of T_n hold.
      config: the settings of stage one.
      axis_name: mapped axis the batch is split over, or None.
    """

    images: jax.Array
    teacher_features: jax.Array
    teacher_logits: jax.Array
    student_features: jax.Array
    teacher_moments: list[losses.Moments]
    student_moments: list[losses.Moments]
    running_moments: list[losses.Moments]
    config: StageOne = struct.field(pytree_node=False)
    axis_name: str | None = struct.field(pytree_node=False, default=None)


Term = Callable[[Explored], jax.Array]
# What a round is logged with beside its terms.
LOGGED = ("imitation", "explore", "label_entropy", "label_shares", "largest_share", "skipped")


def exploration(e: Explored) -> jax.Array:
    """L_exp (Eq. 3); its weight is lambda."""
    return losses.exploration_loss(e.teacher_features, e.student_features)


def category(e: Explored) -> jax.Array:
    """L_cat (Eq. 4, with Eq. 5's labels)."""
    return losses.category_loss(e.teacher_logits, losses.pseudo_label(e.teacher_logits))


def diversity(e: Explored) -> jax.Array:
    """L_div (Eq. 6)."""
    return losses.diversity_loss(jax.nn.softmax(e.teacher_logits), e.axis_name)


def feature_statistics(e: Explored) -> jax.Array:
    """R_feature (Eq. 7), of the moments ``config.feature_source`` names."""
    of_teacher = e.config.feature_source == "teacher"
    moments = e.teacher_moments if of_teacher else e.student_moments
    return losses.feature_statistics_loss(moments, e.running_moments, e.config.feature_distance)


def total_variation(e: Explored) -> jax.Array:
    """Mean squared difference of neighbouring pixels: a smoothness prior, not in the paper."""
    down = jnp.mean(jnp.square(e.images[:, 1:] - e.images[:, :-1]))
    right = jnp.mean(jnp.square(e.images[:, :, 1:] - e.images[:, :, :-1]))
    return down + right


def lookup(config: StageOne) -> tuple[tuple[str, Term], ...]:
    """The (name, function) pairs of all terms with a weight.

    Raises:
      UserError: a module cannot be imported, or no module has a function of that name.
    """
    modules = []
    for name in config.term_modules:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise UserError(
                f"config.stage_one.term_modules: cannot import {name!r} ({error}); give a module "
                "that Python finds from the folder you start in"
            ) from error
    found = []
    for name, weight in config.terms:
        if name in LOGGED:
            raise UserError(
                f"config.stage_one.terms.{name}: that name is taken in the log; rename the function"
            )
        functions = [
            getattr(module, name) for module in modules if callable(getattr(module, name, None))
        ]
        if not functions:
            raise UserError(
                f"config.stage_one.terms.{name}: no function of that name in "
                f"{', '.join(config.term_modules)}; write one there or mend the name"
            )
        if weight:
            found.append((name, functions[0]))
    return tuple(found)

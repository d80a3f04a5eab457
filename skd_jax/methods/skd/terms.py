"""The terms of the explore objective (Eq. 8), by the names the config weighs them with.

A term is a pure function of an :class:`Explored` to a scalar, declared by :func:`term`. To add one,
write such a function in a module of your own, add the module to ``term_modules`` of
``config.method.stage_one``, and the function's name, with a weight, to ``terms`` there. A term
whose weight is 0 is not computed at all.

References:
  [DAFL] Chen et al., "Data-Free Learning of Student Networks", ICCV 2019.
  [ABD] Smith et al., "Always Be Dreaming", ICCV 2021.
  [R-DFCIL] Gao et al., "R-DFCIL: Relation-Guided Representation Learning for Data-Free Class
    Incremental Learning", ECCV 2022.
  [DeepInversion] Yin et al., "Dreaming to Distill", CVPR 2020.
"""

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import losses
from skd_jax.errors import UserError, first_line
from skd_jax.methods.skd.settings import StageOne


@struct.dataclass
class Explored:
    """All that an explore step knows of its pseudo batch; B images, K classes, F features.

    Attributes:
      images: D(z), [B, S, S, C], in T_n's normalised image space.
      teacher_features: F_n(D(z)), [B, F].
      teacher_logits: T_n's outputs before the softmax, [B, K].
      student_features: F'_n(D(z)), [B, F].
      student_logits: T_n's head on these, [B, K].
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
    student_logits: jax.Array
    teacher_moments: list[losses.Moments]
    student_moments: list[losses.Moments]
    running_moments: list[losses.Moments]
    config: StageOne = struct.field(pytree_node=False)
    axis_name: str | None = struct.field(pytree_node=False, default=None)


Term = Callable[[Explored], jax.Array]
_MARK = "_is_term_of_the_explore_objective"


def term(function: Term) -> Term:
    """Declares a function of a module to be a term, which a config may then weigh."""
    setattr(function, _MARK, True)
    return function


# What a round is logged with beside its terms.
LOGGED = (
    *("time", "task", "phase", "step", "global_step"),
    "imitation",
    "feature_length",
    "explore",
    "label_entropy",
    "label_shares",
    "largest_share",
    "skipped",
)


@term
def exploration(e: Explored) -> jax.Array:
    """L_exp (Eq. 3); its weight is lambda."""
    teacher, student = (
        (e.teacher_features, e.teacher_logits),
        (e.student_features, e.student_logits),
    )
    return -losses.discrepancy(teacher, student, e.config.discrepancy)


@term
def category(e: Explored) -> jax.Array:
    """L_cat (Eq. 4, with Eq. 5's labels)."""
    return losses.category_loss(e.teacher_logits, losses.pseudo_label(e.teacher_logits))


@term
def diversity(e: Explored) -> jax.Array:
    """L_div (Eq. 6)."""
    return losses.diversity_loss(jax.nn.softmax(e.teacher_logits), e.axis_name)


@term
def feature_statistics(e: Explored) -> jax.Array:
    """R_feature (Eq. 7), of the moments ``config.feature_source`` names."""
    of_teacher = e.config.feature_source == "teacher"
    moments = e.teacher_moments if of_teacher else e.student_moments
    return losses.feature_statistics_loss(moments, e.running_moments, e.config.feature_distance)


@term
def tempered_category(e: Explored) -> jax.Array:
    """L_cat of logits / 1000, as [ABD] and [R-DFCIL] take it."""
    return losses.category_loss(e.teacher_logits / 1e3, losses.pseudo_label(e.teacher_logits))


@term
def activation(e: Explored) -> jax.Array:
    """L_a of [DAFL]: minus the mean absolute feature; real images excite more features."""
    return -jnp.mean(jnp.abs(e.teacher_features.astype(jnp.float32)))


@term
def smoothness(e: Explored) -> jax.Array:
    """Mean squared difference from the same images under a 5x5 Gaussian, of [ABD]."""
    return losses.smoothness_loss(e.images)


@term
def image_norm(e: Explored) -> jax.Array:
    """Mean squared pixel in normalised space: the l2 prior of [DeepInversion]."""
    return jnp.mean(jnp.square(e.images))


@term
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
                f"config.method.stage_one.term_modules: cannot import {name!r} ({error}); give a "
                "module that Python finds from the folder you start in"
            ) from error
        except Exception as error:  # a module is a program: anything may be raised in it
            raise UserError(
                f"config.method.stage_one.term_modules: cannot import {name!r}, {_said(error)}"
            ) from error
    found = []
    for name, weight in config.terms:
        if name in LOGGED:
            raise UserError(
                f"config.method.stage_one.terms.{name}: that name is taken in the log; rename the "
                "function"
            )
        there = [getattr(module, name) for module in modules if hasattr(module, name)]
        functions = [function for function in there if hasattr(function, _MARK)]
        if not functions:
            which = "function declared by @term" if there else "function"
            raise UserError(
                f"config.method.stage_one.terms.{name}: no {which} of that name in "
                f"{', '.join(config.term_modules)}; write one there (with @term from "
                "skd_jax.methods.skd.terms above it) or fix the name"
            )
        if weight:
            found.append((name, functions[0]))
    return tuple(found)


def try_out(terms: tuple[tuple[str, Term], ...], explored: Callable[[], Explored]) -> None:
    """Traces the terms that are not ours on abstract arrays: nothing is computed.

    Args:
      terms: as :func:`lookup` gives them.
      explored: gives what they will be given, of ``jax.ShapeDtypeStruct``.

    Raises:
      UserError: one fails, or does not return a scalar; the message has its file and line.
    """
    for name, function in terms:
        if function.__module__ == __name__:
            continue
        field = f"config.method.stage_one.terms.{name}"
        try:
            value = jax.eval_shape(function, explored())
        except Exception as error:  # a term is a person's own program
            raise UserError(f"{field} fails: {_said(error, function)}") from error
        leaf = isinstance(value, jax.ShapeDtypeStruct)
        if not (leaf and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)):
            kind = f"{value.dtype} of shape {value.shape}" if leaf else type(value).__name__
            raise UserError(
                f"{field} returns {kind} ({_place(function)}); a term is a scalar float: return a "
                "mean over the batch"
            )


def _said(error: Exception, function: Callable | None = None) -> str:
    """What was raised in somebody's module and where, on one line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if _is_theirs(f.filename)]
    where = f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else _place(function)
    return f"{where}: {type(error).__name__}: {first_line(error)}"


def _place(function: Callable | None) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "somewhere in it"


def _is_theirs(file: str) -> bool:
    """Whether a file is neither of this package nor of an installed one, nor of Python."""
    paths = sysconfig.get_paths()
    ours = (Path(__file__).parents[2], paths["stdlib"], paths["purelib"], paths["platlib"])
    return not file.startswith("<") and not any(Path(file).is_relative_to(p) for p in ours)

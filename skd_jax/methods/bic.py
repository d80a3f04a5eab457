"""BiC: distillation and cross-entropy by the share of old classes, then two numbers for the new.

Stage 1 learns nine tenths of the new images and exemplars, by

    lambda KD_2(z', z over O) + (1 - lambda) CE over all outputs,   lambda = n_O / (n_O + n_N),

where z' are T_n's outputs after its own correction. Stage 2 holds the network and fits alpha and
beta by cross-entropy on the rest, as many images of each class: q_c = z_c for old classes, and
alpha z_c + beta for new ones. An image is of the largest q. As in the official code only the newest
classes are corrected, in the answer and in the teacher, and older outputs are taken raw; FACIL
keeps and applies a pair a task. (PODNet's code predicts without the correction, PyCIL's takes a
softmax twice, mammoth's lambda is 1 / (t + 1).)

Stage 2's loss is convex in its two numbers, and damped Newton steps find where it is least; the
codes descend by SGD, which large outputs throw off. The images are as they are, the held-out ones
are drawn by the seed. The penalty on beta is in the codes, not the paper's formula. The paper's
CIFAR-100 schedule of stage 1 is 250 epochs, 0.1 / 10 at 100, 150, 200, weight decay 2e-4.

Kept: 20 exemplars a class, where the paper has 2,000 in all; alpha, beta and where they begin.

References:
  Wu, Chen, Wang, Ye, Liu, Guo, Fu, "Large Scale Incremental Learning", CVPR 2019. Not verified: the
  paper itself was read through its released code and notes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skd_jax import losses, steps
from skd_jax.methods import exemplars
from skd_jax.methods.collecting import Collected, collected
from skd_jax.methods.distillation import distillation_loss
from skd_jax.methods.exemplars import KeptExemplars, learn, select
from skd_jax.methods.phase import Method, Metrics, Phase, Replay, Setting, Take, logits
from skd_jax.state import Batch, Trained

TEMPERATURE = 2.0
BIAS = 8  # the number of stage 2 in random keys


@dataclasses.dataclass(frozen=True)
class Settings(exemplars.Settings):
    """BiC."""

    name: str = "bic"
    # Of the exemplars of a class, and as many new images of each: at least 1, and never all.
    held_out: float = 0.1
    bias_steps: int = 50  # Newton's
    bias_penalty: float = 0.1  # times beta^2 / 2


@struct.dataclass
class Correction:
    """Of the outputs from ``first`` (int32) on: alpha z + beta."""

    alpha: jax.Array
    beta: jax.Array
    first: jax.Array

    def __call__(self, outputs: jax.Array) -> jax.Array:
        """Outputs z [B, K] to q [B, K]."""
        new = jnp.arange(outputs.shape[-1]) >= self.first
        return jnp.where(new[None], self.alpha * outputs + self.beta, outputs)


@struct.dataclass
class KeptCorrection(KeptExemplars):
    """T_n, exemplars, and the correction of T_n's newest outputs; None before there is one."""

    correction: Correction | None = None


def scores(
    static: object, nets: steps.Networks, kept: KeptCorrection, images: jax.Array
) -> jax.Array:
    """q, [B, K]."""
    found = logits(static, nets, kept, images)
    return found if kept.correction is None else kept.correction(found)


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: KeptCorrection,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step of stage 1."""
    del key
    teacher = scores(static, nets, kept, batch.images)
    num_old = teacher.shape[1]

    def objective(features: jax.Array, z: jax.Array) -> tuple[jax.Array, Metrics]:
        del features
        weight = num_old / z.shape[1]  # lambda
        one_hot = jax.nn.one_hot(batch.labels, z.shape[1])
        classification = losses.classification_loss(z, one_hot)
        distilled = distillation_loss(teacher, z[:, :num_old], TEMPERATURE)
        loss = weight * distilled + (1 - weight) * classification
        return loss, {"loss": loss, "classification": classification, "distillation": distilled}

    return steps.minimise(nets, static, state, batch.images, batch.labels, rates, objective)


@functools.partial(jax.jit, static_argnames=("num_steps", "penalty"))
def fit(
    outputs: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    first: jax.Array,
    num_steps: int,
    penalty: float,
) -> Correction:
    """Stage 2: alpha and beta from outputs and labels.

    The loss is the mean cross-entropy of q + penalty beta^2 / 2. Each step from alpha = 1, beta = 0
    is Newton's, at most 1 long, or a half, a quarter .. of it, or none: what has the lowest loss.

    Args:
      outputs: z, [n, K].
      labels: int32 [n].
      valid: bool [n], those that count.
      first: int32, the first of the new outputs.
      num_steps: at most as many as that.
      penalty: on beta.
    """
    shares = jnp.array([0.0, *(0.5**k for k in range(16))])  # of Newton's step
    scale = jnp.maximum(1.0, jnp.max(jnp.abs(outputs)))  # of beta, so that both are of one size

    def loss(scaled: jax.Array) -> jax.Array:
        pair = scaled * jnp.array([1.0, scale])
        q = jax.nn.log_softmax(Correction(pair[0], pair[1], first)(outputs))
        own = jnp.take_along_axis(q, labels[:, None], axis=1)[:, 0]
        mean = -jnp.sum(jnp.where(valid, own, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        return mean + penalty * pair[1] ** 2 / 2

    def descend(_: jax.Array, pair: jax.Array) -> jax.Array:
        gradient, hessian = jax.grad(loss)(pair), jax.hessian(loss)(pair)
        damping = 1e-6 * jnp.trace(hessian) + 1e-9
        newton = jnp.linalg.solve(hessian + damping * jnp.eye(2), gradient)
        # Large outputs leave no curvature but at the kinks between them.
        newton = newton / jnp.maximum(1.0, jnp.linalg.norm(newton))
        pairs = pair[None] - shares[:, None] * newton[None]
        found = jax.vmap(loss)(pairs)
        return pairs[jnp.argmin(jnp.where(jnp.isfinite(found), found, jnp.inf))]

    pair = jax.lax.fori_loop(0, num_steps, descend, jnp.array([1.0, 0.0]))
    return Correction(pair[0], scale * pair[1], jnp.asarray(first, jnp.int32))


def split(counts: tuple[int, ...], held: int, seed: int, task: int) -> tuple[np.ndarray, ...]:
    """What is learned from and what is held out: indices of images that lie class by class.

    Args:
      counts: images of each class.
      held: how many of each are held out, where that leaves one.
      seed: of the run.
      task: its number.
    """
    random = np.random.RandomState([seed % 2**32, task, BIAS])
    starts = np.cumsum([0, *counts[:-1]])
    drawn = [
        at + random.permutation(n)[: min(held, n - 1)] for at, n in zip(starts, counts, strict=True)
    ]
    out = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(sum(counts)), out), out


def held_out(setting: Setting, task: int) -> int:
    """How many images of each class are held out in a task."""
    settings: Settings = setting.config.method
    least = min(n for t in range(task + 1) for n in exemplars.numbers(setting, t))
    return max(1, min(round(settings.held_out * least), least - 1))


def some(indices: np.ndarray) -> Replay:
    """The exemplars at some indices."""

    def of(kept: KeptExemplars) -> tuple[jax.Array, jax.Array]:
        assert kept.exemplars is not None
        return kept.exemplars.images[indices], kept.exemplars.labels[indices]

    return Replay(len(indices), of)


def outputs(nets: steps.Networks, kept: KeptExemplars, images: jax.Array) -> jax.Array:
    """z, [B, K]."""
    return logits(None, nets, kept, images)


def phases(setting: Setting, task: int) -> list[Phase]:
    """Stages 1 and 2, but for the base, and the choice of exemplars."""
    if not task:
        return [select(setting, task)]
    settings: Settings = setting.config.method
    seed, held = setting.config.seed, held_out(setting, task)
    old = tuple(n for t in range(task) for n in exemplars.numbers(setting, t))
    (own, own_held), (kept_, kept_held) = (
        split(counts, held, seed, task) for counts in (setting.by_class(task), old)
    )
    train = learn(
        *(setting, task, step, settings),
        images=len(own) + len(kept_),
        own=tuple(own.tolist()),
        replay=some(kept_),
        ends_task=False,
    )
    count, num_old = len(own_held) + len(kept_held), setting.seen(task - 1)

    def finish(state: Collected, kept: KeptCorrection, take: Take) -> KeptCorrection:
        del take
        found = fit(
            *(state.rows, state.labels, state.valid, jnp.int32(num_old)),
            *(settings.bias_steps, settings.bias_penalty),
        )
        return dataclasses.replace(kept, correction=found)

    bias = collected(
        *(setting, task, "bias", outputs, setting.seen(task), count),
        number=BIAS,
        own=tuple(own_held.tolist()),
        replay=some(kept_held),
        finish=finish,
    )
    return [train, bias, select(setting, task)]


METHOD = Method(
    "bic",
    Settings,
    phases,
    kept=KeptCorrection,
    scores=scores,
    check=exemplars.limits(
        *((), ("exemplars",)),  # one is learned from, one held out
        not_negative=("bias_penalty", "bias_steps"),
        positive=("held_out",),
        below_one=("held_out",),
    ).check,
    family="exemplars",
    keeps="images",
)

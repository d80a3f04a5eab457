"""iCaRL: exemplars by herding, distillation of outputs one by one, nearest mean of exemplars.

The head's outputs are sigmoids; T_0 is that of all methods, trained by softmax. The loss is the
binary cross-entropy of each, summed over the classes: the target of an old class is sigma(z'_c) of
T_n for every image, exemplars too, whatever its label; that of a new class is the one-hot label.
The paper's program averages over 100 outputs too, with a rate of 2.0 and decay 1e-5; summed over
them, that is a rate of 0.02 and decay 1e-3. A deviation: the rate and decay here are those of all
methods, 0.1 at full scale, 5 times the published one, and 5e-4, half of it.
``loss="softmax"`` is the variant that later papers measure under this name (LUCIR, Mnemonics,
PyCIL): cross-entropy over all outputs + KD_2 over the old ones, weight 1.

An image is of the class whose exemplars' mean feature, of unit features and at length 1 itself, is
nearest ("nme"), or of the largest output ("cnn"; the paper's hybrid1). The means are of images as
they are, as in PyCIL and FACIL; the paper's program averages each with its mirror image.

Kept: 20 exemplars a class, where the paper has 2,000 in all; and their means.

References:
  Rebuffi, Kolesnikov, Sperl, Lampert, "iCaRL: Incremental Classifier and Representation Learning",
  CVPR 2017.
"""

import dataclasses
from typing import Any

import jax
from flax import struct

from skd_jax import losses, steps
from skd_jax.methods import exemplars
from skd_jax.methods.class_means import nearness
from skd_jax.methods.collecting import features
from skd_jax.methods.distillation import binary_loss, binary_targets, distillation_loss
from skd_jax.methods.exemplars import KeptExemplars, learn, means_of_units, select
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.state import Batch, Kept, Trained

TEMPERATURE = 2.0  # of the variant by a softmax


@dataclasses.dataclass(frozen=True)
class Settings(exemplars.Settings):
    """iCaRL."""

    name: str = "icarl"
    loss: str = "binary"  # or "softmax"
    rule: str = "nme"  # how classes are told, or "cnn"


@struct.dataclass
class KeptMeans(KeptExemplars):
    """T_n, exemplars, and the mean of each class's, float32 [K, F], at length 1; or None."""

    means: jax.Array | None = None


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: KeptMeans,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on new images and exemplars."""
    del key
    teacher = logits(None, nets, kept, batch.images)

    def objective(features: jax.Array, z: jax.Array) -> tuple[jax.Array, Metrics]:
        del features
        if static.loss == "binary":
            loss = binary_loss(z, binary_targets(teacher, batch.labels, z.shape[1]))
            return loss, {"binary": loss}
        one_hot = jax.nn.one_hot(batch.labels, z.shape[1])
        classification = losses.classification_loss(z, one_hot)
        distilled = distillation_loss(teacher, z[:, : teacher.shape[1]], TEMPERATURE)
        loss = classification + distilled
        return loss, {"loss": loss, "classification": classification, "distillation": distilled}

    return steps.minimise(nets, static, state, batch.images, batch.labels, rates, objective)


def scores(static: Settings, nets: steps.Networks, kept: KeptMeans, images: jax.Array) -> jax.Array:
    """The outputs, or the cosines with the classes' means, of which the nearest's is largest."""
    if static.rule == "cnn" or kept.means is None:  # or T_0, before its exemplars are chosen
        return logits(static, nets, kept, images)
    return nearness(features(nets, kept, images), kept.means, "cosine")


def with_means(kept: KeptMeans, found: jax.Array, own: jax.Array) -> KeptMeans:
    """Keeps the means of all exemplars, whose features are [M, F], by the network as it is now."""
    del own
    assert kept.classifier is not None and kept.exemplars is not None
    classes = kept.classifier.params["head"]["kernel"].shape[-1]
    means = means_of_units(found, kept.exemplars.labels, classes)
    return dataclasses.replace(kept, means=means)


def report(state: Any, kept: KeptMeans, remembered: Any, probe: Any) -> dict[str, Any]:
    """The accuracy on all classes seen by the largest output."""
    del state, remembered
    return {"cnn_top1": probe.accuracy(probe.predict(Kept(kept.classifier))).top1}


def phases(setting: Setting, task: int) -> list[Phase]:
    """Learning, but for the base, and the choice of exemplars."""
    settings = setting.config.method
    first = [learn(setting, task, step, settings, ends_task=False)] if task else []
    return [*first, select(setting, task, leave=with_means, report=report)]


METHOD = Method(
    "icarl",
    Settings,
    phases,
    kept=KeptMeans,
    scores=scores,
    check=exemplars.limits(choices={"loss": ("binary", "softmax"), "rule": ("cnn", "nme")}).check,
    family="exemplars",
    keeps="images, class means",
)

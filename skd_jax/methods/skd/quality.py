"""How good a delegator is: what its pseudo images look like to the teacher, beside real ones.

Everything here is for the report. Real test images are looked at as in any test accuracy; nothing
of it reaches training.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import parallel, plots, steps
from skd_jax.compiler import compiled
from skd_jax.data import prepare
from skd_jax.files import write_json
from skd_jax.measured import mean_of_finite
from skd_jax.methods.phase import PICTURES, Watched, phase_keys
from skd_jax.methods.skd.steps import Networks, StageOneState, pseudo_images
from skd_jax.models import MOMENTS, is_cosine, moments_by_layer
from skd_jax.output import listed
from skd_jax.state import Kept, Network, Trained
from skd_jax.writer import drawing

if TYPE_CHECKING:
    from skd_jax.evaluate import Probe
    from skd_jax.experiment import Experiment

RARE = 0.05  # of what each class would have if all were drawn alike
Pair = tuple[np.ndarray, np.ndarray]  # (mean, biased variance) of a BN layer's channels, [C]


def examine(
    nets: Networks,
    task: int,
    state: StageOneState | Trained,
    kept: Any,
    remembered: Mapping[str, Any],
    probe: "Probe",
) -> dict[str, Any]:
    """Measures D_n and S_n (Table I), pictures what D_n draws, writes down what T_n makes of it.

    Args:
      nets: the architectures.
      task: n.
      state: as stage one, or a generator's training that has no S_n, left it.
      kept: T_n and D_n.
      remembered: see :func:`watch`; empty if every round was skipped.
      probe: what may be looked at.

    Returns:
      The row of Table I: ``task``, ``teacher_accuracy`` of T_n on the test images of all its
      classes, ``student_accuracy`` of S_n's features under T_n's head, ``gap`` between the two,
      ``agreement``: the share of the images to which both give the same class,
      ``student_accuracy_at_length`` of S_n's features once they are scaled (:func:`at_length`), and
      ``label_entropy`` and ``label_shares`` of the last rounds' pseudo images. What needs test
      images is None where the classes have none, what needs S_n where there is none, and what
      needs pseudo images where ``run.quality_images`` is 0.
    """
    run = probe.experiment.config.run
    images, pseudo = None, None
    if count := max(run.pseudo_images, run.quality_images):
        images = drawn_images(probe.experiment, nets, kept.delegator, task, count)
        if run.quality_images:
            some = images[: run.quality_images]
            pseudo = look(probe.experiment, kept.classifier, some, probe.between)
    teacher = probe.predict(kept)
    of_teacher, of_student, agreed, scaled = probe.accuracy(teacher).top1, None, None, None
    if isinstance(state, StageOneState):
        network = student_network(state, kept.classifier)
        student = probe.predict(Kept(network))
        of_student = probe.accuracy(student).top1
        agreed = None if of_teacher is None else agreement(teacher, student)
        if images is not None and pseudo is not None:
            network = at_length(probe, network, pseudo.length, images[: len(pseudo.labels)])
            scaled = probe.accuracy(probe.predict(Kept(network))).top1
    row = {
        "task": task,
        "teacher_accuracy": of_teacher,
        "student_accuracy": of_student,
        "gap": None if of_teacher is None or of_student is None else of_teacher - of_student,
        "agreement": agreed,
        "student_accuracy_at_length": scaled,
        "label_entropy": remembered.get("label_entropy"),
        "label_shares": list(remembered.get("label_shares", ())),
    }
    if images is not None:
        _draw(task, kept.classifier, images, pseudo, row, probe)
    return row


def agreement(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The share of the test images to which two classifiers' predictions give the same class."""
    return float(np.mean(np.concatenate(one) == np.concatenate(other)))


def student_network(state: StageOneState, classifier: Network) -> Network:
    """S_n's features under T_n's head: the classifier that Table I measures."""
    student = state.student.network
    return Network(
        {"features": student.params, "head": classifier.params["head"]},
        {"features": student.batch_stats},
    )


def at_length(probe: "Probe", student: Network, length: float, images: np.ndarray) -> Network:
    """The student with its features times one number, by which they are as long as T_n's.

    On average, on pseudo images. Eq. 1 compares directions, so the length of S_n's features is
    free, and the shorter they are, the more the head's bias counts.

    Args:
      probe: of the run.
      student: S_n's features under T_n's head.
      length: the mean length of T_n's features of the images.
      images: pseudo images, normalised float32 [n, S, S, C].

    Returns:
      The student whose head has its weights times that number; a head of cosines stays as it is.
    """
    if is_cosine(student.params):
        return student
    own = look(probe.experiment, student, images, probe.between).length
    if not own > 0:
        return student
    weights = student.params["head"]
    scaled = {**weights, "kernel": weights["kernel"] * np.float32(length / own)}
    return dataclasses.replace(student, params={**student.params, "head": scaled})


def drawn_images(
    experiment: "Experiment", nets: Networks, delegator: Network, task: int, count: int
) -> np.ndarray:
    """What D_n, in eval mode, draws of the first ``count`` z: normalised float32 [n, S, S, C]."""
    config = experiment.config
    _, key = phase_keys(config.seed, task, PICTURES)
    key = parallel.replicate(experiment.mesh, key)
    size = min(count, config.run.eval_batch)
    drawn = [
        np.asarray(pseudo_images(nets, delegator, key, size, start))
        for start in range(0, count, size)
    ]
    return np.concatenate(drawn)[:count]


def watch(share: float, field: str, values: Mapping[str, np.ndarray]) -> Watched:
    """Looks whether the pseudo labels of some rounds fall into one class.

    Args:
      share: of the labels in one class that counts as a collapse.
      field: the config field that weighs how evenly they fall, below ``config.method``.
      values: with ``label_entropy`` [n] and ``label_shares`` [n, K].

    Returns:
      ``largest_share`` to log; the mean entropy of w, in nats, and the mean histogram to remember,
      unless all rounds were skipped; and what to say of a collapse.
    """
    entropy, shares = (
        float(mean_of_finite(values["label_entropy"])),
        mean_of_finite(values["label_shares"]),
    )
    found = {"label_entropy": entropy, "label_shares": shares.tolist()}
    logged = {"largest_share": float(np.max(shares))}
    if len(shares) < 2 or not np.max(shares) >= share:  # NaN is none
        return Watched(logged, found if math.isfinite(entropy) else {})
    histogram = ", ".join(f"{share:.2f}" for share in shares)
    return Watched(
        logged,
        found,
        "the delegator has collapsed",
        f"{np.max(shares):.0%} of the pseudo labels are class {np.argmax(shares)} of "
        f"{len(shares)}, entropy of w {entropy:.3f} (at most {np.log(len(shares)):.3f}), "
        f"histogram {histogram}",
        f"weigh config.method.{field} more or lower the rates",
    )


def remarks(
    class_names: Sequence[Sequence[str]], reports: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Says which classes a delegator leaves out, and what to do about it.

    Args:
      class_names: of every task.
      reports: as the summary has them.
    """
    names, found = [name for task in class_names for name in task], []
    for report in reports.get("delegator", ()):
        shares = report.get("label_shares") or ()
        pairs = zip(names, shares, strict=False)
        if rare := [name for name, share in pairs if share < RARE / len(shares)]:
            found.append(f"D_{report['task']}: {listed(rare, 10)}")
    if not found:
        return []
    return [
        f"the delegator never, or hardly ever, draws some classes ({'; '.join(found)}), which "
        "will be forgotten: train it longer (config.method.stage_one.epochs and finetune_epochs), "
        "or weigh config.method.stage_one.terms.diversity more"
    ]


def _draw(
    task: int,
    classifier: Network,
    images: np.ndarray,
    pseudo: "Seen | None",
    row: dict[str, Any],
    probe: "Probe",
) -> None:
    experiment, workdir = probe.experiment, probe.workdir
    run, data = experiment.config.run, experiment.config.data
    if run.pseudo_images and parallel.is_first_process():
        path = workdir / f"pseudo_images_{task}.png"
        with drawing(path):
            plots.image_grid(images[: run.pseudo_images], path, data.mean, data.std)
    if pseudo is None:
        return
    real = None
    if row["teacher_accuracy"] is not None:
        images_of_tests = real_images(experiment, probe.tasks, run.quality_images)
        real = look(experiment, classifier, images_of_tests, probe.between)
    found = report(classifier, pseudo, real)
    if parallel.is_first_process():
        names = [n for names in experiment.data()["classes"][: probe.tasks] for n in names]
        of = ("teacher_accuracy", "student_accuracy", "student_accuracy_at_length", "agreement")
        write_json(
            workdir / f"delegator_{task}.json",
            {**{name: row[name] for name in of}, "classes": names, **found},
        )
        path = workdir / f"pseudo_images_by_class_{task}.png"
        with drawing(path):
            some = images[: len(pseudo.labels)]
            plots.class_grid(some, pseudo.labels, names, path, data.mean, data.std)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a teacher T makes of n images; K classes, F features.

    Attributes:
      features: [n, F], scaled to length 1.
      scores: softmax scores, [n, K].
      moments: (mean, biased variance) of the images at each of T's BN layers, [C_l] each, by name.
      length: the mean length that the features had.
    """

    features: np.ndarray
    scores: np.ndarray
    moments: dict[str, Pair]
    length: float

    @property
    def labels(self) -> np.ndarray:
        """Eq. 5's labels, int [n]."""
        return self.scores.argmax(axis=1)


@compiled(static_argnames="nets")
def _look(
    nets: steps.Networks, teacher: Network, images: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    (features, logits), seen = nets.classifier(teacher.params).apply(
        teacher.variables(), images, False, mutable=[MOMENTS]
    )
    return features, jax.nn.softmax(logits), seen[MOMENTS]


def look(
    experiment: "Experiment",
    teacher: Network,
    images: np.ndarray,
    between: Callable[[], None] = lambda: None,
) -> Seen:
    """What the teacher makes of images, normalised float32 [n, S, S, C].

    ``between`` is called after each batch and may raise to stop.
    """
    nets = steps.networks(experiment.config.model)
    features, scores, moments, sizes = [], [], [], []
    for start, stop in _chunks(len(images), experiment.config.run.eval_batch):
        batch = parallel.replicate(experiment.mesh, images[start:stop])
        found = jax.device_get(_look(nets, teacher, batch))
        features.append(found[0])
        scores.append(found[1])
        moments.append(moments_by_layer(found[2]))
        sizes.append(stop - start)
        between()
    joined = {name: _joined([m[name] for m in moments], sizes) for name in moments[0]}
    every = np.concatenate(features).astype(np.float64)
    length = np.linalg.norm(every, axis=1, keepdims=True)
    unit = every / np.where(length > 0, length, 1.0)
    return Seen(unit, np.concatenate(scores), joined, float(length.mean()))


def real_images(experiment: "Experiment", tasks: int, count: int) -> np.ndarray:
    """About ``count`` test images of the first tasks' classes, evenly drawn, as T takes them."""
    sizes = [len(experiment.test.task(task)[1]) for task in range(tasks)]
    rows = np.linspace(0, sum(sizes) - 1, min(count, sum(sizes))).astype(int)
    ends = np.cumsum(sizes)
    chosen = np.concatenate(
        [
            experiment.test.task(task)[0][rows[(end - size <= rows) & (rows < end)] - (end - size)]
            for task, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
    )
    data = experiment.config.data
    prepared = [
        np.asarray(prepare(data, jnp.asarray(chosen[start:stop])))
        for start, stop in _chunks(len(chosen), experiment.config.run.eval_batch)
    ]
    return np.concatenate(prepared)


def report(teacher: Network, pseudo: Seen, real: Seen | None) -> dict[str, Any]:
    """A delegator's quality, as JSON can hold it; what needs real images is null without any.

    Keys:
      images: numbers of ``pseudo`` and ``real`` images.
      label_shares: the share of the pseudo images that T gives each class [K].
      label_entropy: of Eq. 6's w of them all, in nats (log K if evenly spread).
      confidence: mean of T's largest score, of pseudo and of real images.
      layers: for each BN layer of T, the distance of the pseudo images' moments from the running
        ones, as Eq. 7 takes it (``mean``, ``variance``), and KL(N(mu, sigma) || N(mu^, sigma^)),
        mean over channels (``kl``); and the same of real images.
      compared: how many images of each kind ``nearest`` is of, as many of one as of the other.
      nearest: mean cosine distance in T's feature space to the nearest other image:
        ``pseudo`` (diversity), ``real`` (what real diversity is), ``pseudo_to_real`` (fidelity) and
        ``real_to_pseudo`` (coverage).
    """
    w = pseudo.scores.mean(axis=0, dtype=np.float64)
    running = moments_by_layer(jax.device_get(teacher.batch_stats))
    of_real = len(real.labels) if real else 0
    count = min(len(pseudo.labels), of_real)  # a nearest one is nearer among more
    drawn = pseudo.features[: count if real else len(pseudo.labels)]
    taken = real and real.features[np.linspace(0, of_real - 1, count).astype(int)]
    return _plain(
        {
            "images": {"pseudo": len(pseudo.labels), "real": of_real},
            "label_shares": np.bincount(pseudo.labels, minlength=len(w)) / len(pseudo.labels),
            "label_entropy": -np.sum(w * np.log(np.where(w > 0, w, 1.0))),
            "confidence": {
                "pseudo": pseudo.scores.max(axis=1).mean(),
                "real": real and real.scores.max(axis=1).mean(),
            },
            "layers": [
                {
                    "name": name,
                    "pseudo": _divergence(pseudo.moments[name], running[name]),
                    "real": real and _divergence(real.moments[name], running[name]),
                }
                for name in running
            ],
            "compared": count,
            "nearest": {
                "pseudo": _nearest(drawn),
                "real": None if taken is None else _nearest(taken),
                "pseudo_to_real": None if taken is None else _nearest(drawn, taken),
                "real_to_pseudo": None if taken is None else _nearest(taken, drawn),
            },
        }
    )


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _joined(moments: list[Pair], sizes: list[int]) -> Pair:
    """The moments of several batches taken together."""
    share = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    means = np.asarray([mean for mean, _ in moments], np.float64)
    variances = np.asarray([variance for _, variance in moments], np.float64)
    mean = np.sum(share * means, axis=0)
    return mean, np.sum(share * (variances + (means - mean) ** 2), axis=0)


def _divergence(moments: Pair, running: Pair) -> dict[str, Any]:
    mean, variance = (np.asarray(m, np.float64) for m in moments)
    mean_t, variance_t = (np.asarray(m, np.float64) for m in running)
    a, b = variance + 1e-5, variance_t + 1e-5  # BN's epsilon: a dead channel has no variance
    kl = 0.5 * (np.log(b / a) + (a + (mean - mean_t) ** 2) / b - 1.0)
    return {
        "mean": np.linalg.norm(mean - mean_t),
        "variance": np.linalg.norm(variance - variance_t),
        "kl": np.mean(kl),
    }


def _nearest(features: np.ndarray, others: np.ndarray | None = None) -> Any:
    """Mean over rows of the cosine distance to the nearest of ``others``, or of the other rows."""
    if others is None:
        if len(features) < 2:
            return None
        cosine = features @ features.T
        np.fill_diagonal(cosine, -np.inf)
    else:
        cosine = features @ others.T
    return np.mean(1.0 - cosine.max(axis=1))


def _plain(value: Any) -> Any:
    """As plain JSON types; what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value

"""Methods with exemplars: hand-checked numbers, whole runs, and where old images come from."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import TINY, at_row, bits, rows, silent

from configs import cifar100, digits
from skd_jax import experiment, losses, steps, train
from skd_jax.config import Config
from skd_jax.data import TrainingStream, class_schedule, open_source, prepare
from skd_jax.errors import UserError
from skd_jax.experiment import planned
from skd_jax.methods import (
    METHODS,
    bic,
    eeil,
    exemplars,
    from_config_dict,
    lucir,
    mnemonics,
    tpcil,
)
from skd_jax.methods.class_means import nearness
from skd_jax.methods.collecting import features as features_by
from skd_jax.methods.distillation import binary_loss, binary_targets
from skd_jax.methods.phase import Setting, setting_of
from skd_jax.models import head_logits
from skd_jax.state import Batch, Kept, Network

NAMES = ("icarl", "eeil", "bic", "lucir", "tpcil", "mnemonics")
# Those not verified against a paper run in the slow tests.
SLOW = ("tpcil", "mnemonics")
QUICK = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES]
COSINE = ("lucir", "tpcil", "mnemonics")
TASKS = {"bic": 2}  # of others 1: a second takes programs of its own
EACH = 6  # exemplars a class


def tiny(method: str, **changes) -> Config:
    config = digits.get_config(f"tasks={TASKS.get(method, 1)},method={method}")
    shared = {name: x for name, x in TINY.items() if not name.startswith("method.")}
    shared |= {"method.epochs": 1, "method.batch": 32, "method.drop_epochs": ()}
    shared |= {"method.exemplars": EACH}
    if method == "eeil":
        shared |= {"method.balance_epochs": 2, "method.balance_drop_epochs": (1,)}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**shared, **changes})
    return from_config_dict(config)


# Hand-checked numbers


def order(points, number: int) -> list[int]:
    found = exemplars.herding(jnp.array(points), jnp.ones(len(points), bool), number)
    return np.asarray(found).tolist()


def circle(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def test_herding_takes_what_keeps_the_mean_closest():
    assert order([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [1.0, 1.0]], 4) == [3, 0, 1, 2]
    assert order(circle(0, 30, 60, 120), 4) == [2, 1, 3, 0]


def test_herding_never_reorders_nor_takes_another_class():
    points = jax.random.normal(jax.random.key(0), (60, 5))
    mine = jnp.arange(60) % 3 == 1
    whole = exemplars.herding(points, mine, 20)
    assert sorted(np.asarray(whole).tolist()) == np.flatnonzero(mine).tolist()
    for number in (1, 7):
        np.testing.assert_array_equal(exemplars.herding(points, mine, number), whole[:number])
    alone = exemplars.herding(points[mine], jnp.ones(20, bool), 20)
    np.testing.assert_array_equal(np.flatnonzero(mine)[np.asarray(alone)], whole)


def test_the_mean_of_exemplars_is_at_length_one():
    features, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), jnp.array([0, 0, 1])
    means = exemplars.means_of_units(features, labels, 2)
    np.testing.assert_allclose(means, [[0.707107, 0.707107], [1.0, 0.0]], rtol=1e-5)
    query = jnp.array(circle(23, 22))
    distances = jnp.sum((query[:, None] - means[None]) ** 2, axis=-1)
    np.testing.assert_allclose(distances[0], [0.14563, 0.15899], atol=1e-5)
    near = jax.jit(lambda q: nearness(q, means, "cosine").argmax(axis=-1))(query)
    np.testing.assert_array_equal(near, distances.argmin(axis=-1))
    np.testing.assert_array_equal(near, [0, 1])  # the border is at 22.5 degrees


def test_an_exemplars_old_target_is_the_teachers_whatever_its_label():
    @jax.jit
    def loss(label, new):
        targets = binary_targets(jnp.array([[math.log(3.0)]]), label, 2)
        return binary_loss(jnp.array([[0.0, new]]), targets)

    def softplus(x):
        return math.log1p(math.exp(x))

    for label in (0, 1):
        new = loss(jnp.array([label]), 2.0) - softplus(-2.0 if label else 2.0)
        assert new == pytest.approx(0.693147, abs=1e-5)


def test_eeil_distils_head_by_head():
    teacher, student = jnp.array([[2.0, 0.0, 1.0, 1.0]]), jnp.array([[0.0, 2.0, 3.0, 1.0]])
    distillation = jax.jit(eeil.distillation, static_argnames=("heads", "temperature"))
    parts = [
        distillation(t, s, (2,))
        for t, s in zip(
            (teacher[:, :2], teacher[:, 2:]), (student[:, :2], student[:, 2:]), strict=True
        )
    ]
    np.testing.assert_allclose(parts, [1.044320, 0.813262], rtol=1e-5)
    assert distillation(teacher, student, (2, 2)) == pytest.approx(1.857582, rel=1e-5)
    assert distillation(teacher, student, (4,)) == pytest.approx(1.674794, rel=1e-5)
    assert distillation(teacher, student, (1, 1)) == 0
    softened = jax.nn.softmax(teacher.reshape(2, 2) / 2)
    entropy = -jnp.sum(softened * jnp.log(softened))
    assert distillation(teacher, teacher, (2, 2)) == pytest.approx(float(entropy), rel=1e-5)


def test_eeils_noise_falls_with_the_epoch():
    found = eeil.noise_deviation(0.3, np.array([0, 1, 9]))
    np.testing.assert_allclose(found, [0.5477, 0.4527, 0.2908], atol=1e-4)
    assert not eeil.noise_deviation(0.0, np.arange(3)).any()


def test_eeils_balanced_epochs_are_a_share_of_stage_ones():
    for argument, epochs, drops in (("", 30, (10, 20)), (",scale=mini", 3, (1, 2))):
        found = cifar100.get_config(f"method=eeil{argument}").method
        assert (found.balance_epochs, tuple(found.balance_drop_epochs)) == (epochs, drops)


def corrected(alpha: float, beta: float, first: int, z) -> jax.Array:
    found = bic.Correction(jnp.float32(alpha), jnp.float32(beta), jnp.int32(first))
    return jax.jit(lambda c, z: c(z))(found, jnp.asarray(z))


def test_bic_corrects_new_outputs_alone():
    z = jnp.array([[2.0, 1.0, 3.0]])
    found = corrected(0.5, -0.2, 2, z)
    np.testing.assert_allclose(found, [[2.0, 1.0, 1.3]], rtol=1e-6)
    assert (int(z.argmax()), int(found.argmax())) == (2, 0)
    np.testing.assert_array_equal(corrected(1.0, 0.0, 2, z), z)


def test_bic_finds_the_two_numbers():
    outputs = jnp.stack([jnp.zeros(8), jnp.array([1.0] * 4 + [3.0] * 4)], axis=1)
    labels = jnp.array([1, 0, 0, 0, 1, 1, 1, 0])
    count, first = jnp.arange(8) < 8, jnp.int32(1)
    found = bic.fit(outputs, labels, count, first, 50, 0.0)
    assert found.alpha == pytest.approx(math.log(3), abs=1e-4)
    assert found.beta == pytest.approx(-2 * math.log(3), abs=1e-4)
    assert correction_loss(found, outputs, labels) == pytest.approx(0.562335, abs=1e-6)
    held = bic.fit(outputs, labels, count, first, 50, 0.1)
    assert -2 * math.log(3) < held.beta < 0
    outputs = jnp.concatenate([outputs, 100 * outputs])  # of which the second half does not count
    again = bic.fit(outputs, jnp.tile(labels, 2), jnp.arange(16) < 8, first, 50, 0.0)
    np.testing.assert_allclose(again.alpha, found.alpha, rtol=1e-4)
    none = bic.fit(outputs, jnp.tile(labels, 2), jnp.zeros(16, bool), first, 50, 0.0)
    assert (none.alpha, none.beta) == (1, 0)


def correction_loss(found: bic.Correction, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    one_hot = jax.nn.one_hot(labels, outputs.shape[1])
    return losses.classification_loss(found(outputs), one_hot)


def test_bics_beta_alone_and_its_loss():
    outputs = jnp.stack([jnp.zeros(8), jnp.array([1.0] * 4 + [3.0] * 4)], axis=1)
    labels = jnp.array([1, 0, 0, 0, 1, 1, 1, 0])

    def loss(beta):
        found = bic.Correction(jnp.float32(1.0), beta, jnp.int32(1))
        return correction_loss(found, outputs, labels)

    assert jax.grad(loss)(jnp.float32(-2.0)) == pytest.approx(0, abs=1e-6)
    assert loss(jnp.float32(-2.0)) == pytest.approx(0.563262, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_bic_finds_them_however_large_the_outputs_are(scale):
    random, labels = np.random.default_rng(0), np.arange(120) % 12
    outputs = random.normal(size=(120, 12)) * 1.5 + 3 * np.eye(12)[labels]
    outputs[:, 10:] += 3
    outputs, labels, first = jnp.float32(scale * outputs), jnp.array(labels), jnp.int32(10)
    found = bic.fit(outputs, labels, labels >= 0, first, 50, 0.0)
    least = correction_loss(found, outputs, labels)
    before = correction_loss(bic.Correction(jnp.float32(1), jnp.float32(0), first), outputs, labels)
    assert found.alpha > 0 and least < 0.7 * before
    for alpha, beta in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):  # all round it
        other = bic.Correction(alpha * found.alpha, found.beta + scale * beta, first)
        assert correction_loss(other, outputs, labels) > least


def test_bic_takes_one_softmax(monkeypatch):
    """A softmax of a softmax cannot go below 3.6222 with 100 classes."""
    outputs, labels = 8 * jnp.eye(100), jnp.arange(100)
    twice = losses.classification_loss(jax.nn.softmax(1e3 * outputs), jnp.eye(100))
    assert twice == pytest.approx(3.6222, abs=1e-4)
    found = bic.fit(outputs, labels, labels >= 0, jnp.int32(50), 50, 0.1)
    before = bic.Correction(jnp.float32(1.0), jnp.float32(0.0), jnp.int32(50))
    expected = math.log(1 + 99 * math.exp(-8))
    assert correction_loss(before, outputs, labels) == pytest.approx(expected, rel=1e-4)
    assert correction_loss(found, outputs, labels) < 0.9 * expected
    # The answer is q itself, not its softmax. Images are outputs here.
    monkeypatch.setattr(bic, "logits", lambda static, nets, kept, images: images)
    nets, kept = steps.networks(tiny("bic").model), bic.KeptCorrection(None, correction=found)
    q = bic.scores(None, nets, kept, outputs)
    assert q[99, 99] == pytest.approx(float(8 * found.alpha + found.beta), rel=1e-5)
    assert q[0, 0] == 8


def test_bic_holds_as_many_images_of_each_class_out():
    counts = (10, 7, 12)
    left, out = bic.split(counts, 2, seed=1, task=1)
    assert sorted([*left, *out]) == list(range(29))
    owner = np.repeat(np.arange(3), counts)
    np.testing.assert_array_equal(np.bincount(owner[out]), [2, 2, 2])
    again, other = bic.split(counts, 2, 1, 1)[1], bic.split(counts, 2, 1, 2)[1]
    assert out.tolist() == again.tolist() != other.tolist()


def test_bic_never_holds_all_of_a_class_out():
    left, out = bic.split((3, 1), 2, seed=1, task=1)
    assert (len(left), 3 in left) == (2, True) and len(out) == 2
    config = tiny("bic", method__exemplars=2, method__held_out=0.9)
    setting = Setting(config, steps.networks(config.model), (2, 2), (100, 100))
    assert bic.held_out(setting, 1) == 1


@pytest.mark.parametrize(("bad", "name"), [(None, "icarl"), (1, "icarl"), (1, "tpcil")])
def test_rows_stay_in_place_where_a_batch_is_left_out(bad, name):
    """The exemplars are those that would be chosen of the other images."""
    config = tiny(name, method__exemplars=3, base__batch=8)
    setting = setting_of(config, (2, 2), (24, 24))
    phase = next(p for p in planned(setting) if p.name == "select")
    features, labels = jax.random.normal(jax.random.key(3), (24, 16)), jnp.arange(24) // 12
    kept = METHODS[name].kept(Network({"head": {"kernel": jnp.ones((16, 2))}}, {}))
    state = phase.init(kept)
    for number in range(3):
        rows_ = slice(8 * number, 8 * number + 8)
        found = jnp.where(number == bad, jnp.nan, features[rows_])
        batch = Batch(found, labels[rows_], jnp.ones(8, bool))
        rate = phase.rates(np.array([number]))[0]
        new, metrics = phase.step(
            lambda nets, kept, x: x, setting.nets, state, kept, batch, None, rate
        )
        state, _ = steps.guard(new, state, metrics)
    taken = []
    end = phase.finish(state, kept, lambda indices: taken.append(np.asarray(indices)) or indices)
    met = (jnp.arange(24) // 8) != (-1 if bad is None else bad)
    expected = [
        exemplars.herding(losses.unit(features), met & (labels == label), 3) for label in (0, 1)
    ]
    np.testing.assert_array_equal(taken[0], np.concatenate(expected))
    np.testing.assert_array_equal(state.valid, met)
    if name == "icarl":
        rows_ = features[taken[0]]
        means = exemplars.means_of_units(rows_, end.exemplars.labels, 2)
        np.testing.assert_array_equal(end.means, means)


def test_bics_share_of_the_held_out_is_one_in_ten():
    config = tiny("bic", method__exemplars=20)
    setting = Setting(config, steps.networks(config.model), (50, 10), (25_000, 5000))
    assert bic.held_out(setting, 1) == 2
    train_, bias, _ = bic.phases(setting, 1)
    assert train_.count(5000) == 10 * 498 + 50 * 18
    assert bias.count(5000) == 60 * 2
    assert not set(train_.own or ()) & set(bias.own or ())


def ranking(cosines, labels, margin=0.5):
    found = jax.jit(lucir.ranking_loss, static_argnums=(2, 3, 4))
    return found(jnp.array(cosines), jnp.array(labels), 1, 2, margin)


def test_lucir_ranks_exemplars_alone():
    first, second = [0.6, 0.5, 0.2, -0.3], [0.9, 0.1, 0.6, 0.3]
    assert ranking([first], [0]) == pytest.approx(0.5, abs=1e-6)
    assert ranking([first, second], [0, 0]) == pytest.approx(0.35, abs=1e-6)
    assert ranking([first, second, first], [0, 0, 1]) == pytest.approx(0.35, abs=1e-6)
    assert ranking([first, second], [1, 2]) == 0
    gradient = jax.grad(lambda c: lucir.ranking_loss(c, jnp.array([1]), 1, 2, 0.5))
    np.testing.assert_array_equal(gradient(jnp.array([first])), 0)


def test_lucirs_weight_and_its_features_term():
    shares = [(50, 10), (60, 10), (90, 10), (50, 5), (95, 5), (50, 2)]
    settings = tiny("lucir").method
    found = [lucir.forget_weight(settings, *share) for share in shares]
    np.testing.assert_allclose(found, [11.1803, 12.2474, 15, 15.8114, 21.7945, 25], rtol=1e-5)
    less = jax.jit(losses.feature_cosine_discrepancy)(
        jnp.array([[4.0, 3.0]]), jnp.array([[3.0, 4.0]])
    )
    assert less == pytest.approx(0.04, abs=1e-6)
    assert found[0] * less == pytest.approx(0.447214, rel=1e-5)


def test_lucir_imprints_the_mean_direction():
    features, labels = jnp.array([[2.0, 0.0], [0.0, 5.0]]), jnp.array([2, 2])
    kernel = jnp.array([[3.0, 4.0], [0.0, 1.0]]).T
    found = jax.jit(lucir.imprinted, static_argnums=3)(features, labels, kernel, 1)
    np.testing.assert_allclose(found, [[2.12132], [2.12132]], rtol=1e-5)


def topology(old, new) -> jax.Array:
    return jax.jit(tpcil.topology_loss)(jnp.array(old), jnp.array(new))


def test_tpcil_keeps_similarities_but_for_an_affine_change():
    s = [0.9, 0.5, 0.1]
    assert topology(s, [0.8, 0.6, 0.1]) == pytest.approx(-0.970725, abs=1e-6)
    assert topology(s, [0.5 * x - 0.2 for x in s]) == pytest.approx(-1, abs=1e-6)
    for undefined in ([0.5, 0.5, 0.5], [0.7]):
        one = s[: len(undefined)]
        assert topology(one, undefined) == topology(undefined, one) == 0
        gradient = jax.grad(tpcil.topology_loss, argnums=1)(jnp.array(one), jnp.array(undefined))
        np.testing.assert_array_equal(gradient, 0)


def test_an_edge_joins_the_two_vertices_nearest_to_a_feature():
    vertices, found = jnp.array(circle(0, 40, 90, 200)), jnp.array(circle(5, 10, 60, 62, 80))
    ends = jax.jit(tpcil.hebbian)(vertices, found)
    # 200 degrees wins no feature, and 90 degrees is the nearest to it; 40 wins 60 and 62.
    np.testing.assert_array_equal(ends, [1, 2, 1, 2])


def test_mnemonics_loss_moves_the_means():
    queries, labels = jnp.array([[0.6, 0.8]]), jnp.array([0])
    found, of = jnp.eye(2), jnp.arange(2)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda f: mnemonics.outer_loss(queries, labels, f, of, 2))
    )(found)
    assert loss == pytest.approx(0.798139, abs=1e-6)
    np.testing.assert_allclose(gradient, [[0.0, -0.439867], [0.329900, 0.0]], atol=1e-6)


def test_as_many_exemplars_as_there_are_and_every_class_alike():
    config = tiny("eeil", method__exemplars=20)
    nets = steps.networks(config.model)
    setting = Setting(config, nets, (2, 2), (105, 200), ((100, 5), (100, 100)))
    assert exemplars.numbers(setting, 0) == (20, 5)
    setting = Setting(config, nets, (2, 2), (200, 200), ((100, 100), (100, 100)))
    _, _, balance, _ = eeil.phases(setting, 1)
    assert balance.own == () and balance.count(200) == 4 * 20


def test_the_head_is_asked_for():
    with pytest.raises(UserError, match=r"config\.model\.head: lucir needs cosine"):
        tiny("lucir", model__head="linear")

    with pytest.raises(UserError, match=r"config\.method\.exemplars: 0 is below 1"):
        tiny("icarl", method__exemplars=0)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("bic", "held_out", 0.0),
        ("bic", "held_out", 1.0),
        ("bic", "exemplars", 1),
        ("tpcil", "exemplars", 1),
    ],
)
def test_a_setting_that_cannot_be_is_named(name, field, value):
    with pytest.raises(UserError, match=rf"config\.method\.{field}: {value} is"):
        tiny(name, **{f"method__{field}": value})


def test_a_graph_of_one_vertex_is_refused_before_training():
    config = tiny("tpcil")
    setting = Setting(config, steps.networks(config.model), (1, 2), (1, 100), ((1,), (50, 50)))
    with pytest.raises(UserError, match="the base has one image"):
        planned(setting)


# Whole runs


class Forbidding:
    """A source that raises where an image of some classes is read to train on."""

    def __init__(self, source, classes):
        self.source, self.class_names = source, source.class_names
        self.forbidden = np.isin(source.labels("train"), classes)

    def labels(self, split):
        return self.source.labels(split)

    def read(self, split, indices):
        if split == "train" and self.forbidden[np.asarray(indices)].any():
            raise AssertionError("an old image was read")
        return self.source.read(split, indices)

    def forget(self, indices):
        self.source.forget(indices)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By a method's name the workdir of its run; made when it is first asked for.

    It began, after the base and its exemplars, where none of the base's images could be read.
    """
    folder = tmp_path_factory.mktemp("exemplars")

    def forbidding(data):
        source = open_source(data)
        return Forbidding(source, class_schedule(data, source.class_names)[0])

    def run(name: str) -> Path:
        if not (folder / name).exists():
            first, one = ("cosine", "lucir") if name in COSINE else ("linear", "icarl")
            if not (folder / first).exists():
                train.train(tiny(one, run__phases=1), folder / first, silent)
            whole = 3 if name == "mnemonics" else 2  # phases that read the base's images
            start, base = str(folder / first), folder / f"{name}_base"
            train.train(tiny(name, run__phases=whole, run__start_from=start), base, silent)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(experiment, "open_source", forbidding)
                train.train(tiny(name, run__start_from=str(base)), folder / name, silent)
        return folder / name

    return run


def base_of(run: Path) -> Path:
    """Where a run began."""
    return run.with_name(f"{run.name}_base")


@pytest.mark.parametrize("name", QUICK)
def test_a_run_reads_no_old_image_and_says_what_it_keeps(made, name):
    found = json.loads((made(name) / "summary.json").read_text())
    shown = [sum(x is not None for x in row) for row in found["accuracy_matrix"]]
    assert shown == list(range(1, TASKS.get(name, 1) + 2))
    _, kept = train.restore(made(name))
    images = np.asarray(kept.exemplars.images)
    assert images.dtype == np.uint8 and images.shape == (10 * EACH, 8, 8, 1)
    np.testing.assert_array_equal(kept.exemplars.labels, np.repeat(np.arange(10), EACH))
    more = {
        "icarl": 4 * 10 * 16,  # means
        "bic": 3 * 4,  # alpha, beta and where they begin
        "tpcil": 4 * 10 * EACH * (16 + 1),  # vertices, and an edge each
    }
    assert found["kept_bytes"] == 10 * EACH * (8 * 8 + 4) + more.get(name, 0)


@pytest.mark.parametrize("name", QUICK)
def test_exemplars_are_training_images_of_their_class_and_stay(made, name):
    config, kept = train.restore(made(name))
    _, base = train.restore(base_of(made(name)))
    images = np.asarray(kept.exemplars.images)
    assert bits(kept.exemplars.first(4 * EACH)) == bits(base.exemplars)
    source = open_source(config.data)
    schedule = class_schedule(config.data, source.class_names)
    stream, last = TrainingStream(source, schedule, in_memory=False), 0
    for task, classes in enumerate(schedule):
        opened, first, last = stream.open(task), last, last + len(classes)
        everything = np.asarray(opened.take(np.arange(opened.n)))
        for label in range(first, last):
            known = {image.tobytes() for image in everything[opened.labels == label]}
            mine = {image.tobytes() for image in images[label * EACH : (label + 1) * EACH]}
            assert len(mine) == EACH and mine <= known


def test_icarls_means_are_of_the_exemplars_by_the_last_network(made):
    config, kept = train.restore(made("icarl"))
    nets = steps.networks(config.model)
    images = prepare(config.data, kept.exemplars.images)
    found = features_by(nets, Kept(kept.classifier), images)
    expected = exemplars.means_of_units(found, kept.exemplars.labels, 10)
    np.testing.assert_allclose(kept.means, expected, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_an_interrupted_run_ends_with_the_same_bits(made, name, tmp_path):
    config = tiny(name, run__start_from=str(base_of(made(name))))
    last = [row["global_step"] for row in rows(made(name)) if row["phase"] == "learn"][-2]
    with at_row(last):
        train.train(config, tmp_path / "run", silent)
    if name == "eeil":
        later = [r["global_step"] for r in rows(made(name)) if r["phase"] == "balance"]
        with at_row(later[-1]):
            train.train(config, tmp_path / "run", silent)
    train.train(config, tmp_path / "run", silent)
    assert rows(tmp_path / "run", ("time",)) == rows(made(name), ("time",))
    assert bits(train.restore(tmp_path / "run")[1]) == bits(train.restore(made(name))[1])


def test_streamed_images_and_exemplars_are_those_in_memory(made, tmp_path):
    train.train(tiny("icarl", data__in_memory=False), tmp_path / "run", silent)
    streamed, resident = (train.restore(path)[1] for path in (tmp_path / "run", made("icarl")))
    assert bits(streamed) == bits(resident)


def test_an_epoch_is_of_all_images_and_exemplars(made):
    config = tiny("icarl")
    opened = train.open_experiment(config)
    _, kept = train.restore(base_of(made("icarl")))
    phase = opened.phases[2]
    with opened.opened(phase, kept) as images:
        count = opened.setting.images[1] + 4 * EACH
        assert images is not None and images.n == phase.count(opened.setting.images[1]) == count
        assert phase.steps == count // 32
        np.testing.assert_array_equal(np.bincount(images.labels)[:4], [EACH] * 4)
        found, labels = images.fetch(np.arange(count, dtype=np.int32)[None])
        last = np.asarray(found)[0, -4 * EACH :]
        np.testing.assert_array_equal(last, kept.exemplars.images)
        np.testing.assert_array_equal(np.asarray(labels)[0, -4 * EACH :], kept.exemplars.labels)


def test_lucirs_old_weights_stay_to_the_bit(made):
    _, base = train.restore(base_of(made("lucir")))
    _, end = train.restore(made("lucir"))
    old, new = (x.classifier.params["head"] for x in (base, end))
    assert bits(new["kernel"][:, :4]) == bits(old["kernel"])
    assert bits(new["sigma"]) != bits(old["sigma"])
    assert end.imprint is None
    features = jax.random.normal(jax.random.key(1), (3, 16))
    np.testing.assert_allclose(
        head_logits(end.classifier.params, 3 * features, "highest"),
        head_logits(end.classifier.params, features, "highest"),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
def test_tpcils_vertices_follow_the_network_and_edges_stay(made):
    _, base = train.restore(base_of(made("tpcil")))
    config, end = train.restore(made("tpcil"))
    old = 4 * EACH
    np.testing.assert_array_equal(end.ends[:old], base.ends)
    assert bits(end.vertices[:old]) != bits(base.vertices)
    images = prepare(config.data, end.exemplars.images)
    found = features_by(steps.networks(config.model), Kept(end.classifier), images)
    np.testing.assert_allclose(end.vertices, losses.unit(found), atol=1e-5)


def pixel_phase(made, rate: float):
    """(phase, what is kept before it, the step's loss and new state by a batch)."""
    config = tiny("mnemonics", method__pixel_lr=rate, method__weight_decay=0.0)
    opened = train.open_experiment(config)
    phase, kept = opened.phases[2], train.restore(base_of(made("lucir")))[1]
    images = jax.random.randint(jax.random.key(2), (32, 8, 8, 1), 0, 256).astype(jnp.uint8)
    batch = Batch(prepare(config.data, images), jnp.arange(32) % 4, jnp.ones(32, bool))
    step = jax.jit(
        lambda s: phase.step(phase.static, opened.setting.nets, s, kept, batch, None, rate)
    )
    return phase, kept, step


def test_a_pixel_step_lowers_its_loss_and_stays_in_range(made):
    phase, kept, step = pixel_phase(made, 1.0)
    state, before = step(phase.init(kept))
    assert step(state)[1]["outer"] < before["outer"]
    phase, kept, step = pixel_phase(made, 1e4)
    state, _ = step(phase.init(kept))
    assert 0 == state.images.min() < state.images.max() == 1
    left = phase.finish(state, kept, None).exemplars.images
    assert left.dtype == jnp.uint8 and {0, 255} <= set(np.unique(left).tolist())


def test_mnemonics_at_rate_0_leaves_lucirs_exemplars(made):
    phase, kept, step = pixel_phase(made, 0.0)
    state, _ = step(phase.init(kept))
    assert bits(phase.finish(state, kept, None)) == bits(kept)


# Steps in NumPy: no run, but T_n of random weights


OLD, NEW = 4, 3
LABELS = np.arange(16) % (OLD + NEW)


def stepped(name: str, phase_name: str = "learn", **changes):
    """A phase's first step, by hand.

    Returns:
      The step's metrics, teacher's (features, logits), its own, phase, state and what is kept.
    """
    setting = setting_of(tiny(name, **changes), (OLD, NEW), (640, 640))
    base, *phases = planned(setting)
    phase = next(p for p in phases if p.task == 1 and p.name == phase_name)
    images = jax.random.randint(jax.random.key(2), (OLD * EACH, 8, 8, 1), 0, 256)
    held = exemplars.Exemplars(images.astype(jnp.uint8), jnp.repeat(jnp.arange(OLD), EACH))
    kept = METHODS[name].kept(base.init(None).network, exemplars=held)
    if name in COSINE:
        kept = dataclasses.replace(kept, imprint=jax.random.normal(jax.random.key(3), (16, NEW)))
    if name == "tpcil":
        vertices = losses.unit(jax.random.normal(jax.random.key(4), (OLD * EACH, 16)))
        kept = dataclasses.replace(kept, vertices=vertices, ends=jnp.arange(OLD * EACH) // 2)
    if phase_name == "balance":  # whose teacher is the network that has learned
        learn = next(p for p in phases if p.task == 1)
        kept = dataclasses.replace(kept, classifier=learn.init(kept).network)
    if name == "bic":
        found = bic.Correction(jnp.float32(0.5), jnp.float32(-1.0), jnp.int32(2))
        kept = dataclasses.replace(kept, correction=found)
    nets, state = setting.nets, phase.init(kept)
    images = jax.random.normal(jax.random.key(5), (16, 8, 8, 1))
    batch = Batch(images, jnp.array(LABELS), jnp.ones(16, bool))
    network, module = state.network, nets.classifier(state.network.params)
    teacher = steps.eval_mode(nets.classifier(kept.classifier.params), kept.classifier, images)
    student, *_ = steps.train_mode(module, network.params, network.batch_stats, images)
    rates = jax.tree.map(lambda x: jnp.asarray(x[0]), phase.rates(np.arange(1)))
    step = jax.jit(phase.step, static_argnums=(0, 1))
    key = jax.random.key(6)
    _, metrics = step(phase.static, nets, state, kept, batch, key, rates)
    teacher, student = (tuple(np.array(x, np.float64) for x in two) for two in (teacher, student))
    return (
        metrics,
        teacher,
        student,
        SimpleNamespace(phase=phase, state=state, kept=kept, setting=setting, key=key),
    )


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def cross_entropy(z: np.ndarray) -> float:
    return -np.mean(log_softmax(z)[np.arange(16), LABELS])


def kd(teacher: np.ndarray, student: np.ndarray) -> float:
    targets = np.exp(log_softmax(teacher / 2))
    return -np.mean(np.sum(targets * log_softmax(student / 2), axis=1))


def test_bics_step_has_the_loss_worked_out_in_numpy():
    """With the teacher's outputs corrected."""
    metrics, (_, teacher), (_, z), _ = stepped("bic")
    teacher[:, 2:] = 0.5 * teacher[:, 2:] - 1
    expected = 4 / 7 * kd(teacher, z[:, :OLD]) + 3 / 7 * cross_entropy(z)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["binary", "softmax"])
def test_icarls_step_has_the_loss_worked_out_in_numpy(loss):
    metrics, (_, teacher), (_, z), _ = stepped("icarl", method__loss=loss)
    if loss == "softmax":
        expected = cross_entropy(z) + kd(teacher, z[:, :OLD])
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
        return
    one_hot = np.eye(OLD + NEW)[LABELS]
    targets = np.concatenate([1 / (1 + np.exp(-teacher)), one_hot[:, OLD:]], axis=1)
    p = 1 / (1 + np.exp(-z))
    expected = -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p)) / 16
    assert metrics["binary"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", ["learn", "balance"])
def test_eeils_steps_have_the_loss_worked_out_in_numpy(stage):
    metrics, (_, teacher), (_, z), _ = stepped("eeil", stage)
    expected = cross_entropy(z) + kd(teacher[:, :OLD], z[:, :OLD])
    if stage == "balance":  # the new head is held as well
        expected += kd(teacher[:, OLD:], z[:, OLD:])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_lucirs_step_has_the_loss_worked_out_in_numpy():
    metrics, (f_old, _), (f, z), at = stepped("lucir")
    less = 5 * math.sqrt(OLD / NEW) * np.mean(1 - np.sum(unit(f) * unit(f_old), axis=1))
    cosines = unit(f) @ unit(np.asarray(at.state.network.params["head"]["kernel"]).T).T
    close = [
        sum(max(0, 0.5 - c[y] + new) for new in sorted(c[OLD:])[-2:])
        for c, y in zip(cosines, LABELS, strict=True)
        if y < OLD
    ]
    assert metrics["less_forget"] == pytest.approx(less, rel=1e-4)
    assert metrics["ranking"] == pytest.approx(np.mean(close), rel=1e-4)
    expected = cross_entropy(z) + less + np.mean(close)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_tpcils_step_has_the_loss_worked_out_in_numpy():
    metrics, _, (_, z), at = stepped("tpcil", method__weight=2.0)
    config, ends = at.setting.config, np.asarray(at.kept.ends)
    one = np.asarray(jax.random.randint(at.key, (config.method.edges,), 0, OLD * EACH))
    images = prepare(config.data, at.kept.exemplars.images)
    found = features_by(at.setting.nets, Kept(at.state.network), images)  # in eval mode
    before, after = (unit(np.asarray(x, np.float64)) for x in (at.kept.vertices, found))
    s, now = (np.sum(x[one] * x[ends[one]], axis=1) for x in (before, after))
    topology = -2 * np.corrcoef(s, now)[0, 1]
    assert metrics["topology"] == pytest.approx(topology, rel=1e-3, abs=1e-4)
    assert metrics["loss"] == pytest.approx(cross_entropy(z) + topology, rel=1e-3)

"""A delegator's quality, held to values worked out by hand or by other means."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from test_train import silent, tiny

from experiments import quality as page
from skd_jax import evaluate, plots, replica, steps, train
from skd_jax.experiment import open_experiment
from skd_jax.methods import skd
from skd_jax.methods.phase import PICTURES, phase_keys
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.quality import Seen
from skd_jax.methods.skd.steps import StageOneState, pseudo_images
from skd_jax.state import Trained


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """T_0 and D_0, measured on 60 pseudo images, 25 at a time."""
    workdir = tmp_path_factory.mktemp("quality") / "run"
    config = tiny(run__phases=2, run__quality_images=60, run__eval_batch=25)
    train.train(config, workdir, silent)
    restored, kept = train.restore(workdir)
    assert restored == config
    experiment = open_experiment(restored)
    return SimpleNamespace(workdir=workdir, config=config, experiment=experiment, kept=kept)


def test_moments_of_chunks_are_those_of_all_images(run):
    nets = skd.networks(run.config)
    images = quality.drawn_images(run.experiment, nets, run.kept.delegator, 0, 60)
    seen = quality.look(run.experiment, run.kept.classifier, images)
    classifier = nets.classifier(run.kept.classifier.params)
    (features, logits), found = classifier.apply(
        run.kept.classifier.variables(), images, False, mutable=["moments"]
    )
    assert seen.features == pytest.approx(
        np.asarray(features) / np.linalg.norm(features, axis=1, keepdims=True), abs=1e-5
    )
    assert seen.scores == pytest.approx(np.asarray(jax.nn.softmax(logits)), abs=1e-5)
    stem = found["moments"]["features"]["bn_stem"]
    mean, variance = seen.moments["features.bn_stem"]
    assert mean == pytest.approx(np.asarray(stem["mean"]), abs=1e-5)
    assert variance == pytest.approx(np.asarray(stem["var"]), rel=1e-4)


def test_pseudo_images_do_not_depend_on_the_chunk(run):
    nets = skd.networks(run.config)
    _, key = phase_keys(run.config.seed, 0, PICTURES)
    whole = pseudo_images(nets, run.kept.delegator, key, 60)
    chunked = quality.drawn_images(run.experiment, nets, run.kept.delegator, 0, 60)
    assert chunked == pytest.approx(np.asarray(whole), abs=1e-5)


def test_real_images_are_the_normalised_test_images(run):
    images, _ = run.experiment.test.task(0)
    found = quality.real_images(run.experiment, 1, len(images))
    data = run.config.data
    expected = (images / 255.0 - np.array(data.mean)) / np.array(data.std)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(quality.real_images(run.experiment, 1, 10)) == 10


def test_distances_entropy_and_shares_by_hand():
    def seen(angles, labels) -> Seen:
        features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return Seen(
            features, np.eye(3)[labels], {"bn": (np.array([1.0, 2.0]), np.array([4.0, 1.0]))}, 1.0
        )

    stats = {"bn": {"mean": np.array([1.0, 0.0]), "var": np.array([1.0, 1.0])}}
    teacher = SimpleNamespace(batch_stats=stats)
    pseudo = seen(np.array([0.0, np.pi / 2, np.pi]), [0, 0, 1])
    real = seen(np.array([0.0, np.pi / 3]), [0, 2])
    found = quality.report(teacher, pseudo, real)
    assert found["label_shares"] == pytest.approx([2 / 3, 1 / 3, 0])
    w = np.array([2 / 3, 1 / 3])
    assert found["label_entropy"] == pytest.approx(-np.sum(w * np.log(w)))
    nearest = found["nearest"]
    assert found["compared"] == 2  # the first two pseudo images with the two real ones
    assert nearest["pseudo"] == pytest.approx(1.0)  # each a right angle away from its neighbour
    assert nearest["real"] == pytest.approx(0.5)
    to_real = [0.0, 1 - np.cos(np.pi / 6)]
    assert nearest["pseudo_to_real"] == pytest.approx(np.mean(to_real))
    assert nearest["real_to_pseudo"] == pytest.approx(np.mean([0, 1 - np.cos(np.pi / 6)]))
    layer = found["layers"][0]["pseudo"]
    assert (layer["mean"], layer["variance"]) == (2.0, 3.0)
    kl = [0.5 * (np.log(1 / 4) + 4 - 1), 0.5 * (0 + 1 + 4 - 1)]
    assert layer["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    json.dumps(found, allow_nan=False)


def test_the_images_of_a_collapsed_delegator_lie_on_each_other():
    feature = np.array([[1.0, 0.0]] * 4)
    moments = {"bn": (np.zeros(1), np.ones(1))}
    collapsed = Seen(feature, np.eye(2)[[1] * 4], moments, 1.0)
    stats = {"bn": {"mean": np.zeros(1), "var": np.ones(1)}}
    found = quality.report(SimpleNamespace(batch_stats=stats), collapsed, collapsed)
    assert found["nearest"]["pseudo"] == pytest.approx(0.0)
    assert found["label_entropy"] == pytest.approx(0.0)
    assert found["layers"][0]["pseudo"] == {"mean": 0.0, "variance": 0.0, "kl": 0.0}


def test_a_student_is_looked_at_with_features_as_long_as_its_teachers(run):
    nets, teacher = skd.networks(run.config), run.kept.classifier
    images = quality.drawn_images(run.experiment, nets, run.kept.delegator, 0, 60)  # 25 at a time
    other = steps.initial(nets.features, jax.random.key(3), (1, *images.shape[1:]))
    state = StageOneState(Trained(other, ()), Trained(run.kept.delegator, ()))
    student = quality.student_network(state, teacher)
    probe = evaluate.Probe(run.experiment, 1, run.workdir)
    of_teacher = quality.look(run.experiment, teacher, images).length
    scaled = quality.at_length(probe, student, of_teacher, images)

    def length(network):
        features, _ = nets.classifier(network.params).apply(network.variables(), images, False)
        return np.linalg.norm(features, axis=1).mean()

    ratio = length(teacher) / length(student)
    assert abs(ratio - 1) > 0.05
    head = teacher.params["head"]
    np.testing.assert_allclose(scaled.params["head"]["kernel"], ratio * head["kernel"], rtol=1e-4)
    assert scaled.params["head"]["bias"] is head["bias"]
    assert scaled.params["features"] is other.params
    same = quality.at_length(probe, teacher, of_teacher, images)
    np.testing.assert_allclose(same.params["head"]["kernel"], head["kernel"], rtol=1e-6)


def test_a_run_writes_its_delegators_quality(run):
    found = json.loads((run.workdir / "delegator_0.json").read_text())
    summary = json.loads((run.workdir / "summary.json").read_text())
    row = summary["delegator"][0]
    for name in ("teacher_accuracy", "student_accuracy", "student_accuracy_at_length", "agreement"):
        assert found[name] == row[name]
    assert 0 <= row["agreement"] <= 1
    assert found["images"]["pseudo"] == 60
    assert len(found["classes"]) == len(found["label_shares"]) == 4
    assert sum(found["label_shares"]) == pytest.approx(1)
    layers = {layer["name"] for layer in found["layers"]}
    assert "features.bn_stem" in layers
    # The running moments are those of real images, so these are near and pseudo ones of a delegator
    # of a few rounds are not.
    near = np.mean([layer["real"]["kl"] for layer in found["layers"]])
    far = np.mean([layer["pseudo"]["kl"] for layer in found["layers"]])
    assert near < far
    with Image.open(run.workdir / "pseudo_images_by_class_0.png") as image:
        assert np.asarray(image.convert("L")).std() > 0


def test_a_picture_that_cannot_be_drawn_ends_nothing(run, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise ValueError("what a library did not foresee\nand more")

    monkeypatch.setattr(plots, "class_grid", broken)
    (tmp_path / "run" / "pseudo_images_0.png").mkdir(parents=True)  # so it cannot be written
    probe = evaluate.Probe(run.experiment, 1, tmp_path / "run")
    of = ("teacher_accuracy", "student_accuracy", "student_accuracy_at_length", "agreement")
    nets, row = skd.networks(run.config), dict.fromkeys(of)
    images = quality.drawn_images(run.experiment, nets, run.kept.delegator, 0, 60)
    pseudo = quality.look(run.experiment, run.kept.classifier, images)
    quality._draw(0, run.kept.classifier, images, pseudo, row, probe)
    assert [path.name for path in (tmp_path / "run").glob("*.json")] == ["delegator_0.json"]
    first, second = capsys.readouterr().err.splitlines()
    assert "pseudo_images_0.png could not be drawn (UserError: " in first
    assert "it is a folder" in first
    assert second.endswith(
        "pseudo_images_by_class_0.png could not be drawn (ValueError: what a library did not "
        "foresee); all else goes on without it"
    )

    again = tmp_path / "again"
    shutil.copytree(run.workdir, again)
    (again / "summary.json").unlink()
    monkeypatch.setattr(replica, "plots", plots)
    monkeypatch.setattr(plots, "accuracy_curves", broken)
    summary = train.train(run.config, again, silent)
    assert json.loads((again / "summary.json").read_text()) == summary
    [line] = capsys.readouterr().err.splitlines()
    assert "accuracy_curve.png could not be drawn (ValueError" in line


def test_the_page_s_pictures_take_any_class_name(tmp_path):
    layer = {"name": "features.bn_stem", "pseudo": {"kl": 1.0}, "real": {"kl": 0.5}}
    names = ["$5_to_$10", r"$\frac$", "a\udcff"]
    report = {"classes": names, "label_shares": [0.5, 0.25, 0.25], "layers": [layer]}
    page.draw_reports({"D_0": report}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.parametrize(("skipped", "shown"), [((0, 0), ["imitation"]), ((0, 1), None)])
def test_skipped_rounds_are_drawn_where_there_were_any(tmp_path, skipped, shown):
    place = {"time": 0.0, "task": 0, "phase": "delegator"}
    rows = [{**place, "step": n, "imitation": 1.0, "skipped": x} for n, x in enumerate(skipped)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = page.terms(tmp_path, 0)
    assert list(found) == (shown or ["imitation", "skipped"])
    assert found["imitation"][1].tolist() == [1.0, 1.0]


def test_class_grid_has_a_row_a_class(tmp_path):
    images = np.zeros((6, 4, 4, 3))
    for count in (2, 5):
        labels = np.arange(6) % count
        names = [f"class {k}" for k in range(count)]
        plots.class_grid(images, labels, names, tmp_path / f"{count}.png", (0, 0, 0), (1, 1, 1))
    with Image.open(tmp_path / "2.png") as few, Image.open(tmp_path / "5.png") as many:
        assert many.height > 1.5 * few.height


def test_agreement_is_the_share_of_images_given_the_same_class():
    one = [np.array([0, 1, 2]), np.array([3])]
    assert quality.agreement(one, one) == 1.0
    assert quality.agreement(one, [np.array([9, 9, 9]), np.array([9])]) == 0.0
    assert quality.agreement(one, [np.array([0, 1, 9]), np.array([3])]) == 0.75

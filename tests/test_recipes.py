"""Other methods' losses by hand, and every recipe on a tiny run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import TINY, silent

from configs import recipes
from skd_jax import losses, train
from skd_jax.config import late_drops
from skd_jax.methods import from_config_dict
from skd_jax.methods.skd import terms
from skd_jax.methods.skd.terms import Explored

RNG = np.random.default_rng(0)


def explored(**changes) -> Explored:
    values = {
        "images": jnp.asarray(RNG.normal(size=(3, 6, 6, 2)), jnp.float32),
        "teacher_features": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
        "teacher_logits": jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32),
        "student_features": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
        "student_logits": jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32),
        "teacher_moments": [],
        "student_moments": [],
        "running_moments": [],
        "config": config("skd").method.stage_one,
    }
    return Explored(**{**values, **changes})


def config(name: str, **changes):
    found = recipes.get_config(f"recipe={name},dataset=cifar100,scale=mini")
    found.update_from_flattened_dict(changes)
    return from_config_dict(found)


def test_output_difference_is_the_mean_absolute_difference():
    a, b = np.array([[1.0, -2.0], [0.0, 3.0]]), np.array([[0.0, 0.0], [4.0, 3.0]])
    assert losses.output_difference(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(7 / 4)
    assert losses.output_difference(jnp.asarray(a), jnp.asarray(a)) == 0.0


def test_output_divergence_is_kl_of_teacher_from_student():
    t, s = RNG.normal(size=(4, 5)), RNG.normal(size=(4, 5))
    p = np.exp(t) / np.exp(t).sum(1, keepdims=True)
    q = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    expected = np.mean(np.sum(p * np.log(p / q), axis=1))
    found = losses.output_divergence(jnp.asarray(t, jnp.float32), jnp.asarray(s, jnp.float32))
    assert found == pytest.approx(expected, rel=1e-5)
    reverse = losses.output_divergence(jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32))
    assert reverse != pytest.approx(expected, rel=1e-2)
    # Scores of 0 and 1 are no trouble.
    sure = jnp.array([[200.0, -200.0]])
    value, gradient = jax.value_and_grad(losses.output_divergence)(sure, sure)
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_discrepancy_takes_features_or_outputs():
    teacher = jnp.eye(2), jnp.array([[3.0, 0.0], [0.0, 3.0]])
    student = 7 * jnp.eye(2), jnp.zeros((2, 2))
    assert losses.discrepancy(teacher, student) == pytest.approx(0.0, abs=1e-6)
    assert losses.discrepancy(teacher, student, "l1") == pytest.approx(1.5)
    assert losses.discrepancy(teacher, student, "kl") > 0.1
    with pytest.raises(ValueError, match="unknown discrepancy"):
        losses.discrepancy(teacher, student, "l2")


@pytest.mark.parametrize("kind", ["cosine", "l1", "kl"])
def test_exploration_is_minus_the_discrepancy(kind):
    e = explored(config=config("skd", **{"method.stage_one.discrepancy": kind}).method.stage_one)
    teacher, student = (
        (e.teacher_features, e.teacher_logits),
        (e.student_features, e.student_logits),
    )
    assert terms.exploration(e) == -losses.discrepancy(teacher, student, kind)


def test_activation_and_image_norm_and_tempered_category():
    e = explored()
    assert terms.activation(e) == pytest.approx(-np.abs(e.teacher_features).mean(), rel=1e-6)
    assert terms.image_norm(e) == pytest.approx(np.square(e.images).mean(), rel=1e-6)
    logits = np.asarray(e.teacher_logits, np.float64) / 1000
    log_scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.mean(log_scores[np.arange(3), logits.argmax(1)])
    assert terms.tempered_category(e) == pytest.approx(expected, rel=1e-5)


def test_smoothness_is_the_distance_from_the_blurred_image():
    e = explored()
    weight = np.exp(-((np.arange(-2, 3) / 2) ** 2.0))
    kernel = np.outer(weight, weight) / weight.sum() ** 2
    x = np.asarray(e.images, np.float64)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    blurred = sum(
        kernel[i, j] * padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)
    )
    assert terms.smoothness(e) == pytest.approx(np.mean((x - blurred) ** 2), rel=1e-5)
    assert terms.smoothness(explored(images=jnp.ones((2, 6, 6, 1)))) == pytest.approx(0, abs=1e-9)


def test_abds_divergence_is_of_the_running_moments():
    batch, running = [(jnp.array([1.0]), jnp.array([0.25]))], [(jnp.array([0.0]), jnp.array([1.0]))]
    found = losses.feature_statistics_loss(batch, running, "kl_of_running")
    # log(sigma / sigma^) - (1 - (sigma^^2 + (mu^ - mu)^2) / sigma^2) / 2
    expected = np.log(0.5) - 0.5 * (1 - (1 + 1) / 0.25)
    assert found == pytest.approx(expected, rel=1e-3)
    other = losses.feature_statistics_loss(running, batch, "kl")
    assert found == pytest.approx(float(other), rel=1e-6)


def test_weights_are_those_of_the_papers():
    def weights(name: str) -> dict[str, float]:
        return dict(config(name).method.stage_one.terms)

    assert weights("dafl")["category"] == 0.5
    assert weights("dafl")["diversity"] * np.log(10) == pytest.approx(5)
    assert weights("abd")["diversity"] * np.log(10) == pytest.approx(1)  # 10 base classes
    assert weights("abd")["feature_statistics"] == 50
    assert weights("deep_inversion")["total_variation"] == pytest.approx(0.0768)


def test_recipes_differ_in_their_losses_alone():
    fields = {"discrepancy", "student_explores", "terms", "feature_distance"}
    whole = recipes.get_config("dataset=cifar100,scale=mini").to_dict()
    seen = set()
    for name in recipes.RECIPES:
        found = recipes.get_config(f"recipe={name},dataset=cifar100,scale=mini").to_dict()
        seen.add(str({key: found["method"]["stage_one"][key] for key in sorted(fields)}))
        for part in (whole, found):
            one = part["method"]["stage_one"]
            part["method"]["stage_one"] = {k: v for k, v in one.items() if k not in fields}
        assert found == whole
    assert len(seen) == len(recipes.RECIPES)


@pytest.mark.parametrize(
    "arg", ["recipe=nothing", "dataset=nothing", "dataset=common", "scale=huge", "rest=1"]
)
def test_an_unknown_argument_is_named(arg):
    with pytest.raises(ValueError, match=arg.partition("=")[0]):
        recipes.get_config(arg)


QUICK = ("abd", "skd")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in sorted(recipes.RECIPES)
    ],
)
def test_every_recipe_trains_its_delegator(name, tmp_path):
    found = recipes.get_config(f"recipe={name},dataset=caltech101,scale=mini")
    weights = dict(found.method.stage_one.terms)
    changes = {k: v for k, v in TINY.items() if k != "method.delegator.widths"}
    found.update_from_flattened_dict(
        {**changes, "run.phases": 2, "method.delegator.widths": (4, 4)}
    )
    # Digits instead of its images.
    found.data.update(
        name="digits", image_size=8, load_size=8, channels=1, mean=(0.3,), std=(0.4,), tasks=1,
        augment="none", base_classes=4, max_classes=0, exclude_classes=(),
    )  # fmt: skip
    found.model.update(family="cifar", depth=8)
    summary = train.train(from_config_dict(found), tmp_path, silent)
    assert summary["skipped_steps"] == 0
    log = (tmp_path / "metrics.jsonl").read_text()
    for term in weights:
        assert f'"{term}"' in log
    rows = [json.loads(line) for line in log.splitlines()]
    first = next(row for row in rows if row["phase"] == "delegator")
    weighed = sum(weights[term] * first[term] for term in weights)
    assert first["explore"] == pytest.approx(weighed, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("dataset", recipes.DATASETS)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_for_every_data_set_and_scale(name, dataset):
    for scale in ("full", "mini"):
        more = ",tasks=2,base_classes=4" if dataset == "folder" else ",tasks=2"
        fields = recipes.get_config(f"recipe={name},dataset={dataset},scale={scale}{more}")
        found = from_config_dict(fields)
        assert found.data.tasks == 2 and late_drops(found) == []
        assert dict(found.method.stage_one.terms)
        fields = recipes.get_config(
            f"recipe={name},dataset={dataset},scale={scale},method=pseudo_ncm{more}"
        )
        assert from_config_dict(fields).method.stage_one == found.method.stage_one


@pytest.mark.parametrize("dataset", recipes.DATASETS)
@pytest.mark.parametrize(("name", "fields"), recipes.OF_STAGE_TWO.items())
def test_our_recipes_change_stage_two_alone(dataset, name, fields):
    more = f"dataset={dataset},scale=mini,tasks=2{',base_classes=4' * (dataset == 'folder')}"
    paper, ours = (
        from_config_dict(recipes.get_config(f"recipe={recipe},{more}")) for recipe in ("skd", name)
    )
    two = dataclasses.replace(paper.method.stage_two, **fields)
    assert two != paper.method.stage_two
    assert ours == dataclasses.replace(
        paper, method=dataclasses.replace(paper.method, stage_two=two)
    )


def test_a_recipe_says_what_it_cannot_be_used_with():
    for arg, words in (
        ("recipe=ours,method=pseudo_ncm", "recipe=ours: only with method=skd, not pseudo_ncm"),
        ("recipe=translated,method=abd", "recipe=translated: only with method=skd, not abd"),
        ("method=ncm", "skd and pseudo_ncm"),
        ("recipe=abd,dataset=folder", "base_classes=N"),
        ("dataset=digits,base_classes=3", "base_classes"),
        ("dataset=mnist", "digits, folder"),
    ):
        with pytest.raises(ValueError, match=words):
            recipes.get_config(arg)

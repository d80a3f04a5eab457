"""Many seeds at once: each is what it is alone, and all of them go on from one place."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import test_comparators
import test_exemplars
import test_methods
from test_train import (
    assert_logs_agree,
    at_evaluation,
    at_row,
    bits,
    results,
    rows,
    silent,
    snapshot,
    tiny,
)

from skd_jax import groups, metrics, steps, train
from skd_jax.errors import Interrupted, UserError
from skd_jax.experiment import open_experiment
from skd_jax.model import load
from skd_jax.stopping import StopSignals

SEEDS = (1, 2, 3)  # digits' own is 1
PHASES = 3  # T_0, D_0 and S_0, T_1


def many(replicas: int = len(SEEDS), **changes):
    return tiny(**{"run__phases": PHASES, "run__replicas": replicas, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> SimpleNamespace:
    """Three seeds at once, and one after the other."""
    base, said = tmp_path_factory.mktemp("replicas"), []
    summary = train.train(many(), base / "many", said.append)
    for seed in SEEDS:
        train.train(tiny(seed=seed, run__phases=PHASES), base / str(seed), silent)
    return SimpleNamespace(base=base, many=base / "many", said=said, summary=summary)


def assert_same_weights(here, there, tolerance: float = 1e-4) -> None:
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def apart(here, there) -> float:
    """How far two pytrees lie apart, in the second one's length."""
    one, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (here, there))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_each_seed_is_what_it_is_alone(folder):
    for seed in SEEDS:
        alone, own = folder.base / str(seed), folder.many / f"seed{seed}"
        assert_logs_agree(own, alone)
        here, there = results(own), results(alone)
        assert here.keys() == there.keys()
        assert here["seed"] == seed and here["kept_bytes"] == there["kept_bytes"]
        np.testing.assert_allclose(here["top1_seen"], there["top1_seen"], atol=0.01)
        same = {"accuracy_curve.png", "pseudo_images_0.png", "config.json", "tensorboard"}
        assert same <= {path.name for path in own.iterdir()}
        _, kept = train.restore(own)
        _, expected = train.restore(alone)
        assert jax.tree.structure(kept) == jax.tree.structure(expected)
        # Rounding has been amplified, above all where Adam follows gradients of nearly nothing.
        assert apart(kept, expected) < 0.02
        if seed > 1:
            assert apart(kept, train.restore(folder.many / "seed1")[1]) > 0.3
    assert not list(folder.many.glob("*/checkpoints"))  # one place for all
    first = [row["classification"] for row in rows(folder.many / "seed1")[:1]]
    assert first != [row["classification"] for row in rows(folder.many / "seed2")[:1]]


def test_the_summary_is_of_all(folder):
    summary = json.loads((folder.many / "summary.json").read_text())
    each = [results(folder.many / f"seed{seed}") for seed in SEEDS]
    assert summary == folder.summary and summary["seeds"] == list(SEEDS)
    finals = [one["final_accuracy"] for one in each]
    assert summary["mean"]["final_accuracy"] == pytest.approx(np.mean(finals))
    assert summary["deviation"]["final_accuracy"] == pytest.approx(np.std(finals, ddof=1))
    text = "\n".join(folder.said)
    assert "seed 2: \naccuracy, %" in text
    assert "seeds 1 to 3, mean and sample deviation in %: average incremental" in text
    assert train.train(many(), folder.many, silent) == summary  # finished


def test_the_spread_over_seeds_is_that_of_a_sample():
    def one(seed: int, last: float, top1: float | None) -> dict:
        names = dict.fromkeys(metrics.SPREAD, last)
        same = {"method": "skd", "dataset": "digits", "classes_per_task": [4], "kept_bytes": 1}
        same |= {"seconds": {}, "device": "", "date": "", "skipped_steps": seed}
        return {**names, **same, "seed": seed, "top1_seen": [top1, last], "remarks": ["oh"]}

    found = metrics.over_seeds([one(4, 0.2, None), one(5, 0.4, 0.1), one(6, 0.9, 0.3)])
    assert found["mean"]["forgetting"] == pytest.approx(0.5)
    assert found["deviation"]["forgetting"] == pytest.approx(np.sqrt(0.13))
    assert found["mean"]["top1_seen"] == [None, pytest.approx(0.5)]
    assert found["skipped_steps"] == 15 and found["remarks"][1] == "seed 5: oh"
    assert metrics.spread_in_words(found).startswith("seeds 4 to 6, mean and sample deviation")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("base", marks=pytest.mark.slow),
        "delegator",
        pytest.param("evaluation", marks=pytest.mark.slow),
        "signal",
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(folder, tmp_path, place):
    workdir = tmp_path / "run"
    if place == "signal":
        real, calls = StopSignals.poll, []

        def told(self):
            calls.append(real(self))
            return 143 if len(calls) == 2 else None

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(StopSignals, "poll", told)
            train.train(many(run__log_every=4), workdir, silent)
        train.train(many(run__log_every=4), workdir, silent)
    else:
        at = {"base": at_row(4), "delegator": at_row(9), "evaluation": at_evaluation(0)}[place]
        with at:
            train.train(many(), workdir, silent)
        train.train(many(), workdir, silent)
        for seed in SEEDS:
            here, there = (path / f"seed{seed}" for path in (workdir, folder.many))
            assert rows(here, ("time",)) == rows(there, ("time",))
            assert results(here) == results(there)
    for seed in SEEDS:
        kept, whole = (train.restore(path, seed)[1] for path in (workdir, folder.many))
        assert bits(kept) == bits(whole)


def test_a_seeds_part_is_a_run_like_any_other(folder, tmp_path):
    config, kept = train.restore(folder.many, 2)
    assert config.seed == 2 and config.run.replicas == 1
    _, same = train.restore(folder.many / "seed2")
    _, other = train.restore(folder.many, 3)
    assert bits(kept) == bits(same) != bits(other)
    model = load(folder.many / "seed2")
    assert bits(model.kept) == bits(kept) == bits(train.model_of(folder.many, 2).kept)
    start = str(folder.many / "seed2")
    summary = train.train(
        tiny(seed=2, run__phases=PHASES + 1, run__start_from=start), tmp_path / "on", silent
    )
    assert summary["top1_seen"] == results(folder.many / "seed2")["top1_seen"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda many_, out: train.restore(many_), r"holds seeds 1 to 3; name .* as .*seed1$"),
        (lambda many_, out: train.restore(many_, 4), "holds seeds 1 to 3, not 4; name another"),
        (lambda many_, out: train.train(tiny(), many_ / "seed1", silent), "one seed of the run in"),
        (lambda many_, out: train.train(many(2), many_, silent), "config.run.replicas=3, not 2"),
        (
            lambda many_, out: train.train(many(4, run__start_from=str(many_)), out, silent),
            r"config\.run\.start_from=.*config\.run\.replicas=3, not 4",
        ),
        (
            lambda many_, out: train.train(tiny(run__start_from=str(many_)), out, silent),
            r"config\.run\.start_from=.*config\.run\.replicas=3, not 1",
        ),
    ],
    ids=["no seed", "no such seed", "a seed's folder", "resumed", "started", "started by one"],
)
def test_what_cannot_be_is_told_in_one_line(folder, tmp_path, work, said):
    before = snapshot(folder.many)
    with pytest.raises(UserError, match=said) as told:
        work(folder.many, tmp_path / "out")
    assert "\n" not in str(told.value)
    assert snapshot(folder.many) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("replicas", [0, -1])
def test_replicas_are_one_or_more(replicas):
    with pytest.raises(UserError, match=rf"config\.run\.replicas: {replicas} is below 1"):
        many(replicas)


def test_seeds_have_32_bits():
    with pytest.raises(UserError, match=r"config\.seed: seeds .* give a smaller"):
        open_experiment(many(2, seed=2**32 - 1))  # the second would be seed 0's run


@pytest.mark.parametrize("field", ["static", "rates"])
def test_a_method_that_computes_by_its_seed_is_refused(monkeypatch, field):
    opened = open_experiment(many(2))
    real = train.open_experiment.__globals__["planned"]

    def planned(setting):
        seed = setting.config.seed
        own = {"static": seed, "rates": lambda numbers: np.full(len(numbers), seed)}[field]
        return [dataclasses.replace(p, **{field: own}) for p in real(setting)]

    monkeypatch.setitem(train.open_experiment.__globals__, "planned", planned)
    with pytest.raises(UserError, match=r"config\.run\.replicas: what skd computes depends"):
        opened.replicas()


def test_images_of_ones_own_are_those_of_the_run_alone():
    """BiC learns from a part of the images and of the exemplars that the seed draws."""
    config = test_exemplars.tiny("bic", run__replicas=2)
    opened = open_experiment(config)
    each = opened.replicas()
    (number,) = (i for i, p in enumerate(opened.phases) if p.task == 1 and p.name == "bias")
    rng = np.random.default_rng(0)
    shape = (4 * test_exemplars.EACH, 8, 8, 1)
    kept = [
        SimpleNamespace(
            exemplars=SimpleNamespace(
                images=rng.integers(0, 256, shape, np.uint8),
                labels=np.repeat(np.arange(4, dtype=np.int32), test_exemplars.EACH),
            )
        )
        for _ in each
    ]
    phases = [one.phases[number] for one in each]
    assert phases[0].own != phases[1].own
    with opened.opened_to_all(phases, kept) as images:
        assert images is not None
        order = np.arange(images.n, dtype=np.int32)[::-1]
        found = [np.asarray(x) for x in images.fetch(np.stack([order, order])[None])]
        taken = [np.asarray(images.of(place)(order)) for place in range(2)]
    for place, (phase, own) in enumerate(zip(phases, kept, strict=True)):
        alone = open_experiment(test_exemplars.tiny("bic", seed=config.seed + place))
        with alone.opened(phase, own) as images:
            assert images is not None and images.n == len(order)
            for x, expected in zip(found, images.fetch(order[None]), strict=True):
                np.testing.assert_array_equal(x[:, place], expected)
            np.testing.assert_array_equal(taken[place], images.take(order))


def test_side_by_side_they_are_what_they_are_one_after_the_other(monkeypatch, tmp_path):
    """The form of accelerators, on a CPU."""
    config = test_methods.tiny("finetune", run__replicas=2, run__phases=1)
    train.train(config, tmp_path / "after", silent)
    monkeypatch.setattr(groups, "platform", lambda: "gpu")
    steps.advance.jitted.clear_cache()
    train.train(config, tmp_path / "beside", silent)
    steps.advance.jitted.clear_cache()
    for seed in SEEDS[:2]:
        here, there = (tmp_path / name / f"seed{seed}" for name in ("beside", "after"))
        assert_logs_agree(here, there)
        assert_same_weights(train.restore(here)[1], train.restore(there)[1])
    assert bits(train.restore(tmp_path / "beside", 1)[1]) != bits(
        train.restore(tmp_path / "after", 1)[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bic", "icarl", "lucir", "ncm", "ewc", "joint"])
def test_other_methods_seeds_are_what_they_are_alone(tmp_path, name):
    of_names = (test_exemplars, test_comparators)
    make = next((of.tiny for of in of_names if name in of.NAMES), test_methods.tiny)
    train.train(make(name, run__replicas=2), tmp_path / "many", silent)
    for seed in SEEDS[:2]:
        alone, own = tmp_path / str(seed), tmp_path / "many" / f"seed{seed}"
        train.train(make(name, seed=seed), alone, silent)
        batch, test = (0.1, 0.04) if name == "joint" else (0.02, 0.02)  # see test_devices
        assert_logs_agree(own, alone, accuracy=batch)
        here, there = results(own), results(alone)
        np.testing.assert_allclose(here["top1_seen"], there["top1_seen"], atol=test)
        assert here["kept_bytes"] == there["kept_bytes"]


@pytest.mark.slow
def test_a_run_of_several_seeds_begins_where_another_ended(folder, tmp_path):
    train.train(many(run__phases=1), tmp_path / "base", silent)
    start = str(tmp_path / "base")
    train.train(many(run__start_from=start), tmp_path / "rest", silent)
    for seed in SEEDS:
        kept, whole = (train.restore(x, seed)[1] for x in (tmp_path / "rest", folder.many))
        assert bits(kept) == bits(whole)

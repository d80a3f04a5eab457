"""Steps that meet a NaN or an infinity change nothing, are counted, and stop a run in the end."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import (
    all_finite,
    at_row,
    bits,
    finished_run,
    results,
    rows,
    silent,
    snapshot,
    tiny,
)

from skd_jax import losses, steps, train
from skd_jax.checkpoint import Checkpoints
from skd_jax.data import prepare
from skd_jax.errors import UserError
from skd_jax.loop import no_images
from skd_jax.methods import skd
from skd_jax.methods.skd import steps as skd_steps
from skd_jax.methods.skd import terms
from skd_jax.methods.skd.phases import KeptDelegator
from skd_jax.methods.skd.quality import watch

CONFIG = tiny()
NETS = skd.networks(CONFIG)
RATE = jnp.float32(0.1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def untrained():
    """(kept T_0 and D_0, S_0 and D_0 in training, T_1 in training)."""
    base, one, two, *_ = train.open_experiment(CONFIG).phases
    kept = KeptDelegator()
    kept = base.finish(base.init(kept), kept, no_images)
    state = one.init(kept)
    kept = one.finish(one.init(kept), kept, no_images)
    return kept, state, two.init(kept)


@pytest.fixture(scope="module")
def compiled():
    """Each step on (state, kept, a number to multiply its input by)."""
    method = CONFIG.method
    one, index = method.stage_one, jnp.arange(method.stage_one.batch)
    z = skd_steps.latent(jax.random.key(0), index, method.delegator.z_dim)
    images = prepare(CONFIG.data, jnp.full((16, 8, 8, 1), 100, jnp.uint8))
    functions = terms.lookup(one)
    weights = {name: jnp.float32(1) for name, _ in functions}

    def explore(state, kept, factor):
        return skd_steps.explore(
            NETS, one, functions, state, kept.classifier, z, weights, RATE, RATE * factor
        )

    def cil(state, kept, factor):
        labels, key, batch = jnp.full((16,), 5), jax.random.key(1), images * factor
        old, new = kept.classifier, method.stage_two
        return skd_steps.cil(NETS, new, state, old, kept.delegator, batch, labels, key, RATE, RATE)

    def supervised(state, kept, factor):
        labels = jnp.zeros((16,), jnp.int32)
        return steps.supervised(NETS, CONFIG.base, state, images * factor, labels, RATE)

    def imitate(state, kept, factor):
        return skd_steps.imitate(NETS, one, state, kept.classifier, z * factor, RATE)

    return {f.__name__: jax.jit(f) for f in (imitate, explore, cil, supervised)}


@pytest.mark.parametrize("factor", [1.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["imitate", "explore", "cil", "supervised"])
def test_a_step_that_is_not_finite_changes_nothing(untrained, compiled, name, factor):
    """A bad batch, a bad z, a delegator that explodes (its rate: the gradient overflows)."""
    kept, delegating, learning = untrained
    state = delegating if name in ("imitate", "explore") else learning
    new, metrics = compiled[name](state, kept, factor)
    assert all_finite(new)
    assert float(metrics["skipped"]) == (factor != 1.0)
    same = [a == b for a, b in zip(bits(new)[1:], bits(state)[1:], strict=True)]
    assert all(same) if factor != 1.0 else np.mean(same) < 0.5


def test_what_is_made_of_nan_is_nan():
    """Or a delegator that explodes would look like one that draws class 0 alone."""
    outputs, moments = jnp.full((4, 3), jnp.nan), [(jnp.full(2, jnp.nan), jnp.ones(2))]
    found = skd_steps.spread(outputs, None)
    assert all(np.isnan(x).all() for x in found.values())
    values = {name: np.asarray(x)[None] for name, x in found.items()}
    seen = watch(0.5, "stage_one.terms.diversity", values)
    assert not seen.remembered and not seen.alarm
    assert np.isnan(losses.diversity_loss(outputs))
    assert np.isnan(losses.feature_cosine_discrepancy(outputs, jnp.ones((4, 3)))).all()
    for distance in ("variance", "std", "squared", "kl", "kl_of_running"):
        assert np.isnan(losses.feature_statistics_loss(moments, [(jnp.ones(2),) * 2], distance))


TERM = """
import jax.numpy as jnp

from skd_jax.methods.skd.terms import term

@term
def now_and_then(e):
    number = jnp.sum(jnp.abs(e.images)) * 1e3  # as good as random
    return jnp.where(number % 2 < 1, jnp.nan, 0.0)
"""


@pytest.fixture(scope="module")
def bad_term(tmp_path_factory):
    """Changes to the config: a term that is NaN in every second round or so."""
    folder = tmp_path_factory.mktemp("terms")
    (folder / "bad_term.py").write_text(TERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield {
            "method__stage_one__term_modules": ("skd_jax.methods.skd.terms", "bad_term"),
            "method__stage_one__terms": {"category": 1.0, "diversity": 1.0, "now_and_then": 1.0},
            "run__log_every": 1,
        }


@pytest.fixture
def saved(monkeypatch) -> list[bool]:
    """For each checkpoint from now on: whether all its numbers are finite."""
    real, finite = Checkpoints.save, []

    def save(self, step, state, meta):
        finite.append(all_finite(state))
        real(self, step, state, meta)

    monkeypatch.setattr(Checkpoints, "save", save)
    return finite


def test_a_run_goes_on_without_the_steps_that_are_not_finite(bad_term, saved, tmp_path):
    lines: list[str] = []
    config = tiny(**bad_term)
    summary = train.train(config, tmp_path / "run", lines.append)
    logged = rows(tmp_path / "run")
    skipped = [row for row in logged if row["skipped"]]
    assert 0 < len(skipped) < 6
    assert summary["skipped_steps"] == len(skipped)
    assert sum("not finite" in line for line in lines) == len(skipped)
    assert saved and all(saved)
    for row in logged:  # null, not NaN: what JSON has no word for
        if row["phase"] == "delegator":
            assert (row["explore"] is None) == bool(row["skipped"])
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()

    with at_row(skipped[0]["global_step"]):  # a count that is not saved yet is made again
        train.train(config, tmp_path / "again", silent)
    train.train(config, tmp_path / "again", silent)
    assert results(tmp_path / "again") == results(tmp_path / "run")
    assert rows(tmp_path / "again", ("time",)) == rows(tmp_path / "run", ("time",))

    # Too many in a row: here, one.
    config = tiny(**bad_term, run__max_skipped=1)
    place = f"task {skipped[0]['task']}, delegator, round {skipped[0]['step']} on"
    with pytest.raises(UserError, match="1 times in a row") as caught:
        train.train(config, tmp_path / "stopped", silent)
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    # The same again: what was saved is sound, and the same round fails.
    before = snapshot(tmp_path / "stopped" / "checkpoints")
    with pytest.raises(UserError, match=place):
        train.train(config, tmp_path / "stopped", silent)
    assert snapshot(tmp_path / "stopped" / "checkpoints") == before


def test_absurd_learning_rate_ends_in_a_message_with_phase_and_step(saved, tmp_path):
    workdir = tmp_path / "run"
    config = tiny(base__lr=1e30, run__checkpoint_every=1, run__max_skipped=4)
    with pytest.raises(UserError, match="not finite") as caught:
        train.train(config, workdir, silent)
    assert "task 0, base, step 2 on" in str(caught.value)
    assert all(saved)


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, saved):
    """Whatever a step lets through."""
    real = steps.advance

    def broken(*args, **kwargs):
        state, metrics = real(*args, **kwargs)
        return jax.tree.map(lambda x: x * jnp.nan, state), metrics

    monkeypatch.setattr(steps, "advance", broken)
    with pytest.raises(UserError, match="not saved"):
        train.train(CONFIG, tmp_path / "run", silent)
    assert saved == [True]  # the start


def test_where_every_round_was_left_out_the_summary_knows_no_labels(
    finished, tmp_path, monkeypatch
):
    real = steps.advance

    def left_out(*args, **kwargs):
        state, found = real(*args, **kwargs)
        if "imitation" not in found:  # no round
            return state, found
        gone = {k: jnp.full_like(x, 1 if k == "skipped" else jnp.nan) for k, x in found.items()}
        return state, gone

    monkeypatch.setattr(steps, "advance", left_out)
    summary = train.train(finished.config, tmp_path / "run", silent)
    assert [(d["label_entropy"], d["label_shares"]) for d in summary["delegator"]] == [
        (None, [])
    ] * 2
    before = snapshot(tmp_path / "run")
    assert "NaN" not in before["summary.json"].decode()
    assert train.train(finished.config, tmp_path / "run", silent) == summary
    assert snapshot(tmp_path / "run") == before


def test_collapse_is_told_and_stops_a_run_where_that_is_wished(finished, tmp_path):
    lines: list[str] = []
    config = tiny(run__collapse_share=0.2)  # as good as always
    summary = train.train(config, tmp_path / "told", lines.append)
    told = [line for line in lines if line.startswith("warning: the delegator has collapsed")]
    assert ["task 0" in told[0], "task 1" in told[1], len(told)] == [True, True, 2]  # once a phase
    assert all("entropy of w" in line and "histogram" in line for line in told)
    logged = [row for row in rows(tmp_path / "told") if row["phase"] == "delegator"]
    for found in summary["delegator"]:
        *_, last = (row for row in logged if row["task"] == found["task"])
        assert max(found["label_shares"]) == pytest.approx(last["largest_share"])
        assert found["label_entropy"] == pytest.approx(last["label_entropy"])
        assert last["label_entropy"] == pytest.approx(-last["diversity"], rel=1e-5)
    config = tiny(run__collapse_share=0.2, run__stop_at_collapse=True)
    with pytest.raises(UserError, match=r"collapsed at task 0, delegator, round 2: .*entropy"):
        train.train(config, tmp_path / "stopped", silent)


def test_collapse_is_told_by_share_and_entropy():
    even = {"label_shares": np.full((3, 4), 0.25), "label_entropy": np.full(3, np.log(4))}
    one = {"label_shares": np.eye(4)[[2, 2, 2]], "label_entropy": np.zeros(3)}
    seen = functools.partial(watch, 0.9, "stage_one.terms.diversity")
    assert not seen(even).alarm
    told = seen(one)
    assert told.advice == "weigh config.method.stage_one.terms.diversity more or lower the rates"
    assert told.alarm == "the delegator has collapsed"
    assert told.logged == {"largest_share": 1.0}
    assert told.remembered == {"label_entropy": 0.0, "label_shares": [0, 0, 1, 0]}
    assert told.why == (
        "100% of the pseudo labels are class 2 of 4, entropy of w 0.000 (at most 1.386), "
        "histogram 0.00, 0.00, 1.00, 0.00"
    )
    nothing = {"label_shares": np.full((3, 4), np.nan), "label_entropy": np.full(3, np.nan)}
    told = seen(nothing)
    assert (told.alarm, told.remembered) == ("", {})
    lone = {"label_shares": np.ones((3, 1)), "label_entropy": np.zeros(3)}
    assert not seen(lone).alarm  # a task of one class

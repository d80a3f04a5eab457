import logging
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skd_jax.checkpoint import Checkpoints
from skd_jax.errors import UserError


@flax.struct.dataclass
class Net:
    params: Any
    optimiser: Any
    step: Any
    exemplars: Any = None


def make_state(features: int = 4) -> dict[str, Net | None]:
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, features))},
        "half": jnp.array([0.1, np.nan, -0.0], jnp.bfloat16),
    }
    optimiser = optax.chain(
        optax.add_decayed_weights(1e-4),  # an EmptyState
        optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.1}), momentum=0.9),
    )
    adam = optax.adam(1e-3).init(params)
    return {
        "teacher": Net(params, optimiser.init(params), jnp.int32(7)),
        "delegator": Net({"mask": jnp.array([True, False])}, adam, jnp.int32(2**31 - 1)),
        "student": None,
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_gives_the_same_bits_and_structure(tmp_path):
    state = make_state()
    meta = {"task": 1, "phase": "delegator", "rows": [[1, 2]], "digest": None}
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(5, state, meta)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.meta(5) == meta
        restored = checkpoints.restore(5, shapes(state))
    assert_same_bits(restored, state)
    assert all(isinstance(x, jax.Array) and not x.committed for x in jax.tree.leaves(restored))


def test_arrays_may_be_donated_right_after_save(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def overwrite(x):
        return x - 8

    x = jnp.ones((1000, 1000))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        overwrite(x).block_until_ready()
        restored = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    assert (restored["x"] == 1).all()
    overwrite(restored["x"])


def test_nothing_is_written_before_the_first_save(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints.meta(3)
        checkpoints.wait()
    assert not list(tmp_path.iterdir())


def test_keeps_the_newest_and_refuses_an_older_step(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.int32(step)}, {"step": step})
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        assert checkpoints.meta(2) == {"step": 2}
        for step in (2, 3):
            with pytest.raises(ValueError, match="not newer"):
                checkpoints.save(step, {"x": jnp.int32(0)}, {})
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: make_state(5), r"kernel is float32\[3, 4\] in it but float32\[3, 5\] here"),
        (
            lambda s: s | {"teacher": s["teacher"].replace(step=jnp.float32(7))},
            r"teacher.step is int32\[\] in it but float32\[\] here",
        ),
        (
            lambda s: s | {"student": s["delegator"]},
            r"student.params.mask is absent in it but bool\[2\] here",
        ),
        (
            lambda s: s | {"delegator": None},
            r"delegator.optimiser.0.count is int32\[\] in it but absent here",
        ),
    ],
)
def test_a_template_that_differs_is_named(tmp_path, change, message):
    state = make_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(UserError, match=message):
            checkpoints.restore(1, change(state))


@pytest.mark.parametrize("name", ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_an_unreadable_checkpoint_is_named(tmp_path, name):
    state = {"x": jnp.arange(10)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {"a": 1})
    path = tmp_path / "1" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(UserError, match=f"cannot read checkpoint {tmp_path / '1'} "),
    ):
        checkpoints.meta(1)
        checkpoints.restore(1, state)


def test_orbax_is_quiet(tmp_path, caplog):
    with caplog.at_level(logging.INFO), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(10)}, {})
        checkpoints.wait()
        checkpoints.restore(1, {"x": jnp.arange(10)})
    assert not [r for r in caplog.records if "orbax" in r.pathname]

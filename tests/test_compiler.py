"""What steps are compiled for, and that no program for one platform is taken for another's."""

import threading

import jax
import jax.numpy as jnp
import pytest

from skd_jax import compiler
from skd_jax.compiler import Compiled, compiling_for, options, platform
from skd_jax.models.norm import BatchNorm


def test_it_is_the_default_backend_unless_said_otherwise():
    here = platform()
    assert here == jax.default_backend()
    with compiling_for("tpu"):
        assert platform() == "tpu" and options() == {}
        with compiling_for("cuda"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    assert platform() == here


def test_it_is_said_of_one_thread_only():
    found = []
    with compiling_for("tpu"):
        thread = threading.Thread(target=lambda: found.append(platform()))
        thread.start()
        thread.join()
    assert found == [jax.default_backend()]


def nested() -> tuple[Compiled, Compiled]:
    """3 x, and 3 (x + 1) by it."""
    inner = Compiled(lambda x, times: times * x, static_argnames="times")
    return inner, Compiled(lambda x: inner(x + 1, times=3))


def test_one_compiled_function_may_call_another():
    inner, outer = nested()
    assert outer(jnp.float32(1)) == 6 and inner(jnp.float32(1), times=3) == 3
    assert jax.grad(outer)(jnp.float32(1)) == 3


def test_or_be_looked_at_for_its_shapes_whatever_the_options(monkeypatch):
    """As what a run's phases leave is, when the run goes on; nothing is compiled for that."""
    monkeypatch.setattr(compiler, "options", lambda: {"xla_an_option": "of some backend"})
    _, outer = nested()
    assert jax.eval_shape(outer, jnp.zeros(4)).shape == (4,)
    assert jax.eval_shape(jax.jit(outer), jnp.zeros(4)).shape == (4,)


@pytest.mark.parametrize("wrap", [jax.jit, Compiled])
def test_a_trace_for_one_platform_serves_no_other(wrap):
    """Nor does that of a custom gradient inside it, which JAX keeps by itself."""
    x = jnp.zeros((2, 16, 16, 4))
    variables = BatchNorm().init(jax.random.key(0), x, True)

    def loss(x):
        return jnp.sum(BatchNorm().apply(variables, x, True, mutable=["batch_stats"])[0])

    function = wrap(jax.grad(loss))

    def lowered(name: str) -> str:
        with compiling_for(name):
            traced = getattr(function, "jitted", function).trace(x)
            return traced.lower(lowering_platforms=(name,)).as_text()

    one_pixel_a_row, many = "tensor<2x256x4xf32>", "tensor<2x4x256xf32>"
    for name in ("cpu", "tpu", "cuda", "cpu"):
        text = lowered(name)
        assert (many in text) == (name == "cpu")
        assert (one_pixel_a_row in text) == (name != "cpu")

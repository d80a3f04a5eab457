"""float32 is float32 on accelerators: what every product of the networks asks of XLA."""

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import METHODS_AND_RECIPES, on_digits, untraced
from test_models import CIFAR, TINY, fill, normal, same_bits

from configs import digits
from skd_jax import config, methods, steps
from skd_jax.compiler import compiling_for
from skd_jax.errors import UserError
from skd_jax.methods.phase import setting_of
from skd_jax.models import Classifier, resnet
from skd_jax.state import Batch

PRODUCTS = ("conv_general_dilated", "dot_general")
ASKING = r"stablehlo\.(convolution|dot_general|dot)\b"
HIGHEST, DEFAULT = ((each, each) for each in (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT))
TRANSPOSED = TINY.clone(upsample="transposed")
MODULES = {
    "resnet": lambda precision: Classifier(CIFAR.clone(precision=precision), 4),
    "resnet of large images": lambda precision: Classifier(
        resnet("imagenet", 10, 4, precision=precision), 4
    ),
    "delegator": lambda precision: TINY.clone(precision=precision),
    "transposed delegator": lambda precision: TRANSPOSED.clone(precision=precision),
}


def example(name: str):
    return normal(0, 2, 6) if "delegator" in name else normal(0, 2, 8, 8, 3)


def gradient(module, x):
    """The variables of a module, and a function of them and ``x``: a loss's gradients."""
    variables = fill(module, x, 0)

    def loss(params, x):
        out, _ = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

    return variables["params"], jax.grad(loss, (0, 1))


def twice(grad):
    def square(*args):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grad(*args)))

    return jax.grad(square, (0, 1))


def products(jaxpr) -> list:
    """The convolutions and matrix products of a program and of those inside it."""
    found = [e for e in jaxpr.eqns if e.primitive.name in PRODUCTS]
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                found += products(getattr(value, "jaxpr", value))
    return found


def is_program(value) -> bool:
    return hasattr(value, "eqns")


# The networks ask for the backend's name: on a CPU their gradients are their own.
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", MODULES)
def test_every_product_asks_for_the_precision(backend, name):
    x = example(name)

    def asked(precision: str) -> list[list]:
        module = MODULES[name](precision)
        params, grad = gradient(module, x)
        with compiling_for(backend):
            forward = jax.make_jaxpr(lambda: module.apply(fill(module, x, 0), x, False))()
            whole = [jax.make_jaxpr(f)(params, x) for f in (grad, twice(grad))]
        return [products(program.jaxpr) for program in (forward, *whole)]

    forward, first, second = asked("highest")
    assert {equation.primitive.name for equation in forward} == set(PRODUCTS)
    assert len(first) == 3 * len(forward) and len(second) > len(first)
    for equation in (*forward, *first, *second):
        assert equation.params["precision"] == HIGHEST, equation
    for equation in itertools.chain(*asked("default")):
        assert equation.params["precision"] == DEFAULT, equation


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", MODULES)
def test_compilers_for_accelerators_are_told(platform, name):
    def text(precision: str) -> str:
        params, grad = gradient(MODULES[name](precision), example(name))
        with compiling_for(platform):
            exported = jax.export.export(jax.jit(grad), platforms=[platform])(params, example(name))
        return exported.mlir_module()

    lines = [line for line in text("highest").splitlines() if re.search(ASKING, line)]
    assert len(lines) > 10
    for line in lines:
        assert len(re.findall("HIGHEST", line)) == 2, line
    assert "HIGH" not in text("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet", "delegator"])
def test_on_a_cpu_it_changes_no_bit(name, dtype):
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator")

    def gradients(precision: str):
        module = MODULES[name](precision)
        if "delegator" in name:
            module = module.clone(dtype=dtype)
        else:
            module = module.clone(features=module.features.clone(dtype=dtype))
        params, grad = gradient(module, example(name))
        return jax.jit(grad)(params, example(name))

    assert same_bits(gradients("highest"), gradients("default"))


def test_products_of_float32_are_float32_unless_told_otherwise():
    assert CIFAR.precision == TINY.precision == "highest"
    fields = digits.get_config()
    assert fields.model.precision == "highest"
    del fields.model.precision  # as in a config of a time before it
    assert methods.from_config_dict(fields).model.precision == "highest"


def test_a_saved_config_without_it_stays_valid():
    saved = config.to_dict(methods.from_config_dict(digits.get_config()))
    del saved["model"]["precision"]
    assert config.with_defaults(saved, methods.METHODS)["model"]["precision"] == "highest"


def test_an_unknown_precision_is_named():
    fields = digits.get_config()
    fields.model.precision = "float32"
    with pytest.raises(UserError, match=r"config\.model\.precision: 'float32' is not one of"):
        methods.from_config_dict(fields)


TRACED: set = set()


@pytest.mark.parametrize("name", [n for n in METHODS_AND_RECIPES if not n.startswith("pseudo_")])
def test_every_product_of_every_methods_steps_asks_for_it(name):
    """Those of T_n's head on S_n's features, of class means and of ridge statistics too."""
    fields = on_digits(name)
    fields.model.width = 4
    setting = setting_of(methods.from_config_dict(fields), (4, 2), (640, 640))
    for phase, state, kept in untraced(setting, TRACED):
        batch = None
        if phase.reads != "nothing":
            images = jax.ShapeDtypeStruct((phase.batch, 8, 8, 1), jnp.float32)
            labels = jax.ShapeDtypeStruct((phase.batch,), jnp.int32)
            batch = Batch(images, labels, jax.ShapeDtypeStruct((phase.batch,), jnp.bool_))
        rates = jax.tree.map(lambda rate: rate[0], phase.rates(np.arange(1)))
        step = functools.partial(phase.step, phase.static, setting.nets)
        program = jax.make_jaxpr(step)(state, kept, batch, jax.random.key(0), rates)
        found = products(program.jaxpr)
        assert len(found) > 5
        for equation in found:
            assert equation.params["precision"] == HIGHEST, equation
    assert steps.networks(setting.config.model).features.precision == "highest"

"""Activations in bfloat16: weights, statistics and losses stay float32, and close to float32's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import STEPS, gradients, reference
from test_steps import DELEGATOR, KEY, NETS, TEACHER

from configs import digits
from skd_jax import train
from skd_jax.methods import from_config_dict
from skd_jax.methods.skd.steps import Networks, pseudo_images
from skd_jax.models import Classifier

HALF = Networks(NETS.features.clone(dtype="bfloat16"), NETS.delegator.clone(dtype="bfloat16"))


@pytest.mark.parametrize("make", STEPS)
def test_losses_are_close_to_those_of_float32(make):
    step, arguments = make(HALF)
    state, metrics = jax.jit(step)(*(value for value, _ in arguments))
    _, expected = reference(make)
    for name, value in metrics.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], rtol=0.03, atol=0.03, err_msg=name)
        counted = name in ("train_accuracy", "label_shares", "skipped")
        assert counted or float(value) != float(expected[name])
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}  # Adam counts in int32


@pytest.mark.parametrize("make", STEPS)
def test_gradients_are_close_to_those_of_float32(make):
    step, arguments = make(HALF)
    state, _ = jax.jit(step)(*(value for value, _ in arguments))
    expected, _ = reference(make)
    for found, wanted in zip(first_gradients(state), first_gradients(expected), strict=True):
        scale = np.linalg.norm(wanted)
        assert scale == 0 or np.linalg.norm(found - wanted) < 0.1 * scale


def first_gradients(state) -> list[np.ndarray]:
    """All gradients of each network as one vector."""
    networks = [state.student, state.delegator] if hasattr(state, "student") else [state]
    return [
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradients(n.optimiser))])
        for n in networks
    ]


def test_activations_are_bfloat16_and_outputs_float32():
    images = HALF.delegator.apply(DELEGATOR.variables(), jnp.zeros((2, 6)), False)
    (features, logits), seen = Classifier(HALF.features, 4).apply(
        TEACHER.variables(), images, False, capture_intermediates=True, mutable=["intermediates"]
    )
    assert images.dtype == features.dtype == logits.dtype == jnp.float32
    inside = seen["intermediates"]["features"]["stage1_block1"]["__call__"][0]
    assert inside.dtype == jnp.bfloat16


def test_pseudo_images_are_those_of_float32_to_a_hundredth():
    half = pseudo_images(HALF, DELEGATOR, KEY, 16)
    whole = pseudo_images(NETS, DELEGATOR, KEY, 16)
    assert float(jnp.mean(jnp.abs(half - whole))) < 0.02 * float(jnp.std(whole))


@pytest.mark.slow
def test_digits_end_at_the_same_accuracy_within_a_point(tmp_path):
    accuracy = {}
    for dtype in ("float32", "bfloat16"):
        fields = digits.get_config("tasks=1")
        fields.data.base_classes, fields.model.dtype = 9, dtype
        fields.base.epochs, fields.base.drop_epochs = 20, (10, 15)
        config = from_config_dict(fields)
        two = dataclasses.replace(config.method.stage_two, delegator=False, epochs=1)
        method = dataclasses.replace(config.method, stage_two=two)
        config = dataclasses.replace(config, method=method)
        summary = train.train(config, tmp_path / dtype, lambda line: None)
        accuracy[dtype] = summary["top1_seen"][0]
    assert accuracy["float32"] > 0.95
    assert accuracy["bfloat16"] == pytest.approx(accuracy["float32"], abs=0.01)

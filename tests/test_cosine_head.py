"""SKD's steps, and what may be configured, with LUCIR's cosine head on features without a ReLU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import same_bits
from test_steps import (
    DELEGATOR,
    IMAGES,
    KEY,
    NEW,
    OLD,
    ONE,
    STUDENT,
    TWO,
    copy,
    network,
    setting,
    stage_one_state,
)
from test_steps import NETS as LINEAR

from configs import digits
from configs.recipes import OURS
from skd_jax import steps
from skd_jax.errors import UserError
from skd_jax.methods import from_config_dict
from skd_jax.methods.phases import base
from skd_jax.methods.skd import steps as skd_steps
from skd_jax.methods.skd import terms
from skd_jax.models import Classifier, grow_head
from skd_jax.state import Kept, Trained

NETS = skd_steps.Networks(LINEAR.features.clone(last_relu=False), LINEAR.delegator)
TEACHER = network(Classifier(NETS.features, OLD, "cosine"), IMAGES, 0)
TEACHER_BITS = jax.tree.map(np.array, TEACHER)


def test_a_round_of_stage_one_and_a_step_of_stage_two():
    functions = terms.lookup(ONE)
    weights = {name: jnp.float32(weight) for name, weight in ONE.terms}
    rates = jnp.float32(0.1), jnp.float32(1e-3)
    one = dataclasses.replace(ONE, discrepancy="l1")  # of the head's outputs
    round_ = jax.jit(skd_steps.round_, static_argnums=(0, 1, 2))
    state, metrics = round_(NETS, one, functions, stage_one_state(), TEACHER, KEY, weights, *rates)
    assert metrics["skipped"] == 0 and metrics["imitation"] > 0
    assert not same_bits(state.student.network.params, STUDENT.params)
    assert not same_bits(state.delegator.network.params, DELEGATOR.params)

    cil = jax.jit(skd_steps.cil, static_argnums=(0, 1))
    images = jax.random.normal(jax.random.key(3), (8, 8, 8, 3))
    labels, gamma = OLD + jnp.arange(8) % NEW, jnp.float32(0.3)
    for changes in ({}, {"classification": "old_head_fixed"}, OURS):
        two = dataclasses.replace(TWO, **changes)
        start = copy(TEACHER)
        params = grow_head(start.params, jax.random.key(3), NEW)
        started = Trained(start.replace(params=params), steps.sgd(two).init(params))
        drawn = state.delegator.network
        new, metrics = cil(NETS, two, started, TEACHER, drawn, images, labels, KEY, gamma, rates[0])
        assert metrics["skipped"] == 0
        head, old = new.network.params["head"], params["head"]
        assert jax.tree.map(jnp.shape, head) == {"kernel": (8, OLD + NEW), "sigma": ()}
        assert not same_bits(head["kernel"][:, OLD:], old["kernel"][:, OLD:])
        kept = bool(changes)
        assert same_bits(head["kernel"][:, :OLD], old["kernel"][:, :OLD]) == kept
        assert same_bits(head["sigma"], old["sigma"]) == kept
    assert same_bits(TEACHER, TEACHER_BITS)


def test_the_teachers_head_on_its_own_features_gives_its_logits():
    images = jax.random.normal(KEY, (5, 8, 8, 3))
    features, logits = jax.jit(lambda t, x: steps.eval_mode(NETS.classifier(t.params), t, x))(
        TEACHER, images
    )
    assert features.min() < 0
    found = steps.head(NETS, TEACHER, features)
    np.testing.assert_allclose(found, logits, atol=1e-6)
    assert np.abs(found).max() <= np.abs(TEACHER.params["head"]["sigma"])


def test_a_run_starts_with_the_head_of_its_config():
    of = setting()
    model = dataclasses.replace(of.config.model, head="cosine")
    of = dataclasses.replace(of, config=dataclasses.replace(of.config, model=model))
    head = base(of).init(Kept()).network.params["head"]
    assert head["kernel"].shape == (8, OLD) and head["sigma"] == 1


def test_a_configs_network_has_its_shortcut_and_last_relu():
    fields = digits.get_config()
    plain = steps.networks(from_config_dict(fields).model).features
    assert (plain.shortcut, plain.last_relu) == ("conv", True)
    fields.model.shortcut, fields.model.last_relu = "pad", False
    other = steps.networks(from_config_dict(fields).model).features
    assert other == plain.clone(shortcut="pad", last_relu=False)


def test_aligning_a_cosine_head_is_refused():
    fields = digits.get_config()
    fields.model.head, fields.method.stage_two.align_head = "cosine", True
    with pytest.raises(UserError, match=r"align_head=True has no effect on config\.model\.head"):
        from_config_dict(fields)
    fields.method.stage_two.align_head = False
    assert from_config_dict(fields).model.head == "cosine"


@pytest.mark.parametrize(("field", "value"), [("head", "round"), ("shortcut", "none")])
def test_an_unknown_head_or_shortcut_is_named(field, value):
    fields = digits.get_config()
    fields.model[field] = value
    with pytest.raises(UserError, match=rf"config\.model\.{field}: '{value}' is not one of"):
        from_config_dict(fields)

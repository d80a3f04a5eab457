"""The PyTorch port that the benchmark times computes what skd_jax computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar100
from skd_jax import steps, terms
from skd_jax.config import from_config_dict
from skd_jax.methods import skd
from skd_jax.state import Network, StageOneState, Trained

torch = pytest.importorskip("torch", reason="the benchmark's PyTorch is not installed")
port = pytest.importorskip("experiments.pytorch_port")

pytestmark = pytest.mark.slow

OLD, NEW, BATCH = 4, 2, 6
CONFIG = cifar100.get_config()
CONFIG.model.depth, CONFIG.stage_one.batch = 8, BATCH
CONFIG = from_config_dict(CONFIG)
NETS = skd.networks(CONFIG)


def drawn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(module, x: jax.ShapeDtypeStruct, seed: int) -> Network:
    """Variables drawn by numpy: weights as large as they start, variances positive."""
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), x)

    def draw(path, leaf) -> np.ndarray:
        name = path[-1].key
        values = drawn(seed + len(jax.tree_util.keystr(path)), leaf.shape)
        if name == "kernel":
            return values / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return 1 + 0.1 * np.abs(values) if name in ("scale", "var") else 0.1 * values

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return Network(variables["params"], variables["batch_stats"])


def fill(layer, params: dict, stats: dict | None = None) -> None:
    """Gives a layer of the port the weights of ours."""
    values = {name: np.asarray(value) for name, value in params.items()}
    for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        if ours in values:
            value = values[ours]
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
            getattr(layer, theirs).data.copy_(torch.tensor(value.transpose(order)))
    for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
        if stats:
            getattr(layer, theirs).copy_(torch.tensor(np.asarray(stats[ours])))


def fill_classifier(layers, network: Network) -> None:
    params, stats = network.params["features"], network.batch_stats["features"]
    fill(layers.conv_stem, params["conv_stem"])
    fill(layers.bn_stem, params["bn_stem"], stats["bn_stem"])
    for index, block in enumerate(layers.blocks):
        name = f"stage{index + 1}_block1"  # depth 8 has one a stage
        for part, values in params[name].items():
            fill(getattr(block, part), values, stats[name].get(part))
    fill(layers.head, network.params["head"])


def fill_delegator(layers, network: Network) -> None:
    params, stats = network.params, network.batch_stats
    kernel = np.asarray(params["fc"]["kernel"]).reshape(-1, 8, 8, 128)
    bias = np.asarray(params["fc"]["bias"]).reshape(8, 8, 128)  # NHWC; the port's are NCHW
    layers.fc.weight.data.copy_(torch.tensor(kernel.transpose(3, 1, 2, 0).reshape(8192, -1)))
    layers.fc.bias.data.copy_(torch.tensor(bias.transpose(2, 0, 1).reshape(-1)))
    places = {"bn_fc": 0, "conv1": 2, "bn1": 3, "conv2": 6, "bn2": 7, "conv_image": 9}
    for name, place in (places | {"bn_helper": 11}).items():
        fill(layers.layers[place], params.get(name, {}), stats.get(name))


@pytest.fixture(scope="module")
def ours():
    """(teacher, student, delegator, learner)."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    teacher, learner = [
        network(NETS.classifier({"head": {"bias": np.zeros(count)}}), images, seed)
        for seed, count in ((100, OLD), (300, OLD + NEW))
    ]
    delegator = network(NETS.delegator, jax.ShapeDtypeStruct((1, 256), jnp.float32), 400)
    return teacher, network(NETS.features, images, 200), delegator, learner


@pytest.fixture
def theirs(ours):
    teacher, student, delegator, learner = ours
    options = {"device": "cpu", "compiled": False, "bfloat16": False}
    port_steps = port.Steps(**options, depth=8, old=OLD, new=NEW)
    fill_classifier(port_steps.teacher, teacher)
    head = teacher.params["head"]  # the student's own is never used
    whole = Network({"features": student.params, "head": head}, {"features": student.batch_stats})
    fill_classifier(port_steps.student, whole)
    fill_classifier(port_steps.learner, learner)
    fill_delegator(port_steps.delegator, delegator)
    fill_delegator(port_steps.frozen, delegator)
    return port_steps


def stage_one(ours) -> StageOneState:
    _, student, delegator, _ = ours
    sgd, adam = steps.sgd(CONFIG.stage_one), steps.adam()
    return StageOneState(
        Trained(student, sgd.init(student.params)), Trained(delegator, adam.init(delegator.params))
    )


def test_an_imitate_step_of_the_port_is_ours(ours, theirs):
    z = drawn(1, (BATCH, 256))
    state, metrics = jax.jit(steps.imitate, static_argnums=(0, 1))(
        NETS, CONFIG.stage_one, stage_one(ours), ours[0], z, jnp.float32(0.1)
    )
    loss = theirs.imitation(torch.tensor(z))
    loss.backward()
    theirs.student_sgd.step()
    assert float(metrics["imitation"]) == pytest.approx(loss.item(), rel=1e-4)
    for name in ("conv1", "conv2"):
        new = state.student.network.params["stage2_block1"][name]["kernel"]
        weight = getattr(theirs.student.blocks[1], name).weight.detach().numpy()
        np.testing.assert_allclose(new.transpose(3, 2, 0, 1), weight, rtol=1e-3, atol=1e-5)


def test_the_exploration_loss_of_the_port_is_ours(ours, theirs):
    z = drawn(2, (BATCH, 256))
    functions = terms.lookup(CONFIG.stage_one)
    weights = {name: jnp.float32(1) for name, _ in functions}
    explore = jax.jit(steps.explore, static_argnums=(0, 1, 2))
    rates = jnp.float32(0.1), jnp.float32(1e-3)
    _, metrics = explore(
        NETS, CONFIG.stage_one, functions, stage_one(ours), ours[0], z, weights, *rates
    )
    loss = theirs.exploration(torch.tensor(z))
    assert float(metrics["explore"]) == pytest.approx(loss.item(), rel=1e-4)


def test_the_cil_loss_of_the_port_is_ours(ours, theirs):
    teacher, _, delegator, learner = ours
    two, key = CONFIG.stage_two, jax.random.key(3)
    images, labels = drawn(4, (BATCH, 32, 32, 3)), np.int32(OLD + np.arange(BATCH) % NEW)
    state = Trained(learner, steps.sgd(two).init(learner.params))
    _, metrics = jax.jit(steps.cil, static_argnums=(0, 1))(
        *(NETS, two, state, teacher, delegator, images, labels),
        *(key, jnp.float32(0.1), jnp.float32(0.1)),
    )
    z = np.asarray(steps.latent(key, jnp.arange(BATCH), 256))
    given = torch.tensor(z), torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels)
    loss = theirs.cil_loss(given[0], given[1], given[2].long())
    assert float(metrics["cil"]) == pytest.approx(loss.item(), rel=1e-4)

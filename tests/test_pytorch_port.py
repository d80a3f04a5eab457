"""The PyTorch port that the benchmark times computes what skd_jax computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar100
from skd_jax.methods import from_config_dict, skd
from skd_jax.methods.skd import steps, terms
from skd_jax.methods.skd.steps import StageOneState, adam, sgd
from skd_jax.state import Network, Trained

torch = pytest.importorskip("torch", reason="the benchmark's PyTorch is not installed")
from experiments.measure import pytorch_port as port  # noqa: E402

pytestmark = pytest.mark.slow

OLD, NEW, BATCH = 4, 2, 6
CONFIG = cifar100.get_config()
CONFIG.model.depth, CONFIG.method.stage_one.batch = 8, BATCH
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
        network(NETS.classifier({"head": {"kernel": np.zeros((1, count))}}), images, seed)
        for seed, count in ((100, OLD), (300, OLD + NEW))
    ]
    delegator = network(NETS.delegator, jax.ShapeDtypeStruct((1, 256), jnp.float32), 400)
    return teacher, network(NETS.features, images, 200), delegator, learner


def port_of(teacher: Network, student: Network, delegator: Network, learner: Network):
    """The port's networks with these weights."""
    options = {"device": "cpu", "compiled": False, "bfloat16": False}
    filled = port.Steps(**options, depth=8, old=OLD, new=NEW)
    fill_classifier(filled.teacher, teacher)
    head = teacher.params["head"]  # the student's own is never used
    fill_classifier(
        filled.student,
        Network({"features": student.params, "head": head}, {"features": student.batch_stats}),
    )
    fill_classifier(filled.learner, learner)
    fill_delegator(filled.delegator, delegator)
    fill_delegator(filled.frozen, delegator)
    return filled


def weights(module) -> dict[str, np.ndarray]:
    return {
        name: value.numpy().copy()
        for name, value in module.state_dict().items()
        if "num_batches" not in name and "head" not in name
    }


# Biases before a BN: their gradient is nothing but rounding, which Adam turns into a whole step.
ROUNDING = ("fc.bias", "layers.2.bias", "layers.6.bias")


def assert_same_change(before, found, expected, tolerance: float = 0.01) -> None:
    """Every weight and running moment has moved from ``before`` in the same way."""
    before, found, expected = weights(before), weights(found), weights(expected)
    for name in before.keys() - set(ROUNDING):
        moved, wanted = found[name] - before[name], expected[name] - before[name]
        assert np.linalg.norm(wanted) > 0, name
        assert np.linalg.norm(moved - wanted) < tolerance * np.linalg.norm(wanted), name


def test_a_round_of_the_port_is_ours(ours, monkeypatch):
    teacher, student, delegator, learner = ours
    one, zs = CONFIG.method.stage_one, [drawn(seed, (BATCH, 256)) for seed in range(6)]
    state = StageOneState(
        Trained(student, sgd(one).init(student.params)),
        Trained(delegator, adam().init(delegator.params)),
    )
    imitate = jax.jit(steps.imitate, static_argnums=(0, 1))
    explore = jax.jit(steps.explore, static_argnums=(0, 1, 2))
    functions, rates = terms.lookup(one), (jnp.float32(0.1), jnp.float32(1e-3))
    ones = {name: jnp.float32(1) for name, _ in functions}
    for z in zs[:5]:
        state, _ = imitate(NETS, one, state, teacher, z, rates[0])
    state, metrics = explore(NETS, one, functions, state, teacher, zs[5], ones, *rates)

    theirs, given = port_of(*ours), iter(zs)
    monkeypatch.setattr(theirs, "_latent", lambda batch: torch.tensor(next(given)))
    assert theirs.round(BATCH).item() == pytest.approx(float(metrics["explore"]), rel=1e-3)
    expected = port_of(teacher, state.student.network, state.delegator.network, learner)
    assert_same_change(port_of(*ours).student, theirs.student, expected.student)
    # Adam's first step is the gradient's sign: 1 % of signs, where it is all but 0, may differ.
    assert_same_change(port_of(*ours).delegator, theirs.delegator, expected.delegator, 0.2)


def test_cil_steps_of_the_port_are_ours(ours, monkeypatch):
    teacher, student, delegator, learner = ours
    two, keys = CONFIG.method.stage_two, [jax.random.key(seed) for seed in (3, 4)]
    images, labels = drawn(4, (BATCH, 32, 32, 3)), np.int32(OLD + np.arange(BATCH) % NEW)
    state = Trained(learner, sgd(two).init(learner.params))
    cil = jax.jit(steps.cil, static_argnums=(0, 1))
    batch, rates, metrics = (images, labels), (jnp.float32(0.1), jnp.float32(0.1)), {}
    for key in keys:
        state, metrics = cil(NETS, two, state, teacher, delegator, *batch, key, *rates)

    theirs = port_of(*ours)
    zs = iter([np.asarray(steps.latent(key, jnp.arange(BATCH), 256)) for key in keys])
    monkeypatch.setattr(theirs, "_latent", lambda batch: torch.tensor(next(zs)))
    given = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels).long()
    losses = [theirs.cil(*given).item() for _ in keys]
    assert losses[-1] == pytest.approx(float(metrics["cil"]), rel=1e-3)
    expected = port_of(teacher, student, delegator, state.network)
    assert_same_change(port_of(*ours).learner, theirs.learner, expected.learner)

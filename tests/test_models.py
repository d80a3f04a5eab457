"""The networks against layer arithmetic, numpy, and flax's own BatchNorm."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from skd_jax.models import (
    HIGH_RESOLUTION,
    LOW_RESOLUTION,
    MOMENTS,
    BatchNorm,
    Classifier,
    CosineHead,
    Delegator,
    ResNet,
    align_head,
    grow_head,
    head_logits,
    resnet,
)
from skd_jax.models.conv import Conv, conv, transposed_conv, upsample_conv

CIFAR = resnet("cifar", 8, 4)
TINY = Delegator(image_size=8, channels=3, z_dim=6, widths=(8, 8, 4))


def fill(module: nn.Module, example: jax.Array, seed: int) -> dict:
    """Variables of a module drawn by numpy: nothing to compile, and no scale, shift or moment
    that is 0 or 1 as at initialisation."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            return rng.normal(0, spread, leaf.shape).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), example)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def count(module: nn.Module, example: jax.Array) -> int:
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), example)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))


def same_bits(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


# The layers in float64, one output pixel at a time.


def numpy_conv(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """PyTorch's Conv2d(padding=k // 2), NHWC."""
    x, kernel = np.float64(x), np.float64(kernel)
    k = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    height, width = ((size + 2 * (k // 2) - k) // stride + 1 for size in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def numpy_norm(x, params, stats) -> np.ndarray:
    """Eval-mode batch normalisation."""
    scale, bias = (params["scale"], params["bias"]) if params else (1.0, 0.0)
    return (x - stats["mean"]) / np.sqrt(np.float64(stats["var"]) + 1e-5) * scale + bias


def numpy_max_pool(x: np.ndarray) -> np.ndarray:
    """PyTorch's MaxPool2d(3, 2, 1)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = (x.shape[1] + 1) // 2
    rows = [
        [padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(size)]
        for i in range(size)
    ]
    return np.stack([np.stack(row, 1) for row in rows], 1)


def numpy_resnet(module: ResNet, variables: dict, x: np.ndarray) -> np.ndarray:
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, params, stats, name):
        return numpy_norm(x, params[name], stats[name])

    stem = numpy_conv(x, params["conv_stem"]["kernel"], 2 if module.large_stem else 1)
    x = np.maximum(norm(stem, params, stats, "bn_stem"), 0)
    x = before = numpy_max_pool(x) if module.large_stem else x
    strides = (1, 2, 1) if module.bottleneck else (2, 1)
    for stage, blocks in enumerate(module.blocks):
        for block in range(blocks):
            name = f"stage{stage + 1}_block{block + 1}"
            p, s = params[name], stats[name]
            halves = bool(stage) and not block
            y = x
            for number, stride in enumerate(strides, 1):
                y = numpy_conv(y, p[f"conv{number}"]["kernel"], stride if halves else 1)
                y = norm(y, p, s, f"bn{number}")
                y = np.maximum(y, 0) if number < len(strides) else y
            x = numpy_shortcut(x, y.shape[-1], 1 + halves, p, s, module.shortcut)
            x, before = np.maximum(x + y, 0), x + y
    return (x if module.last_relu else before).mean((1, 2))


def numpy_shortcut(x, channels: int, stride: int, params, stats, kind: str) -> np.ndarray:
    if kind == "conv" and "conv_shortcut" in params:
        x = numpy_conv(x, params["conv_shortcut"]["kernel"], stride)
        return numpy_norm(x, params["bn_shortcut"], stats["bn_shortcut"])
    out = np.zeros((*x[:, ::stride, ::stride].shape[:-1], channels))
    new = channels - x.shape[-1]
    first = new // 2 if kind == "pad" else 0
    out[..., first : first + x.shape[-1]] = x[:, ::stride, ::stride]
    return out


def numpy_delegator(variables: dict, z: np.ndarray, start: int, widths: tuple) -> np.ndarray:
    params, stats = variables["params"], variables["batch_stats"]
    x = np.float64(z) @ params["fc"]["kernel"] + params["fc"]["bias"]
    x = numpy_norm(x.reshape(-1, start, start, widths[0]), params["bn_fc"], stats["bn_fc"])
    for i in range(1, len(widths)):
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = numpy_conv(x, params[f"conv{i}"]["kernel"]) + params[f"conv{i}"]["bias"]
        x = numpy_norm(x, params[f"bn{i}"], stats[f"bn{i}"])
        x = np.where(x > 0, x, 0.2 * x)
    x = np.tanh(numpy_conv(x, params["conv_image"]["kernel"]) + params["conv_image"]["bias"])
    return numpy_norm(x, None, stats["bn_helper"])


# Sizes


def conv_norm(inputs: int, outputs: int, size: int, bias: bool = False) -> int:
    """Parameters of a convolution and the batch normalisation after it."""
    return size * size * inputs * outputs + bias * outputs + 2 * outputs


def test_resnet_32_has_472756_parameters_with_100_classes():
    total = conv_norm(3, 16, 3) + 10 * conv_norm(16, 16, 3)
    total += conv_norm(16, 32, 3) + 9 * conv_norm(32, 32, 3) + conv_norm(16, 32, 1)
    total += conv_norm(32, 64, 3) + 9 * conv_norm(64, 64, 3) + conv_norm(32, 64, 1)
    total += 64 * 100 + 100
    assert total == 472_756
    classifier = Classifier(resnet("cifar", 32, 16), 100)
    assert count(classifier, jnp.zeros((1, 32, 32, 3))) == total


@pytest.mark.parametrize(("classes", "expected"), [(1000, 11_689_512), (100, 11_227_812)])
def test_resnet_18_has_torchvisions_number_of_parameters(classes, expected):
    total = conv_norm(3, 64, 7) + 4 * conv_norm(64, 64, 3)
    for width in (128, 256, 512):
        total += conv_norm(width // 2, width, 3) + 3 * conv_norm(width, width, 3)
        total += conv_norm(width // 2, width, 1)
    total += 512 * classes + classes
    assert total == expected
    classifier = Classifier(resnet("imagenet", 18, 64), classes)
    assert count(classifier, jnp.zeros((1, 224, 224, 3))) == expected


@pytest.mark.parametrize(
    ("size", "widths", "expected"),
    [
        (32, LOW_RESOLUTION, 2_329_091),
        (128, HIGH_RESOLUTION, 12_334_595),
        (224, HIGH_RESOLUTION, 29_703_683),
    ],
)
def test_delegators_of_table_iv_and_v_have_their_number_of_parameters(size, widths, expected):
    start = {32: 8, 128: 8, 224: 14}[size]
    units = start * start * widths[0]
    total = 256 * units + units + 2 * widths[0]
    if widths == LOW_RESOLUTION:
        total += conv_norm(128, 128, 3, bias=True) + conv_norm(128, 64, 3, bias=True)
    else:
        total += conv_norm(512, 512, 3, bias=True) + conv_norm(512, 256, 3, bias=True)
        total += conv_norm(256, 128, 3, bias=True) + conv_norm(128, 64, 3, bias=True)
    total += 3 * 3 * 64 * 3 + 3  # and nothing in the helper BN
    assert total == expected
    delegator = Delegator(image_size=size, channels=3, z_dim=256, widths=widths)
    assert count(delegator, jnp.zeros((1, 256))) == expected
    out = jax.eval_shape(
        lambda z: delegator.init_with_output(jax.random.key(0), z, True)[0], jnp.zeros((2, 256))
    )
    assert out.shape == (2, size, size, 3)


@pytest.mark.parametrize(
    ("family", "depth", "width", "size", "features"),
    [
        ("cifar", 32, 16, 32, 64),
        ("cifar", 20, 16, 32, 64),
        ("cifar", 8, 4, 8, 16),
        ("imagenet", 18, 64, 224, 512),
        ("imagenet", 18, 64, 128, 512),
        ("imagenet", 10, 8, 32, 64),
        ("imagenet", 50, 4, 32, 128),
    ],
)
def test_a_classifier_gives_float32_features_and_logits(family, depth, width, size, features):
    classifier = Classifier(resnet(family, depth, width), 7)
    out = jax.eval_shape(
        lambda x: classifier.init_with_output(jax.random.key(0), x, False)[0],
        jnp.zeros((2, size, size, 3), jnp.bfloat16),
    )
    assert [(o.shape, o.dtype) for o in out] == [
        ((2, features), jnp.float32),
        ((2, 7), jnp.float32),
    ]


@pytest.mark.parametrize(
    ("family", "depth"),
    [("cifar", 18), ("cifar", 2), ("cifar", 33), ("imagenet", 26), ("imagenet", 32), ("vgg", 8)],
)
def test_an_unknown_resnet_raises(family, depth):
    with pytest.raises(ValueError, match=f"{family}.*{depth}"):
        resnet(family, depth, 16)


# Whole networks


@pytest.mark.parametrize(("family", "depth", "size"), [("cifar", 8, 8), ("imagenet", 10, 32)])
def test_a_resnet_in_eval_mode_equals_numpy(family, depth, size):
    module = resnet(family, depth, 4)
    x = normal(1, 2, size, size, 3)
    variables = fill(module, x, 0)
    out = jax.jit(lambda v, x: module.apply(v, x, False))(variables, x)
    expected = numpy_resnet(module, variables, x)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("shortcut", ["pad", "pad_end"])
def test_a_shortcut_without_parameters_equals_numpy(shortcut, size):
    module = resnet("cifar", 8, 4, shortcut=shortcut)
    x = normal(1, 2, size, size, 3)
    variables = fill(module, x, 0)
    assert "shortcut" not in str(jax.tree.structure(variables))
    out = jax.jit(lambda v, x: module.apply(v, x, False))(variables, x)
    np.testing.assert_allclose(out, numpy_resnet(module, variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [32, 35])
def test_bottlenecks_equal_numpy(size):
    module = ResNet((2, 1), 4, large_stem=True, bottleneck=True)
    assert module.num_features == 32
    x = normal(1, 2, size, size, 1)
    variables = fill(module, x, 0)
    out = jax.jit(lambda v, x: module.apply(v, x, False))(variables, x)
    np.testing.assert_allclose(out, numpy_resnet(module, variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_deeper_resnets_have_torchvisions_number_of_parameters(depth, expected):
    classifier = Classifier(resnet("imagenet", depth, 64), 1000)
    assert count(classifier, jnp.zeros((1, 32, 32, 3))) == expected


@pytest.mark.parametrize(("family", "depth", "size"), [("cifar", 14, 8), ("imagenet", 10, 32)])
def test_without_the_last_relu_only_the_last_block_differs(family, depth, size):
    x = normal(1, 2, size, size, 3)
    variables = fill(resnet(family, depth, 4), x, 0)
    last = "stage4_block1" if family == "imagenet" else "stage3_block2"

    def run(**kwargs):
        module = resnet(family, depth, 4, **kwargs)
        mutable = ["intermediates", MOMENTS]
        out, seen = module.apply(variables, x, True, capture_intermediates=True, mutable=mutable)
        return out, seen["intermediates"].pop(last)["__call__"][0], seen

    out, block, rest = jax.jit(run)()
    assert same_bits((out, block, rest), jax.jit(lambda: run(last_relu=True))())
    bare_out, bare, bare_rest = jax.jit(lambda: run(last_relu=False))()
    assert np.min(bare) < -0.5
    np.testing.assert_allclose(block, nn.relu(bare), atol=1e-5)
    np.testing.assert_allclose(out, block.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(bare_out, bare.mean((1, 2)), atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(rest[MOMENTS]), jax.tree.leaves(bare_rest[MOMENTS]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    module = resnet(family, depth, 4, last_relu=False)
    found = jax.jit(lambda v, x: module.apply(v, x, False))(variables, x)
    expected = numpy_resnet(module, variables, x)
    assert expected.min() < -0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_delegator_in_eval_mode_equals_numpy():
    z = normal(1, 3, 6)
    variables = fill(TINY, z, 0)
    out = jax.jit(lambda v, z: TINY.apply(v, z, False))(variables, z)
    assert out.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(out, numpy_delegator(variables, z, 2, (8, 8, 4)), atol=1e-4)


def test_the_helper_bn_gives_zero_mean_and_unit_variance_in_train_mode():
    z = normal(1, 16, 6)
    variables = fill(TINY, z, 0)
    assert "bn_helper" not in variables["params"]
    images, _ = jax.jit(lambda v, z: TINY.apply(v, z, True, mutable=["batch_stats"]))(variables, z)
    np.testing.assert_allclose(images.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(images.var((0, 1, 2)), np.ones(3), rtol=1e-3)


def test_without_the_helper_bn_images_lie_within_minus_1_and_1():
    module = TINY.clone(helper_bn=False)
    z = normal(1, 16, 6)
    variables = fill(module, z, 0)
    assert "bn_helper" not in variables["batch_stats"]
    images = jax.jit(lambda v, z: module.apply(v, 3 * z, False))(variables, z)
    assert images.shape == (16, 8, 8, 3)
    assert 0.5 < np.abs(images).max() <= 1


def test_the_transposed_delegator_has_3x3_kernels_and_the_same_image_size():
    module = TINY.clone(upsample="transposed")
    z = normal(1, 2, 6)
    variables = fill(module, z, 0)
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 8, 8)
    assert variables["params"]["conv2"]["kernel"].shape == (3, 3, 8, 4)
    images = jax.jit(lambda v, z: module.apply(v, z, False))(variables, z)
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()


def test_align_head_gives_new_weights_the_old_ones_mean_length():
    kernel = np.array([[3.0, 0.0, 6.0], [4.0, 1.0, 8.0]])
    params = {"features": {}, "head": {"kernel": jnp.asarray(kernel), "bias": jnp.arange(3.0)}}
    head = align_head(params, 2)["head"]
    # Old lengths 5 and 1, mean 3; the new one is 10 long.
    assert np.asarray(head["kernel"]) == pytest.approx(kernel * [1, 1, 0.3])
    assert head["bias"].tolist() == [0, 1, 2]


def test_grow_head_keeps_the_old_outputs_and_new_ones_depend_on_new_weights_alone():
    x = normal(2, 5, 8, 8, 3)
    old = fill(Classifier(CIFAR, 4), x, 0)
    grown = grow_head(jax.tree.map(jnp.asarray, old["params"]), jax.random.key(1), 2)
    assert same_bits(grown["features"], old["params"]["features"])
    assert grown["head"]["kernel"].shape == (16, 6) and grown["head"]["bias"].shape == (6,)
    assert same_bits(grown["head"]["kernel"][:, :4], old["params"]["head"]["kernel"])
    assert same_bits(grown["head"]["bias"][:4], old["params"]["head"]["bias"])
    assert not same_bits(grown["head"]["kernel"][:, 4], grown["head"]["kernel"][:, 5])

    features = jnp.asarray(normal(3, 5, 16))
    dense = jax.jit(lambda head, f: nn.Dense(head["bias"].shape[0]).apply({"params": head}, f))
    logits = dense(grown["head"], features)
    assert same_bits(logits[:, :4], dense(old["params"]["head"], features))
    other_old = {
        "kernel": grown["head"]["kernel"].at[:, :4].add(1.0),
        "bias": grown["head"]["bias"].at[:4].add(1.0),
    }
    changed = dense(other_old, features)
    assert same_bits(changed[:, 4:], logits[:, 4:])
    assert np.all(np.any(changed[:, :4] != logits[:, :4], axis=0))


def test_a_cosine_head_equals_numpy_and_a_zero_feature_has_no_gradient():
    features = normal(0, 5, 6)
    features[2] = 0
    head = {"kernel": 3 * normal(1, 6, 4), "sigma": np.float32(2.5)}
    logits = jax.jit(lambda h, f: CosineHead(4).apply({"params": h}, f))(head, features)
    lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    expected = 2.5 * features / lengths @ (head["kernel"] / np.linalg.norm(head["kernel"], axis=0))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    found = jax.jit(lambda h, f: head_logits({"head": h}, f, "highest"))(head, features)
    assert same_bits(found, logits)
    gradient = jax.grad(lambda f: jnp.sum(head_logits({"head": head}, f, "highest") ** 2))(features)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[2] == 0)


def test_a_cosine_head_grows_by_columns_of_about_length_1_and_keeps_sigma():
    head = {"kernel": 30 * jnp.asarray(normal(0, 64, 4)), "sigma": jnp.float32(7)}
    grown = grow_head({"features": {}, "head": head}, jax.random.key(1), 3)["head"]
    assert set(grown) == {"kernel", "sigma"} and grown["sigma"] == 7
    assert same_bits(grown["kernel"][:, :4], head["kernel"])
    lengths = np.linalg.norm(grown["kernel"][:, 4:], axis=0)
    assert lengths == pytest.approx(np.ones(3), abs=0.4)


# Batch normalisation


def norm_variables(channels: int, affine: bool = True) -> dict:
    rng = np.random.default_rng(9)
    params = {
        "scale": np.float32(rng.uniform(0.5, 2, channels)),
        "bias": np.float32(rng.normal(size=channels)),
    }
    stats = {
        "mean": np.float32(rng.normal(size=channels)),
        "var": np.float32(rng.uniform(0.5, 2, channels)),
    }
    return {**({"params": params} if affine else {}), "batch_stats": stats}


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_train_mode_normalises_by_the_batch_and_updates_the_running_moments(momentum):
    x, variables = 2 * normal(0, 4, 3, 5, 6) + 1, norm_variables(6)
    module = BatchNorm(momentum)
    out, new = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))(variables, x)

    flat = np.float64(x).reshape(-1, 6)
    mean, var = flat.mean(0), ((flat - flat.mean(0)) ** 2).mean(0)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected, atol=1e-5)
    stats = variables["batch_stats"]
    np.testing.assert_allclose(
        new["batch_stats"]["mean"], momentum * stats["mean"] + (1 - momentum) * mean, atol=1e-6
    )
    np.testing.assert_allclose(
        new["batch_stats"]["var"], momentum * stats["var"] + (1 - momentum) * var, rtol=1e-5
    )


def test_eval_mode_normalises_by_the_running_moments():
    x, variables = normal(0, 4, 3, 5, 6), norm_variables(6)
    out = jax.jit(lambda v, x: BatchNorm().apply(v, x, False))(variables, x)
    expected = numpy_norm(np.float64(x), variables["params"], variables["batch_stats"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_handing_out_moments_changes_nothing_else(train):
    x, variables = 2 * normal(0, 4, 3, 5, 6) + 1, norm_variables(6)

    def run(mutable):
        apply = jax.jit(lambda v, x: BatchNorm().apply(v, x, train, mutable=mutable))
        return apply(variables, x)

    plain, plain_stats = run(["batch_stats"])
    handed, seen = run(["batch_stats", MOMENTS])
    assert same_bits(plain, handed)
    assert same_bits(plain_stats["batch_stats"], seen["batch_stats"])
    assert same_bits(seen["batch_stats"], variables["batch_stats"]) == (not train)
    assert MOMENTS not in plain_stats

    flat = np.float64(x).reshape(-1, 6)
    np.testing.assert_allclose(seen[MOMENTS]["mean"], flat.mean(0), atol=1e-5)
    np.testing.assert_allclose(seen[MOMENTS]["var"], flat.var(0), rtol=1e-5)


def test_a_networks_variables_hold_no_moments_and_its_moments_one_pair_a_layer():
    x = normal(1, 2, 8, 8, 3)
    variables = fill(CIFAR, x, 0)
    assert set(variables) == {"params", "batch_stats"}
    _, seen = jax.eval_shape(lambda v, x: CIFAR.apply(v, x, False, mutable=[MOMENTS]), variables, x)
    assert jax.tree.structure(seen[MOMENTS]) == jax.tree.structure(variables["batch_stats"])


def test_gradients_flow_through_the_handed_out_moments():
    x, variables = normal(0, 3, 2, 2, 2), norm_variables(2)

    @jax.jit
    def weighted(x):
        _, seen = BatchNorm().apply(variables, x, False, mutable=[MOMENTS])
        mean, var = seen[MOMENTS]["mean"], seen[MOMENTS]["var"]
        return jnp.sum(mean * jnp.array([1.0, -2.0])) + jnp.sum(var * jnp.array([3.0, 0.5]))

    check_grads(weighted, (x,), order=1, modes=["rev"], eps=1e-2, atol=1e-2, rtol=1e-2)


def test_moments_are_exact_where_the_mean_dwarfs_the_deviation():
    x = np.float32(100 + 1e-2 * np.random.default_rng(0).normal(size=(64, 4, 4, 2)))
    variables = {"batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    module = BatchNorm(affine=False)
    out, seen = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats", MOMENTS]))(
        variables, x
    )
    flat = np.float64(x).reshape(-1, 2)
    np.testing.assert_allclose(seen[MOMENTS]["mean"], flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen[MOMENTS]["var"], flat.var(0), rtol=1e-3)
    expected = (np.float64(x) - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=5e-3)


def test_batch_norm_over_shards_is_that_of_the_whole_batch():
    x, variables = 2 * normal(0, 8, 3, 5, 6) + 1, norm_variables(6)
    x[:4] += 3  # unlike shards
    mutable = ["batch_stats", MOMENTS]
    whole, whole_new = jax.jit(lambda v, x: BatchNorm().apply(v, x, True, mutable=mutable))(
        variables, x
    )
    module = BatchNorm(axis_name="devices")
    split, split_new = jax.jit(
        jax.vmap(
            lambda v, x: module.apply(v, x, True, mutable=mutable),
            in_axes=(None, 0),
            axis_name="devices",
        )
    )(variables, x.reshape(4, 2, 3, 5, 6))
    np.testing.assert_allclose(split.reshape(x.shape), whole, atol=1e-5)
    for a, b in zip(jax.tree.leaves(split_new), jax.tree.leaves(whole_new), strict=True):
        np.testing.assert_allclose(a, np.broadcast_to(b, (4, 6)), rtol=1e-4, atol=1e-5)


# Pixels folded into rows of 256 values, into shorter ones, and not at all.
@pytest.mark.parametrize("shape", [(3, 8, 8, 16), (4, 2, 4, 6), (4, 3, 5, 6), (2, 1, 2, 300)])
def test_batch_norm_equals_flax_batch_norm_and_so_do_its_gradients(shape):
    x, weight = 2 * normal(0, *shape) + 1, normal(1, *shape)
    variables = norm_variables(shape[-1])
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)

    def run(apply):
        def loss(params, x):
            out, new = apply({**variables, "params": params}, x)
            return jnp.sum(out * weight), (out, new)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    ours = run(lambda v, x: BatchNorm().apply(v, x, True, mutable=["batch_stats"]))
    theirs = run(lambda v, x: flax.apply(v, x, mutable=["batch_stats"]))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_bfloat16_keeps_its_moments_float32():
    x, variables = jnp.bfloat16(normal(0, 4, 3, 5, 6)), norm_variables(6)
    out, new = jax.eval_shape(
        lambda v, x: BatchNorm().apply(v, x, True, mutable=["batch_stats", MOMENTS]), variables, x
    )
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


# Convolutions


@pytest.mark.parametrize(("size", "kernel"), [(6, 3), (7, 3), (6, 1), (10, 7)])
def test_a_stride_2_convolution_pads_as_pytorch(size, kernel):
    x, weights = normal(0, 2, size, size, 3), normal(1, kernel, kernel, 3, 2)
    out = jax.jit(lambda x, k: conv(x, k, 2))(x, weights)
    expected = numpy_conv(x, weights, 2)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_upsample_conv_equals_upsampling_then_convolving_and_so_do_its_gradients():
    x, kernel, weight = normal(0, 2, 4, 3, 5), normal(1, 3, 3, 5, 2), normal(2, 2, 8, 6, 2)

    def plain(x, kernel):
        return conv(x.repeat(2, axis=1).repeat(2, axis=2), kernel)

    out = jax.jit(upsample_conv)(x, kernel)
    expected = numpy_conv(x.repeat(2, axis=1).repeat(2, axis=2), kernel)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    grads, plain_grads = (
        jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) * weight), (0, 1)))(x, kernel)
        for f in (upsample_conv, plain)
    )
    for grad, expected in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-4)


def test_transposed_conv_equals_flaxs_and_so_do_its_gradients():
    x, kernel, weight = normal(0, 2, 4, 3, 5), normal(1, 3, 3, 5, 2), normal(2, 2, 8, 6, 2)

    def flaxs(x, kernel):
        module = nn.ConvTranspose(2, (3, 3), (2, 2), "SAME", use_bias=False)
        return module.apply({"params": {"kernel": kernel}}, x)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda x, k, f=f: jnp.sum(f(x, k) * weight), (0, 1)))(x, kernel)
        for f in (transposed_conv, flaxs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize("batch", [1, 6, 34])  # images the weight gradient takes at a time: 1, 6, 2
@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding"),
    [
        ((8, 8), 3, 1, ()),
        ((7, 6), 3, 2, ()),
        ((8, 6), 3, 2, ()),
        ((10, 13), 7, 2, ()),
        ((9, 8), 1, 2, ()),
        ((5, 4), 2, 1, ((1, 0), (0, 1))),
    ],
)
def test_a_convolutions_gradients_are_jaxs_own(batch, shape, size, stride, padding):
    x, kernel = normal(0, batch, *shape, 3), normal(1, size, size, 3, 5)
    edges = padding or [(size // 2, size // 2)] * 2

    def jaxs(x, kernel):
        order = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, edges, dimension_numbers=order)

    def loss(convolve):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k))), (0, 1)))

    found = loss(lambda x, k: conv(x, k, stride, padding))(x, kernel)
    expected = loss(jaxs)(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5), (2, 1)])
@pytest.mark.parametrize(("size", "padding"), [(3, ()), (1, ()), (2, ((1, 0), (0, 1)))])
def test_a_convolution_to_few_channels_and_its_gradients_are_jaxs_own(
    inputs, outputs, size, padding
):
    """Of images large enough that a CPU takes matrix products."""
    x, kernel = normal(0, 3, 9, 8, inputs), normal(1, size, size, inputs, outputs)
    edges = padding or [(size // 2, size // 2)] * 2

    def jaxs(x, kernel):
        order = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), edges, dimension_numbers=order)

    def both(convolve):
        def loss(x, kernel):
            out = convolve(x, kernel)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    ours = both(lambda x, k: conv(x, k, padding=padding))
    if jax.default_backend() == "cpu":
        assert ours.lower(x, kernel).as_text().count("stablehlo.dot_general") > 0
    found, expected = ours(x, kernel), both(jaxs)(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_images_of_8x8_pixels_are_convolved_as_ever():
    text = jax.jit(conv).lower(normal(0, 3, 8, 8, 5), normal(1, 3, 3, 5, 3)).as_text()
    assert "stablehlo.dot_general" not in text


def test_a_convolution_of_bfloat16_to_few_channels_is_rounded_once():
    x, kernel = normal(0, 3, 9, 8, 5), normal(1, 3, 3, 5, 3)
    out = jax.jit(conv)(jnp.bfloat16(x), kernel)
    assert out.dtype == jnp.bfloat16
    rounded = (np.float32(jnp.bfloat16(a)) for a in (x, kernel))
    np.testing.assert_allclose(np.float32(out), numpy_conv(*rounded), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda x, k: in_a_loop(f, x, k)])
def test_on_a_cpu_every_convolution_is_in_the_order_of_the_fast_path(transform):
    """One that is not takes a hundred times as long inside a loop."""
    x, kernel = normal(0, 4, 6, 6, 3), normal(1, 3, 3, 3, 5)

    def grads(x, kernel):
        return jax.grad(lambda x, k: jnp.sum(conv(jnp.sin(conv(x, k)), k.swapaxes(2, 3))), (0, 1))(
            x, kernel
        )

    text = jax.jit(transform(grads)).lower(x, kernel).as_text()
    orders = set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert "window_reversal" not in text


def in_a_loop(f, x, kernel):
    return jax.lax.map(lambda scale: f(scale * x, kernel), jnp.arange(3.0))


def test_convolutions_start_with_he_variance_over_the_outputs():
    kernel = jax.jit(lambda key: Conv(128, size=3).init(key, jnp.zeros((1, 4, 4, 64))))(
        jax.random.key(0)
    )["params"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert abs(float(kernel.mean())) < 1e-3

"""State dicts in and out: every family's names, what is refused, damaged files."""

import io
import json
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models import fill, numpy_conv, numpy_norm, same_bits

from skd_jax import steps, weights
from skd_jax.config import Model
from skd_jax.errors import UserError
from skd_jax.models import Classifier, grow_head
from skd_jax.state import Network

PYCIL = {"stem": ("conv_1_3x3", "bn_1"), "stage": "stage_", "layers": ("conv_{}", "bn_{}", "ab")}
SHORTCUT = ("downsample.0", "downsample.1")
CIFAR, IMAGENET, BOTTLENECK = (1, 1, 1), (1, 1, 1, 1), (3, 4, 6, 3)


def state_dict(
    blocks: tuple[int, ...] = CIFAR,
    width: int = 4,
    channels: int = 3,
    classes: int = 5,
    *,
    body: str = "",
    stem: tuple[str, str] = ("conv1", "bn1"),
    stage: str = "layer",
    layers: tuple[str, str, str] = ("conv{}", "bn{}", "123"),
    shortcut: tuple[str, str] | None = SHORTCUT,
    head: str = "fc",
    cosine: bool = False,
    split: int = 0,
    unused: int = 0,
    counters: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A state dict as PyTorch has it, with every number drawn.

    Args:
      blocks: of each stage; four make a 7x7 stem, and of BOTTLENECK's number bottlenecks.
      width: of the first stage.
      channels: of the images.
      classes: of the head.
      body: prefix of all but the head.
      stem: names of its convolution and BN.
      stage: what a stage is called, without its number.
      layers: names of a block's convolutions and BNs, and what numbers them.
      shortcut: names of its layers, or None without parameters.
      head: its name.
      cosine: whether it has a sigma in place of a bias.
      split: outputs of fc1; 0: the head is one.
      unused: outputs of PyCIL's unused head.
      counters: whether BN has counters.
      seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    state: dict[str, np.ndarray] = {}

    def draw(*shape: int) -> np.ndarray:
        spread = (2 / max(np.prod(shape[1:]), 1)) ** 0.5
        return rng.normal(0, spread, shape).astype(np.float32)

    def conv(name: str, out: int, inputs: int, size: int) -> None:
        state[f"{body}{name}.weight"] = draw(out, inputs, size, size)

    def norm(name: str, out: int) -> None:
        name = f"{body}{name}"
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = rng.normal(0, 0.2, out).astype(np.float32)
        if counters:
            state[f"{name}.num_batches_tracked"] = np.array(rng.integers(1, 99))

    bottleneck = blocks == BOTTLENECK
    conv(stem[0], width, channels, 7 if len(blocks) == 4 else 3)
    norm(stem[1], width)
    inputs = width
    for s, count in enumerate(blocks):
        inner = width * 2**s
        out = 4 * inner if bottleneck else inner
        for b in range(count):
            name = f"{stage}{s + 1}.{b}."
            shapes = ((inner, 1), (inner, 3), (out, 1)) if bottleneck else ((out, 3), (out, 3))
            before = inputs
            for end, (channels_, size) in zip(layers[2], shapes, strict=False):
                conv(name + layers[0].format(end), channels_, before, size)
                norm(name + layers[1].format(end), channels_)
                before = channels_
            if shortcut and inputs != out:
                conv(name + shortcut[0], out, inputs, 1)
                norm(name + shortcut[1], out)
            inputs = out
    if unused:
        state[f"{body}fc.weight"], state[f"{body}fc.bias"] = draw(unused, inputs), draw(unused)
    if split:
        state[f"{head}.fc1.weight"] = draw(split, inputs)
        state[f"{head}.fc2.weight"] = draw(classes - split, inputs)
    else:
        state[f"{head}.weight"] = draw(classes, inputs)
    state[f"{head}.{'sigma' if cosine else 'bias'}"] = draw(1 if cosine else classes) + 2
    return state


FAMILIES = {
    "chenyaofo": (state_dict(), Model("cifar", 8, 4, 0.9, "float32")),
    "lucir": (
        state_dict((2, 2, 2), cosine=True, body="module.", head="module.fc"),
        Model("cifar", 14, 4, 0.9, "float32", last_relu=False, head="cosine"),
    ),
    "lucir, later": (
        state_dict(cosine=True, split=3, channels=1),
        Model("cifar", 8, 4, 0.9, "float32", last_relu=False, head="cosine"),
    ),
    "akamaster A": (
        state_dict(shortcut=None, head="module.linear", body="module."),
        Model("cifar", 8, 4, 0.9, "float32", shortcut="pad"),
    ),
    "akamaster B": (
        state_dict(shortcut=("shortcut.0", "shortcut.1"), head="linear", counters=False),
        Model("cifar", 8, 4, 0.9, "float32"),
    ),
    "pycil": (
        state_dict(**PYCIL, shortcut=None, body="convnet.", unused=10),
        Model("cifar", 8, 4, 0.9, "float32", shortcut="pad_end"),
    ),
    "pycil, cosine": (
        state_dict(
            **PYCIL,
            shortcut=("downsample.conv", "downsample.bn"),
            **{"body": "module.convnet.", "head": "module.fc", "cosine": True, "split": 2},
        ),
        Model("cifar", 8, 4, 0.9, "float32", last_relu=False, head="cosine"),
    ),
    "pycil, imagenet": (
        state_dict(IMAGENET, stem=("conv1.0", "conv1.1"), body="convnet.", unused=7),
        Model("imagenet", 10, 4, 0.9, "float32"),
    ),
    "torchvision": (
        state_dict((2, 2, 2, 2), body="backbone.", head="classifier"),
        Model("imagenet", 18, 4, 0.9, "float32"),
    ),
    "torchvision, without parameters in shortcuts": (
        state_dict(IMAGENET, shortcut=None),
        Model("imagenet", 10, 4, 0.9, "float32", shortcut="pad"),
    ),
    "torchvision, bottlenecks": (
        state_dict(BOTTLENECK, width=2, channels=1),
        Model("imagenet", 50, 2, 0.9, "float32"),
    ),
}


@pytest.fixture
def saved(tmp_path):
    """Saves a state dict and gives the path."""

    def save(state: dict[str, np.ndarray], name: str = "old.safetensors"):
        save_file(state, tmp_path / name)
        return tmp_path / name

    return save


def refused(path, **kwargs) -> str:
    """The one line that a file is refused with, which begins with the path."""
    with pytest.raises(UserError) as caught:
        weights.read(path, **kwargs)
    text = str(caught.value)
    assert text.startswith(str(path)) and len(text.splitlines()) == 1 + len(caught.value.fix)
    return text.removeprefix(f"{path}").lstrip(": ")


def changed(state: dict[str, np.ndarray], **new: np.ndarray | None) -> dict[str, np.ndarray]:
    """A state dict with tensors replaced, added or (None) left out."""
    state = {**state, **{name.replace("__", "."): array for name, array in new.items()}}
    return {name: array for name, array in state.items() if array is not None}


# In, and out again


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_file_comes_in_and_goes_out_the_same_to_the_bit(family, saved, tmp_path):
    state, model = FAMILIES[family]
    found = weights.read(saved(state))
    assert found.model == model
    assert found.channels == next(x.shape[1] for x in state.values() if x.ndim == 4)
    assert found.classes == 5
    weights.write(tmp_path / "new.safetensors", found.network, found.names)
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == state.keys()
    for name, array in state.items():
        assert written[name].dtype == array.dtype and written[name].shape == array.shape
        assert np.array_equal(written[name], array), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_head_is_written_under_the_same_names(family, saved, tmp_path):
    state, _ = FAMILIES[family]
    found = weights.read(saved(state))
    longer = found.network.replace(params=grow_head(found.network.params, jax.random.key(0), 3))
    weights.write(tmp_path / "new.safetensors", longer, found.names)
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == state.keys()
    [head] = {n.rpartition(".")[0] for n in state if n.endswith("sigma")} or {
        n.rpartition(".")[0] for n, x in state.items() if x.shape == (5,)
    }
    old, new = (
        np.concatenate([x for n, x in sorted(tensors.items()) if n.startswith(head) and x.ndim > 1])
        for tensors in (state, written)
    )
    assert new.shape == (8, old.shape[1]) and np.array_equal(new[:5], old)
    if f"{head}.fc1.weight" in written:  # the first part has all that were there
        assert len(written[f"{head}.fc1.weight"]) == 5
    if f"{head}.bias" in written:
        assert np.array_equal(written[f"{head}.bias"], np.append(state[f"{head}.bias"], [0] * 3))
    for name in (name for name in state if not name.startswith(f"{head}.")):
        assert np.array_equal(written[name], state[name]), name
    again = weights.read(tmp_path / "new.safetensors")
    assert again.classes == 8 and same_bits(again.network, longer)


SIZES = ("cifar", 8), ("imagenet", 10)


def test_a_network_of_ones_own_goes_out_and_comes_in(tmp_path):
    shortcuts = [(*size, {"shortcut": kind}) for size in SIZES for kind in ("pad_end", "pad")]
    for family, depth, kinds in (*shortcuts, ("cifar", 8, {"head": "cosine"})):
        last_relu = "head" not in kinds
        model = Model(family, depth, 4, 0.9, "float32", last_relu=last_relu, **kinds)
        classifier = Classifier(steps.networks(model).features, 3, model.head)
        network = Network(**fill(classifier, np.zeros((1, 8, 8, 1)), seed=0))
        weights.write(tmp_path / "own.safetensors", network, weights.names_of(model))
        found = weights.read(tmp_path / "own.safetensors")
        assert (found.model, found.channels, found.classes) == (model, 1, 3)
        assert same_bits(found.network, network)
    written = load_file(tmp_path / "own.safetensors")
    assert written["layer2.0.downsample.1.num_batches_tracked"].dtype == np.int64


def test_the_last_relu_is_as_told(saved):
    linear, cosine = saved(FAMILIES["chenyaofo"][0], "1.safetensors"), saved(FAMILIES["lucir"][0])
    for path, default in ((linear, True), (cosine, False)):
        assert weights.read(path).model.last_relu is default
        assert weights.read(path, last_relu=not default).model.last_relu is not default


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_point_numbers_become_float32(dtype, saved, tmp_path):
    state, _ = FAMILIES["pycil"]
    state = {n: x.astype(dtype) if x.dtype.kind == "f" else x for n, x in state.items()}
    found = weights.read(saved(state))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.network)} == {np.dtype(np.float32)}
    weights.write(tmp_path / "new.safetensors", found.network, found.names)
    for name, array in load_file(tmp_path / "new.safetensors").items():
        assert array.dtype == (np.int64 if name.endswith("tracked") else np.float32)
        assert np.array_equal(array, state[name].astype(array.dtype))


# What the networks compute


def logits_of(found: weights.Weights, images: np.ndarray) -> np.ndarray:
    nets = steps.networks(found.model)
    classifier = nets.classifier(found.network.params)
    return jax.jit(lambda v, x: classifier.apply(v, x, False)[1])(found.network.variables(), images)


def in_numpy(state, images, layers: dict, pads: tuple[bool, bool], last_relu: bool) -> np.ndarray:
    """Features of a CIFAR network of one block a stage, by the tensors' own names.

    Args:
      state: the state dict.
      images: NHWC.
      layers: names of the stem, and of a block with {} for the stage's number.
      pads: whether new channels of zeros come before and after.
      last_relu: of the last block.
    """

    def conv(x, name: str, stride: int = 1) -> np.ndarray:
        return numpy_conv(x, state[f"{name}.weight"].transpose(2, 3, 1, 0), stride)

    def norm(x, name: str) -> np.ndarray:
        affine = {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}
        stats = {"mean": state[f"{name}.running_mean"], "var": state[f"{name}.running_var"]}
        return numpy_norm(x, affine, stats)

    x = np.maximum(norm(conv(images, layers["stem"][0]), layers["stem"][1]), 0)
    for stage in (1, 2, 3):
        conv1, bn1, conv2, bn2 = (name.format(stage) for name in layers["block"])
        stride = 2 if stage > 1 else 1
        y = np.maximum(norm(conv(x, conv1, stride), bn1), 0)
        y = norm(conv(y, conv2), bn2)
        shortcut = x[:, ::stride, ::stride]
        if stage > 1:
            zeros = np.zeros((*shortcut.shape[:3], shortcut.shape[3] // sum(pads)))
            parts = [zeros] * pads[0] + [shortcut] + [zeros] * pads[1]
            shortcut = np.concatenate(parts, axis=-1)
        x = shortcut + y
        x = np.maximum(x, 0) if stage < 3 or last_relu else x
    return x.mean((1, 2))


@pytest.mark.parametrize("size", [8, 9])
def test_akamasters_logits_equal_numpys(size, saved):
    state, _ = FAMILIES["akamaster A"]
    images = np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)
    block = ("conv1", "bn1", "conv2", "bn2")
    names = {
        "stem": ("module.conv1", "module.bn1"),
        "block": tuple(f"module.layer{{}}.0.{layer}" for layer in block),
    }
    features = in_numpy(state, images, names, (True, True), last_relu=True)
    expected = features @ state["module.linear.weight"].T + state["module.linear.bias"]
    np.testing.assert_allclose(logits_of(weights.read(saved(state)), images), expected, atol=1e-4)


def test_pycils_cosine_logits_equal_numpys(saved):
    state = state_dict(**PYCIL, shortcut=None, body="convnet.", channels=1, cosine=True, split=2)
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
    block = ("conv_a", "bn_a", "conv_b", "bn_b")
    names = {
        "stem": ("convnet.conv_1_3x3", "convnet.bn_1"),
        "block": tuple(f"convnet.stage_{{}}.0.{layer}" for layer in block),
    }
    features = in_numpy(state, images, names, (False, True), last_relu=False)
    rows = np.concatenate([state["fc.fc1.weight"], state["fc.fc2.weight"]])
    cosines = features @ rows.T / np.linalg.norm(features, axis=1)[:, None]
    expected = state["fc.sigma"] * cosines / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(logits_of(weights.read(saved(state)), images), expected, atol=1e-4)


# What is refused


def test_what_is_no_file_is_refused(tmp_path):
    assert refused(tmp_path / "none.safetensors") == "there is no such file"
    assert refused(tmp_path / "none.pt") == "there is no such file"
    assert "is a folder" in refused(tmp_path)
    for content in (
        b"",
        b"\x00" * 7,
        b"GIF89a..",
        b"\xff" * 8 + b"{",
        b"\x80" + b"\x00" * 7 + b"{",
    ):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert "is damaged, or no safetensors file" in refused(tmp_path / "a.safetensors")


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "A.PT", "a.safetensors", "a"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_refused_by_suffix_and_by_content_and_told_how_to_turn(name, zipped, tmp_path):
    data = pickle.dumps({"fc.weight": Evil(str(tmp_path / "ran"))}, protocol=2)
    if zipped:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("archive/data.pkl", data)
        data = stream.getvalue()
    (tmp_path / name).write_bytes(data)
    text = refused(tmp_path / name)
    assert "is not opened" in text and "weights_only=True" in text
    lines = text.splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("  ")
        compile(line.strip(), "line", "exec")
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_file_under_pytorchs_suffix_is_not_opened_either(saved):
    assert "is not opened" in refused(saved(FAMILIES["chenyaofo"][0], "a.pt"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["features.0.weight", "features.0.bias"], "no batch normalisation among its tensors"),
        (["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "blocks.0.attn.qkv.weight"),
        (["features.0.0.weight", "features.0.1.running_mean"], "(features.0.0.weight, features"),
        ([f"x{i}.running_mean" for i in range(9)], "x4.running_mean and 4 more) are no ResNet's"),
        (["a\nb.running_mean", "c" * 200], r"'a\nb.running_mean', ccc"),
        ([], "no batch normalisation among its tensors (none)"),
    ],
)
def test_another_network_is_refused_by_some_of_its_names(names, said, saved):
    text = refused(saved({name: np.zeros((2, 2), np.float32) for name in names}))
    assert said in text and "supported are ResNets with batch normalisation" in text


CHENYAOFO = FAMILIES["chenyaofo"][0]
TORCHVISION = FAMILIES["torchvision"][0]
ZERO = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({n: x for n, x in CHENYAOFO.items() if "running" not in n}, "no batch normalisation"),
        (changed(CHENYAOFO, conv1__weight=None), "conv1.weight is missing"),
        (changed(CHENYAOFO, layer2__0__bn1__bias=None), "missing: layer2.0.bn1.bias;"),
        (changed(CHENYAOFO, layer3__0__downsample__0__weight=None), "missing: layer3.0.downsample"),
        (changed(CHENYAOFO, fc__bias=None), "tensors are missing: fc.bias"),
        (changed(CHENYAOFO, fc__weight=None, fc__bias=None), "it has no head, such as fc.weight"),
        (changed(CHENYAOFO, aux__weight=np.zeros((2, 16))), "several heads (aux, fc)"),
        (changed(CHENYAOFO, fc__scale=ZERO), "there are tensors too many: fc.scale;"),
        (changed(CHENYAOFO, layer1__0__se__weight=ZERO), "too many: layer1.0.se.weight"),
        (changed(CHENYAOFO, x__num_batches_tracked=ZERO), "too many: x.num_batches_tracked"),
        (changed(CHENYAOFO, fc__weight=np.zeros((5, 8))), "fc.weight has the shape [5, 8], not [c"),
        (changed(CHENYAOFO, fc__weight=np.zeros((0, 16))), "fc.weight has the shape [0, 16], not"),
        (changed(CHENYAOFO, fc__bias=np.zeros(4)), "fc.bias has the shape [4], not [5]"),
        (
            changed(CHENYAOFO, layer1__0__conv1__weight=np.zeros((4, 4, 5, 5))),
            "layer1.0.conv1.weight has the shape [4, 4, 5, 5], not [4, 4, 3, 3]",
        ),
        (
            changed(CHENYAOFO, bn1__num_batches_tracked=np.zeros(2, np.int64)),
            "bn1.num_batches_tracked has the shape [2], not []",
        ),
        (state_dict(channels=4), "conv1.weight is [4, 4, 3, 3], not the kernel of a 3x3 or 7x7"),
        (changed(CHENYAOFO, conv1__weight=np.zeros((4, 3, 3))), "conv1.weight is [4, 3, 3], not"),
        (changed(CHENYAOFO, conv1__weight=np.zeros((0, 3, 3, 3))), "conv1.weight is [0, 3, 3, 3]"),
        (
            changed(TORCHVISION, backbone__conv1__weight=np.zeros((4, 3, 3, 3))),
            "it has a 3x3 stem and 4 stages",
        ),
        (
            changed(CHENYAOFO, conv1__weight=np.zeros((4, 3, 7, 7))),
            "it has a 7x7 stem and 3 stages",
        ),
        (state_dict((1, 2, 1)), "its stages have 1, 2, 1 blocks"),
        (state_dict((3, 4, 5, 3)), "its stages have 3, 4, 5, 3 blocks"),
        (
            changed(TORCHVISION, backbone__layer2__0__downsample__0__weight=None),
            "missing: backbone.layer2.0.downsample.0.weight;",
        ),
        ({**CHENYAOFO, **state_dict(body="two.", head="two.fc")}, "several networks begin in it"),
        (
            changed(state_dict(cosine=True, split=2), fc__fc2__weight=None),
            "tensors are missing: fc.weight",
        ),
        (changed(state_dict(cosine=True), fc__sigma=np.zeros(2)), "fc.sigma has the shape [2]"),
    ],
)
def test_a_network_that_is_not_supported_is_told_why_and_what_is(state, said, saved):
    text = refused(saved(state))
    assert said in text
    assert "supported are ResNets" in text or "give a file of one" in text


def test_numbers_that_are_not_finite_are_refused_by_name(saved):
    for bad in (np.nan, np.inf, 1e300):
        bias = np.array([0, 0, bad, 0, 0])
        assert "not finite in fc.bias;" in refused(saved(changed(CHENYAOFO, fc__bias=bias)))
    minus = np.array([1, 1, -1, 1], np.float32)
    text = refused(saved(changed(CHENYAOFO, bn1__running_var=minus)))
    assert "a variance is negative in bn1.running_var" in text


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, saved):
    state = changed(CHENYAOFO, fc__bias=np.ones(5, dtype))
    assert "fc.bias is of type" in refused(saved(state))


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(saved, tmp_path):
    found = weights.read(saved(CHENYAOFO))
    missing = tmp_path / "no folder" / "new.safetensors"
    with pytest.raises(UserError, match=r"no folder/new\.safetensors cannot be written"):
        weights.write(missing, found.network, found.names)
    folder = tmp_path / "new.safetensors"
    folder.mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        weights.write(folder, found.network, found.names)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["new.safetensors", "old.safetensors"]


# Damaged files


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bytes of its header, or of all of it, changed, cut out or put in."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:  # a header that is valid JSON and lies
        header = json.loads(data[8 : 8 + length])
        name = rng.choice([name for name in header if name != "__metadata__"])
        what = rng.integers(5)
        huge = int(rng.choice([0, 1, 2**31, 2**40, 2**62, 2**63 - 1]))
        if what == 0:
            header[name]["shape"] = [huge, *header[name]["shape"][1:]]
        elif what == 1:
            header[name]["data_offsets"] = [0, huge]
        elif what == 2:
            header[name]["shape"], header[name]["data_offsets"] = [huge, 0], [0, 0]
        elif what == 3:
            header[name]["dtype"] = str(rng.choice(["F64", "I8", "F8_E4M3", "F4", "BOOL", "U64"]))
        else:
            header[str(rng.choice(["", "fc", "layer1.0.", "layer3.9999999.x"]))] = header.pop(name)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        where = int(rng.integers(8 + length if rng.random() < 0.8 else len(changed)))
        kind = rng.integers(4)
        if kind == 0:
            changed[where] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[where : where + int(rng.integers(1, 20))]
        elif kind == 2:
            changed[where:where] = rng.bytes(int(rng.integers(1, 20)))
        else:
            changed[where : where + 1] = b"\xff"
    return bytes(changed)


def fuzz(path, mutations: int, seed: int) -> tuple[int, int]:
    """(how many mutated files were read, how many refused)."""
    sound, rng, read = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(mutations):
        path.write_bytes(mutated(sound, rng))
        try:
            found = weights.read(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            read += 1
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found.network))
            assert isinstance(found.network, Network)
    return read, mutations - read


@pytest.mark.parametrize("family", ["chenyaofo", "pycil, cosine"])
def test_a_mutated_file_is_read_or_refused_in_one_line(family, saved):
    read, refused = fuzz(saved(FAMILIES[family][0]), 100, seed=1)
    assert read and refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_mutated_files_are_read_or_refused_in_one_line(family, saved):
    fuzz(saved(FAMILIES[family][0]), 300, seed=2)

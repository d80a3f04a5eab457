"""Weights of PyTorch ResNets: safetensors files in, and out again under the names they came with.

The architecture is read off the tensors' names and shapes; nothing is unpickled. What a state dict
may come from:

- torchvision's ResNets, and LUCIR's for ImageNet: a 7x7 stem and four stages;
- the CIFAR ResNets of LUCIR, PyCIL, akamaster and chenyaofo: a 3x3 stem and three stages.

Head and body may have any prefix. A bottleneck's stride is taken to be in its 3x3 convolution,
which no tensor tells.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import steps, tensors
from skd_jax.config import Model
from skd_jax.errors import UserError
from skd_jax.models import IMAGENET, Classifier
from skd_jax.paths import given_path
from skd_jax.state import Network
from skd_jax.tensors import Shape, listed

Shapes = Mapping[str, Shape]

_SUPPORTED = (
    "supported are ResNets with batch normalisation: a 7x7 stem and four stages (torchvision's; "
    f"depth {', '.join(map(str, IMAGENET))}), or a 3x3 stem and three stages (depth 6n + 2, up to "
    "1202), as torchvision, LUCIR, PyCIL, akamaster or chenyaofo name their tensors, with one "
    "linear or cosine head"
)
_LEAVES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias", "sigma": "sigma"},
    **{"mean": "running_mean", "var": "running_var"},
}
_COUNTER = "num_batches_tracked"
_STEMS = (("conv1", "bn1"), ("conv1.0", "conv1.1"), ("conv_1_3x3", "bn_1"))
_SHORTCUTS = (
    *(("downsample.0", "downsample.1"), ("shortcut.0", "shortcut.1")),
    ("downsample.conv", "downsample.bn"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """What a file calls the parts of a network.

    Attributes:
      body: what the names of the feature extractor begin with: "", "module.", "convnet." ...
      stage: what stands before a stage's number: "layer" or "stage_".
      layers: the stem's layers and those of a block, by our names for them: "conv1" may be
        "conv_a", "conv_shortcut" "downsample.0".
      head: the head's whole name, "fc" or "module.linear", for instance.
      split: numbers of outputs of ``fc1`` and ``fc2``, if the head has these two parts; else ().
      sigma: shape of a cosine head's sigma.
      kept: what is written as it came: batch normalisation's counters, and a head that is not used.
    """

    body: str
    stage: str
    layers: Mapping[str, str]
    head: str
    split: tuple[int, ...] = ()
    sigma: Shape = (1,)
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def of(self, path: Iterable[Any]) -> str:
        """The tensor that holds the leaf of a :class:`Network` at a key path."""
        *parts, leaf = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        if "head" in parts:
            return f"{self.head}.{_LEAVES[leaf]}"
        layer = f"{self.layers[parts[-1]]}.{_LEAVES[leaf]}"
        block = re.fullmatch(r"stage(\d+)_block(\d+)", parts[-2])
        if not block:
            return f"{self.body}{layer}"
        return f"{self.body}{self.stage}{block[1]}.{int(block[2]) - 1}.{layer}"


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What a file holds.

    Attributes:
      model: the architecture.
      network: the classifier's float32 variables.
      channels: of its images, 1 or 3.
      classes: K, outputs of its head.
      names: what :func:`write` needs to give every tensor its name again.
    """

    model: Model
    network: Network
    channels: int
    classes: int
    names: Names


class _Refused(Exception):
    """What is wrong with a file, without its path."""


def read(path: str | Path, last_relu: bool | None = None) -> Weights:
    """Reads a state dict of a PyTorch ResNet that was saved as safetensors.

    Args:
      path: of the file.
      last_relu: whether the last block ends in a ReLU, which no tensor tells. None: it does if the
        head is linear, and does not, as in LUCIR and PyCIL, if it is a cosine head.

    Raises:
      UserError: it is no such file, or of a network that is not supported; the message names the
        tensors.
    """
    path = given_path(path)
    header = tensors.header(path)
    shapes = {name: shape for name, (shape, _) in header.items()}
    try:
        model, names, unused = _architecture(shapes)
        if last_relu is None:
            last_relu = model.head == "linear"
        model = dataclasses.replace(model, last_relu=last_relu)
        channels = shapes[_stem(names)][1]
        classes = sum(_outputs(names, steps.networks(model).features.num_features, shapes))
        tree = _shapes(model, channels, classes)
        wanted = _wanted(tree, names)
        kept = _compare(wanted, _counters(tree, names), unused, shapes)
        for name in (*wanted, *kept):
            kind = header[name][1]
            if kind not in tensors.FLOATS and not (name.endswith(_COUNTER) and kind[0] in "IU"):
                raise _Refused(
                    f"{listed([name])} is of type {kind}; give float16, bfloat16, float32 or "
                    "float64"
                )
    except _Refused as error:
        raise UserError(f"{path}: {error}") from error
    arrays = tensors.load(path, (*wanted, *kept))
    if bad := [n for n, x in arrays.items() if n.endswith("running_var") and np.any(x < 0)]:
        raise UserError(f"{path}: a variance is negative in {listed(bad)}; give a sound model")
    names = dataclasses.replace(names, kept={name: arrays[name] for name in kept})
    return Weights(model, _network(tree, names, arrays), channels, classes, names)


def write(path: str | Path, network: Network, names: Names) -> None:
    """Writes a network as a PyTorch state dict, float32, whole or not at all.

    The head may have more outputs than the file that ``names`` came from. If it has two parts, the
    first then holds all that were there and the second the new ones.

    Args:
      path: of the file, which is replaced if it exists.
      network: a classifier's variables.
      names: of :func:`read` or :func:`names_of`.

    Raises:
      UserError: it cannot be written.
    """
    arrays = dict(names.kept)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(network):
        array = np.asarray(leaf, np.float32)
        arrays[names.of(keys)] = array.transpose(_order(array.ndim))
    if (sigma := f"{names.head}.sigma") in arrays:
        arrays[sigma] = arrays[sigma].reshape(names.sigma)
    if names.split:
        weight, old = arrays.pop(f"{names.head}.weight"), sum(names.split)
        first = names.split[0] if len(weight) == old else old
        parts = weight[:first], weight[first:]
        arrays |= dict(zip(_head_weights(names), parts, strict=True))
    tensors.write(given_path(path), arrays)


def names_of(model: Model) -> Names:
    """Names for a network of our own: torchvision's; with "pad_end" shortcuts, PyCIL's."""
    stem, shortcut = _STEMS[0], _SHORTCUTS[0]
    names = Names("", "layer", _layers("layer", stem, shortcut), "fc")
    if model.shortcut == "pad_end":
        names = Names("", "stage_", _layers("stage_", _STEMS[2], shortcut), "fc")
    zero = np.zeros((), np.int64)
    counters = _counters(_shapes(model, channels=3, classes=1), names)
    return dataclasses.replace(names, kept={name: zero for name in counters})


def _architecture(shapes: Shapes) -> tuple[Model, Names, list[str]]:
    """(model, names, tensors of a head that nothing uses) of a state dict."""
    found = (re.match(r"(|.*?\.)(layer|stage_)1\.0\.", name, re.DOTALL) for name in shapes)
    bodies = sorted({(match[1], match[2]) for match in found if match})
    if not any(name.endswith("running_mean") for name in shapes):
        what = f"no batch normalisation among its tensors ({listed(shapes)})"
        raise _Refused(f"{what}; {_SUPPORTED}")
    if not bodies:
        raise _Refused(f"its tensors ({listed(shapes)}) are no ResNet's; {_SUPPORTED}")
    if len(bodies) > 1:
        several = listed(f"{body}{stage}1" for body, stage in bodies)
        raise _Refused(f"several networks begin in it ({several}); give a file of one")
    [(body, stage)] = bodies
    stems = [stem for stem in _STEMS if f"{body}{stem[0]}.weight" in shapes]
    stem = stems[0] if stems else _STEMS[2 if stage == "stage_" else 0]
    shortcut, kind = _shortcut(shapes, body, stage)
    layers = _layers(stage, stem, shortcut)
    names = Names(body, stage, layers, "")
    family, depth = _size(names, shapes)
    head, unused = _head(names, shapes)
    parts = [shapes.get(f"{head}.fc{part}.weight") for part in (1, 2)]
    split = tuple(shape[0] for shape in parts if shape)
    sigma = shapes.get(f"{head}.sigma")
    names = dataclasses.replace(
        names,
        head=head,
        split=split if len(split) == 2 else (),
        sigma=() if sigma == () else (1,),
    )
    width = shapes[_stem(names)][0]
    head_kind = "linear" if sigma is None else "cosine"
    model = Model(family, depth, width, 0.9, "float32", shortcut=kind, head=head_kind)
    return model, names, unused


def _layers(stage: str, stem: tuple[str, str], shortcut: tuple[str, str]) -> dict[str, str]:
    """What is called what, by our names."""
    ends = "abc" if stage == "stage_" else "123"
    layers = {"conv_stem": stem[0], "bn_stem": stem[1]}
    for number, end in enumerate(ends, 1):
        between = "_" if stage == "stage_" else ""
        layers |= {f"conv{number}": f"conv{between}{end}", f"bn{number}": f"bn{between}{end}"}
    return {**layers, "conv_shortcut": shortcut[0], "bn_shortcut": shortcut[1]}


def _shortcut(shapes: Shapes, body: str, stage: str) -> tuple[tuple[str, str], str]:
    """(names of the shortcuts' layers, kind of the shortcuts)."""
    for shortcut in _SHORTCUTS:
        layer = re.compile(rf"{re.escape(body + stage)}\d+\.\d+\.{re.escape(shortcut[0])}\.weight")
        if any(layer.fullmatch(name) for name in shapes):
            return shortcut, "conv"
    return _SHORTCUTS[0], "pad_end" if stage == "stage_" else "pad"


def _stem(names: Names) -> str:
    return f"{names.body}{names.layers['conv_stem']}.weight"


def _size(names: Names, shapes: Shapes) -> tuple[str, int]:
    """(family, depth)."""
    block = re.compile(rf"{re.escape(names.body + names.stage)}([0-9]{{1,4}})\.([0-9]{{1,4}})\.")
    places = {(int(m[1]), int(m[2])) for name in shapes if (m := block.match(name))}
    stages = max(stage for stage, _ in places)
    blocks = tuple(sum(s == stage for s, _ in places) for stage in range(1, stages + 1))
    stem = _stem(names)
    if stem not in shapes:
        raise _Refused(f"{listed([stem])} is missing; {_SUPPORTED}")
    kernel = shapes[stem][2:]
    if len(kernel) != 2 or shapes[stem][1] not in (1, 3) or not shapes[stem][0]:
        raise _Refused(
            f"{listed([stem])} is {list(shapes[stem])}, not the kernel of a 3x3 or 7x7 convolution "
            f"of 1 or 3 channels; {_SUPPORTED}"
        )
    if (kernel, stages) not in (((3, 3), 3), ((7, 7), 4)):
        size = "x".join(map(str, kernel))
        raise _Refused(f"it has a {size} stem and {stages} stages; {_SUPPORTED}")
    bottleneck = f"{names.body}{names.stage}1.0.{names.layers['conv3']}.weight" in shapes
    if stages == 3 and len(set(blocks)) == 1 and blocks[0] <= 200 and not bottleneck:
        return "cifar", 6 * blocks[0] + 2
    for depth, there in IMAGENET.items():
        if there == blocks and bottleneck == (depth >= 50):
            return "imagenet", depth
    what = "bottleneck blocks" if bottleneck else "blocks"
    raise _Refused(f"its stages have {', '.join(map(str, blocks))} {what}; {_SUPPORTED}")


def _head(names: Names, shapes: Shapes) -> tuple[str, list[str]]:
    """(name of the head, tensors of a head that nothing uses)."""
    stem = (f"{names.body}{names.layers[layer]}." for layer in ("conv_stem", "bn_stem"))
    stages = (f"{names.body}{names.stage}{digit}" for digit in "0123456789")
    own = (*stem, *stages)
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(own)}
    heads = {n.removesuffix(".weight") for n, shape in rest.items() if len(shape) == 2}
    heads = {head for head in heads if f"{head}.weight" in rest}
    for head in [name.removesuffix(".sigma") for name in rest if name.endswith(".sigma")]:
        if parts := {f"{head}.fc1", f"{head}.fc2"} & heads:
            heads = heads - parts | {head}
    unused = f"{names.body}fc"
    if len(heads) == 2 and unused in heads and names.body.endswith("convnet."):
        # PyCIL's networks end in a layer of torchvision's that they never call.
        [head] = heads - {unused}
        return head, [name for name in (f"{unused}.weight", f"{unused}.bias") if name in rest]
    if len(heads) != 1:
        what = f"several heads ({listed(heads)})" if heads else "no head, such as fc.weight"
        raise _Refused(f"it has {what}; {_SUPPORTED}")
    return heads.pop(), []


def _head_weights(names: Names) -> list[str]:
    """The tensors with the head's weights, one or two."""
    parts = ("fc1.weight", "fc2.weight") if names.split else ("weight",)
    return [f"{names.head}.{part}" for part in parts]


def _outputs(names: Names, features: int, shapes: Shapes) -> list[int]:
    """How many outputs each part of the head has."""
    outputs = []
    for name in _head_weights(names):
        shape = shapes.get(name)
        if shape is None:
            raise _Refused(f"tensors are missing: {listed([name])}; {_SUPPORTED}")
        if shape[1:] != (features,) or not shape[0]:
            raise _Refused(
                f"{listed([name])} has the shape {list(shape)}, not [classes, {features}]; "
                f"{_SUPPORTED}"
            )
        outputs.append(shape[0])
    return outputs


@functools.lru_cache(maxsize=32)
def _shapes(model: Model, channels: int, classes: int) -> Network:
    """A classifier's variables, as shapes."""
    module = Classifier(steps.networks(model).features, classes, model.head)
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    variables: Any = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), image)
    return Network(variables["params"], variables["batch_stats"])


def _counters(tree: Network, names: Names) -> list[str]:
    """The counters that PyTorch's batch normalisation may have."""
    means = jax.tree_util.tree_leaves_with_path(tree.batch_stats)
    found = {names.of(path).rpartition(".")[0] for path, _ in means}
    return sorted(f"{layer}.{_COUNTER}" for layer in found)


def _order(ndim: int, ours: bool = False) -> tuple[int, ...]:
    """The order of axes that turns our arrays into PyTorch's, or PyTorch's into ours."""
    of_kernels = (2, 3, 1, 0) if ours else (3, 2, 0, 1)
    return {4: of_kernels, 2: (1, 0)}.get(ndim, tuple(range(ndim)))


def _wanted(tree: Network, names: Names) -> dict[str, Shape]:
    """The shape of each tensor of a network, as PyTorch has it."""
    wanted = {
        names.of(path): tuple(leaf.shape[axis] for axis in _order(leaf.ndim))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if names.split:
        _, features = wanted.pop(f"{names.head}.weight")
        parts = ((outputs, features) for outputs in names.split)
        wanted |= dict(zip(_head_weights(names), parts, strict=True))
    if (sigma := f"{names.head}.sigma") in wanted:
        wanted[sigma] = names.sigma
    return wanted


def _compare(
    wanted: Shapes, counters: Iterable[str], unused: Iterable[str], shapes: Shapes
) -> list[str]:
    """The counters and unused tensors that are there; all others have to be the wanted ones."""
    known = {**dict.fromkeys(counters, ()), **{name: shapes[name] for name in unused}, **wanted}
    if missing := wanted.keys() - shapes.keys():
        raise _Refused(f"tensors are missing: {listed(missing)}; {_SUPPORTED}")
    if extra := shapes.keys() - known.keys():
        raise _Refused(f"there are tensors too many: {listed(extra)}; {_SUPPORTED}")
    for name, shape in known.items():
        if shapes.get(name, shape) != shape:
            raise _Refused(
                f"{listed([name])} has the shape {list(shapes[name])}, not {list(shape)}; "
                f"{_SUPPORTED}"
            )
    return [name for name in known.keys() - wanted.keys() if name in shapes]


def _network(tree: Network, names: Names, arrays: Mapping[str, np.ndarray]) -> Network:
    """The variables, from PyTorch's tensors by name."""
    arrays = dict(arrays)
    if names.split:
        parts = [arrays[name] for name in _head_weights(names)]
        arrays[f"{names.head}.weight"] = np.concatenate(parts)

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays[names.of(path)]
        return jnp.array(array.transpose(_order(array.ndim, ours=True)).reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(place, tree)

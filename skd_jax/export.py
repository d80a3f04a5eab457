"""A model as one file that JAX alone can run: ``jax.export``, StableHLO inside.

Whoever has the file needs ``jax`` and ``flatbuffers``, and nothing of this package::

    import jax.export
    import numpy as np

    exported = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    images = np.zeros((5, 32, 32, 3), np.uint8)  # exported.in_avals[0] says the size
    scores = exported.call(images)  # float32 [5, K]; the largest is the class

JAX reads such a file for at least six months of its later versions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import export as jax_export

from skd_jax.data import prepare
from skd_jax.errors import UserError
from skd_jax.files import whole
from skd_jax.methods import method_of
from skd_jax.paths import given_path

if TYPE_CHECKING:
    from skd_jax.model import Model

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LABELS = "labels.txt"


def export(model: "Model") -> bytes:
    """The function from stored images to scores, with the weights and the preprocessing inside.

    It maps uint8 [b, load_size, load_size, C], any b from 1, to the float32 [b, K] scores of the
    method's rule, as :meth:`skd_jax.model.Model.scores` does: centre crop, normalisation, network,
    rule. Decoding, resizing and class names are not in it. The program is the same for all
    platforms; what a machine's compiler makes of it is up to that machine.

    Returns:
      What ``jax.export.deserialize`` takes.
    """
    config, kept, nets = model.config, model.kept, model.nets
    method = method_of(config)

    def scores(images: jax.Array) -> jax.Array:
        found = method.scores(config.method, nets, kept, prepare(config.data, images))
        return found.astype(jnp.float32)

    (batch,) = jax_export.symbolic_shape("b")
    side, channels = config.data.load_size, config.data.channels
    images = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.uint8)
    exported = jax_export.export(jax.jit(scores), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def write_export(model: "Model", path: str | Path) -> Path:
    """Writes :func:`export`'s bytes, and the class names as ``labels.txt`` beside them.

    A file that is there is never overwritten, for it may be anybody's; ``labels.txt`` may be there
    if it says the same.

    Args:
      model: the model.
      path: of the new file.

    Returns:
      The path of the labels.

    Raises:
      UserError: a file is there, or cannot be written, or a class name cannot be a line.
    """
    path = given_path(path, "--out")
    labels = path.parent / LABELS
    lines = "".join(f"{name}\n" for name in model.class_names).encode("utf-8", "surrogateescape")
    check_free(path)
    if any(name.splitlines() != [name] for name in model.class_names):
        raise UserError(f"a class name is empty or has a line break, which {labels} cannot hold")
    if labels.exists() and labels.read_bytes() != lines:
        raise UserError(f"{labels} holds other class names; write into another folder")
    content = export(model)
    with whole(path, mode="wb") as file:
        file.write(content)
        with whole(labels, mode="wb") as beside:
            beside.write(lines)
    return labels


def check_free(path: str | Path) -> None:
    """Checks that a new file may be written.

    Raises:
      UserError: something is there already, or there is no such folder.
    """
    path = given_path(path, "--out")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already; name another file, or delete it")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: there is no such folder; make it, or name another place")

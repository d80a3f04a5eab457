"""A trained model without any data set: networks, how it classifies, classes, normalisation.

It is saved as a folder that others read too (:mod:`skd_jax.model_folder`), or as one file: a NumPy
archive of the arrays, and beside them one JSON text of the settings. Reading either unpickles
nothing and imports nothing that it names.
"""

import dataclasses
import json
import types
import typing
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from skd_jax import model_folder, steps, weights
from skd_jax.checkpoint import flatten, unflatten
from skd_jax.compiler import compiled
from skd_jax.config import Config, to_dict
from skd_jax.data import prepare
from skd_jax.errors import UserError
from skd_jax.export import export
from skd_jax.files import whole
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import logits
from skd_jax.paths import given_path, looking, run_of
from skd_jax.predict import Prediction, predict
from skd_jax.state import Network

_SETTINGS = "settings"
_DAMAGED = (  # what NumPy, zlib and JSON raise over a file that is no model
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError),
    *(NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained classifier.

    Attributes:
      config: what it was trained with; ``config.data`` says how images become its input.
      kept: what its method keeps, with the network as ``classifier``.
      class_names: of the K outputs.
      names: what PyTorch calls the network's tensors; None: torchvision's names.
    """

    config: Config
    kept: Any
    class_names: tuple[str, ...]
    names: weights.Names | None = None

    @property
    def nets(self) -> steps.Networks:
        """The architecture."""
        return steps.networks(self.config.model)

    def scores(self, images: np.ndarray) -> jax.Array:
        """Scores of stored images, by the method's rule; the largest is the class.

        Args:
          images: uint8 [n, load_size, load_size, C].

        Returns:
          float32 [n, K].

        Raises:
          UserError: the images are of another shape or type.
        """
        data = self.config.data
        shape = (data.load_size, data.load_size, data.channels)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}: give uint8 [n, "
                f"{', '.join(map(str, shape))}]"
            )
        scores = method_of(self.config).scores
        return _scores(scores, self.config.method, self.nets, data, self.kept, images)

    def classify(self, images: np.ndarray) -> list[str]:
        """The names of the classes of images uint8 [n, load_size, load_size, C]."""
        return [self.class_names[k] for k in np.asarray(self.scores(images)).argmax(axis=1)]

    @staticmethod
    def load(path: str | Path, **said: Any) -> "Model":
        """Reads a model; see :func:`load`."""
        return load(path, **said)

    def predict(self, paths: str | Path | Sequence[str | Path], top: int = 1) -> list[Prediction]:
        """The likeliest classes of image files; see :func:`skd_jax.predict.predict`."""
        return predict(self, paths, top)

    def export(self) -> bytes:
        """A file that JAX runs without this package; see :func:`skd_jax.export.export`."""
        return export(self)

    def save(self, path: str | Path) -> None:
        """Writes a model folder or, if the name ends in .npz, one file, whole or not at all.

        A folder holds a network with a head, and its delegator; a file holds all that a method
        keeps.

        Raises:
          UserError: it cannot be written; or a folder is asked for, and the method classifies by
            something else than the network's head.
        """
        path = given_path(path)
        if path.suffix != ".npz":
            if method_of(self.config).scores is not logits:
                raise UserError(
                    f"{self.config.method.name} classifies by more than a head, which a model "
                    f"folder cannot hold; name a file: {path}.npz"
                )
            model_folder.write(path, self)
            return
        settings = {"config": to_dict(self.config), "class_names": list(self.class_names)}
        named: dict[str, Any] = {_SETTINGS: np.array(json.dumps(settings))}
        named |= {name: np.asarray(x) for name, x in flatten({"kept": self.kept}).items()}
        with whole(path, mode="wb") as file:
            np.savez(file, allow_pickle=False, **named)


def load(
    path: str | Path,
    *,
    classes: str | Path | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    load_size: int | None = None,
    fit: str | None = None,
    last_relu: bool | None = None,
) -> Model:
    """Reads a trained model.

    Args:
      path: a model folder; a PyTorch state dict of a ResNet as a .safetensors file; the workdir of
        a run that has ended; or a .npz file that :meth:`Model.save` wrote.
      classes: a file of class names, one a line, or the names. This and what follows say what bare
        weights cannot; what a ``config.json`` beside them says need not be given.
      mean: per channel, of images scaled to [0, 1].
      std: per channel.
      image_size: height and width of the images that the network takes, pixels.
      load_size: what images are resized to before their centre is cut out.
      fit: how an image becomes square: "squash", or "crop" (short side, then the centre).
      last_relu: whether the last block ends in a ReLU; None: it does unless the head is a cosine
        head.

    Raises:
      UserError: it is no such model, something has to be given, or is given that it holds.
    """
    path = given_path(path, "--model")
    said = model_folder.Said(classes, mean, std, image_size, load_size, fit, last_relu)
    with looking(f"--model={path}"):
        is_run = (run_of(path)[0] / "checkpoints").is_dir()
    if not is_run and path.suffix != ".npz":
        return Model(**vars(model_folder.read(path, said)))
    if given := [name for name, value in vars(said).items() if value is not None]:
        raise UserError(f"{path} holds its own {given[0]}; leave it out")
    if is_run:
        from skd_jax.train import model_of  # a run is opened by what is built on this module

        return model_of(path)
    return _load_archive(path)


def _load_archive(path: Path) -> Model:
    """Reads a .npz file of ours."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        settings = json.loads(str(arrays.pop(_SETTINGS)))
        config = from_config_dict(ConfigDict(settings["config"]))
        names = tuple(str(name) for name in settings["class_names"])
        model = Model(config, kept_from(arrays, method_of(config).kept), names)
        steps.networks(config.model)
        if model.kept.classifier is None:
            raise ValueError("no classifier")
        return model
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"model {path} cannot be read ({error.strerror or error})") from error
    except _DAMAGED as error:
        raise UserError(
            f"{path} is not a model that this version of skd_jax has saved ({error}); save it anew"
        ) from error


def kept_from(arrays: Mapping[str, np.ndarray], kind: type) -> Any:
    """What a method keeps, from its arrays by dotted path ("kept.classifier.params.head.bias").

    Raises:
      KeyError: something is there that this kind does not have.
    """
    tree = unflatten({path: jnp.array(array) for path, array in arrays.items()})
    return _filled(kind, tree.get("kept", {}))


def _filled(kind: type, tree: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    if unknown := set(tree) - set(hints):
        raise KeyError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    empty = {"batch_stats": {}} if kind is Network else {}  # empty trees have no array
    return kind(**{**empty, **{name: _part(hints[name], x) for name, x in tree.items()}})


def _part(hint: Any, value: Any) -> Any:
    """A value as its field's type has it: a dataclass, a dictionary or an array."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [kind for kind in choices if dataclasses.is_dataclass(kind)]
    if kinds and isinstance(value, dict):
        return _filled(typing.cast(type, kinds[0]), value)
    is_array = jax.Array in choices
    if is_array == isinstance(value, dict):
        raise TypeError(f"{value!r} where {hint} belongs")
    return value


@compiled(stays=True, static_argnames=("scores", "static", "nets", "data"))
def _scores(
    scores: Any, static: Any, nets: steps.Networks, data: Any, kept: Any, images: jax.Array
) -> jax.Array:
    return scores(static, nets, kept, prepare(data, images))

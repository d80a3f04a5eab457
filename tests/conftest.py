import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

from xla_flags import FAST

# Before jax is imported. Set JAX_PLATFORMS to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # An empty XLA_FLAGS runs the same tests on the code that users run.
    os.environ.setdefault("XLA_FLAGS", FAST)
else:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it

# Tests leave the user's cache alone. What one compiles, others read: workers inherit this.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="skd_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# And labels and sound images that were seen before.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=os.environ["JAX_COMPILATION_CACHE_DIR"])

import jax
import numpy as np
import pytest
from PIL import Image

# Tracing makes many objects; looking for garbage among them takes a fifth of its time.
gc.set_threshold(100_000, 20, 100)

# Silent broadcasting between ranks hides mistakes in losses.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """Removes the cache of compiled programs, once the last worker is done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def kept_programs():
    """A run drops the programs of a task that is over; here the next test needs them again."""
    from skd_jax import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "drop_programs", lambda all_of_them: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def blank_plots():
    """A run ends with two plots, which take matplotlib half a second; here they are one pixel."""
    from skd_jax import plots, replica

    def blank(plot):
        @functools.wraps(plot)  # by whose name the file is called
        def one_pixel(summary: dict, path: Path) -> None:
            Image.new("L", (1, 1)).save(path)

        return one_pixel

    both = (plots.accuracy_curve, plots.accuracy_matrix)
    with pytest.MonkeyPatch.context() as patch:
        instead = SimpleNamespace(**{plot.__name__: blank(plot) for plot in both})
        patch.setattr(replica, "plots", instead)
        yield


@pytest.fixture(scope="session", autouse=True)
def drawn_once():
    """Networks' first weights: drawing them traces the network; the same key draws the same."""
    from skd_jax import steps

    initial, drawn = steps.initial, {}

    @functools.wraps(initial)  # which tests of it call by itself
    def remembered(module, key, shape):
        if isinstance(key, jax.core.Tracer):
            return initial(module, key, shape)
        with jax.ensure_compile_time_eval():  # where shapes alone are asked for, too
            which = module, shape, np.asarray(jax.random.key_data(key)).tobytes()
            if which not in drawn:
                drawn[which] = initial(module, key, shape)
        return jax.tree.map(jax.numpy.copy, drawn[which])  # a step may take them over

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "initial", remembered)
        yield


@pytest.fixture(scope="session")
def small_model():
    """A model of four classes of 8x8 grey images, of random weights, with a delegator."""
    from configs import digits
    from skd_jax.methods import from_config_dict
    from skd_jax.methods.skd import networks, pseudo_images
    from skd_jax.methods.skd.phases import KeptDelegator
    from skd_jax.model import Model
    from skd_jax.models import Classifier
    from skd_jax.state import Network

    rng = np.random.default_rng(3)

    def some(path, leaf):
        """Any numbers that keep the outputs' scale: drawing them by NumPy compiles nothing."""
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        width = np.prod(leaf.shape[:-1]) / 2 if len(leaf.shape) > 1 else 100
        return (rng.normal(size=leaf.shape) / np.sqrt(width)).astype(np.float32)

    def network(module, *shape: int) -> Network:
        x = jax.ShapeDtypeStruct(shape, np.float32)
        shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), x)
        return Network(**jax.tree_util.tree_map_with_path(some, shapes))

    config = digits.get_config()
    small = {"model.width": 2, "method.delegator.widths": (4, 4, 4), "method.delegator.z_dim": 4}
    config.update_from_flattened_dict(small)
    config = from_config_dict(config)
    nets = networks(config)
    classifier, delegator = Classifier(nets.features, 4), network(nets.delegator, 1, 4)
    kept = KeptDelegator(network(classifier, 1, 8, 8, 1), delegator)
    images = pseudo_images(nets, delegator, jax.random.key(2), 64, 0)
    logits = jax.jit(lambda n, x: classifier.apply(n, x, False)[1])(
        kept.classifier.variables(), images
    )
    kept.classifier.params["head"]["bias"] -= logits.mean(axis=0)  # so that all classes are drawn
    return Model(config, kept, ("cat", "dog", "größe", 'a, "b"'))


@pytest.fixture(scope="session")
def model_file(small_model, tmp_path_factory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("small") / "model.npz"
    small_model.save(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Five images of several sizes and kinds, in a folder and its sub-folder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png", "größe.png", "below/d.png"):
        pixels = rng.integers(0, 256, (*rng.integers(5, 30, 2), 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent

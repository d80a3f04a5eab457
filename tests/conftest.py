import os
import shutil
import tempfile
from pathlib import Path

# Before jax is imported. Set JAX_PLATFORMS to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling is nearly all the time tests take, and takes a tenth of it unoptimised. An empty
    # XLA_FLAGS runs the same tests on the code that users run.
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", fast)

else:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it

# Tests leave the user's cache alone.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="skd_jax_tests_")
# And labels and sound images that were seen before.
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"]

import jax
import pytest

# Silent broadcasting between ranks hides mistakes in losses.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """Removes the cache of compiled programs."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def small_model():
    """A model of four classes of 8x8 grey images, of random weights, with a delegator."""
    from configs import digits
    from skd_jax.methods import from_config_dict
    from skd_jax.methods.skd.phases import KeptDelegator, networks
    from skd_jax.model import Model
    from skd_jax.models import Classifier
    from skd_jax.steps import eval_mode, initial

    config = digits.get_config()
    small = {"model.width": 2, "method.delegator.widths": (4, 4, 4), "method.delegator.z_dim": 4}
    config.update_from_flattened_dict(small)
    config = from_config_dict(config)
    nets = networks(config)
    keys = jax.random.split(jax.random.key(3), 3)
    module = Classifier(nets.features, 4)
    network = initial(module, keys[0], (1, 8, 8, 1))
    delegator = initial(nets.delegator, keys[1], (1, 4))
    images = eval_mode(nets.delegator, delegator, jax.random.normal(keys[2], (64, 4)))
    logits = eval_mode(module, network, images)[1]
    network.params["head"]["bias"] = -logits.mean(axis=0)  # so that all classes are drawn
    return Model(config, KeptDelegator(network, delegator), ("cat", "dog", "größe", 'a, "b"'))


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent

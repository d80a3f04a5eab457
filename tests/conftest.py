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


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent

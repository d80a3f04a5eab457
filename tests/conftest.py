import os
from pathlib import Path

# Before jax is imported. Set JAX_PLATFORMS to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Silent broadcasting between ranks hides mistakes in losses.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent

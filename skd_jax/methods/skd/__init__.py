"""SKD: the settings, the terms of Eq. 8, the steps, the phases and the quality of a delegator."""

from skd_jax.methods.skd.phases import METHOD, networks

__all__ = ["METHOD", "networks"]

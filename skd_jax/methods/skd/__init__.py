"""SKD: the settings, the terms of Eq. 8, the steps, the phases and the quality of a delegator."""

from skd_jax.methods.skd.phases import METHOD, networks, stage_one, stage_two
from skd_jax.methods.skd.settings import Settings
from skd_jax.methods.skd.steps import pseudo_images

__all__ = ["METHOD", "Settings", "networks", "pseudo_images", "stage_one", "stage_two"]

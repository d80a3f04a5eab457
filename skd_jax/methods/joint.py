"""Joint training: all images of all classes seen, anew for each task. An upper bound.

The one method that is given old images, and it says so. The network starts from new weights for
each task, as ABD's oracle does, so the result does not depend on the order of the tasks but for
noise; FACIL goes on from the network before.
"""

import dataclasses

from skd_jax.config import Supervised, learning
from skd_jax.methods.phase import LEARN, Method, Phase, Setting
from skd_jax.methods.phases import anew


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """Joint training."""

    name: str = "joint"


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task, on the images of all tasks so far."""
    if not task:
        return []
    settings, images = setting.config.method, sum(setting.images[: task + 1])
    return [anew(setting, task, settings, "learn", "method.batch", images, LEARN)]


METHOD = Method(
    "joint",
    Settings,
    phases,
    check=learning("method.").check,
    reads_old_images=True,
    family="bound",
    keeps="all images",
    tricks="anew for each task",
)

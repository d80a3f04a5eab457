"""Class-incremental learning without stored images: SKD, and the methods it is compared with.

What a notebook needs is here; importing it starts no device. ``README.md`` shows it in use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skd_jax import losses, methods, models
    from skd_jax.experiment import open_experiment
    from skd_jax.extending import Extended, extend
    from skd_jax.methods import METHODS, from_config_dict
    from skd_jax.methods.phase import Setting, setting_of
    from skd_jax.methods.skd import networks, pseudo_images, stage_one, stage_two
    from skd_jax.methods.skd.terms import Explored, term
    from skd_jax.model import Model, load
    from skd_jax.plots import image_grid
    from skd_jax.predict import Prediction
    from skd_jax.stepping import Stepping
    from skd_jax.train import model_of, restore

__version__ = "0.3.0.dev0"

__all__ = [
    "METHODS",
    "Explored",
    "Extended",
    "Model",
    "Prediction",
    "Setting",
    "Stepping",
    "extend",
    "from_config_dict",
    "image_grid",
    "load",
    "losses",
    "methods",
    "model_of",
    "models",
    "networks",
    "open_experiment",
    "pseudo_images",
    "restore",
    "setting_of",
    "stage_one",
    "stage_two",
    "term",
]

_FROM = {
    "skd_jax": ("losses", "methods", "models"),
    "skd_jax.experiment": ("open_experiment",),
    "skd_jax.extending": ("Extended", "extend"),
    "skd_jax.methods": ("METHODS", "from_config_dict"),
    "skd_jax.methods.phase": ("Setting", "setting_of"),
    "skd_jax.methods.skd": ("networks", "pseudo_images", "stage_one", "stage_two"),
    "skd_jax.methods.skd.terms": ("Explored", "term"),
    "skd_jax.model": ("Model", "load"),
    "skd_jax.plots": ("image_grid",),
    "skd_jax.predict": ("Prediction",),
    "skd_jax.stepping": ("Stepping",),
    "skd_jax.train": ("model_of", "restore"),
}


def __getattr__(name: str) -> Any:
    for module, names in _FROM.items():
        if name in names:
            if module == __name__:
                return importlib.import_module(f"{module}.{name}")
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""One module a method: what it does for each task, its loss, what it keeps, how it classifies."""

from ml_collections import ConfigDict

from skd_jax import config as _config
from skd_jax.config import Config
from skd_jax.methods import (
    abd,
    bic,
    eeil,
    finetune,
    icarl,
    joint,
    lucir,
    lwf,
    ncm,
    pseudo_ncm,
    rdfcil,
    ridge,
    skd,
)
from skd_jax.methods.phase import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (
        *(skd, finetune, joint, lwf, ncm, ridge, pseudo_ncm, abd, rdfcil),
        *(icarl, eeil, bic, lucir),
    )
}


def from_config_dict(config: ConfigDict) -> Config:
    """The typed configuration of any of these methods; see :func:`skd_jax.config.from_config_dict`.

    Raises:
      UserError: something in it is wrong; the message names the field.
    """
    return _config.from_config_dict(config, METHODS)


def method_of(config: Config) -> Method:
    """The method that a configuration names."""
    return METHODS[config.method.name]

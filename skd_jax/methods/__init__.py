"""One module a method: what it does for each task, its loss, what it keeps, how it classifies."""

from ml_collections import ConfigDict

from skd_jax import config as _config
from skd_jax.config import Config
from skd_jax.methods import (
    abd,
    bic,
    eeil,
    ewc,
    fetril,
    finetune,
    icarl,
    joint,
    lda,
    lucir,
    lwf,
    lwf_mc,
    mas,
    mnemonics,
    ncm,
    pseudo,
    pseudo_ncm,
    rdfcil,
    ridge,
    sdc,
    si,
    skd,
    tpcil,
)
from skd_jax.methods.phase import Method

_BOUNDS = (finetune.METHOD, joint.METHOD)
_LEARNING = (lwf.METHOD, lwf_mc.METHOD, ewc.METHOD, mas.METHOD, si.METHOD, sdc.METHOD)
_FROZEN = (ncm.METHOD, ridge.METHOD, lda.METHOD, fetril.METHOD)
_DRAWN = (pseudo_ncm.METHOD, *pseudo.METHODS)
_GENERATED = (abd.METHOD, rdfcil.METHOD)
_EXEMPLARS = (icarl.METHOD, eeil.METHOD, bic.METHOD, lucir.METHOD, tpcil.METHOD, mnemonics.METHOD)

METHODS: dict[str, Method] = {skd.METHOD.name: skd.METHOD} | {
    method.name: method
    for family in (_BOUNDS, _LEARNING, _FROZEN, _DRAWN, _GENERATED, _EXEMPLARS)
    for method in family
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

"""CIFAR-100: 50 base classes, then 1, 2, 5 or 10 tasks over the other 50 (paper, Fig. 5a-d).

    python -m skd_jax.main --config=configs/cifar100.py --workdir=runs/cifar100
    python -m skd_jax.main --config=configs/cifar100.py:tasks=10 --workdir=runs/cifar100_10

``scale=mini`` is a small real task for a CPU: the first 20 classes of the same order, 10 + 5 x 2,
at 16x16 pixels with a ResNet-8. ``scale=midi`` lies between: all 100 classes, at 16x16 pixels with
a ResNet-20, in lengths that take a core some three hours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (5), scale=full, midi or mini, method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=5, scale="full", method="skd")
    config = common.base_config()
    config.data.tasks = options.tasks
    scale = common.scale_of(options, "full", "midi", "mini")
    config = {"full": lambda c: c, "midi": _midi, "mini": _mini}[scale](config)
    return common.with_method(config, options.method)


def _small(config: ConfigDict) -> ConfigDict:
    """Half the pixels and widths, and an eighth of stage two's epochs."""
    config.data.image_size = config.data.load_size = 16
    config.data.pad = 2
    config.method.delegator.widths = (64, 64, 32)
    config.method.stage_two.epochs = 20
    config.method.stage_two.drop_epochs = (10, 15)
    return config


def _midi(config: ConfigDict) -> ConfigDict:
    config = _small(config)
    config.model.depth = 20
    config.base.epochs = 24
    config.base.drop_epochs = (14, 20)
    config.method.stage_one.batch = 64
    config.method.stage_one.epochs = 60
    config.method.stage_one.drop_every = 50
    config.method.stage_one.finetune_epochs = 12
    config.method.stage_one.finetune_drop_every = 10
    config.run.checkpoint_every = 250
    return config


def _mini(config: ConfigDict) -> ConfigDict:
    config = _small(config)
    config.model.depth = 8
    config.base.epochs = 6
    config.base.drop_epochs = (4, 5)
    return common.mini(config)

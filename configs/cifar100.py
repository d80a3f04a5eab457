"""CIFAR-100: 50 base classes, then 1, 2, 5 or 10 tasks over the other 50 (paper, Fig. 5a-d).

    python -m skd_jax.main --config=configs/cifar100.py --workdir=runs/cifar100
    python -m skd_jax.main --config=configs/cifar100.py:tasks=10 --workdir=runs/cifar100_10

``scale=mini`` is a small real task for a CPU: the first 20 classes of the same order, 10 + 5 x 2,
at 16x16 pixels with a ResNet-8.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (5), scale=full or mini, method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=5, scale="full", method="skd")
    config = common.base_config()
    config.data.tasks = options.tasks
    config = _mini(config) if common.is_mini(options) else config
    return common.with_method(config, options.method)


def _mini(config: ConfigDict) -> ConfigDict:
    config.data.image_size = config.data.load_size = 16
    config.data.pad = 2
    config.model.depth = 8
    config.method.delegator.widths = (64, 64, 32)
    config.base.epochs = 6
    config.base.drop_epochs = (4, 5)
    config.method.stage_two.epochs = 20
    config.method.stage_two.drop_epochs = (10, 15)
    return common.mini(config)

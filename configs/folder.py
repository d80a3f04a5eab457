"""Your own images: a folder with one sub-folder a class, images of any size.

    skd-jax train --config=configs/folder.py:scale=mini,base_classes=5 --workdir=runs/mine \
        --config.data.data_dir=DIR

The classes after the base ones are split evenly into the tasks; a fifth of each class is kept for
testing unless DIR holds the folders ``train`` and ``test`` (or ``validation``), with a sub-folder a
class in each.

``scale=mini`` is for a CPU: 32x32 pixels, a ResNet-10 of a quarter of the width, and lengths that
take about 10 minutes on 2 cores for ten classes of a few hundred images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: base_classes=N (1), tasks=N (1), scale=full or mini, method=NAME (skd)."""
    options = common.parse_arg(arg, base_classes=1, tasks=1, scale="full", method="skd")
    config = common.high_resolution(common.base_config())
    config.data.name = "folder"
    config.data.image_size = config.data.load_size = 128
    config.data.test_fraction = 0.2
    config.data.order_seed = 1
    config.base.batch = config.method.stage_two.batch = 32
    config = _mini(config) if common.is_mini(options) else config
    config.data.base_classes = options.base_classes
    config.data.tasks = options.tasks
    config.method.stage_two.beta = 0.0  # a tenth of the new classes
    return common.with_method(config, options.method)


def _mini(config: ConfigDict) -> ConfigDict:
    config = common.mini_high_resolution(config)
    config.data.max_classes = 0
    config.base.epochs = 20
    config.base.drop_epochs = (10, 15)
    config.method.stage_one.epochs = 20
    config.method.stage_one.drop_every = 16
    config.method.stage_two.epochs = 16
    config.method.stage_two.drop_epochs = (8, 12)
    config.run.log_every = 20
    return config

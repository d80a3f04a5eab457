"""Your own images: a folder with one sub-folder a class, images of any size.

    python -m skd_jax.main --config=configs/folder.py:tasks=2 --workdir=runs/mine \
        --config.data.data_dir=DIR --config.data.base_classes=10

The classes after the base ones are split evenly into the tasks; a fifth of each class is kept for
testing unless DIR holds the folders ``train`` and ``test`` (or ``validation``), with a sub-folder a
class in each.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (1), method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=1, method="skd")
    config = common.high_resolution(common.base_config())
    config.data.name = "folder"
    config.data.image_size = config.data.load_size = 128
    config.data.test_fraction = 0.2
    config.data.order_seed = 1
    config.data.base_classes = 1
    config.data.tasks = options.tasks
    config.method.stage_two.beta = 0.0  # a tenth of the new classes
    config.base.batch = config.method.stage_two.batch = 32
    return common.with_method(config, options.method)

"""Caltech-101: 51 base classes, then 1, 2, 5 or 10 tasks over the other 50 (paper, Fig. 5g and 7).

python -m skd_jax.main --config=configs/caltech101.py --workdir=runs/caltech101
python -m skd_jax.main --config=configs/caltech101.py:tasks=5 --workdir=runs/caltech101_5
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (10), scale=full or mini, method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=10, scale="full", method="skd")
    config = common.high_resolution(common.base_config())
    config.data.name = "caltech101"
    config.data.image_size = config.data.load_size = 128
    config.data.test_fraction = 0.2
    config.data.exclude_classes = ("background_google",)
    config.data.order_seed = 1
    config.data.base_classes = 51
    config.data.tasks = options.tasks
    config = common.mini_high_resolution(config) if common.is_mini(options) else config
    return common.with_method(config, options.method)

"""ImageNet-Subset: 100 classes by seed 1993, 50 base, then 1, 2, 5 or 10 tasks (Fig. 5e, f, 6).

python -m skd_jax.main --config=configs/imagenet_subset.py --workdir=runs/imagenet
python -m skd_jax.main --config=configs/imagenet_subset.py:tasks=10 --workdir=runs/imagenet_10
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (5), scale=full or mini, method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=5, scale="full", method="skd")
    config = common.high_resolution(common.base_config())
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.load_size = 256
    config.data.fit = "crop"
    config.data.in_memory = False
    config.data.subset = 100
    config.data.tasks = options.tasks
    config.method.stage_one.batch = 1024
    config.run.eval_batch = 100
    config = common.mini_high_resolution(config) if common.is_mini(options) else config
    return common.with_method(config, options.method)

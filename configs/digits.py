"""Digits: scikit-learn's 1,797 real 8x8 digits, 4 base classes and 3 tasks of 2; minutes on a CPU.

python -m skd_jax.main --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: tasks=N (3), scale=full or mini (the same here), method=NAME (skd)."""
    options = common.parse_arg(arg, tasks=3, scale="full", method="skd")
    common.is_mini(options)  # digits are small as they are
    config = common.base_config()
    config.data.name = "digits"
    config.data.image_size = config.data.load_size = 8
    config.data.channels = 1
    config.data.mean, config.data.std = (0.305,), (0.376,)
    config.data.pad = 1
    config.data.flip = False
    config.data.test_fraction = 0.3
    config.data.base_classes = 4
    config.data.tasks = options.tasks
    config.model.depth = 8
    config.method.delegator.z_dim = 64
    config.method.delegator.widths = (32, 32, 16)
    config.base.epochs = 40
    config.base.batch = 64
    config.base.drop_epochs = (20, 30)
    config.method.stage_one.rounds_per_epoch = 10
    config.method.stage_one.epochs = 25
    config.method.stage_one.drop_every = 20
    config.method.stage_one.finetune_epochs = 30
    config.method.stage_one.finetune_drop_every = 24
    config.method.stage_one.batch = 64
    config.method.stage_two.epochs = 150
    config.method.stage_two.batch = 64
    config.method.stage_two.drop_epochs = (75, 110)
    config.method.stage_two.beta = 0.6
    config.run.log_every = 20
    config.run.checkpoint_every = 100
    config.run.pseudo_images = 64
    return common.with_method(config, options.method)

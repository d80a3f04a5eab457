"""What all benchmarks share: the paper's settings, and the defaults where it is silent."""

from typing import Any

from ml_collections import ConfigDict

MOVED = ("delegator", "stage_one", "stage_two")  # below ``method`` since version 0.2
LOW_RESOLUTION = (128, 128, 64)  # delegator widths, Table IV
HIGH_RESOLUTION = (512, 512, 256, 128, 64)  # Table V
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Benchmark(ConfigDict):
    """A configuration in which version 0.1's paths (``stage_two.beta``) name the same sections."""

    def __getitem__(self, key: str) -> Any:
        """The section of the method where there is none of that name at the top."""
        if key in MOVED and key not in self and key in self.get("method", ()):
            return self.method[key]
        return super().__getitem__(key)


def parse_arg(arg: str | None, **defaults: str | int) -> ConfigDict:
    """Reads a config's argument, "tasks=10,scale=mini", over its defaults, of the same types."""
    values = ConfigDict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=")
        if name not in defaults:
            raise ValueError(f"config argument {part!r}: unknown; give {', '.join(defaults)}")
        try:
            values[name] = type(defaults[name])(text)
        except ValueError:
            kind = type(defaults[name]).__name__
            raise ValueError(
                f"config argument {part!r}: {name} takes a value of type {kind}"
            ) from None
    return values


def is_mini(options: ConfigDict) -> bool:
    """Whether a small real task for a CPU is asked for: the argument scale=mini, not full."""
    return scale_of(options, "full", "mini") == "mini"


def scale_of(options: ConfigDict, *known: str) -> str:
    """The argument scale, which has to be one of those that a data set has."""
    if options.scale not in known:
        raise ValueError(f"config argument scale={options.scale}: give {' or '.join(known)}")
    return options.scale


def base_config() -> ConfigDict:
    """The paper's CIFAR-100 settings. skd_jax/config.py says what each field is."""
    config = Benchmark()
    config.seed = 1

    config.data = ConfigDict()
    config.data.name = "cifar100"
    config.data.data_dir = ""
    config.data.image_size = 32
    config.data.channels = 3
    config.data.load_size = 32
    config.data.fit = "squash"
    config.data.interpolation = "bilinear"
    config.data.mean = (0.5071, 0.4866, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)
    config.data.augment = "crop"
    config.data.pad = 4
    config.data.flip = True
    config.data.in_memory = True
    config.data.test_fraction = 0.0
    config.data.split_seed = 1
    config.data.exclude_classes = ()
    config.data.subset = 0
    config.data.order_seed = 1993
    config.data.held_out = 0.0
    config.data.class_order = ""
    config.data.max_classes = 0
    config.data.base_classes = 50
    config.data.tasks = 5

    config.model = ConfigDict()
    config.model.family = "cifar"
    config.model.depth = 32
    config.model.width = 16
    config.model.bn_momentum = 0.9
    config.model.dtype = "float32"
    config.model.precision = "highest"
    config.model.shortcut = "conv"
    config.model.last_relu = True
    config.model.head = "linear"

    config.method = ConfigDict()
    config.method.name = "skd"

    config.method.delegator = ConfigDict()
    config.method.delegator.z_dim = 256
    config.method.delegator.widths = LOW_RESOLUTION
    config.method.delegator.upsample = "resize"
    config.method.delegator.helper_bn = True

    config.base = ConfigDict()
    config.base.epochs = 160
    config.base.batch = 128
    config.base.lr = 0.1
    config.base.drop_epochs = (80, 120)
    config.base.momentum = 0.9
    config.base.weight_decay = 5e-4

    config.method.stage_one = ConfigDict()
    config.method.stage_one.epochs = 200
    config.method.stage_one.finetune_epochs = 100
    config.method.stage_one.rounds_per_epoch = 50
    config.method.stage_one.imitate_steps = 5
    config.method.stage_one.batch = 256
    config.method.stage_one.student_lr = 0.1
    config.method.stage_one.delegator_lr = 1e-3
    config.method.stage_one.drop_every = 100
    config.method.stage_one.finetune_drop_every = 50
    config.method.stage_one.momentum = 0.9
    config.method.stage_one.weight_decay = 5e-4
    config.method.stage_one.discrepancy = "cosine"
    config.method.stage_one.schedule = "drops"
    config.method.stage_one.augment = False
    config.method.stage_one.feature_length = 0.0
    config.method.stage_one.student_explores = True
    config.method.stage_one.terms = ConfigDict()
    config.method.stage_one.terms.exploration = 1.0  # lambda
    config.method.stage_one.terms.category = 1.0
    config.method.stage_one.terms.diversity = 1.0
    config.method.stage_one.terms.feature_statistics = 1.0
    config.method.stage_one.term_modules = ("skd_jax.methods.skd.terms",)
    config.method.stage_one.feature_source = "teacher"
    config.method.stage_one.feature_distance = "variance"

    config.method.stage_two = ConfigDict()
    config.method.stage_two.epochs = 160
    config.method.stage_two.batch = 128
    config.method.stage_two.lr = 0.1
    config.method.stage_two.drop_epochs = (80, 120)
    config.method.stage_two.momentum = 0.9
    config.method.stage_two.weight_decay = 5e-4
    config.method.stage_two.delegator = True
    config.method.stage_two.beta = 5.0
    config.method.stage_two.adaptive = True
    config.method.stage_two.gamma = 1.0  # without Eq. 12
    config.method.stage_two.classification = "all"
    config.method.stage_two.balanced = 0.0
    config.method.stage_two.head_at_full_rate = False
    config.method.stage_two.new_outputs_decay = 0.0
    config.method.stage_two.keep_means = False
    config.method.stage_two.align_head = False

    config.run = ConfigDict()
    config.run.log_every = 50
    config.run.checkpoint_every = 1000
    config.run.keep_checkpoints = 2
    config.run.steps_per_call = 0
    config.run.eval_batch = 500
    config.run.devices = 0
    config.run.phases = 0
    config.run.start_from = ""
    config.run.replicas = 1
    config.run.pseudo_images = 100
    config.run.quality_images = 1000
    config.run.max_skipped = 10
    config.run.collapse_share = 0.9
    config.run.stop_at_collapse = False
    return config


def high_resolution(config: ConfigDict) -> ConfigDict:
    """The networks of the three data sets of larger images, ImageNet's moments and augmentation."""
    config.data.mean, config.data.std = IMAGENET_MEAN, IMAGENET_STD
    config.data.augment = "resized_crop"
    config.model.family = "imagenet"
    config.model.depth = 18
    config.model.width = 64
    config.method.delegator.widths = HIGH_RESOLUTION
    config.base.weight_decay = 1e-4
    config.method.stage_one.weight_decay = 1e-4
    config.method.stage_two.weight_decay = 1e-4
    return config


def mini(config: ConfigDict) -> ConfigDict:
    """What all mini scales share: 10 + 10 classes, and the length of stage one."""
    config.data.max_classes = 20
    config.data.base_classes = 10
    config.method.stage_one.batch = 32
    config.method.stage_one.epochs = 40
    config.method.stage_one.drop_every = 34
    config.method.stage_one.finetune_epochs = 6
    config.method.stage_one.finetune_drop_every = 5
    config.method.stage_two.beta = 1.0
    config.run.checkpoint_every = 250
    return config


def mini_high_resolution(config: ConfigDict) -> ConfigDict:
    """A small real task of larger images: 10 + 10 classes at 32x32 pixels, ResNet-10, five widths.

    The networks keep their shape (four stages, a delegator that doubles four times).
    """
    config.data.image_size = config.data.load_size = 32
    config.model.depth = 10
    config.model.width = 16
    config.method.delegator.widths = (64, 64, 64, 32, 16)
    config.base.epochs = 40
    config.base.batch = 32
    config.base.drop_epochs = (20, 30)
    config.method.stage_two.epochs = 30
    config.method.stage_two.batch = 16  # a class of Caltech-101 may have 30 training images
    config.method.stage_two.drop_epochs = (15, 22)
    return mini(config)


_RIDGE = {"penalty": 1.0, "constant": True, "unit_length": False}
_LDA = {"shrinkage": 1e-4, "unit_length": False}
_FETRIL = {"cost": 1.0, "unit_length": True}
_EWC = {"weight": 10.0, "gamma": 1.0, "labels": "drawn"}
_LUCIR = {
    "exemplars": 20,
    "weight": 5.0,
    "ranking_weight": 1.0,
    "nearest": 2,
    "margin": 0.5,
}
METHODS: dict[str, dict[str, float | str | bool | tuple]] = {  # settings beside those of SGD
    "finetune": {"outputs": "all"},
    "joint": {},
    "lwf": {"temperature": 2.0, "weight": 3.0, "outputs": "new"},
    "lwf_mc": {},
    "ewc": _EWC,
    "mas": {"weight": 1.0},
    "si": {"weight": 0.1, "xi": 0.1},
    "sdc": {**_EWC, "sigma": 0.2},
    "ncm": {"rule": "cosine"},
    "ridge": _RIDGE,
    "lda": _LDA,
    "fetril": _FETRIL,
    "pseudo_ncm": {},
    "pseudo_ridge": _RIDGE,
    "pseudo_lda": _LDA,
    "pseudo_fetril": _FETRIL,
    "icarl": {"exemplars": 20, "loss": "binary", "rule": "nme"},
    "eeil": {
        "exemplars": 20,
        "balance_lr": 0.01,
        "noise": 0.0,
    },
    "bic": {
        "exemplars": 20,
        "held_out": 0.1,
        "bias_steps": 50,
        "bias_penalty": 0.1,
    },
    "lucir": _LUCIR,
    "mnemonics": {**_LUCIR, "pixel_epochs": 1, "pixel_lr": 1e-5},
    "tpcil": {"exemplars": 20, "weight": 1.0, "edges": 32},
    "abd": {"distillation": 0.1},
    "rdfcil": {"local": 0.5, "hard": 0.15, "relation": 0.5, "head": 0.5, "head_lr": 0.005},
}
ON_LARGER_IMAGES = {  # where LUCIR's and SDC's own differ on ImageNet
    "lucir": {"weight": 10.0},
    "mnemonics": {"weight": 10.0},
    "sdc": {"sigma": 0.3},
}
INVERSION = {"abd": 1.0, "rdfcil": 0.5}  # steps of the generator against D_0's rounds
COSINE = ("lucir", "tpcil", "mnemonics")  # LUCIR's head, and features that may be negative
DRAWN = ("pseudo_ncm", "pseudo_ridge", "pseudo_lda", "pseudo_fetril")  # which have a delegator
FROZEN = ("ncm", "ridge", "lda", "fetril", *DRAWN)  # nothing learns after T_0


def inversion(stage_one: ConfigDict, share: float) -> ConfigDict:
    """ABD's and R-DFCIL's training of a generator: theirs where a benchmark is of full scale.

    Args:
      stage_one: of the benchmark. D takes as many steps as D_0 has rounds, 10,000 at full scale, or
        a share of these; and at most 128 images a step.
      share: of the rounds.
    """
    config = ConfigDict()
    config.steps = max(1, round(share * stage_one.epochs * stage_one.rounds_per_epoch))
    config.batch = min(128, stage_one.batch)
    config.lr = 1e-3
    config.temperature = 1000.0
    config.balance = 1.0
    config.statistics = 50.0
    config.smoothness = 1e-3
    return config


def with_method(config: ConfigDict, name: str) -> ConfigDict:
    """The same benchmark by another method: the argument method=NAME.

    Methods that learn take stage two's epochs, batch and rates; joint training, which starts anew
    for each task, takes the base's.
    """
    if name == config.method.name:
        return config
    if name not in METHODS:
        known = ", ".join((config.method.name, *METHODS))
        raise ValueError(f"config argument method={name}: give one of {known}")
    skd = config.method
    learning = config.base if name == "joint" else skd.stage_two
    config.method = ConfigDict()
    config.method.name = name
    if name in DRAWN:
        config.method.delegator, config.method.stage_one = skd.delegator, skd.stage_one
    if name in INVERSION:
        config.method.delegator = skd.delegator
        config.method.delegator.z_dim = 1000
        config.method.inversion = inversion(skd.stage_one, INVERSION[name])
    if name == "rdfcil":
        config.method.head_epochs = max(1, learning.epochs // 4)  # 40 after 160
    if name == "eeil":
        epochs = max(1, learning.epochs * 3 // 16)  # 30 after 160
        config.method.balance_epochs = epochs
        drops = epochs // 3, 2 * epochs // 3
        config.method.balance_drop_epochs = tuple(epoch for epoch in drops if epoch)
    if name not in FROZEN:
        for field in ("epochs", "batch", "lr", "drop_epochs", "momentum", "weight_decay"):
            config.method[field] = learning[field]
    larger = ON_LARGER_IMAGES.get(name, {}) if config.model.family == "imagenet" else {}
    for field, value in {**METHODS[name], **larger}.items():
        config.method[field] = value
    if name in COSINE:
        config.model.head, config.model.last_relu = "cosine", False
    return config

"""Recipes in the frame of Algorithm 1: losses of other data-free methods, and a stage two of ours.

    python -m skd_jax.main --config=configs/recipes.py:recipe=dafl --workdir=runs/dafl
    python -m skd_jax.main --config=configs/recipes.py:recipe=abd,dataset=flowers102 --workdir=...
    python -m skd_jax.main --config=configs/recipes.py:recipe=ours,tasks=10 --workdir=...
    python -m skd_jax.main --workdir=... --config.data.data_dir=DIR \
        --config=configs/recipes.py:recipe=abd,dataset=folder,scale=mini,base_classes=5

Networks, optimisers, rates, batch and rounds stay those of the benchmark, so that recipes differ
in their losses alone: what S_n minimises, what D_n does, and whether S_n learns in the explore
step. S_n has no head: outputs are T_n's head on its features. Weights are those of the papers or
their code; what differs is said. So such a recipe is another method's loss, not that method whole.

``recipe=ours``, ``recipe=translated`` and ``recipe=kept_means`` train the delegator as the paper
has it, and learn new classes otherwise.
"""

import importlib
import math

from ml_collections import ConfigDict

from configs import common

DATASETS = ("cifar100", "caltech101", "flowers102", "imagenet_subset", "digits", "folder")
OF_THE_DATASET = {"tasks": 0, "base_classes": 0}  # arguments; 0: as the data set's config has it


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: recipe=NAME (skd), dataset=FILE (cifar100), and what that file takes.

    That is scale=full or mini, tasks=N and method=NAME, which has to train a delegator (for
    recipe=ours, translated or kept_means: skd); of the folder also base_classes=N.
    """
    known = {"recipe": "skd", "dataset": "cifar100", "scale": "full", "method": "skd"}
    options = common.parse_arg(arg, **known, **OF_THE_DATASET)
    every = {**RECIPES, **dict.fromkeys(OF_STAGE_TWO, skd)}
    for name, known in (("recipe", every), ("dataset", DATASETS)):
        if options[name] not in known:
            raise ValueError(
                f"config argument {name}={options[name]}: give one of {', '.join(known)}"
            )
    benchmark = importlib.import_module(f"configs.{options.dataset}")
    given = "".join(f",{name}={options[name]}" for name in OF_THE_DATASET if options[name])
    config = benchmark.get_config(f"scale={options.scale}{given}")
    every[options.recipe](config)
    config.method.stage_two.update(OF_STAGE_TWO.get(options.recipe, {}))
    if options.recipe in OF_STAGE_TWO and options.method != "skd":
        raise ValueError(
            f"config argument recipe={options.recipe}: only with method=skd, not {options.method}"
        )
    config = common.with_method(config, options.method)
    if "stage_one" not in config.method:
        raise ValueError(
            f"config argument method={options.method}: a recipe is for methods that train a "
            "delegator, skd and pseudo_ncm"
        )
    return config


def skd(config: ConfigDict) -> None:
    """The paper's: Eq. 1-8, as the benchmark has them."""


def dafl(config: ConfigDict) -> None:
    """Chen et al., Data-Free Learning of Student Networks, ICCV 2019: no adversary.

    One-hot loss 0.5, activation loss 0.1, information entropy 5 of decimal logarithms, which is
    their code's command for CIFAR-100; S learns T's scores (KL). There, G and S take a step each on
    the same images.
    """
    one = _of_outputs(config, "kl")
    one.terms = ConfigDict({"category": 0.5, "activation": 0.1, "diversity": 5 / math.log(10)})


def dfad(config: ConfigDict) -> None:
    """Fang et al., Data-Free Adversarial Distillation, 2019: the adversary alone, L1 of logits."""
    one = _of_outputs(config, "l1")
    one.terms = ConfigDict({"exploration": 1.0})


def zskt(config: ConfigDict) -> None:
    """Micaelli and Storkey, Zero-shot Knowledge Transfer, NeurIPS 2019: the adversary alone, KL.

    Without their attention transfer, and with 5 imitate steps a round where they take 10.
    """
    one = _of_outputs(config, "kl")
    one.terms = ConfigDict({"exploration": 1.0})


def deep_inversion(config: ConfigDict) -> None:
    """Yin et al., Dreaming to Distill (DeepInversion), CVPR 2020: statistics and image priors.

    Cross-entropy 1, statistics 10, total variation 2.5e-5 and l2 3e-8 of sums over 3x32x32 pixels,
    which are means here. They optimise the pixels of a batch with given labels, their total
    variation has diagonals, and neither that nor their l2 is squared; here a generator draws them
    and the labels are Eq. 5's. S learns T's scores (KL).
    """
    one = _of_outputs(config, "kl")
    pixels = 3 * 32 * 32
    one.terms = ConfigDict(
        {
            "category": 1.0,
            "feature_statistics": 10.0,
            "total_variation": 2.5e-5 * pixels,
            "image_norm": 3e-8 * pixels,
        }
    )


def abd(config: ConfigDict) -> None:
    """Smith et al., Always Be Dreaming, ICCV 2021; R-DFCIL's inversion is the same.

    Cross-entropy of logits / 1000, class balance 1 of logarithms to the base K (of the base
    classes), Gaussian KL of the moments 50, smoothness 1e-3. S learns T's scores (KL).
    """
    if config.data.base_classes < 2:
        raise ValueError("config argument recipe=abd: give base_classes=N, of 2 or more")
    one = _of_outputs(config, "kl")
    one.feature_distance = "kl_of_running"
    one.terms = ConfigDict(
        {
            "tempered_category": 1.0,
            "diversity": 1 / math.log(config.data.base_classes),
            "feature_statistics": 50.0,
            "smoothness": 1e-3,
        }
    )


def _of_outputs(config: ConfigDict, discrepancy: str) -> ConfigDict:
    """Stage one of methods whose student learns outputs, and rests while G is trained."""
    config.method.stage_one.discrepancy = discrepancy
    config.method.stage_one.student_explores = False
    return config.method.stage_one


# SKD with another stage two; ``experiments/README.md`` says what each change is worth.
# T_n's outputs stay as they are. Features learn the new classes from their images alone, and only
# features are slowed by gamma. Images of old and new classes weigh as their classes do.
OURS = {"classification": "real_old_head_fixed", "head_at_full_rate": True, "balanced": 1.0}
# The same, and then the new outputs are learned anew, with no more of pseudo images than class
# means (``skd_jax/methods/skd/new_outputs.py``).
TRANSLATED = {**OURS, "new_outputs_decay": 2e-4}
# The same, and each task's classes leave the means of their real images, by which later tasks learn
# the outputs of all classes but the base's anew.
KEPT_MEANS = {**TRANSLATED, "keep_means": True}
OF_STAGE_TWO = {"ours": OURS, "translated": TRANSLATED, "kept_means": KEPT_MEANS}
RECIPES = {f.__name__: f for f in (skd, dafl, dfad, zskt, deep_inversion, abd)}

"""Delegator recipes: the losses of other data-free methods, in the frame of Algorithm 1.

    python -m skd_jax.main --config=configs/recipes.py:recipe=dafl --workdir=runs/dafl
    python -m skd_jax.main --config=configs/recipes.py:recipe=abd,dataset=flowers102 --workdir=...

Networks, optimisers, rates, batch and rounds stay those of the benchmark, so that recipes differ
in their losses alone: what S_n minimises, what D_n does, and whether S_n learns in the explore
step. S_n has no head: outputs are T_n's head on its features. Weights are those of the papers.
"""

import importlib

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Argument: recipe=NAME (skd), dataset=FILE (cifar100), scale=full or mini, tasks=N."""
    options = common.parse_arg(arg, recipe="skd", dataset="cifar100", scale="full", tasks=0)
    if options.recipe not in RECIPES:
        raise ValueError(
            f"config argument recipe={options.recipe}: give one of {', '.join(RECIPES)}"
        )
    try:
        benchmark = importlib.import_module(f"configs.{options.dataset}")
    except ImportError:
        raise ValueError(
            f"config argument dataset={options.dataset}: there is no configs/{options.dataset}.py"
        ) from None
    tasks = f",tasks={options.tasks}" if options.tasks else ""
    config = benchmark.get_config(f"scale={options.scale}{tasks}")
    RECIPES[options.recipe](config.stage_one)
    return config


def skd(stage_one: ConfigDict) -> None:
    """The paper's: Eq. 1-8, as the benchmark has them."""


def dafl(stage_one: ConfigDict) -> None:
    """Chen et al., Data-Free Learning of Student Networks, ICCV 2019: no adversary.

    One-hot loss 1, activation loss 0.1, information entropy 5; S learns T's scores (KL). There, G
    and S take a step each in turn.
    """
    stage_one.discrepancy = "kl"
    stage_one.student_explores = False
    stage_one.terms = ConfigDict({"category": 1.0, "activation": 0.1, "diversity": 5.0})


def dfad(stage_one: ConfigDict) -> None:
    """Fang et al., Data-Free Adversarial Distillation, 2019: the adversary alone, L1 of logits."""
    stage_one.discrepancy = "l1"
    stage_one.student_explores = False
    stage_one.terms = ConfigDict({"exploration": 1.0})


def zskt(stage_one: ConfigDict) -> None:
    """Micaelli and Storkey, Zero-shot Knowledge Transfer, NeurIPS 2019: the adversary alone, KL.

    Without their attention transfer, and 5 imitate steps a round where they take 10.
    """
    stage_one.discrepancy = "kl"
    stage_one.student_explores = False
    stage_one.terms = ConfigDict({"exploration": 1.0})


def deep_inversion(stage_one: ConfigDict) -> None:
    """Yin et al., Dreaming to Distill (DeepInversion), CVPR 2020: statistics and image priors.

    Cross-entropy 1, statistics 10, total variation 2.5e-5 and l2 3e-8 per image of 32x32 there;
    priors here are means, not sums, and weigh 1e-3. They invert images one by one, with given
    labels; here a generator draws them and the labels are Eq. 5's. S learns T's scores (KL).
    """
    stage_one.discrepancy = "kl"
    stage_one.student_explores = False
    stage_one.terms = ConfigDict(
        {"category": 1.0, "feature_statistics": 10.0, "total_variation": 1e-3, "image_norm": 1e-3}
    )


def abd(stage_one: ConfigDict) -> None:
    """Smith et al., Always Be Dreaming, ICCV 2021; R-DFCIL's inversion is the same.

    Cross-entropy of logits / 1000, class balance 1, Gaussian KL of the moments 50, smoothness 1e-3.
    """
    stage_one.discrepancy = "kl"
    stage_one.student_explores = False
    stage_one.feature_distance = "kl"
    stage_one.terms = ConfigDict(
        {
            "tempered_category": 1.0,
            "diversity": 1.0,
            "feature_statistics": 50.0,
            "smoothness": 1e-3,
        }
    )


RECIPES = {f.__name__: f for f in (skd, dafl, dfad, zskt, deep_inversion, abd)}

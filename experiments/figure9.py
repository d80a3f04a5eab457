"""Figure 9: what D_0 draws of each data set.

python -m experiments.figure9 --scale=mini --seeds=0,1,2
"""

import sys
from pathlib import Path

from PIL import Image

from experiments import study
from experiments.tables import source

NAME = "figure9"
TITLE = "Figure 9: pseudo images by the class that T_0 gives them"
GAP = 40  # pixels between pictures


def runs(told: study.Options, dataset: str | None = None) -> list[study.Run]:
    """The runs whose delegators it shows."""
    datasets = (dataset,) if dataset else study.DATASETS
    return [study.student(name, told.scale, seed) for name in datasets for seed in told.seeds]


def make(told: study.Options) -> None:
    """Makes the runs that are missing."""
    study.make(runs(told), told)


def draw(told: study.Options) -> None:
    """Puts the pictures that the runs have drawn side by side, seed by seed."""
    for dataset in study.DATASETS:
        paths = [
            run.folder(told.results) / "pseudo_images_by_class_0.png" for run in runs(told, dataset)
        ]
        images = [Image.open(path).convert("RGB") for path in paths if path.exists()]
        if not images:
            continue
        width = sum(image.width for image in images) + GAP * (len(images) - 1)
        whole = Image.new("RGB", (width, max(image.height for image in images)), "white")
        left = 0
        for image in images:
            whole.paste(image, (left, 0))
            left += image.width + GAP
        whole.save(told.out / f"{NAME}_{dataset}.png")


def pictures(told: study.Options) -> list[tuple[Path, str]]:
    """The pictures and their sources."""
    return [
        (
            told.out / f"{NAME}_{dataset}.png",
            f"{dataset}. "
            + source(told.command(NAME), told.scale, study.summaries(runs(told, dataset), told)),
        )
        for dataset in study.DATASETS
    ]


if __name__ == "__main__":
    sys.exit(study.script(sys.modules[__name__]))

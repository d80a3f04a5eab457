r"""What the delegator is worth: the same run with it and without it, side by side (Table III).

    python -m experiments.with_and_without_delegator \
        --config=configs/digits.py --workdir=runs/digits

Both runs share configuration, seed and T_0; the second, in ``WORKDIR/without_delegator``, skips
stage one and learns from new images alone. An interrupted pair goes on from where it was.
"""

import dataclasses
import sys
from pathlib import Path

from skd_jax import parallel, plots
from skd_jax.config import Config
from skd_jax.errors import UserError
from skd_jax.main import command
from skd_jax.methods import skd
from skd_jax.train import train

ROWS = (
    ("average incremental accuracy", "average_incremental_accuracy"),
    ("  without the base step", "average_incremental_accuracy_without_base"),
    ("final accuracy", "final_accuracy"),
    ("forgetting", "forgetting"),
)


def compare(config: Config, workdir: str) -> None:
    """Trains both and prints their summaries side by side, in percent."""
    skd.networks(config)  # raises if it is another method's
    if not config.method.stage_two.delegator:
        raise UserError(
            "config.method.stage_two.delegator: leave it True; both cases are run anyway"
        )
    stage_two = dataclasses.replace(config.method.stage_two, delegator=False)
    method = dataclasses.replace(config.method, stage_two=stage_two)
    without = dataclasses.replace(config, method=method)
    off_dir = Path(workdir) / "without_delegator"
    on = train(config, workdir)
    print("\nThe same run without the delegator:")
    off = train(without, off_dir)
    if not parallel.is_first_process():
        return
    plots.accuracy_curves(
        {"with the delegator": on, "without": off}, Path(workdir) / "with_and_without.png"
    )
    print(f"\n{config.data.name}, seed {config.seed}{'with':>27}{'without':>10}{'points':>10}")
    for title, key in ROWS:
        a, b = 100 * on[key], 100 * off[key]
        print(f"{title:<32}{a:>12.2f}{b:>10.2f}{a - b:>10.2f}")
    first = on["delegator"][0]
    teacher, student = 100 * first["teacher_accuracy"], 100 * first["student_accuracy"]
    pictures = sorted(path.name for path in Path(workdir).glob("*.png"))
    print(f"pictures in {workdir}: {', '.join(pictures)}")
    print(f"T_0 {teacher:.2f}, S_0 {student:.2f}: the student lacks {teacher - student:.2f} points")


if __name__ == "__main__":
    sys.exit(command(compare))

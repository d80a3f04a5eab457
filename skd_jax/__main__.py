"""``python -m skd_jax``: the command ``skd-jax``."""

import sys

from skd_jax.cli import run

if __name__ == "__main__":
    sys.exit(run())

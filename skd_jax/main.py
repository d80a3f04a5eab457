"""The command line: ``python -m skd_jax.main --config=configs/digits.py --workdir=DIR``."""

import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from skd_jax.config import Config, from_config_dict
from skd_jax.errors import UserError
from skd_jax.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file under configs/, with its argument: configs/cifar100.py:tasks=10."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes, and goes on from if it was interrupted."
)


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The typed configuration and the workdir that a command line names.

    Raises:
      UserError: anything wrong with either.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # configs import their neighbours, as under "python -m"
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise UserError(_line(error)) from error
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"--config: cannot read it: {_line(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config: {_line(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; settings are --config.SECTION.FIELD=VALUE")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError("give --config=configs/digits.py (or another config) and --workdir=DIR")
    return from_config_dict(_CONFIG.value), _WORKDIR.value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def command(work: Callable[[Config, str], object]) -> int:
    """Parses the command line, does ``work(config, workdir)`` and returns the exit code."""
    try:
        config, workdir = parse(sys.argv)
        work(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def run() -> int:
    """Entry point of ``python -m skd_jax.main`` and of the console script; the exit code."""
    return command(train)


if __name__ == "__main__":
    sys.exit(run())

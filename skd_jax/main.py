"""The command line: ``python -m skd_jax.main --config=configs/digits.py --workdir=DIR``."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import config_flags

from skd_jax.compiler import keep_compiled
from skd_jax.config import Config, from_config_dict, unknown_field
from skd_jax.errors import UserError
from skd_jax.parallel import join_processes
from skd_jax.train import train

app.define_help_flags()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file under configs/, with its argument: configs/cifar100.py:tasks=10."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes, and goes on from if it was interrupted."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes, on one machine or many, that run the same command. TPU "
    "pods, Slurm, Kubernetes and Open MPI say which one; elsewhere give the three flags below.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The typed configuration and the workdir that a command line names.

    Raises:
      UserError: anything wrong with either.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # configs import their neighbours, as under "python -m"
    try:
        rest = flags.FLAGS(list(argv))
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError("give --config=configs/digits.py (or another config) and --workdir=DIR")
        fields = _CONFIG.value.to_dict()
    except UserError:
        raise
    except Exception as error:  # a config file is a program: anything may be raised in it
        raise UserError(_explain(error, argv)) from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; settings are --config.SECTION.FIELD=VALUE")
    return from_config_dict(fields), _WORKDIR.value


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line about what absl and ml_collections raise, which may hold a whole traceback."""
    settings = [arg.lstrip("-").partition("=") for arg in argv[1:]]
    if isinstance(error, KeyError | AttributeError):
        # An override of a field that is not there; the schema knows what its neighbours are.
        # A suggestion may follow the name.
        missing = re.search(r"\w+", str(error.args[0]) if error.args else "")
        for name, _, _ in settings:
            if name.startswith("config.") and missing and missing.group() in name.split("."):
                return unknown_field(name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    file = next((value for name, _, value in settings if name == "config"), "")
    if isinstance(error, flags.Error) and "Traceback" not in str(error):
        alone = [name for name, _, _ in settings if name.startswith("config.") and not file]
        if alone:
            return f"--{alone[0]} needs --config=configs/digits.py (or another config) beside it"
        return " ".join(lines)
    return f"--config={file}: {last}"


def command(work: Callable[[Config, str], object]) -> int:
    """Parses the command line, does ``work(config, workdir)`` and returns the exit code."""
    try:
        config, workdir = parse(sys.argv)
        keep_compiled()
        given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if any(value is not None for value in given) and not _DISTRIBUTED.value:
            raise UserError(
                "--coordinator, --processes and --process need --distributed beside them"
            )
        if _DISTRIBUTED.value:
            join_processes(*given)
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

"""The command line: ``python -m skd_jax.main --config=configs/digits.py --workdir=DIR``."""

import atexit
import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from skd_jax import config_files
from skd_jax.compiler import keep_compiled
from skd_jax.config import Config, same_name, unknown_field, wrong_value
from skd_jax.errors import (
    Interrupted,
    UserError,
    accept_any_character,
    first_line,
    on_platform,
    one_line,
)
from skd_jax.methods import METHODS, from_config_dict
from skd_jax.parallel import join_processes
from skd_jax.paths import given_path
from skd_jax.train import train

PEER_LOST = 3  # the exit code where another process of the run has died
_LOST = re.compile("Gloo|NCCL|[Cc]onnection|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|[Hh]eartbeat")


class _ConfigFile(flags.ArgumentParser):
    """Reads the file that --config names, in place of ml_collections' own parser."""

    def parse(self, argument: str) -> ConfigDict:
        return config_files.read(argument).lock()

    def flag_type(self) -> str:
        return "config object"


app.define_help_flags()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file under configs/, with its argument: configs/cifar100.py:tasks=10."
)
flags.FLAGS["config"].parser = _ConfigFile()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes, and goes on from if it was interrupted."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes, on one machine or many, that run the same command. TPU "
    "pods, Slurm, Kubernetes and Open MPI say which one; elsewhere give --coordinator, --processes "
    "and --process.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    100,
    "Seconds without a sign of life of a process after which all others end.",
    lower_bound=1,
)


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The typed configuration and the workdir that a command line names.

    Raises:
      UserError: anything wrong with either.
    """
    try:
        return _parsed(argv)
    except UserError as error:
        raise UserError(one_line(str(error))) from error


def _parsed(argv: Sequence[str]) -> tuple[Config, str]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # configs may name modules here, as under "python -m"
    try:
        rest = flags.FLAGS(list(argv))
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError("give --config=configs/digits.py (or another config) and --workdir=DIR")
        fields = _CONFIG.value.to_dict()
    except UserError:
        raise
    except Exception as error:  # absl and ml_collections raise half a dozen types
        raise UserError(_explain(error, argv)) from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; settings are --config.SECTION.FIELD=VALUE")
    return from_config_dict(fields), str(given_path(_WORKDIR.value, "--workdir"))


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """What absl and ml_collections raise, in our words."""
    text = str(error)
    settings = []  # --name=value, --name value, or --noname
    for arg, after in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, given, value = arg.lstrip("-").removeprefix("no").partition("=")
        settings.append((name, value if given else after))
    file = next((value for name, value in settings if name == "config"), "")
    # Only the method that the config's argument names has fields here; the first is the default.
    named = re.search(r"[:,]method=(\w+)", file)
    method = named.group(1) if named else next(iter(METHODS))
    methods = {method: METHODS[method]} if method in METHODS else METHODS
    overrides = [(name, value) for name, value in settings if name.startswith("config.")]
    if isinstance(error, flags.Error):
        for name, value in overrides:
            if not file:
                return f"--{name} needs --config=configs/digits.py (or another config) beside it"
            if text.startswith(f"flag --{name}={value}: "):
                return wrong_value(name, value, methods)
        unknown = re.match(r"Unknown command line flag '([\w.]+)'", text)
        if unknown and (meant := same_name(unknown.group(1), methods)):
            return f"--{unknown.group(1)}: unknown; did you mean --{meant}?"
        return text
    # Most likely an override of a field that is not there; the schema knows its neighbours.
    for name, _ in overrides:
        if problem := unknown_field(name, methods):
            return problem
    if isinstance(error, KeyError | AttributeError):
        # Only the config itself knows the names of terms. A suggestion may follow the name.
        missing, close = re.search(r"\w+", text), re.search(r'mean "(\w+)"', text)
        for name, _ in overrides:
            if missing and missing.group() in name.split("."):
                hint = (
                    f"; did you mean {name.rpartition('.')[0]}.{close.group(1)}?" if close else ""
                )
                return f"{name}: unknown field{hint}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"--config={file}: {lines[-1] if lines else type(error).__name__}"


def command(work: Callable[[Config, str], object]) -> int:
    """Parses the command line, does ``work(config, workdir)`` and returns the exit code.

    0: done. 2: wrong input, or a run that cannot go on. 3: another process of the run has died.
    130, 143, 129: stopped by Ctrl-C, SIGTERM or SIGHUP, and saved.
    """
    accept_any_character()
    atexit.register(gc.freeze)  # or Python goes over JAX's many objects again at its end
    try:
        config, workdir = parse(sys.argv)
        keep_compiled()
        given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if any(value is not None for value in given) and not _DISTRIBUTED.value:
            raise UserError(
                "--coordinator, --processes and --process need --distributed beside them"
            )
        if _DISTRIBUTED.value:
            join_processes(*given, _PEER_TIMEOUT.value)
        with on_platform():
            work(config, workdir)
        return 0
    except UserError as error:
        code, words, together = 2, f"error: {error}", error.agreed
    except Interrupted as stopped:
        code, words, together = stopped.exit_code, str(stopped), True
    except KeyboardInterrupt:
        words = "interrupted: the same command goes on from the newest checkpoint, if there is one"
        code, together = 130, False
    except jax.errors.JaxRuntimeError as error:
        if not (jax.distributed.is_initialized() and _LOST.search(str(error))):
            raise
        words = (
            "error: another process of this run has ended or cannot be reached "
            f"({first_line(error)}); start all of them again: they go on from the newest checkpoint"
        )
        code, together = PEER_LOST, False
    with contextlib.suppress(OSError):  # a log on a full disk; the exit code says it too
        print(words, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and not together:
        os._exit(code)  # or JAX would wait for the others, who may wait for this process
    return code


def run() -> int:
    """Entry point of ``python -m skd_jax.main`` and of ``skd-jax train``; the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        from skd_jax import cli  # which starts training by this module

        return cli.run(["train", "--help"])
    return command(train)


if __name__ == "__main__":
    sys.exit(run())

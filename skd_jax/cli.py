"""The command ``skd-jax``: extend, predict, evaluate, sample, export, train.

Exit codes: 0 done; 2 something given is wrong, or an image among many cannot be read, and one line
on standard error says which; 130 Ctrl-C; 141 whoever read the output has gone. ``skd-jax train``
has those of :func:`skd_jax.main.command`.

What each command takes and does is in ``commands.py``.
"""

import argparse
import atexit
import functools
import gc
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from skd_jax import __version__, commands
from skd_jax.errors import (
    Interrupted,
    UserError,
    accept_any_character,
    complain,
    on_platform,
    one_line,
    told,
)
from skd_jax.output import destination

CTRL_C, BROKEN_PIPE = 130, 141  # exit codes


def run(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``skd-jax`` and of ``python -m skd_jax``; the exit code.

    Args:
      argv: the command line without the program; None is that of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    accept_any_character()
    if args and _is_training(args):
        return _train(args[1:] if args[0] == "train" else args)
    atexit.register(gc.freeze)  # or Python goes over JAX's many objects again at its end
    log, warnings = logging.getLogger("skd_jax"), _Warnings(logging.WARNING)
    log.addHandler(warnings)
    try:
        with on_platform():
            code = _work(args)
        with destination(None):  # what has been printed is written now, or fails here
            return code
    except UserError as error:
        code, words = 2, told(error)
    except Interrupted as stopped:
        code, words = stopped.exit_code, str(stopped)
    except KeyboardInterrupt:
        code, words = CTRL_C, "interrupted"
    except BrokenPipeError:
        return BROKEN_PIPE
    finally:
        log.removeHandler(warnings)
    complain(words)
    return code


def _work(args: Sequence[str]) -> int:
    try:
        options = _parse(args)
    except SystemExit as done:  # after --help or --version
        if args[0] == "train":
            from skd_jax.config_files import help_text

            with destination(None) as out:
                out.write(f"\n{help_text()}\n")
        return int(done.code or 0)
    return options.work(options)


class _Warnings(logging.Handler):
    """Prints what the package warns of as it prints errors."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(one_line(record.getMessage()))


# Training has absl's flags: skd_jax.main reads them, and the parser here only helps.


def _is_training(args: Sequence[str]) -> bool:
    """Whether to train; ``skd-jax --config=... --workdir=...`` has always done so."""
    if args[0] == "train":
        return not {"-h", "--help"} & set(args)
    return args[0].startswith("-") and args[0] not in ("-h", "--help", "--version")


def _train(args: Sequence[str]) -> int:
    before = sys.argv
    sys.argv = ["skd_jax.main", *args]  # the module whose flags absl's --help shows
    try:
        from skd_jax import main

        return main.run()
    finally:
        sys.argv = before


# All other commands have argparse's.


class _Parser(argparse.ArgumentParser):
    """Help 80 columns wide, no abbreviations, and errors of one line."""

    def __init__(self, **arguments: Any):
        style = functools.partial(argparse.RawDescriptionHelpFormatter, width=commands.WIDTH)
        super().__init__(formatter_class=style, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="skd-jax",
        description="Teach an image classifier new classes when the old classes' images are gone.",
        epilog="skd-jax COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(work=functools.partial(_help, parser))
    known = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_all(known)
    if args and args[0] in known.choices:  # so that flags may stand between images
        return known.choices[args[0]].parse_intermixed_args(args[1:])
    return parser.parse_args(args)


def _help(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Without a command, what the commands are."""
    del options
    complain(parser.format_help())
    return 2


if __name__ == "__main__":
    sys.exit(run())

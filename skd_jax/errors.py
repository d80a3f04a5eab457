"""The exceptions a run may end in that are no bugs, and what is said when it need not end."""

import contextlib
import sys
from collections.abc import Iterator, Sequence


def first_line(error: Exception) -> str:
    """The first line of what an exception says, not too long, as the reason in a message."""
    return (str(error).splitlines() or [""])[0][:200]


def one_line(message: str) -> str:
    """The message on one line of bearable length, whatever was typed and is repeated in it."""
    line = " ".join(message.splitlines())
    return line if len(line) <= 500 else f"{line[:300]} ... {line[-190:]}"


def printable(text: str) -> str:
    """The text with what could move a terminal's cursor, or is invisible, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(line: str) -> None:
    """Prints a warning for people on standard error, so that it mixes with no results."""
    with contextlib.suppress(OSError):  # a full disk
        print("warning:", printable(line), file=sys.stderr, flush=True)


def complain(words: str) -> None:
    """Prints lines for people on standard error; where it cannot, the exit code says it too."""
    with contextlib.suppress(OSError):
        for line in words.split("\n"):
            print(printable(line), file=sys.stderr, flush=True)


def accept_any_character() -> None:
    """From now on prints what the output's encoding lacks as an escape, where it would raise."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


class UserError(Exception):
    """Wrong input from outside: what is wrong and how to fix it, on one line.

    Attributes:
      agreed: whether every process of the run ends with one, so that none waits for another.
      fix: lines to type that fix it, shown below the message, each on a line of its own.
    """

    agreed = False

    def __init__(self, message: str, fix: Sequence[str] = ()):
        super().__init__(message)
        self.fix = tuple(fix)

    def __str__(self) -> str:
        return "\n  ".join((super().__str__(), *self.fix))


def told(error: UserError) -> str:
    """What is printed of an error: its message on one line, and what to type below it."""
    return "\n  ".join((f"error: {one_line(str(error.args[0]))}", *error.fix))


class Interrupted(Exception):
    """The run was told to stop and has saved the step it was at; the message says where.

    Attributes:
      exit_code: what the process ends with: 128 + the signal's number, 130 for Ctrl-C, 143 for
        SIGTERM and 129 for SIGHUP.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def on_platform() -> Iterator[None]:
    """Makes JAX's many lines about a platform that is not there a UserError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # of any kind: what JAX raises has no type
        if words := _missing_platform(error):
            raise UserError(words) from error
        raise


def _missing_platform(error: Exception) -> str | None:
    """What keeps JAX from the platform it is to use; None if ``error`` is of another kind."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as again:
        error = again
    else:  # of several that were asked for, JAX tells only once of those that are not there
        if not str(error).startswith("Unable to initialize backend"):
            return None
    said = f" ({first_line(error)})" if str(error) else ""
    if asked := jax.config.values["jax_platforms"]:
        return (
            f"JAX_PLATFORMS={asked}: there is no such platform here{said}; install JAX for it, as "
            "skd_jax/README.md says, or unset JAX_PLATFORMS, which takes what is there"
        )
    return f"JAX finds nothing to compute on{said}; JAX_PLATFORMS=cpu takes the CPU"

"""The exceptions a run may end in that are no bugs, and what is said when it need not end."""

import contextlib
import sys
from collections.abc import Sequence


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


class Interrupted(Exception):
    """The run was told to stop and has saved the step it was at; the message says where.

    Attributes:
      exit_code: what the process ends with: 128 + the signal's number, 130 for Ctrl-C, 143 for
        SIGTERM and 129 for SIGHUP.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

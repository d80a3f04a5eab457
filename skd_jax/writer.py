"""What a run says while it goes: metrics.jsonl, TensorBoard scalars."""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # generated: no types
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.summary import scalar

from skd_jax.errors import first_line, warn
from skd_jax.files import GO_ON, replacing, writing

LOG = "metrics.jsonl"
_POSITION = ("time", "task", "phase", "step", "global_step")


class Writer:
    """Appends scalars to ``metrics.jsonl`` and ``tensorboard/`` in the run's directory.

    A row is on disk when :meth:`write` returns, so a checkpoint saved after it never knows more
    than the file does. ``global_step`` counts from 1 over the whole run.

    Attributes:
        rows: How many were kept of those that were there.
    """

    def __init__(self, workdir: str | Path, resume_global_step: int = 0):
        """Opens the files, making ``workdir`` if need be.

        Args:
            workdir: The run's directory.
            resume_global_step: The global step of the checkpoint the run goes on from; 0 for a run
                from its start. Later rows, left by a run that got further than its last
                checkpoint, are dropped: they are about to be written again.
        """
        workdir = Path(workdir)
        self._path, self._folder = workdir / LOG, workdir / "tensorboard"
        with writing(workdir, GO_ON):
            workdir.mkdir(parents=True, exist_ok=True)
            self.rows = keep_rows(self._path, resume_global_step)
            self._lines = self._path.open("ab", buffering=0)  # a line at a time
            self._folder.mkdir(exist_ok=True)
            # Without SummaryWriter's thread and queue: what goes wrong is told where it does. The
            # names are of one second, so that a run killed at once would be overwritten.
            self._tensorboard = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            session = SessionLog(status=SessionLog.START)
            self._event(resume_global_step + 1, session_log=session)  # purges later steps
            self._tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(
        self,
        scalars: Mapping[str, SupportsFloat],
        *,
        task: int,
        phase: str,
        step: int,
        global_step: int,
    ) -> None:
        """Writes one row.

        Args:
            scalars: By name; arrays of one element are waited for. What is not finite becomes
                null in the JSON row, since JSON has no word for it.
            task: The task the run is in.
            phase: What it is doing; TensorBoard's tag is ``{phase}/{name}``.
            step: Within the phase.
            global_step: Within the run, never decreasing.

        Raises:
            ValueError: A scalar is named like one of the fields that place the row.
            UserError: The row cannot be written; the disk is full, for instance.
        """
        if taken := set(scalars) & set(_POSITION):
            raise ValueError(f"scalars may not be named {', '.join(sorted(taken))}")
        values = {name: float(value) for name, value in scalars.items()}
        position = (round(time.time(), 3), task, phase, step, global_step)
        row: dict[str, Any] = dict(zip(_POSITION, position, strict=True))
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with writing(self._path, GO_ON):
            while line:
                line = line[self._lines.write(line) :]  # a full disk may take a part
            os.fsync(self._lines.fileno())
        with writing(self._folder, GO_ON):
            for name, value in filter(lambda item: math.isfinite(item[1]), values.items()):
                self._event(global_step, summary=scalar(f"{phase}/{name}", value))
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes both files."""
        self._lines.close()
        with contextlib.suppress(OSError):  # on a full disk, which has been told
            self._tensorboard.close()

    def _event(self, global_step: int, **content: Any) -> None:
        self._tensorboard.write_event(Event(wall_time=time.time(), step=global_step, **content))


def keep_rows(path: Path, last: int) -> int:
    """Drops the rows after global step ``last`` and what is no row, and returns how many stay.

    The file is replaced, whole or not at all, if anything is dropped; it need not exist.
    """

    def keep(line: bytes) -> bool:
        try:
            return json.loads(line)["global_step"] <= last and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):  # a killed run was writing it
            return False

    if not path.exists():
        return 0
    with path.open("rb") as old:
        kept = [keep(line) for line in old]
    if not all(kept):
        with path.open("rb") as old, replacing(path, mode="wb") as new:
            new.writelines(itertools.compress(old, kept))
    return sum(kept)


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Makes whatever goes wrong with a picture or a page a warning: no run ends by it.

    Args:
        path: Of what is drawn within; nothing that a result depends on may be there.
    """
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        warn(f"{path} could not be drawn ({why}); all else goes on without it")


def say(line: str) -> None:
    """Prints a line for people; where it cannot, as to a log on a full disk, the run goes on."""
    with contextlib.suppress(OSError):
        try:
            print(line, flush=True)
        except UnicodeEncodeError:  # of a stream that the command line has not prepared
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)

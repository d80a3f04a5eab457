import json
import time

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from skd_jax.writer import Writer


def write(w, global_step, **scalars):
    w.write(scalars, task=0, phase="base", step=global_step - 100, global_step=global_step)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Every TensorBoard event: records are a length (8 bytes), its check (4), data, a check (4)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_rows_and_scalars(tmp_path):
    before = time.time()
    with Writer(tmp_path / "run") as w:
        write(w, 101, loss=jnp.float32(0.5), rate=1)
        [row] = rows(tmp_path / "run")  # on disk at once
        write(w, 102, loss=float("nan"), rate=2)
    assert before - 1 < row.pop("time") < time.time() + 1
    assert row == {
        "task": 0,
        "phase": "base",
        "step": 1,
        "global_step": 101,
        "loss": 0.5,
        "rate": 1.0,
    }
    assert rows(tmp_path / "run")[1]["loss"] is None
    scalars = [
        (value.tag, value.simple_value, event.step)
        for event in events(tmp_path / "run")
        for value in event.summary.value
    ]
    assert scalars[:2] == [("base/loss", 0.5, 101), ("base/rate", 1.0, 101)]
    assert scalars[2:] == [("base/rate", 2.0, 102)]  # nothing of what is not finite


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    with Writer(tmp_path) as w:
        for step in (10, 20, 30):
            write(w, step, loss=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "global_st')  # a run killed while it wrote
    with Writer(tmp_path, resume_global_step=20) as w:
        write(w, 30, loss=-1)
    assert [(row["global_step"], row["loss"]) for row in rows(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, -1),
    ]
    assert not list(tmp_path.glob("*.partial"))
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts[-1] == 21  # TensorBoard hides earlier events from there on


def test_a_run_from_its_start_keeps_no_old_rows(tmp_path):
    with Writer(tmp_path) as w:
        write(w, 10, loss=1)
    with Writer(tmp_path) as w:
        write(w, 10, loss=2)
    assert [row["loss"] for row in rows(tmp_path)] == [2]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100, b"[]", b"7"])
def test_lines_that_are_no_rows_are_dropped(tmp_path, line):
    with Writer(tmp_path) as w:
        write(w, 10, loss=1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with Writer(tmp_path, resume_global_step=10) as w:
        write(w, 20, loss=2)
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2]


def test_reserved_names(tmp_path):
    with Writer(tmp_path) as w, pytest.raises(ValueError, match="step"):
        write(w, 10, step=1.0)

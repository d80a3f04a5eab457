"""Programs in memory and on disk: as many as a task needs, however many tasks there are."""

import gc
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import rows, silent, tiny

from skd_jax import compiler, loop, train
from skd_jax.compiler import bound, compiled, drop_programs

BACKEND_COMPILES = "/jax/core/compile/backend_compile_duration"


def live() -> int:
    gc.collect()  # programs that other tests have left
    return len(jax.devices()[0].client.live_executables())


def test_dropped_programs_are_gone(monkeypatch):
    monkeypatch.setattr(compiler, "_made", type(compiler._made)())  # other tests' stay

    @compiled()
    def double(x):
        return 2 * x

    @compiled()
    def unused(x):
        return x

    inputs = [jnp.ones(n) for n in (2, 3, 4)]
    double(inputs[0])  # what else a first call compiles
    drop_programs()
    before = live()
    for _ in range(2):
        for x in inputs:
            double(x)
    assert live() == before + 3
    drop_programs()
    assert live() == before

    @compiled(stays=True)
    def served(x):
        return 3 * x

    served(inputs[0])
    drop_programs()
    assert live() == before + 1
    assert double(inputs[0]).tolist() == [2, 2]


def test_programs_are_dropped_when_a_task_is_over(tmp_path, monkeypatch):
    dropped = []

    def drop(all_of_them: bool) -> None:
        dropped.append((rows(tmp_path)[-1], all_of_them))

    monkeypatch.setattr(loop, "drop_programs", drop)
    monkeypatch.setattr(loop, "DROP_ALL", 2)
    config = tiny(stage_two__delegator=False, base__epochs=1, stage_two__epochs=1)
    train.train(config, tmp_path, silent)
    found = [(row["task"], row["phase"], all_of_them) for row, all_of_them in dropped]
    assert found == [(0, "base", False), (1, "learn", True)]


def test_what_jax_compiled_by_itself_is_dropped_with_all():
    drop_programs()
    x, before = jnp.ones((3, 41)), live()
    jnp.concatenate([x, x])
    drop_programs()
    assert live() > before  # single operations stay
    drop_programs(all_of_them=True)
    assert live() == 0
    assert jnp.concatenate([x, x]).shape == (6, 41)


def test_the_folder_of_programs_is_bounded(tmp_path):
    for age, name in enumerate(("a-cache", "b-cache", "c-cache", "notes.txt")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    bound(str(tmp_path), 300)
    assert len(list(tmp_path.iterdir())) == 4
    bound(str(tmp_path), 299)
    assert {p.name for p in tmp_path.iterdir()} == {"a-cache", "b-cache", "notes.txt"}
    bound(str(tmp_path), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    bound(str(tmp_path / "none"), 0)


def test_a_program_that_cannot_be_removed_ends_nothing(tmp_path):
    (tmp_path / "a-cache").mkdir()  # which is no file, and so stays
    (tmp_path / "b-cache").write_bytes(bytes(100))
    os.utime(tmp_path / "a-cache", (1000, 1000))
    bound(str(tmp_path), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a-cache"]


TWENTY = """
import re, sys
import jax, numpy as np
sys.path.insert(0, "tests")
from test_memory import BACKEND_COMPILES, Random
from test_train import silent, tiny
from skd_jax import experiment, train
count = 0
def heard(name, seconds, **more):
    global count
    count += name == BACKEND_COMPILES
jax.monitoring.register_event_duration_secs_listener(heard)
end = train.Run._end
def ended(run, images):
    phase = run.phases[run.at.phase]
    end(run, images)
    status = open("/proc/self/status").read()
    print(phase.task, phase.name, count, int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) // 1024)
train.Run._end = ended
experiment.open_source = lambda data: Random()
config = tiny(data__tasks=20, base__batch=16, base__epochs=1, base__drop_epochs=(),
    stage_two__batch=16, stage_two__epochs=1, stage_two__drop_epochs=(), stage_one__epochs=1,
    run__eval_batch=32)
train.train(config, sys.argv[1], silent)
"""


class Random:
    """44 classes of random images."""

    class_names = tuple(map(str, range(44)))

    def labels(self, split):
        return np.arange(44 * 16, dtype=np.int32) % 44

    def read(self, split, indices):
        return np.random.default_rng(0).integers(0, 256, (len(indices), 8, 8, 1), np.uint8)

    def forget(self, indices):
        pass


@pytest.mark.slow
def test_memory_is_flat_over_twenty_tasks(repo, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", TWENTY, str(tmp_path / "run")],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^(\d+) learn (\d+) (\d+)$", found.stdout, re.M)
    assert len(lines) == 20, found.stderr
    tasks = {int(task): (int(count), int(mib)) for task, count, mib in lines}
    # Programs a task, but where all have been dropped.
    after = [n for n in range(3, 20) if n % loop.DROP_ALL and (n + 1) % loop.DROP_ALL]
    assert max(tasks[n + 1][0] - tasks[n][0] for n in after) <= 14
    # MiB a task, between tasks that begin alike; it was 160 to 300, and 50 with malloc's rest.
    assert (tasks[20][1] - tasks[5][1]) / 15 < 5
    assert max(mib for _, mib in tasks.values()) < tasks[4][1] + 100

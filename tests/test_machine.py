"""What a machine has or lacks: platforms, open files, memory, cores."""

import os
import subprocess
import sys

import jax
import pytest

from skd_jax.errors import UserError, on_platform


def raising(error: Exception):
    def devices():
        raise error

    return devices


# Platforms that are not there


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), " there is no such platform here; "),
        (RuntimeError("Unable to initialize backend 'tpu'\nmore"), "backend 'tpu'); install JAX"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error, words):
    monkeypatch.setattr(jax, "devices", raising(error))
    with pytest.raises(UserError) as found, on_platform():
        jax.devices()
    assert words in str(found.value) and "\n" not in str(found.value)
    assert str(found.value).startswith(f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: ")


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("a bug"), AssertionError("a bug"), ValueError("a bug")):
        with pytest.raises(type(error), match="a bug"), on_platform():
            raise error


@pytest.mark.parametrize(
    "command",
    [
        ("skd_jax.main", "--config=configs/digits.py", "--workdir={new}"),
        ("skd_jax", "predict", "--model={model}", "{pictures}"),
        ("experiments.measure.overhead", "--out={new}"),
    ],
)
def test_every_command_says_so_and_exits_with_2(repo, tmp_path, model_file, pictures, command):
    given = {"new": tmp_path / "new", "model": model_file, "pictures": pictures}
    args = [part.format(**given) for part in command]
    env = {**os.environ, "PYTHONPATH": str(repo), "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", *args],
        env=env,
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=300,
    )
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: JAX_PLATFORMS=nowhere: there is no")
    assert not (tmp_path / "new").exists()

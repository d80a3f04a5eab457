"""Systems without fcntl and SIGHUP, as Windows is."""

import signal
import subprocess
import sys

import pytest

from experiments.framework import scripts

START = """
import pathlib, signal, sys
sys.modules["fcntl"] = None
del signal.SIGHUP
"""
MSVCRT = """
import errno, os, types
import jax, subprocess  # which would ask more of it
held = set()
def locking(descriptor, mode, count):
    assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 0)
    if held:
        raise OSError(errno.EACCES, "Permission denied")
    held.add(descriptor)
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""
WORK = """
from skd_jax.errors import UserError
from skd_jax.lock import locked
from skd_jax.stopping import StopSignals
workdir = pathlib.Path(sys.argv[1])
with locked(workdir), StopSignals() as signals:
    signal.raise_signal(signal.SIGTERM)
    print(signals.poll())
    try:
        with locked(workdir):
            print("no lock")
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("system", "said"), [("", "no lock"), (MSVCRT, "another run is at work there")]
)
def test_runs_lock_and_stop_without_fcntl_and_sighup(repo, tmp_path, system, said):
    command = [sys.executable, "-c", START + system + WORK, str(tmp_path / "run")]
    found = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    code, line = found.stdout.splitlines()
    assert code == "143" and said in line


def test_a_study_stops_without_sighup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    with pytest.raises(KeyboardInterrupt), scripts._stopped_as_by_ctrl_c():
        signal.raise_signal(signal.SIGTERM)

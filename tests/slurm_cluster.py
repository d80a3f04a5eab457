"""A Slurm of one machine, on loopback, with a configuration of its own in a temporary folder."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CPUS = 2
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=60
MinJobAge=7200
FirstJobId={first}
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=usual Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def asked(*command: str) -> str:
    """What a command of Slurm's prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def slurm() -> Iterator[Path]:
    """Starts one, names it in SLURM_CONF, and stops it; skips where it is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    for program in PROGRAMS:
        if not shutil.which(program, path=path):
            pytest.skip(f"needs Slurm and munge, and there is no {program}")
    ports = [_free_port() for _ in range(2)]
    with tempfile.TemporaryDirectory(prefix="skd_slurm_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)  # munge wants others to reach its socket
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        # JAX's port follows from the number of the job.
        given = {"user": getpass.getuser(), "folder": folder, "cpus": CPUS}
        conf = CONF.format(
            controller=ports[0], node=ports[1], first=1 + os.getpid() % 4000, **given
        )
        (folder / "slurm.conf").write_text(conf)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PATH", path)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        flags = [f"--{flag}={folder / file}" for flag, file in files.items()]
        for command in (
            ["munged", "-F", *flags],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-Nlocalhost"],
        ):
            log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if command[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), folder)
        _until(lambda: "idle" in _sinfo(), folder)
        stack.callback(_cancel_all)
        yield folder


def _sinfo() -> str:
    command = ("sinfo", "--noheader", "--format=%T")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _cancel_all() -> None:
    subprocess.run(["scancel", "--user", getpass.getuser()], check=False)
    deadline = time.monotonic() + 60
    while asked("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.5)


def _until(is_so, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            said = [f"{path.name}: {path.read_text()[-500:]}" for path in folder.glob("*.out")]
            pytest.fail("Slurm does not start:\n" + "\n".join(said))
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]

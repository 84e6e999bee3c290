"""A real Slurm of two nodes on this machine's loopback, with a munge of its own; nothing outside its folder is touched."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
CPUS_PER_NODE = 4
"""As told to Slurm, whatever this machine has, so that tests needn't wait for one another."""
PATIENCE_SECONDS = 60
# A requeued job waits until its credential has expired, 120 seconds unless said otherwise, and then for the next look at the queue.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=3600
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed here; daemons lie outside a user's usual path."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


class SlurmCluster:
    """Context manager: the daemons run in it, and SLURM_CONF points to their configuration."""

    def __enter__(self) -> Self:
        # Not a folder of pytest: the names of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self._daemons: list[subprocess.Popen] = []
        self._before = dict(os.environ)
        os.environ["PATH"] = _path()
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=False, capture_output=True)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < deadline and _output("squeue", "--noheader"):
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(PATIENCE_SECONDS)
        os.environ.clear()
        os.environ.update(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        names = {"folder": self.folder, "host": host, "controller_port": ports[0], "user": getpass.getuser()}
        (self.folder / "slurm.conf").write_text(CONF.format(nodes=nodes, **names))
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *paths)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(
            lambda: (
                _output("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%T").split()
                == ["idle"] * len(NODES)
            ),
            "Slurm",
        )

    def _daemon(self, *command: str) -> None:
        log = self.folder / f"{len(self._daemons)}-{command[0]}.out"
        with open(log, "wb") as handle:
            # In a session of its own: Ctrl-C at the tests is not for the daemons, which end in order.
            self._daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    def _wait(self, is_up: object, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_up():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                said = "\n".join(
                    f"{path.name}:\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.out")
                )
                pytest.fail(f"{what} did not come up:\n{said}")
            time.sleep(0.1)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

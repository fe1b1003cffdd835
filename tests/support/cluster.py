"""A Slurm of the tests' own on this machine: one controller and four virtual nodes, all they keep in one folder."""

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.daemons import Daemon, skip_without
from tests.support.ranks import REPOSITORY

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as its credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=10
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_1} CPUs=2 RealMemory=4000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_2} CPUs=2 RealMemory=4000 Gres=gpu:8
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_3} CPUs=2 RealMemory=4000 Gres=gpu:8
NodeName=n4 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_4} CPUs=2 RealMemory=4000 Gres=gpu:8
PartitionName=apart Nodes=n3,n4 PreemptMode=OFF
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=300
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """A running cluster. ``close`` ends it and removes all its files."""

    def __init__(self) -> None:
        skip_without("munged", "slurmctld", "slurmd", "sbatch")
        self.folder = Path(tempfile.mkdtemp(prefix="hft-slurm-"))
        # munge refuses a folder that others may write, and its clients must reach the socket.
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        self._daemons: list[Daemon] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        # Made-up GPUs, so that the batch file's own request for them is part of the test.
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        ports = dict(zip(("controller", "node_1", "node_2", "node_3", "node_4"), _free_ports(5), strict=True))
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, host=host, **ports))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munge = self._daemon("munged", "--foreground", f"--socket={self.folder}/munge.socket", *files)
        munge.wait_for((self.folder / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2", "n3", "n4"):
            last = self._daemon("slurmd", "-D", "-N", node)
        # Without partitions, which share nodes, every node is counted once.
        last.wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%D %t", "-p", "low,apart", check=False) == "4 idle", 60
        )

    def _daemon(self, *words: str) -> Daemon:
        log = self.folder / f"{'-'.join(words)}.said".replace("/", "_")[-100:]
        self._daemons.append(Daemon(list(words), log=self.folder / log, environment=self.environment))
        return self._daemons[-1]

    def run(self, *words: str, check: bool = True, cwd: Path = REPOSITORY, **settings: str) -> str:
        """Standard output of one of Slurm's commands, without spaces at its ends."""
        environment = {**self.environment, **settings}
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """``JobState``, ``Restarts``, ``ExitCode`` and more of a job, by Slurm's names."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, number: str, ready: Callable[[dict[str, str]], bool], output: Path, seconds: float) -> None:
        """Waits until ``ready`` of ``job(number)``; ``output`` is shown on a time-out."""
        deadline = time.monotonic() + seconds
        while not ready(self.job(number)):
            said = output.read_text()[-4000:] if output.exists() else "nothing"
            assert time.monotonic() < deadline, f"{self.job(number)}\nsaid {said}"
            time.sleep(0.2)

    def close(self) -> None:
        if len(self._daemons) > 1:
            # Processes of a job are no children of a daemon, and a stopped job may come back: once more, then.
            deadline = time.monotonic() + 30
            while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                self.run("scancel", "--user", "root", check=False)
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.end()
        for process in psutil.process_iter():
            # Steps outlive the daemon that started them; this identifies those of this cluster.
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()
                    process.wait(5)
        shutil.rmtree(self.folder)


def _free_ports(count: int) -> list[int]:
    """Below the ports that the kernel gives out, so that nobody has them before a daemon does."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]

"""Slurm from Debian's packages on the hosts of a cluster: controller on host 1, slurmd on each."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tests.cluster.hosts import PATH, Cluster

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
CONFIGURATION = """ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=1
KillWait=30
SlurmdTimeout=30
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node[1-{count}] CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""
# It only bounds failures: a busy machine may need a minute.
START_SECONDS = 120.0
# Where proctrack/cgroup keeps the processes of a job; shared by all hosts, since cgroups know no namespaces here.
FREEZER = Path("/sys/fs/cgroup/freezer")
LINUXPROC, CGROUP = "proctrack/linuxproc", "proctrack/cgroup"


def missing(proctrack: str = LINUXPROC) -> str | None:
    """Why no Slurm can be started here; None if it can."""
    if proctrack == CGROUP and not os.access(FREEZER, os.W_OK):
        return f"{CGROUP} needs the freezer of cgroup v1 at {FREEZER}"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"needs {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


class Slurm:
    """Slurm on the hosts of a cluster. It ends with them.

    Args:
        folder: for its files; a new one.
        proctrack: how Slurm finds the processes of a job.
    """

    def __init__(self, cluster: Cluster, folder: Path, proctrack: str = LINUXPROC) -> None:
        self._cluster, self.folder = cluster, folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        text = CONFIGURATION.format(folder=folder, count=cluster.count, proctrack=proctrack)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        for host in range(1, cluster.count + 1):
            self._start_munge(host)
        self._run(1, "slurmctld", "-f", self.environment["SLURM_CONF"])
        for host in range(1, cluster.count + 1):
            (folder / f"spool-{cluster.name(host)}").mkdir()
            # slurmd asks for a cgroup file system, even where nothing uses it.
            self._run(host, "bash", "-c", "mountpoint -q /sys/fs/cgroup || mount -t tmpfs cgroup /sys/fs/cgroup")
            self._run(host, "slurmd", "-N", cluster.name(host), "-f", self.environment["SLURM_CONF"])
        self._wait_for_nodes()

    def close(self) -> None:
        """Remove what outlives the hosts: empty groups of processes. Called when the hosts have ended."""
        for host in range(1, self._cluster.count + 1):
            top = FREEZER / f"slurm_{self._cluster.name(host)}"
            for group, *_ in os.walk(top, topdown=False):
                with suppress(OSError):
                    os.rmdir(group)

    def run(self, *words: str, **more: str) -> str:
        """Run a command of Slurm on host 1, with further variables. Returns its output."""
        process = self._cluster.run(1, words, cwd=self.folder, env=self.environment | more)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: {process.stderr}")
        return process.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING or COMPLETED; empty if it is forgotten."""
        lines = self.run("scontrol", "show", "job", job).split()
        return next((word.removeprefix("JobState=") for word in lines if word.startswith("JobState=")), "")

    def _start_munge(self, host: int) -> None:
        log = self.folder / f"munged-{host}.log"
        options = f"--force --key-file={self.folder}/munge.key --socket=/run/munge/munge.socket.2"
        options += f" --pid-file=/run/munge/munged.pid --log-file={log} --seed-file=/run/munge/seed"
        self._run(host, "bash", "-c", f"mkdir -p /run/munge && chmod 755 /run/munge && munged {options}")

    def _run(self, host: int, *words: str) -> None:
        # Daemons keep the streams that they are given.
        with open(os.devnull, "r+b") as nothing:
            process = self._cluster.popen(
                host, words, env=self.environment, cwd="/", stdin=nothing, stdout=nothing, stderr=nothing
            )
            if process.wait(timeout=START_SECONDS):
                raise RuntimeError(f"{self._cluster.name(host)}: {' '.join(words)} ended with {process.returncode}")

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self.run("sinfo", "-h", "-o", "%T").split() != ["idle"]:
            if time.monotonic() > end:
                raise TimeoutError(f"Slurm: {self.run('sinfo')}")
            time.sleep(0.2)

"""A Slurm of two nodes on this machine, for tests: its daemons are processes of its own, with all their files in one folder.

As Debian packages it, several slurmd serve one machine. Each node is given two CPUs and one GPU that is none (/dev/null): so the scripts
ask for GPUs as they do on a real cluster, and what runs in them finds no GPU and computes on the CPU.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import debian
import pytest

NODES = ("n0", "n1")
LIMIT_S = 180  # for anything on a machine that is busy
_POLL_S = 0.1
_PACKAGES = {"munged": "munge", "sbatch": "slurm-wlm", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}
# Times are short where they would only make a test slow: a requeued job waits for the credential's life, two minutes by default.
_CONFIG = """
ClusterName=megagate
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_delay=1
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=60
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/over.txt
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 Gres=gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 Gres=gpu:1
PartitionName=low Nodes=n[0-1] Default=YES PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE MaxTime=60 State=UP
PartitionName=high Nodes=n[0-1] PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


class Cluster:
    """What a test asks of it.

    Args:
        folder: Of its files.
        environment: With which its commands find it.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment

    def run(self, *command: object, check: bool = True, cwd: Path | None = None) -> str:
        """What a command says."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=cwd)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self, job: str) -> dict[str, str]:
        """Of a job, or of each task of an array, by id."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self.run("scontrol", "--oneliner", "show", "job", job).split("Restarts=")[1].split()[0])

    def wait(self, true: Callable[[], object], what: str) -> None:
        """Until it is so."""
        until = time.monotonic() + LIMIT_S
        while not true():
            queue = "" if time.monotonic() < until else self.run("squeue", "--states=all", check=False)
            assert time.monotonic() < until, f"waited for {what}; the queue:\n{queue}\n{self.logs()}"
            time.sleep(_POLL_S)

    def wait_running(self, job: str, true: Callable[[], object], log: Path) -> None:
        """Until it is so, of a job that goes on meanwhile; what it says is shown where it does not."""
        self.wait(lambda: true() or not self.going(job), f"job {job}")
        assert true(), log.read_text(errors="replace") if log.exists() else f"job {job} ended, and said nothing"

    def stop(self, job: str, saved: Callable[[], object]) -> None:
        """Have a job's script signalled, as at the end of its time, until its ranks have saved.

        scancel was seen to signal again where Slurm said `try again later` though it had done it: 5 s later or more, when the job had been
        queued again and ran.
        """
        with subprocess.Popen(["scancel", "--batch", "--signal=TERM", job], env=self.environment) as asking:
            try:
                self.wait(saved, f"job {job} to save")
            finally:
                asking.kill()

    def going(self, job: str) -> bool:
        """Whether a job, or any task of an array, waits or runs."""
        return bool({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"} & set(self.states(job).values()))

    def wait_over(self, job: str) -> dict[str, str]:
        """Until a job, or all tasks of an array, are neither queued nor running; their states."""
        self.wait(lambda: not self.going(job), f"the end of job {job}")
        return self.states(job)

    def logs(self) -> str:
        """The end of what the daemons said."""
        texts = {path.name: path.read_text(errors="replace").splitlines()[-8:] for path in self.folder.glob("*.log")}
        return "\n".join(f"{name}:\n" + "\n".join(lines) for name, lines in texts.items())


@contextmanager
def temporary_slurm() -> Iterator[Cluster]:
    """The cluster for the time of the block; skips the test where it cannot be had."""
    debian.require(_PACKAGES)
    if os.geteuid() != 0:
        pytest.skip("needs the Debian packages munge, slurm-wlm: started as root")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # a short path, as a socket's has to be
        cluster = _made(Path(name))
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            for daemon in _started(cluster):
                daemons.append(daemon)
            yield cluster
        finally:
            _end(cluster, daemons)


def _made(folder: Path) -> Cluster:
    host = socket.gethostname().partition(".")[0]
    # Ranks meet at a port that follows from their job's number; another Slurm of these tests, on the same machine, has other numbers.
    first_job = 1 + secrets.randbelow(19_000)
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, host=host, ports=_free_ports(3), first_job=first_job))
    (folder / "gres.conf").write_text("NodeName=n[0-1] Name=gpu File=/dev/null\n")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    ours = ("SLURM", "SBATCH", "SRUN", "SQUEUE", "SCANCEL", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    python = Path(sys.executable).parent  # the one that runs the tests, also where no environment is activated
    return Cluster(folder, environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{python}:{environment['PATH']}"})


def _started(cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    folder = cluster.folder
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"), ("seed-file", "seed"))]
    yield _daemon(cluster, "munged", ["munged", "--foreground", "--force", f"--key-file={key}", f"--log-file={folder}/munged.txt", *files])
    cluster.wait((folder / "munge.sock").exists, "munged")
    yield _daemon(cluster, "slurmctld", ["slurmctld", "-D"])
    for node in NODES:
        yield _daemon(cluster, node, ["slurmd", "-D", "-N", node])
    cluster.wait(lambda: cluster.run("sinfo", "-h", "-p", "low", "-o", "%t %D", check=False) == f"idle {len(NODES)}", "two idle nodes")


def _daemon(cluster: Cluster, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
    with (cluster.folder / f"{name}.out").open("wb") as log:
        return subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _end(cluster: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    with suppress(Exception):  # an error of a test is what is to be seen
        cluster.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        cluster.run("scancel", "--user=root", check=False)
        cluster.wait(lambda: not cluster.run("squeue", "--noheader", check=False), "an empty queue")
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
        daemon.kill()
        daemon.wait()
    for process in _of(cluster):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _of(cluster: Cluster) -> list[int]:
    """Processes that were started by this cluster, or to ask it."""
    mark, found = f"SLURM_CONF={cluster.folder}/slurm.conf".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

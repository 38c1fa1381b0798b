"""A real Slurm of two nodes on this machine, as root: Debian's slurmctld, slurmd and munge.

Both nodes are this host, told apart by their ports; plain files stand for two GPUs each. The
partition `high` preempts the jobs of `main`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
# Two nodes of more cores than there are, so that jobs need not wait for each other.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
MessageTimeout=60
TCPTimeout=30
SlurmdTimeout=600
KillWait=60
MinJobAge=3000
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:8
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 Default=NO MaxTime=INFINITE State=UP PriorityTier=10
"""

CGROUP = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
"""

GRES = "AutoDetect=off\nNodeName=n[1-2] Name=gpu File={root}/gpu[0-7]\n"


class Unavailable(Exception):
    """Slurm cannot be started here; the text says why."""


class Cluster:
    """Commands on the running cluster."""

    def __init__(self, root: Path, proctrack: str) -> None:
        self.root = root
        self.proctrack = proctrack
        self._pending: dict[tuple[str, str], float] = {}
        self.env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_"))
            and k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")
        }
        self.env |= {"SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command prints on stdout."""
        done = subprocess.run(
            command, env=self.env | more, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stderr}{done.stdout}")
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """The id of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env=self.env | environment, cwd=cwd, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`: JobState, Restarts, ExitCode, ..."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def ended(self, job: str) -> str | None:
        """The final state, or None while it is pending, running, ending or being requeued."""
        state = self.job(job)["JobState"]
        return state if state in FINAL else None

    def wait(self, job: str, seconds: float = 600) -> str:
        """Wait for the end, whatever requeues there are; returns the final state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.ended(job)
            if state:
                return state
            self.hurry(job)
            time.sleep(1)
        raise AssertionError(f"job {job} has not ended: {self.job(job)}")

    def clear(self) -> None:
        """Cancel what a failed test has left."""
        if self.run("squeue", "-h"):
            self.run("scancel", "--user=root", check=False)
            self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)

    def settle(self, seconds: float = 5) -> None:
        """Give cancelled jobs time to end."""
        deadline = time.monotonic() + seconds
        while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)

    def hurry(self, job: str) -> None:
        """A requeued job would wait two minutes before it starts again.

        Some seconds it must: slurmd refuses a start in the second in which the last one ended.
        """
        about = self.job(job)
        if about["JobState"] == "PENDING" and int(about["Restarts"]) > 0:
            since = self._pending.setdefault((job, about["Restarts"]), time.monotonic())
            if time.monotonic() - since > 3:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    absent = [name for name in PROGRAMS if not _which(name)]
    if absent:
        packages = "slurmctld slurmd slurm-client munge"
        return f"Slurm is not installed (no {', '.join(absent)}); Debian: apt install {packages}"
    if os.geteuid():
        return "only root can start a Slurm of its own"
    return None


@contextlib.contextmanager
def running(root: Path, proctrack: str) -> Iterator[Cluster]:
    """Start the cluster in an empty folder; stop it at the end. Raises `Unavailable`."""
    reason = missing()
    if reason:
        raise Unavailable(reason)
    for index in range(8):
        (root / f"gpu{index}").touch()
    (root / "state").mkdir()
    ports = _free_ports(3)
    host = socket.gethostname().partition(".")[0]
    name = f"test{ports[0]}"
    text = CONF.format(name=name, root=root, proctrack=proctrack, ports=ports, host=host)
    (root / "slurm.conf").write_text(text)
    (root / "cgroup.conf").write_text(CGROUP)
    (root / "gres.conf").write_text(GRES.format(root=root))
    cluster = Cluster(root, proctrack)
    daemons: list[subprocess.Popen[bytes]] = []
    munge = _start_munge()
    try:
        daemons.append(_spawn(cluster, "slurmctld", "-D"))
        daemons += [_spawn(cluster, "slurmd", "-D", "-N", node) for node in ("n1", "n2")]
        _wait_until_idle(cluster, daemons)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.clear()
            cluster.settle()
        _kill(root)
        for daemon in daemons:
            daemon.wait()
        if munge is not None:
            munge.terminate()
            munge.wait()


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")


def _spawn(cluster: Cluster, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    program = _which(name)
    assert program is not None
    with open(cluster.root / f"{name}.out", "ab") as output:
        return subprocess.Popen(
            [program, *arguments], env=cluster.env, stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _kill(root: Path) -> None:
    """Kill this cluster's daemons, steps and jobs: its configuration is in their environment."""
    mark, found = f"SLURM_CONF={root}/".encode(), True
    while found:
        found = False
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes():
                    os.kill(int(environ.parent.name), signal.SIGKILL)
                    found = True
        time.sleep(0.1)


def _wait_until_idle(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = cluster.run("sinfo", "-h", "-p", "main", "-N", "-o", "%T", check=False)
        if text.split() == ["idle", "idle"]:
            return
        if any(daemon.poll() is not None for daemon in daemons):
            break
        time.sleep(0.5)
    raise Unavailable(
        f"slurm with proctrack/{cluster.proctrack} does not start: {_errors(cluster)}"
    )


def _errors(cluster: Cluster) -> str:
    lines = [
        line
        for log in sorted(cluster.root.glob("*.log")) + sorted(cluster.root.glob("*.out"))
        for line in log.read_text(errors="replace").splitlines()
        if "error" in line or "fatal" in line
    ]
    return "; ".join(lines[-3:]) or "no error in its logs"


def _start_munge() -> subprocess.Popen[bytes] | None:
    """Slurm's authentication service, unless it runs already."""
    if (
        subprocess.run(
            ["munge", "-n"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
        == 0
    ):
        return None
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    os.chmod("/run/munge", 0o755)
    program = _which("munged")
    assert program is not None
    process = subprocess.Popen(
        [program, "--foreground", "--force"], user="munge", group="munge", extra_groups=[],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(50):
            if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
                return process
            time.sleep(0.2)
        raise Unavailable("munged does not start; is /etc/munge/munge.key there?")
    except BaseException:
        process.terminate()
        raise


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

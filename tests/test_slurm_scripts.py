"""slurm/run.sh with programs that stand for Slurm's: what it asks of them, and what it decides.

tests/slurm runs the same scripts on a real Slurm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ddp_ssl.driver import CONSTRAINTS
from ddp_ssl.run import claims

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "slurm/imagenet100_adadim.sh"
OWN = ROOT / "slurm/train.sh"
SCRIPTS = [*sorted((ROOT / "slurm").glob("*_*.sh")), OWN, ROOT / "slurm/resume.sh"]

SRUN = """#!/bin/bash
# Stands for srun: notes its arguments and the environment, leaves what FAKE_* say.
printf '%s\\n' "$@" >"$FAKE/srun"
env >"$FAKE/env"
[ -n "$FAKE_STOP" ] && { mkdir -p "$RUN_DIR"; printf '%s' "${FAKE_STOP#empty}" >"$RUN_DIR/STOP"; }
[ -n "$FAKE_CLAIM" ] && { mkdir -p "$RUN_DIR"; cp -p "$FAKE_CLAIM" "$RUN_DIR/claim-2.json"; }
[ -n "$FAKE_SIGNAL" ] && { kill -"$FAKE_SIGNAL" "$PPID"; /bin/sleep 0.5; }
if [ -n "$FAKE_STATUS" ]; then
  mkdir -p "$RUN_DIR/checkpoints"
  echo "$FAKE_STATUS" >"$RUN_DIR/status.json"
  [ -n "$FAKE_STEP" ] && echo {} >"$RUN_DIR/checkpoints/step_0000000$FAKE_STEP.json"
fi
exit "${FAKE_RC:-0}"
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo n7 ;;
  "show node") echo "NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7" ;;
  "show job") echo "JobId=5 $FAKE_JOB EndTime=2030-01-01T00:00:00 x=1" ;;
  requeue*) echo "$2" >>"$FAKE/requeued" ;;
esac
"""

JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "try",
    "SLURM_JOB_NODELIST": "n7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_ON_NODE": "16",
    "FAKE_JOB": "JobState=RUNNING Restarts=0 RunTime=00:10:00 TimeLimit=01:00:00",
}
DONE = json.dumps({"state": "done", "step": 9}, indent=1)


class Fake:
    """A folder to submit from, with a Slurm of nothing but shell scripts."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/bash\n"}.items():
            (place / "bin").mkdir(exist_ok=True)
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)

    def run(
        self, *arguments: str, script: Path = SCRIPT, **environment: str
    ) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of a job script."""
        keep = ("PATH", "HOME", "LANG")
        env = {k: os.environ[k] for k in keep if k in os.environ} | JOB | environment
        env |= {"FAKE": str(self.place), "PATH": f"{self.place}/bin:{env['PATH']}"}
        done = subprocess.run(
            ["bash", str(script), *arguments],
            cwd=self.place, env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    @property
    def srun(self) -> list[str]:
        """The arguments that srun got."""
        return (self.place / "srun").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """The environment that srun got."""
        lines = (self.place / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def requeued(self) -> list[str]:
        """The jobs that were requeued."""
        path = self.place / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """An empty folder and a fake Slurm."""
    return Fake(tmp_path)


def status(state: str, **fields: object) -> str:
    """`status.json` as the trainer writes it; the number makes each one differ."""
    return json.dumps({"state": state, "time": str(os.urandom(4)), **fields}, indent=1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_slurm_it_is_one_line(fake: Fake, script: Path) -> None:
    code, out, err = fake.run(script=script, SLURM_JOB_ID="")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "not inside a Slurm job. With Slurm: sbatch" in err
    assert "torchrun" in err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_names_a_config_and_asks_for_what_a_stop_needs(script: Path) -> None:
    text = script.read_text()
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR2@300"):
        assert f"#SBATCH {option}\n" in text
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for place in ("slurm", "tools") for path in (ROOT / place).glob("*.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_srun_is_given(fake: Fake) -> None:
    code, out, _ = fake.run(
        "data.root=/data/image net", "optim.lr=0.1", FAKE_STATUS=DONE, SLURM_GPUS_ON_NODE="4",
        SLURM_CPUS_PER_GPU="4", SLURM_CPUS_PER_TASK="2", PYTHON="/opt/python",
    )  # fmt: skip
    assert code == 0
    folder = fake.place / "runs/try-123456"
    config = next(a for a in fake.srun if a.endswith(".yaml"))
    assert Path(config).is_absolute()
    start = fake.srun.index("/opt/python")
    assert fake.srun[:start] == [
        "--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--nodes=2", "--ntasks=8",
        "--ntasks-per-node=4",
    ]  # fmt: skip
    assert fake.srun[start:] == [
        "/opt/python", "-m", "ddp_ssl.train", config, "data.root=/data/image net", "optim.lr=0.1",
        f"run.dir={folder}", "run.resume=auto",
    ]  # fmt: skip
    seen = fake.environment
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("10.0.0.7", "13456")
    assert seen["SRUN_CPUS_PER_TASK"] == "4"
    assert not {"SLURM_CPUS_PER_GPU", "SLURM_CPUS_PER_TASK"} & seen.keys()
    assert int(seen["SLURM_JOB_END_TIME"]) > 1_890_000_000
    assert seen["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert f"run folder  {folder}" in out


def test_a_yaml_of_one_s_own(fake: Fake) -> None:
    """It is served as the project's; its name is that of the run folder."""
    (fake.place / "a b").mkdir()
    config = fake.place / "a b/my=run.yaml"
    config.touch()
    given = {"script": OWN, "FAKE_STATUS": DONE, "PYTHON": "py", "SLURM_JOB_NAME": "train"}
    words = ("optim.lr=0.1", "data.root=/data/image net")
    code, out, err = fake.run("a b/my=run.yaml", *words, **given)
    assert code == 0, err
    folder = fake.place / "runs/my_run-123456"
    start = fake.srun.index("py")
    assert fake.srun[start:] == [
        "py", "-m", "ddp_ssl.train", str(config), *words, f"run.dir={folder}", "run.resume=auto"
    ]  # fmt: skip
    assert f"resume      RUN_DIR={folder} sbatch ... slurm/train.sh with the same arguments" in out
    fake.run(str(config), **{**given, "SLURM_JOB_NAME": "chosen"})
    assert f"run.dir={fake.place}/runs/chosen-123456" in fake.srun
    fake.run("imagenet100/adadim", "run.dir=here", **given)  # the trainer knows the name
    assert fake.srun[-3:] == ["imagenet100/adadim", f"run.dir={fake.place}/here", "run.resume=auto"]
    other = fake.place / "elsewhere"
    other.mkdir()
    image = {"CONTAINER": "/images/ddp.sif", "SLURM_SUBMIT_DIR": str(other)}
    fake.place = other
    shutil.copytree(config.parents[1] / "bin", other / "bin")
    fake.run(str(config), **given, **image)
    mounts = fake.srun[fake.srun.index("--bind") + 1]
    assert mounts == f"{ROOT},{other},{other}/runs/my_run-123456,{config.parent}"


@pytest.mark.parametrize("words", [(), ("data.root=/d",), ("mine.yaml", "optim.lr=1"), ("",)])
def test_a_config_of_one_s_own_is_asked_for(fake: Fake, words: tuple[str, ...]) -> None:
    code, out, err = fake.run(*words, script=OWN)
    assert (code, out) == (2, "")
    assert err == (
        f"train: {''.join(words[:1]) or 'no config'}: a YAML file, or the name of a config, would "
        "be accepted as the first argument\n"
    )


def test_torchrun_is_one_task_a_node(fake: Fake) -> None:
    fake.run(
        FAKE_STATUS=DONE, SLURM_GPUS_ON_NODE="4", LAUNCHER="torchrun", SLURM_RESTART_COUNT="2",
        PYTHON="py", MAX_RESTARTS="1", SRUN_ARGS="--cpu-bind=none --mpi=none",
    )  # fmt: skip
    assert "--ntasks=2" in fake.srun
    assert fake.environment["SRUN_CPUS_PER_TASK"] == "16"
    start = fake.srun.index("bash")
    assert fake.srun[start - 2 : start] == ["--cpu-bind=none", "--mpi=none"]
    assert fake.srun[start : start + 12] == [
        "bash", f"{ROOT}/slurm/run.sh", "--on-node", "py", "-m", "torch.distributed.run",
        "--nnodes=2", "--nproc-per-node=4", "--max-restarts=1", "--rdzv-id=123456-2",
        "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.7:13456",
    ]  # fmt: skip


def test_containers(fake: Fake) -> None:
    folder = f"{fake.place}/runs/try-123456"
    fake.run(FAKE_STATUS=DONE, CONTAINER="/images/ddp.sif", CONTAINER_MOUNTS="/data,/a:/b")
    start = fake.srun.index("apptainer")
    assert fake.srun[start : start + 9] == [
        "apptainer", "exec", "--nv", "--pwd", str(fake.place), "--bind",
        f"{ROOT},{fake.place},{folder},/data,/a:/b", "/images/ddp.sif", "python",
    ]  # fmt: skip
    fake.run(FAKE_STATUS=DONE, CONTAINER="reg#me/ddp:1", CONTAINER_MOUNTS="/data,/a:/b")
    assert "--container-image=reg#me/ddp:1" in fake.srun
    assert f"--container-workdir={fake.place}" in fake.srun
    mounts = f"{ROOT}:{ROOT},{fake.place}:{fake.place},{folder}:{folder},/data:/data,/a:/b"
    assert f"--container-mounts={mounts}" in fake.srun
    assert "python" in fake.srun


def test_on_cpu_nodes_as_many_tasks_as_asked_for(fake: Fake) -> None:
    fake.run(FAKE_STATUS=DONE, SLURM_NTASKS_PER_NODE="20")
    assert "--ntasks=40" in fake.srun
    assert "--overcommit" in fake.srun
    assert fake.environment["SRUN_CPUS_PER_TASK"] == "1"


@pytest.mark.parametrize(
    ("end", "job", "environment", "code", "requeued", "text"),
    [
        ({"state": "done"}, "", {}, 0, False, "done: "),
        ({"state": "preempted", "step": 7}, "", {}, 0, True, "checkpoint at step 7; requeued"),
        ({"state": "preempted"}, "", {"FAKE_STOP": "empty"}, 0, False, "stopped by the STOP file"),
        ({"state": "preempted"}, "", {"FAKE_STOP": "launcher: TERM"}, 0, True, "requeued"),
        ({"state": "preempted"}, "Restarts=1", {}, 0, False, "Slurm has requeued the job"),
        ({"state": "preempted"}, "JobState=COMPLETING", {}, 1, False, "cancelled"),
        ({"state": "preempted"}, "JobState=COMPLETING RunTime=01:00:02", {}, 0, True, "requeued"),
        ({"state": "preempted"}, "JobState=COMPLETING RunTime=1-00:00:00 TimeLimit=1-00:00:00",
         {}, 0, True, "requeued"),
        ({"state": "preempted"}, "JobState=COMPLETING TimeLimit=UNLIMITED", {}, 1, False,
         "cancelled"),
        ({"state": "preempted"}, "Restarts=3", {"MAX_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"},
         1, False, "not requeued: started again 3 times (MAX_REQUEUES=3)"),
        ({"state": "running"}, "", {"FAKE_RC": "137"}, 0, True, "the run died (srun: 137"),
        ({"state": "failed", "error": "x", "retry": True}, "", {"FAKE_RC": "1"}, 0, True, "died"),
        ({"state": "failed", "error": "x"}, "", {"FAKE_RC": "1"}, 0, True, "died"),
        ({"state": "failed", "error": "a, 'nan' at 5", "retry": False}, "", {"FAKE_RC": "1"}, 1,
         False, "failed: a, 'nan' at 5. Trying again would not help"),
        (None, "", {"FAKE_RC": "2"}, 2, False, "the run did not start (srun: 2)"),
        (None, "", {"FAKE_RC": "0"}, 1, False, "the run did not start"),
    ],
)  # fmt: skip
def test_what_follows_from_an_end(
    fake: Fake,
    end: dict[str, object] | None,
    job: str,
    environment: dict[str, str],
    code: int,
    requeued: bool,
    text: str,
) -> None:
    fields = dict(pair.split("=") for pair in f"{JOB['FAKE_JOB']} {job}".split())
    told = " ".join(f"{k}={v}" for k, v in fields.items())
    written = {} if end is None else {"FAKE_STATUS": status(**end)}  # type: ignore[arg-type]
    got, out, err = fake.run(FAKE_JOB=told, **written, **environment)
    assert text in out, out + err
    assert got == code
    assert fake.requeued == (["123456"] if requeued else [])
    if not requeued and code:
        assert "RUN_DIR=" in out  # how to go on
    # A user's STOP file stays; the script's own must not stop the next start.
    kept = (fake.place / "runs/try-123456/STOP").exists()
    assert kept == (environment.get("FAKE_STOP") == "empty")


def test_what_an_earlier_start_left_is_no_result(fake: Fake) -> None:
    """A restart that cannot begin is tried again, but not for ever."""
    fake.run(FAKE_STATUS=status("preempted", step=4), FAKE_STEP="4")
    assert len(fake.requeued) == 1
    for start in (1, 2):
        code, out, _ = fake.run(SLURM_RESTART_COUNT=str(start), FAKE_RC="1")
        assert "the run could not start (srun: 1) (last checkpoint: step 4); requeued" in out
        assert len(fake.requeued) == start + 1
    code, out, _ = fake.run(SLURM_RESTART_COUNT="3", FAKE_RC="1")
    assert code == 1
    assert "crashed three times in a row after step 4: given up" in out
    assert len(fake.requeued) == 3


def test_crashes_are_counted_by_checkpoint(fake: Fake) -> None:
    """Three after the same one, in a row; a job submitted anew counts anew."""
    steps = ["", "", "2", "2", "4", "4", "4"]
    for start, step in enumerate(steps):
        code, out, _ = fake.run(
            SLURM_RESTART_COUNT=str(start), FAKE_STATUS=status("running"), FAKE_STEP=step,
            FAKE_RC="137",
        )  # fmt: skip
        assert ("given up" in out) == (start == len(steps) - 1), (start, out)
    assert code == 1
    assert len(fake.requeued) == len(steps) - 1
    folder = str(fake.place / "runs/try-123456")
    _, out, _ = fake.run(RUN_DIR=folder, FAKE_STATUS=status("running"), FAKE_RC="137")
    assert "requeued" in out


@pytest.mark.parametrize(
    ("job", "silent_s"), [(None, 0), ("99", 0), ("123456", 0), ("123456_3", 0), ("99", 1000)]
)
def test_a_folder_that_another_run_has_is_no_crash(
    fake: Fake, tmp_path: Path, job: str | None, silent_s: float
) -> None:
    """Its state and STOP file are the other run's, which a signal to this job must not stop."""
    holder = dataclasses.replace(claims.this_process(300), job=job)
    claims._write(tmp_path / "claim", holder)
    os.utime(tmp_path / "claim", (time.time() - silent_s,) * 2)
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}
    given = {"FAKE_CLAIM": f"{tmp_path}/claim", "FAKE_RC": "2", "FAKE_SIGNAL": "USR2"}
    own = job in ("123456", "123456_3") or silent_s > 0  # it has died
    code, out, _ = fake.run(
        FAKE_STATUS=status("running", step=4), **given, **(array if job == "123456_3" else {})
    )
    assert ("another run has the folder (srun: 2); not requeued" in out) == (not own), out
    assert bool(fake.requeued) == own
    assert own or code == 2
    assert list(fake.place.glob("runs/*/crashes.txt")) != [] or not own
    assert list(fake.place.glob("runs/*/STOP")) == []


def test_signals_to_the_batch_shell(fake: Fake) -> None:
    """They become a STOP file; in a job of minutes Slurm warns before anything is done."""
    stopped = status("preempted")
    for name in ("USR2", "TERM"):
        _, out, err = fake.run(FAKE_SIGNAL=name, FAKE_STATUS=stopped)
        assert f"{name}: asking the run to save and stop" in out, out + err
        assert err == ""
    soon = str(int(time.time()) + 300)
    _, out, _ = fake.run(FAKE_SIGNAL="USR2", FAKE_STATUS=stopped, SLURM_JOB_END_TIME=soon)
    assert "asking the run" not in out
    assert "the trainer stops by itself" in out
    _, out, _ = fake.run(FAKE_SIGNAL="TERM", FAKE_STATUS=stopped, SLURM_JOB_END_TIME=soon)
    assert "TERM: asking the run to save and stop" in out


def test_array_tasks_have_folders_and_names_of_their_own(fake: Fake) -> None:
    """The id of one task is that of the whole array: requeueing it would requeue all."""
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}
    fake.run(FAKE_STATUS=status("preempted"), **array)
    assert fake.requeued == ["123456_3"]
    assert f"run.dir={fake.place}/runs/try-123456_3" in fake.srun


def test_the_run_folder_can_be_chosen(fake: Fake) -> None:
    fake.run("run.dir=here", "run.resume=old/run", FAKE_STATUS=DONE)
    assert fake.srun[-2:] == [f"run.dir={fake.place}/here", "run.resume=old/run"]
    _, out, _ = fake.run(RUN_DIR=f"{fake.place}/there", FAKE_STATUS=DONE)
    assert fake.srun[-2:] == [f"run.dir={fake.place}/there", "run.resume=auto"]
    assert f"resume      RUN_DIR={fake.place}/there sbatch" in out


def test_a_job_goes_on_with_a_run(fake: Fake) -> None:
    script, folder = ROOT / "slurm/resume.sh", fake.place / "a run"
    code, out, err = fake.run("a run", "eval.every=2", script=script, FAKE_STATUS=DONE)
    assert (code, out) == (2, "")
    assert err == "resume: a run: the folder of a run, with its config.yaml, would be accepted\n"
    folder.mkdir()
    (folder / "config.yaml").touch()
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3", "PYTHON": "py"}
    code, out, _ = fake.run("a run", "eval.every=2", script=script, FAKE_STATUS=DONE, **array)
    assert code == 0
    start = fake.srun.index("py")
    assert fake.srun[start:] == ["py", "-m", "ddp_ssl.resume", str(folder), "eval.every=2"]
    assert f"resume      sbatch ... slurm/resume.sh {folder}" in out
    refused = ["run.dir=runs/B", "run.resume=never", "run.dir="]
    for word in refused:  # by ddp_ssl.resume, which gets them
        fake.run("a run", word, script=script, FAKE_STATUS=DONE, PYTHON="py")
        assert fake.srun[-3:] == ["ddp_ssl.resume", str(folder), word]


def test_the_config_is_looked_for_in_the_row_that_goes_on(fake: Fake) -> None:
    script, folder = ROOT / "slurm/resume.sh", fake.place / "runs/A/low"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    row = {"DDP_SSL_ROW": "low", "FAKE_STATUS": DONE}
    assert fake.run("runs/A", script=script, **row)[0] == 0
    assert fake.srun[-1] == str(folder)
    (folder / "config.yaml").rename(folder.parent / "config.yaml")
    code, _, err = fake.run("runs/A", script=script, **row)
    assert code == 2
    assert err.startswith("resume: runs/A/low: the folder of a run, with its config.yaml, ")
    code, _, err = fake.run(script=script)
    assert (code, err[:24]) == (2, "resume: no folder given:")


def test_the_runner_is_not_submitted_itself(fake: Fake) -> None:
    code, _, err = fake.run(script=ROOT / "slurm/run.sh")
    assert (code, err.count("\n")) == (2, 1)
    assert "submit one of the scripts beside it" in err


def test_an_unknown_launcher(fake: Fake) -> None:
    code, _, err = fake.run(LAUNCHER="mpirun")
    assert code == 2
    assert err.endswith("LAUNCHER=mpirun is unknown; srun or torchrun would be accepted\n")


def test_the_ablation_has_a_task_for_every_row() -> None:
    rows = len(list((ROOT / "configs/imagenet100/ablation").glob("*.yaml")))
    text = (ROOT / "slurm/ablation_array.sh").read_text()
    last = re.search(r"#SBATCH --array=0-(\d+)", text)
    assert last is not None
    assert int(last[1]) + 1 >= rows


def test_containers_copy_what_exists_and_install_what_is_pinned() -> None:
    """As far as that can be said without building them."""
    docker = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.split(None, 1) for line in docker.splitlines() if line and line[0] not in "# "]
    assert {word for word, _ in lines} <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    }
    copied = {name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]}
    assert copied == allowed
    definition = (ROOT / "apptainer.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)+)", definition, re.MULTILINE))
    assert sections.keys() == {"arguments", "files", "post", "environment", "runscript"}
    placed = {line.split()[0] for line in sections["files"].splitlines() if line.strip()}
    assert placed == copied
    assert all((ROOT / name).exists() for name in copied)
    runs = [rest for word, rest in lines if word == "RUN"] + [sections["post"]]
    for run in [*runs, sections["runscript"]]:
        script = run.replace("{{ PINS }}", "cuda12")
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 2  # one in each file
    assert all('-c "${file:?' in run for run in installs)
    assert all(name in run for run in installs for name in CONSTRAINTS.values())
    needed = set(re.findall(r'HERE / "([^"]+)"', (ROOT / "setup.py").read_text()))
    assert {name.partition("/")[0] for name in needed} <= copied

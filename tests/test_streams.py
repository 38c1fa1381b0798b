"""Output that nobody reads, and names in another encoding: nothing is lost or shown as a crash."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_ssl.cli import COMMANDS
from ddp_ssl.commands import common
from ddp_ssl.utils.files import json_file
from tests.runs import arguments, rows

ROOT = Path(common.__file__).parents[2]
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
# Python's text is ASCII: what a locale that is not UTF-8 does to names.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in the checkout, with `$PY` for Python."""
    env = {**BUFFERED, "PY": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)


# One Python, which forks: to start one for each command would take a minute.
EACH = """
import os, sys, time
from ddp_ssl import cli
from ddp_ssl.commands import reproduce, runs
for line in sys.stdin.read().splitlines():
    if not os.fork():
        gone, pipe = os.pipe()
        os.dup2(pipe, 1)
        os.close(gone)
        os.close(pipe)
        if sys.argv[1] == "closed":
            os.close(1)
            sys.stdout = None
        sys.argv[1:] = line.split()
        sys.exit(cli.main())
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code not in (0, 141):
        print(f"{line}: exit code {code}", file=sys.stderr)
"""


@pytest.mark.parametrize("stdout", ["closed", "a broken pipe"])
def test_text_that_nobody_reads_is_no_error(stdout: str) -> None:
    words = ["", "--version", "reproduce --list", "runs", "train --print-config"]
    words += [f"{name} --help" for name in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", EACH, stdout], input="\n".join(words), cwd=ROOT, env=BUFFERED,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_command_whose_reader_has_gone_ends_like_others(environment: dict[str, str]) -> None:
    """The exit code of `yes | head -1`: no success, since the work was given up."""
    done = shell(
        "$PY -c 'import sys; from ddp_ssl.commands import common\n"
        "def work():\n"
        "    for number in range(100000): print(number)\n"
        "    return 0\n"
        "sys.exit(common.exit_code(work))' | head -1; echo ${PIPESTATUS[0]}",
        **environment,
    )
    assert done.stdout.split() == ["0", str(common.BROKEN_PIPE)]
    assert done.stderr == ""


ENDS = {
    "raise ValueError('the message')": (2, "the message"),
    "sys.exit(1)": (1, ""),
    "raise KeyboardInterrupt": (130, "interrupted"),
    "raise OSError(28, 'No space left on device', 'x')": (2, "x: No space left on device"),
    "return 3": (3, ""),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stdout", [">/dev/full", "| true"])
def test_output_that_is_lost_hides_no_other_end(end: str, stdout: str, tmp_path: Path) -> None:
    code, said = ENDS[end]
    (tmp_path / "work.py").write_text(
        "import sys, time\nfrom ddp_ssl.commands import common\n\n"
        f"def work():\n    time.sleep(0.2)\n    print(1)\n    {end}\n\n"
        "sys.exit(common.exit_code(work))\n"
    )
    done = shell(f"PYTHONPATH=. $PY {tmp_path}/work.py {stdout}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_full_disk_under_stdout_is_said() -> None:
    done = shell("$PY -m ddp_ssl.cli runs >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "ddp_ssl: error: stdout: No space left on device\n"


def test_children_get_open_streams_too(tmp_path: Path) -> None:
    """Else a child's first file would get the number of stderr."""
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nfrom ddp_ssl.utils.streams import open_streams\n\n"
        "open_streams()\n"
        "child = 'import sys; sys.exit(sys.stdout is None or sys.stderr is None)'\n"
        "sys.exit(subprocess.call([sys.executable, '-c', child]))\n"
    )
    done = shell(f"PYTHONPATH=. $PY {tmp_path}/parent.py >&- 2>&-")
    assert done.returncode == 0


@pytest.mark.parametrize("streams", [">&- 2>&-", "2>&1 | head -1", "</dev/null >/dev/full 2>&1"])
def test_a_run_that_nobody_reads_goes_on_to_its_end(
    streams: str, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = shlex.join(arguments(photos, folder, "optim.epochs=1"))
    done = shell(f"$PY -m ddp_ssl.train {words} {streams}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0
    assert json_file(folder / "status.json")["state"] == "done"
    assert rows(folder)
    assert "epoch 1/1" in " ".join((folder / "train.log").read_text().split())
    for file in folder.glob("*.*"):  # a file must not have got the number of stderr
        assert file.name == "train.log" or b"validation at step" not in file.read_bytes()


@pytest.mark.parametrize("locale", [ASCII, {"LC_ALL": "POSIX"}])
def test_names_in_any_locale(locale: dict[str, str], photos: Path, tmp_path: Path) -> None:
    """Folders and classes of other alphabets, under a locale that knows none of them."""
    for place in sorted(photos.rglob("*"), reverse=True):
        target = tmp_path / "bilder ñ" / f"{place.relative_to(photos)}".replace("a", "ä")
        if place.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place, target)
    folder = tmp_path / ("run" if locale is ASCII else "läufe 日本")
    words = shlex.join(arguments(tmp_path / "bilder ñ", folder, "optim.epochs=1"))
    done = shell(f"$PY -m ddp_ssl.train {words}", **locale)
    assert done.returncode == 0, done.stderr[-2000:]
    out = shlex.quote(str(tmp_path / "f.csv"))
    made = shell(f"$PY -m ddp_ssl.embed {shlex.quote(str(folder))} --out {out}", **locale)
    assert made.returncode == 0, made.stderr[-2000:]
    if locale is ASCII:
        card = shell(f"$PY -m ddp_ssl.export {folder} --format timm", **locale)
        assert card.returncode == 0, card.stderr[-2000:]


def test_a_folder_that_torch_cannot_name_is_one_line(photos: Path, tmp_path: Path) -> None:
    words = shlex.join(arguments(photos, tmp_path / "läufe", "optim.epochs=1"))
    done = shell(f"$PY -m ddp_ssl.train {words}", **ASCII)
    assert done.returncode == common.UNUSABLE
    (line,) = done.stderr.splitlines()
    assert "accepted: another name, or a locale such as LC_ALL=C.UTF-8" in line
    assert not any(tmp_path.iterdir())

"""The tool that attacks runs: no family ends badly, and a fault that is planted is found."""

from __future__ import annotations

import sys

import pytest

from tests.runs import call

HEAD = "| family | tried | refused | repaired | no effect | silent | tracebacks | hangs |"

# The checksum of rows is 0, whatever is in them.
PLANTED = """
import sys, types
sys.path.insert(0, "tools")
import attack
from ddp_ssl.logs import writer

writer.zlib = types.SimpleNamespace(crc32=lambda *_: 0)
attack.KINDS = {"metrics.jsonl": attack.KINDS["metrics.jsonl"]}
attack.warm_up = lambda: None
sys.exit(attack.main(["--only", "bits", "--trials", "6", "--seed", "3"]))
"""


def counts(table: str, family: str) -> list[int]:
    """The numbers in a family's row."""
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{family}`"))
    return [int(cell) for cell in row.strip("|").split("|")[1:]]


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize(
    ("family", "trials"),
    [("crash", 50), ("starts", 50), ("bits", 40), ("pictures", 40), ("text", 100)],
)
def test_no_attack_is_silent_ends_in_a_traceback_or_hangs(family: str, trials: int) -> None:
    words = ["--only", family, "--trials", str(trials), "--seed", "1000"]
    done = call(sys.executable, "tools/attack.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == HEAD
    tried, *columns = counts(done.stdout, family)
    assert tried == (trials // 25 if family in ("crash", "starts") else trials)
    assert sum(columns) == tried
    assert columns[-3:] == [0, 0, 0]
    assert sum(columns[:2]) > 0  # the attacks do hit


def test_a_fault_that_is_planted_is_reported_as_silent() -> None:
    done = call(sys.executable, "-c", PLANTED)
    assert done.returncode == 1, done.stdout + done.stderr
    tried, *_, silent, tracebacks, hangs = counts(done.stdout, "bits")
    assert (tried, silent, tracebacks, hangs) == (6, 6, 0, 0)
    for seed in range(3, 9):
        assert f"silent: python tools/attack.py --only bits --seed {seed} --trials 1" in done.stdout
    assert done.stdout.count("metrics.jsonl: bits [") == 6

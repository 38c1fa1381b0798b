"""Time `ddp-ssl runs` on many run folders.

    python tools/bench/runs.py [--runs 1000] [--rows 2000]

Makes run folders with rows of metrics as a run writes them, lists them three times in a new process
each, and prints the seconds of each, and those of them on a core. The folders are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddp_ssl.config import Config
from ddp_ssl.config.reader import Resolved
from ddp_ssl.run.status import write_status


def make(folder: Path, rows: int, number: int) -> None:
    """A run of `rows` steps with a validation every tenth of them."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(Resolved(Config(), {}).to_yaml())
    every = max(rows // 10, 1)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, rows + 1):
            row = {"step": step, "epoch": step // every, "train/loss": 1 / step, "optim/lr": 0.1}
            row |= {f"perf/{name}": 0.123456789 for name in "abcdefgh"}
            if step % every == 0:
                row |= {"eval/knn_top1": step / rows, "rep/embedding_std": 0.04}
            file.write(json.dumps(row) + "\n")
    (folder / "checkpoints" / "best.json").write_text(json.dumps({"step": rows // every * every}))
    write_status(folder, "done" if number % 2 else "running", step=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.runs):
            make(Path(root) / f"sweep{number // 10}" / f"lr={number}", options.rows, number)
        command = [sys.executable, "-m", "ddp_ssl.cli", "runs", root]
        for _ in range(3):
            start, before = time.perf_counter(), os.times().children_user
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            cpu = os.times().children_user - before
            print(f"{len(done.stdout.splitlines()) - 2} runs: {seconds:.2f} s, {cpu:.2f} s of CPU")
        print(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

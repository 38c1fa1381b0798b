"""Processor time of help and of a user's mistakes, beside that of `import torch`.

Each command runs in a process of its own, all in turn; the medians of user plus system time. What
a command imports, and how long each import takes, is in `python -X importtime -m ddp_ssl.cli ...`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from compare import parser_of

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    **{
        f"ddp-ssl {line}": ["-m", "ddp_ssl.cli", *line.split()]
        for line in (
            "--help", "train --help", "train --help optim", "train --print-config",
            "train optim.lrr=1", "train lr 0.3", "train method.name=simclrr",
            "train method.alpha_evry=1", "train model.backbone=resnt18",
            "train cifar/adadim data.root=/nowhere", "evaluate --help", "embed --help",
            "export --help", "doctor --help",
        )
    },
}  # fmt: skip


def processor_seconds(words: list[str]) -> float:
    """User plus system time of one process."""
    before = os.times()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main() -> None:
    """Print a Markdown table."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.repeats + 1):  # the first one reads the files into memory
        for name, words in COMMANDS.items():
            seconds = processor_seconds(words)
            if turn:
                times[name].append(seconds)
    torch = statistics.median(times["import torch"])
    print("| | s | over `import torch` |\n| --- | ---: | ---: |")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| `{name}` | {median:.2f} | {median / torch:.2f} |")


if __name__ == "__main__":
    main()

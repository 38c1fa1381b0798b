"""Train every method on the embedded digits and write the table of docs/methods.md.

    python tools/methods_table.py [--out runs/methods] [--processes 2] [--only byol dino]

Each method runs with its own embedded settings (`method.name=NAME` and nothing else). A run that
ended is not repeated, and an interrupted one goes on. About two minutes a method on two cores.

Exit code 1, naming each method, if one falls below the floors: metrics finite, embedding standard
deviation above 0.02, effective rank of Z above 3, k-NN at the end above k-NN before + 0.02.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from ddp_ssl.logs.writer import read_metrics
from ddp_ssl.methods._registry import builtin_methods

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- digits: begin -->", "<!-- digits: end -->"
COLUMNS = {
    "eval/knn_top1": "k-NN",
    "eval/probe_top1": "probe",
    "rep/effective_rank_r": "rank of R",
    "rep/effective_rank_z": "rank of Z",
    "rep/mutual_information": "I(R;Z)",
    "rep/embedding_std": "embedding std",
}


def train(name: str, folder: Path, processes: int) -> None:
    """One run to its end; raises `SystemExit` with its last words if it fails."""
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--standalone",
        "--nproc_per_node", str(processes), "-m", "ddp_ssl.train", f"method.name={name}",
        f"run.dir={folder}", "run.resume=auto", "eval.raw_pixels=false", "log.tensorboard=false",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")


def first_and_last(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        for name in COLUMNS:
            if name in row:
                first.setdefault(name, row[name])
                last[name] = row[name]
    return first, last


def table(results: dict[str, tuple[dict[str, float], dict[str, float]]]) -> str:
    """Markdown: a line per method, and the untrained network's k-NN."""
    lines = [
        "| method | k-NN before | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for name, (first, last) in results.items():
        values = []
        for column in COLUMNS:
            value = last.get(column)
            digits = 1 if "rank" in column else 3
            values.append("–" if value is None else f"{value:.{digits}f}")
        before = f"{first.get('eval/knn_top1', float('nan')):.3f}"
        lines.append(f"| {name} | {before} | " + " | ".join(values) + " |")
    return "\n".join(lines)


STD, RANK, GAIN = 0.02, 3.0, 0.02  # each to be exceeded


def failures(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """The metrics below the floors, one line each; none for a method that trains."""
    missing = [name for name in COLUMNS if not math.isfinite(last.get(name, math.nan))]
    if missing:
        return [f"not finite or not there: {', '.join(missing)}"]
    before = first["eval/knn_top1"]
    floors = {
        "rep/embedding_std": STD,
        "rep/effective_rank_z": RANK,
        "eval/knn_top1": before + GAIN,
    }
    return [
        f"{name} {last[name]:.4g}, the floor is {floor:.4g}"
        for name, floor in floors.items()
        if last[name] <= floor
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=builtin_methods(), metavar="NAME")
    options = parser.parse_args()
    names = options.only or builtin_methods()
    results = {}
    for number, name in enumerate(names, 1):
        folder = options.out / name
        if not (folder / "result.md").exists():
            print(f"{number}/{len(names)} {name}", file=sys.stderr, flush=True)
            train(name, folder, options.processes)
        results[name] = first_and_last(folder)
    text = table(results)
    print(text)
    document = DOCUMENT.read_text()
    if not options.only and BEGIN in document:
        pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        DOCUMENT.write_text(pattern.sub(f"{BEGIN}\n{text}\n{END}", document))
    print(
        f"floors: finite; embedding std > {STD}; effective rank of Z > {RANK:g}; "
        f"k-NN > k-NN before + {GAIN}"
    )
    fallen = {name: failures(*found) for name, found in results.items()}
    for name, lines in fallen.items():
        for line in lines:
            print(f"{name}: {line}")
    return int(any(fallen.values()))


if __name__ == "__main__":
    sys.exit(main())

"""This trainer beside lightly-train: k-NN accuracy at equal processor time, on a folder of images.

Both train the same network without labels on FOLDER/train, from the command to the exported
weights, with what each chooses itself for the rest. This trainer's epochs are its preset's.
lightly-train gets those that fit into as much processor time as the slowest of these runs took, by
two short runs. `ddp-ssl evaluate knn` judges both, by the labels of FOLDER/train on the images of
FOLDER/val; beside them the untrained network. `--raw` adds raw pixels.

lightly-train has an environment of its own, with timm: LIGHTLY is its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from compare import parser_of

ROOT = Path(__file__).parents[2]
NETWORK: dict[str, Any] = {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1]}
SHORT = 1, 9  # epochs of two runs of lightly-train that tell the seconds of an epoch

# What a user of lightly-train writes. Its local views have 96 pixels unless that is said.
SCRIPT = """\
import lightly_train

if __name__ == "__main__":
    lightly_train.pretrain(
        out={out!r},
        data={data!r},
        model="timm/resnet18",
        model_args={network!r},
        method={method!r},
        epochs={epochs},
        transform_args={transform!r},
        accelerator="cpu",
        num_workers=0,
        seed={seed},
    )
"""


class Contestant(NamedTuple):
    trainer: str  # "ddp_ssl" or "lightly"
    method: str


class Run(NamedTuple):
    cpu: float  # seconds, user plus system, of all its processes
    first: float  # seconds from the command to the first line with a loss, by the clock
    lines: int  # printed
    weights: Path


OURS = [Contestant("ddp_ssl", method) for method in ("adadim", "simclr", "dino")]
THEIRS = [Contestant("lightly", method) for method in ("simclr", "dino")]


def watched(command: list[str], log: Path, sign: str) -> tuple[float, float, int]:
    """Processor seconds, seconds to the first output with `sign`, lines (also of a bar)."""
    before, began, first, text = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), 0.0, ""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "COLUMNS": "100",
    }  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        text += piece.decode(errors="replace")
        if not first and sign in text:
            first = time.time() - began
    log.write_text(text)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed: {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, first, text.count("\n")


def train(options: argparse.Namespace, who: Contestant, name: str, epochs: int = 0) -> Run:
    """One run in OUT/NAME, of `epochs`; 0: as many as the preset says."""
    out = options.out / name
    log = options.out / f"{name}.log"
    if who.trainer == "ddp_ssl":
        command = [
            sys.executable, "-m", "ddp_ssl.train", str(options.folder), f"run.dir={out}",
            f"method.name={who.method}", "run.threads=1", f"run.seed={options.seed}",
            f"model.backbone_args={json.dumps(NETWORK)}", f"eval.raw_pixels={options.raw}".lower(),
            *options.extra,
        ]  # fmt: skip
        return Run(*watched(command, log, "first step: "), out / "backbone.pt")
    transform: dict[str, Any] = {"image_size": (options.side, options.side)}
    if who.method == "dino":
        transform["local_view"] = {"view_size": (options.side // 2, options.side // 2)}
    script = options.out / f"{name}.py"
    script.write_text(
        SCRIPT.format(
            out=str(out), data=str(options.folder / "train"), network=NETWORK, method=who.method,
            epochs=epochs, transform=transform, seed=options.seed,
        )
    )  # fmt: skip
    command = [str(options.lightly), str(script)]
    return Run(*watched(command, log, "train_loss="), out / "exported_models/exported_last.pt")


def knn(options: argparse.Namespace, source: str, name: str) -> dict[str, float]:
    """k-NN top-1 of the weights for each k, by this trainer's evaluation."""
    place = options.out / f"knn-{name}"
    command = [
        sys.executable, "-m", "ddp_ssl.evaluate", "knn", source, f"run.dir={place}",
        "run.name=knn", "run.device=cpu", "data.name=folder", f"data.root={options.folder}",
        f"data.val_size={options.side}", f"model.backbone_args={json.dumps(NETWORK)}",
        *([] if source.startswith("timm:") else ["model.backbone=resnet18"]),
    ]  # fmt: skip
    watched(command, options.out / f"knn-{name}.log", "")
    rows = json.loads((place / "evaluate" / "knn.json").read_text())["rows"]
    return {row["k"]: row["top1"] for row in rows}


def main() -> None:
    """Print a Markdown table."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="with class folders in train/ and val/")
    parser.add_argument("lightly", type=Path, help="the interpreter that has lightly-train")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--side", type=int, default=64, help="pixels of an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="raw pixels too: in ddp_ssl's logs")
    parser.add_argument("--seconds", type=float, default=0, help="lightly-train's, if none of ours")
    parser.add_argument("--epochs", type=int, default=0, help="lightly-train's, if you know them")
    parser.add_argument("--only", default="", help="such as ddp_ssl-dino,lightly-dino")
    parser.add_argument("--extra", nargs="*", default=[], help="more key=value for ddp_ssl")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    untrained = knn(options, "timm:resnet18", "untrained")
    print("| trainer, method | CPU seconds | first step after | lines | k = 5 | k = 20 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| untrained network | | | | {untrained['5']:.3f} | {untrained['20']:.3f} |", flush=True)
    seconds = options.seconds
    for who in OURS + THEIRS:
        name = f"{who.trainer}-{who.method}"
        if options.only and name not in options.only.split(","):
            continue
        if who in OURS:
            run = train(options, who, name)
            seconds = max(seconds, run.cpu)
        else:
            epochs = options.epochs
            if not epochs:
                few, more = (train(options, who, f"{name}-{n}", n).cpu for n in SHORT)
                epochs = round((seconds - few) / (more - few) * (SHORT[1] - SHORT[0])) + SHORT[0]
            run = train(options, who, name, epochs)
        weights = options.out / f"{name}.pt"  # beside no run, so that both are read alike
        shutil.copy(run.weights, weights)
        top1 = knn(options, str(weights), name)
        print(
            f"| {who.trainer} {who.method} | {run.cpu:.0f} | {run.first:.1f} s | {run.lines} "
            f"| {top1['5']:.3f} | {top1['20']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Make typical mistakes at the command line, and write the answers to docs/mistakes.md.

    python tools/mistakes.py [--out docs/mistakes.md]

All of them run in this process, in a folder with some pictures and a small run. Exit code 1, naming
each, if an answer is not one line and exit code 2 that names what would be accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
from PIL import Image

from ddp_ssl import cli

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "mistakes.md"
HEAD = """# Typical mistakes

`python tools/mistakes.py` makes each of these and writes this page: the command behind `ddp-ssl`,
and the answer behind `ddp_ssl: error:`. Each ends with exit code 2 before anything is written.
`pictures` is a folder of 40 images, `run` a finished run on them.
"""


class Mistake(NamedTuple):
    """What is typed, and what the answer has to name."""

    line: str
    named: str


SECTIONS = {
    "Keys and values": [
        Mistake("train optim.lrr=1", "optim.lr"),
        Mistake("train learning_rate=0.1", "optim.lr"),
        Mistake("train batch_size=64", "data.batch_size"),
        Mistake("train num_workers=4", "data.threads"),
        Mistake("train max_epochs=10", "optim.epochs"),
        Mistake("train lr 0.3", "optim.lr=0.3"),
        Mistake("train --lr 0.3", "optim.lr"),
        Mistake("train optim.lr = 0.3", "optim.lr=0.3"),
        Mistake("train optim.lr", "optim.lr="),
        Mistake("train optim.lr=fast", "number"),
        Mistake("train optim.lr=0,3", "optim.lr=0.3"),
        Mistake("train optim.lr=-1", "greater"),
        Mistake("train optim.epochs=1.5", "integer"),
        Mistake("train optim.name=adamW", "adamw"),
        Mistake("train optim.precision=fp8", "bf16"),
        Mistake("train model.projector=[512, 512]", "quotes"),
        Mistake("train model.projector=512", "list"),
        Mistake("train data.batch_size=1", "2"),
        Mistake("train 'data.views=[{count: 1}]'", "2"),
        Mistake("train data.views.size=64", "data.views.0.size"),
    ],
    "Methods, backbones and devices": [
        Mistake("train method=simclr", "method.name"),
        Mistake("train method.name=simclrr", "simclr"),
        Mistake("train method.name=SimCLR", "simclr"),
        Mistake("train method.name=my_module:Mine", "PYTHONPATH"),
        Mistake("train method.name=simclr method.alpha_every=2", "simclr"),
        Mistake("train model.backbone=resnt18", "resnet18"),
        Mistake("train model.backbone=dinov2_vits14", "_dinov2"),
        Mistake("train model.backbone=vit_small_patch14_dinov2", "32"),
        Mistake("train run.device=gpu", "cuda"),
        Mistake("train run.device=cuda", "cpu"),
    ],
    "Images": [
        Mistake("train nowhere", "a folder of images"),
        Mistake("train empty", "images"),
        Mistake("train texts", "images"),
        Mistake("train text-as-jpg", "JPEG"),
        Mistake("train cifar/adadim data.root=nowhere", "does not exist"),
        Mistake("train cifar/adadim data.root=pictures", "cifar"),
        Mistake("train data.name=cifar100", "data.root"),
        Mistake("train data.name=imagnet", "imagenet"),
        Mistake("train data.files=list.txt", "data.root"),
        Mistake("train 'data.root=[pictures, nowhere]'", "does not exist"),
        Mistake("train data.name=array data.root=pictures", ".npz"),
        Mistake("train pictures data.batch_size=400", "36"),
    ],
    "YAML files": [
        Mistake("train nowhere.yaml", "imagenet100/adadim"),
        Mistake("train cifar/adadin", "cifar/adadim"),
        Mistake("train pictures/class0/0.png", "YAML"),
        Mistake("train tabs.yaml", "spaces"),
        Mistake("train list.yaml", "section"),
        Mistake("train typo.yaml", "optim.lr"),
        Mistake("train twice.yaml", "twice"),
        Mistake("train type.yaml", "integer"),
    ],
    "Several processes": [
        Mistake("RANK=0 WORLD_SIZE=3 train", "data.batch_size"),
        Mistake("RANK=0 WORLD_SIZE=30 train pictures", "at most"),
        Mistake("RANK=0 WORLD_SIZE=2 train", "MASTER_ADDR"),
        Mistake("RANK=one WORLD_SIZE=2 train", "RANK"),
    ],
    "Going on": [
        Mistake("train pictures run.dir=run", "run.resume=auto"),
        Mistake("train run.resume=auto", "run.dir"),
        Mistake("train run.resume=nowhere", "run.resume"),
        Mistake("resume", "folder of a run"),
        Mistake("resume nowhere", "folder of a run"),
        Mistake("resume pictures", "folder of a run"),
        Mistake("resume run optim.lr=5", "optim.lr"),
        Mistake("resume run run.dir=other", "run.dir"),
    ],
    "After the run": [
        Mistake("evaluate run", "knn"),
        Mistake("evaluate knnn run", "knn"),
        Mistake("evaluate knn", "run folder"),
        Mistake("evaluate knn pictures", "config.yaml"),
        Mistake("evaluate knn noise.pt", "model.backbone=resnet50"),
        Mistake("evaluate knn noise.pt model.backbone=resnet18 data.name=digits", "weights"),
        Mistake("evaluate knn run k=5", "knn.k"),
        Mistake("evaluate knn run data.root=empty", "images"),
        Mistake("evaluate linear timm:resnt18 data.name=digits", "resnet18"),
        Mistake("export run", "--format (timm"),
        Mistake("export run --format pytorch", "timm"),
        Mistake("export nowhere --format timm", "run folder"),
        Mistake("embed run", "--out"),
        Mistake("embed run --out features.txt", ".csv"),
        Mistake("embed run --split test --out features.npz", "val"),
        Mistake("trian pictures", "train"),
    ],
}  # fmt: skip

YAMLS = {
    "tabs.yaml": "optim:\n\tlr: 0.1\n",
    "list.yaml": "- optim\n- data\n",
    "typo.yaml": "optim:\n  lrr: 0.1\n",
    "twice.yaml": "optim:\n  lr: 0.1\n  lr: 0.2\n",
    "type.yaml": "optim:\n  epochs: many\n",
}


def prepare(place: Path) -> None:
    """Pictures, files that are none, YAMLs, and a run of one step."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = place / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    (place / "empty").mkdir()
    for folder, ending in (("texts", "txt"), ("text-as-jpg", "jpg")):
        (place / folder / "class0").mkdir(parents=True)
        for number in range(20):
            (place / folder / "class0" / f"{number}.{ending}").write_text("no picture\n")
    for name, text in YAMLS.items():
        (place / name).write_text(text)
    (place / "list.txt").write_text("".join(f"nowhere/{n}.jpg\n" for n in range(40)))
    (place / "noise.pt").write_bytes(rng.bytes(100))
    small = (
        "run.device=cpu", "run.threads=1", "optim.epochs=1", "eval.every=0", "measure.every=0",
        "optim.precision=fp32", "model.backbone_args={channels: [8, 8, 8, 8]}",
        "model.projector=[8]", "log.tensorboard=false", "data.batch_size=12", "run.dir=run",
        "data.val_fraction=0.1", "data.views=[{count: 2, size: 16}]", "optim.warmup_epochs=0",
    )  # fmt: skip
    code, said = answer(["train", "pictures", *small])
    assert code == 0, said


def answer(words: list[str]) -> tuple[Any, str]:
    """The exit code, and what a command without its `NAME=VALUE` in front writes to stderr."""
    environment = {}
    while words[0].partition("=")[0] in ("RANK", "WORLD_SIZE"):
        name, _, environment[name] = words.pop(0).partition("=")
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["ddp-ssl", *words]),
        kept_signals(),
    ):
        try:
            code: Any = cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    return code, err.getvalue()


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Put back what a command does with signals and logging."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    handlers = logging.getLogger().handlers[:]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        logging.getLogger().handlers[:] = handlers


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    out, here = options.out.absolute(), Path.cwd()
    page, wrong = [HEAD], []
    place = Path(tempfile.mkdtemp())
    os.chdir(place)
    try:
        prepare(place)
        for title, mistakes in SECTIONS.items():
            page += [f"## {title}\n", "| typed | answered |", "| --- | --- |"]
            for line, named in mistakes:
                code, said = answer(shlex.split(line))
                text = said.replace(f"{place}/", "").rstrip("\n")
                if code != 2 or "\n" in text or named not in text:
                    wrong.append(f"{line}: {code}, {named!r} expected:\n{text}")
                text = text.partition("error: ")[2].replace("|", "\\|")
                page.append(f"| `{line}` | {text} |")
            page.append("")
    finally:
        os.chdir(here)
        shutil.rmtree(place)
    out.write_text("\n".join(page).rstrip() + "\n")
    print(
        "\n".join(wrong) or f"{sum(map(len, SECTIONS.values()))} mistakes, each answered in a line"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

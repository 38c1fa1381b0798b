"""Attack runs at random, and count the outcomes.

    python tools/attack.py [--trials N] [--seed S] [--only FAMILY]

Families: `crash` kills small runs and lets them go on; `starts` starts two runs in one folder;
`bits` flips bits in files that carry a checksum; `pictures` trains on damaged pictures; `text`
reads hostile YAML and arguments. Prints one Markdown table. Exit code 1 if anything was silent,
ended in a traceback or hung: then each such trial is printed with the command that repeats it.

Each trial runs in a fork of this process, which has imported everything and has no threads.
"""

from __future__ import annotations

import os

# Before numpy and torch are imported: a process with threads cannot be forked safely.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import io
import json
import logging
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import sklearn.datasets  # noqa: F401 (imported once, before the forks, as timm and lifecycle are)
import timm  # noqa: F401
import torch
from PIL import Image

from ddp_ssl import train
from ddp_ssl.checkpoint import store
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.commands import pack_shards
from ddp_ssl.config import Config, ConfigError, reference
from ddp_ssl.data.build import train_loader
from ddp_ssl.data.datasets import registry, scan, shards
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.selection import Skip
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading import dali
from ddp_ssl.data.loading.bad_images import BadImages, write_list
from ddp_ssl.logs.writer import MetricsWriter
from ddp_ssl.run.configure import load
from ddp_ssl.training import lifecycle  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("refused", "repaired", "no effect", "silent", "tracebacks", "hangs")
FAULTS = COLUMNS[3:]
CPU = torch.device("cpu")
Result = tuple[str, str]
"""One of `COLUMNS`, and what was tried."""
Draw = random.Random

# --- forks ---------------------------------------------------------------------------------------


def start(action: Callable[[], Any], output: Path, limit: int) -> int:
    """Begin `action` in a fork that writes to a file; after `limit` seconds SIGALRM ends it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(n, "w", 1, errors="replace", closefd=False) for n in (1, 2))  # noqa: SIM115
        signal.alarm(limit)
        code = action() or 0
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a fork; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def warm_up() -> None:
    """Convert DALI's training graph, which takes seconds, once for all forks; start no thread."""
    split = Split.of_files("", [b"x"] * 16, np.zeros(16))
    config = load(list(TINY)).config
    with patch.object(dali, "_iterator"):
        train_loader(
            config, ONE_PROCESS, Dataset("", split, None), CPU, [0, 1], BadImages()
        )._build()


def attempt(family: Family, seed: int, home: Path) -> Result:
    """One trial in a fork; the files of the family are in `home`."""
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        place, result = Path(folder), Path(folder) / "result"

        def act() -> None:
            result.write_text(json.dumps(family.trial(Draw(seed), home, place)))

        code = end_of(start(act, place / "output", family.limit))
        said = (place / "output").read_text(errors="replace")[-3000:]
        if code == 0:
            column, what = json.loads(result.read_text())
            return column, what + (f"\n{said}" if column in FAULTS else "")
        if code == -signal.SIGALRM:
            return "hangs", said
        return "tracebacks", f"exit code {code}\n{said}"


# --- crash, starts: whole runs -------------------------------------------------------------------

STEPS = 24
RUN_S = 300  # a run takes a few seconds
TINY = (
    "data.fraction=0.05", "data.batch_size=16", "data.threads=1", "optim.epochs=6",
    "data.views=[{count: 2, size: 16, recipe: sym}]", "optim.warmup_epochs=0",
    "model.backbone_args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "model.projector=[24, 12]", "run.device=cpu", "run.threads=1", "run.timeout_s=120",
    "eval.every=0", "eval.knn_bank=100", "eval.raw_pixels=false", "measure.every=0",
    "log.every_steps=1", "log.tensorboard=false", "checkpoint.every_steps=2",
)  # fmt: skip


def start_run(folder: Path, output: Path, *more: str) -> int:
    words = [*TINY, f"run.dir={folder}", *more]
    return start(lambda: train.main(words), output, RUN_S)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in lines]


def prepare_runs(home: Path) -> None:
    """An uninterrupted run. The first start makes the digits; the second one is timed."""
    os.environ["DDP_SSL_CACHE"] = str(home / "cache")
    for name in ("first", "whole"):
        began = time.monotonic()
        if end_of(start_run(home / name, home / "output")):
            raise SystemExit((home / "output").read_text())
    (home / "took").write_text(str(time.monotonic() - began))


def ended_badly(codes: list[int], texts: list[str]) -> str:
    """The column of runs that hung or did not end in order; empty for others."""
    if -signal.SIGALRM in codes:
        return "hangs"
    wrong = any(code not in (0, 2) for code in codes) or any("Traceback" in t for t in texts)
    return "tracebacks" if wrong else ""


def crash(draw: Draw, home: Path, place: Path) -> Result:
    """Kill -9 at a random time or in a save, once or twice; then run to the end."""
    os.environ["DDP_SSL_CACHE"] = str(home / "cache")
    folder, output = place / "run", place / "output"
    took, kills = float((home / "took").read_text()), []
    for _ in range(draw.choice((1, 2))):
        pid = start_run(folder, output, "run.resume=auto")
        time.sleep(draw.uniform(0, took))
        in_a_save = draw.random() < 0.5
        while in_a_save and not has_ended(pid) and not list(folder.glob("checkpoints/*.tmp")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        if end_of(pid) == -signal.SIGKILL:
            kills.append("in a save" if in_a_save else "at any time")
    code = end_of(start_run(folder, output, "run.resume=auto"))
    what = f"killed {' and '.join(kills) or 'after its end'}"
    if bad := ended_badly([code], [output.read_text(errors="replace")]):
        return bad, what
    if code == 2:
        return "tracebacks", f"{what}: the resumed run was refused"
    newest = [store.load(f)["model"] for f in (folder, home / "whole")]
    if rows(folder) != rows(home / "whole") or not same(*newest):
        return "silent", f"{what}: other rows or weights than those of the uninterrupted run"
    return "repaired" if kills else "no effect", what


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def starts(draw: Draw, home: Path, place: Path) -> Result:
    """The same command twice with `run.resume=auto`, or two seeds into one new folder."""
    os.environ["DDP_SSL_CACHE"] = str(home / "cache")
    folder, took = place / "run", float((home / "took").read_text())
    twice = draw.random() < 0.5
    words = ["run.resume=auto"] * 2 if twice else ["run.seed=1", "run.seed=2"]
    delay = draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 1.2 * took)))
    outputs = [place / f"{i}.out" for i in range(2)]
    pids = [start_run(folder, outputs[0], words[0])]
    time.sleep(delay)
    pids.append(start_run(folder, outputs[1], words[1]))
    codes = [end_of(pid) for pid in pids]
    texts = [path.read_text(errors="replace") for path in outputs]
    what = f"{' and '.join(words)}, {delay:.2f} s apart, exit codes {codes}\n{''.join(texts)}"
    if bad := ended_badly(codes, texts):
        return bad, what
    steps = [row["step"] for row in rows(folder) if "train/loss" in row]
    saved = [found.step for found in store.find(folder)]
    one_line = [t.strip().rpartition("\n")[2].startswith("ddp_ssl: error: run.dir") for t in texts]
    if (
        steps != list(range(1, STEPS + 1))
        or len(saved) != len(set(saved))
        or list(folder.glob("claim-*"))
        or one_line != [code == 2 for code in codes]
        or not 1 <= codes.count(0) <= 1 + twice
        or (twice and rows(folder) != rows(home / "whole"))
    ):
        return "silent", what
    waited = any("waiting for its end" in text for text in texts)
    return "refused" if 2 in codes else "repaired" if waited else "no effect", what


# --- bits: files with a checksum -----------------------------------------------------------------


def picture(index: int) -> Image.Image:
    coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


def save_pictures(root: Path) -> None:
    """Twelve for training and four for validation in two classes."""
    for i in range(16):
        path = root / ("train" if i < 12 else "val") / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000))  # a scan of new folders is not believed


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.arange(100.0) * step}, "rng": [step, "x", (step,)]}


def prepare_bits(home: Path) -> None:
    """The files of each kind, in a folder of its name; made apart, as each has its settings."""
    save_pictures(home / "pictures")
    for name, kind in KINDS.items():
        (home / name).mkdir()
        if end_of(start(partial(kind.make, home / name, home), home / "output", RUN_S)):
            raise SystemExit((home / "output").read_text())


def make_shards(folder: Path, home: Path) -> int:
    words = ["--out", str(folder), "--shard-size", "20000", "--workers", "2"]
    return pack_shards.main([*words, "data.name=folder", f"data.root={home / 'pictures'}"])


def make_checkpoints(folder: Path, home: Path) -> None:
    about: dict[str, Any] = {"epoch": 1, "identity": {"seed": "0"}, "world_size": 1, "keep": 3}
    for step in (10, 20, 30):
        store.save_best(folder, store.save(folder, state_of(step), step=step, **about))


def make_rows(folder: Path, home: Path) -> None:
    writer = MetricsWriter(folder, resumed_step=None, offset=0)
    for step in range(1, 31):
        writer.scalars({"step": step, "epoch": step // 5, "train/loss": 1 / step})
    (home / "about rows").write_text(json.dumps([writer.offset(), writer.crc]))
    writer.close()


def read_scan(folder: Path, home: Path) -> Any:
    os.environ["DDP_SSL_CACHE"] = str(folder)
    scan.WORTH_KEEPING = 1
    split, classes = scan.images_below(home / "pictures" / "train")
    names = [split.name(i) for i in range(len(split))]
    return split.digest, names, split.labels.tolist(), classes


def read_shards(folder: Path, home: Path) -> Any:
    """An image that is refused as it is read ends the reading with a `ValueError`."""
    data = shards.open_shards(folder)
    found: list[Any] = [data.name, data.class_names]
    for split in (data.train, data.val):
        assert split is not None
        assert split.shards is not None
        names = [split.name(i) for i in range(len(split))]
        found += [split.digest, split.labels.tolist(), names]
        try:
            found += [split.read(i).tobytes() for i in range(len(split))]
        except OSError as error:
            raise ValueError(error.strerror) from None
    return found


def read_checkpoints(folder: Path, home: Path) -> Any:
    """What a resumed run, `dynamics` and an export of the best one read."""
    newest = store.load_newest(folder)
    if newest is None:
        raise ValueError("no good checkpoint")
    about, state = newest
    best = store.load_file(folder / "checkpoints" / "best.pt")[1]
    if not same(state, state_of(about.step)) or not same(best, state_of(30)):
        return "another state than the one that was saved"
    return about, store.find(folder)


def read_rows(folder: Path, home: Path) -> Any:
    offset, crc = json.loads((home / "about rows").read_text())
    MetricsWriter(folder, resumed_step=30, offset=offset, crc=crc).close()
    return (folder / "metrics.jsonl").read_bytes()


def read_digits(folder: Path, home: Path) -> Any:
    os.environ["DDP_SSL_CACHE"] = str(folder)
    data = registry.load(load(["data.name=digits"]).config.data, 0)
    assert data.val is not None
    return [(s.labels.tolist(), [s.read(i).tobytes() for i in range(len(s))])
            for s in (data.train, data.val)]  # fmt: skip


class Kind(NamedTuple):
    """Files with checksums: how they are made and read in a folder, and their share."""

    make: Callable[[Path, Path], int | None]
    read: Callable[[Path, Path], Any]
    share: int = 3
    may_lose: bool = False
    """Whether, with a word, an older checkpoint or the rows that are left may be taken."""


def made_by(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], None]:
    """The first reading makes what is kept."""
    return lambda folder, home: read(folder, home) and None


KINDS = {
    "kept scan": Kind(made_by(read_scan), read_scan),
    "shards": Kind(make_shards, read_shards),
    "checkpoints": Kind(make_checkpoints, read_checkpoints, may_lose=True),
    "metrics.jsonl": Kind(make_rows, read_rows, may_lose=True),
    "cached digits": Kind(made_by(read_digits), read_digits, 1),  # many files, slow to write again
}
UNREAD = (".lock", ".origin", "packing.jsonl")


class Said(logging.Handler):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("ddp_ssl").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def bits(draw: Draw, home: Path, place: Path) -> Result:
    """One to four flipped bits in a file of one kind."""
    kind = draw.choices(list(KINDS), [k.share for k in KINDS.values()])[0]
    folder, read, said = place / kind, KINDS[kind].read, Said()
    shutil.copytree(home / kind, folder, copy_function=os.link)
    before = read(folder, home)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in UNREAD)
    if kind == "cached digits" and draw.random() < 0.2:
        files = [f for f in files if f.suffix != ".jpg"]
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    places = draw.sample(range(8 * len(content)), draw.randint(1, 4))
    for at in places:
        content[at // 8] ^= 1 << at % 8
    path.unlink()  # a link to the family's file
    path.write_bytes(content)
    said.lines.clear()
    what = f"{kind}: bits {places} of {path.relative_to(folder)}"
    try:
        after = read(folder, home)
    except ValueError as error:
        return ("refused" if str(error).isprintable() else "tracebacks"), f"{what}: {error}"
    if after == before:
        return ("repaired" if said.lines else "no effect"), what
    held = KINDS[kind].may_lose and said.lines and not isinstance(after, str)
    return ("repaired" if held else "silent"), what


# --- pictures ------------------------------------------------------------------------------------

# PIL's name and the extension; then the place of width and height in the header: a mark, the bytes
# after its start, the format of the two numbers, and whether the height comes first.
FORMS = (
    ("JPEG", ".jpg", b"\xff\xc0", 5, ">HH", True),
    ("PNG", ".png", b"IHDR", 4, ">II", False),
    ("WEBP", ".webp", b"\x9d\x01\x2a", 3, "<HH", False),
    ("TIFF", ".tif", b"\0\1\4\0\1\0\0\0", 8, "<I8xI", False),
    ("BMP", ".bmp", b"BM", 18, "<ii", False),
    ("PPM", ".ppm", b"P6", 3, "", False),
    ("JPEG2000", ".jp2", b"ihdr", 4, ">II", True),
    ("JPEG2000", ".jp2", b"\xff\x51", 6, ">II", False),
)
SIDES = (0, 1, 7, 47, 300, 3000, 9000, 16_383, 65_535)
NAMES = (
    "new\nline", "\x1b[31mred", "tab\t", "back\\slash", "quo'te\"", "\udcff\udcfe", "\u202eleft",
    " space ", "-rf", "$(ls)", "%s{0}", "#", "\u4e2d\u6587", "x" * 240, "a.b.c", "x..",
)  # fmt: skip


def forged(draw: Draw, form: tuple[Any, ...], content: bytearray) -> str:
    """Another width and height in the header."""
    _, _, mark, on, layout, swap = form
    sides = draw.choice(SIDES), draw.choice(SIDES)
    at = content.index(mark) + on
    if not layout:
        content[at : content.index(b"\n", at)] = f"{sides[0]} {sides[1]}".encode()
        return f"size {sides}"
    content[at : at + struct.calcsize(layout)] = _packed(layout, sides[::-1] if swap else sides,
                                                         content[at:])  # fmt: skip
    if mark == b"IHDR":
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return f"size {sides}"


def _packed(layout: str, sides: tuple[int, ...], old: bytearray) -> bytes:
    packed = struct.pack(layout, *sides)
    return packed[:4] + bytes(old[4:12]) + packed[12:] if "x" in layout else packed


def damaged(draw: Draw, form: tuple[Any, ...]) -> tuple[bytes, str]:
    """A picture of this form, damaged in one way or not, and what was done to it."""
    buffer = io.BytesIO()
    picture(draw.randrange(1000)).save(buffer, form[0])
    content = bytearray(buffer.getvalue())
    how = draw.choice(("cut", "flipped", "flipped", "forged", "forged", "whole", "zeros"))
    if how == "cut":
        del content[draw.randrange(len(content)) :]
    elif how == "flipped":
        first = draw.choice((0, 0, 60))  # headers as often as all other bytes
        for _ in range(draw.choice((1, 3, 30))):
            content[draw.randrange(first, draw.choice((100, len(content))))] ^= draw.randrange(256)
    elif how == "forged":
        how = forged(draw, form, content)
    elif how == "zeros":
        at = draw.randrange(len(content))
        content[at : at + 200] = bytes(len(content[at : at + 200]))
    return bytes(content), f"{form[0]}, {how}"


def pictures(draw: Draw, home: Path, place: Path) -> Result:
    """One damaged picture among eleven good ones, through the training loader."""
    said, form = Said(), draw.choice(FORMS)
    content, what = damaged(draw, form)
    stem = draw.choice(NAMES) if draw.random() < 0.3 else "picture"
    extension = draw.choice([f[1] for f in FORMS] + [".JPEG", ".gif"])
    name = stem + (form[1] if draw.random() < 0.7 else extension)
    root = place / "data"
    shutil.copytree(home / "pictures", root, copy_function=os.link)
    (root / "train" / "a" / "00.jpg").unlink()
    (root / "train" / "a" / name).write_bytes(content)
    what = f"{what}, named {name!r}"
    config = load(["data.name=folder", f"data.root={root}", "data.batch_size=4", "data.threads=1",
                   "data.views=[{count: 2, size: 16, recipe: sym}]"]).config  # fmt: skip
    data = registry.load(config.data, 0)
    split, bad = data.train, BadImages()
    places = [i for i in range(len(split)) if split.name(i) == b"a/" + os.fsencode(name)]
    if not places:
        return ("refused" if any("passed over" in s for s in said.lines) else "silent"), what
    (own,) = places
    loader = train_loader(config, ONE_PROCESS, data, CPU, [0, 1], bad)
    batches = [next(loader) for _ in range(3)]
    seen = {i for batch in batches for i in batch.ids.tolist()}
    whole = all(bool(view.isfinite().all()) for batch in batches for view in batch.views)
    listed = set(bad.of(split))
    others = set(range(len(split))) - {own}
    if not whole or listed - {own} or not others <= seen or (own in seen) == (own in listed):
        return "silent", f"{what}: listed {listed}, used {seen}"
    if listed:
        write_list(place / "bad.txt", bad.known)
        kept = Skip.of_file(place / "bad.txt", str(root)).keep(split)
        if np.flatnonzero(~kept).tolist() != [own] or len(bad.known) != 1:
            return "silent", f"{what}: the list of bad images does not name it"
    return ("repaired" if listed else "no effect"), what


# --- text ----------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
PIECES = (
    "[", "]", "{", "}", ":", ",", "&a ", "*a", "!!int", "!!python/object/apply:os.getcwd []",
    "!!binary x", "'", '"', "\\x", "\n", "\t", "  ", "- ", "9" * 400, "0x" + "f" * 5000, "1e999",
    "-1e300", "1e-300", ".nan", "-.inf", "2024-02-30", "1:2:3", "0b_", "a" * 300, "/" * 5000,
    "\udcff", "|", ">", "#", "null", "~", "<<", "%YAML 9.9", "---", "...", "@", "`", "?", "\x1b[2J",
    "\0", "\ufeff", "\u2028", "\U0001f600", "[" * 200, "{a: " * 3000, "\r", "off", "007", "..", "*",
)  # fmt: skip


def hostile_yaml(draw: Draw) -> bytes:
    """A YAML of the project, changed in a few places; or a bomb, nesting, another encoding."""
    files = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("ddp_ssl/config/digits/*.yaml")])
    text = draw.choice(files).read_text()
    lines = text.splitlines(keepends=True)
    for _ in range(draw.randint(1, 2)):
        i, how = draw.randrange(len(lines)), draw.randrange(7)
        line = lines[i]
        at = draw.randint(0, len(line))
        if how == 0:
            lines[i] = line[:at] + draw.choice(PIECES) + line[at:]
        elif how == 1:
            lines[i] = line.partition(":")[0] + ": " + draw.choice(PIECES) + "\n"
        elif how == 2:
            lines[i] = line[:at] + line[at + draw.randint(1, 3) :]
        elif how == 3:
            lines[i] = " " * draw.randint(0, 5) + line.lstrip()
        elif how == 4:
            lines.insert(draw.randint(0, len(lines)), line)
        elif how == 5:
            lines[i] = (
                f"{line.partition(':')[0]}: {draw.choice(lines).rpartition(':')[2].strip()}\n"
            )
        else:
            lines.insert(i, draw.choice((BOMB, "a: &a [*a]\n", "? [1]\n: 2\n", "[" * 900 + "\n")))
    code = draw.choice(("utf-8",) * 9 + ("utf-16", "utf-8-sig", "latin-1", "utf-32"))
    return "".join(lines).encode(code, "surrogateescape" if code == "utf-8" else "replace")


def hostile_argument(draw: Draw) -> str:
    keys = [key.replace(".N.", ".0.") for key, *_ in reference()]
    odd = ("x", "", "..", "run", "a.b.c.d", "data.views." + "9" * 5000, "data.views.\u00b2",
           "optim.betas.0", "model.backbone_args.depth", "--x", "@file", "/dev/null")  # fmt: skip
    key = draw.choice(keys) if draw.random() < 0.8 else draw.choice(odd)
    value = "".join(draw.choices(PIECES, k=draw.randint(0, 3)))
    if draw.random() < 0.5:
        value = draw.choice(("0", "1", "2", "0.5", "1e-3", "true", "null", "x", "[0.5, 1]", "12"))
    return key + draw.choice(("=", "=", "=", "=", "", "==")) + value


def text(draw: Draw, home: Path, place: Path) -> Result:
    """Accepted text reads back as the same config when it is written."""
    words = [hostile_argument(draw) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
    if not words or draw.random() < 0.5:
        (place / "c.yaml").write_bytes(hostile_yaml(draw))
        words.insert(0, str(place / "c.yaml"))
    what = ascii(words)[:1000]
    try:
        resolved = load(words)
    except ConfigError as error:
        one_line = bool(str(error)) and str(error).isprintable()
        return ("refused" if one_line else "tracebacks"), f"{what}: {error}"
    (place / "again.yaml").write_text(resolved.to_yaml())
    again: Config = load([str(place / "again.yaml")]).config
    return ("no effect" if again.model_dump() == resolved.config.model_dump() else "silent"), what


# --- the table -----------------------------------------------------------------------------------


class Family(NamedTuple):
    """Trials of one kind."""

    prepare: Callable[[Path], None]
    trial: Callable[[Draw, Path, Path], Result]
    limit: int
    """Seconds of a trial."""
    share: int = 1
    """Of so many trials asked for one is made."""


FAMILIES = {
    "crash": Family(prepare_runs, crash, 4 * RUN_S, 25),
    "starts": Family(prepare_runs, starts, 4 * RUN_S, 25),
    "bits": Family(prepare_bits, bits, 120),
    "pictures": Family(lambda home: save_pictures(home / "pictures"), pictures, 120),
    "text": Family(lambda home: None, text, 10),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the trials from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500, help="of crash and starts a 25th")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next add 1")
    parser.add_argument("--only", choices=FAMILIES, help="one family")
    options = parser.parse_args(arguments)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    torch.set_num_threads(1)
    warm_up()
    lines = [["family", "tried", *COLUMNS], ["---", *["--:"] * (1 + len(COLUMNS))]]
    faults = []
    with tempfile.TemporaryDirectory(prefix="attack-") as base:
        for name in [options.only] if options.only else FAMILIES:
            family, home = FAMILIES[name], Path(base) / name
            home.mkdir()
            if end_of(start(partial(family.prepare, home), home / "output", 2 * RUN_S)):
                raise SystemExit(f"{name}: {(home / 'output').read_text()}")
            count: Counter[str] = Counter()
            seeds = range(options.seed, options.seed - (-options.trials // family.share))
            for seed in seeds:
                column, what = attempt(family, seed, home)
                count[column] += 1
                if column in FAULTS:
                    again = f"python tools/attack.py --only {name} --seed {seed} --trials 1"
                    faults.append(f"{column}: {again}\n{what}")
            few = f" (one for {family.share} of the others)" if family.share > 1 else ""
            lines.append([f"`{name}`{few}", str(len(seeds)), *(str(count[c]) for c in COLUMNS)])
            print(f"{name}: {dict(count)}", file=sys.stderr, flush=True)
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    print("".join(f"\n{fault}\n" for fault in faults), end="")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

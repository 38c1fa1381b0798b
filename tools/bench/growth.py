"""Growth of time, memory and files: each quantity over a range of sizes, with its exponent.

    python tools/bench/growth.py [--plot docs/growth.png] [--out FILE.md] [--repeats 3]

Time is this process's processor time, the least of the repeats. Memory is the most in use at once
during one call, beyond the memory in use before. Exponents are slopes of a straight line through
the logarithms. W is by shapes: one process of W, with made-up rows of the others. Four to five
minutes on two cores.
"""

import io
import math
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compare import OneOf, parser_of, peak_mib
from torch import Tensor

from ddp_ssl.checkpoint import store
from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.cache import cache_folder
from ddp_ssl.losses import barlow_twins, info_nce, mutual_information, vicreg
from ddp_ssl.methods._registry import make_method
from ddp_ssl.reproduction.figures import pyplot
from ddp_ssl.run.configure import load

CPU = torch.device("cpu")
Loss = Callable[[Tensor, Comm], Tensor]
# At any size, both routes of VICReg apart: `auto` would change in the middle.
LOSSES: dict[str, Loss] = {
    "InfoNCE": lambda z, comm: info_nce(z, 0.1, comm),
    "VICReg, gather": lambda z, comm: vicreg(z, route="gather", comm=comm).loss,
    "VICReg, moments": lambda z, comm: vicreg(z, route="moments", comm=comm).loss,
    "Barlow Twins, moments": lambda z, comm: barlow_twins(z, route="moments", comm=comm),
    "I(R;Z), gram": lambda z, comm: mutual_information(2 * z, z, comm=comm),
}
TAKES_MANY_VIEWS = ("InfoNCE", "VICReg, gather", "VICReg, moments")


@dataclass
class Growth:
    """A quantity at some sizes."""

    what: str
    over: str
    unit: str
    sizes: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, size: float, value: float) -> None:
        self.sizes.append(size)
        self.values.append(max(value, 1e-9))

    @property
    def exponent(self) -> float:
        """Slope in double logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.values), 1)[0])

    @property
    def last(self) -> float:
        """Slope over the last two sizes, where fixed costs count least."""
        (a, b), (x, y) = self.sizes[-2:], self.values[-2:]
        return math.log(y / x) / math.log(b / a)


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """Processor time of one call, the least of `repeats`; short ones are called several times."""
    begin = time.process_time()
    work()
    calls = max(1, math.ceil(0.02 / max(time.process_time() - begin, 1e-4)))
    best = math.inf
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(calls):
            work()
        best = min(best, time.process_time() - begin)
    return 1e3 * best / calls


def of_losses(repeats: int) -> Iterator[Growth]:
    """Forward and backward of each loss over N, d, K and W."""
    shapes: list[tuple[str, list[int], Callable[[int], tuple[int, int, int, int]]]] = [
        ("N", [512, 1024, 2048, 4096], lambda n: (2, n, 256, 1)),
        ("d", [128, 256, 512, 1024, 2048], lambda d: (2, 512, d, 1)),
        ("K", [2, 4, 8], lambda k: (k, 256, 256, 1)),
        ("W, N = 64 W", [2, 8, 32, 64], lambda w: (2, 64, 256, w)),
        ("W, N = 2048", [1, 2, 4, 8], lambda w: (2, 2048 // w, 256, w)),
    ]
    for over, sizes, shape in shapes:
        for name, loss in LOSSES.items():
            if over == "K" and name not in TAKES_MANY_VIEWS:
                continue
            spent, used = Growth(name, over, "CPU-ms"), Growth(name, over, "peak MiB")
            for size in sizes:
                k, n, d, w = shape(size)
                z = torch.randn(k, n, d).requires_grad_()
                comm = OneOf(w) if w > 1 else ONE_PROCESS

                def work(loss: Loss = loss, z: Tensor = z, comm: Comm = comm) -> None:
                    torch.autograd.grad(loss(z, comm), z)

                spent.add(size, cpu_ms(work, repeats))
                used.add(size, peak_mib(work, CPU))
            yield spent
            yield used


def of_step(repeats: int) -> Iterator[Growth]:
    """The embedded default's whole step, network included, over N."""
    spent, used = (Growth("embedded step", "N of a step", unit) for unit in ("CPU-ms", "peak MiB"))
    for size in (32, 64, 128, 256):
        config = load([f"data.batch_size={size}", "run.device=cpu"]).config
        torch.manual_seed(0)
        method = make_method(config, ONE_PROCESS)
        method.alpha.value = 0.5
        views = [torch.rand(size, 3, v.size, v.size) for v in views_of(config.data.views)]
        batch = Batch(views, torch.arange(size), torch.zeros(size, dtype=torch.long))

        def work(method: Any = method, batch: Batch = batch) -> None:
            method(batch).loss.backward()
            method.zero_grad(set_to_none=True)

        spent.add(size, cpu_ms(work, repeats))
        used.add(size, peak_mib(work, CPU))
    yield spent
    yield used


def of_start(folder: Path) -> Iterator[Growth]:
    """Finding the files: the first time, when every folder is read, and from what was kept."""
    first = Growth("manifest, scanned", "files", "CPU-ms")
    again = Growth("manifest, kept", "files", "CPU-ms")
    content = b"\xff\xd8\xff\xd9"  # never decoded here
    for files in (1000, 4000, 16000):
        root = folder / str(files)
        for label in range(20):
            place = root / f"class{label:02}"
            place.mkdir(parents=True)
            for index in range(files // 20):
                (place / f"{index:06}.jpg").write_bytes(content)
            # Folders changed just now are not trusted to stay and are listed again.
            os.utime(place, (0, 0))
        os.utime(root, (0, 0))
        config = load(["data.name=folder", f"data.root={root}"]).config
        for growth in (first, again):
            begin = time.process_time()
            data = registry.load(config.data, 0)
            growth.add(files, 1e3 * (time.process_time() - begin))
            assert len(data.train) + len(data.val or ()) == files
    yield first
    yield again


def of_containers(folder: Path) -> Iterator[Growth]:
    """Finding the images of files of others, and what is kept of it, over the number of images."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name in ("parquet", "webdataset"):
        first = Growth(f"{name}, read through", "images", "CPU-ms")
        again = Growth(f"{name}, kept", "images", "CPU-ms")
        size = Growth(f"{name}, kept", "images", "MB")
        for images in (4000, 16000, 64000, 256000):
            root, before = folder / f"{name}{images}", kept_bytes(name)
            root.mkdir()
            contents = ((f"{i:09d}.jpg", b"%09d" % i * 8) for i in range(images))
            if name == "parquet":
                cells = [{"bytes": content, "path": path} for path, content in contents]
                pq.write_table(pa.table({"image": pa.array(cells, kind)}), root / "train.parquet")
            else:
                with tarfile.open(root / "train.tar", "w") as tar:
                    for path, content in contents:
                        member = tarfile.TarInfo(path)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            config = load([f"data.name={name}", f"data.root={root}"]).config
            for growth in (first, again):
                begin = time.process_time()
                data = registry.load(config.data, 0)
                growth.add(images, 1e3 * (time.process_time() - begin))
                assert len(data.train) + len(data.val or ()) == images
            size.add(images, 1e-6 * (kept_bytes(name) - before))
        yield first
        yield again
        yield size


def kept_bytes(name: str) -> int:
    return sum(file.stat().st_size for file in cache_folder().glob(f"{name}/*.npz"))


def of_checkpoints(folder: Path) -> Iterator[Growth]:
    """A checkpoint of model and LARS momentum over the number of parameters."""
    nbytes = Growth("checkpoint", "parameters", "MB")
    spent = Growth("checkpoint, save", "parameters", "CPU-ms")
    for width in (256, 512, 1024, 2048):
        config = load([f"model.projector=[{width},{width},{width}]", "run.device=cpu"]).config
        method = make_method(config, ONE_PROCESS)
        state = {
            "model": method.state_dict(),
            "optimizer": {n: torch.zeros_like(p) for n, p in method.named_parameters()},
        }
        place = folder / f"run{width}"
        place.mkdir()
        begin = time.process_time()
        path = store.save(
            place, state, step=1, epoch=1, identity={}, world_size=1, keep=2, permanent=False
        )
        parameters = sum(p.numel() for p in method.parameters())
        spent.add(parameters, 1e3 * (time.process_time() - begin))
        nbytes.add(parameters, Path(path).stat().st_size / 1e6)
    yield nbytes
    yield spent


def table(grown: Sequence[Growth]) -> str:
    """Markdown: a line per quantity."""
    lines = [
        "| | over | from | to | | smallest | largest | exponent | of the last two |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for g in grown:
        low, high = f"{g.sizes[0]:,.0f}", f"{g.sizes[-1]:,.0f}"
        lines.append(
            f"| {g.what} | {g.over} | {low} | {high} | {g.unit} | {g.values[0]:.3g} | "
            f"{g.values[-1]:.3g} | {g.exponent:.2f} | {g.last:.2f} |"
        )
    return "\n".join(lines)


def draw(grown: Sequence[Growth]) -> Any:
    """A matplotlib figure: a panel for each range and unit of several lines."""
    panels: dict[tuple[str, str], list[Growth]] = {}
    for g in grown:
        panels.setdefault((g.over, g.unit), []).append(g)
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(4.1 * columns, 3.5 * rows), layout="constrained", squeeze=False
    )
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(g.what for g in grown))}
    for axis, ((over, unit), lines) in zip(axes.flat, panels.items(), strict=False):
        for g in lines:
            label = f"{g.what}: {g.exponent:.2f}"
            axis.plot(g.sizes, g.values, marker="o", markersize=4, label=label,
                      color=colours[g.what])  # fmt: skip
        ticks = sorted({size for g in lines for size in g.sizes})
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{t / 1e6:.2g}M" if t >= 1e5 else f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel(over)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=6.5, framealpha=0.6, title="exponent", title_fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    grown: list[Growth] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for parts in (
            of_losses(options.repeats),
            of_step(options.repeats),
            of_start(folder),
            of_containers(folder),
            of_checkpoints(folder),
        ):
            for one in parts:
                grown.append(one)
                print(f"{one.what} over {one.over}: {one.unit} {one.exponent:.2f}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    text = (
        f"One thread, torch {torch.__version__}, float32, forward and backward; "
        f"{seconds:.0f} s in all.\n\n{table(grown)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.plot:
        draw(grown).savefig(options.plot, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())

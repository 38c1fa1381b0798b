"""The rows of `tools/gpu_report.sh`: a step on a GPU, measured in minutes.

    python tools/gpu_report.py GROUP OUT [--rehearse]

Each measurement is a line of `OUT/rows.jsonl` and of `OUT/table.md` the moment it is known. A
measurement that fails, or takes longer than its own limit, is a line with `error`; the next one
goes on. `--rehearse` takes tiny sizes, on the CPU if there is no GPU.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import lars
import losses
from compare import in_turn, peak_mib
from counting import Moved
from shared import CLASSES, learner_of, trained, without_input

from ddp_ssl import optim
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.build import load_data, train_loader
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.distributed import World
from ddp_ssl.driver import find_driver
from ddp_ssl.methods.base import Progress
from ddp_ssl.run.configure import load
from ddp_ssl.run.environment import environment
from ddp_ssl.run.signals import StopRequest
from ddp_ssl.training.build import on_device, parameter_groups
from ddp_ssl.training.loop import gradient_norm

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {"resnet50": "resnet50", "resnet18": "resnet18", "vit_s16": "vit_small_patch16_224"}
TINY = {  # backbone_args of the rehearsal; 4 channels crash torch on some CPUs
    "resnet50": "{channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "resnet18": "{channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "vit_s16": "{embed_dim: 24, depth: 1, num_heads: 2, img_size: 32}",
}
ADADIM, BARLOW, LEJEPA = (
    ROOT / f"configs/imagenet100/{n}.yaml" for n in ("adadim", "barlow_twins", "lejepa")
)
GIB = 2**30
Row = dict[str, Any]


class Report:
    """Rows, on disk as soon as they are there."""

    def __init__(self, group: str, out: Path, rehearse: bool) -> None:
        self.group, self.out, self.rehearse = group, out, rehearse
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._columns: list[str] = []

    def measure(self, limit_s: float, work: Callable[[], Row], **names: Any) -> None:
        """The row of one measurement: its name, and the result of `work` or the error."""

        def late(*_: Any) -> None:
            raise TimeoutError(f"stopped after {limit_s:g} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            row = names | work()
        except (Exception, SystemExit) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            row = names | {"error": text[:500]}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self._write(row)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                torch.cuda.empty_cache()

    def _write(self, row: Row) -> None:
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"group": self.group, **row}) + "\n")
        columns = list(row)
        with (self.out / "table.md").open("a") as file:
            if columns != self._columns:
                title = "" if self._columns else f"\n## {self.group}\n"
                file.write(f"{title}\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n")
                self._columns = columns
            file.write(f"| {' | '.join(_shown(row[name]) for name in columns)} |\n")

    def rates(self) -> tuple[float, float] | None:
        """Bytes and bf16 operations per second, as the group `machine` measured them."""
        with contextlib.suppress(OSError):
            for line in (self.out / "rows.jsonl").read_text().splitlines():
                row = json.loads(line)
                if row["group"] == "machine" and "error" not in row:
                    return row["copy_gb_per_s"] * 1e9, row["bf16_tflops"] * 1e12
        return None


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/")


def timed(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Milliseconds of a call: as many as fit into `seconds`, two or more, waited for once."""

    def run(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    return 1e3 * run(max(2, int(seconds / run(1))))


# --- the machine ---------------------------------------------------------------------------------


SHOWN = ("torch", "torchvision", "timm", "numpy")


def machine(report: Report) -> None:
    """Chip, driver, versions, and the rates that the limits below are made of."""

    device, seconds = report.device, 0.1 if report.rehearse else 0.5

    def work() -> Row:
        on_gpu = device.type == "cuda"
        found = environment()
        row: Row = {
            "chip": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "driver": str(find_driver() or "none"),
            "python": found["python"],
            "cuda": found["cuda"],
            **{n: v for n, v in found["packages"].items() if n in SHOWN or "dali-cuda" in n},
        }
        if on_gpu:
            row["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
        return row | {
            "copy_gb_per_s": copied(),
            "bf16_tflops": multiplied(torch.bfloat16, 8192),
            "fp32_tflops": multiplied(torch.float32, 4096),
        }

    def copied() -> float:
        source = torch.randn(2**22 if report.rehearse else 2**30, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / timed(lambda: target.copy_(source), device, seconds) / 1e6

    def multiplied(kind: torch.dtype, side: int) -> float:
        side = 256 if report.rehearse else side
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        timed(lambda: a @ b, device, 0.1)  # warms up
        return 2 * side**3 / timed(lambda: a @ b, device, seconds) / 1e9

    report.measure(60, work)


# --- a step --------------------------------------------------------------------------------------


class Count(Moved):
    """Bytes and products of a step, and the time that both need at least.

    The least time of an operator is the larger of its bytes over the copy rate and its operations
    over the rate of products.
    """

    def __init__(self, rates: tuple[float, float]) -> None:
        super().__init__()
        self.rates, self.flops, self.seconds = rates, 0, 0.0

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        packet, flops = func.overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        self.flops += flops
        self.seconds += max(nbytes / self.rates[0], flops / self.rates[1])


class Step:
    """A step of the loop on one batch, without input: forward, loss, backward, optimiser, hooks."""

    def __init__(self, report: Report, recipe: Path, network: str, norm: str, *more: str) -> None:
        self.report, self.device = report, report.device
        self.size = 32 if report.rehearse else 224
        small = ["model.projector=[16, 16]", f"model.backbone_args={TINY[network]}"]
        self.config = load([
            str(recipe), "data.root=.", f"model.backbone={NETWORKS[network]}",
            f"data.views=[{{count: 2, size: {self.size}, recipe: sym}}]",
            f"model.batch_norm={'local' if norm == 'local' else 'global'}",
            f"run.device={self.device.type}", *(small if report.rehearse else []), *more,
        ]).config  # fmt: skip
        learner = learner_of(self.config, ONE_PROCESS)
        if norm == "sync" and self.device.type == "cuda":  # torch's has no form for a CPU
            learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
            for module in learner.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.forward = functools.partial(_synchronised, module)
        self.learner = learner
        self.module = on_device(learner, self.config, World(0, 1, 0, 1, self.device))
        self.optimizer = optim.build(self.config.optim, parameter_groups(learner, self.config))
        self.parameters = [p for p in learner.method.parameters() if p.requires_grad]
        self.module.train()
        self.use(2)

    def use(self, images: int) -> None:
        """Take a batch of so many images from now on."""
        shape = (images, self.size, self.size, 3)
        views = [torch.randn(shape, device=self.device).permute(0, 3, 1, 2) for _ in range(2)]
        ids = torch.arange(images)
        self.batch = Batch(views, ids, (ids % CLASSES).to(self.device))

    def __call__(self) -> None:
        optim.set_learning_rates(self.optimizer, self.config.optim, 256, 100, 100)
        total, _ = self.module(self.batch)
        total.backward()
        progress = Progress(100, 1000, 1, 10)
        self.learner.method.before_optimizer(progress)
        gradient_norm(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.method.after_step(progress)

    def speed(self, images: int) -> Row:
        """Time, memory, kernels, and the share of the least time that the operators need.

        A compiled step's operators are not counted: they are the compiler's own kernels.
        """
        self.use(images)
        began = time.perf_counter()
        self()
        seconds = time.perf_counter() - began
        for _ in range(3):
            self()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        ms = timed(self, self.device, 0.05 if self.report.rehearse else 1.0)
        memory = {}
        if on_gpu:
            memory["allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            memory["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        row: Row = {"ms": ms, "images_per_s": 1e3 * images / ms, **memory}
        if self.config.model.compile:
            return row | {"compile_s": seconds, **self.trace()}
        rates = self.report.rates()
        with Count(rates or (1.0, 1.0)) as count:
            self()
        return row | {
            "limit_share": 1e3 * count.seconds / ms if rates else None,
            "gbytes": count.nbytes / 1e9,
            "tflop": count.flops / 1e12,
            "counted_gib": count.peak / GIB,
            **self.trace(),
            "host_ms": self.host_ms(),
        }

    def trace(self) -> Row:
        """Kernels of one step (a CPU's operators), and how long the device idles between them."""
        on_gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as seen:
            self()
            if on_gpu:
                torch.cuda.synchronize(self.device)
        assert seen.profiler is not None
        kind = getattr(torch.autograd.DeviceType, "CUDA" if on_gpu else "CPU")
        events = [e for e in seen.profiler.kineto_results.events() if e.device_type() == kind]
        spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
        busy, end = 0, spans[0][0]
        for start, stop in spans:
            busy += max(0, stop - max(start, end))
            end = max(end, stop)
        return {"kernels": len(spans), "idle_share": 1 - busy / (end - spans[0][0])}

    def host_ms(self) -> float:
        """Time of a step of two images, where the host sets the pace."""
        images = len(self.batch.ids)
        self.use(2)
        with _no_search():
            self()
            ms = timed(self, self.device, 0.1 if self.report.rehearse else 0.3)
        self.use(images)
        return ms


def _synchronised(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """Its way among several processes; alone it would take that of a plain batch norm."""
    norm.num_batches_tracked.add_(1)
    return torch.nn.modules._functions.SyncBatchNorm.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum,
        torch.distributed.group.WORLD, 1,
    )  # fmt: skip


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """Within: cuDNN takes its first choice instead of trying all."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """A process group with this process alone, so that every collective is called."""
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore(), rank=0, world_size=1,
    )  # fmt: skip
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def steps(report: Report) -> None:
    """AdaDim in bf16, two views: networks, images and norms.

    `sync` is `nn.SyncBatchNorm` over both views together: half as many kernels as one view each.
    """
    torch.backends.cudnn.benchmark = True
    with group_of_one(report.device):
        for network in NETWORKS:
            for norm in ("global", "sync", "local"):
                names = {"network": network, "norm": norm}
                make = functools.cache(
                    lambda n=network, b=norm: Step(report, ADADIM, n, b, "optim.precision=bf16")
                )
                for images in (4, 2) if report.rehearse else (128, 32):
                    report.measure(
                        40, lambda m=make, i=images: m().speed(i), **names, images=images
                    )
        settings = "optim.precision=bf16", "model.views_forward=stacked"
        names = {"network": "resnet50", "norm": "local, pooled"}
        images = 4 if report.rehearse else 128
        report.measure(
            40, lambda: Step(report, ADADIM, "resnet50", "local", *settings).speed(images),
            **names, images=images,
        )  # fmt: skip


def vit(report: Report) -> None:
    """A ViT-S/16: Barlow Twins, whole and the network alone; LeJEPA, also with less memory."""
    torch.backends.cudnn.benchmark = True
    images = 4 if report.rehearse else 256
    settings = ("optim.precision=bf16", "optim.name=adamw", "optim.lr=5e-4")

    def network_alone(step: Step) -> Row:
        step.use(images)
        views = torch.cat(step.batch.views)
        method = step.learner.method

        def work() -> None:
            with torch.autocast(step.device.type, torch.bfloat16):
                out = method.projector(method.backbone(views))
            out.float().sum().backward()

        work()
        ms = timed(work, step.device, 0.1 if report.rehearse else 1.0)
        return {"ms": ms, "images_per_s": 1e3 * images / ms}

    with group_of_one(report.device):
        make = functools.cache(lambda: Step(report, BARLOW, "vit_s16", "global", *settings))
        names = {"network": "vit_s16", "method": "barlow_twins", "images": images}
        report.measure(60, lambda: make().speed(images), **names, part="step")
        report.measure(40, lambda: network_alone(make()), **names, part="network alone")
        names = {"network": "vit_s16", "method": "lejepa", "images": images}
        for precision in ("fp32", "tf32"):
            given = f"optim.precision={precision}", *settings[1:]
            with _tf32(precision == "tf32"):
                report.measure(
                    20, lambda g=given: Step(report, LEJEPA, "vit_s16", "global", *g).speed(images),
                    **names, part=precision,
                )  # fmt: skip
        for more in ("", "optim.accumulate=4", "model.checkpointing=true"):
            given = ("optim.precision=bf16", *([more] if more else []))
            report.measure(
                40,
                lambda g=given: Step(report, LEJEPA, "vit_s16", "global", *g).speed(images),
                **names, part=more or "step",
            )  # fmt: skip


# --- tests, and whole runs -----------------------------------------------------------------------


def tests(report: Report) -> None:
    """The tests marked `gpu` that need no DALI."""
    marked = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    files = [str(p.relative_to(ROOT)) for p in marked if p.parent.name != "data"]
    report.measure(100, lambda: run_tests(report, files), tests="without DALI")


def run_tests(report: Report, files: list[str]) -> Row:
    """Run marked tests of these files; those that fail are named."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as results:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                   f"--junitxml={results.name}", *files]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        (report.out / f"pytest-{report.group}.log").write_text(done.stdout + done.stderr)
        cases = list(ElementTree.parse(results.name).getroot().iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None]
    failed += [c.get("name") for c in cases if c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    row: Row = {"passed": len(cases) - len(failed) - skipped, "skipped": skipped}
    if failed or done.returncode not in (0, 5):
        row["error"] = f"{len(failed)} failed: {', '.join(map(str, failed))}"[:500]
    return row


STEPS = 30  # of a whole run, in three epochs


class StopAfter(StopRequest):
    """Asks a run to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def look_for(self, stop_file: Path | None) -> bool:
        self.left -= 1
        return self.left <= 0


def run_of(
    report: Report, folder: Path, *more: str, stop: StopRequest | None = None
) -> list[dict[str, float]]:
    """A whole run on random images; its rows, one per step."""
    small = report.rehearse
    arguments = [
        f"model.backbone_args={TINY['resnet18'] if small else '{channels: [8, 16, 32, 64]}'}",
        "model.projector=[64, 64]", f"run.threads={1 if small else 4}",
        "data.views=[{count: 2, size: 32, recipe: sym}]", f"data.batch_size={16 if small else 64}",
        "optim.epochs=3", "optim.warmup_epochs=1", "optim.lr=0.05",
        f"run.device={report.device.type}",
        f"run.dir={folder}", "method.alpha_every=1", "log.tensorboard=false", "eval.knn=false",
        "eval.raw_pixels=false", "optim.precision=fp32", *more,
    ]  # fmt: skip
    with without_input(STEPS // 3), trained(arguments, lambda job: job.loader, stop):
        pass
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def apart(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> Row:
    """The difference of two runs' losses: at the first step, until the tenth, at most."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, STEPS + 1))
    parts = [
        abs(a["train/loss"] - b["train/loss"]) / abs(b["train/loss"])
        for a, b in zip(ours, theirs, strict=True)
    ]
    return {"steps": STEPS, "at_1": parts[0], "until_10": max(parts[:10]), "largest": max(parts)}


def whole(report: Report) -> None:
    """Thirty steps of a whole run: against the CPU, resumed, in fp16."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)

        def run(name: str, *more: str, **how: Any) -> list[dict[str, float]]:
            return run_of(report, place / name, *more, **how)

        @functools.cache
        def plain() -> list[dict[str, float]]:
            return run("plain")

        def resumed() -> Row:
            run("resumed", stop=StopAfter(STEPS // 2))
            row = apart(run("resumed", "run.resume=auto"), plain())
            return row | ({"error": "not the same losses"} if row["largest"] else {})

        def half(name: str, *more: str) -> Row:
            rows, single = run(f"{name}-16", "optim.precision=fp16", *more), plain()
            if more:
                single = run(f"{name}-32", *more)
            return apart(rows, single) | {"last_loss": rows[-1]["train/loss"]}

        with _exact():
            report.measure(
                60, lambda: apart(plain(), run("cpu", "run.device=cpu")), run="and a CPU's"
            )
            report.measure(60, resumed, run="stopped at 15 and resumed")
        adamw = ("optim.name=adamw", "optim.lr=1e-3")  # needs no wait for the scaler
        report.measure(60, lambda: half("lars"), run="fp16")
        report.measure(60, lambda: half("adamw", *adamw), run="fp16, AdamW")


def compiled(report: Report) -> None:
    """A step of ResNet-50 with `model.compile`."""
    # A CPU's compiler needs minutes for a ResNet.
    compiled_steps(report, {"vit_s16": [2]} if report.rehearse else {"resnet50": [128]})


def compiled_steps(report: Report, sizes: dict[str, list[int]]) -> None:
    """Rows for each network and number of images."""
    settings = "optim.precision=bf16", "model.compile=true"
    with group_of_one(report.device):
        for network, images in ((name, n) for name, each in sizes.items() for n in each):

            def speed(network: str = network, images: int = images) -> Row:
                return Step(report, ADADIM, network, "global", *settings).speed(images)

            report.measure(130, speed, network=network, norm="global", images=images)


def compiled_more(report: Report) -> None:
    """A compiled run of thirty steps beside one that is not compiled, and more compiled steps."""
    small = [f"model.backbone={NETWORKS['vit_s16']}", f"model.backbone_args={TINY['vit_s16']}"]
    more = small if report.rehearse else []
    with tempfile.TemporaryDirectory() as name:

        def work() -> Row:
            plain = run_of(report, Path(name) / "plain", *more)
            return apart(run_of(report, Path(name) / "run", "model.compile=true", *more), plain)

        report.measure(170, work, run="compiled, beside the same run without")
    if not report.rehearse:
        compiled_steps(report, {"resnet50": [32], "vit_s16": [128, 32]})


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Within: convolutions in float32 and not in TF32, sums in one order."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(False)


# --- losses and LARS -----------------------------------------------------------------------------


def inexact(loss: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """|g - g64| / |g64| of the gradient, against float64 on the CPU."""
    exact = z.detach().double().cpu().requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(loss(x), x) for x in (z, exact))
    return float((ours.double().cpu() - theirs).norm() / theirs.norm())


@contextlib.contextmanager
def _tf32(on: bool = True) -> Iterator[None]:
    """Within: float32 products in TF32 on a GPU, or not."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def parts(report: Report) -> None:
    """Losses and LARS against plain forms, in turn."""
    small = report.rehearse
    for name, (ours, plain, shapes) in losses.CASES.items():
        for images, width in [(16, 8)] if small else shapes[:1]:

            def work(ours: Any = ours, plain: Any = plain, n: int = images, d: int = width) -> Row:
                z = torch.randn(2, n, d, device=report.device).requires_grad_()
                made = {"ours": losses.step(ours, z), "plain": losses.step(plain, z)}
                times = in_turn(made, 2 if small else 10, report.device)
                row = {f"{k}_ms": sorted(v)[len(v) // 2] for k, v in times.items()}
                row |= {f"{k}_mib": peak_mib(one, report.device) for k, one in made.items()}
                row["err"] = inexact(ours, z)
                half = losses.step(ours, z.detach().bfloat16().requires_grad_())
                row["bf16_ms"] = sorted(in_turn({"": half}, 5, report.device)[""])[2]
                with _tf32():
                    tf32 = sorted(in_turn({"": made["ours"]}, 5, report.device)[""])
                    return row | {"tf32_ms": tf32[2], "tf32_err": inexact(ours, z)}

            report.measure(30, work, what=name, images=images, width=width)

    def digits() -> Row:
        found = losses.digits(report.device, *((8, 16) if small else ()))
        return {name.replace(" | ", ", "): by_units for name, (_, by_units, _) in found.items()}

    report.measure(30, digits, what="error of a gradient, bf16 rows")

    def optimizers() -> Row:
        import timm

        model = timm.create_model("resnet18" if small else "resnet50", num_classes=0)
        made = lars.optimizers(model.to(report.device))
        for how in ("foreach", "fused"):
            given = lars.groups(lars.with_gradients(model))
            made[f"AdamW, {how}"] = torch.optim.AdamW(given, 1e-4, **{how: True})
        times = in_turn({n: o.step for n, o in made.items()}, 2 if small else 10, report.device)
        return {f"{k}, ms": sorted(v)[len(v) // 2] for k, v in times.items()}

    report.measure(40, optimizers, what="a step of the optimiser")

    def decompositions() -> Row:
        """MMCR's singular values by each method of cuSOLVER, and alpha's eigenvalues."""
        x = torch.randn(*((16, 8) if small else (4096, 512)), device=report.device)
        gram = (x.T @ x).double()
        made = {"eigvalsh": lambda: torch.linalg.eigvalsh(gram)}
        for driver in ("gesvdj", "gesvd", "gesvda") if x.is_cuda else (None,):
            made[f"svdvals {driver}"] = functools.partial(torch.linalg.svdvals, x, driver=driver)
        times = in_turn(made, 3, report.device)
        return {f"{k}, ms": sorted(v)[len(v) // 2] for k, v in times.items()}

    report.measure(20, decompositions, what="decompositions")


# --- with DALI -----------------------------------------------------------------------------------


ROOTS = {"folder": "images", "parquet": "parquet"}
SETTINGS = (  # of the loader alone
    "data.color_jitter=seq", "data.color_jitter=fast", "data.color_jitter=exact",
    "data.threads=2", "data.threads=4", "data.threads=8", "data.hw_decoder_load=0",
    "data.dtype=float16",
)  # fmt: skip


def write_parquet(images: Path, folder: Path) -> None:
    """The files of a folder as a parquet file, as the hub has them."""
    pyarrow, parquet = (importlib.import_module(n) for n in ("pyarrow", "pyarrow.parquet"))
    folder.mkdir()
    files = sorted(images.rglob("*.jpg"))
    rows = [{"image": {"bytes": f.read_bytes(), "path": f.name}, "label": 0} for f in files]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=100)


def images(report: Report) -> None:
    """Training from JPEG files on the GPU, what the doctor says, and pixels beside the CPU's."""
    if (
        importlib.util.find_spec("nvidia") is None
        or importlib.util.find_spec("nvidia.dali") is None
    ):
        report.measure(1, lambda: {"left_out": "DALI is not installed"}, what="input")
        return
    bench = importlib.import_module("input")
    data = importlib.import_module("data")
    small = report.rehearse
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "images").mkdir()
        batch, count = (4, 24) if small else (128, 1024)
        data.write_pictures(place / "images", count, *((48, 64) if small else (375, 500)))

        def run(network: str, load_: float, kind: str) -> Row:
            segments, segment = (2, 4) if small else (4, 12)
            epoch = count * 9 // 10 // batch
            steps = segment * (2 * segments + 4)
            turns = bench.measure(
                [
                    str(ADADIM), f"data.name={kind}", f"data.root={place / ROOTS[kind]}",
                    f"model.backbone={network}", f"run.device={report.device.type}",
                    f"data.batch_size={batch}", f"data.hw_decoder_load={load_}",
                    f"run.dir={place / f'{network}-{load_}-{kind}'}", "eval.every=0",
                    "measure.every=0", "eval.knn=false", "eval.raw_pixels=false",
                    "method.alpha_every=10000", "checkpoint.every=100000",
                    f"log.every_steps={segment}", f"optim.epochs={-(-steps // epoch)}",
                    *(["data.views=[{count: 2, size: 32, recipe: asym}]", "optim.precision=fp32",
                       "run.threads=1", "data.threads=1",
                       f"model.backbone_args={TINY[network]}", "model.projector=[16, 16]"]
                      if small else ["optim.precision=bf16"]),
                ],
                segment,
            )  # fmt: skip
            files, cached = (sorted(turns.rates[k]) for k in ("files", "cached"))
            middle = files[len(files) // 2], cached[len(cached) // 2]
            return {"alone": turns.alone, "files": middle[0], "cached": middle[1],
                    "ratio": middle[0] / middle[1]}  # fmt: skip

        def doctor() -> Row:
            command = [sys.executable, "-m", "ddp_ssl.doctor", str(ADADIM), "data.name=folder",
                       f"data.root={place / 'images'}", f"data.batch_size={batch}",
                       f"run.device={report.device.type}", f"run.dir={place / 'none'}"]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            (report.out / "doctor.log").write_text(done.stdout + done.stderr)
            lines = done.stdout.splitlines()
            row: Row = {"memory": next((x for x in lines if "DALI takes" in x), None)}
            if done.returncode:
                row["error"] = "; ".join(x for x in lines if x.startswith("fail"))[:500]
            return row

        def alone(*more: str) -> Row:
            world = World(0, 1, 0, 1, report.device)
            config = load([
                str(ADADIM), "data.name=folder", f"data.root={place / 'images'}",
                f"data.batch_size={batch}",
                *(["data.views=[{count: 2, size: 32, recipe: asym}]"] if small else []), *more,
            ]).config  # fmt: skip
            views, loaded = range(config.num_views), load_data(config, world)
            made = train_loader(config, ONE_PROCESS, loaded, report.device, views, BadImages())
            with contextlib.closing(made):
                for _ in range(1 + config.data.prefetch):
                    next(made)
                ms = timed(lambda: next(made), report.device, 0.2 if small else 4.0)
            return {"alone": 1e3 * batch / ms}

        def evaluated(device: str) -> float:
            command = [
                sys.executable, "-m", "ddp_ssl.evaluate", "knn", "timm:resnet18",
                f"model.backbone_args={TINY['resnet18']}", "data.name=digits", "data.val_size=32",
                f"run.device={device}", f"run.dir={place / f'knn-{device}'}",
            ]  # fmt: skip
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            (found,) = (place / f"knn-{device}" / "evaluate").glob("*.json")
            top1: float = json.loads(found.read_text())["rows"][0]["top1"]
            return top1

        def evaluation() -> Row:
            return {"top1": evaluated(report.device.type), "on_a_cpu": evaluated("cpu")}

        kinds = [
            ("resnet18", 0.65, "folder"), ("resnet50", 0.65, "folder"), ("resnet18", 0.5, "folder"),
            ("resnet18", 0.65, "parquet"), ("resnet18", 0.9, "folder"),
        ]  # fmt: skip
        if importlib.util.find_spec("pyarrow") is None:
            kinds = [row for row in kinds if row[2] != "parquet"]
        else:
            write_parquet(place / "images", place / "parquet")
        for network, load_, kind in kinds:
            report.measure(
                60, functools.partial(run, network, load_, kind), network=network, source=kind,
                hw_decoder_load=load_, unit="images/s",
            )  # fmt: skip
        for more in SETTINGS:
            report.measure(30, functools.partial(alone, more), setting=more, unit="images/s")
        report.measure(90, evaluation, what="evaluate knn")
        report.measure(90, doctor, what="the doctor")
    report.measure(120, lambda: run_tests(report, ["tests/data/test_gpu.py"]), tests="with DALI")


GROUPS: dict[str, Callable[[Report], None]] = {
    "machine": machine, "steps": steps, "parts": parts, "compiled": compiled, "tests": tests,
    "whole": whole, "vit": vit, "images": images, "compiled_more": compiled_more,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.group, options.out, options.rehearse)
    if report.device.type == "cpu" and not options.rehearse:
        sys.exit("gpu_report: error: torch finds no GPU here; --rehearse runs on a CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products in one order: `_exact`
    GROUPS[options.group](report)


if __name__ == "__main__":
    main()

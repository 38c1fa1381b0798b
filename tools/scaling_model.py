"""Predict the time of a step and the efficiency of a config on a cluster, term by term.

    python tools/scaling_model.py [CONFIG.yaml key=value ...] [--gpus 8,64,512] [--plot FILE.png]

The step itself is run, forward and backward, on tensors without values (torch's FakeTensorMode), as
one rank of W. Its collectives are recorded where the losses and norm layers call them, so bytes and
calls are those of the code and not of a formula. Times are a model: the networks at a
stated number of images a second, the operations of loss and optimiser at the device's arithmetic or
memory rate, each collective at latency + bytes / rate over two levels (within a node, between
nodes), DDP's buckets in the background of backward, and a host that launches every operator and
collective. docs/scaling.md has the assumptions and the results.

Efficiency is the time of one GPU alone with the same number of images, divided by the step's time.
Exit code 2, with one line, for a config that cannot be run or a backbone without a known rate.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddp_ssl import optim
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, ConfigError, check_world_size
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import GlobalBatchNorm
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.methods.base import Progress
from ddp_ssl.metrics.effective_rank import GATHERED
from ddp_ssl.models import build_backbone
from ddp_ssl.reproduction.figures import pyplot
from ddp_ssl.run.configure import load
from ddp_ssl.training.build import parameter_groups
from ddp_ssl.training.measurement import AHEAD
from tools.bench.counting import as_on_a_gpu, without_values

# Crops of 224 px in a second of an H200's own time for a step in bf16 (docs/benchmarks.md).
IMAGES_PER_SECOND = {"resnet50": 4650.0, "resnet18": 11300.0}
TRAINING_IMAGES = {
    "imagenet": 1_281_167, "imagenet100": 126_689, "cifar10": 50_000, "cifar100": 50_000,
    "tiny_imagenet": 100_000, "digits": 1_438,
}  # fmt: skip
SUMS = ("norm", "sum", "view sum", "gradients")  # all-reduces; the others move the bytes once
OF_A_RANK = 17_000  # bytes that each process adds to a checkpoint: random numbers, DALI's state
PIPELINE_S = 0.1  # measured on a CPU, with files of 80 kB: 0.07 to 0.16
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # DDP's, in bytes
PLOTTED = (8, 16, 32, 64, 128, 256, 512, 1024)
NO_WORK = ("prim.", "empty", "detach", "alias", "lift_fresh", "_unsafe_view")


def rate(default: float, text: str, least: float = 1e-9) -> Any:
    """A field of `Cluster`: its default, its help and the least value that is accepted."""
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class Cluster:
    """Rates of the machine: bytes and operations a second, seconds. The field's help says more."""

    node_size: int = rate(8, "GPUs of a node (%(default)s)")
    intra: float = rate(300e9, "bytes/s of a GPU within its node (%(default)g)")
    inter: float = rate(50e9, "bytes/s per GPU between nodes (%(default)g)")
    latency: float = rate(25e-6, "s of a collective within a node (%(default)g)", 0)
    latency_per_doubling: float = rate(8e-6, "s more per doubling of the nodes (%(default)g)", 0)
    # All wait for the slowest of W.
    jitter: float = rate(
        0.005, "standard deviation of a rank's own time, a fraction (%(default)g)", 0
    )
    images_per_second: float = rate(
        0.0, f"224-pixel crops of one GPU; else an H200's for {', '.join(IMAGES_PER_SECOND)}",
        -math.inf,
    )  # fmt: skip
    fp32: float = rate(51e12, "the losses' products in float32, FLOP/s (%(default)g)")
    bf16: float = rate(690e12, "the losses' products of bf16, FLOP/s (%(default)g)")
    memory: float = rate(4.29e12, "device memory, bytes/s (%(default)g)")
    kernel: float = rate(4e-6, "s of the shortest operation (%(default)g)", 0)
    fp64: float = rate(10e12, "float64 products for alpha, FLOP/s (%(default)g)")
    # Eigenvalues and singular values in float64, as measured on one CPU core.
    decomposition: float = rate(18e9, "decompositions for alpha, FLOP/s (%(default)g)")
    # Of another data pipeline; training goes on meanwhile.
    pipeline: float = rate(PIPELINE_S, "s until alpha's first batch (%(default)g)", 0)
    # Messages go around a ring of the processes' hosts between epochs.
    hop: float = rate(25e-6, "s of a message between hosts (%(default)g)", 0)
    operator: float = rate(35e-6, "s of the host to launch an operator, an H200's (%(default)g)", 0)
    collective: float = rate(130e-6, "s of the host to launch a collective (%(default)g)", 0)
    host_copy: float = rate(20e9, "bytes/s from a GPU to its host, for a checkpoint (%(default)g)")
    # In the background: of a local disk, on one CPU core.
    disk: float = rate(250e6, "bytes/s of a checkpoint (%(default)g)")

    def seconds(self, kind: str, nbytes: int, ranks: int) -> float:
        """A collective over `ranks` GPUs: both levels one after the other."""
        if ranks == 1:
            return 0.0
        here = min(ranks, self.node_size)
        nodes = math.ceil(ranks / self.node_size)
        passes = 2 if kind in SUMS else 1
        between = (nodes - 1) / nodes / (here * self.inter)
        rate = (here - 1) / here / self.intra + between
        start = self.latency + self.latency_per_doubling * math.log2(nodes)
        return start + passes * nbytes * rate

    def ring(self, ranks: int) -> float:
        """Once around all hosts: a gather, and of an object its size."""
        return (ranks - 1) * self.hop

    def tree(self, ranks: int) -> float:
        """An object of rank 0 to all hosts: its size and itself."""
        return 2 * self.hop * math.ceil(math.log2(ranks))


@dataclass(frozen=True)
class Event:
    """A collective, and this rank's work since the one before: network and loss."""

    kind: str
    nbytes: int
    flops: float = 0.0
    seconds: float = 0.0
    waits: bool = True
    operators: int = 0


@dataclass
class Step:
    """All of one step in order; gradients in DDP's buckets."""

    events: list[Event]
    ranks: int
    view_shards: int
    norms: int
    parameters: int
    widths: tuple[int, int]  # dimensions of the representation and of the embedding

    @property
    def flops(self) -> float:
        """Operations of the networks, forward and backward."""
        return sum(event.flops for event in self.events)

    @property
    def loss_seconds(self) -> float:
        """Time of the losses' own operations, and of the optimiser's."""
        return sum(event.seconds for event in self.events)

    @property
    def operators(self) -> int:
        """Operators that the host launches, without collectives."""
        return sum(event.operators for event in self.events)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Calls and bytes by kind, as `distributed.comm_stats` counts them."""
        found: dict[str, tuple[int, int]] = {}
        for event in self.events:
            if event.kind != "end":
                calls, nbytes = found.get(event.kind, (0, 0))
                found[event.kind] = calls + 1, nbytes + event.nbytes
        return found


class Recorder(TorchDispatchMode):
    """Adds up work and lists collectives."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster, self.events = cluster, list[Event]()
        self.network = False
        self._flops, self._seconds, self._operators = 0.0, 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket
        flops = flop_registry[name](*args, **kwargs, out_val=out) if name in flop_registry else 0
        works = not func.is_view and not any(word in str(name) for word in NO_WORK)
        self._operators += works
        if self.network:
            self._flops += flops
        elif works:
            moved = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            nbytes = sum(x.numel() * x.element_size() for x in moved)
            c, half = self.cluster, flops and args[0].dtype == torch.bfloat16
            rate = c.bf16 if half else c.fp32
            self._seconds += max(flops / rate, nbytes / c.memory, c.kernel)
        return out

    def event(self, kind: str, nbytes: int, waits: bool = True) -> None:
        work = self._flops, self._seconds, waits, self._operators
        self.events.append(Event(kind, nbytes, *work))
        self._flops, self._seconds, self._operators = 0.0, 0.0, 0

    @contextmanager
    def of_network(self) -> Iterator[None]:
        self.network = True
        try:
            yield
        finally:
            self.network = False


class RankOf(Comm):
    """Rank 0 of W processes, by shape; its collectives are listed."""

    def __init__(self, ranks: int, view_shards: int, recorder: Recorder) -> None:
        self.world_size, self.view_shards, self.recorder = ranks, view_shards, recorder

    def gather(self, x: Tensor) -> Tensor:
        k, n, *rest = x.shape
        shape = (k * self.view_shards, n * self.data_shards, *rest)
        return x if self.world_size == 1 else _Asked.apply(x, shape, "gather", self.recorder)

    def sum(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else _Asked.apply(x, x.shape, "sum", self.recorder)

    def view_sum(self, x: Tensor) -> Tensor:
        return x if self.view_shards == 1 else _Asked.apply(x, x.shape, "view sum", self.recorder)


class _Asked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, kind: str, recorder: Recorder) -> Tensor:
        ctx.shape, ctx.kind, ctx.recorder = x.shape, kind, recorder
        out = x.new_empty(shape)
        recorder.event(kind, _bytes(out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adjoint = "scatter" if ctx.kind == "gather" else ctx.kind
        ctx.recorder.event(adjoint, _bytes(grads[0]))
        return grads[0].new_empty(ctx.shape), None, None, None


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def build(config: Config, classes: int) -> Learner:
    """The run's method and probe, as a run makes them; values do not matter."""
    return Learner(make_method(config, Comm()), classes, some_unlabelled=False)


def record(
    config: Config,
    ranks: int,
    cluster: Cluster,
    *,
    classes: int = 0,
    alpha: float = 0.5,
    learner: Learner | None = None,
    gpu: bool = True,
) -> Step:
    """One training step of rank 0 of `ranks`, and what it communicates, on a GPU or a CPU.

    `alpha`: AdaDim's, once measured (before, terms of weight zero have no backward). `classes`: of
    the probe, 0 for none. Raises `ConfigError` where the batch does not split.
    """
    check_world_size(config, ranks)
    shards = config.data.view_shards
    images = config.data.batch_size // (ranks // shards)
    learner = learner or build(config, classes)
    method = learner.method
    recorder = Recorder(cluster)
    comm = RankOf(ranks, shards, recorder)
    method.comm = comm
    if hasattr(method, "alpha"):
        method.alpha.value = alpha
    norms = [m for m in learner.modules() if isinstance(m, GlobalBatchNorm) and m.reduce]
    removed: list[Any] = []
    if ranks > 1:
        hook = _norm_hook(recorder, ranks if gpu else 0)
        removed += [norm.register_forward_hook(hook) for norm in norms]
    outside: list[tuple[Tensor, Tensor]] = []
    encode = method.encode

    def encode_apart(*args: Any) -> tuple[Tensor, ...]:
        with recorder.of_network():
            outputs = encode(*args)
        leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in outputs)
        outside.extend(zip(outputs, leaves, strict=True))
        return leaves

    learner.train()
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        without_values(learner, shapes)
        for parameter in learner.parameters():
            if ranks > 1 and parameter.requires_grad:
                register = parameter.register_post_accumulate_grad_hook
                removed.append(register(lambda p: recorder.event("gradient", _bytes(p), False)))
        held = views_of(config.data.views)[comm.views]
        views = [torch.empty(images, 3, view.size, view.size) for view in held]
        batch = Batch(views, torch.arange(images), torch.zeros(images, dtype=torch.long))
        method.encode = encode_apart  # type: ignore[method-assign]
        with as_on_a_gpu() if gpu else nullcontext():
            optimizer = optim.build(config.optim, parameter_groups(learner, config))
            for parameter in learner.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # makes its state
        optimizer.zero_grad(set_to_none=True)
        with recorder, as_on_a_gpu() if gpu else nullcontext():
            total, _ = learner(batch)
            total.backward()
            reached = [(x, leaf.grad) for x, leaf in outside if leaf.grad is not None]
            with recorder.of_network():
                torch.autograd.backward([x for x, _ in reached], [g for _, g in reached])
            optimizer.step()
            method.after_step(Progress(0, 100, 0, 10))
        if ranks > 1:
            recorder.event("flag", 4, waits=False)
        del method.encode
        recorder.event("end", 0)
    for handle in removed:
        handle.remove()
    trained = [p for p in learner.parameters() if p.requires_grad]
    widths = method.feature_width, config.model.projector[-1]
    count = sum(p.numel() for p in trained)
    learner.zero_grad(set_to_none=True)
    itemsize = 2 if config.optim.gradient_compression == "bf16" else 4
    return Step(_bucketed(recorder.events, itemsize / 4), ranks, shards, len(norms), count, widths)


def _norm_hook(recorder: Recorder, gathering: int) -> Callable[..., None]:
    """`gathering`: the processes of a norm on a GPU; 0 for a CPU's, which sums in float64."""

    def hook(module: GlobalBatchNorm, inputs: Any, out: Tensor) -> None:
        if not module.training:
            return
        rows, channels = module.layout.total, module.num_features
        forward = channels * (8 * gathering if gathering else 16)
        backward = channels * (8 if gathering else 16)
        recorder.event("norm", rows * forward)
        if out.requires_grad:
            out.register_hook(lambda grad: recorder.event("norm", rows * backward))

    return hook


def _bucketed(events: Sequence[Event], sent: float = 1.0) -> list[Event]:
    """Gradients in DDP's buckets, which close at a size; the share `sent` of the bytes is sent."""
    done: list[Event] = []
    size, limit, flops, seconds, operators = 0, FIRST_BUCKET, 0.0, 0.0, 0
    for event in events:
        flops, seconds = flops + event.flops, seconds + event.seconds
        operators += event.operators
        if event.kind == "gradient":
            size += event.nbytes
            if size < limit:
                continue
            done.append(Event("gradients", int(sent * size), flops, seconds, False, operators))
            size, limit = 0, BUCKET
        else:
            if event.kind == "end" and size:
                done.append(Event("gradients", int(sent * size), flops, seconds, False, operators))
                flops, seconds, operators = 0.0, 0.0, 0
            done.append(Event(event.kind, event.nbytes, flops, seconds, event.waits, operators))
        flops, seconds, operators = 0.0, 0.0, 0
    return done


@dataclass
class Prediction:
    """Seconds of a step by term; `terms` add up to `step`."""

    ranks: int
    terms: dict[str, float]
    counts: dict[str, tuple[int, int]]
    hidden: float  # the part of the gradients' all-reduce that backward covers
    input_rate: float  # images a second that each GPU's loader must give
    efficiency: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        return sum(self.terms.values())


TERMS = {
    "norm": "global batch norm", "gather": "embeddings gathered", "scatter": "gradients scattered",
    "sum": "sums and moments", "view sum": "sums over views",
}  # fmt: skip


def elapsed(step: Step, cluster: Cluster, flops_rate: float) -> float:
    """Seconds of a step: collectives one at a time in order, the rank waits for all but gradients.

    NCCL runs those of one group on one stream, so that a norm layer's sums wait for a bucket. The
    host launches everything one after the other, and nothing runs before it is launched.
    """
    now = link = host = 0.0
    for event in step.events:
        host += event.operators * cluster.operator
        now = max(now + event.flops / flops_rate + event.seconds, host)
        if event.kind in ("end", "flag"):  # the flag goes from host to host
            continue
        group = step.view_shards if event.kind == "view sum" else step.ranks
        host += cluster.collective
        now = max(now, host)
        link = max(link, now) + cluster.seconds(event.kind, event.nbytes, group)
        now = link if event.waits else now
    return max(now, link)


def predict(
    config: Config, step: Step, cluster: Cluster, flops_rate: float, images: int | None = None
) -> Prediction:
    """The step's terms; `images`: of the training set, over which measuring alpha is spread."""
    terms = {"network": step.flops / flops_rate, "loss": step.loss_seconds}
    for kind, name in TERMS.items():
        group = step.view_shards if kind == "view sum" else step.ranks
        terms[name] = sum(
            cluster.seconds(kind, event.nbytes, group)
            for event in step.events
            if event.kind == kind
        )
    total = elapsed(step, cluster, flops_rate)
    quick = elapsed(step, replace(cluster, operator=0.0, collective=0.0), flops_rate)
    terms["gradients, not hidden"] = quick - sum(terms.values())
    terms["the host"] = total - quick
    alone = sum(
        cluster.seconds("gradients", event.nbytes, step.ranks)
        for event in step.events
        if event.kind == "gradients"
    )
    work = terms["network"] + terms["loss"]
    notes: list[str] = []
    # The expected maximum of so many standard normal numbers (Blom 1958).
    quantile = (step.ranks - 0.375) / (step.ranks + 0.25)
    slowest = NormalDist().inv_cdf(quantile) if step.ranks > 1 else 0.0
    terms["waiting for the slowest"] = work * cluster.jitter * slowest
    terms["measuring alpha"] = terms["between epochs"] = 0.0
    if images is None:
        notes.append(
            f"the work between epochs is left out: give --images, the size of {config.data.name}"
        )
    elif images < config.data.batch_size:
        notes.append(
            f"{images} images are less than one batch of {config.data.batch_size}: this run cannot "
            "be made"
        )
    else:
        steps = images // config.data.batch_size
        epoch = steps * sum(terms.values())
        terms["measuring alpha"] = alpha_seconds(config, step, cluster, flops_rate, steps, epoch)
        terms["between epochs"] = boundary_seconds(config, step, cluster, epoch) / steps
    counts = step.counts()
    hidden = max(0.0, alone - terms["gradients, not hidden"])
    images_here = config.data.batch_size / step.ranks
    return Prediction(
        step.ranks, terms, counts, hidden, images_here / sum(terms.values()), notes=notes
    )


def alpha_seconds(
    config: Config, step: Step, cluster: Cluster, flops_rate: float, steps: int, epoch: float
) -> float:
    """Measuring alpha per training step, of which an epoch has `steps` and lasts `epoch` seconds.

    The pipeline starts during the epoch's last steps. Rows (or moments) reach rank 0, rank 0
    decomposes one batch after the other, alpha is broadcast; `alpha_delay` only says when. Training
    waits for the decompositions as far as the epochs of `alpha_delay` do not cover them.
    """
    s: Any = config.method
    if s.name != "adadim" or s.alpha != "adaptive" or step.ranks == 1:
        return 0.0
    n, width = config.data.batch_size, step.widths[s.alpha_space == "z"]
    batches = min(s.alpha_batches, steps)
    forward = step.flops / 3 / config.num_views / flops_rate
    small, large = sorted((n, width))
    gathers = s.alpha_route == "gather" or (s.alpha_route == "auto" and n * width <= GATHERED)
    nbytes = 4 * n * width
    if gathers:
        talk, product = cluster.seconds("gather", nbytes, step.ranks), 0.0
        work = (2 * large * small**2 + 2 * small**3) / cluster.decomposition
    elif n < width:  # the rows are gathered, and rank 0 computes their products too
        talk, product = cluster.seconds("gather", nbytes, step.ranks), 0.0
        work = 2 * width * n**2 / cluster.fp64 + 4 / 3 * n**3 / cluster.decomposition
    else:
        nbytes = 8 * width**2
        talk = cluster.seconds("sum", nbytes, step.ranks)
        product = 2 * n * width**2 / step.ranks / cluster.fp64
        work = 4 / 3 * width**3 / cluster.decomposition
    once = batches * (forward + talk + product + nbytes / cluster.host_copy)
    once += max(0.0, cluster.pipeline - min(AHEAD, steps) / steps * epoch)
    once += max(0.0, batches * work - (s.alpha_delay or 0) * epoch)
    once += cluster.seconds("sum", 4, step.ranks) + cluster.tree(step.ranks)
    return once / (s.alpha_every * steps)


def boundary_seconds(config: Config, step: Step, cluster: Cluster, epoch: float) -> float:
    """Time of an epoch's end: a flag that is waited for, metrics, every few epochs a save.

    A checkpoint costs the states of all ranks, the copy to the host, and the part of the writing
    that the epochs until the next do not cover. Validation is not included.
    """
    copies = 2 if config.optim.name in ("adam", "adamw") else 1
    nbytes = 4 * step.parameters * (1 + copies) + step.ranks * OF_A_RANK
    every = config.checkpoint.every
    writing = max(0.0, nbytes / cluster.disk - every * epoch)
    talk = 2 * cluster.ring(step.ranks) + 2 * cluster.tree(step.ranks)  # states; how it ended
    save = talk + nbytes / cluster.host_copy + writing
    return 2 * cluster.seconds("sum", 4, step.ranks) + save / every


def network_rate(config: Config, cluster: Cluster) -> float:
    """Operations a second of the networks, from the images a second of the backbone at 224 px."""
    name = config.model.backbone
    rate = cluster.images_per_second or IMAGES_PER_SECOND.get(name.partition(".")[0], 0.0)
    if not rate:
        raise ConfigError(
            f"model.backbone: no rate is known for {name} ({', '.join(IMAGES_PER_SECOND)} have "
            "one); --images-per-second, of one GPU with 224-pixel crops, is accepted"
        )
    # The rate is the plain network's; another stem or width has its own number of operations.
    plain = config.model.model_copy(update={"backbone_args": {}, "stem": "standard"})
    backbone, _ = build_backbone(plain, [224])
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        without_values(backbone, shapes)
        recorder = Recorder(cluster)
        with recorder, recorder.of_network():
            backbone(torch.empty(2, 3, 224, 224)).sum().backward()
        recorder.event("end", 0)
    return rate * recorder.events[-1].flops / 2


class Model:
    """Predictions for one config on one cluster, at any number of GPUs."""

    def __init__(
        self,
        arguments: Sequence[str],
        cluster: Cluster,
        *,
        per_gpu: int | None = 128,
        alpha: float = 0.5,
        classes: int = 1000,
        images: int | None = None,
    ) -> None:
        """`per_gpu`: images of each GPU, or None for the config's batch at any number of GPUs."""
        self.arguments, self.cluster = list(arguments), cluster
        self.per_gpu, self.alpha, self.classes = per_gpu, alpha, classes
        self.config = load(self.arguments).config
        self.rate = network_rate(self.config, cluster)
        self.images = images or TRAINING_IMAGES.get(self.config.data.name)
        self._alone: dict[tuple[int, tuple[str, ...]], float] = {}
        self._made: dict[tuple[int, tuple[str, ...]], Prediction] = {}

    def at(self, ranks: int, *changes: str) -> Prediction:
        """The prediction for `ranks` GPUs, with more `key=value`."""
        if (ranks, changes) not in self._made:
            self._made[ranks, changes] = self._with_efficiency(ranks, changes)
        return self._made[ranks, changes]

    def _with_efficiency(self, ranks: int, changes: tuple[str, ...]) -> Prediction:
        batch = self.config.data.batch_size if self.per_gpu is None else self.per_gpu * ranks
        made = self._predict(ranks, batch, changes)
        alone = batch // ranks, changes
        if alone not in self._alone:
            single = self._predict(1, batch // ranks, [*changes, "data.view_shards=1"])
            self._alone[alone] = single.step
        made.efficiency = self._alone[alone] / made.step
        return made

    def _predict(self, ranks: int, batch: int, changes: Sequence[str]) -> Prediction:
        config = load([*self.arguments, f"data.batch_size={batch}", *changes]).config
        step = record(config, ranks, self.cluster, classes=self.classes, alpha=self.alpha)
        return predict(config, step, self.cluster, self.rate, self.images)

    def variants(self) -> list[list[str]]:
        """Settings that matter for many GPUs and that the config does not have."""
        s, model = self.config.method, self.config.model
        found: list[list[str]] = []
        if model.batch_norm == "global":
            found.append(["model.batch_norm=local"])
        if self.config.num_views == 2 and model.views_forward != "stacked":
            found.append(["model.views_forward=stacked"])
        if hasattr(s, "route"):
            found.append(["method.route=gather"])
        information = getattr(s, "beta", "off") != "off" and getattr(s, "mi_form", "") == "gram"
        if information:
            found.append(["method.beta=off"])
        if self.config.optim.gradient_compression is None:
            found.append(["optim.gradient_compression=bf16"])
        measures = getattr(s, "alpha", "") == "adaptive" and s.alpha_every > 1
        if measures and s.alpha_delay is None:
            found.append(["method.alpha_delay=1", "method.alpha_batches=1"])
        if self.config.checkpoint.every == 1:
            found.append(["checkpoint.every=10"])
        known = ("model.views_forward=stacked", "method.route=gather")  # these gain nothing
        useful = [change for changes in found if changes[0] not in known for change in changes]
        if len(useful) > 1:
            found.append(useful)
        return found


def byte_table(predictions: Sequence[Prediction]) -> str:
    """Markdown: calls a step and bytes of each kind of collective, for each number of GPUs."""
    kinds = {kind: None for p in predictions for kind in p.counts}
    lines = [
        "| collective | " + " | ".join(f"{p.ranks} GPUs" for p in predictions) + " |",
        "| --- |" + " ---: |" * len(predictions),
    ]
    for kind in kinds:
        cells = []
        for p in predictions:
            calls, nbytes = p.counts.get(kind, (0, 0))
            cells.append(f"{calls} × {_mb(nbytes / calls)} = {_mb(nbytes)}" if calls else "–")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mb(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.3g} B"


def time_table(predictions: Sequence[Prediction]) -> str:
    """Markdown: milliseconds of each term, and the efficiency."""
    lines = [
        "| ms of a step | " + " | ".join(f"{p.ranks} GPUs" for p in predictions) + " |",
        "| --- |" + " ---: |" * len(predictions),
    ]
    for name in predictions[0].terms:
        if any(p.terms[name] for p in predictions):
            cells = [f"{1e3 * p.terms[name]:.2f}" for p in predictions]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rows: dict[str, Callable[[Prediction], str]] = {
        "**step**": lambda p: f"**{1e3 * p.step:.1f}**",
        "gradients, hidden by backward": lambda p: f"({1e3 * p.hidden:.2f})",
        "**efficiency**": lambda p: f"**{100 * p.efficiency:.1f} %**",
        "images/s each loader must give": lambda p: f"{p.input_rate:.0f}",
    }
    lines += [f"| {name} | " + " | ".join(map(of, predictions)) + " |" for name, of in rows.items()]
    return "\n".join(lines)


def variant_table(base: Prediction, variants: dict[str, Prediction]) -> str:
    """Markdown: other settings at the same number of GPUs."""
    lines = [
        f"| at {base.ranks} GPUs | step, ms | efficiency |",
        "| --- | ---: | ---: |",
        f"| as configured | {1e3 * base.step:.1f} | {100 * base.efficiency:.1f} % |",
    ]
    lines += [
        f"| {name} | {1e3 * p.step:.1f} | {100 * p.efficiency:.1f} % |"
        for name, p in variants.items()
    ]
    return "\n".join(lines)


def verdict(base: Prediction, variants: dict[str, Prediction], target: float) -> str:
    """Whether the target is reached, with which settings, and the largest costs."""
    reached = "reaches" if base.efficiency >= target else "does not reach"
    lost = {k: v for k, v in base.terms.items() if k != "network"}
    worst = sorted(lost.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in worst)
    text = (
        f"{base.ranks} GPUs: {100 * base.efficiency:.1f} %, which {reached} {100 * target:.0f} %. "
        f"Beside the network's {1e3 * base.terms['network']:.1f} ms the most: {named}."
    )
    if base.efficiency < target:
        enough = [name for name, p in variants.items() if p.efficiency >= target]
        text += f" Enough would be: {' or '.join(enough) or 'none of the settings above'}."
    return text


def draw(curves: dict[str, list[Prediction]], target: float, title: str) -> Any:
    """A matplotlib figure: efficiency over GPUs, and the terms of the first curve."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12.5, 4.8), layout="constrained")
    for name, curve in curves.items():
        ranks = [p.ranks for p in curve]
        left.plot(
            ranks, [100 * p.efficiency for p in curve], marker="o", label=textwrap.fill(name, 36)
        )
    left.axhline(100 * target, color="black", linewidth=0.8, linestyle=":")
    left.set_ylabel("efficiency, %")
    left.set_ylim(min(50, left.get_ylim()[0]), 101)
    left.set_title(title, fontsize=10)
    left.legend(fontsize=8, loc="lower left")
    first_name, first = next(iter(curves.items()))
    names = [n for n in first[0].terms if n != "network" and any(p.terms[n] for p in first)]
    right.stackplot(
        [p.ranks for p in first], [[1e3 * p.terms[n] for p in first] for n in names], labels=names
    )
    right.set_ylabel("ms of a step beside the network")
    network = 1e3 * first[-1].terms["network"]
    right.set_title(f"{first_name} (network: {network:.1f} ms)", fontsize=10)
    right.legend(fontsize=8, loc="upper left")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks([p.ranks for p in first], [str(p.ranks) for p in first])
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", nargs="*", metavar="CONFIG.yaml|key=value")
    add("--gpus", default="8,64,512", help="numbers of GPUs (default: %(default)s)")
    add("--per-gpu", type=int, default=128, help="images on each GPU (default: %(default)s)")
    add("--fixed-batch", action="store_true", help="the config's batch_size at any number of GPUs")
    for one in dataclass_fields(Cluster):
        name = f"--{one.name.replace('_', '-')}"
        add(name, type=type(one.default), default=one.default, help=one.metadata["help"])
    add("--images", type=int, help="training images, where the data set is not a known one")
    add("--alpha", type=float, default=0.5, help="AdaDim's, once measured (default: %(default)s)")
    add("--target", type=float, default=0.85, help="efficiency asked for (default: %(default)s)")
    add("--no-variants", action="store_true", help="leave other settings out")
    add("--plot", type=Path, metavar="FILE", help="also draw 8 to 1024 GPUs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        return _run(options)
    except OSError as error:
        print(f"scaling_model: error: {error.filename}: {error.strerror}", file=sys.stderr)
    except ValueError as error:
        print(f"scaling_model: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise ValueError(f"--gpus: expected numbers from 2 on such as 8,64,512, got {text}")
    return numbers


def _cluster(options: argparse.Namespace) -> Cluster:
    for one in dataclass_fields(Cluster):
        value = getattr(options, one.name)
        if not value >= one.metadata["least"]:
            name = one.name.replace("_", "-")
            raise ValueError(f"--{name}: expected a positive number, got {value}")
    return Cluster(**{one.name: getattr(options, one.name) for one in dataclass_fields(Cluster)})


def _run(options: argparse.Namespace) -> int:
    ranks, cluster = _numbers(options.gpus), _cluster(options)
    if options.per_gpu < 1:
        raise ValueError(f"--per-gpu: expected 1 image or more, got {options.per_gpu}")
    per_gpu = None if options.fixed_batch else options.per_gpu
    model = Model(
        options.config, cluster, per_gpu=per_gpu, alpha=options.alpha, images=options.images
    )
    c = model.config
    batch = f"{c.data.batch_size} images in all" if per_gpu is None else f"{per_gpu} images per GPU"
    views = " + ".join(f"{g.count} × {g.size} px" for g in c.data.views)
    title = f"{c.method.name}, {c.model.backbone}, {batch}, views {views}"
    print(f"{title}, projector {c.model.projector}\n", flush=True)
    made = [model.at(number) for number in ranks]
    print(byte_table(made), "\n", time_table(made), sep="\n")
    for note in dict.fromkeys(note for p in made for note in p.notes):
        print(f"\nnote: {note}")
    variants: dict[str, Prediction] = {}
    if not options.no_variants:
        for changes in model.variants():
            variants[" ".join(changes)] = model.at(ranks[-1], *changes)
        print("", variant_table(made[-1], variants), sep="\n")
    print(f"\n{verdict(made[-1], variants, options.target)}")
    if options.plot:
        curves = {"as configured": [model.at(number) for number in PLOTTED]}
        best = max(variants, key=lambda name: variants[name].efficiency, default="")
        if best:
            curves[best] = [model.at(number, *best.split()) for number in PLOTTED]
        draw(curves, options.target, title).savefig(options.plot, dpi=110)
        print(f"\n{options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cost of a step on a GPU: bytes, operators, collectives, memory, on tensors without values.

Two depths of a network tell how many operators each layer adds, in each part of the step.
"""

from __future__ import annotations

import functools

import pytest
import torch
from gpu_path import (
    Counted,
    as_on_a_gpu,
    as_one_of,
    count,
    method_config,
    under_way,
    whole_step,
    without_values,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import builtin_methods, make_method
from ddp_ssl.methods.base import Progress
from ddp_ssl.models import build_backbone
from tests.methods.settings import SETTINGS

NORMS = 53  # of a ResNet-50

counted = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta"),
    reason="this torch (2.8) cannot gather tensors without values",
)


@counted
@pytest.mark.parametrize("processes", [1, 8, 512])
def test_the_global_norm_moves_what_torchs_kernels_move(processes: int) -> None:
    """ResNet-50, two views of 128 images in bf16: it was 408 GB, 4,756 operators and 11.18 GiB."""
    seen, calls = count("resnet50", "global", 128, processes)
    assert seen.nbytes < 131e9
    assert seen.operators < 1200
    assert seen.peak < 10.6 * 2**30
    assert calls == 2 * NORMS


def test_the_local_norm_moves_no_more_and_makes_no_call() -> None:
    seen, calls = count("resnet50", "local", 128, 8)
    assert seen.nbytes < 131e9
    assert seen.peak < 10.6 * 2**30
    assert calls == 0


@counted
def test_against_torchs_synchronised_norm() -> None:
    """torch's norm pools both views, so it launches half as many kernels."""
    ours, _ = count("resnet18", "global", 128, 8)
    theirs, _ = count("resnet18", "sync", 128, 8)
    assert ours.nbytes < 1.06 * theirs.nbytes
    assert ours.operators < 1.3 * theirs.operators
    assert ours.peak < 1.01 * theirs.peak


LAYERS = "model.backbone_args={channels: [8, 8, 16, 16], layers: [%d, 1, 1, 1]}"
ADDED = 4  # convolutions and as many norms of two more blocks
STATISTICS = 11 * 512  # bytes of a small norm's at most, each vector in a unit of the allocator
SMALL = (
    "model.projector=[24, 12]", "data.views=[{count: 2, size: 32, recipe: sym}]",
    "optim.epochs=100",
)  # fmt: skip


@functools.cache
def step_of(name: str, processes: int = 8, blocks: int = 1, more: tuple[str, ...] = ()) -> Counted:
    return whole_step(config_of(name, processes, blocks, more), processes, classes=7, values=True)


def config_of(name: str, processes: int, blocks: int = 1, more: tuple[str, ...] = ()) -> Config:
    """Two images for each process, and the method's own optimiser."""
    settings = [s for s in SETTINGS.get(name, ()) if "teacher" not in s and "optim" not in s]
    settings += ["method.queue_size=2048"] if any("queue_size" in s for s in settings) else []
    settings += ["model.backbone=resnet18", LAYERS % blocks, *SMALL, *more]
    if name in ("byol", "mocov3", "nnclr", "simsiam"):
        settings.append("method.predictor_hidden=24")
    settings.append(f"data.batch_size={2 * processes}")
    return method_config(name, *settings)


@pytest.mark.parametrize("name", builtin_methods())
def test_a_step_is_few_operators_outside_the_network(name: str) -> None:
    """Thirty tensors or more are trained, so a loop over them would pass the bound."""
    seen = step_of(name)
    assert seen.parts["update"] <= 40
    assert seen.parts["record"] == 1
    assert seen.waits == (1 if name == "mmcr" else 0)
    assert seen.collectives["norm"][0] >= 2 * 12


MOST = {
    "adadim": (560, 39, 6.1), "barlow_twins": (430, 34, 5.9), "byol": (580, 44, 27.5),
    "deepclusterv2": (450, 39, 6.0), "dino": (560, 40, 7.9), "lejepa": (420, 30, 5.3),
    "mmcr": (300, 30, 5.6), "mocov2plus": (570, 40, 8.8), "mocov3": (620, 48, 17.5),
    "nnclr": (490, 35, 16.2), "ressl": (540, 40, 8.4), "simclr": (400, 30, 5.9),
    "simsiam": (430, 32, 6.6), "swav": (460, 33, 7.4), "vicreg": (420, 32, 5.9),
}  # fmt: skip
"""Operators, collectives and MB moved, at most, of a step with a network of 12 norms."""


@pytest.mark.parametrize("name", builtin_methods())
def test_a_method_costs_no_more_than_it_did(name: str) -> None:
    """Its loss, probe and hooks too; with 512 processes nothing is added but what is gathered."""
    seen = step_of(name)
    operators, calls, megabytes = MOST[name]
    assert seen.operators <= operators
    assert seen.calls <= calls
    assert seen.nbytes <= 1e6 * megabytes


@pytest.mark.parametrize(("name", "networks"), [("adadim", 1), ("byol", 2)])
def test_a_layer_is_few_operators(name: str, networks: int) -> None:
    shallow, deep = step_of(name), step_of(name, blocks=3)
    assert deep.parts["update"] == shallow.parts["update"]
    # Convolution, cast of its weight, norm of two views, activation; half a residual sum.
    assert deep.parts["forward"] - shallow.parts["forward"] <= 9.5 * ADDED * networks
    assert deep.parts["backward"] - shallow.parts["backward"] <= 11.5 * ADDED
    # Two collectives a norm, one in a network that is not trained.
    assert deep.calls - shallow.calls == (networks + 1) * ADDED
    activations = 2 * 4096  # `[4, 8, 8, 8]` in bf16
    assert deep.peaks["forward"] - shallow.peaks["forward"] <= ADDED * (activations + STATISTICS)


@pytest.mark.parametrize("name", builtin_methods())
def test_512_processes_launch_no_more_than_8(name: str) -> None:
    """Only the norm's statistics and what is gathered grow with the number of processes."""
    few, many = step_of(name, 8), step_of(name, 512)
    assert many.operators == few.operators
    assert {kind: calls for kind, (calls, _) in many.collectives.items()} == {
        kind: calls for kind, (calls, _) in few.collectives.items()
    }
    for kind, (_, nbytes) in many.collectives.items():
        assert nbytes <= few.collectives[kind][1] * (64 if kind in GROWING else 1), kind
    # What more is gathered is written and read, and its products are written.
    assert many.nbytes - few.nbytes <= 3 * (many.sent - few.sent)


GROWING = ("norm", "gather", "scatter")


@functools.cache
def needed() -> int:
    """Bytes that a step with the small network needs: what backward reads, and casts to bf16.

    A convolution keeps its output, that of its norm and activation, and the norm's statistics.
    Pooling keeps its output with indices of 8 bytes. While the network runs, the joined views are
    there in float32 too.
    """
    backbone, _ = build_backbone(config_of("simclr", 8).model, [32])
    x = torch.zeros(4, 3, 32, 32)
    sizes = [6 * x.numel()]

    def saw(module: nn.Module, args: object, out: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            sizes.append(4 * out.numel() + 2 * module.weight.numel() + STATISTICS)
        elif isinstance(module, nn.MaxPool2d):
            sizes.append(10 * out.numel())

    for module in backbone.modules():
        module.register_forward_hook(saw)
    backbone(x)
    return sum(sizes)


@pytest.mark.parametrize("name", builtin_methods())
def test_a_step_holds_what_backward_needs(name: str) -> None:
    """Over parameters, gradients, state and views, which were there before."""
    few, many = step_of(name, 8), step_of(name, 512)
    queue = 2048 * 12 * 2 if name == "swav" else 0  # in bf16, for its scores
    assert few.peak - few.before <= needed() + queue
    # LARS' factors are as large as the gradients. Here the tensors are small: whole blocks count.
    assert few.peaks["update"] <= 2.8 * few.collectives["gradients"][1]

    gathered = many.collectives.get("gather", (0, 0))[1] - few.collectives.get("gather", (0, 0))[1]
    assert many.peaks["backward"] - few.peaks["backward"] <= 10_000 + 3.3 * gathered
    first_norm = 512 * 2 * 2 * 64 * 4  # processes, views, kinds, channels in float32
    assert many.peak - many.before - (few.peak - few.before) <= first_norm + 3.3 * gathered


@counted
@pytest.mark.parametrize("name", builtin_methods())
def test_forward_and_hooks_stay_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of a GPU without values, where two devices in one operator are an error."""
    plain = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: plain())  # a GPU's needs a driver
    config = config_of(name, 8, more=("optim.precision=fp32",))
    world = World(0, 8, 0, 8, torch.device("cuda", 0))
    with as_one_of(8), as_on_a_gpu():
        learner = Learner(make_method(config, comm_of(world)), 7, some_unlabelled=False).train()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            without_values(learner, mode, "cuda")
            under_way(learner.method, 160)
            views = [torch.zeros(2, 3, 32, 32, device="cuda") for _ in range(2)]
            labels = torch.zeros(2, dtype=torch.long, device="cuda")
            loss, metrics = learner(Batch(views, torch.arange(2), labels))
            learner.method.after_step(Progress(600, 1000, 60, 100))
    kept = {n: m.device.type for n, m in metrics.items() if isinstance(m, torch.Tensor)}
    assert {loss.device.type, *kept.values()} == {"cuda"}, kept


def test_a_batch_is_copied_once_on_its_way_to_the_network() -> None:
    """Two views of half precision, channels-last as DALI gives them, are joined; that is all."""
    seen = step_of("simclr", more=("data.dtype=float16", "optim.precision=fp16"))
    names = list(seen.names["forward"])  # in the order of their first use
    # `_to_copy` is the cast of the first convolution's weight.
    assert names[: names.index("convolution")] == ["cat", "_to_copy"]
    assert seen.names["forward"]["cat"] == 1 + seen.collectives["norm"][0] // 2

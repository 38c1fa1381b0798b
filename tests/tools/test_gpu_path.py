"""The cost of a step on a GPU: bytes, operators, collectives, memory, on tensors without values.

Two depths of a network tell how many operators each layer adds, in each part of the step.
"""

from __future__ import annotations

import functools
from unittest.mock import patch

import pytest
import torch
from counting import UNIT, Counted, Step, as_one_of, method_config, whole_step
from gpu_path import count
from plain_loops import LOSSES, PlainStep
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddp_ssl.config import Config
from ddp_ssl.losses import barlow_twins, info_nce, vicreg
from ddp_ssl.methods._registry import builtin_methods
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
    seen = count("resnet50", "global", 128, processes)
    assert seen.nbytes < 131e9
    assert seen.operators < 970
    assert seen.peak < 10.6 * 2**30
    assert seen.calls == 2 * NORMS


@pytest.mark.parametrize(("views", "gigabytes", "operators"), [(2, 131, 970), (1, 119, 470)])
def test_the_local_norm_moves_no_more_and_makes_no_call(
    views: int, gigabytes: int, operators: int
) -> None:
    """Pooled views take torch's own batch norm, one operator a layer."""
    seen = count("resnet50", "local", 128, 8, views)
    assert seen.nbytes < 1e9 * gigabytes
    assert seen.operators < operators
    assert seen.peak < 10.6 * 2**30
    assert seen.calls == 0


@counted
def test_against_torchs_synchronised_norm() -> None:
    """torch's norm pools both views, so it launches half as many kernels and joins no gradients."""
    ours, theirs = (count("resnet18", norm, 128, 8) for norm in ("global", "sync"))
    assert ours.nbytes < 1.11 * theirs.nbytes
    assert ours.operators < 1.3 * theirs.operators
    assert ours.peak < 1.01 * theirs.peak


LAYERS = "model.backbone_args={channels: [8, 8, 16, 16], layers: [%d, 1, 1, 1]}"
ADDED = 4  # convolutions and as many norms of two more blocks
STATISTICS = 11 * UNIT  # bytes of a small norm's at most, each vector in a unit of the allocator
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
    "adadim": (545, 39, 6.4), "barlow_twins": (418, 34, 6.2), "byol": (564, 44, 8.3),
    "deepclusterv2": (438, 39, 6.2), "dino": (550, 40, 8.2), "lejepa": (400, 30, 5.5),
    "mmcr": (293, 30, 5.9), "mocov2plus": (553, 40, 9.0), "mocov3": (606, 48, 8.3),
    "nnclr": (475, 35, 6.8), "ressl": (524, 40, 8.6), "simclr": (388, 30, 6.2),
    "simsiam": (413, 32, 5.8), "swav": (443, 33, 7.6), "vicreg": (409, 32, 6.2),
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
    assert deep.parts["backward"] - shallow.parts["backward"] <= 10.5 * ADDED
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
    Pooling keeps its output with indices of 8 bytes.
    """
    backbone, _ = build_backbone(config_of("simclr", 8).model, [32])
    x = torch.zeros(4, 3, 32, 32)
    sizes = [2 * x.numel()]

    def saw(module: nn.Module, args: object, out: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            sizes.append(4 * out.numel() + 2 * module.weight.numel() + STATISTICS)
        elif isinstance(module, nn.MaxPool2d):
            sizes.append(10 * out.numel())

    for module in backbone.modules():
        module.register_forward_hook(saw)
    backbone(x)
    return sum(sizes)


QUEUED = {"swav": 2048 * 12 * 2, "mocov2plus": 4 * 2049 * 4}
"""Bytes for a queue of 2,048 rows: their copy in bf16; two logits and two gradients of each."""


@pytest.mark.parametrize("name", builtin_methods())
def test_a_step_holds_what_backward_needs(name: str) -> None:
    """Over parameters, gradients, state and views, which were there before."""
    few, many = step_of(name, 8), step_of(name, 512)
    queue = QUEUED.get(name, 0)
    assert few.peak - few.before <= needed() + queue + 16 * UNIT  # small tensors of the losses
    # LARS' factors are as large as the gradients. Here the tensors are small: whole blocks count.
    assert few.peaks["update"] <= 2.8 * few.collectives["gradients"][1]

    gathered = many.collectives.get("gather", (0, 0))[1] - few.collectives.get("gather", (0, 0))[1]
    assert many.peaks["backward"] - few.peaks["backward"] <= 10_000 + 3.3 * gathered
    first_norm = 512 * 2 * 2 * 64 * 4  # processes, views, kinds, channels in float32
    assert many.peak - many.before - (few.peak - few.before) <= first_norm + 3.3 * gathered


@counted
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_against_a_plain_loop(name: str) -> None:
    """Ours does more work with fewer launches and half the collectives."""
    config = config_of(name, 8)
    ours = step_of(name)
    plain = whole_step(config, 8, 7, norm="sync", loop=PlainStep)
    assert ours.operators < 0.8 * plain.operators
    # Each view has its own, and two embeddings are gathered, their gradients summed.
    assert plain.calls == 2 * ours.collectives["norm"][0] + 4
    assert ours.waits == 0
    assert plain.waits >= 3 * 2 * 12  # masks, views, norms


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_plain_losses_are_the_methods_in_one_process(name: str) -> None:
    z = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    right = {
        "barlow_twins": lambda: barlow_twins(z),
        "simclr": lambda: info_nce(z, 0.2),
        "vicreg": lambda: vicreg(z).loss,
    }[name]()
    with patch("plain_loops.gathered", lambda rows: rows):
        torch.testing.assert_close(LOSSES[name](*z), right)


class WithGradients(Step):
    """Without a driver there is no backward pass on tensors of a GPU."""

    def backward(self, loss: torch.Tensor) -> None:
        for p in self.trained:
            p.grad = torch.zeros_like(p)


@counted
@pytest.mark.parametrize("name", builtin_methods())
def test_all_but_backward_stays_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of a GPU without values, where two devices in one operator are an error."""
    plain = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: plain())  # a GPU's needs a driver
    config = config_of(name, 8, more=("optim.precision=fp32",))
    seen = whole_step(config, 8, 7, device="cuda", loop=WithGradients)
    assert seen.kept_on == {"cuda"}
    assert seen.waits == (1 if name == "mmcr" else 0)


def test_copies_for_which_the_host_waits_are_counted() -> None:
    with as_one_of(1), FakeTensorMode(), Counted() as seen:
        there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
        there.to("cpu", non_blocking=True)
        here.to("cuda", non_blocking=True)
        there.copy_(here, non_blocking=True)
        assert seen.waits == 0
        there.to("cpu")
        here.to("cuda")
        there.copy_(here)
        torch.tensor([1.0], device="cuda")
        assert seen.waits == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("images", ["float32", "float16"])
def test_a_batch_is_copied_once_on_its_way_to_the_network(precision: str, images: str) -> None:
    """The views are joined and cast in the same pass; that is all."""
    seen = step_of("simclr", more=(f"data.dtype={images}", f"optim.precision={precision}"))
    names = list(seen.names["forward"])  # in the order of their first use
    # `_to_copy` is the cast of the first convolution's weight.
    assert names[: names.index("convolution")] == ["_foreach_copy_", "_to_copy"]
    assert seen.names["forward"]["_foreach_copy_"] == 1
    assert seen.names["forward"]["cat"] == seen.collectives["norm"][0] // 2

"""Bytes, operators, peak memory and collectives of a step on a GPU, counted without one.

    python tools/bench/gpu_path.py                     all, below
    python tools/bench/gpu_path.py methods [--network resnet50] [--images 128] [--processes 8 512]
    python tools/bench/gpu_path.py norms [--networks resnet50 resnet18] [--processes 8]
    python tools/bench/gpu_path.py layers [--networks resnet50 vit_small_patch16_224]

Tensors have no values, so nothing is computed. `methods` counts a whole step of every method as the
loop takes it: network, loss, backward, gradient norm, optimiser, hooks, probe and the recorder's
row, two views of 224 px in bf16. DDP's own work is not counted, but its buckets are in the memory.
A second table has the most memory in each part of the step, with all that was there before it:
parameters, state, gradients, views. A third table has the same steps with other norms, and plain
loops (`plain_loops.py`). `norms` counts forward and backward of the backbone alone:
`global` and `local` are this package's norm, `sync` is `nn.SyncBatchNorm`, whose statistics are
those of both views together. Bytes are what operators read and write; the least time is theirs at
`--copy` GB/s. `layers` counts the whole step of AdaDim by kind of layer, with the products too: an
operator takes at least the longer of its two times.
`tools/gpu_report.sh` measures on a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from counting import (
    PARTS,
    SIZE,
    STAGES,
    Counted,
    Moved,
    as_on_a_gpu,
    as_one_of,
    method_config,
    synchronise,
    whole_step,
)
from plain_loops import LOSSES, PlainStep

from ddp_ssl import distributed
from ddp_ssl.distributed import ViewLayout
from ddp_ssl.methods._registry import builtin_methods

NORMS = ("global", 2), ("global", 1), ("sync", 1), ("local", 2), ("local", 1)
"""Each norm, and the statistics of its own for so many views; 1 pools them."""


# --- kinds of layers -----------------------------------------------------------------------------


KINDS = {
    "batch norm": ("batch_norm",),
    "layer norm": ("layer_norm",),
    "activation": ("relu", "threshold", "gelu"),
    "attention": ("scaled_dot_product",),
    "pooling": ("max_pool", "avg_pool", "mean"),
    "linear layer, product": ("mm", "sum"),
    "sum of two paths": ("add",),
    "cast, copy, concatenation": ("copy", "cat", "clone", "stack"),
}  # words in an operator's name; the first that fits


OTHER = "losses, probe, all else"


class ByLayer(Counted):
    """Operators, bytes and products of each kind of layer; losses and optimiser apart."""

    def __init__(self, copy: float, products: float) -> None:
        super().__init__()
        self.copy, self.products = copy, products
        self.kinds: dict[str, list[float]] = {}

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any, nbytes: int) -> None:
        super().saw(func, args, kwargs, out, nbytes)
        packet, flops = func.overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        times = nbytes / self.copy / 1e6, flops / self.products / 1e9  # ms
        row = self.kinds.setdefault(self.kind(str(packet), args, kwargs, out), [0.0] * 4)
        for i, value in enumerate((1, nbytes / 1e9, flops / 1e12, max(times))):
            row[i] += value

    def kind(self, name: str, args: Any, kwargs: Any, out: Any) -> str:
        """The kind of layer, from the operator's name and the size of a convolution's kernel."""
        name = name.removeprefix("aten.")
        if self.part not in PARTS[:2]:
            return "optimiser, momentum, row"
        if name.startswith("convolution"):
            size = args[2 if name.endswith("backward") else 1].shape[-1]
            return f"convolution, {size} x {size}"
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # Losses see two views `[2, n, d]` in float32.
        if not any(x.dtype == torch.bfloat16 or (x.dim() > 2 and len(x) > 2) for x in tensors):
            return OTHER
        return next((k for k, words in KINDS.items() if any(w in name for w in words)), OTHER)


def layers(options: argparse.Namespace) -> None:
    """A table for each network: a step of AdaDim by kind of layer, the longest first."""
    for name in options.networks:
        settings = f"model.backbone={name}", f"data.batch_size={8 * options.images}"
        seen = ByLayer(options.copy, options.products)
        whole_step(method_config("adadim", *settings), 8, seen=seen)
        rows = sorted(seen.kinds.items(), key=lambda row: -row[1][-1])
        rows.append(("all", [sum(column) for column in zip(*seen.kinds.values(), strict=True)]))
        print(f"{name}, two views of {options.images} images, bf16, one of 8 processes\n")
        print("| layer | operators | GB | TFLOP | ms at least | bound by |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for kind, (operators, gbytes, tflop, least) in rows:
            by = "bytes" if gbytes / options.copy > tflop / options.products else "products"
            print(f"| {kind} | {operators:.0f} | {gbytes:.1f} | {tflop:.2f} | {least:.1f} | {by} |")
        print(flush=True)


# --- the norm ------------------------------------------------------------------------------------


def network(name: str, norm: str, layout: ViewLayout, processes: int) -> nn.Module:
    """A timm network in bf16 with float32 norms, without values."""
    made = timm.create_model(name, num_classes=0)
    if norm != "sync":
        made = distributed.global_batch_norm(made, layout, norm == "global")
    made = made.to("meta", torch.bfloat16, memory_format=torch.channels_last)
    for module in made.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    if norm == "sync":
        synchronise(made, processes)
    return made.train()


def count(name: str, norm: str, images: int, processes: int, views: int = 2) -> Moved:
    """The cost of forward and backward of the backbone, with own statistics for so many views."""
    layout = ViewLayout()
    made = network(name, norm, layout, processes)
    with as_one_of(processes), as_on_a_gpu(), Moved() as seen:
        x = torch.empty(2 * images, SIZE, SIZE, 3, device="meta", dtype=torch.bfloat16)
        with distributed.stacked_views(layout, views, slice(None)):
            out = made(x.permute(0, 3, 1, 2))
        out.float().square().sum().backward()
        return seen


def methods(options: argparse.Namespace) -> None:
    """Three tables with a line for each method."""
    print(f"{options.network}, two views of {options.images} images, bf16\n")
    columns = [f"calls, MB sent, peak GiB, {n} processes" for n in options.processes]
    print(f"| method | GB | operators | {' | '.join(PARTS)} | waits | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * (len(PARTS) + 3 + len(columns))}")
    counted = []
    names = options.methods or builtin_methods()
    for name in names:
        made = [step_of(name, options, processes) for processes in options.processes]
        seen = made[0]
        parts = " | ".join(str(seen.parts[part]) for part in PARTS)
        sent = " | ".join(
            f"{one.calls}, {one.sent / 1e6:.0f}, {one.peak / 2**30:.2f}" for one in made
        )
        counted += [(name, *pair) for pair in zip(options.processes, made, strict=True)]
        print(
            f"| {name} | {seen.nbytes / 1e9:.1f} | {seen.operators} | {parts} | {seen.waits} "
            f"| {sent} |", flush=True,
        )  # fmt: skip
    print("\nGiB at most\n")
    print(f"| method | processes | before | {' | '.join(STAGES)} |")
    print(f"| --- |{' ---: |' * (len(STAGES) + 2)}")
    for name, processes, seen in counted:
        row = seen.before, *(seen.before + seen.peaks[stage] for stage in STAGES)
        print(f"| {name} | {processes} | {' | '.join(f'{x / 2**30:.2f}' for x in row)} |")
    print(f"\n{options.processes[0]} processes: GB, operators, calls, peak GiB\n")
    print("| method | global norm | local norm | `nn.SyncBatchNorm` | plain loop |")
    print("| --- | ---: | ---: | ---: | ---: |")
    first = options.processes[0]
    own = {name: seen for name, _, seen in counted[::-1]}
    for name in names:
        cells = [
            own[name],
            step_of(name, options, first, "model.batch_norm=local"),
            step_of(name, options, first, norm="sync"),
        ]
        if name in LOSSES:
            cells.append(step_of(name, options, first, norm="sync", loop=PlainStep))
        texts = [
            f"{x.nbytes / 1e9:.1f}, {x.operators}, {x.calls}, {x.peak / 2**30:.2f}" for x in cells
        ]
        print(f"| {name} | {' | '.join(texts + ['–'] * (4 - len(texts)))} |", flush=True)


def step_of(
    name: str, options: argparse.Namespace, processes: int, *more: str, **how: Any
) -> Counted:
    """A method's step, with a queue for at least the images of a step."""
    images = options.images * processes
    settings = [f"model.backbone={options.network}", f"data.batch_size={images}", *more]
    queue = getattr(method_config(name, *settings[:1]).method, "queue_size", 0)
    if 0 < queue < images:
        settings.append(f"method.queue_size={images}")
    return whole_step(method_config(name, *settings), processes, **how)


def norms(options: argparse.Namespace) -> None:
    """A line for each network and norm."""
    (processes,) = options.processes
    print(f"two views of {options.images} images, {processes} processes\n")
    print("| network | norm | views | GB | operators | calls | least ms to move it | peak GiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in options.networks:
        for norm, views in NORMS:
            seen = count(name, norm, options.images, processes, views)
            least = seen.nbytes / options.copy / 1e6
            print(
                f"| {name} | {norm} | {views} | {seen.nbytes / 1e9:.1f} | {seen.operators} "
                f"| {seen.calls} | {least:.1f} | {seen.peak / 2**30:.2f} |"
            )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="methods | norms | layers")
    of_methods, of_norms = kinds.add_parser("methods"), kinds.add_parser("norms")
    of_layers = kinds.add_parser("layers")
    of_layers.set_defaults(run=layers)
    of_methods.set_defaults(run=methods)
    of_methods.add_argument("--network", default="resnet50")
    of_methods.add_argument("--methods", nargs="+", default=[])
    of_methods.add_argument("--processes", type=int, nargs="+", default=[8, 512])
    of_norms.set_defaults(run=norms)
    of_norms.add_argument("--networks", nargs="+", default=["resnet50", "resnet18"])
    of_norms.add_argument("--processes", type=int, nargs=1, default=[8])
    networks = ["resnet50", "vit_small_patch16_224"]
    of_layers.add_argument("--networks", nargs="+", default=networks)
    of_layers.add_argument("--products", type=float, default=690.0, help="bf16 TFLOP/s; likewise")
    for kind in (of_norms, of_layers):
        kind.add_argument("--copy", type=float, default=4290.0, help="GB/s; an H200's, measured")
    for kind in (of_methods, of_norms, of_layers):
        kind.add_argument("--images", type=int, default=128)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    else:
        for kind in ("norms", "layers", "methods"):
            main([kind])

"""Losses beside lightly's and the plain formulas: time and memory of forward and backward.

    python tools/bench/losses.py [--only nt-xent] [--repeats 7] [--device cpu] [--threads 2]
    python tools/bench/losses.py --only digits       errors of bf16 embeddings on tensor cores

All contestants take turns within one process, after a check that their gradients point the same
way. `plain` is the formula written directly, differentiated by autograd. The last part has the
shapes of one process of eight at a global batch of 65,536 images, with made-up rows of the others.
`digits`: |x - x64| / |x64| of value and gradient against float64 of the same bf16 numbers. On a CPU
the products are float32's of these numbers, which is what tensor cores compute up to the order of
the sum; `cut off` truncates the sum to float32 after every 16 products, as they may do.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from compare import OneOf, device_line, in_turn, parser_of, peak_mib, table
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.losses import barlow_twins, info_nce, mutual_information, vicreg
from ddp_ssl.losses.common import compared
from ddp_ssl.losses.kernels import unit_rows
from ddp_ssl.losses.kernels.info_nce import anchor_losses
from ddp_ssl.losses.kernels.mutual_information import squared_products

Loss = Callable[[Tensor], Tensor]
OURS = "ddp_ssl"


def plain_nt_xent(z: Tensor) -> Tensor:
    """The whole matrix of similarities."""
    rows = F.normalize(z, dim=-1).flatten(0, 1)
    n = z.shape[1]
    similarity = (rows @ rows.T / 0.1).fill_diagonal_(float("-inf"))
    target = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, target)


def plain_vicreg(z: Tensor) -> Tensor:
    """d x d covariances."""
    n, d = z.shape[1:]
    loss = 25 * F.mse_loss(z[0], z[1])
    for view in z:
        x = view - view.mean(0)
        cov = x.T @ x / (n - 1)
        loss = loss + 25 * F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + (cov.square().sum() - cov.diagonal().square().sum()) / d
    return loss


def plain_barlow_twins(z: Tensor) -> Tensor:
    """The d x d correlation."""
    unit = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    c = unit[0].T @ unit[1] / z.shape[1]
    on = (c.diagonal() - 1).square().sum()
    return on + 0.0051 * (c.square().sum() - c.diagonal().square().sum())


def plain_information(z: Tensor) -> Tensor:
    """Two M x M Gram matrices, of z and of twice as wide an r."""
    rows = F.normalize(z, dim=-1).flatten(0, 1)
    other = F.normalize(torch.cat([z, z.square()], -1), dim=-1).flatten(0, 1)
    a, b = (other @ other.T).square(), (rows @ rows.T).square()
    return (a * b).mean().log() - a.mean().log() - b.mean().log()


def peers() -> dict[str, Loss]:
    """lightly's losses, where it is installed."""
    from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss

    # Its variance term is the mean over the views, ours the sum.
    nt_xent, barlow = NTXentLoss(0.1), BarlowTwinsLoss(0.0051)
    vic = VICRegLoss(mu_param=50.0)
    return {
        "nt-xent": lambda z: nt_xent(z[0], z[1]),
        "vicreg": lambda z: vic(z[0], z[1]),
        "barlow": lambda z: barlow(z[0], z[1]),
    }


# Ours, the plain formula, and the (images, width) to try.
CASES: dict[str, tuple[Loss, Loss, list[tuple[int, int]]]] = {
    "nt-xent": (lambda z: info_nce(z, 0.1), plain_nt_xent, [(1024, 2048), (4096, 128)]),
    "vicreg": (lambda z: vicreg(z).loss, plain_vicreg, [(1024, 2048), (4096, 2048), (1024, 8192)]),
    "barlow": (
        lambda z: barlow_twins(z, scale=1.0), plain_barlow_twins, [(1024, 2048), (1024, 8192)]
    ),
    "information": (
        lambda z: mutual_information(torch.cat([z, z.square()], -1), z),
        plain_information,
        [(1024, 1024), (2048, 256)],
    ),
}  # fmt: skip


def check(name: str, ours: Loss, other: Loss, device: torch.device) -> None:
    """Raise `SystemExit` unless the gradients point the same way."""
    z = torch.randn(2, 48, 24, dtype=torch.float64, device=device).requires_grad_()
    a, b = (torch.autograd.grad(loss(z), z)[0].flatten() for loss in (ours, other))
    cosine = float(F.cosine_similarity(a, b, dim=0))
    if cosine < 1 - 1e-5:
        raise SystemExit(f"{name}: not the same loss, cosine of the gradients {cosine:.6f}")


def step(loss: Loss, z: Tensor) -> Callable[[], None]:
    def work() -> None:
        torch.autograd.grad(loss(z), z)

    return work


def large_batch(device: torch.device) -> str:
    """Peak memory of one process's InfoNCE at a global batch of 65,536."""
    z = torch.randn(2, 65536 // 8, 128, device=device).requires_grad_()
    comm = OneOf(8)
    used = peak_mib(step(lambda x: info_nce(x, 0.1, comm), z), device)
    return (
        "InfoNCE, 65,536 images of width 128 over 8 processes, one of them: peak "
        f"{used:.0f} MiB (its part of the similarities alone would be {2**14 * 2**17 * 4 >> 20})"
    )


# --- digits --------------------------------------------------------------------------------------


def rounded_once(a: Tensor, b: Tensor) -> Tensor:
    """The product of bf16 matrices in float32."""
    return a.float() @ b.float()


def cut_off(a: Tensor, b: Tensor) -> Tensor:
    """The same; after every 16 products the sum is truncated to float32."""
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for start in range(0, a.shape[1], 16):
        total += a[:, start : start + 16].double() @ b[start : start + 16].double()
        single = total.float()
        past = single.double().abs() > total.abs()
        total = torch.where(past, single.nextafter(torch.zeros(())), single).double()
    return total.float()


@contextlib.contextmanager
def tensor_cores(product: Callable[[Tensor, Tensor], Tensor] | None) -> Iterator[None]:
    """Within: products of bf16 rows are made by `product` on a CPU, or by a GPU's tensor cores."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(unit_rows, "WORTH", 1))
        if product is not None:
            stack.enter_context(patch.object(unit_rows, "_has_tensor_cores", lambda x: True))
            stack.enter_context(patch.object(unit_rows, "_tensor_core_product", product))
        yield


def both_sums(z: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """InfoNCE's and I(R;Z)'s sums, their gradients by the unit rows, and the losses' by `z`."""
    found = []
    for of_units, loss in (
        (lambda x: anchor_losses(x, 0.1, ONE_PROCESS), lambda: info_nce(z, 0.1)),
        (lambda x: squared_products(x, x)[2], lambda: mutual_information(z, z)),
    ):
        rows = compared(z, ONE_PROCESS)
        value = of_units(rows)
        by_units = torch.autograd.grad(value, rows.unit, retain_graph=True)[0]
        found.append((value.detach(), by_units, torch.autograd.grad(loss(), z)[0]))
    return [tuple(x.double().cpu() for x in row) for row in found]  # type: ignore[misc]


def digits(device: torch.device, images: int = 192, width: int = 2048) -> dict[str, list[float]]:
    """Errors of a value, of its gradient by unit rows and of the loss's by `z`, for each loss.

    Two views, whose images are alike in part.
    """
    torch.manual_seed(0)
    first = torch.randn(images, width) + 0.5 * torch.randn(width)
    z = torch.stack([first, first + 3 * torch.randn_like(first)]).bfloat16()
    exact = both_sums(z.double().requires_grad_())
    here = z.to(device).requires_grad_()
    kinds: dict[str, Any] = {"tensor cores": None}
    if device.type == "cpu":
        kinds = {"tensor cores": rounded_once, "tensor cores, cut off": cut_off}
    with patch.object(unit_rows, "WORTH", float("inf")):
        made = {"float32": both_sums(here)}
    for name, product in kinds.items():
        with tensor_cores(product):
            made[name] = both_sums(here)
    return {
        f"{loss} | {name}": [
            float((a - b).norm() / b.norm()) for a, b in zip(rows[index], exact[index], strict=True)
        ]
        for index, loss in enumerate(("InfoNCE", "I(R;Z)"))
        for name, rows in made.items()
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=[*CASES, "large", "digits"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    unit = "ms" if device.type == "cuda" else "CPU-ms"
    theirs = peers()
    print(f"{device_line(device)}; forward and backward, float32\n")
    for name, (ours, plain, shapes) in CASES.items():
        if options.only not in (None, name):
            continue
        losses = {OURS: ours, "plain": plain}
        if name in theirs:
            losses["lightly"] = theirs[name]
        for other in losses.values():
            check(name, ours, other, device)
        for images, width in shapes:
            z = torch.randn(2, images, width, device=device).requires_grad_()
            work = {label: step(loss, z) for label, loss in losses.items()}
            times = in_turn(work, options.repeats, device)
            memory = {label: peak_mib(one, device) for label, one in work.items()}
            print(f"{name}, {images} x {width}\n\n{table(times, memory, unit, OURS)}\n", flush=True)
    if options.only in (None, "large"):
        print(large_batch(device))
    if options.only in (None, "digits"):
        print("| loss | products | value | gradient by unit rows | by z, rounded to bf16 |")
        print("| --- | --- | ---: | ---: | ---: |")
        for name, errors in digits(device).items():
            print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |")


if __name__ == "__main__":
    main()

"""Losses beside lightly's and the plain formulas: time and memory of forward and backward.

    python tools/bench/losses.py [--only nt-xent] [--repeats 7] [--device cpu] [--threads 2]

All contestants take turns within one process, after a check that their gradients point the same
way. `plain` is the formula written directly, differentiated by autograd. The last part has the
shapes of one process of eight at a global batch of 65,536 images, with made-up rows of the others.
"""

from collections.abc import Callable

import torch
from compare import OneOf, device_line, in_turn, parser_of, peak_mib, table
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.losses import barlow_twins, info_nce, mutual_information, vicreg

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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=[*CASES, "large"])
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


if __name__ == "__main__":
    main()

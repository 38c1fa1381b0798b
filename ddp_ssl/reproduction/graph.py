"""The augmentation graph of four images: few augmentations hide the class, many show it.

The setting of Ghosh et al. 2024, appendix C.3: four images, two classes, and two groups that look
alike across the classes. An augmentation of an image looks like the image itself with probability
rho, like the other one of its class (mu), of its look (nu), or like the one that shares neither
(delta). The graph's adjacency is A = P P^T. Features are the leading eigenvectors of A, which is
what the spectral contrastive loss learns; two are learned here, so that the second decides: class
or look. The text that we have lacks the paper's probabilities. It says rho > mu > nu > delta; the
values are ours.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ddp_ssl.reproduction import figures
from ddp_ssl.reproduction.example import run

RHO, MU, NU, DELTA = 0.5, 0.25, 0.18, 0.07
VIEWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # augmentations drawn of each image
CLASS = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64) / 2
LOOK = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64) / 2
BOTH = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64) / 2
ALL = torch.full((4,), 0.5, dtype=torch.float64)


def probabilities() -> Tensor:
    """P `[image, what its augmentation looks like]`; images (class, look): 00, 01, 10, 11."""
    row = {(0, 0): RHO, (0, 1): MU, (1, 0): NU, (1, 1): DELTA}  # (other class, other look)
    images = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return torch.tensor(
        [[row[a[0] ^ b[0], a[1] ^ b[1]] for b in images] for a in images], dtype=torch.float64
    )


def adjacency(p: Tensor) -> Tensor:
    """The probability that two looks come from one image: A = P^T P, `[..., 4, 4]`."""
    return p.mT @ p


def closed_form() -> list[tuple[float, Tensor]]:
    """Eigenvalues of the whole graph and their eigenvectors, in falling order."""
    return [
        ((RHO + MU + NU + DELTA) ** 2, ALL),
        ((RHO + MU - NU - DELTA) ** 2, CLASS),
        ((RHO - MU + NU - DELTA) ** 2, LOOK),
        ((RHO - MU - NU + DELTA) ** 2, BOTH),
    ]


def draw_augmentations(views: int, draws: int, seed: int = 0) -> Tensor:
    """Observed P of `views` augmentations of each image, `[draws, 4, 4]`."""
    generator = torch.Generator().manual_seed(seed)
    p = probabilities().repeat(draws, 1)
    counts = torch.zeros_like(p)
    drawn = torch.multinomial(p, views, replacement=True, generator=generator)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))
    return (counts / views).reshape(draws, 4, 4)


def normalised(a: Tensor) -> Tensor:
    """D^(-1/2) A D^(-1/2); looks that were never seen stay zero."""
    degree = a.sum(-1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-12).rsqrt(), torch.zeros_like(degree))
    return scale[..., :, None] * a * scale[..., None, :]


def learn(a: Tensor) -> Tensor:
    """Features `[..., 4, 2]` by gradient descent on the spectral contrastive loss.

    |A - F F^T|^2 for the normalised A: the loss of HaoChen et al. 2021, up to a constant.
    """
    generator = torch.Generator().manual_seed(0)
    f = 0.1 * torch.randn(*a.shape[:-1], 2, generator=generator, dtype=a.dtype)
    for _ in range(2000):
        f = f - 0.1 * 4 * (f @ f.mT - a) @ f / 2
    return f


def class_share(f: Tensor) -> Tensor:
    """The share of the features' span that is along the class, without the constant; in [0, 1]."""
    q, _ = torch.linalg.qr(f)
    on_class = (q * CLASS[:, None]).sum(-2).square().sum(-1)
    on_look = (q * LOOK[:, None]).sum(-2).square().sum(-1)
    on_both = (q * BOTH[:, None]).sum(-2).square().sum(-1)
    share: Tensor = on_class / (on_class + on_look + on_both).clamp(min=1e-12)
    return share


@dataclass(frozen=True)
class Found:
    """One row per number of augmentations."""

    class_share: list[float]
    class_first: list[float]
    """Share of draws in which the class direction has a larger eigenvalue than the look."""
    tie: list[float]  # share of images for which class and look were seen equally often
    no_change_of_both: list[float]
    """Share of images of which no augmentation changes class and look."""
    agreement: float
    """Least cosine between what gradient descent learns of the whole graph and its eigenvectors."""


def measure(draws: int) -> Found:
    """The numbers for the picture and the text."""
    rows: list[tuple[float, float, float, float]] = []
    for views in VIEWS:
        p = draw_augmentations(views, draws)
        a = normalised(adjacency(p))
        shares = class_share(learn(a))
        gap = _along(a, CLASS) - _along(a, LOOK)
        # Entries of every image's row, in the order: itself, class, look, both.
        own = torch.stack([p[:, i, [i, i ^ 1, i ^ 2, i ^ 3]] for i in range(4)], 1)
        rows.append((
            shares.mean().item(),
            ((gap > 1e-9).double() + 0.5 * (gap.abs() <= 1e-9)).mean().item(),
            (own[..., 1] == own[..., 2]).double().mean().item(),
            (own[..., 3] == 0).double().mean().item(),
        ))  # fmt: skip
    whole = normalised(adjacency(probabilities()))
    q, _ = torch.linalg.qr(learn(whole))
    agreement = min((q * v[:, None]).sum(0).norm().item() for v in (ALL, CLASS))
    share, first, tie, no_change = (list(column) for column in zip(*rows, strict=True))
    return Found(share, first, tie, no_change, agreement)


def _along(a: Tensor, direction: Tensor) -> Tensor:
    return torch.einsum("i,...ij,j->...", direction, a, direction)


def checks(found: Found) -> list[tuple[str, str, bool]]:
    """The paper's claims, what was found, and whether they agree."""
    a = adjacency(probabilities())
    worst = max(float((a @ v - value * v).abs().max()) for value, v in closed_form())
    order = [value for value, _ in closed_form()]
    few, many = found.class_share[1], found.class_share[-1]

    def listed(values: list[float]) -> str:
        pairs = zip(values, VIEWS, strict=True)
        return ", ".join(f"{100 * v:.0f} % ({k})" for v, k in pairs if k in (1, 2, 4, 16, 64, 256))

    return [
        ("the eigenvectors are constant, class, look and both, with eigenvalues in this order",
         ", ".join(f"{v:.4f}" for v in order) + f"; A v - value v is {worst:.0e} at most",
         worst < 1e-12 and order == sorted(order, reverse=True)),
        ("gradient descent on the contrastive loss learns the two leading eigenvectors",
         f"cosine {found.agreement:.6f} at least", found.agreement > 0.9999),
        ("the fewer the augmentations, the likelier class and look are seen equally often",
         f"images for which they are, by augmentations: {listed(found.tie)}",
         all(x >= y for x, y in pairwise(found.tie))),
        ("with few augmentations none changes class and look together",
         f"images of which none does: {listed(found.no_change_of_both)}",
         all(x >= y for x, y in pairwise(found.no_change_of_both))
         and found.no_change_of_both[1] > 0.8),
        ("few augmentations suppress the class in what is learned, many restore it",
         f"share of the second feature along the class: {listed(found.class_share)}",
         few < 0.75 and many > 0.95),
        ("the class beats the look ever more surely",
         f"draws in which it does: {listed(found.class_first)}",
         all(y >= x - 0.02 for x, y in pairwise(found.class_first))
         and found.class_first[-1] > 0.95),
    ]  # fmt: skip


def draw(found: Found, file: Path) -> None:
    """The graph, and what is learned over the number of augmentations."""
    with figures.canvas(file, 1, 4, (16, 4), 130) as ((*axes,),):
        names = ["class 1\nlook a", "class 1\nlook b", "class 2\nlook a", "class 2\nlook b"]
        pictures = (
            ("whole graph", adjacency(probabilities())),
            ("2 augmentations of each, one draw", adjacency(draw_augmentations(2, 1, seed=3)[0])),
        )
        for axis, (title, matrix) in zip(axes, pictures, strict=False):
            axis.imshow(matrix.numpy(), cmap="Blues", vmin=0)
            for i in range(4):
                for j in range(4):
                    value = matrix[i, j].item()
                    dark = value > 0.6 * matrix.max().item()
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center",
                              color="white" if dark else "black")  # fmt: skip
            axis.set_xticks(range(4), names, fontsize=8)
            axis.set_yticks(range(4), names, fontsize=8)
            axis.set_title(title)
        axis = axes[2]
        axis.plot(VIEWS, found.tie, marker="o", label="class and look seen equally often")
        axis.plot(VIEWS, found.no_change_of_both, marker="s", label="no change of both seen")
        axis.set(title="seen of an image", ylabel="share of images", ylim=(-0.02, 1.02))
        axis = axes[3]
        axis.plot(VIEWS, found.class_share, marker="o", label="second feature along the class")
        axis.plot(VIEWS, found.class_first, marker="s", label="class beats look")
        axis.set(title="learned", ylabel="share", ylim=(-0.02, 1.02))
        for axis in axes[2:]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(VIEWS, [str(v) for v in VIEWS])
            axis.set_xlabel("augmentations of each image")
            axis.legend(fontsize=8, loc="best")


def main() -> int:
    title = "The augmentation graph of four images"
    return run("graph", title, ("draws", 2000), measure, checks, draw)


if __name__ == "__main__":
    sys.exit(main())

"""Theorem 3.1 on finite graphs of augmentations: the span of the losses' minimisers.

Ghosh et al. 2024, Theorem 3.1, Lemma B.2, Theorem B.3 and section C.2. Functions live on the looks
that augmentations can have, with inner product <f, g> = sum_x p(x) f(x) g(x). `T_M f` is the mean
of f over an image's augmentations; the operator of the data similarity kernel is T_k = T_M* T_M.
Formulas were lost in the text we have; these are read from its words and from the works it builds
on (Zhai et al. 2023; HaoChen et al. 2021).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddp_ssl.losses import barlow_twins, spectral_contrastive, vicreg
from ddp_ssl.reproduction import figures, graph
from ddp_ssl.reproduction.example import Claim, run

IMAGES, LOOKS, COUNT, WIDTH = 6, 9, 12, 3
"""Each image has COUNT equally likely augmentations among LOOKS; WIDTH features are learned."""
STEPS = 60


def augmentations(seed: int = 0) -> Tensor:
    """Looks of the equally likely augmentations of each image `[IMAGES, COUNT]`; all are seen."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(IMAGES, LOOKS, generator=generator, dtype=torch.float64) ** 3
    looks = torch.multinomial(weights, COUNT, replacement=True, generator=generator)
    looks[torch.arange(LOOKS) % IMAGES, torch.arange(LOOKS) // IMAGES] = torch.arange(LOOKS)
    return looks


@dataclass(frozen=True)
class Graph:
    """A finite graph of augmentations: p(look | image) `[n, m]`, images equally likely."""

    conditional: Tensor

    @property
    def marginal(self) -> Tensor:
        """p(look) `[m]`."""
        return self.conditional.mean(0)

    @property
    def kernel(self) -> Tensor:
        """k(x, x') = p(x, x') / (p(x) p(x')), p(x, x') of two augmentations of one image."""
        joint = self.conditional.T @ self.conditional / len(self.conditional)
        return joint / (self.marginal[:, None] * self.marginal)

    def average(self, f: Tensor) -> Tensor:
        """T_M: the mean of f `[m, d]` over each image's augmentations `[n, d]`."""
        return self.conditional @ f

    def adjoint(self, g: Tensor) -> Tensor:
        """T_M*: the mean of g `[n, d]` over the images that a look may be of `[m, d]`."""
        return self.conditional.T @ g / len(g) / self.marginal[:, None]

    def inner(self, f: Tensor, g: Tensor) -> Tensor:
        """All <f_i, g_j>."""
        return f.T @ (self.marginal[:, None] * g)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T_k, falling, and eigenfunctions `[m, m]` with <g_i, g_j> = 1 or 0."""
        root = self.marginal.sqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * self.kernel * root)
        return values.flip(0), vectors.flip(1) / root[:, None]

    def invariance(self, f: Tensor) -> Tensor:
        """E |f(x) - (T_M f)(image of x)|^2, of an augmentation against the mean of all."""
        mean = self.average(f)
        apart = (f - mean[:, None]).square().sum(2)  # [n, m]
        return (self.conditional * apart).sum() / len(self.conditional)

    def cosine(self, f: Tensor, g: Tensor) -> float:
        """The cosine of the largest angle between the spans of f and g; 1 if they are equal."""
        root = self.marginal.sqrt()[:, None]
        q, r = (torch.linalg.qr(root * x).Q for x in (f, g))
        return float(torch.linalg.svdvals(q.T @ r).min())


def all_pairs(looks: Tensor) -> Tensor:
    """Every pair of augmentations of every image `[2, N]`: a batch as the losses take it.

    The spectral contrastive loss compares no pair with itself: of the distribution's pairs of pairs
    a share of 1 / N is missing.
    """
    return torch.cat([torch.cartesian_prod(row, row) for row in looks]).T


def of_looks(looks: Tensor) -> Graph:
    """The graph of equally likely augmentations."""
    return Graph(torch.nn.functional.one_hot(looks, LOOKS).double().mean(1))


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> list[Tensor]:
    """Values of a table of features `[m, d]` while a loss is minimised by L-BFGS."""
    f = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([f], max_iter=4, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-15)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(f)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    path = [start]
    for _ in range(STEPS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        path.append(f.detach().clone())
    return path


def orthonormal(f: Tensor, inner: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """f with <f_i, f_j> = 1 or 0, the span being the same; differentiable."""
    upper = torch.linalg.cholesky(inner(f, f)).mT
    solved: Tensor = torch.linalg.solve_triangular(upper, f, upper=True, left=False)
    return solved


def objectives(whole: Graph, pairs: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The losses by name: a table of features `[m, d]` -> a scalar.

    VICReg's variance has the weight of its invariance, so that its minimum lies where the hinge is
    smooth.
    """
    return {
        "Equation 9, constrained": lambda f: whole.invariance(orthonormal(f, whole.inner)),
        "spectral contrastive": lambda f: spectral_contrastive(f[pairs]),
        "Barlow Twins": lambda f: barlow_twins(f[pairs], 1.0, 1.0, eps=1e-12),
        "VICReg": lambda f: vicreg(f[pairs], 1.0, 1.0, 25.0).loss,
    }


CENTRED = ("Barlow Twins", "VICReg")
"""Losses that subtract the mean: what they learn has no constant in it."""


@dataclass(frozen=True)
class Found:
    """The numbers for the text and the picture."""

    values: Tensor  # eigenvalues of T_k
    factorised: float  # largest difference of T_k and T_M* T_M (Lemma B.2)
    paths: dict[str, list[list[float]]]
    """By loss and start: the cosine of the largest angle to the leading eigenspace, over steps."""
    least: float
    """Largest distance of the constrained loss's minimum from the sum of 1 - lambda."""
    batch: int  # pairs of augmentations in the losses' batch
    norms: list[Tensor]
    """Eigenvalues of <f_i, f_j> that the spectral contrastive loss learns, by start."""
    decomposed: float
    """Largest difference of both sides of section C.2's decomposition, over random features."""
    shared: float  # largest error of Theorem B.3's eigenvalues on the graph of four images
    four: float
    """Cosine of what |T_M f - f|^2 learns there to the leading eigenspace, the least of all."""
    without_symmetry: float  # the same of a graph whose T_M is not symmetric


def measure(starts: int) -> Found:
    """Everything, from `starts` random starts of each loss."""
    looks = augmentations()
    whole, pairs = of_looks(looks), all_pairs(looks)
    values, functions = whole.spectrum()
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    f = some(LOOKS, WIDTH)
    by_kernel = whole.kernel @ (whole.marginal[:, None] * torch.eye(LOOKS, dtype=f.dtype))
    by_means = whole.adjoint(whole.average(torch.eye(LOOKS, dtype=f.dtype)))
    paths: dict[str, list[list[float]]] = {}
    ends: dict[str, list[Tensor]] = {}
    for name, loss in objectives(whole, pairs).items():
        first = int(name in CENTRED)  # the constant is the first eigenfunction
        leading = functions[:, first : first + WIDTH]
        for _ in range(starts):
            path = minimise(loss, 0.5 * some(LOOKS, WIDTH))
            if first:
                path = [x - whole.marginal @ x for x in path]
            paths.setdefault(name, []).append([whole.cosine(x, leading) for x in path])
            ends.setdefault(name, []).append(path[-1])
    constrained = objectives(whole, pairs)["Equation 9, constrained"]
    least = max(abs(float(constrained(x) - (1 - values[:WIDTH]).sum())) for x in
                ends["Equation 9, constrained"])  # fmt: skip
    norms = [torch.linalg.eigvalsh(whole.inner(x, x)).flip(0) for x in ends["spectral contrastive"]]
    return Found(
        values, float((by_kernel - by_means).abs().max()), paths, least, pairs.shape[1],
        norms,
        max(abs(decomposition(whole, some(LOOKS, WIDTH))) for _ in range(20)),
        eigenvalue_error(), *[own_image(p, starts) for p in (graph.probabilities(), lopsided())],
    )  # fmt: skip


def population(whole: Graph, f: Tensor) -> Tensor:
    """The spectral contrastive loss of the whole distribution, from its definition."""
    products, joint = f @ f.T, whole.conditional.T @ whole.conditional / len(whole.conditional)
    return whole.marginal @ products.square() @ whole.marginal - 2 * (joint * products).sum()


def decomposition(whole: Graph, f: Tensor) -> float:
    """Section C.2: the loss less (covariance + variance - d + 2 invariance); 0 if it holds.

    Covariance: sum of <f_i, f_j>^2 over i != j. Variance: sum of (<f_i, f_i> - 1)^2.
    """
    moments = whole.inner(f, f)
    orthogonality = (moments - torch.eye(len(moments), dtype=f.dtype)).square().sum()
    return float(population(whole, f) - orthogonality + len(moments) - 2 * whole.invariance(f))


def own_loss(p: Tensor, f: Tensor) -> Tensor:
    """|T_M f - f|^2 with f at the image itself, as Theorem B.3 has it: looks are images."""
    whole = Graph(p)
    f = orthonormal(f, whole.inner)
    return (whole.average(f) - f).square().sum(1).mean()


def own_image(p: Tensor, starts: int) -> float:
    """The least cosine of what `own_loss` learns to the leading eigenspace of T_k."""
    whole = Graph(p)
    leading = whole.spectrum()[1][:, :2]
    generator = torch.Generator().manual_seed(2)
    cosines = []
    for _ in range(starts):
        start = torch.randn(len(p), 2, generator=generator, dtype=p.dtype)
        cosines.append(whole.cosine(minimise(partial(own_loss, p), start)[-1], leading))
    return min(cosines)


def eigenvalue_error() -> float:
    """Theorem B.3 for four images: T_k has mu^2, the invariance form (1 - mu)^2, both the same
    eigenfunctions as T_M, whose eigenvalues are mu."""
    whole = Graph(graph.probabilities())
    eye = torch.eye(4, dtype=torch.float64)
    apart = whole.average(eye) - eye
    errors = []
    for square, g in graph.closed_form():
        mu, f = square**0.5, g[:, None]
        errors += [
            whole.average(f) - mu * f,
            whole.adjoint(whole.average(f)) - square * f,
            apart.T @ (apart @ f) - (1 - mu) ** 2 * f,
        ]
    return max(float(error.abs().max()) for error in errors)


def lopsided() -> Tensor:
    """Four images whose augmentations turn one into the next, not back; looks equally likely."""
    row = torch.tensor([0.4, 0.5, 0.1, 0.0], dtype=torch.float64)
    mixed = torch.stack([row.roll(i) for i in range(4)])
    return 0.7 * mixed + 0.3 * mixed[[0, 3, 1, 2]]


def checks(found: Found) -> list[Claim]:
    """The paper's claims, what was found, and whether they agree."""
    told: list[Claim] = [
        ("Lemma B.2: the kernel's operator is that of the means, T_k = T_M* T_M",
         f"largest difference {found.factorised:.0e}", found.factorised < 1e-12),
        ("eigenvalues are at most 1, the constant's",
         ", ".join(f"{v:.3f}" for v in found.values.clamp(min=0).tolist()),
         abs(float(found.values[0]) - 1) < 1e-12 and float(found.values[1]) < 1),
    ]  # fmt: skip
    for name, paths in found.paths.items():
        worst = min(path[-1] for path in paths)
        without = ", the constant left out" if name in CENTRED else ""
        told.append((f"{name}: the minimiser spans the leading eigenspace{without}",
                     f"cosine of the largest angle {worst:.6f}, the least of {len(paths)} starts",
                     worst > 0.9999))  # fmt: skip
    spread = max(float((n - found.values[:WIDTH]).abs().max()) for n in found.norms)
    told += [
        ("the constrained loss's minimum is the sum of 1 - lambda",
         f"largest difference {found.least:.0e}", found.least < 1e-8),
        ("the spectral contrastive loss learns each eigenfunction with weight lambda",
         f"largest difference {spread:.0e}, of a batch of {found.batch:,} pairs",
         spread < 2e-3),
        ("section C.2: that loss is covariance, variance and twice the distance from the mean",
         f"largest difference {found.decomposed:.0e} over 20 random tables",
         found.decomposed < 1e-10),
        ("Theorem B.3: where looks are images, T_k has mu^2 and the invariance form (1 - mu)^2",
         f"largest error {found.shared:.0e} on the graph of four images", found.shared < 1e-12),
        ("there |T_M f - f|^2 learns the leading eigenspace too",
         f"cosine {found.four:.6f}", found.four > 0.9999),
        ("that form needs a symmetric T_M: of a graph without, it learns another space",
         f"cosine {found.without_symmetry:.3f}", found.without_symmetry < 0.99),
    ]  # fmt: skip
    return told


def draw(found: Found, file: Path) -> None:
    """The kernel, its eigenvalues beside what is learned, and the way there."""
    whole = of_looks(augmentations())
    with figures.canvas(file, 1, 3, (14, 4), 130) as (axes,):
        picture = axes[0].imshow(whole.kernel.numpy(), cmap="Blues", vmin=0)
        axes[0].figure.colorbar(picture, ax=axes[0])
        axes[0].set(title="similarity kernel of nine looks", xlabel="look", ylabel="look")
        places = range(1, LOOKS + 1)
        axes[1].plot(places, found.values.tolist(), marker="o", label="eigenvalues of T_k")
        for index, norms in enumerate(found.norms):
            label = "learned, spectral contrastive" if index == 0 else None
            axes[1].plot(places[:WIDTH], norms.tolist(), "kx", label=label)
        axes[1].set(title=f"eigenvalues; {WIDTH} features are learned", xlabel="index")
        axes[1].legend()
        for colour, (name, paths) in zip(
            ("C0", "C1", "C2", "C3"), found.paths.items(), strict=True
        ):
            for index, path in enumerate(paths):
                gaps = [max(1 - cosine, 1e-16) for cosine in path]
                axes[2].plot(gaps, color=colour, linewidth=1, label=name if index == 0 else None)
        axes[2].set(title="distance from the leading eigenspace", xlabel="step of L-BFGS, 4 each",
                    ylabel="1 - cosine of the largest angle", yscale="log")  # fmt: skip
        axes[2].legend(fontsize=8, loc=(0.28, 0.12))


def main() -> int:
    title = "Minimisers on finite graphs of augmentations"
    return run("theorem", title, ("starts", 5), measure, checks, draw)


if __name__ == "__main__":
    sys.exit(main())

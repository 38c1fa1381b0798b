"""The formulas written out in plain loops, as slow and as literal as possible."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor


def nt_xent(za: Tensor, zb: Tensor, temperature: float) -> float:
    """2N anchors, self excluded, the positive in the denominator."""
    rows = [z / z.norm().clamp(min=1e-12) for z in torch.cat([za, zb])]
    n, total = len(za), 0.0
    for i, u in enumerate(rows):
        positive = (i + n) % (2 * n)
        scores = [float(u @ v) / temperature for v in rows]
        largest = max(scores)
        rest = sum(math.exp(s - largest) for j, s in enumerate(scores) if j != i)
        total += -scores[positive] + largest + math.log(rest)
    return total / (2 * n)


def info_nce(z: Tensor, temperature: float) -> float:
    """The mean over pairs of views."""
    pairs = list(combinations(range(len(z)), 2))
    return sum(nt_xent(z[a], z[b], temperature) for a, b in pairs) / len(pairs)


def vicreg(z: Tensor) -> tuple[float, float, float]:
    """Invariance over pairs of views, summed variance and covariance of two branches."""
    views, n, d = z.shape
    pairs = list(combinations(range(views), 2))
    invariance = 0.0
    for a, b in pairs:
        for i in range(n):
            for j in range(d):
                invariance += float(z[a, i, j] - z[b, i, j]) ** 2 / (n * d) / len(pairs)
    variance = covariance = 0.0
    for view in z:
        columns = [[float(view[i, j]) for i in range(n)] for j in range(d)]
        means = [sum(c) / n for c in columns]
        cov = [
            [
                sum((columns[p][i] - means[p]) * (columns[q][i] - means[q]) for i in range(n))
                / (n - 1)
                for q in range(d)
            ]
            for p in range(d)
        ]
        variance += sum(max(0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(d)) / d
        covariance += sum(cov[p][q] ** 2 for p in range(d) for q in range(d) if p != q) / d
    return invariance, variance * 2 / views, covariance * 2 / views


def renyi2(a: Tensor) -> float:
    """-log(|A|_F^2 / M^2)."""
    return -math.log(sum(float(x) ** 2 for x in a.flatten()) / a.shape[0] ** 2)


def mutual_information(r: Tensor, z: Tensor) -> float:
    """H(A) + H(B) - H(A o B) from the Gram matrices of the normalised rows."""
    r, z = (x.flatten(0, 1) / x.flatten(0, 1).norm(dim=1, keepdim=True) for x in (r, z))
    a, b = r @ r.T, z @ z.T
    return renyi2(a) + renyi2(b) - renyi2(a * b)


# --- these return tensors, so that autograd differentiates the loops ---------------------------


def correlation_terms(a: list[list[Tensor]], b: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """sum_j (C_jj - 1)^2 and sum_{j != l} C_jl^2 with C_jl = 1/N sum_i a_ij b_il; columns first."""
    n = len(a[0])
    on, off = torch.zeros(()).double(), torch.zeros(()).double()
    for j, column in enumerate(a):
        for m, other in enumerate(b):
            c = sum(x * y for x, y in zip(column, other, strict=True)) / n
            if j == m:
                on = on + (c - 1) ** 2
            else:
                off = off + c**2
    return on, off


def barlow_twins(z: Tensor, off_diagonal: float, scale: float) -> Tensor:
    """The mean over pairs of views, each feature standardised per view (biased, eps 1e-5)."""
    views = []
    for view in z:
        columns = []
        for column in view.T:
            mean = sum(column) / len(column)
            variance = sum((x - mean) ** 2 for x in column) / len(column)
            columns.append([(x - mean) / (variance + 1e-5).sqrt() for x in column])
        views.append(columns)
    terms = [correlation_terms(a, b) for a, b in combinations(views, 2)]
    return scale * sum(on + off_diagonal * off for on, off in terms) / len(terms)


def barlow_twins_multiview(z: Tensor, off_diagonal: float) -> Tensor:
    """fastssl: rows of length one, features standardised over all views, against their mean."""
    views, n, d = z.shape
    u = [[row / row.norm() for row in view] for view in z]
    means = [sum(row[j] for view in u for row in view) / (views * n) for j in range(d)]
    stds = [
        (sum((row[j] - means[j]) ** 2 for view in u for row in view) / (views * n - 1)).sqrt()
        for j in range(d)
    ]
    h = [
        [[(view[i][j] - means[j]) / stds[j] for i in range(n)] for j in range(d)] for view in u
    ]  # [K][d][N]
    if views == 2:
        on, off = correlation_terms(h[0], h[1])
        return on + off_diagonal * off
    mean = [[sum(view[j][i] for view in h) / views for i in range(n)] for j in range(d)]
    on = sum(correlation_terms(view, mean)[0] for view in h) / views
    return on + off_diagonal * correlation_terms(mean, mean)[1]


def vicreg_multiview(z: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """fastssl: each view against the mean of the others; no epsilon."""
    views, n, d = z.shape

    def variance_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = sum(x) / n
        cov = [
            [sum((row[p] - mean[p]) * (row[q] - mean[q]) for row in x) / (n - 1) for q in range(d)]
            for p in range(d)
        ]
        hinge = sum((1 - cov[j][j].sqrt()).clamp(min=0) for j in range(d)) / d
        return hinge, sum(cov[p][q] ** 2 for p in range(d) for q in range(d) if p != q) / d

    total = torch.zeros(()).double()
    for k, view in enumerate(z):
        others = sum(z[m] for m in range(views) if m != k) / (views - 1)
        invariance = sum(
            (a - b) ** 2 for a, b in zip(view.flatten(), others.flatten(), strict=True)
        )
        (v, c), (v_others, c_others) = map(variance_and_covariance, (view, others))
        total = total + weights[0] * invariance / (n * d)
        total = total + weights[1] * (v / 2 + v_others / 2) + weights[2] * (c + c_others)
    return total / views


def mmcr(z: Tensor, weight: float) -> Tensor:
    """Nuclear norms as the sum of square roots of the Gram matrix's eigenvalues."""

    def nuclear_norm(x: Tensor) -> Tensor:
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
        return sum(value.sqrt() for value in torch.linalg.eigvalsh(gram))

    images = [[row / row.norm() for row in image] for image in z.transpose(0, 1)]
    means = torch.stack([sum(image) / len(image) for image in images])
    own = sum(nuclear_norm(torch.stack(image)) for image in images) / len(images)
    return -nuclear_norm(means) + weight * own


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum_p target_p log softmax(logits)_p of one image."""
    total = sum(x.exp() for x in logits)
    return -sum(t * (x - total.log()) for t, x in zip(target, logits, strict=True))


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Columns to the sum 1/P, then rows to the sum 1/N, in turn; rows of sum one in the end."""
    n, p = scores.shape
    q = [[math.exp(float(x) / epsilon) for x in row] for row in scores]
    for _ in range(iterations):
        columns = [sum(row[j] for row in q) for j in range(p)]
        q = [[row[j] / columns[j] / p for j in range(p)] for row in q]
        q = [[x / sum(row) / n for x in row] for row in q]
    return torch.tensor([[x * n for x in row] for row in q], dtype=torch.float64)


def dino(student: Tensor, teacher: Tensor, center: Tensor, ts: float, tt: float) -> Tensor:
    """The mean over images and over pairs of a teacher's view and another one of the student."""
    terms = [
        cross_entropy(((t - center) / tt).softmax(0), s / ts)
        for a, targets in enumerate(teacher)
        for v, logits in enumerate(student)
        if a != v
        for t, s in zip(targets, logits, strict=True)
    ]
    return sum(terms) / len(terms)


def spherical_kmeans(rows: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, list[int]]:
    """Assign, average, normalise."""
    centroids = centroids.clone()

    def nearest(row: Tensor) -> int:
        cosines = [float(row @ c) for c in centroids]
        return cosines.index(max(cosines))

    for _ in range(iterations):
        members: list[list[Tensor]] = [[] for _ in centroids]
        for row in rows:
            members[nearest(row)].append(row)
        for index, own in enumerate(members):
            if own:
                centroids[index] = sum(own) / sum(own).norm()
    return centroids, [nearest(row) for row in rows]


# --- predictions, keys and queues: one direction, tensors for autograd -------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a.b / (|a| |b|)."""
    return (a @ b) / (a.norm() * b.norm())


def simsiam(p: Tensor, z: Tensor) -> Tensor:
    """The mean of -cos."""
    return -sum(cosine(a, b.detach()) for a, b in zip(p, z, strict=True)) / len(p)


def byol(p: Tensor, z: Tensor) -> Tensor:
    """The mean of |p/|p| - z/|z||^2."""
    pairs = zip(p, z.detach(), strict=True)
    return sum((a / a.norm() - b / b.norm()).square().sum() for a, b in pairs) / len(p)


def own_among(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """The mean of -log(exp s_ii / sum_j exp s_ij), s the cosine divided by the temperature."""
    total = torch.zeros(()).double()
    for i, anchor in enumerate(anchors):
        scores = [(cosine(anchor, c) / temperature).exp() for c in candidates]
        total = total - (scores[i] / sum(scores)).log()
    return total / len(anchors)


def mocov3(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The queries' own keys among all keys, times 2 tau."""
    return 2 * temperature * own_among(query, key.detach(), temperature)


def nnclr(nearest: Tensor, p: Tensor, temperature: float) -> Tensor:
    """The neighbours' own predictions among all predictions."""
    return own_among(nearest.detach(), p, temperature)


def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Each query's own key among that key and the queue."""
    total = torch.zeros(()).double()
    for q, k in zip(query, key.detach(), strict=True):
        scores = [(cosine(q, other) / temperature).exp() for other in [k, *queue]]
        total = total - (scores[0] / sum(scores)).log()
    return total / len(query)


def ressl(query: Tensor, key: Tensor, queue: Tensor, tq: float, tk: float) -> Tensor:
    """The mean over images of the cross-entropy of two distributions over the queue."""
    terms = []
    for q, k in zip(query, key.detach(), strict=True):
        weights = [(cosine(k, row) / tk).exp() for row in queue]
        target = torch.stack([w / sum(weights) for w in weights])
        terms.append(cross_entropy(target, torch.stack([cosine(q, row) / tq for row in queue])))
    return sum(terms) / len(terms)


def spectral_contrastive(z: Tensor) -> Tensor:
    """-2 mean z_ki . z_mi + mean (z_ki . z_mj)^2 over ordered pairs of views, and of images."""
    views, n, _ = z.shape
    positive, negative = z.new_zeros(()), z.new_zeros(())
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    for a, b in pairs:
        for i in range(n):
            for j in range(n):
                product = z[a, i] @ z[b, j]
                if i == j:
                    positive = positive + product / n
                else:
                    negative = negative + product**2 / (n * (n - 1))
    return (negative - 2 * positive) / len(pairs)


def sigreg(z: Tensor, directions: Tensor, t_max: float, knots: int) -> Tensor:
    """Epps and Pulley's statistic of each view in each direction, by the trapezoidal rule."""
    total = torch.zeros(()).double()
    gap = 2 * t_max / (knots - 1)
    for view in z:
        for direction in directions.T:
            x = view @ direction
            for j in range(knots):
                t = -t_max + j * gap
                phi = torch.exp(1j * t * x).mean()
                off = (phi - math.exp(-t * t / 2)).abs() ** 2 * math.exp(-t * t / 2)
                total = total + off * gap * (0.5 if j in (0, knots - 1) else 1)
    return total * z.shape[1] / (len(z) * directions.shape[1])

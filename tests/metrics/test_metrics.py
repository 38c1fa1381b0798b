"""Every metric: a closed form, a naive formula, several processes, degenerate input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor

from ddp_ssl import metrics
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.metrics.pairs import _blocks
from tests.losses import oracles
from tests.metrics.spectra import embeddings, with_spectrum
from tests.ranks import Ranks


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


# --- of the spectrum -------------------------------------------------------------------------


def test_flat_spectrum() -> None:
    """Ten equal singular values of 2: everything has a closed form."""
    x = 2 * orthonormal(40, 10)
    spectrum = metrics.Spectrum.of(x)
    assert spectrum.eigenvalues.tolist() == pytest.approx([4] * 10)
    assert float(metrics.effective_rank(spectrum)) == pytest.approx(10)
    assert metrics.rankme(x) == pytest.approx(10, rel=1e-4)
    assert metrics.von_neumann_entropy(x) == pytest.approx(math.log(10))
    assert metrics.matrix_entropy(x) == pytest.approx(-10 * 0.1 * math.log(0.1) + 1)
    assert metrics.eigenvalue_count(x) == 10
    assert metrics.cumulative_explained_variance(x) == pytest.approx(0.3)
    assert metrics.cumulative_explained_variance(x, 0.25) == pytest.approx(0.3)  # ceil(2.5) of 10
    assert metrics.alpha_req(spectrum) == pytest.approx((0, 1), abs=1e-9)


def test_eigenvalue_count_is_above_one_percent() -> None:
    sigma = torch.tensor([0.7, 0.2, 0.0802, 0.0105, 0.0093], dtype=torch.float64).sqrt()
    assert metrics.eigenvalue_count(with_spectrum(sigma, 30, 12)) == 4
    flat = torch.ones(150, dtype=torch.float64)
    assert metrics.eigenvalue_count(with_spectrum(flat, 200, 160)) == 0
    assert metrics.eigenvalue_count(with_spectrum(flat, 200, 160), 0.005) == 150


def test_a_power_law_has_its_exponent() -> None:
    sigma = torch.arange(1, 201, dtype=torch.float64) ** -0.6
    exponent, fit = metrics.alpha_req(metrics.Spectrum.of(with_spectrum(sigma, 300, 250)))
    assert exponent == pytest.approx(1.2, rel=1e-9)
    assert fit == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [(50, 12), (9, 30)])
@pytest.mark.parametrize("center", [False, True])
def test_spectrum_metrics_against_numpy(shape: tuple[int, int], center: bool) -> None:
    """From NumPy's singular values, with plain loops."""
    x = embeddings(*shape)
    spectrum = metrics.Spectrum.of(x, center=center)
    data = x.numpy() - x.numpy().mean(0) if center else x.numpy()
    sigma = np.linalg.svd(data, compute_uv=False)[: min(shape[0] - center, shape[1])]
    assert spectrum.singular_values.tolist() == pytest.approx(sigma.tolist(), rel=1e-6)
    p = [s / sum(sigma) + 1e-7 for s in sigma]
    assert metrics.rankme(spectrum) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)))
    p = [s**2 / sum(sigma**2) for s in sigma]
    assert metrics.von_neumann_entropy(spectrum) == pytest.approx(-sum(v * math.log(v) for v in p))
    top = math.ceil(0.3 * shape[1])
    assert metrics.cumulative_explained_variance(spectrum) == pytest.approx(sum(p[:top]))
    assert metrics.eigenvalue_count(spectrum) == sum(v > 0.01 for v in p)
    a = data.T @ data / shape[0]
    values, vectors = np.linalg.eigh(a)
    log_a = (vectors * np.log(values.clip(1e-300))) @ vectors.T
    assert metrics.matrix_entropy(spectrum) == pytest.approx(np.trace(a) - np.trace(a @ log_a))


def test_alpha_req_against_a_weighted_regression() -> None:
    """NumPy's polynomial fit, whose weights are of the residuals; scikit-learn's R^2."""
    x = embeddings(300, 60)
    ratios = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    ratios = ratios / ratios.sum()
    for first, last in ((3, 100), (3, 50), (10, 30)):
        j = np.arange(first, min(last, 60) + 1)
        line = np.polyfit(np.log(j), np.log(ratios[j - 1]), 1, w=np.sqrt(1 / j))
        score = r2_score(np.log(ratios[j - 1]), np.polyval(line, np.log(j)), sample_weight=1 / j)
        assert metrics.alpha_req(x, first, last) == pytest.approx((-line[0], score), rel=1e-9)
    # alpha-ReQ's code: `trange=np.arange(3, 100)`, which counts from 0.
    assert metrics.alpha_req(x) == metrics.alpha_req(x, 4, 100)


def test_centred_or_not() -> None:
    """A large mean is a dimension of its own, except for the metrics of a covariance."""
    x = embeddings(200, 20)
    shifted = x + 100 * torch.randn(20, dtype=torch.float64)
    assert metrics.alpha_req(shifted) == pytest.approx(metrics.alpha_req(x), rel=1e-6)
    for metric in (metrics.rankme, metrics.von_neumann_entropy):
        assert metric(shifted) < 0.6 * metric(x)
        assert metric(metrics.Spectrum.of(shifted, center=True)) == pytest.approx(
            metric(metrics.Spectrum.of(x, center=True)), rel=1e-6
        )
    assert metrics.uniformity(shifted) > 0.1 * metrics.uniformity(x) > -0.5


# --- of pairs --------------------------------------------------------------------------------


def test_closed_forms_of_pairs() -> None:
    equal = torch.ones(7, 3)
    assert metrics.uniformity(equal) == pytest.approx(0, abs=1e-12)
    assert metrics.uniformity(torch.tensor([[3.0], [-0.1]])) == pytest.approx(-8)
    assert metrics.uniformity(torch.eye(6)) == pytest.approx(-4)
    assert metrics.renyi_entropy(torch.eye(6)) == pytest.approx(math.log(6))
    assert metrics.renyi_entropy(equal) == pytest.approx(0, abs=1e-12)
    assert metrics.mutual_information(torch.eye(6), 2 * torch.eye(6)) == pytest.approx(math.log(6))
    assert metrics.mutual_information(equal, torch.eye(7)) == pytest.approx(0, abs=1e-12)
    both = metrics.pair_means(equal, torch.eye(7))
    assert (both.uniformity_r, both.uniformity_z) == pytest.approx((0, -4), abs=1e-12)


def naive_uniformity(x: Tensor) -> float:
    rows = [row / row.norm() for row in x]
    pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    mean = sum(math.exp(-2 * float((rows[i] - rows[j]).square().sum())) for i, j in pairs)
    return math.log(mean / len(pairs))


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_pairs_against_plain_loops(chunk: int) -> None:
    r, z = embeddings(23, 7), embeddings(23, 5) - 0.4
    means = metrics.pair_means(r, z, chunk=chunk)
    assert metrics.uniformity(r, chunk=chunk) == pytest.approx(naive_uniformity(r))
    assert means.uniformity_r == pytest.approx(naive_uniformity(r))
    assert means.uniformity_z == pytest.approx(naive_uniformity(z))
    expected = oracles.mutual_information(r[None], z[None])
    assert means.mutual_information == pytest.approx(expected, rel=1e-10)
    for entropy, x in ((means.renyi_entropy_r, r), (means.renyi_entropy_z, z)):
        unit = x / x.norm(dim=1, keepdim=True)
        squares = [float(a @ b) ** 2 for a in unit for b in unit]
        assert entropy == pytest.approx(-math.log(sum(squares) / len(squares)))
        assert metrics.renyi_entropy(x) == pytest.approx(entropy)
    assert metrics.renyi_entropy(r.T.contiguous()) == pytest.approx(
        metrics.pair_means(r.T, r.T).renyi_entropy_r  # fewer rows than columns
    )


def test_the_cov_form_is_of_columns() -> None:
    r, z = embeddings(30, 6), embeddings(30, 6).flip(1) - 0.1
    expected = metrics.mutual_information(r.T, z.T)  # the Gram matrices of the columns
    assert metrics.mutual_information(r, z, "cov") == pytest.approx(expected)
    with pytest.raises(ValueError, match="form cov needs equal widths, got 6 and 5"):
        metrics.mutual_information(r, z[:, :5], "cov")


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 100])
def test_every_row_is_in_one_block_and_the_work_is_even(rows: int) -> None:
    class Part:
        world_size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

    shares = [list(_blocks(rows, Part(rank), 8)) for rank in range(3)]  # type: ignore[arg-type]
    covered = sorted(row for share in shares for a, b in share for row in range(a, b))
    assert covered == list(range(rows))
    if rows == 100:
        work = [sum((b - a) * (rows - a) for a, b in share) for share in shares]
        assert max(work) < 1.2 * min(work)


# --- of views --------------------------------------------------------------------------------


def views(q: int, images: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    spread = 0.3 * torch.randn(q, images, width, dtype=torch.float64, generator=g)
    return embeddings(images, width) + spread


def test_alignment() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]])
    assert metrics.alignment(x) == pytest.approx(2)
    assert metrics.alignment(torch.stack([x[0], -3 * x[0]])) == pytest.approx(4)
    assert metrics.alignment(torch.stack([x[0], 7 * x[0]])) == pytest.approx(0, abs=1e-12)
    many = views(4, 9, 6)
    unit = many / many.norm(dim=2, keepdim=True)
    apart = [
        float((unit[a, i] - unit[b, i]).square().sum())
        for a in range(4)
        for b in range(a)
        for i in range(9)
    ]
    assert metrics.alignment(many) == pytest.approx(sum(apart) / len(apart))


def test_lidar_counts_what_tells_images_apart() -> None:
    """Noise of the same covariance in all dimensions, images apart in five of them, equally."""
    corners = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    means = torch.cat([corners, torch.zeros(10, 3)], 1) * 1000
    noise = torch.cat([torch.eye(8), -torch.eye(8)]).double()[:, None]
    assert metrics.lidar(means + noise) == pytest.approx(5, rel=1e-4)


def test_lidar_against_the_formula() -> None:
    x = views(6, 15, 7).numpy()
    mean = x.mean(0)
    between = np.cov(mean.T)
    within = np.mean([np.cov(x[:, i].T) for i in range(15)], axis=0) + 1e-4 * np.eye(7)
    values, vectors = np.linalg.eigh(within)
    root = (vectors / np.sqrt(values)) @ vectors.T
    p = np.linalg.eigvalsh(root @ between @ root) + 1e-8
    p = p / p.sum()
    expected = math.exp(-sum(v * math.log(v) for v in p))
    assert metrics.lidar(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)


# --- over processes --------------------------------------------------------------------------


def everything(world: World, rows: int, width: int) -> list[float]:
    """What every process holds whole is shared; of the views each has its own images."""
    comm = comm_of(world)
    r, z = embeddings(rows, width), embeddings(rows, 11) - 0.4
    found = []
    for owner, center in enumerate((False, True)):
        spectrum = metrics.Spectrum.of(r, center=center, comm=comm, owner=owner)
        found += [
            float(metrics.effective_rank(spectrum)), metrics.rankme(spectrum),
            metrics.von_neumann_entropy(spectrum), metrics.matrix_entropy(spectrum),
            metrics.eigenvalue_count(spectrum), metrics.cumulative_explained_variance(spectrum),
            *metrics.alpha_req(spectrum),
        ]  # fmt: skip
    pairs = metrics.pair_means(r, z, comm, chunk=4)
    found += [
        pairs.mutual_information, pairs.renyi_entropy_r, pairs.renyi_entropy_z,
        pairs.uniformity_r, pairs.uniformity_z, metrics.uniformity(z, comm, chunk=3),
        metrics.renyi_entropy(r, comm), metrics.mutual_information(r, z, comm=comm, chunk=5),
        metrics.mutual_information(r[:, :11], z, "cov", comm),
    ]  # fmt: skip
    mine = views(3, 13, 6)[:, world.rank :: world.size]  # uneven shares
    return [*found, metrics.alignment(mine, comm), metrics.lidar(mine, comm)]


@pytest.mark.parametrize("shape", [(31, 12), (9, 40)])
def test_processes_agree(ranks: Ranks, shape: tuple[int, int]) -> None:
    (expected,) = ranks.run(everything, 1, *shape)
    assert len(expected) == 27
    assert all(math.isfinite(value) for value in expected)
    for size in (2, 3):
        results = ranks.run(everything, size, *shape)
        assert all(result == results[0] for result in results)  # the same bits everywhere
        assert results[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- degenerate input ------------------------------------------------------------------------

OF_MATRICES: dict[str, Callable[[Tensor], Any]] = {
    "effective_rank": metrics.effective_rank,
    "rankme": metrics.rankme,
    "von_neumann_entropy": metrics.von_neumann_entropy,
    "matrix_entropy": metrics.matrix_entropy,
    "eigenvalue_count": metrics.eigenvalue_count,
    "cumulative_explained_variance": metrics.cumulative_explained_variance,
    "renyi_entropy": metrics.renyi_entropy,
    "uniformity": metrics.uniformity,
    "alpha_req": lambda x: metrics.alpha_req(x)[0],
    "mutual_information": lambda x: metrics.mutual_information(x, x),
    "mutual_information_cov": lambda x: metrics.mutual_information(x, x, "cov"),
    "alignment": lambda x: metrics.alignment(torch.stack([x, x])),
    "lidar": lambda x: metrics.lidar(torch.stack([x, x])),
}
DEGENERATE = {
    "zeros": torch.zeros(6, 4),
    "one row": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    "one row of zeros": torch.zeros(1, 4),
    "constant": torch.full((6, 4), 0.3),
    "rank one": torch.arange(1.0, 7.0)[:, None] * torch.ones(4),
    "one column": torch.arange(6.0)[:, None],
    "huge": 1e30 * torch.eye(7),
    "half": torch.eye(7, dtype=torch.float16),
}


@pytest.mark.parametrize("name", OF_MATRICES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_is_finite_or_one_clear_error(name: str, case: str) -> None:
    needs_more = case.startswith("one row") and name in ("uniformity", "lidar")
    if needs_more or (name == "alpha_req" and case not in ("huge", "half")):
        with pytest.raises(ValueError, match=rf"^{name}: [^\n]*got [^\n]*$"):
            OF_MATRICES[name](DEGENERATE[case])
        return
    value = float(OF_MATRICES[name](DEGENERATE[case]))
    assert math.isfinite(value)
    if case == "zeros" and name not in ("uniformity", "renyi_entropy", "mutual_information"):
        assert value == 0 or name.startswith("mutual")
    if case == "rank one" and name in ("effective_rank", "rankme"):
        assert value == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_other_shapes_are_refused(name: str) -> None:
    for x in (torch.zeros(0, 4), torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"expected .*\[.*got "):
            OF_MATRICES[name](x)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 < q <= 1, got 1\.5"):
        metrics.cumulative_explained_variance(torch.eye(3), 1.5)
    with pytest.raises(ValueError, match=r"from eigenvalue 4 on needs 6 .* got 2"):
        metrics.alpha_req(torch.eye(3))
    with pytest.raises(ValueError, match="two views or more"):
        metrics.alignment(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="two images or more, got 1"):
        metrics.lidar(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[2, 4\]"):
        metrics.pair_means(torch.zeros(3, 4), torch.zeros(2, 4))


def test_what_is_not_finite_is_no_number_and_does_not_raise() -> None:
    x = torch.eye(8)
    x[2, 3] = math.inf
    for name, metric in OF_MATRICES.items():
        if name not in ("alpha_req", "effective_rank"):
            assert not math.isfinite(float(metric(x))), name
    assert math.isnan(metrics.effective_rank(metrics.Spectrum.of(x)))

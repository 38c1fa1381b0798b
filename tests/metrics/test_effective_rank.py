"""Effective rank: closed forms, the two routes, one process and several."""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.metrics import effective_rank, mutual_information
from ddp_ssl.metrics.effective_rank import global_matrix, rank_of_gram
from tests.losses import oracles
from tests.metrics.spectra import embeddings, with_spectrum
from tests.ranks import Ranks


def entropy_rank(p: list[float]) -> float:
    return math.exp(-sum(x * math.log(x) for x in p))


def test_closed_forms() -> None:
    flat = with_spectrum(torch.ones(7, dtype=torch.float64), 20, 12)
    assert float(effective_rank(flat)) == pytest.approx(7, rel=1e-9)
    one = with_spectrum(torch.tensor([3.0], dtype=torch.float64), 20, 12)
    assert float(effective_rank(one)) == pytest.approx(1, rel=1e-9)
    halves = with_spectrum(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64), 9, 30)
    assert float(effective_rank(halves)) == pytest.approx(entropy_rank([0.5, 0.25, 0.25]))
    assert float(effective_rank(torch.zeros(4, 3))) == 0
    assert float(effective_rank(1e-3 * halves)) == pytest.approx(float(effective_rank(halves)))


def test_power_law_from_singular_values_not_eigenvalues() -> None:
    """Spectrum k^-1/2, 256 values: 209.0 from the singular values, 74.6 from their squares."""
    sigma = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    assert float(effective_rank(with_spectrum(sigma, 300, 400))) == pytest.approx(209.0, abs=0.05)


def test_not_centred_and_shape_checked() -> None:
    x = torch.randn(50, 4, dtype=torch.float64) * 1e-3 + 1
    assert float(effective_rank(x)) < 1.1
    assert float(effective_rank(x - x.mean(0))) > 3.5
    with pytest.raises(ValueError, match=r"expected a matrix \[M, d\]"):
        effective_rank(torch.zeros(2, 3, 4))


def test_gram_route_needs_the_bound() -> None:
    x = torch.randn(20, 60, dtype=torch.float64)
    assert float(rank_of_gram(x.T @ x, 20)) == pytest.approx(float(effective_rank(x)), rel=1e-9)


def ranks_of(world: World, view_shards: int, shape: tuple[int, int], center: bool) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    x = embeddings(*shape)[comm.rows(shape[0] // comm.data_shards)]
    if comm.view_rank:  # other views than view 0 must not count
        x = torch.randn_like(x)
    routes = ("gather", "gram", "auto")
    found = [global_matrix(x.clone(), route, center, comm) for route in routes]  # type: ignore[arg-type]
    return [(matrix.effective_rank(), matrix.bound) for matrix in found]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(24, 10), (12, 30)])
def test_routes_and_processes_agree(ranks: Ranks, shape: tuple[int, int], center: bool) -> None:
    x = embeddings(*shape)
    expected = float(effective_rank(x - x.mean(0) if center else x))
    bound = min(shape[0] - center, shape[1])
    for size, view_shards in ((1, 1), (2, 1), (3, 1), (4, 1), (4, 2)):
        results = ranks.run(ranks_of, size, view_shards, shape, center)
        assert all(result == results[0] for result in results)  # the same bits everywhere
        for value, limit in results[0]:
            assert value == pytest.approx(expected, rel=1e-10 if not center else 1e-6)
            assert limit == bound


def decomposed_by_each(world: World, route: Any, rows: int, center: bool) -> list[float]:
    comm = comm_of(world)
    x = [embeddings(rows, 10) ** (1 + i % 2) for i in range(3)]
    grad = torch.is_grad_enabled()
    found = []
    for batch in x:
        matrix = global_matrix(batch[comm.rows(rows // world.size)], route, center, comm)
        assert torch.is_grad_enabled() == grad
        found.append(matrix.effective_rank())
    return found


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("route", "rows"), [("gather", 24), ("gram", 24), ("gram", 8)])
def test_every_process_gets_the_whole_matrix(
    ranks: Ranks, route: str, rows: int, center: bool
) -> None:
    """So rank 0 can decompose it alone; the bits are the same on all."""
    x = [embeddings(rows, 10) ** (1 + i % 2) for i in range(3)]
    expected = [float(effective_rank(b - b.mean(0) if center else b)) for b in x]
    for size in (1, 2, 4):
        results = ranks.run(decomposed_by_each, size, route, rows, center)
        assert all(values == results[0] for values in results)
        assert results[0] == pytest.approx(expected, rel=1e-6 if center else 1e-9)


def test_auto_gathers_few_rows_only() -> None:
    module = sys.modules[global_matrix.__module__]
    with (
        patch.object(module, "GATHERED", 40),
        patch.object(module, "rank_of_gram", wraps=rank_of_gram) as gram,
    ):
        global_matrix(torch.randn(8, 4)).effective_rank()
        assert not gram.called
        global_matrix(torch.randn(40, 4)).effective_rank()
        assert gram.called


def blocked(world: World) -> float:
    r, z = embeddings(30, 7), embeddings(30, 5) - 0.4
    return mutual_information(r, z, comm=comm_of(world), chunk=4)


def test_blocked_mutual_information(ranks: Ranks) -> None:
    expected = oracles.mutual_information(embeddings(30, 7)[None], (embeddings(30, 5) - 0.4)[None])
    for size in (1, 3):
        for value in ranks.run(blocked, size):
            assert value == pytest.approx(expected, rel=1e-12)

"""SwAV, DINO and DeepCluster v2: formulas, lightly, edges, several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import deepclusterv2, dino, sinkhorn, spherical_kmeans, swav
from ddp_ssl.losses.common import unit_rows
from tests.helpers import relative
from tests.losses import oracles
from tests.losses.inputs import same, some
from tests.ranks import Ranks

# --- definitions -----------------------------------------------------------------------------


def test_swav_is_the_formula() -> None:
    q = some(6, 4, seed=1).softmax(1)

    def expected(scores: Tensor) -> Tensor:
        terms = [oracles.cross_entropy(a, b / 0.1) for a, b in zip(q, scores, strict=True)]
        return torch.stack(terms).mean()

    same(lambda scores: swav(scores, q, 0.1), expected, 0.3 * some(6, 4))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_formula_and_balances(iterations: int) -> None:
    scores = 0.2 * some(8, 4)
    q = sinkhorn(scores, 0.1, iterations)
    assert relative(q, oracles.sinkhorn(scores, 0.1, iterations)) < 1e-12
    assert torch.allclose(q.sum(1), torch.ones(8, dtype=torch.float64))
    balanced = sinkhorn(scores, 0.1, 200)
    assert torch.allclose(balanced.sum(0), torch.full((4,), 2.0, dtype=torch.float64))
    assert not torch.allclose(q.sum(0), balanced.sum(0), rtol=1e-3)


def test_sinkhorn_of_several_views_balances_each_on_its_own() -> None:
    scores = 0.2 * some(3, 8, 4)
    together = sinkhorn(scores, 0.1, 3)
    for view, q in zip(scores, together, strict=True):
        assert torch.equal(q, sinkhorn(view, 0.1, 3))


def test_sinkhorn_in_half_precision_and_of_an_unused_prototype() -> None:
    scores = torch.full((6, 3), 1.0, dtype=torch.bfloat16)
    scores[:, 2] = -30  # exp(-600)
    q = sinkhorn(scores, 0.05, 3)
    assert q.dtype == torch.float32
    far = torch.tensor([[1.0, 0.9], [0.1, 0.0]])  # the second row is exp(-90) of the first
    assert torch.allclose(sinkhorn(far, 0.01, 3).sum(1), torch.ones(2))
    assert torch.isfinite(q).all()
    assert torch.allclose(q.sum(1), torch.ones(6))


@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_dino_is_the_formula(teachers: int) -> None:
    teacher, center = some(teachers, 5, 4, seed=1), some(4, seed=2)
    same(
        lambda student: dino(student, teacher, center, 0.3, 0.2),
        lambda student: oracles.dino(student, teacher, center, 0.3, 0.2),
        some(3, 5, 4),
    )


def test_dino_of_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match="2 views or more"):
        dino(some(1, 3, 4), some(1, 3, 4), some(4), 0.1, 0.1)


def test_deepclusterv2_is_the_cross_entropy_of_the_images_that_have_a_cluster() -> None:
    clusters = torch.tensor([2, -1, 0, 3, -1])

    def expected(scores: Tensor) -> Tensor:
        terms = [
            oracles.cross_entropy(torch.eye(4).double()[clusters[i]], view[i] / 0.1)
            for view in scores
            for i in (0, 2, 3)
        ]
        return torch.stack(terms).mean()

    same(lambda scores: deepclusterv2(scores, clusters, 0.1), expected, 0.3 * some(3, 5, 4))


def test_images_without_a_cluster_give_a_loss_of_zero() -> None:
    scores = some(2, 3, 4, grad=True)
    loss = deepclusterv2(scores, torch.full((3,), -1), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(scores.grad.abs().max()) == 0


def test_kmeans_is_the_formula() -> None:
    rows = unit_rows(some(40, 5))
    centroids, nearest = spherical_kmeans(rows, rows[:6], 4)
    expected, theirs = oracles.spherical_kmeans(rows, rows[:6], 4)
    assert relative(centroids, expected) < 1e-12
    assert nearest.tolist() == theirs


def test_kmeans_finds_clusters_and_keeps_an_empty_one() -> None:
    around = torch.eye(3, 5, dtype=torch.float64).repeat_interleave(20, 0)
    rows = unit_rows(around + 0.02 * some(60, 5))
    away = -torch.eye(5, dtype=torch.float64)[4:]
    centroids, nearest = spherical_kmeans(rows, torch.cat([rows[[0, 20, 40]], away]), 5)
    assert nearest.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert torch.equal(centroids[3:], away)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_losses_ignore_autocast() -> None:
    scores, q = 0.3 * some(6, 4).float(), some(6, 4, seed=1).softmax(1).float()
    three, ids = 0.3 * some(3, 6, 4).float(), torch.tensor([0, 1, 2, 3, 0, 1])

    def values() -> list[Tensor]:
        return [
            swav(scores, q, 0.1),
            sinkhorn(scores),
            dino(three, three[:2], scores[0], 0.1, 0.04),
            deepclusterv2(three, ids, 0.1),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        inside = values()
    assert all(torch.equal(a, b) for a, b in zip(inside, values(), strict=True))


def test_temperatures_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        swav(some(3, 4), some(3, 4), 0.0)
    with pytest.raises(ValueError, match=r"one shape \[N, P\]"):
        swav(some(3, 4), some(4, 4), 0.1)
    with pytest.raises(ValueError, match=r"teacher \[V_t, N, P\]"):
        dino(some(2, 3, 4), some(2, 3, 5), some(4), 0.1, 0.1)


# --- an independent implementation -----------------------------------------------------------


def test_swav_and_sinkhorn_are_lightlys() -> None:
    from lightly.loss import SwaVLoss
    from lightly.loss.swav_loss import sinkhorn as theirs

    scores = 0.3 * some(4, 6, 5)
    assert relative(sinkhorn(scores[0], 0.05, 3), theirs(scores[0].clone())) < 1e-12

    def ours(scores: Tensor) -> Tensor:
        q = sinkhorn(scores[:2].detach())
        pairs = [swav(scores[v], q[a], 0.1) for a in range(2) for v in range(4) if v != a]
        return torch.stack(pairs).mean()

    same(ours, lambda x: SwaVLoss()([x[0], x[1]], [x[2], x[3]]).squeeze(), scores)


def test_dino_is_lightlys() -> None:
    from lightly.loss import DINOLoss

    theirs = DINOLoss(4, student_temp=0.2).double()
    theirs.center.copy_(0.1 * some(4, seed=2))
    teacher = some(2, 5, 4, seed=1)
    same(
        lambda x: dino(x, teacher, 0.1 * some(4, seed=2), 0.2, 0.06),
        lambda x: _once(theirs, list(teacher), list(x), teacher_temp=0.06),
        some(3, 5, 4),
    )


def _once(loss: Any, *args: Any, **options: Any) -> Tensor:
    """lightly's loss moves its centre."""
    center = loss.center.clone()
    value: Tensor = loss(*args, **options)
    loss.center = center
    return value


# --- several processes -----------------------------------------------------------------------


def shared(world: World, view_shards: int) -> Any:
    """Everything of these losses that crosses processes, from different images on each."""
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    rows, scores = comm.rows(12 // comm.data_shards), 0.3 * some(4, 12, 5)
    mine = scores[comm.views, rows].clone().requires_grad_()
    q = sinkhorn(mine.detach(), 0.1, 3, comm)
    clusters = torch.tensor([0, 1, -1, 2, 3, 4, -1, -1, 2, 0, 1, 3])[rows]
    teacher = some(4, 12, 5, seed=1)[:, rows]
    losses = [
        deepclusterv2(mine, clusters, 0.1, comm),
        dino(mine, teacher, some(5, seed=2), 0.3, 0.2, comm),
    ]
    gradients = [torch.autograd.grad(loss, mine)[0] for loss in losses]
    # 13 rows: shares of different sizes.
    all_rows = unit_rows(some(13, 5, seed=3))
    share = all_rows[comm.rank :: comm.world_size]
    centroids, nearest = spherical_kmeans(share, all_rows[:4], 3, comm)
    return [float(loss.detach()) for loss in losses], gradients, q, centroids, nearest


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
def test_over_processes_they_are_the_large_batchs(
    ranks: Ranks, size: int, view_shards: int
) -> None:
    ((losses, gradients, q, centroids, nearest),) = ranks.run(shared, 1, 1)
    results = ranks.run(shared, size, view_shards)
    n = 12 // (size // view_shards)
    for index, loss in enumerate(losses):
        mean = sum(r[0][index] for r in results) / size
        assert mean == pytest.approx(loss, rel=1e-12)
    for rank, (_, grads, own, centers, clusters) in enumerate(results):
        place = (
            slice(rank % view_shards, None, view_shards),
            slice(rank // view_shards * n, (rank // view_shards + 1) * n),
        )
        assert relative(own, q[place]) < 1e-12
        for mine, whole in zip(grads, gradients, strict=True):
            assert relative(mine / size, whole[place]) < 1e-10
        assert relative(centers, centroids) < 1e-12
        assert torch.equal(clusters, nearest[rank::size])

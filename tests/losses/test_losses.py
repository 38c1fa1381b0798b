"""The losses against literal formulas, at their edges, and over several processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddp_ssl.distributed import MeshComm, World, comm_of, comm_stats
from ddp_ssl.losses import barlow_twins, info_nce, mutual_information, vicreg
from ddp_ssl.losses.common import unit_rows
from tests.helpers import relative
from tests.losses import oracles
from tests.losses.inputs import some
from tests.ranks import Ranks

# --- definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_info_nce_is_the_formula(views: int, temperature: float) -> None:
    z = some(views, 7, 5)
    expected = oracles.info_nce(z, temperature)
    assert float(info_nce(z, temperature)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("n", "d"), [(7, 4), (4, 7)])
@pytest.mark.parametrize("route", ["gather", "moments"])
def test_vicreg_is_the_formula(views: int, n: int, d: int, route: Any) -> None:
    z = 0.5 * some(views, n, d)
    out = vicreg(z, route=route)
    invariance, variance, covariance = oracles.vicreg(z)
    assert float(out.invariance) == pytest.approx(invariance, rel=1e-12)
    assert float(out.variance) == pytest.approx(variance, rel=1e-12)
    assert variance > 0
    assert float(out.covariance) == pytest.approx(covariance, rel=1e-12)
    expected = 25 * invariance + 25 * variance + covariance
    assert float(out.loss) == pytest.approx(expected, rel=1e-12)
    weighted = vicreg(z, 1.0, 2.0, 3.0, average_variance=True, route=route)
    assert float(weighted.loss) == pytest.approx(
        invariance + 2 * variance / 2 + 3 * covariance, rel=1e-12
    )


@pytest.mark.parametrize("views", [2, 3])
def test_mutual_information_is_the_formula(views: int) -> None:
    r, z = some(views, 6, 9), some(views, 6, 4, seed=1)
    expected = oracles.mutual_information(r, z)
    assert float(mutual_information(r, z)) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < math.log(views * 6)


def test_mutual_information_of_features() -> None:
    r, z = some(2, 6, 4), some(2, 6, 4, seed=1)
    a, b = (x.flatten(0, 1) / x.flatten(0, 1).norm(dim=0) for x in (r, z))
    a, b = a.T @ a, b.T @ b
    expected = oracles.renyi2(a) + oracles.renyi2(b) - oracles.renyi2(a * b)
    assert float(mutual_information(r, z, "cov")) == pytest.approx(expected, rel=1e-12)


def test_mutual_information_bounds() -> None:
    eye = torch.eye(8, dtype=torch.float64).view(2, 4, 8)
    assert float(mutual_information(eye, eye)) == pytest.approx(math.log(8))
    constant = torch.ones(2, 4, 3, dtype=torch.float64)
    assert float(mutual_information(some(2, 4, 5), constant)) == pytest.approx(0, abs=1e-12)


def test_gradients_by_finite_differences() -> None:
    z, r = some(3, 4, 3, grad=True), some(3, 4, 5, seed=1, grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: info_nce(x, 0.3), z)
    assert check(lambda x: vicreg(x).loss, z)
    assert check(lambda x: vicreg(x, route="moments").loss, z)
    assert check(mutual_information, (r, z))


# --- edges -----------------------------------------------------------------------------------


def test_info_nce_of_one_image_is_zero_with_finite_gradient() -> None:
    z = some(2, 1, 5, grad=True)
    with pytest.warns(UserWarning, match="one image has no negatives"):
        loss = info_nce(z, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.isfinite(z.grad).all()


def test_info_nce_survives_zero_rows_half_precision_and_a_low_temperature() -> None:
    z = some(2, 6, 5)
    z[0, 2] = 0
    z = z.half().requires_grad_()
    loss = info_nce(z, 0.01)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_vicreg_survives_a_dead_dimension() -> None:
    z = some(2, 6, 5)
    z[:, :, 1] = 3
    z.requires_grad_()
    out = vicreg(z)
    out.loss.backward()
    assert torch.isfinite(z.grad).all()
    with pytest.raises(ValueError, match="2 images or more"):
        vicreg(some(2, 1, 5))
    with pytest.raises(ValueError, match="2 views or more"):
        vicreg(some(1, 4, 5))


def test_mutual_information_survives_zero_rows() -> None:
    r, z = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True)
    mutual_information(r, z).backward()
    assert torch.isfinite(r.grad).all()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected z of shape \[K, N, d\]"):
        info_nce(some(4, 5), 0.1)
    with pytest.raises(ValueError, match=r"expected z of shape \[K, N, d\]"):
        vicreg(some(4, 5))
    with pytest.raises(ValueError, match="equal widths, got 4 and 5"):
        mutual_information(some(2, 3, 4), some(2, 3, 5), "cov")


def test_losses_ignore_autocast() -> None:
    z = some(2, 6, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(z, 0.1), vicreg(z).loss, mutual_information(z, z)
    outside = info_nce(z, 0.1), vicreg(z).loss, mutual_information(z, z)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


# --- several processes -----------------------------------------------------------------------


def local_losses(world: World, view_shards: int) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    n = 12 // comm.data_shards
    z = some(4, 12, 10)[comm.views, comm.rows(n)].clone().requires_grad_()
    r = some(4, 12, 6, seed=1)[comm.views, comm.rows(n)].clone().requires_grad_()
    wide = some(4, 12, 10, seed=2)[comm.views, comm.rows(n)]
    losses = [
        info_nce(z, 0.2, comm),
        vicreg(z, comm=comm).loss,
        vicreg(z, comm=comm, route="moments").loss,
        mutual_information(r, z, comm=comm),
        mutual_information(wide, z, "cov", comm=comm),
    ]
    gradients = [
        torch.autograd.grad(loss, (z, r), allow_unused=True, retain_graph=True) for loss in losses
    ]
    return [float(loss) for loss in losses], gradients


@pytest.mark.parametrize(
    ("size", "view_shards"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)]
)
def test_losses_over_processes_are_the_large_batchs(
    ranks: Ranks, size: int, view_shards: int
) -> None:
    """mean_r l_r is the loss, and its gradient with respect to what each rank holds."""
    z, r = some(4, 12, 10, grad=True), some(4, 12, 6, seed=1, grad=True)
    wide = some(4, 12, 10, seed=2)
    expected = [
        info_nce(z, 0.2),
        vicreg(z).loss,
        vicreg(z).loss,
        mutual_information(r, z),
        mutual_information(wide, z, "cov"),
    ]
    results = ranks.run(local_losses, size, view_shards)
    shards, n = size // view_shards, 12 // (size // view_shards)
    for index, loss in enumerate(expected):
        mean = sum(losses[index] for losses, _ in results) / size
        assert mean == pytest.approx(float(loss.detach()), rel=1e-12)
        whole = torch.autograd.grad(loss, (z, r), allow_unused=True, retain_graph=True)
        for part, gradient in enumerate(whole):
            if gradient is None:
                continue
            for rank in range(size):
                mine = results[rank][1][index][part] / size  # as DDP averages
                place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
                held = gradient[rank % view_shards :: view_shards, place]
                assert relative(mine, held) < 1e-10, (index, part, rank, shards)


def half_gradients(world: World) -> Any:
    """Gradients with respect to bf16 embeddings, of losses whose cotangents come from all ranks."""
    comm = comm_of(world)
    z = some(2, 256, 8)[:, comm.rows(256 // world.size)].bfloat16().requires_grad_()
    total = info_nce(z, 0.2, comm) + vicreg(z, comm=comm).loss
    total = total + mutual_information(z, z, comm=comm)
    return torch.autograd.grad(total, z)[0].double() / world.size


def test_cotangents_of_half_precision_embeddings_are_summed_in_float32(ranks: Ranks) -> None:
    (whole,) = ranks.run(half_gradients, 1)
    parts = torch.cat(ranks.run(half_gradients, 4), 1)
    # One rounding to bf16 at the end on both sides, none in between.
    assert (parts - whole).abs().max() <= 2**-7 * whole.abs().max()
    assert relative(parts, whole) < 2**-8


def what_is_sent(world: World, dtype: torch.dtype, view_shards: int) -> Any:
    """Values, gathered bytes and gradients of the losses that gather embeddings."""
    comm = comm_of(world, view_shards)
    n, rank = 24 * view_shards // world.size, comm.data_rank
    whole = some(2, 24, 32).bfloat16()
    z = whole[comm.views, rank * n : (rank + 1) * n].to(dtype).requires_grad_()
    found = []
    for loss in (
        lambda: info_nce(z, 0.2, comm),
        lambda: info_nce(z, 0.01, comm),
        lambda: mutual_information(z, z, comm=comm),
        lambda: vicreg(z, comm=comm, route="gather").loss,
        lambda: barlow_twins(z, comm=comm, route="gather"),
    ):
        before = comm_stats.counts.get("gather", (0, 0))[1]
        value = loss()
        nbytes = comm_stats.counts.get("gather", (0, 0))[1] - before
        (gradient,) = torch.autograd.grad(value, z)
        found.append((float(value.detach()), nbytes, gradient.double() / world.size))
    return found


@pytest.mark.parametrize("view_shards", [1, 2])
def test_half_precision_is_gathered_as_it_is(ranks: Ranks, view_shards: int) -> None:
    (alone,) = ranks.run(what_is_sent, 1, torch.float32, 1)
    wide = ranks.run(what_is_sent, 4, torch.float32, view_shards)
    rows = 2 * 24 * 32
    weights = 2 * 2 * 24  # of InfoNCE
    for rank, half in enumerate(ranks.run(what_is_sent, 4, torch.bfloat16, view_shards)):
        n, place = 24 * view_shards // 4, rank // view_shards
        for (value, _, grad), (same, _, _), (one, _, whole) in zip(
            half, wide[0], alone, strict=True
        ):
            assert value == pytest.approx(same, rel=1e-6)
            assert value == pytest.approx(one, rel=1e-5)
            held = whole[rank % view_shards :: view_shards, place * n : (place + 1) * n]
            assert relative(grad, held) < 2**-8  # one rounding to bf16
        assert [nbytes for _, nbytes, _ in half] == [
            2 * rows + 4 * weights, 2 * rows + 8 * weights, 2 * 2 * rows, 2 * rows, 2 * rows,
        ]  # fmt: skip
    assert [nbytes for _, nbytes, _ in wide[0]] == [
        4 * rows + 4 * weights, 4 * rows + 8 * weights, 2 * 4 * rows, 4 * rows, 4 * rows,
    ]  # fmt: skip


def test_unit_rows() -> None:
    x = some(5, 3, grad=True)
    with torch.no_grad():
        x[1] = 0
        x[2] *= 1e-14
    unit = unit_rows(x)
    assert torch.equal(unit[1:3], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(unit[3], x[3] / x[3].norm())
    (grad,) = torch.autograd.grad(unit.pow(3).sum(), x)
    assert torch.equal(grad[1:3], torch.zeros(2, 3, dtype=torch.float64))
    plain = x[3].detach().requires_grad_()
    (expected,) = torch.autograd.grad((plain / plain.norm()).pow(3).sum(), plain)
    torch.testing.assert_close(grad[3], expected)
    half = some(4, 64).bfloat16()
    torch.testing.assert_close(unit_rows(half), unit_rows(half.float()), rtol=3e-7, atol=0)
    assert unit_rows(half).dtype == torch.float32
    broken = torch.tensor([[math.nan, 1.0]])
    assert unit_rows(broken).isnan().all()

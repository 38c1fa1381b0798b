"""Barlow Twins, multi-view VICReg and MMCR: formulas, lightly, edges, several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import (
    barlow_twins,
    barlow_twins_multiview,
    mmcr,
    vicreg,
    vicreg_multiview,
)
from ddp_ssl.losses.common import unit_rows
from tests.helpers import relative
from tests.losses import oracles
from tests.losses.inputs import Loss, same, some
from tests.ranks import Ranks

# --- definitions -----------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize(("views", "n", "d"), [(2, 7, 4), (2, 4, 7), (3, 7, 4), (4, 4, 7)])
ROUTES = pytest.mark.parametrize("route", ["gather", "moments"])


@SHAPES
@ROUTES
def test_barlow_twins_is_the_formula(views: int, n: int, d: int, route: Any) -> None:
    same(
        lambda z: barlow_twins(z, 0.02, 0.3, route=route),
        lambda z: oracles.barlow_twins(z, 0.02, 0.3),
        some(views, n, d),
    )
    z = some(views, n, d)
    assert float(barlow_twins(z)) == pytest.approx(float(barlow_twins(z, 0.0051, 0.1)))


@SHAPES
@ROUTES
def test_multiview_barlow_twins_is_fastssls(views: int, n: int, d: int, route: Any) -> None:
    same(
        lambda z: barlow_twins_multiview(z, 0.02, route=route),
        lambda z: oracles.barlow_twins_multiview(z, 0.02),
        some(views, n, d),
    )


@pytest.mark.parametrize("loss", [vicreg, vicreg_multiview])
def test_of_vicregs_figures_the_loss_alone_has_a_gradient(loss: Any) -> None:
    found = loss(some(3, 7, 4).requires_grad_())
    assert [x.requires_grad for x in found] == [True, False, False, False]


@SHAPES
@ROUTES
def test_multiview_vicreg_is_fastssls(views: int, n: int, d: int, route: Any) -> None:
    weights = (3.0, 5.0, 2.0)
    z = 0.5 * some(views, n, d)
    same(
        lambda z: vicreg_multiview(z, *weights, route=route).loss,
        lambda z: oracles.vicreg_multiview(z, weights),
        z,
    )
    out = vicreg_multiview(z, *weights, route=route)
    assert out.variance > 0
    total = 3 * out.invariance + 5 * out.variance + 2 * out.covariance
    assert float(total) == pytest.approx(float(out.loss))


@pytest.mark.parametrize(("views", "n", "d"), [(2, 7, 4), (3, 4, 7), (5, 6, 6)])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_mmcr_is_the_formula(views: int, n: int, d: int, weight: float) -> None:
    same(lambda z: mmcr(z, weight), lambda z: oracles.mmcr(z, weight), some(views, n, d))


def test_two_views_of_the_multiview_losses_keep_their_own_branch() -> None:
    """At K = 2 views against their mean would be another loss than view against view."""
    z = some(2, 8, 5)
    halves = torch.cat([z, z])  # the same two views twice: the mean of four is the mean of two
    assert float(barlow_twins_multiview(z, 0.02)) != pytest.approx(
        float(barlow_twins_multiview(halves, 0.02)), rel=1e-2
    )


def test_the_published_gradient_of_barlow_twins_is_a_scale() -> None:
    z = some(2, 6, 4, grad=True)
    (ours,) = torch.autograd.grad(barlow_twins(z), z)
    (published,) = torch.autograd.grad(barlow_twins(z, scale=0.1 / 2), z)
    assert relative(published, ours / 2) < 1e-12


def test_singular_values_that_coincide_have_a_finite_gradient() -> None:
    z = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)  # all singular values are one
    z = torch.cat([z, torch.zeros(2, 3, 4, dtype=torch.float64)], 1).requires_grad_()
    mmcr(z, 0.5).backward()
    assert torch.isfinite(z.grad).all()


def test_a_dead_feature_has_a_finite_gradient() -> None:
    z = some(3, 6, 5)
    z[:, :, 1] = 0
    losses: list[Loss] = [
        barlow_twins,
        lambda z: barlow_twins_multiview(z, 0.1),
        lambda z: vicreg_multiview(z).loss,
        mmcr,
    ]
    for loss in losses:
        x = z.clone().requires_grad_()
        loss(x).backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    "loss", [barlow_twins, lambda z: barlow_twins_multiview(z, 0.1), vicreg_multiview]
)
def test_what_has_no_statistics_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="2 images or more"):
        loss(some(2, 1, 5))
    with pytest.raises(ValueError, match="2 views or more"):
        loss(some(1, 4, 5))
    with pytest.raises(ValueError, match=r"expected z of shape \[K, N, d\]"):
        loss(some(4, 5))


def test_losses_ignore_autocast() -> None:
    z = some(3, 6, 5).float()
    losses: list[Loss] = [
        barlow_twins,
        lambda z: barlow_twins_multiview(z, 0.1),
        lambda z: vicreg_multiview(z).loss,
        mmcr,
    ]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [loss(z.bfloat16()) for loss in losses]
    for loss, value in zip(losses, inside, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(z.bfloat16().float()))


# --- an independent implementation -----------------------------------------------------------


def test_barlow_twins_is_lightlys() -> None:
    from lightly.loss import BarlowTwinsLoss

    theirs = BarlowTwinsLoss(lambda_param=0.01)
    same(lambda z: barlow_twins(z, 0.01, 1.0), lambda z: theirs(z[0], z[1]), some(2, 8, 5))


def test_vicreg_is_lightlys() -> None:
    """lightly averages the hinge over the views, as the official code and fastssl do."""
    from lightly.loss import VICRegLoss

    theirs = VICRegLoss()
    z = 0.4 * some(2, 8, 5)
    same(lambda z: vicreg(z, average_variance=True).loss, lambda z: theirs(z[0], z[1]), z)
    same(lambda z: vicreg_multiview(z, eps=1e-4).loss, lambda z: theirs(z[0], z[1]), z)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_mmcr_of_what_is_not_finite_is_nan(weight: float) -> None:
    """And so is its gradient; the recorder ends the run with one line."""
    z = torch.ones(2, 4, 3)
    z[0, 1, 2] = torch.inf
    z.requires_grad_()
    loss = mmcr(z, weight)
    loss.backward()
    assert loss.isnan()
    assert z.grad is not None
    assert z.grad.isnan().any()


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_mmcr_is_lightlys(weight: float) -> None:
    """lightly leaves the normalisation to the caller and has images first."""
    from lightly.loss.mmcr_loss import MMCRLoss

    def theirs(z: Tensor) -> Tensor:
        z = unit_rows(z).transpose(0, 1)
        loss: Tensor = MMCRLoss(weight)(z[:, :2], z[:, 2:])
        return loss

    same(lambda z: mmcr(z, weight), theirs, some(4, 8, 5))


# --- several processes -----------------------------------------------------------------------


def losses_of(z: Tensor, comm: Comm = ONE_PROCESS) -> list[Tensor]:
    return [
        loss
        for route in ("gather", "moments")
        for loss in (
            barlow_twins(z, route=route, comm=comm),  # type: ignore[arg-type]
            barlow_twins_multiview(z, 0.1, route=route, comm=comm),  # type: ignore[arg-type]
            vicreg_multiview(z, route=route, comm=comm).loss,  # type: ignore[arg-type]
        )
    ] + [mmcr(z, 0.3, comm=comm)]


def local_losses(world: World, view_shards: int) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    z = some(4, 12, 10)[comm.views, comm.rows(12 // comm.data_shards)].clone().requires_grad_()
    losses = losses_of(z, comm)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    return [float(loss.detach()) for loss in losses], gradients


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
def test_over_processes_they_are_the_large_batchs(
    ranks: Ranks, size: int, view_shards: int
) -> None:
    z = some(4, 12, 10, grad=True)
    results = ranks.run(local_losses, size, view_shards)
    n = 12 // (size // view_shards)
    for index, loss in enumerate(losses_of(z)):
        mean = sum(losses[index] for losses, _ in results) / size
        assert mean == pytest.approx(float(loss.detach()), rel=1e-12)
        (whole,) = torch.autograd.grad(loss, z, retain_graph=True)
        for rank in range(size):
            mine = results[rank][1][index] / size  # as DDP averages
            place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
            held = whole[rank % view_shards :: view_shards, place]
            assert relative(mine, held) < 1e-10, (index, rank)

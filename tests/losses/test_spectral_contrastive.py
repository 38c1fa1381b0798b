"""The spectral contrastive loss against a naive loop, its source's formula, and over processes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import spectral_contrastive
from ddp_ssl.losses.common import Route
from tests.helpers import relative
from tests.losses import oracles
from tests.losses.inputs import some
from tests.ranks import Ranks


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("n", "d"), [(7, 4), (4, 7)])
@pytest.mark.parametrize("route", ["gather", "moments"])
def test_value_and_gradient_are_those_of_the_loop(views: int, n: int, d: int, route: Any) -> None:
    z = some(views, n, d, grad=True)
    expected = oracles.spectral_contrastive(z)
    found = spectral_contrastive(z, route=route)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (found, expected)]
    assert relative(*gradients) < 1e-12
    assert torch.autograd.gradcheck(lambda x: spectral_contrastive(x, route=route), z)


def test_two_views_are_the_published_code() -> None:
    """-2 mean(z1 z2) d, and the mean square of the products without their diagonal, n / (n-1)."""
    z = some(2, 6, 3)
    products = z[0] @ z[1].T
    squares = products.square().fill_diagonal_(0)
    expected = squares.mean() * 6 / 5 - 2 * (z[0] * z[1]).mean() * 3
    assert float(spectral_contrastive(z)) == pytest.approx(float(expected), rel=1e-13)


def test_the_mean_over_batches_is_the_loss_of_the_distribution() -> None:
    """Two images, three looks: of all batches of two independent pairs of augmentations."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
    f = some(3, 2)
    joint = p.T @ p / 2
    marginal = joint.sum(0)
    whole = ((f @ f.T).square() * marginal[:, None] * marginal).sum() - 2 * (
        joint * (f @ f.T)
    ).sum()
    mean = f.new_zeros(())
    for a, b, c, e in product(range(3), repeat=4):
        z = torch.stack([f[[a, c]], f[[b, e]]])
        mean += joint[a, b] * joint[c, e] * spectral_contrastive(z)
    assert float(mean) == pytest.approx(float(whole), rel=1e-12)


def test_edges() -> None:
    with pytest.raises(ValueError, match=r"expected z of shape \[K, N, d\]"):
        spectral_contrastive(some(4, 5))
    with pytest.raises(ValueError, match="2 views or more"):
        spectral_contrastive(some(1, 4, 5))
    with pytest.raises(ValueError, match="2 images or more"):
        spectral_contrastive(some(2, 1, 5))
    z = some(2, 6, 5).half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = spectral_contrastive(z)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, spectral_contrastive(z))
    loss.backward()
    assert torch.isfinite(z.grad).all()


# --- several processes -----------------------------------------------------------------------


def local_losses(world: World, view_shards: int) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    z = some(4, 12, 10)[comm.views, comm.rows(12 // comm.data_shards)].clone().requires_grad_()
    found = []
    routes: list[Route] = ["gather", "moments"]
    for route in routes:
        loss = spectral_contrastive(z, route=route, comm=comm)
        found.append((float(loss.detach()), torch.autograd.grad(loss, z)[0]))
    return found


@pytest.mark.parametrize(
    ("size", "view_shards"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)]
)
def test_over_processes_it_is_the_large_batchs(ranks: Ranks, size: int, view_shards: int) -> None:
    """The loss on every rank, and its gradient with respect to what each rank holds."""
    z = some(4, 12, 10, grad=True)
    expected = oracles.spectral_contrastive(z)
    (gradient,) = torch.autograd.grad(expected, z)
    n = 12 * view_shards // size
    for rank, routes in enumerate(ranks.run(local_losses, size, view_shards)):
        place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
        held = gradient[rank % view_shards :: view_shards, place]
        for value, mine in routes:
            assert value == pytest.approx(float(expected.detach()), rel=1e-12)
            assert relative(mine / size, held) < 1e-10, rank  # as DDP averages

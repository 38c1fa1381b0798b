"""BYOL, SimSiam, MoCo v2+ and v3, NNCLR, ReSSL: formulas, lightly, edges, several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import NNMemoryBankModule
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import byol, moco, mocov3, nearest_rows, nnclr, ressl, simsiam
from ddp_ssl.losses.common import unit_rows
from tests.helpers import relative
from tests.losses import oracles
from tests.losses.inputs import some
from tests.ranks import Ranks

Loss = Callable[..., Tensor]
QUEUE = unit_rows(some(9, 5, seed=7))

# Name -> the loss of the side with gradient and of the other side, and its formula.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "byol": (byol, oracles.byol),
    "simsiam": (simsiam, oracles.simsiam),
    "moco": (
        lambda q, k: moco(q, k, QUEUE, 0.3),
        lambda q, k: oracles.moco(q, k, QUEUE, 0.3),
    ),
    "mocov3": (
        lambda q, k, comm=ONE_PROCESS: mocov3(q, k, 0.3, comm=comm),
        lambda q, k: oracles.mocov3(q, k, 0.3),
    ),
    "nnclr": (
        lambda p, nearest, comm=ONE_PROCESS: nnclr(nearest, p, 0.3, comm=comm),
        lambda p, nearest: oracles.nnclr(nearest, p, 0.3),
    ),
    "ressl": (
        lambda q, k: ressl(q, k, QUEUE, 0.3, 0.1),
        lambda q, k: oracles.ressl(q, k, QUEUE, 0.3, 0.1),
    ),
}
COUPLED = ("mocov3", "nnclr")


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_its_formula_and_the_target_has_no_gradient(name: str) -> None:
    ours, formula = LOSSES[name]
    p, z = some(7, 5, grad=True), some(7, 5, seed=1, grad=True)
    loss, expected = ours(p, z), formula(p, z)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    gradient, none = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert relative(gradient, torch.autograd.grad(expected, p)[0]) < 1e-12
    assert none is None


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_survives_zero_rows_half_precision_and_autocast(name: str) -> None:
    p, z = some(6, 5).half(), some(6, 5, seed=1).half()
    p[2], z[3] = 0, 0
    p.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name][0](p, z)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSSES[name][0](p, z))
    loss.backward()
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_and_temperatures_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=r"of one shape \[N, d\], got .*\[4, 5\] and .*\[3, 5\]"):
        LOSSES[name][0](
            *((some(3, 5), some(4, 5)) if name == "nnclr" else (some(4, 5), some(3, 5)))
        )
    with pytest.raises(ValueError, match=r"of one shape \[N, d\]"):
        LOSSES[name][0](some(2, 4, 5), some(2, 4, 5))


def test_queues_and_temperatures_are_checked() -> None:
    x = some(4, 5)
    for call in (lambda q: moco(x, x, q, 0.2), lambda q: ressl(x, x, q, 0.2, 0.1)):
        with pytest.raises(ValueError, match=r"expected queue \[Q, 5\], got \[9, 4\]"):
            call(some(9, 4))
    for bad in (
        lambda: moco(x, x, QUEUE, 0),
        lambda: mocov3(x, x, -1),
        lambda: nnclr(x, x, 0),
        lambda: ressl(x, x, QUEUE, 0.1, 0),
    ):
        with pytest.raises(ValueError, match="temperature must be positive"):
            bad()


def test_the_nearest_row_is_the_one_of_the_largest_cosine() -> None:
    z = some(2, 6, 5)
    found = nearest_rows(z, QUEUE)
    for row, neighbour in zip(z.flatten(0, 1), found.flatten(0, 1), strict=True):
        cosines = [float(oracles.cosine(row, other)) for other in QUEUE]
        assert torch.equal(neighbour, QUEUE[cosines.index(max(cosines))])
    assert len({tuple(row.tolist()) for row in found.flatten(0, 1)}) > 3


# --- lightly ---------------------------------------------------------------------------------


def same_as(ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)]
    assert relative(gradients[0], gradients[1]) < 1e-6


def test_cosine_losses_are_lightlys() -> None:
    p, z = some(7, 5, grad=True), some(7, 5, seed=1)
    same_as(simsiam(p, z), NegativeCosineSimilarity()(p, z), p)
    same_as(byol(p, z), 2 + 2 * NegativeCosineSimilarity()(p, z), p)


def test_moco_is_lightlys_nt_xent_with_a_memory_bank() -> None:
    q, k = some(7, 5, grad=True), some(7, 5, seed=1)
    theirs = NTXentLoss(0.3, memory_bank_size=(9, 5)).double()
    theirs.memory_bank.bank = QUEUE.clone()
    same_as(moco(q, k, QUEUE, 0.3), theirs(q, k), q)


def test_the_nearest_row_is_lightlys() -> None:
    theirs = NNMemoryBankModule((9, 5)).double()
    theirs.bank = QUEUE.clone()
    assert torch.equal(nearest_rows(some(6, 5), QUEUE), theirs(some(6, 5)))


# --- several processes -----------------------------------------------------------------------


def local_loss(world: World, view_shards: int) -> Any:
    """Each view shard takes another direction: view 0 against view 1, and the reverse."""
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    mine = comm.rows(12 // comm.data_shards)
    p = some(2, 12, 5)[comm.view_rank, mine].clone().requires_grad_()
    z = some(2, 12, 5, seed=1)[1 - comm.view_rank, mine]
    results = {}
    for name, (loss, _) in LOSSES.items():
        value = loss(p, z, comm) if name in COUPLED else loss(p, z)
        results[name] = float(value.detach()), torch.autograd.grad(value, p)[0]
    return results


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_losses_over_processes_are_the_large_batchs(
    ranks: Ranks, size: int, view_shards: int
) -> None:
    """mean_r l_r is the mean over the directions, and so is its gradient."""
    results = ranks.run(local_loss, size, view_shards)
    p, z = some(2, 12, 5, grad=True), some(2, 12, 5, seed=1)
    n = 12 // (size // view_shards)
    for name, (loss, _) in LOSSES.items():
        whole = sum(loss(p[v], z[1 - v]) for v in range(view_shards)) / view_shards
        mean = sum(result[name][0] for result in results) / size
        assert mean == pytest.approx(float(whole.detach()), rel=1e-12)
        (gradient,) = torch.autograd.grad(whole, p)
        for rank, result in enumerate(results):
            first = rank // view_shards * n
            held = gradient[rank % view_shards, first : first + n]
            assert relative(result[name][1] / size, held) < 1e-10, (name, rank)

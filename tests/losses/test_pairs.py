"""Sums over pairs in many blocks: equal to one block, on one process and on several."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.distributed import MeshComm, World
from ddp_ssl.losses import (
    barlow_twins,
    barlow_twins_multiview,
    info_nce,
    mutual_information,
    vicreg,
    vicreg_multiview,
)
from ddp_ssl.losses.kernels import gram as pairs
from tests.helpers import Operators, relative
from tests.losses.inputs import some
from tests.ranks import Ranks


def losses(z: Tensor, r: Tensor, comm: Comm = ONE_PROCESS, route: Any = "gather") -> list[Tensor]:
    return [
        info_nce(z, 0.2, comm),
        info_nce(z, 0.01, comm),
        mutual_information(r, z, comm=comm),
        vicreg(z, comm=comm, route=route).loss,
        vicreg_multiview(z, comm=comm, route=route).loss,
        barlow_twins(z, comm=comm, route=route),
        barlow_twins_multiview(z, 0.02, comm=comm, route=route),
    ]


def values_and_gradients(
    z: Tensor, r: Tensor, comm: Comm = ONE_PROCESS, route: Any = "gather"
) -> tuple[list[float], list[tuple[Tensor | None, ...]]]:
    z, r = z.clone().requires_grad_(), r.clone().requires_grad_()
    found = losses(z, r, comm, route)
    gradients = [torch.autograd.grad(loss, (z, r), allow_unused=True) for loss in found]
    return [float(loss.detach()) for loss in found], gradients


def test_blocks_cover_the_rows_once() -> None:
    with patch.object(pairs, "BLOCK", 20):
        parts = list(pairs.blocks(torch.empty(11, 2), 6))
        assert [i for part in parts for i in range(11)[part]] == list(range(11))
        assert all(len(range(11)[part]) * 6 <= 20 for part in parts)
        assert len(list(pairs.blocks(torch.empty(3, 2), 100))) == 3  # a row at least
    assert list(pairs.blocks(torch.empty(2048, 2), 2048)) == [slice(0, 2048)]


@pytest.mark.parametrize("rows", [3, 4, 16, 37])
def test_a_mirrored_gram_matrix_is_the_whole_one(rows: int) -> None:
    x = some(1, rows, 5)[0]
    with patch.object(pairs, "MIRRORED", 2):
        with Operators() as seen:
            found = pairs.gram(x, x)
        assert relative(found, x @ x.T) < 1e-14
        assert seen.names["aten::mm"] == (1 if rows < 4 else -(-rows // max(2, -(-rows // 8))))
        # Not the same rows, so nothing can be mirrored.
        if rows >= 5:  # the same memory, but other rows
            square = x[:5]
            assert relative(pairs.gram(square, square.T), square @ square) < 1e-14
        assert relative(pairs.gram(x, x.flip(0)), x @ x.flip(0).T) < 1e-14
        assert relative(pairs.gram(x[1:], x), x[1:] @ x.T) < 1e-14


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(("block", "kept"), [(1, 0), (50, 0), (50, 2), (50, 100)])
def test_many_blocks_are_one(views: int, block: int, kept: int) -> None:
    z, r = some(views, 13, 6), some(views, 13, 5, seed=1)
    values, gradients = values_and_gradients(z, r)
    with patch.multiple(pairs, BLOCK=block, CACHED=40, KEPT=kept):
        blocked = values_and_gradients(z, r)
    assert blocked[0] == pytest.approx(values, rel=1e-12)
    for ours, whole in zip(blocked[1], gradients, strict=True):
        assert all(
            relative(a, b) < 1e-11 for a, b in zip(ours, whole, strict=True) if b is not None
        )


@pytest.mark.parametrize(("kept", "expected"), [(0, 60), (3, 57), (100, 40)])
def test_kept_blocks_are_not_computed_again(kept: int, expected: int) -> None:
    """Products of two views of ten images with all, a row at a time, and their gradient's."""
    z = some(2, 10, 6).requires_grad_()
    with Operators() as seen, patch.multiple(pairs, BLOCK=20, KEPT=kept):
        info_nce(z, 0.2).backward()
    assert seen.names["aten::mm"] == expected
    r = some(2, 10, 6, seed=1).requires_grad_()
    with Operators() as seen, patch.multiple(pairs, BLOCK=20, KEPT=kept):
        mutual_information(r, z).backward()
    assert seen.names["aten::mm"] == 2 * expected


def blocked_over_processes(world: World, view_shards: int, route: str) -> Any:
    comm = MeshComm(world, view_shards)
    n = 12 // comm.data_shards
    z = some(4, 12, 10)[comm.views, comm.rows(n)]
    r = some(4, 12, 6, seed=1)[comm.views, comm.rows(n)]
    with patch.object(pairs, "BLOCK", 30):
        return values_and_gradients(z, r, comm, route)


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("route", ["auto", "gather"])
def test_many_blocks_over_processes(ranks: Ranks, size: int, view_shards: int, route: str) -> None:
    z, r = some(4, 12, 10), some(4, 12, 6, seed=1)
    values, gradients = values_and_gradients(z, r)
    results = ranks.run(blocked_over_processes, size, view_shards, route)
    n = 12 // (size // view_shards)
    for index, value in enumerate(values):
        assert sum(found[index] for found, _ in results) / size == pytest.approx(value, rel=1e-11)
        for part, whole in enumerate(gradients[index]):
            for rank in range(size if whole is not None else 0):
                mine = results[rank][1][index][part] / size  # as DDP averages
                place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
                held = whole[rank % view_shards :: view_shards, place]
                assert relative(mine, held) < 1e-9, (index, part, rank)


def unequal_weights(world: World, view_shards: int, images: int, route: str) -> Any:
    """Each process weighs the losses by its own number."""
    comm = MeshComm(world, view_shards)
    n = images // comm.data_shards
    z = some(4, images, 10)[comm.views, comm.rows(n)].clone().requires_grad_()
    r = some(4, images, 6, seed=1)[comm.views, comm.rows(n)]
    found = [*losses(z, r, comm, route), vicreg(z, 1.0, 0.0, 0.0, comm=comm, route=route).loss]
    return [torch.autograd.grad(loss * (1 + 2 * world.rank), z)[0] for loss in found]


# With two images, of a view group's members one has none to compute with.
@pytest.mark.parametrize(("size", "view_shards", "images"), [(2, 1, 12), (4, 2, 12), (4, 2, 2)])
@pytest.mark.parametrize("route", ["moments", "gather"])
def test_processes_may_weigh_a_loss_differently(
    ranks: Ranks, size: int, view_shards: int, images: int, route: str
) -> None:
    """l_r = w_r L: the sum of the cotangents is what each row gets."""
    z, r = some(4, images, 10).requires_grad_(), some(4, images, 6, seed=1)
    results = ranks.run(unequal_weights, size, view_shards, images, route)
    whole = [*losses(z, r, route=route), vicreg(z, 1.0, 0.0, 0.0, route=route).loss]
    n = images // (size // view_shards)
    for index, loss in enumerate(whole):
        (gradient,) = torch.autograd.grad(loss, z)
        for rank in range(size):
            place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
            held = size**2 * gradient[rank % view_shards :: view_shards, place]
            assert relative(results[rank][index], held) < 1e-9, (index, rank)


@pytest.mark.parametrize("images", [300, 2048])
def test_float32_sums_keep_their_digits(images: int) -> None:
    z, r = some(2, images, 64), some(2, images, 96, seed=1)
    exact = losses(z, r) + losses(z, r, route="moments")
    single = losses(z.float(), r.float()) + losses(z.float(), r.float(), route="moments")
    for index, (a, b) in enumerate(zip(single, exact, strict=True)):
        assert float(a) == pytest.approx(float(b), rel=3e-6, abs=1e-6), index
    terms = [vicreg(x, route="gather").covariance for x in (z.float(), z)]
    assert float(terms[0]) == pytest.approx(float(terms[1]), rel=5e-6)


def alike(views: int, offset: float) -> Tensor:
    """Views that are alike, in float32, far from zero."""
    z = some(views, 512, 64)
    z[1:] = z[:1] + 0.3 * z[1:]
    return (z + offset).float()


def far_from_zero(world: World, view_shards: int, route: Any) -> list[Tensor]:
    comm = MeshComm(world, view_shards)
    z = alike(4, 1e3)[comm.views, comm.rows(512 // comm.data_shards)].clone().requires_grad_()
    with patch.object(pairs, "CACHED", 2**14):
        found = [vicreg(z, comm=comm, route=route).loss, barlow_twins(z, comm=comm, route=route)]
        return [torch.autograd.grad(loss, z)[0].double() / world.size for loss in found]


@pytest.mark.parametrize("route", ["gather", "moments"])
def test_processes_keep_their_digits_too(ranks: Ranks, route: Any) -> None:
    z = alike(4, 1e3).double().requires_grad_()
    results = ranks.run(far_from_zero, 4, 2, route)
    for index, loss in enumerate((vicreg(z).loss, barlow_twins(z))):
        (gradient,) = torch.autograd.grad(loss, z)
        for rank, found in enumerate(results):
            place = slice(rank // 2 * 256, (rank // 2 + 1) * 256)
            assert relative(found[index], gradient[rank % 2 :: 2, place]) < 1e-5, (index, rank)


@pytest.mark.parametrize("route", ["gather", "moments"])
@pytest.mark.parametrize(("views", "offset"), [(2, 0.0), (2, 1e3), (3, 1e3)])
def test_float32_gradients_keep_their_digits_beside_a_large_mean(
    route: Any, views: int, offset: float
) -> None:
    """Centring is differentiated too: its rounding error is as large as the mean."""
    z = alike(views, offset)
    tried: list[Any] = [
        lambda x: vicreg(x, route=route).loss,
        lambda x: vicreg(x, 0, 0, 1, route=route).loss,
        lambda x: barlow_twins(x, route=route),
    ]
    if views == 2:  # of more, these take a mean of views first, which is rounded
        tried += [
            lambda x: vicreg_multiview(x, route=route).loss,
            lambda x: barlow_twins_multiview(x, 0.02, l2_first=False, route=route),
        ]
    for index, loss in enumerate(tried):
        single, exact = (
            torch.autograd.grad(loss(x), x)[0].double()
            for x in (z.clone().requires_grad_(), z.double().requires_grad_())
        )
        assert relative(single, exact) < 2e-5, index


def test_no_temporary_beyond_a_block() -> None:
    """The largest tensor that any operator makes, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else (out,):
                if isinstance(item, Tensor):
                    largest = max(largest, item.numel())
            return out

    z, r = some(2, 200, 3), some(2, 200, 4, seed=1)
    z.requires_grad_(), r.requires_grad_()
    with patch.object(pairs, "BLOCK", 4000), Watch():
        total = sum(losses(z, r), start=z.new_zeros(()))
        total.backward()  # type: ignore[union-attr]
    assert largest == 4000


def test_the_temperature_has_a_floor() -> None:
    with pytest.raises(ValueError, match=r"1/350 or more, got 0\.001"):
        info_nce(some(2, 4, 3), 0.001)

"""Products of rows in half precision: on tensor cores, and what that leaves of the digits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import info_nce, mutual_information
from ddp_ssl.losses.common import HALF, at_least_float32, compared, gather_unit_rows, unit_rows
from ddp_ssl.losses.kernels import gram
from ddp_ssl.losses.kernels import unit_rows as kernels
from ddp_ssl.losses.kernels.info_nce import anchor_losses
from ddp_ssl.losses.kernels.mutual_information import squared_products
from ddp_ssl.losses.kernels.unit_rows import scaled_to_one
from tests.helpers import Operators, relative
from tests.losses.inputs import some
from tests.ranks import Ranks


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """What tensor cores compute, up to the order of the sum."""
    assert a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()


@contextlib.contextmanager
def tensor_cores() -> Iterator[Any]:
    """In this context bf16 rows on a CPU take the code path of a GPU, however few they are."""
    with (
        patch.object(kernels, "_has_tensor_cores", lambda x: True),
        patch.object(kernels, "WORTH", 1),
        patch.object(kernels, "_tensor_core_product", side_effect=exact_product) as product,
    ):
        yield product


def of_units(z: Tensor, r: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """Sums of both losses, with their gradients by the unit rows, which are not rounded to bf16."""
    of_z, of_r = compared(z, ONE_PROCESS), compared(r, ONE_PROCESS)
    units = of_z.unit, of_r.unit
    found = []
    weights = torch.tensor([-1.0, -2.0, 3.0], dtype=of_r.unit.dtype)
    for value in (
        anchor_losses(of_z, 0.2, ONE_PROCESS),
        (squared_products(of_r, of_z) * weights).sum(),
    ):
        grads = torch.autograd.grad(value, units, allow_unused=True)
        found.append((value.detach(), [g for g in grads if g is not None]))
    return found


def half(*shape: int, seed: int = 0) -> Tensor:
    """Rows in bf16 of many lengths, one of them zero, with gradient."""
    x = some(*shape, seed=seed) * torch.logspace(-3, 3, shape[-2], dtype=torch.float64)[:, None]
    x[0, 2] = 0
    return x.bfloat16().requires_grad_()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(("block", "kept"), [(2**22, 0), (40_000, 0), (40_000, 2)])
def test_tensor_cores_keep_the_digits_that_they_can(views: int, block: int, kept: int) -> None:
    z, r = half(views, 200, 96), half(views, 200, 64, seed=1)
    exact = of_units(z.double(), r.double())
    single = of_units(z, r)
    with patch.multiple(gram, BLOCK=block, KEPT=kept), tensor_cores() as product:
        ours = of_units(z, r)
    assert product.call_count >= 6
    for (value, grads), (plain, plain_grads), (true, true_grads) in zip(
        ours, single, exact, strict=True
    ):
        assert float(value) == pytest.approx(float(true), rel=1e-6)
        assert float(plain) == pytest.approx(float(true), rel=1e-6)
        for grad, other, whole in zip(grads, plain_grads, true_grads, strict=True):
            assert grad.dtype == torch.float32
            assert relative(other, whole) < 1e-6
            assert relative(grad, whole) < 2**-17  # two parts of a weight


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_the_gradient_is_float64s_up_to_one_rounding(temperature: float) -> None:
    z, r = half(2, 40, 24), half(2, 40, 16, seed=1)
    for loss in (
        lambda z, r: info_nce(z, temperature),
        lambda z, r: mutual_information(r, z),
        lambda z, r: mutual_information(at_least_float32(r), z),  # a ViT's norm ends in float32
    ):
        wide = z.detach().double().requires_grad_(), r.detach().double().requires_grad_()
        value = loss(*wide)
        exact = torch.autograd.grad(value, wide, allow_unused=True)
        with tensor_cores() as product:
            ours = loss(z, r)
            grads = torch.autograd.grad(ours, (z, r), allow_unused=True)
        assert product.called == (temperature == 0.2 or exact[1] is not None)
        assert ours.dtype == torch.float32
        assert float(ours.detach()) == pytest.approx(float(value.detach()), rel=2e-6)
        for grad, whole in zip(grads, exact, strict=True):
            if grad is None or whole is None:
                continue
            assert grad.dtype == torch.bfloat16
            assert not grad[0, 2].any()  # of the zero row
            assert whole[0, 2].eq(0).all()
            # Relative to each row's own gradient: the rows' lengths differ by 10^6.
            error = (grad.double() - whole).norm(dim=-1)
            assert (error <= 2**-8 * whole.norm(dim=-1) + 1e-30).all()


def on_ranks(world: World, view_shards: int) -> Any:
    comm: Comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    n = 12 // comm.data_shards
    z, r = (
        x.detach()[comm.views, comm.rows(n)].clone().requires_grad_()
        for x in (half(4, 12, 10), half(4, 12, 6, seed=1))
    )
    with tensor_cores() as product, patch.object(gram, "BLOCK", 100):
        gathered = gather_unit_rows(z, comm)
        assert gathered.values.dtype == torch.bfloat16
        losses = [
            info_nce(z, 0.2, comm),
            info_nce(z, 0.2, comm, gathered),
            info_nce(z, 0.01, comm),
            info_nce(z, 0.01, comm, gathered),
            mutual_information(r, z, comm=comm, gathered=gathered),
        ]
        assert product.called
        return [(float(x.detach()), torch.autograd.grad(x, z)[0].double()) for x in losses]


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (4, 2)])
def test_processes_agree_with_the_large_batch(ranks: Ranks, size: int, view_shards: int) -> None:
    z, r = half(4, 12, 10).detach().double().requires_grad_(), half(4, 12, 6, seed=1).double()
    exact = [info_nce(z, 0.2)] * 2 + [info_nce(z, 0.01)] * 2 + [mutual_information(r, z)]
    results = ranks.run(on_ranks, size, view_shards)
    n = 12 // (size // view_shards)
    for index, loss in enumerate(exact):
        (whole,) = torch.autograd.grad(loss, z, retain_graph=True)
        for rank, found in enumerate(results):
            value, grad = found[index]
            assert value == pytest.approx(float(loss.detach()), rel=2e-6)
            place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
            held = whole[rank % view_shards :: view_shards, place]
            error = (grad / size - held).norm(dim=-1)  # as DDP averages
            assert (error <= 2**-8 * held.norm(dim=-1) + 1e-30).all(), (index, rank)


def test_only_what_is_worth_it_goes_to_tensor_cores() -> None:
    z = half(2, 6, 8)
    with tensor_cores():
        raw = gather_unit_rows(z, ONE_PROCESS)
        assert raw.values.data_ptr() == z.data_ptr()
        for other in (z.half(), z.float(), z.double()):  # float16's range is narrow
            assert gather_unit_rows(other, ONE_PROCESS).scale is None
        with patch.object(kernels, "WORTH", 12 * 12 * 8 + 1):
            few = gather_unit_rows(z, ONE_PROCESS)
    assert few.scale is None
    assert torch.equal(few.values, raw.unit())
    assert relative(few.values, unit_rows(z.detach().double())) < 1e-7
    assert gather_unit_rows(z, ONE_PROCESS).scale is None  # a CPU has none


def test_a_known_length_has_the_gradient_of_a_computed_one() -> None:
    x = half(2, 9, 5)
    ours = scaled_to_one(x, gather_unit_rows(x, ONE_PROCESS).inverse)
    wide = x.detach().double().requires_grad_()
    theirs = unit_rows(wide)
    assert relative(ours.detach(), theirs.detach()) < 1e-7
    (a,), (b,) = (torch.autograd.grad(u.pow(3).sum(), y) for u, y in ((ours, x), (theirs, wide)))
    assert a.dtype == torch.bfloat16
    assert ((a.double() - b).norm(dim=-1) <= 2**-8 * b.norm(dim=-1)).all()


def test_lengths_are_computed_once_for_all_terms() -> None:
    z, r = half(2, 6, 8), half(2, 6, 8, seed=1)
    with Operators() as seen:
        gathered = gather_unit_rows(z, ONE_PROCESS)
        loss = info_nce(z, 0.2, gathered=gathered)
        (loss + mutual_information(r, z, gathered=gathered)).backward()
    assert seen.names["aten::linalg_vector_norm"] == 2  # of z and of r


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_process_scales_and_multiplies_rows_once(dtype: torch.dtype) -> None:
    """Both sides of the product are one tensor, so that a CPU computes half of it."""
    x = half(2, 6, 8).detach().to(dtype).requires_grad_()
    for gathered in (None, gather_unit_rows(x, ONE_PROCESS)) if dtype in HALF else (None,):
        with Operators() as seen:
            rows = compared(x, ONE_PROCESS, gathered)
        places = {t.data_ptr() for t in (rows.unit, rows.own.values, rows.everyone.values)}
        assert len(places) == 1
        assert seen.names["aten::mul"] == (dtype in HALF and gathered is None)
        assert rows.unit.requires_grad
        assert not rows.everyone.values.requires_grad


def test_rows_of_another_kind_are_refused() -> None:
    z = half(2, 6, 8).detach()
    wide, double = z.float(), z.double()
    whole = r"gathered: expected gather_unit_rows of rows \[2, 6, 8\] of "
    for x, given, message in (
        (z, unit_rows(z), "half precision, got a Tensor"),
        (wide, unit_rows(z), "torch.float32, got a Tensor"),
        (z, wide, r"half precision, got \[2, 6, 8\] of torch.float32"),
        (wide, z, r"torch.float32, got \[2, 6, 8\] of half precision"),
        (double, wide, r"torch.float64, got \[2, 6, 8\] of torch.float32"),
        (z, z[:, :5], r"half precision, got \[2, 5, 8\] of half precision"),
    ):
        gathered: Any = given if "Tensor" in message else gather_unit_rows(given, ONE_PROCESS)
        with pytest.raises(ValueError, match=f"^{whole}{message}$"):
            info_nce(x, 0.2, gathered=gathered)
        with pytest.raises(ValueError, match=f"^{whole}{message}$"):
            mutual_information(x, x, gathered=gathered)


@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
def test_float64_beside_narrower_rows(others: torch.dtype) -> None:
    """Everything is computed in float64; each gradient has the precision of its rows."""
    narrow = half(2, 9, 5).detach().to(others).requires_grad_()
    double = half(2, 9, 4, seed=1).detach().double().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    exact = torch.autograd.grad(mutual_information(wide, double), (wide, double))
    for flipped in (False, True):
        r, z = (double, narrow) if flipped else (narrow, double)
        gathered = gather_unit_rows(z, ONE_PROCESS)
        for given in (None, gathered):
            ours = mutual_information(r, z, gathered=given)
            assert ours.dtype == torch.float64
            grads = torch.autograd.grad(ours, (narrow, double))
            for grad, whole, x in zip(grads, exact, (narrow, double), strict=True):
                assert grad.dtype == x.dtype
                rounding = 1e-6 if others == torch.float32 else 2**-8
                assert relative(grad.double(), whole) < rounding


class OneOf512(Comm):
    """The first of so many processes, by shapes alone."""

    world_size = 512

    def gather(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1] * 512, *x.shape[2:])


def test_of_65536_images_all_products_are_tensor_cores() -> None:
    with (
        FakeTensorMode(),
        patch.object(kernels, "_has_tensor_cores", lambda x: True),
        patch.object(
            kernels, "_tensor_core_product", side_effect=kernels._tensor_core_product
        ) as product,
        Operators() as seen,
    ):
        z = torch.empty(2, 128, 2048, dtype=torch.bfloat16).requires_grad_()
        comm = OneOf512()
        (info_nce(z, 0.1, comm) + mutual_information(z, z, comm=comm)).backward()
    assert product.call_count == seen.names["aten::mm"] > 0


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor):
                self.nbytes = max(self.nbytes, item.nbytes)
        return out


def test_the_parts_of_a_weight_take_no_more_than_a_block() -> None:
    z, r = half(2, 200, 3), half(2, 200, 4, seed=1)
    with patch.object(gram, "BLOCK", 4000), tensor_cores() as product, Largest() as seen:
        # What the stand-in casts to float32 is no part of it.
        product.side_effect = lambda a, b: a.new_ones(len(a), b.shape[1], dtype=torch.float32)
        (info_nce(z, 0.2) + mutual_information(r, z)).backward()
    assert seen.nbytes == 4 * 4000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensor_cores_of_a_gpu() -> None:
    z, r = half(2, 512, 384), half(2, 512, 256, seed=1)
    exact = of_units(z.double(), r.double())
    here = [x.detach().cuda().requires_grad_() for x in (z, r)]
    with patch.object(kernels, "WORTH", 1):
        assert compared(here[0], ONE_PROCESS).everyone.scale is not None
        ours = of_units(*here)
    for (value, grads), (true, true_grads) in zip(ours, exact, strict=True):
        assert float(value) == pytest.approx(float(true), rel=3e-6)
        for grad, whole in zip(grads, true_grads, strict=True):
            # Tensor cores may cut off what a sum in float32 would round.
            assert relative(grad.cpu(), whole) < 2e-5

"""Helpers that several losses share: precision, rows of all processes, checks of arguments."""

import math
from typing import Literal

import torch
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.losses.kernels.unit_rows import (
    EPS,
    Compared,
    UnitRows,
    scaled_to_one,
    unit_rows_of,
)

HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, eps: float = EPS) -> Tensor:
    """The last dimension scaled to length one; a zero row stays zero, with gradient zero.

    In `x`'s precision, but float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x / torch.threshold(norm, eps, math.inf)


def gather_rows(x: Tensor, wide: Tensor, comm: Comm) -> Tensor:
    """`wide` of all processes, `[K, N, d]`, without gradient. It is `x` in float32 or wider.

    Where `x` `[k, n, d]` is in half precision, `x` is sent instead: half the bytes.
    """
    if _better_sent(wide, x, comm):
        return comm.gather(wide.detach())
    return comm.gather(x.detach()).to(wide.dtype)


def gather_unit_rows(x: Tensor, comm: Comm, unit: Tensor | None = None) -> UnitRows:
    """The rows `x` `[k, n, d]` of all processes `[K, N, d]`, scaled to length one, no gradient.

    `unit`: `unit_rows(x)`, if the caller has it, in the precision that is wanted. Half precision is
    sent as it is, and the receivers scale its rows: half the bytes, and the same numbers up to
    rounding.
    """
    if unit is None and x.dtype not in HALF:
        unit = unit_rows(x.detach())
    if unit is not None and _better_sent(unit, x, comm):
        return UnitRows(comm.gather(unit.detach()))
    everyone = comm.gather(x.detach())
    if unit is not None:
        return UnitRows(unit_rows(everyone.to(unit.dtype)))
    return unit_rows_of(everyone, x.numel() * everyone.shape[:2].numel())


def compared(
    x: Tensor, comm: Comm, gathered: UnitRows | None = None, dtype: torch.dtype = torch.float32
) -> Compared:
    """The rows of `x` `[k, n, d]` scaled to length one, beside those of all processes.

    In `dtype`, or in `x`'s if that is wider. `gathered`: `gather_unit_rows(x, comm)`, if the caller
    has it already. Raises `ValueError` if it is of other rows or of another precision.
    """
    if gathered is not None:
        _check_gathered(gathered, x, comm)
    dtype = torch.promote_types(x.dtype, dtype)
    if x.dtype in HALF and dtype == torch.float32:
        everyone = gather_unit_rows(x, comm) if gathered is None else gathered
        assert everyone.inverse is not None
        inverse = everyone.inverse[comm.views, comm.rows(x.shape[1])]
        if everyone.scale is not None:
            own = UnitRows(x.detach(), inverse)
            return Compared(scaled_to_one(x, inverse), own, everyone)
        unit = scaled_to_one(x, inverse, everyone.values if comm.world_size == 1 else None)
        return Compared(unit, UnitRows(unit.detach()), everyone)
    unit = unit_rows(x.to(dtype))
    everyone = gather_unit_rows(x, comm, unit) if gathered is None else gathered
    if everyone.values.dtype != dtype:
        everyone = UnitRows(unit_rows(everyone.values.to(dtype)))
    return Compared(unit, UnitRows(unit.detach()), everyone)


def _check_gathered(gathered: UnitRows, x: Tensor, comm: Comm) -> None:
    """Raise `ValueError` unless `gathered` is of `x` `[k, n, d]`, by its shape and precision."""

    def kind(shape: list[int], half: bool, dtype: torch.dtype) -> str:
        return f"{shape} of {'half precision' if half else dtype}"

    whole = [x.shape[0] * comm.view_shards, x.shape[1] * comm.data_shards, x.shape[2]]
    expected = kind(whole, x.dtype in HALF, x.dtype)
    if isinstance(gathered, UnitRows):
        values = gathered.values
        got = kind(list(values.shape), gathered.inverse is not None, values.dtype)
    else:
        got = f"a {type(gathered).__name__}"
    if got != expected:
        raise ValueError(f"gathered: expected gather_unit_rows of rows {expected}, got {got}")


def _better_sent(made: Tensor, x: Tensor, comm: Comm) -> bool:
    """Whether to gather `made`, which was computed from `x`: then nobody computes it again."""
    return comm.world_size == 1 or x.element_size() >= made.element_size()


def all_views(x: Tensor, comm: Comm) -> Tensor:
    """`[k, n, ...]` held here to `[K, n, ...]`: all views, in order, of the images held here.

    Gradients are summed over the view shards.
    """
    if comm.view_shards == 1:
        return x
    whole = x.new_zeros(x.shape[0] * comm.view_shards, *x.shape[1:])
    whole[comm.views] = x
    return comm.view_sum(whole)


Route = Literal["auto", "gather", "moments"]


def gathers(route: Route, images: int, width: int) -> bool:
    """Whether second moments of `images` rows of `width` go through products of all pairs of rows.

    `gather` communicates the rows (N d numbers). Each process multiplies its own rows by all rows
    (n N d products). `moments` sums d x d matrices over processes (d^2 numbers, n d^2 products).
    Both are exact; `auto` takes the smaller.
    """
    return images < width if route == "auto" else route == "gather"


def check_views(loss: str, z: Tensor, comm: Comm) -> tuple[int, int]:
    """Numbers K and N of views and images over all processes, for `z` `[k, n, d]` held here.

    Raises `ValueError` for another shape, for one view and for one image.
    """
    if z.dim() != 3:
        raise ValueError(f"{loss}: expected z of shape [K, N, d], got {list(z.shape)}")
    views, images = z.shape[0] * comm.view_shards, z.shape[1] * comm.data_shards
    if views < 2:
        raise ValueError(f"{loss}: needs 2 views or more, got {views}")
    if images < 2:
        raise ValueError(f"{loss}: needs 2 images or more, got {images}")
    return views, images


def check_directions(loss: str, queue: Tensor | None = None, **rows: Tensor) -> None:
    """Raise `ValueError` unless all are `[N, d]` of one shape, and `queue` `[Q, d]` if given."""
    shapes = {name: list(x.shape) for name, x in rows.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or any(shape != first for shape in shapes.values()):
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{loss}: expected {' and '.join(shapes)} of one shape [N, d], got {got}")
    if queue is not None:
        check_queue(loss, queue, first[1])


def check_queue(loss: str, queue: Tensor, width: int) -> None:
    """Raise `ValueError` unless `queue` is `[Q, width]`."""
    if queue.dim() != 2 or queue.shape[1] != width or not len(queue):
        raise ValueError(f"{loss}: expected queue [Q, {width}], got {list(queue.shape)}")


def check_temperature(loss: str, **temperatures: float) -> None:
    """Raise `ValueError` unless all are positive."""
    for name, value in temperatures.items():
        if value <= 0:
            raise ValueError(f"{loss}: {name} must be positive, got {value}")

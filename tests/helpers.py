"""Small configs and batches for tests."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.config import Config
from ddp_ssl.data.batch import Batch
from ddp_ssl.methods._registry import load_method
from ddp_ssl.methods.base import Method
from ddp_ssl.run.configure import load

TINY = (
    "model.backbone_args={channels: [8, 8, 16, 16]}",
    "model.projector=[24, 12]",
    "data.views=[{count: 2, size: 16, recipe: sym}]",
    "data.batch_size=12",
    "run.device=cpu",
)

# Half the layers: for tests that cost a network's step on several processes.
SHALLOW = "model.backbone_args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}"

VIT = (
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, "
    "dynamic_img_size: true}",
)


def config_of(*overrides: str) -> Config:
    """A config from `key=value`, tiny unless told otherwise."""
    return load([*TINY, *overrides]).config


def method_of(config: Config, comm: Comm = ONE_PROCESS, dtype: Any = torch.float64) -> Method:
    """The configured method with global batch norm, from one seed."""
    torch.manual_seed(1)
    method: Method = load_method(config.method.name)(config, comm)
    method.finish()
    return method.to(dtype).train()


@contextlib.contextmanager
def graphs_run_one_by_one() -> Iterator[None]:
    """Here `torch.compile` makes graphs and compiles nothing: their operators are run in turn."""
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        yield


def images(views: int, count: int, size: int = 16, dtype: Any = torch.float64) -> Tensor:
    """Random images `[K, N, 3, S, S]`, every one different, some far from the others."""
    generator = torch.Generator().manual_seed(views * 1000 + count)
    x = torch.randn(views, count, 3, size, size, generator=generator, dtype=dtype)
    return x * torch.linspace(0.5, 2, count, dtype=dtype).view(1, -1, 1, 1, 1) + 0.3


def batch_of(x: Tensor, comm: Comm = ONE_PROCESS) -> Batch:
    """The part of `x` `[K, N, ...]` that this process holds."""
    n = x.shape[1] // comm.data_shards
    mine = x[comm.views, comm.rows(n)]
    ids = torch.arange(x.shape[1])[comm.rows(n)]
    return Batch(list(mine), ids, ids % 3)


class Operators(TorchDispatchMode):
    """Names of the operators that run within, but not while `paused`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            name = str(func.overloadpacket).replace(".", "::")
            if name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None:
                name += " of unknown size"
            if name in ("aten::index", "aten::index_put_") and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            ):
                name += " by a mask"
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        """Operators that on a GPU give the host a value, or an output whose size depends on values.

        Not seen here: `tolist`, `numpy` and `cpu`.
        """
        waiting = (
            "_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select",
            "bincount", "repeat_interleave of unknown size", "_unique", "_unique2", "unique_dim",
            "unique_consecutive", "index by a mask",
            "index_put_ by a mask", "_linalg_svd", "_linalg_eigh", "linalg_qr", "linalg_eig",
            "_linalg_eigvals", "_linalg_check_errors",
        )  # fmt: skip
        return [name for name in self.names if name.partition("::")[2] in waiting]


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def assert_same_gradients(
    ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10
) -> None:
    """Equal up to rounding; a bias before a norm has gradient zero, so the scale is the largest."""
    scale = max(float(g.norm()) for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-3 * scale)

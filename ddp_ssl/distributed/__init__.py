"""Process groups, the data x view mesh, and every collective with its adjoint.

The only package that imports `torch.distributed`. Two facts carry it:

- Each collective is differentiated as its true adjoint: the adjoint of a gather is the sum of the
  cotangents over ranks, own slice; the adjoint of an all-reduce is an all-reduce.
- Rank r calls backward on its own l_r. DDP then averages to exactly the gradient of mean_r l_r.

So a loss only has to satisfy mean_r l_r = L_global, and no factor of the world size appears
anywhere. docs/distributed.md derives it.
"""

from __future__ import annotations

from ddp_ssl.distributed.bandwidth import Exchange, bandwidth
from ddp_ssl.distributed.batch_norm import (
    GlobalBatchNorm,
    ViewLayout,
    global_batch_norm,
    stacked_views,
)
from ddp_ssl.distributed.collectives import MeshComm, comm_of
from ddp_ssl.distributed.data_parallel import data_parallel
from ddp_ssl.distributed.heartbeat import Whiteboard
from ddp_ssl.distributed.primitives import Traffic, others_failed, traffic
from ddp_ssl.distributed.stop_flag import LateFlag
from ddp_ssl.distributed.world import (
    Disagreement,
    World,
    layout,
    patient,
    start,
    stop,
    wait_for_all,
)

__all__ = [
    "Disagreement",
    "Exchange",
    "GlobalBatchNorm",
    "LateFlag",
    "MeshComm",
    "Traffic",
    "ViewLayout",
    "Whiteboard",
    "World",
    "bandwidth",
    "comm_of",
    "data_parallel",
    "global_batch_norm",
    "layout",
    "others_failed",
    "patient",
    "stacked_views",
    "start",
    "stop",
    "traffic",
    "wait_for_all",
]

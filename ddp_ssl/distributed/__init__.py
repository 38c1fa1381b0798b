"""Process groups, the data x view mesh, and every collective with its adjoint.

The only package that imports `torch.distributed`. Two facts carry it:

- Each collective is differentiated as its true adjoint: the adjoint of a gather is the sum of the
  cotangents over ranks, own slice; the adjoint of an all-reduce is an all-reduce.
- Rank r calls backward on its own l_r. DDP then averages to exactly the gradient of mean_r l_r.

So a loss only has to satisfy mean_r l_r = L_global, and no factor of the world size appears
anywhere. docs/distributed.md derives it.
"""

from ddp_ssl.distributed.bandwidth import Exchange, measure_bandwidth
from ddp_ssl.distributed.batch_norm import (
    GlobalBatchNorm,
    ViewLayout,
    global_batch_norm,
    stacked_views,
)
from ddp_ssl.distributed.collectives import MeshComm, comm_of, data_parallel
from ddp_ssl.distributed.heartbeat import HeartbeatStore
from ddp_ssl.distributed.primitives import CommStats, comm_stats, others_failed
from ddp_ssl.distributed.stop_flag import StopFlag
from ddp_ssl.distributed.world import (
    Disagreement,
    World,
    layout,
    start,
    stop,
    wait_for_all,
    with_timeout,
)

__all__ = [
    "CommStats",
    "Disagreement",
    "Exchange",
    "GlobalBatchNorm",
    "HeartbeatStore",
    "MeshComm",
    "StopFlag",
    "ViewLayout",
    "World",
    "comm_of",
    "comm_stats",
    "data_parallel",
    "global_batch_norm",
    "layout",
    "measure_bandwidth",
    "others_failed",
    "stacked_views",
    "start",
    "stop",
    "wait_for_all",
    "with_timeout",
]

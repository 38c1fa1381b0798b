"""Process groups, the data x view mesh, and every collective with its adjoint.

The only package that imports `torch.distributed`. Two facts carry it:

- Each collective is differentiated as its true adjoint: the adjoint of a gather is the sum of the
  cotangents over ranks, own slice; the adjoint of an all-reduce is an all-reduce.
- Rank r calls backward on its own l_r. DDP then averages to exactly the gradient of mean_r l_r.

So a loss only has to satisfy mean_r l_r = L_global, and no factor of the world size appears
anywhere. docs/distributed.md derives it.
"""

from ddp_ssl.distributed.bandwidth import Exchange as Exchange
from ddp_ssl.distributed.bandwidth import measure_bandwidth as measure_bandwidth
from ddp_ssl.distributed.batch_norm import GlobalBatchNorm as GlobalBatchNorm
from ddp_ssl.distributed.batch_norm import ViewLayout as ViewLayout
from ddp_ssl.distributed.batch_norm import global_batch_norm as global_batch_norm
from ddp_ssl.distributed.batch_norm import stacked_views as stacked_views
from ddp_ssl.distributed.collectives import MeshComm as MeshComm
from ddp_ssl.distributed.collectives import comm_of as comm_of
from ddp_ssl.distributed.collectives import data_parallel as data_parallel
from ddp_ssl.distributed.heartbeat import HeartbeatStore as HeartbeatStore
from ddp_ssl.distributed.primitives import comm_stats as comm_stats
from ddp_ssl.distributed.primitives import others_failed as others_failed
from ddp_ssl.distributed.stop_flag import StopFlag as StopFlag
from ddp_ssl.distributed.world import Disagreement as Disagreement
from ddp_ssl.distributed.world import World as World
from ddp_ssl.distributed.world import layout as layout
from ddp_ssl.distributed.world import meet as meet
from ddp_ssl.distributed.world import open_store as open_store
from ddp_ssl.distributed.world import start as start
from ddp_ssl.distributed.world import stop as stop
from ddp_ssl.distributed.world import wait_for_all as wait_for_all
from ddp_ssl.distributed.world import with_timeout as with_timeout

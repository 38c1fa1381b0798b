"""DeepCluster v2 (Caron et al. 2018, in the form of Caron et al. 2020, SwAV, appendix D)."""

import sys
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, ConfigError, MethodConfig, Size
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import stacked_views
from ddp_ssl.losses import deepclusterv2, spherical_kmeans
from ddp_ssl.losses.common import at_least_float32, unit_rows
from ddp_ssl.methods.base import Context, Method, Output
from ddp_ssl.utils.seeds import hashed


class DeepClusterV2Config(MethodConfig):
    """Cluster all images between epochs; predict the cluster of every view."""

    name: str = "deepclusterv2"
    prototypes: list[Size] = Field([3000, 3000, 3000], min_length=1)
    """Clusters of each clustering, at most as many as training images. The losses of several
    clusterings are averaged."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the cosines with the centroids."""
    iterations: int = Field(10, ge=1)
    """Rounds of k-means per epoch."""

    recipe = {  # noqa: RUF012
        "model": {"projector": [2048, 128]},
        "data": {"views": [{"count": 2, "recipe": "sym"}]},
        "optim": {
            "lr": 0.6,
            "weight_decay": 1e-6,
            "warmup_epochs": 11,
            "warmup_lr": 0,
            "final_lr_fraction": 1e-3,
        },
    }


class DeepClusterV2(Method[DeepClusterV2Config]):
    """Backbone, projector, centroids, and the newest embedding of every image.

    One pass over the data before the first step fills the memory. Each step renews the rows of its
    images. Between epochs clustering h runs spherical k-means over the memory of large view
    h mod (number of large views), starting from random images. Its centroids are the prototypes of
    the next epoch, without gradient, and every view predicts the cluster of its image.

    Differences from the official code: the k-means and the loss's mean are over all images exactly,
    at any number of processes, since the memory is kept by sample id. Images that no batch had yet
    (the last incomplete batch is dropped) have no cluster and are left out.
    """

    config_class = DeepClusterV2Config

    def __init__(self, config: Config, comm: Comm) -> None:
        super().__init__(config, comm)
        width = config.model.projector[-1]
        for head, count in enumerate(self.settings.prototypes):
            self.register_buffer(f"prototypes_{head}", unit_rows(torch.randn(count, width)))
        self.remembered = min(self.num_large, len(self.settings.prototypes))
        self.memory: Memory | None = None
        self.assignments: Tensor | None = None  # [clusterings, images], -1 for none

    def forward(self, batch: Batch) -> Output:
        ids = batch.ids.to(self.centroids(0).device, non_blocking=True)
        r, z = self.encode(batch.views)
        with torch.autocast(z.device.type, enabled=False):
            unit = unit_rows(at_least_float32(z))
            if self.assignments is None:  # only before `on_start`; the loss is zero
                targets = ids.new_full((len(self.settings.prototypes), len(ids)), -1)
            else:
                targets = self.assignments[:, ids]
            losses = [
                deepclusterv2(
                    unit @ self.centroids(head).T, target, self.settings.temperature, self.comm
                )
                for head, target in enumerate(targets)
            ]
        if self.memory is not None and self.training:
            self.memory.put(*self._gathered(ids, unit[: self.held_large].detach()))
        return Output(torch.stack(losses).mean(), {}, r, z)

    def centroids(self, head: int) -> Tensor:
        """Unit rows `[P, d]`."""
        return self.get_buffer(f"prototypes_{head}")

    def _gathered(self, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All processes' ids `[N]` and rows `[remembered, N, d]` of the views to remember."""
        return self.comm.gather(ids[None])[0], self.comm.gather(rows)[: self.remembered]

    # --- between epochs --------------------------------------------------------------------------

    @torch.no_grad()
    def on_start(self, context: Context) -> None:
        """Fill the memory of every view from one pass over view 0, and cluster."""
        found = []
        # Each view shard has a crop of its own and normalises it on its own. The first one counts.
        apart = (self.layout, self.comm.view_shards, self.comm.views)
        with self.measuring(batch_statistics=True):
            for batch in context.batches(sys.maxsize, "memory"):
                with stacked_views(*apart):
                    _, z = self.embed(batch.views[0])
                every_id, every_row = self._gathered(batch.ids.to(z.device), unit_rows(z)[None])
                found.append((every_id, every_row[:1]))
        ids, rows = (
            torch.cat(part, -1 - axis) for axis, part in enumerate(zip(*found, strict=True))
        )
        # An upper bound of the ids: fewer images than a batch were left out.
        capacity = len(ids) + len(ids) // len(found)
        one = rows.new_empty(1, 1, 1)
        self.memory = Memory(one.expand(self.remembered, capacity, rows.shape[2]), self.comm)
        self.memory.put(ids, rows)
        self._cluster(context, 0)

    def after_epoch(self, context: Context) -> None:
        """Cluster for the next epoch."""
        if context.epoch + 1 < context.epochs:
            self._cluster(context, context.epoch + 1)

    @torch.no_grad()
    def _cluster(self, context: Context, epoch: int) -> None:
        assert self.memory is not None
        memory, found = self.memory, []
        seen = memory.seen.nonzero().flatten()
        for head, count in enumerate(self.settings.prototypes):
            if count > len(seen):
                raise ConfigError(
                    f"method.prototypes: {count} clusters of {len(seen)} training images; at most "
                    f"{len(seen)} would be accepted"
                )
            view = head % self.remembered
            generator = torch.Generator().manual_seed(hashed(context.seed, "k-means", epoch, head))
            chosen = torch.randperm(len(seen), generator=generator)[:count]
            centroids = memory.fetch(seen[chosen.to(seen.device)], view)
            ids, rows = memory.share(view)
            centroids, nearest = spherical_kmeans(
                rows, centroids, self.settings.iterations, self.comm
            )
            self.centroids(head).copy_(centroids)
            clusters = torch.zeros_like(memory.seen, dtype=torch.long)
            clusters[ids] = nearest + 1
            found.append(self.comm.sum(clusters) - 1)
        self.assignments = torch.stack(found)
        used = sum(int((torch.bincount(row + 1)[1:] > 0).sum()) for row in found)
        context.report({"rep/clusters_used": used / sum(self.settings.prototypes)})

    def get_extra_state(self) -> dict[str, Any]:
        """Memory and assignments."""
        if self.memory is None:
            return {}
        return {**self.memory.state(), "assignments": self.assignments}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load memory and assignments: of the memory, this process's part."""
        self.memory = self.assignments = None
        if state:
            device = self.centroids(0).device
            self.memory = Memory.of(state, self.comm, device)
            self.assignments = state["assignments"].to(device)


class Memory:
    """The newest unit embedding of every image, by sample id, for some views.

    It is sharded: rank r of W holds the images r, r + W, ... Rank 0 holds all of them, since it
    writes the checkpoint. It is on the device, so that a step waits for nothing. ImageNet (1.28 M
    images, two views, 128 float32 numbers) takes 1.3 GB on rank 0 and in the checkpoint and
    1.3 GB / W on the others. The assignments take 10 MB a clustering on every rank.
    """

    def __init__(self, rows: Tensor, comm: Comm) -> None:
        """An empty memory of the shape, type and device of `rows` `[views, images, d]`."""
        views, images, width = rows.shape
        self.comm = comm
        self.first, self.stride = (comm.rank, comm.world_size) if comm.rank else (0, 1)
        held = len(range(self.first, images, self.stride))
        # The last row takes the writes of images that other processes hold.
        self.rows = rows.new_zeros(views, held + 1, width)
        self.seen = torch.zeros(images, dtype=torch.bool, device=rows.device)

    def put(self, ids: Tensor, rows: Tensor) -> None:
        """Renew the rows `[views, N, d]` (or `[1, N, d]` for all views) of images `ids` `[N]`."""
        away = self.rows.shape[1] - 1
        slots = torch.where((ids - self.first) % self.stride == 0, self._slots(ids), away)
        self.rows[:, slots] = rows.to(self.rows.dtype)
        self.seen.index_fill_(0, ids, True)

    def share(self, view: int) -> tuple[Tensor, Tensor]:
        """Ids `[m]` and rows `[m, d]` of this process's share of the images seen."""
        rank, size = self.comm.rank, self.comm.world_size
        ids = self.seen[rank::size].nonzero().flatten() * size + rank
        return ids, self.rows[view, self._slots(ids)]

    def fetch(self, ids: Tensor, view: int) -> Tensor:
        """The rows `[m, d]` of any images, on every process."""
        mine = ids % self.comm.world_size == self.comm.rank
        rows = self.rows.new_zeros(len(ids), self.rows.shape[2])
        rows[mine] = self.rows[view, self._slots(ids[mine])]
        return self.comm.sum(rows)

    def _slots(self, ids: Tensor) -> Tensor:
        return (ids - self.first) // self.stride

    def state(self) -> dict[str, Any]:
        """Tensors and numbers of a checkpoint; rank 0's hold all images."""
        return {"rows": self.rows[:, :-1], "seen": self.seen, "stride": self.stride}

    @classmethod
    def of(cls, state: dict[str, Any], comm: Comm, device: torch.device) -> "Memory":
        """From rank 0's state at any number of processes, or from this process's own."""
        rows, seen = state["rows"], state["seen"]
        one = torch.empty(1, 1, 1, dtype=rows.dtype, device=device)
        memory = cls(one.expand(len(rows), len(seen), rows.shape[2]), comm)
        # Cut before the copy: only this process's part goes to the device.
        part = rows[:, memory.first :: memory.stride] if state["stride"] == 1 else rows
        memory.rows[:, :-1] = part.to(device)
        memory.seen.copy_(seen)
        return memory

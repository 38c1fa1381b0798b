"""DeepCluster v2: cross-entropy with the cluster of each image, and the clustering."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_temperature, unit_rows

ROWS = 1 << 14  # in a block whose similarities with the centroids are held at once


def deepclusterv2(
    scores: Tensor, assignments: Tensor, temperature: float, comm: Comm = ONE_PROCESS
) -> Tensor:
    """Cross-entropy of the scores of all views with their image's cluster.

        loss = mean over views and images of -log softmax(scores / temperature)_assignment

    `scores`: cosines with the centroids `[k, n, P]` of the views held here; `assignments`: the
    cluster of each image `[n]`, or -1 for an image that has none yet and is left out. Returns a
    scalar in float32 or float64: the full loss on every process, 0 if no image has a cluster.
    Raises `ValueError` unless `temperature` is positive.

    Source: Caron et al. 2020 (SwAV), appendix D, and their code, which averages each process's
    images on its own.
    """
    check_temperature("deepclusterv2", temperature=temperature)
    with torch.autocast(scores.device.type, enabled=False):
        views, images, _ = scores.shape
        logits = at_least_float32(scores).flatten(0, 1) / temperature
        target = assignments.expand(views, images).flatten()
        total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        known = comm.sum((target >= 0).sum().to(logits.dtype))
        return comm.sum(total) / known.clamp(min=1)


@torch.no_grad()
def spherical_kmeans(
    rows: Tensor, centroids: Tensor, iterations: int = 10, comm: Comm = ONE_PROCESS
) -> tuple[Tensor, Tensor]:
    """K-means of unit rows by cosine; the same centroids at any number of processes.

    `rows`: this process's share `[m, d]` of the unit rows; m may differ between processes and may
    be 0. `centroids`: initial unit rows `[P, d]`, the same on every process. Returns the centroids
    after `iterations` rounds and the nearest one of each row, int64 `[m]`. A centroid without rows
    stays where it is. Communicates P (d + 1) sums in float64 per iteration.
    """
    for _ in range(iterations):
        sums = torch.zeros(
            len(centroids), rows.shape[1] + 1, dtype=torch.float64, device=rows.device
        )
        for part in torch.split(rows, ROWS) if len(rows) else ():
            # The order of summation of `index_add_` changes from run to run on CUDA.
            nearest = (_nearest(part, centroids),)
            members = torch.cat([part.double(), sums.new_ones(len(part), 1)], 1)
            sums.index_put_(nearest, members, accumulate=True)
        sums = comm.sum(sums)
        moved = unit_rows(sums[:, :-1]).to(centroids.dtype)
        centroids = torch.where(sums[:, -1:] > 0, moved, centroids)
    return centroids, _nearest(rows, centroids)


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid with the largest cosine, int64 `[m]`."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    return torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(rows, ROWS)])

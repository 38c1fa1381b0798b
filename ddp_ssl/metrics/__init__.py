"""Metrics: pure functions of tensors, over all processes when given a `Comm`.

`docs/metrics.md` tells for each one its definition, whether it is centred, and its cost.
"""

from ddp_ssl.metrics.effective_rank import effective_rank
from ddp_ssl.metrics.pairs import (
    PairMeans,
    mutual_information,
    pair_means,
    renyi_entropy,
    uniformity,
)
from ddp_ssl.metrics.spectrum import (
    Spectrum,
    alpha_req,
    cumulative_explained_variance,
    eigenvalue_count,
    matrix_entropy,
    rankme,
    von_neumann_entropy,
)
from ddp_ssl.metrics.views import alignment, lidar

__all__ = [
    "PairMeans",
    "Spectrum",
    "alignment",
    "alpha_req",
    "cumulative_explained_variance",
    "effective_rank",
    "eigenvalue_count",
    "lidar",
    "matrix_entropy",
    "mutual_information",
    "pair_means",
    "rankme",
    "renyi_entropy",
    "uniformity",
    "von_neumann_entropy",
]

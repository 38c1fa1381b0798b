"""Metrics: pure functions of tensors, over all processes when given a `Comm`.

`docs/metrics.md` tells for each one its definition, whether it is centred, and its cost.
"""

from ddp_ssl.metrics.effective_rank import effective_rank as effective_rank
from ddp_ssl.metrics.pairs import PairMeans as PairMeans
from ddp_ssl.metrics.pairs import mutual_information as mutual_information
from ddp_ssl.metrics.pairs import pair_means as pair_means
from ddp_ssl.metrics.pairs import renyi_entropy as renyi_entropy
from ddp_ssl.metrics.pairs import uniformity as uniformity
from ddp_ssl.metrics.spectrum import Spectrum as Spectrum
from ddp_ssl.metrics.spectrum import alpha_req as alpha_req
from ddp_ssl.metrics.spectrum import cumulative_explained_variance as cumulative_explained_variance
from ddp_ssl.metrics.spectrum import eigenvalue_count as eigenvalue_count
from ddp_ssl.metrics.spectrum import matrix_entropy as matrix_entropy
from ddp_ssl.metrics.spectrum import rankme as rankme
from ddp_ssl.metrics.spectrum import von_neumann_entropy as von_neumann_entropy
from ddp_ssl.metrics.views import alignment as alignment
from ddp_ssl.metrics.views import lidar as lidar

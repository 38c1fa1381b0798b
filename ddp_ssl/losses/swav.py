"""SwAV: swapped prediction of balanced assignments to prototypes."""

import torch
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.losses.common import at_least_float32, check_temperature


def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """SwAV's loss in one direction: one view's scores predict another view's assignments.

        loss = mean over images of -sum_p q_p log softmax(scores / temperature)_p

    `scores`: cosines with the prototypes `[N, P]`; `assignments`: q, rows `[N, P]` that sum to one,
    of the same images, without gradient. Returns a scalar in float32 or float64. Raises
    `ValueError` for unequal shapes and unless `temperature` is positive.

    Source: Caron et al. 2020, Eq. 2.
    """
    if scores.dim() != 2 or scores.shape != assignments.shape:
        raise ValueError(
            "swav: expected scores and assignments of one shape [N, P], got "
            f"{list(scores.shape)} and {list(assignments.shape)}"
        )
    check_temperature("swav", temperature=temperature)
    with torch.autocast(scores.device.type, enabled=False):
        log_p = (at_least_float32(scores) / temperature).log_softmax(1)
        return -(assignments.to(log_p.dtype) * log_p).sum(1).mean()


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, comm: Comm = ONE_PROCESS
) -> Tensor:
    """Soft assignments that use all prototypes equally over the global batch.

        Q = diag(u) exp(scores / epsilon) diag(v)

    Each iteration scales every prototype to the same sum over all images, then every image to the
    sum one (Sinkhorn-Knopp).

    `scores`: `[n, P]`, or `[k, n, P]` for views that are balanced each on its own; with a `comm`,
    those of the views and images held here. Returns assignments of the same shape in float32 or
    float64 whose rows sum to one. Communicates P sums a view per iteration.

    It computes in float64 and first subtracts the largest score of a view, which changes only the
    range of exp. In float32 an image whose best cosine is 0.9 lower would vanish at epsilon 0.01.

    Source: Caron et al. 2020, Eq. 5.
    """
    check_temperature("sinkhorn", epsilon=epsilon)
    with torch.autocast(scores.device.type, enabled=False):
        x = scores.double() if scores.dim() == 3 else scores.double()[None]
        # Over all processes; these may hold different numbers of images (parts of a queue).
        largest = comm.gather(x.amax((1, 2))[:, None]).amax(1)[comm.views, None, None]
        q = ((x - largest) / epsilon).exp()
        tiny = torch.finfo(q.dtype).tiny
        for _ in range(iterations):
            # The sum of a prototype that is far from all images may vanish.
            q /= comm.sum(comm.placed(q.sum(1)))[comm.views, None].clamp(min=tiny)
            q /= q.sum(2, keepdim=True).clamp(min=tiny)
        return q.view(scores.shape).to(torch.promote_types(scores.dtype, torch.float32))

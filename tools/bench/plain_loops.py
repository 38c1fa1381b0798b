"""Plain training loops in torch alone, as the methods' papers describe them, for `gpu_path.py`.

Each view passes the network on its own, every batch norm is `nn.SyncBatchNorm`, embeddings are
gathered, and the optimiser is SGD. No probe, no metric, no gradient norm.
"""

from collections.abc import Callable
from typing import Any

import torch
from counting import Counted, Step
from torch import Tensor, nn
from torch.nn import functional as F


class Gather(torch.autograd.Function):
    """Rows `[n, d]` of all processes as `[W n, d]`; the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        every = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, rows)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return grad.chunk(processes)[rank]


def gathered(rows: Tensor) -> Tensor:
    every: Tensor = Gather.apply(rows)  # type: ignore[no-untyped-call]
    return every


def simclr(a: Tensor, b: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent (Chen et al. 2020, Eq. 1) of two views `[n, d]`, over the images of all processes."""
    a, b = (gathered(F.normalize(x, dim=1)) for x in (a, b))
    rows = torch.cat([a, b])
    logits = rows @ rows.T / temperature
    logits = logits.fill_diagonal_(-torch.inf)
    images = torch.arange(len(a), device=a.device)
    return F.cross_entropy(logits, torch.cat([images + len(a), images]))


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """VICReg (Bardes et al. 2022, Algorithm 1) of two views `[n, d]`; solo-learn's divisors."""
    invariance = F.mse_loss(a, b)
    variance = covariance = a.new_zeros(())
    for x in (gathered(a), gathered(b)):
        x = x - x.mean(0)
        variance = variance + F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
        products = (x.T @ x / (len(x) - 1)).square()
        covariance = covariance + (products.sum() - products.diagonal().sum()) / x.shape[1]
    return 25 * invariance + 25 * variance + covariance


def barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, Algorithm 1) of two views `[n, d]`."""
    a, b = (gathered(x) for x in (a, b))
    a, b = (F.batch_norm(x, None, None, training=True) for x in (a, b))
    correlation = a.T @ b / len(a)
    on = (correlation.diagonal() - 1).square().sum()
    off = correlation.square().sum() - correlation.diagonal().square().sum()
    return 0.1 * (on + 0.0051 * off)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "barlow_twins": barlow_twins,
    "simclr": simclr,
    "vicreg": vicreg,
}


class PlainStep(Step):
    """Forward, loss, backward and SGD of two views."""

    @property
    def network(self) -> nn.Module:
        return nn.ModuleList([self.learner.method.backbone, self.learner.method.projector])

    def made_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained, 0.1, 0.9, weight_decay=1e-4, foreach=True)

    def take(self, seen: Counted) -> None:
        method = self.learner.method
        with torch.autocast(self.world.device.type, torch.bfloat16):
            a, b = (method.projector(method.backbone(view)) for view in self.batch.views)
        loss = LOSSES[self.config.method.name](a.float(), b.float())
        seen.part = seen.stage = "backward"
        loss.backward()
        seen.part = seen.stage = "update"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

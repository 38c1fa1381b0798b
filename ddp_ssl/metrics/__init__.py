"""Metrics: pure functions of tensors, over all processes when given a `Comm`."""

from ddp_ssl.metrics.effective_rank import effective_rank

__all__ = ["effective_rank"]

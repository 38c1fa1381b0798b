"""Weighted k-nearest-neighbour classification on the representation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Predicted classes `[m]` of `queries` `[m, d]` from a labelled `bank` `[M, d]`.

    The k most similar rows by cosine vote with weight exp(cosine / temperature). Labels are
    `int64 [M]`, none negative. Source: Wu et al. 2018, as DINO and solo-learn use it.
    """
    k = min(k, bank.shape[0])
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=1)
    predictions = []
    queries = F.normalize(queries.float(), dim=1)
    for part in torch.split(queries, chunk):
        similarity, index = (part @ bank.T).topk(k, dim=1)
        # Relative to the best neighbour: the same ranking, and exp cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = part.new_zeros(part.shape[0], classes)
        votes.scatter_add_(1, bank_labels[index], weight)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else bank_labels.new_zeros(0)

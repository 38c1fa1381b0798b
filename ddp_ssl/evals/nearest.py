"""Search for the nearest rows of a bank, and their weighted votes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import Comm

QUERIES = 1024  # queries compared at once, over all processes
BLOCK = 65_536  # rows of the bank compared at once


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = QUERIES,
) -> Tensor:
    """Predicted classes `[m]` of `queries` `[m, d]` from a labelled `bank` `[M, d]`.

    The k most similar rows by cosine vote with weight exp(cosine / temperature). Labels are
    `int64 [M]`, none negative. Source: Wu et al. 2018, as DINO and solo-learn use it.
    """
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=1)
    predictions = []
    queries = F.normalize(queries.float(), dim=1)
    for part in torch.split(queries, chunk):
        similarity, labels = nearest(bank, bank_labels, part, k)
        predictions.append(votes(similarity, labels, k, classes, temperature).argmax(1))
    return torch.cat(predictions) if predictions else bank_labels.new_zeros(0)


def nearest(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Similarity and label `[m, k]` of the rows of `bank` most similar to each query, best first.

    Rows have unit norm. There are fewer than k if the bank is smaller. At most `block` rows are
    compared at once, so that `m * block` similarities are in memory.
    """
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), block):
        rows, labels = bank[start : start + block], bank_labels[start : start + block]
        similarity, index = (queries @ rows.T).topk(min(k, len(rows)), dim=1)
        label = labels[index]
        if found is not None:
            similarity, label = (
                torch.cat([found[0], similarity], 1),
                torch.cat([found[1], label], 1),
            )
            similarity, label = _best(similarity, label, k)
        found = similarity, label
    if found is None:
        return queries.new_zeros(len(queries), 0), bank_labels.new_zeros(len(queries), 0)
    return found


def votes(similarity: Tensor, labels: Tensor, k: int, classes: int, temperature: float) -> Tensor:
    """Weights `[m, classes]` that the first k of the neighbours `[m, >= k]` give each class.

    A label of -1 marks a missing neighbour.
    """
    similarity, labels = similarity[:, :k], labels[:, :k]
    # Relative to the best neighbour: the same ranking, and exp cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    sums = similarity.new_zeros(len(similarity), classes)
    return sums.scatter_add_(1, labels.clamp(min=0), weight.where(labels >= 0, 0))


def sharded_votes(
    bank: tuple[Tensor, Tensor],
    queries: Tensor,
    k: Sequence[int],
    classes: int,
    temperature: float,
    comm: Comm,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Votes of all processes' banks for this process's queries: (rows, `[n, classes]` for each k).

    All processes must call it. `bank`: features `[M_r, d]` and labels `[M_r]` held here; `queries`:
    `[m_r, d]`. The numbers of rows may differ between processes. Besides its share of bank and
    queries a process holds `QUERIES * BLOCK` similarities (256 MiB) and `QUERIES * max(k)`
    candidates of each process.
    """
    rows, labels = F.normalize(bank[0].float(), dim=1), bank[1]
    size, most = comm.world_size, max(k)
    n = max(1, QUERIES // size)
    longest = int(comm.gather(labels.new_tensor([[len(queries)]])).max())
    for start in range(0, longest, n):
        mine = F.normalize(queries[start : start + n].float(), dim=1)
        padded = F.pad(mine, (0, 0, 0, n - len(mine)))
        similarity, label = nearest(rows, labels, comm.gather(padded[None])[0], most)
        missing = most - similarity.shape[1]
        similarity = F.pad(similarity, (0, missing), value=-torch.inf)
        label = F.pad(label, (0, missing), value=-1)
        # [bank's process, query's process, n, k]: every bank's candidates for the queries here.
        similarity, label = (
            comm.gather(x[None])[0].view(size, size, n, most)[:, comm.rank].transpose(0, 1)
            for x in (similarity, label)
        )
        similarity, label = _best(similarity.flatten(1), label.flatten(1), most)
        part = slice(0, len(mine))
        if len(mine):
            yield (
                slice(start, start + len(mine)),
                [votes(similarity[part], label[part], each, classes, temperature) for each in k],
            )


def _best(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of the candidates `[m, >= 1]`, best first."""
    similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, labels.gather(1, index)

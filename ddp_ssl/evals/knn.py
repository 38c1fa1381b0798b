"""The k-NN evaluation: all labelled training images are the bank, several k in one pass."""

import torch

from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.evals.accuracy import Accuracy, Tally
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.nearest import sharded_votes
from ddp_ssl.utils.progress import Ticker


def evaluate_knn(
    extractor: Extractor, train: Split, val: Split, classes: int
) -> tuple[list[Accuracy], int]:
    """Accuracies for each `knn.k`, and the number of images in the bank; on all processes.

    Raises `ConfigError` if no training image can be read.
    """
    settings, comm, device = extractor.settings.knn, extractor.comm, extractor.device
    name = extractor.settings.data.name
    queries = extractor.features(val, settings.patches, f"{name} test images")
    bank = extractor.features(train, settings.patches, f"{name} training images")
    images = int(comm.sum(torch.tensor(len(bank), device=device)))
    if images == 0:
        raise ConfigError("data.root: no training image with a label can be read")
    tallies = [Tally(classes) for _ in settings.k]
    ticker = Ticker("k-NN, test images (rank 0's share)", len(queries), comm.rank == 0)
    for part, scores in sharded_votes(
        (bank.features.to(device), bank.labels.to(device)),
        queries.features.to(device),
        settings.k,
        classes,
        settings.temperature,
        comm,
    ):
        labels = queries.labels[part].to(device)
        for tally, weights in zip(tallies, scores, strict=True):
            voted_for = weights.gather(1, labels[:, None])[:, 0] > 0
            tally.add(weights, labels, possible=voted_for)
        ticker.at(part.stop)
    return [tally.accuracy(comm, device) for tally in tallies], images

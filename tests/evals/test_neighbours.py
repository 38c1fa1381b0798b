"""Votes over sharded banks equal scikit-learn's; the count of right answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, recall_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals import nearest
from ddp_ssl.evals.accuracy import Accuracy, Tally, over_images, over_seeds
from tests.ranks import Ranks

K = [1, 5, 20, 100, 400]
T = 0.07
CPU = torch.device("cpu")


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    noise = np.random.default_rng(0).normal(size=x.shape)  # no two similarities are equal
    return torch.tensor(x + 0.1 * noise, dtype=torch.float32), torch.tensor(y)


def parts(total: int, size: int) -> list[int]:
    """Uneven shares; with three processes the second one has nothing."""
    return {1: [0, total], 2: [0, total // 3, total], 3: [0, total // 4, total // 4, total]}[size]


def predictions(world: World, queries: int, chunk: int, block: int) -> list[list[int]]:
    nearest.QUERIES, nearest.BLOCK = chunk, block
    comm, (x, y) = comm_of(world), digits()
    bank, labels, test = x[:700], y[:700], x[700 : 700 + queries]
    b, q = parts(700, world.size), parts(queries, world.size)
    mine = slice(b[world.rank], b[world.rank + 1])
    found: list[list[int]] = [[] for _ in K]
    for _, scores in nearest.sharded_votes(
        (bank[mine], labels[mine]), test[q[world.rank] : q[world.rank + 1]], K, 10, T, comm
    ):
        for rows, weights in zip(found, scores, strict=True):
            rows += weights.argmax(1).tolist()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_votes_equal_scikit_learns(ranks: Ranks, world_size: int) -> None:
    x, y = digits()
    results = ranks.run(predictions, world_size, 301, 64, 128)
    for i, k in enumerate(K):
        oracle = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / T)
        ).fit(x[:700].double(), y[:700])
        expected = oracle.predict(x[700:1001].double()).tolist()
        assert [p for result in results for p in result[i]] == expected
        whole = nearest.knn_predict(x[:700], y[:700], x[700:1001], k, T)
        assert whole.tolist() == expected


def test_a_bank_smaller_than_k_votes_with_all_it_has() -> None:
    x, y = digits()
    ((rows, (few, many)),) = nearest.sharded_votes(
        (x[:7], y[:7]), x[7:10], [7, 50], 10, T, ONE_PROCESS
    )
    assert rows == slice(0, 3)
    assert torch.equal(few, many)


def test_accuracies_equal_scikit_learns(ranks: Ranks) -> None:
    for accuracy in ranks.run(tallied, 3):
        scores, labels = some_scores()
        found, true = scores.numpy(), labels.numpy()
        assert accuracy.top1 == pytest.approx(accuracy_score(true, found.argmax(1)))
        assert accuracy.top5 == pytest.approx(
            top_k_accuracy_score(true, found, k=5, labels=range(8))
        )
        recall = recall_score(true, found.argmax(1), labels=range(8), average=None, zero_division=0)
        assert accuracy.per_class[:7] == pytest.approx(recall[:7])
        assert np.isnan(accuracy.per_class[7])  # no image of it
        assert accuracy.images == 100
        right = np.unpackbits(np.frombuffer(accuracy.right, np.uint8))[:100]
        assert right.sum() == accuracy.correct
        # Rank 0's images come first, then those of rank 1.
        own = np.concatenate([[*range(r, 50, 3), *range(50 + r, 100, 3)] for r in range(3)])
        assert (right == (true == found.argmax(1))[own]).all()


def some_scores() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (100,), generator=g)
    return torch.randn(100, 8, generator=g) + 2 * torch.eye(8)[labels], labels


def tallied(world: World) -> Accuracy:
    scores, labels = some_scores()
    tally = Tally(8)
    for start in (0, 50):
        own = slice(start + world.rank, start + 50, world.size)
        tally.add(scores[own], labels[own])
    return tally.accuracy(comm_of(world), CPU)


def test_five_classes_have_no_top5() -> None:
    tally = Tally(5)
    tally.add(torch.eye(5), torch.arange(5))
    assert tally.accuracy(ONE_PROCESS, CPU).top5 is None


def test_a_class_without_a_vote_is_never_right() -> None:
    """Of six classes two have votes; the true one has none, and any order of the rest is chance."""
    votes = torch.zeros(1, 6)
    votes[0, 4:] = 1
    for label in range(4):
        tally = Tally(6)
        tally.add(votes, torch.tensor([label]), possible=torch.tensor([False]))
        accuracy = tally.accuracy(ONE_PROCESS, CPU)
        assert accuracy.top1 == accuracy.top5 == 0


def accuracy_of(correct: int) -> Accuracy:
    return Accuracy(correct / 100, None, (), correct, 100)


def test_intervals() -> None:
    """Wilson's for 90 of 100 and Student's for three values, from their formulas."""
    found = over_images([accuracy_of(90)])
    z = 1.959963984540054
    centre = (0.9 + z**2 / 200) / (1 + z**2 / 100)
    half = z / (1 + z**2 / 100) * np.sqrt(0.9 * 0.1 / 100 + z**2 / 40000)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert over_seeds([accuracy_of(90)]) is None
    sd, interval = over_seeds([accuracy_of(n) for n in (80, 90, 91)])
    assert sd == pytest.approx(np.std([0.80, 0.90, 0.91], ddof=1))
    assert interval.high - 0.87 == pytest.approx(4.302652729911275 * sd / np.sqrt(3))
    assert interval.low + interval.high == pytest.approx(2 * 0.87)

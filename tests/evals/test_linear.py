"""The linear classifier: scikit-learn's accuracy, heads that are apart, any number of processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.data.datasets.selection import per_class
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals.features import Block
from ddp_ssl.evals.linear import (
    AugmentedSteps,
    CachedSteps,
    evaluate_linear,
    score,
    train_heads,
)
from ddp_ssl.evals.settings import PROTOCOLS, Linear, protocol_of
from tests.evals import extraction
from tests.ranks import Ranks

CPU = torch.device("cpu")
SGD = replace(PROTOCOLS["sgd"], lrs=(0.1, 1.0), epochs=2, batch_size=50)
ADAM = replace(PROTOCOLS["adam"], lrs=(1e-3, 1e-2), epochs=2, batch_size=50)


def digits() -> tuple[Block, Block]:
    """1,200 images to train on and 597 to test on; 64 pixels in [0, 2] are the features."""
    x, y = load_digits(return_X_y=True)
    features, labels = torch.tensor(x / 8, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return (
        Block(features[train], labels[train], torch.arange(1200)),
        Block(features[test], labels[test], torch.arange(597)),
    )


def steps_of(block: Block, batch: int, seed: int = 0, comm: Comm = ONE_PROCESS) -> CachedSteps:
    return CachedSteps(block, batch, seed, comm, CPU)


def weights(heads: list[torch.nn.Linear]) -> list[Tensor]:
    return [p.detach() for head in heads for p in head.parameters()]


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.3), ("adam", 0.01)])
def test_as_good_as_scikit_learns_logistic_regression(name: str, lr: float) -> None:
    """The same penalty, so the same optimum: within 0.5 points, which are three images."""
    train, test = digits()
    protocol = replace(
        PROTOCOLS[name], lrs=(lr,), epochs=60, batch_size=300, label_smoothing=0.0,
        weight_decay=1 / 120,
    )  # fmt: skip
    (head,), (finite,) = train_heads(steps_of(train, 300), protocol, 0, 64, 10)
    assert finite
    oracle = LogisticRegression(C=120 / 1200, max_iter=2000).fit(train.features, train.labels)
    expected = oracle.score(test.features, test.labels)
    assert expected > 0.95
    accuracy = score(head, test, 10, ONE_PROCESS, CPU)
    assert accuracy.top1 == pytest.approx(expected, abs=0.005)
    assert accuracy.images == 597
    predicted = head(test.features).argmax(1).numpy()
    assert (predicted == oracle.predict(test.features)).mean() > 0.98


@pytest.mark.parametrize("protocol", [SGD, ADAM], ids=["sgd", "adam"])
def test_several_rates_are_separate_runs_to_the_last_bit(protocol: Any) -> None:
    train, _ = digits()
    together, _ = train_heads(steps_of(train, 50), protocol, 3, 64, 10)
    for head, lr in zip(together, protocol.lrs, strict=True):
        (alone,), _ = train_heads(steps_of(train, 50), replace(protocol, lrs=(lr,)), 3, 64, 10)
        for a, b in zip(weights([head]), weights([alone]), strict=True):
            assert torch.equal(a, b)


def test_few_of_each_class_are_these_images_alone() -> None:
    """As on a data set of the chosen images; another seed chooses others."""
    settings = extraction.settings_of(extraction.RANDOM)
    linear = Linear(lr=[0.3, 1], epochs=5, seeds=[4], held_out=0)
    train, test = extraction.split_of(80), extraction.split_of(30)
    found = []
    for few, split in (
        (3, train),
        (None, train.subset(np.flatnonzero(per_class(train.labels, 3, 4)))),
    ):
        own = settings.model_copy(update={"linear": linear.model_copy(update={"per_class": few})})
        extractor = extraction.extractor_of(own, World(0, 1, 0, 1, CPU))
        found.append(evaluate_linear(extractor, split, test, 5)[1:])
    assert found[0] == found[1]
    held = settings.model_copy(update={"linear": Linear(lr=[0.3, 1], epochs=5, per_class=3)})
    extractor = extraction.extractor_of(held, World(0, 1, 0, 1, CPU))
    _, results, best = evaluate_linear(extractor, train, test, 5)
    assert best is None
    assert len({result.test[0].right for result in results}) > 1


def sharded(world: World, name: str) -> list[Tensor]:
    """Uneven contiguous parts, the second of three empty; the last batch is a small one."""
    train, _ = digits()
    bounds = {1: [0, 1200], 3: [0, 333, 333, 1200]}[world.size]
    mine = slice(bounds[world.rank], bounds[world.rank + 1])
    block = Block(train.features[mine], train.labels[mine], train.ids[mine])
    held = torch.arange(1200) % 7 == 0
    protocol = {"sgd": SGD, "adam": ADAM}[name]
    heads, _ = train_heads(steps_of(block, 70, 1, comm_of(world)), protocol, 1, 64, 10, held)
    return weights(heads)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_three_processes_give_what_one_gives(ranks: Ranks, name: str) -> None:
    (expected,) = ranks.run(sharded, 1, name)
    for result in ranks.run(sharded, 3, name):
        for a, b in zip(result, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_held_out_images_are_not_seen_by_the_heads_that_choose() -> None:
    train, _ = digits()
    held = torch.arange(1200) % 5 == 0
    wrong = Block(train.features, train.labels.where(~held, 9 - train.labels), train.ids)
    plain, _ = train_heads(steps_of(train, 50), SGD, 0, 64, 10, held)
    other, _ = train_heads(steps_of(wrong, 50), SGD, 0, 64, 10, held)
    for a, b in zip(weights(plain[2:]), weights(other[2:]), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain[0].weight, other[0].weight)


def test_one_step_by_hand() -> None:
    train, _ = digits()
    block = Block(train.features[:50], train.labels[:50], train.ids[:50])
    protocol = replace(
        PROTOCOLS["sgd"], lrs=(0.5,), epochs=1, batch_size=50, weight_decay=0.1, label_smoothing=0.2
    )
    (before,), _ = train_heads(steps_of(block, 50), replace(protocol, epochs=0), 0, 64, 10)
    (after,), _ = train_heads(steps_of(block, 50), protocol, 0, 64, 10)
    loss = F.cross_entropy(before(block.features), block.labels, label_smoothing=0.2)
    gradient = torch.autograd.grad(loss, before.weight)[0] + 0.1 * before.weight
    expected = before.weight - 0.5 * 50 / 256 * gradient  # per 256 images
    assert torch.allclose(after.weight, expected, atol=1e-6)


def augmented(world: World) -> tuple[list[Tensor], list[Tensor]]:
    """Heads trained on whole images through the network, and on cached features."""
    split, comm = extraction.split_of(48), comm_of(world)
    whole = extraction.FLIPPED | {"flip_p": 0}
    extractor = extraction.extractor_of(extraction.settings_of(whole), world)
    protocol, held = replace(SGD, batch_size=12), torch.arange(48) % 7 == 0
    steps = AugmentedSteps(extractor, split, protocol, 5)
    through, _ = train_heads(steps, protocol, 5, 6, 5, held)
    steps.loader.close()
    ready = CachedSteps(extractor.features(split), 12, 5, comm, CPU)
    cached, _ = train_heads(ready, protocol, 5, 6, 5, held)
    return weights(through), weights(cached)


@pytest.mark.parametrize("size", [1, 3])
def test_augmenting_nothing_is_training_on_ready_features(ranks: Ranks, size: int) -> None:
    for through, cached in ranks.run(augmented, size):
        for a, b in zip(through, cached, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_rate_that_diverges_is_said() -> None:
    train, _ = digits()
    protocol = replace(SGD, lrs=(1e38, 0.1))
    _, finite = train_heads(steps_of(train, 50), protocol, 0, 64, 10)
    assert finite == [False, True]


def test_what_is_set_replaces_the_protocols() -> None:
    assert protocol_of(Linear(protocol="adam")) == PROTOCOLS["adam"]
    assert PROTOCOLS["adam"].peaks == (1e-3,)
    changed = protocol_of(Linear(protocol="adam", lr=0.1, patches=1, weight_decay=0))
    assert changed == replace(PROTOCOLS["adam"], lrs=(0.1,), patches=1, weight_decay=0.0)
    assert protocol_of(Linear(batch_size=512, lr=[0.5])).peaks == (1.0,)

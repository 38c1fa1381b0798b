"""Images without a label: the probe leaves them out exactly, k-NN votes with labelled ones only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals.validation import Validation
from ddp_ssl.methods._learner import Learner
from ddp_ssl.utils import device_timer
from tests.data.images import picture
from tests.helpers import batch_of, config_of, images, method_of
from tests.ranks import Ranks

LABELS = torch.tensor([-1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 1, -1])


def features_of(views: int, count: int, learner: Learner) -> torch.Tensor:
    assert learner.probe is not None
    features = images(views, count, 4)[:, :, :, 0].flatten(2)
    return features.repeat(1, 1, 100)[..., : learner.probe.in_features]


def probe_of(world: World, labels: list[int], views: int, view_shards: int, weighted: bool) -> Any:
    """This process's loss and top-1, and the probe's gradient."""
    comm = comm_of(world, view_shards)
    learner = Learner(method_of(config_of(), comm), 3).double()
    torch.nn.init.normal_(learner.probe.weight, generator=torch.Generator().manual_seed(0))
    features = features_of(views, len(labels), learner)
    mine = features[comm.views, comm.rows(len(labels) // comm.data_shards)]
    known = torch.tensor(labels)[comm.rows(len(labels) // comm.data_shards)]
    loss, top1 = learner._probe(mine, known, weighted)
    loss.backward()
    return float(loss.detach()), float(top1), learner.probe.weight.grad.numpy()


@pytest.mark.parametrize("weighted", [True, False])
def test_the_mean_over_ranks_is_over_all_labelled_images(ranks: Ranks, weighted: bool) -> None:
    """Of unknown labels at W = 4 one rank has three labelled images, one has one, two none."""
    labels = LABELS.tolist() if weighted else [i % 3 for i in range(12)]
    learner = Learner(method_of(config_of()), 3).double()
    torch.nn.init.normal_(learner.probe.weight, generator=torch.Generator().manual_seed(0))
    known = torch.tensor(labels) >= 0
    logits = learner.probe(features_of(2, len(labels), learner)[:, known]).flatten(0, 1)
    target = torch.tensor(labels)[known].repeat(2)
    whole = F.cross_entropy(logits, target)
    whole.backward()
    loss, gradient = float(whole.detach()), learner.probe.weight.grad.numpy()
    top1 = float((logits.argmax(1) == target).double().mean())
    for size, view_shards in ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2)):
        results = ranks.run(probe_of, size, labels, 2, view_shards, weighted)
        assert np.mean([r[0] for r in results]) == pytest.approx(loss, rel=1e-12)
        assert np.mean([r[1] for r in results]) == pytest.approx(top1, rel=1e-12)
        assert np.allclose(np.mean([r[2] for r in results], 0), gradient, rtol=1e-12, atol=1e-14)


def test_timing_the_probe_changes_nothing() -> None:
    x, ends = batch_of(images(2, 12)), []
    for timing in (False, True):
        learner = Learner(method_of(config_of()), 3).double()
        torch.nn.init.normal_(learner.probe.weight, generator=torch.Generator().manual_seed(0))
        learner.timing = timing
        total, figures = learner(x)
        total.backward()
        assert (learner.timed is not None) == timing
        gradients = [p.grad for p in learner.parameters() if p.grad is not None]
        ends.append((total, figures["train/probe_loss"], figures["train/probe_top1"], *gradients))
    assert len(ends[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert device_timer.seconds_between(*learner.timed) > 0


def test_unlabelled_images_change_nothing() -> None:
    learner = Learner(method_of(config_of()), 3).double()
    torch.manual_seed(0)
    features = torch.randn(2, 12, learner.probe.in_features, dtype=torch.float64)
    known = LABELS >= 0
    loss, top1 = learner._probe(features, LABELS, weighted=True)
    logits = learner.probe(features[:, known]).flatten(0, 1).detach()
    target = LABELS[known].repeat(2)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-12)
    assert float(top1) == pytest.approx(float((logits.argmax(1) == target).double().mean()))


def test_a_batch_without_labels_is_no_loss() -> None:
    learner = Learner(method_of(config_of()), 3).double()
    batch = batch_of(images(2, 12))
    total, figures = learner(Batch(batch.views, batch.ids, torch.full((12,), -1)))
    total.backward()
    assert float(figures["train/probe_loss"].detach()) == 0 == float(figures["train/probe_top1"])
    assert float(learner.probe.weight.grad.abs().max()) == 0


def array(first: int, labels: list[int]) -> Split:
    pixels = [picture(i, 20, 20) for i in range(first, first + len(labels))]
    return Split.of_array(np.stack(pixels), np.array(labels))


def validation_of(data: Dataset) -> tuple[dict[str, float], Validation]:
    config = config_of("eval.batch_size=4", "eval.knn_k=3")
    method = method_of(config, dtype=torch.float32)
    learner = Learner(method, data.num_classes)
    for p in learner.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    validation = Validation(data, config, method.comm, torch.device("cpu"))
    return validation.metrics(method, learner.probe, True, True), validation


def test_the_bank_and_the_accuracies_are_of_labelled_images() -> None:
    labels = [0, 1, 2, 0, 1, 2]
    plain = Dataset("x", array(0, labels), array(50, [0, 1, 2, 2]), ("a", "b", "c"))
    mixed = Dataset("x", array(0, [*labels, -1, -1]), array(50, [0, 1, 2, 2, -1]), ("a", "b", "c"))
    (expected, one), (figures, other) = validation_of(plain), validation_of(mixed)
    assert figures["eval/knn_bank"] == 6
    for name in ("eval/knn_top1", "eval/knn_bank", "eval/probe_top1"):
        assert figures[name] == expected[name]
    assert other.raw_pixels() == one.raw_pixels()


def test_the_bank_is_whole_where_a_fraction_is_trained_on() -> None:
    labels = [0, 1, 2, 0, 1, 2]
    whole = array(0, labels)
    part = Dataset("x", whole.subset(np.arange(3)), array(50, [0, 1]), ("a", "b", "c"), whole)
    assert validation_of(part)[0]["eval/knn_bank"] == 6


def test_without_any_labels_only_the_representation_is_measured() -> None:
    data = Dataset("x", array(0, [-1] * 6), array(50, [-1] * 4))
    figures, validation = validation_of(data)
    assert not validation.labelled
    assert figures
    assert all(name.startswith("rep/") for name in figures)

"""k-NN, the probe's isolation, and a validation pass over uneven shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp_ssl.data.datasets import registry
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals.nearest import knn_predict
from ddp_ssl.evals.validation import Validation
from ddp_ssl.methods._learner import Learner
from tests.helpers import batch_of, config_of, images, method_of
from tests.ranks import Ranks


def test_knn_votes_weigh_exp_of_the_cosine() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    queries = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -0.1]])
    assert knn_predict(bank, labels, queries, k=1).tolist() == [0, 1, 2]
    # With a high temperature all neighbours count alike, so two of class 1 outvote one of class 0.
    assert knn_predict(bank, labels, queries[:1], k=3, temperature=100).tolist() == [1]
    assert knn_predict(bank, labels, queries[:1], k=3, temperature=0.001).tolist() == [0]


def test_knn_against_plain_loops() -> None:
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=g), torch.randn(23, 6, generator=g)
    labels = torch.randint(0, 4, (50,), generator=g)
    expected = []
    for q in queries:
        cosines = [float(q @ b / q.norm() / b.norm()) for b in bank]
        nearest = sorted(range(50), key=lambda i: -cosines[i])[:7]
        votes = [0.0] * 4
        for i in nearest:
            votes[int(labels[i])] += np.exp(cosines[i] / 0.07)
        expected.append(int(np.argmax(votes)))
    assert knn_predict(bank, labels, queries, k=7, chunk=5).tolist() == expected
    assert knn_predict(bank, labels, queries, k=500).shape == (23,)


def test_the_probe_learns_and_does_not_touch_the_method() -> None:
    batch = batch_of(images(2, 12))
    gradients = []
    for classes in (0, 3):
        learner = Learner(method_of(config_of()), classes).double()
        total, figures = learner(batch)
        total.backward()
        gradients.append([p.grad for p in learner.method.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert learner.probe is not None
    assert learner.probe.weight.grad.norm() > 0
    assert float(total.detach()) == pytest.approx(
        sum(
            float(torch.as_tensor(figures[name]).detach())
            for name in ("train/loss", "train/probe_loss")
        )
    )


def figures(world: World, root: str, bank: int, measured: int) -> Any:
    config = config_of(
        "data.name=folder", f"data.root={root}", "eval.batch_size=4", f"eval.knn_bank={bank}",
        f"measure.max_images={measured}", "eval.knn_k=3", "data.val_fraction=0.3",
    )  # fmt: skip
    data = registry.load(config.data, 0)
    method = method_of(config, dtype=torch.float32)
    learner = Learner(method, data.num_classes)
    torch.nn.init.normal_(learner.probe.weight, generator=torch.Generator().manual_seed(0))
    validation = Validation(data, config, comm_of(world), torch.device("cpu"))
    out = validation.metrics(method, learner.probe, True, True)
    assert method.training
    assert validation.metrics(method, learner.probe, False, True).keys() < out.keys()
    return out, validation.raw_pixels()


@pytest.mark.parametrize(("bank", "measured"), [(1000, 1000), (7, 5)])
def test_figures_do_not_depend_on_the_number_of_processes(
    ranks: Ranks, photos: Path, bank: int, measured: int
) -> None:
    """14 validation images, 34 or 7 in the bank: no world size divides them all."""
    ((expected, pixels),) = ranks.run(figures, 1, str(photos), bank, measured)
    assert expected["eval/knn_bank"] == min(bank, 34)
    assert 0 < expected["eval/knn_top1"] <= 1
    assert 1 < expected["rep/effective_rank_z"] < min(measured, 12)
    for size in (3, 4):
        for result, raw in ranks.run(figures, size, str(photos), bank, measured):
            assert result == pytest.approx(expected, rel=1e-4)
            assert raw == pytest.approx(pixels)

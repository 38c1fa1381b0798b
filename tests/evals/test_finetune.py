"""Fine-tuning: any number of processes, shares of the labels, the backbone's own rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.finetune import FinetuneResult, evaluate_finetune
from ddp_ssl.evals.settings import EvaluateConfig
from ddp_ssl.models import build_backbone
from tests.helpers import config_of
from tests.ranks import Ranks

CPU = torch.device("cpu")
SIZE, CLASSES = 16, 3


def split_of(count: int, seed: int) -> Split:
    """Noise on one of three stripes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 120, (count, SIZE, SIZE, 3))
    for image, label in zip(images, labels, strict=True):
        image[4 * label + 2 : 4 * label + 5] += 100
    return Split.of_array(images.astype(np.uint8), labels)


def settings_of(**finetune: Any) -> EvaluateConfig:
    """Whole images, unchanged, so that processes cannot differ in what they draw."""
    view = {"size": SIZE, "scale": [1, 1], "ratio": [1, 1], "flip_p": 0}
    return EvaluateConfig.model_validate(
        {
            "data": {"views": [view], "threads": 1, "read_threads": 2},
            "finetune": {"batch_size": 12, "epochs": 3, "backbone_lr": 1.0, **finetune},
        }
    )


def backbone() -> tuple[torch.nn.Module, int]:
    torch.manual_seed(0)
    return build_backbone(config_of().model, [SIZE])


def finetuned(world: World, finetune: dict[str, Any]) -> tuple[list[FinetuneResult], bool]:
    """The results, and whether the pretrained backbone stayed as it was."""
    network, width = backbone()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    extractor = Extractor(network, width, settings_of(**finetune), comm_of(world), CPU)
    results = evaluate_finetune(extractor, split_of(50, 0), split_of(30, 1), CLASSES, world)
    same = all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return results, same


def test_three_processes_train_what_one_trains(ranks: Ranks) -> None:
    gently = {"lr": 0.01}  # so that rounding does not grow from step to step
    (((expected,), untouched),) = ranks.run(finetuned, 1, gently)
    assert untouched
    assert expected.steps == 12  # 50 images in batches of 12, three times
    for (result,), _ in ranks.run(finetuned, 3, gently):
        assert result.loss == pytest.approx(expected.loss, rel=1e-4)
        assert result.test.top1 == pytest.approx(expected.test.top1, abs=0.04)
        assert result.test.images == 30


def test_it_learns_and_seeds_differ(ranks: Ranks) -> None:
    (((one, two), _),) = ranks.run(finetuned, 1, {"epochs": 8, "lr": 1.0, "seeds": [0, 1]})
    assert one.test.top1 > 0.6
    assert one.loss < 0.6
    assert one.loss != two.loss
    adam = {"epochs": 8, "lr": 0.05, "optimizer": "adamw"}
    (((adamw,), _),) = ranks.run(finetuned, 1, adam)
    assert adamw.test.top1 > 0.6


def test_shares_of_the_labels(ranks: Ranks) -> None:
    for fraction, images, batch in ((0.5, 24, 12), (0.1, 6, 6), (0.01, 3, 2)):
        for (result,), _ in ranks.run(finetuned, 2, {"fraction": fraction, "epochs": 1}):
            assert (result.images, result.batch_size) == (images, batch)
    with pytest.raises(AssertionError, match=r"finetune.fraction: 0.01 leaves 3 images for 4"):
        ranks.run(finetuned, 4, {"fraction": 0.01})


def test_a_backbone_rate_of_zero_trains_the_classifier_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddp_ssl.evals import finetune

    kept: list[finetune.Classifier] = []
    train = finetune._train

    def spy(model: finetune.Classifier, *args: Any) -> float:
        kept.append(model)
        return train(model, *args)

    monkeypatch.setattr(finetune, "_train", spy)
    alone = World(0, 1, 0, 1, CPU)
    for rate, frozen in ((0.0, True), (0.5, False)):
        finetuned(alone, {"backbone_lr": rate, "epochs": 1})
        start: dict[str, Tensor] = dict(backbone()[0].named_parameters())
        same = [torch.equal(p, start[n]) for n, p in kept[-1].backbone.named_parameters()]
        assert all(same) is frozen
        assert any(same) is frozen


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^finetune.lr: with 1e\+30 the loss is nan in epoch \d"):
        finetuned(World(0, 1, 0, 1, CPU), {"lr": 1e30, "warmup_epochs": 0})

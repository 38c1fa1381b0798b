"""A run's warnings about itself: settings that will disappoint, and a collapse."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.run.configure import load
from ddp_ssl.run.status import RunStatus
from ddp_ssl.training import forecast as forecasts
from ddp_ssl.training.forecast import forecast
from ddp_ssl.training.report import judge
from ddp_ssl.training.verdict import ADVICE, FINE, verdict
from tests.helpers import SHALLOW
from tests.ranks import Ranks
from tests.runs import status, train

# A rate at which a collapse is complete within 66 steps. With other seeds not every one is.
FAST = ("optim.name=adamw", "optim.lr=0.05", "model.projector_norm=none")
PLANTED = {
    "adadim": ("method.name=adadim", "method.alpha_every=1", "optim.lr=1000"),
    "barlow_twins": ("method.name=tests.collapsing:RewardedRedundancy", *FAST),
    "byol": ("method.name=tests.collapsing:NoPredictor", *FAST),
    "deepclusterv2": ("method.name=tests.collapsing:OneCluster", *FAST),
    "dino": ("method.name=tests.collapsing:NoCentre", *FAST),
    "lejepa": ("method.name=lejepa", "method.sigreg=0", *FAST),
    "mmcr": ("method.name=tests.collapsing:Minimised", *FAST),
    "mocov2plus": ("method.name=tests.collapsing:EmptyQueue", *FAST),
    "mocov3": ("method.name=tests.collapsing:NoNegatives", *FAST),
    "nnclr": ("method.name=tests.collapsing:NeighboursAlone", "run.seed=1", *FAST),
    "ressl": ("method.name=ressl", "method.key_temperature=10", *FAST),
    "simclr": ("method.name=simclr", "optim.name=adamw", "optim.lr=20"),
    "simsiam": ("method.name=tests.collapsing:NoStop", *FAST),
    "swav": ("method.name=tests.collapsing:NoBalance", *FAST),
    "vicreg": ("method.name=vicreg", "method.variance=0", "method.covariance=0", *FAST),
}
# DINO does not learn with the small projector of `short`.
OWN = {"dino": ("model.projector=[512, 512, 64]",)}


def marked(*at_once: str) -> list[Any]:
    """All methods; `make test` takes those named, since each takes some seconds."""
    late = pytest.mark.faults
    return [pytest.param(name, marks=() if name in at_once else late) for name in PLANTED]


def short(folder: Path, *more: str) -> list[str]:
    """A run of some seconds on the digits, measured at its start, in between and at its end."""
    return [
        f"run.dir={folder}", "run.device=cpu", "run.threads=1", SHALLOW,
        "model.projector=[64, 32]", "data.batch_size=64",
        "data.views=[{count: 2, size: 16, recipe: sym, scale: [0.4, 1], blur_p: 0, flip_p: 0}]",
        "optim.epochs=3", "optim.warmup_epochs=0.5", "eval.every=2", "measure.every=2",
        "eval.raw_pixels=false", "log.tensorboard=false", "checkpoint.every=10", *more,
    ]  # fmt: skip


def observed(args: list[str]) -> tuple[int | str, str]:
    """The exit code, and the verdict in `status.json` after step 50."""
    verdicts = [""]

    def look(job: Any) -> None:
        if job.state.step == 50:
            verdicts.append(status(job.setting.folder).get("verdict", ""))

    return train(args, on_step=look), verdicts[-1]


def test_every_method_has_a_planted_collapse() -> None:
    assert sorted(PLANTED) == builtin_methods()


@pytest.mark.parametrize("name", marked("adadim", "barlow_twins", "simclr", "vicreg"))
def test_a_planted_collapse_is_said(ranks: Ranks, tmp_path: Path, name: str) -> None:
    ((code, running),) = ranks.launch(observed, 1, short(tmp_path, *PLANTED[name]))
    assert code == 0
    judged = status(tmp_path)["verdict"]
    assert judged.startswith("collapsed: "), judged
    log = (tmp_path / "train.log").read_text()
    if name == "simclr":  # before the end already; when AdaDim's huge rate shows is chance
        assert "WARNING step 44: collapsed: " in log
        assert running.startswith("collapsed: ")
    assert log.count(judged) >= 2  # in the result's table, and below it
    assert ADVICE in log[log.index("The backbone, without ddp_ssl") :]
    assert f"| {judged}" in (tmp_path / "result.md").read_text()


@pytest.mark.parametrize("name", marked("adadim", "barlow_twins"))
def test_a_run_that_trains_raises_no_alarm(ranks: Ranks, tmp_path: Path, name: str) -> None:
    words = short(tmp_path, f"method.name={name}", *OWN.get(name, ()))
    assert ranks.launch(train, 1, words) == [0]
    assert status(tmp_path)["verdict"] == FINE
    assert "WARNING" not in (tmp_path / "train.log").read_text()


def figures(knn: float, *others: float) -> dict[str, float]:
    """Effective ranks of R and Z, uniformities of R and Z."""
    names = ("effective_rank_r", "effective_rank_z", "uniformity_r", "uniformity_z")
    found = {f"rep/{name}": value for name, value in zip(names, others, strict=True)}
    return found if math.isnan(knn) else {"eval/knn_top1": knn, **found}


THROUGH = "MMCR, Z passes through two dimensions"
# Measured: the untrained network's figures, and those some epochs later.
TRAINED = {
    "MMCR, k-NN dips": ((0.850, 13.6, 15.5, -0.113, -0.108), (0.772, 30.8, 26.5, -1.12, -1.84)),
    THROUGH: (
        (0.825, 16.6, 20.5, -0.187, -0.161), (0.894, 42.0, 2.43, -1.54, -1.72)),
    "MMCR from a poor start": (
        (0.273, 1.65, 1.67, -0.0101, -0.0102), (0.925, 163.0, 94.2, -1.41, -2.60)),
    "AdaDim after two epochs": (
        (0.850, 13.6, 21.9, -0.113, -0.104), (0.777, 8.72, 16.0, -0.183, -0.229)),
    "DINO": ((0.763, 6.49, 5.26, -0.110, -0.0733), (0.872, 38.1, 6.16, -2.0, -0.103)),
    "DeepCluster v2": ((0.763, 6.49, 8.67, -0.110, -0.0882), (0.864, 42.8, 20.9, -1.99, -0.103)),
    "ReSSL": ((0.763, 6.49, 8.67, -0.110, -0.0882), (0.844, 41.8, 32.4, -2.13, -0.525)),
    "SimSiam": ((0.763, 6.49, 11.2, -0.110, -0.107), (0.894, 37.4, 50.6, -2.06, -2.19)),
    "SwAV": ((0.825, 16.6, 19.1, -0.187, -0.160), (0.908, 36.7, 12.3, -1.84, -2.14)),
    "Barlow Twins": ((0.850, 13.6, 11.1, -0.113, -0.114), (0.905, 70.3, 36.3, -2.12, -3.01)),
    "ReSSL, a tiny network": (
        (0.457, 3.95, 7.11, -0.278, -0.411), (0.635, 10.0, 4.50, -1.62, -0.0813)),
    "DeepCluster v2, a tiny network": (
        (0.457, 3.95, 7.11, -0.278, -0.411), (0.527, 11.3, 4.45, -1.66, -0.0563)),
    "DINO, a tiny network after 66 steps": (
        (0.457, 3.95, 4.79, -0.278, -0.332), (0.465, 9.93, 3.24, -1.66, -0.0577)),
    "ReSSL, a tiny network that spreads little": (
        (0.345, 2.36, 3.17, -0.117, -0.157), (0.423, 8.63, 3.30, -1.29, -0.0321)),
    "SimCLR on pictures": ((0.378, 51.4, 53.4, -0.241, -0.231), (0.523, 85.4, 16.8, -1.76, -2.86)),
    "DINO on pictures": ((0.378, 51.4, 45.7, -0.241, -0.281), (0.473, 59.3, 7.84, -1.62, -0.915)),
    "LARS on pictures": ((0.439, 38.0, 34.1, -0.175, -0.138), (0.573, 61.4, 61.6, -1.78, -2.36)),
}  # fmt: skip
COLLAPSED = {
    "BYOL without momentum": (
        (0.457, 3.95, 6.42, -0.278, -0.256), (0.460, 4.56, 2.26, -0.344, -0.0469)),
    "AdaDim at a huge rate": (
        (0.457, 3.95, 6.42, -0.278, -0.256), (0.410, 2.32, 1.09, -0.227, -0.00135)),
    "AdaDim, AdamW at a huge rate": (
        (0.457, 3.95, 6.42, -0.278, -0.256), (0.485, 2.03, 1.0, -0.0289, -2.2e-16)),
    "BYOL without a predictor, k-NN rises": (
        (0.457, 3.95, 7.11, -0.278, -0.411), (0.641, 8.91, 2.61, -1.57, -0.0200)),
    "VICReg with invariance alone": (
        (0.457, 3.95, 7.11, -0.278, -0.411), (0.376, 10.5, 1.49, -1.55, -0.00311)),
    "LeJEPA without SIGReg from a narrow start": (
        (0.460, 3.36, 3.47, -0.176, -0.101), (0.460, 8.73, 2.30, -1.09, -0.0144)),
    "R alone loses dimensions": (
        (0.450, 51.4, 45.7, -0.241, -0.281), (0.450, 10.0, 45.7, -0.241, -0.281)),
    "Z loses nine tenths of its dimensions": (
        (0.378, 51.4, 53.4, -0.241, -0.401), (0.378, 51.4, 4.0, -0.241, -0.0601)),
    "All the same but for noise": (
        (0.850, 13.6, 15.5, -0.113, -0.108), (0.850, 13.0, 30.0, -0.15, -0.001)),
    "AdaDim on 800 pictures, R alone": (
        (0.33, 32.8, 30.0, -0.2, -0.2), (0.23, 1.2, 30.0, -0.2, -0.2)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_measured_runs_that_train_are_fine(name: str) -> None:
    first, now = (figures(*values) for values in TRAINED[name])
    assert verdict(first, now, 359, ended=False) == FINE
    if name != THROUGH:
        ended = verdict(first, now, 359, ended=True)
        assert ended is not None
        assert not ended.startswith("collapsed")


@pytest.mark.parametrize("name", sorted(TRAINED.keys() - {THROUGH}))
def test_measured_runs_without_labels_are_fine(name: str) -> None:
    """Without k-NN two dimensions on the way are an alarm."""
    first, now = (figures(math.nan, *values[1:]) for values in TRAINED[name])
    assert verdict(first, now, 359, ended=False) == FINE
    assert verdict(first, now, 359, ended=True) == FINE


@pytest.mark.parametrize("name", COLLAPSED)
def test_measured_runs_that_collapsed_are_not(name: str) -> None:
    first, now = (figures(*values) for values in COLLAPSED[name])
    assert (verdict(first, now, 359, ended=False) or "").startswith("collapsed: ")
    unlabelled = (figures(math.nan, *values[1:]) for values in COLLAPSED[name])
    assert (verdict(*unlabelled, 359, ended=True) or "").startswith("collapsed: ")


@pytest.mark.parametrize("name", ["SimCLR on pictures", "DINO on pictures", "SwAV"])
def test_methods_that_need_few_dimensions_may_end_there(name: str) -> None:
    first, now = (figures(*values) for values in TRAINED[name])
    assert verdict(first, now, 359, ended=True) == FINE


def test_few_dimensions_and_a_low_spread_count_at_the_end() -> None:
    """ReSSL with a key's temperature of 10, another seed: k-NN rises."""
    first = figures(0.345, 2.36, 3.17, -0.117, -0.157)
    now = figures(0.593, 9.64, 2.61, -1.35, -0.0174)
    assert verdict(first, now, 359, ended=False) == FINE
    said = "collapsed: spread of Z fell from 0.16 to 0.017"
    assert verdict(first, now, 359, ended=True) == said


def test_embeddings_may_pass_through_few_dimensions_but_not_end_there() -> None:
    """Barlow Twins without its off-diagonal term: each feature is the same, and k-NN rises."""
    first = figures(0.457, 3.95, 7.11, -0.278, -0.411)
    now = figures(0.582, 7.96, 2.22, -1.36, -0.783)
    assert verdict(first, now, 359, ended=False) == FINE
    said = "collapsed: effective rank of Z fell from 7.1 to 2.2"
    assert verdict(first, now, 359, ended=True) == said


def test_nothing_is_said_before_the_warm_up_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    """DINO on the digits: two dimensions after an epoch, five after the second."""
    first = figures(0.850, 13.6, 10.6, -0.113, -0.132)
    low = figures(0.833, 16.5, 1.82, -0.173, -0.0023)
    config = load(["optim.warmup_epochs=2"]).config
    state = SimpleNamespace(first=first, latest=low, step=22, epoch=1)
    job: Any = SimpleNamespace(
        config=config, data=SimpleNamespace(val=range(359)), state=state,
        setting=SimpleNamespace(config=config, status=RunStatus()),
        loader=SimpleNamespace(steps_per_epoch=22), world=SimpleNamespace(is_main=False),
    )  # fmt: skip
    for step, latest, word in (
        (22, low, ""), (44, low, "step 44: collapsed"), (66, low, ""),
        (88, first, "step 88: it has recovered"), (110, low, "step 110: collapsed"),
    ):  # fmt: skip
        state.step, state.latest = step, latest
        judge(job)
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert len(said) == bool(word)
        assert all(line.startswith(word) for line in said)


def test_knn_alone_counts_at_the_end_and_beyond_chance() -> None:
    first, now = figures(0.85, 10, 10, -1, -1), figures(0.75, 30, 30, -2, -2)
    assert verdict(first, now, 359, ended=False) == FINE
    assert verdict(first, now, 359, ended=True) == (
        "worse than at step 0: k-NN top-1 fell from 0.850 to 0.750"
    )
    assert verdict(first, now, 100, ended=True) == FINE  # within three standard errors
    assert verdict(first, now, 20, ended=True) is None
    assert verdict(first, {"eval/knn_top1": 0.1}, 359, ended=True) is None


def test_what_will_disappoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "has_bf16", lambda: False)
    config = load(["imagenet100/adadim", "optim.epochs=10", "method.alpha_every=10"]).config
    lines = [line.partition(":")[0] for line in forecast(config, 50, on_cpu=True)]
    assert lines == [
        "method.alpha_every", "optim.warmup_epochs", "optim.precision", "optim.epochs",
    ]  # fmt: skip
    config = load(["imagenet100/adadim"]).config
    assert [*forecast(config, 500, on_cpu=False)] == []
    assert [*forecast(load([]).config, 11, on_cpu=True)] == []

"""Measured during training and afterwards: the same figures, at any number of processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl import distributed
from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError
from ddp_ssl.distributed import World
from ddp_ssl.evals import dynamics
from ddp_ssl.evals.settings import load_settings
from ddp_ssl.evals.validation import Validation
from ddp_ssl.evals.weights import find_source
from tests.ranks import Ranks
from tests.runs import arguments, rows, train

OF_BOTH = (
    "effective_rank", "rankme", "von_neumann_entropy", "renyi_entropy", "eigenvalue_count",
    "eigenvalue_count_centred", "cev", "cev_centred", "uniformity", "alignment", "lidar",
)  # fmt: skip
SETTINGS = (
    "checkpoint.keep_every=1", "checkpoint.every_steps=0", "data.val_fraction=0.25",
    "measure.views=2", "measure.view_images=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs of 3 steps that kept the checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("dynamics") / "run"
    args = arguments(photos, folder, *SETTINGS, "log.tensorboard=true")
    assert ranks.launch(train, 1, args) == [0]
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def measure(world: World, folder: str, *overrides: str) -> int:
    source = find_source(folder)
    settings, _ = load_settings(source, overrides)
    assert source.home is not None
    return dynamics.run(settings, source.home, world)


def alone(folder: Path, *overrides: str) -> int:
    return measure(distributed.start("cpu"), str(folder), *overrides)


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "rep/effective_rank_r" in row]


def test_a_run_logs_every_metric(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table = measured_rows(finished)
    assert [row["step"] for row in table] == [0, 3, 6, 9]
    for row in table:
        for name in OF_BOTH:
            for space in ("r", "z"):
                assert math.isfinite(row[f"rep/{name}_{space}"]), name
        assert 0 < row["rep/alignment_z"] < 4
        assert row["rep/uniformity_r"] < 0
        assert row["rep/alpha_req_r"] > 0
        assert 0 <= row["rep/alpha_req_r2_z"] <= 1
    text = (finished / "metrics.jsonl").read_text()
    assert text.count('"perf/measure_s"') == 4
    events = EventAccumulator(str(finished), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {"rep/spectrum_r", "rep/spectrum_z"}
    spectra = events.Histograms("rep/spectrum_z")
    assert [event.step for event in spectra] == [0, 3, 6, 9]
    assert all(-12 <= e.histogram_value.min <= e.histogram_value.max <= 0 for e in spectra)


def test_views_of_validation_images_leave_a_resumed_run_exact(
    finished: Path, ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    args = arguments(photos, folder, *SETTINGS)
    assert ranks.launch(train, 1, args, 5) == ["killed"]
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    assert rows(folder) == rows(finished)


def test_measured_afterwards_is_what_was_measured_then(run: Path) -> None:
    """The file's rows are those of the run's own log, up to rounding: the threads differ."""
    assert alone(run) == 0
    found = dynamics.read(run / "dynamics.jsonl")
    logged = {row["step"]: row for row in measured_rows(run)}
    assert [row.step for row in found] == [3, 6, 9]
    assert [row.epoch for row in found] == [1, 2, 3]
    for row in found:
        expected = {n: v for n, v in logged[row.step].items() if n.startswith(("eval/", "rep/"))}
        metrics = {n: v for n, v in row.metrics.items() if not n.startswith("perf/")}
        # What adadim measures itself is not of the validation split.
        own = {"rep/alpha", "rep/beta", "rep/effective_rank_z_train"}
        expected = {n: v for n, v in expected.items() if n not in own}
        # LiDAR divides by the spread within an image, which lifts the rounding.
        lidar = {name for name in metrics if "lidar" in name}
        assert {n: metrics.pop(n) for n in lidar} == pytest.approx(
            {n: expected.pop(n) for n in lidar}, rel=1e-3
        )
        assert metrics == pytest.approx(expected, rel=1e-4)


def test_the_table_and_the_json(run: Path) -> None:
    assert alone(run, "measure.views=0") == 0
    text = (run / "evaluate" / "dynamics.md").read_text()
    head, _, *lines = text.splitlines()
    assert [cell.strip() for cell in head.split("|")][1:6] == [
        "step", "epoch", "k-NN", "probe", "rank R",
    ]  # fmt: skip
    assert "LiDAR" not in head
    assert len({len(line) for line in (head, *lines[:3])}) == 1
    found = json.loads((run / "evaluate" / "dynamics.json").read_text())
    best = store.CheckpointInfo.read(run / "checkpoints" / "best.json")
    assert [row["step"] for row in found if row["best"]] == [best.step]
    assert text.count("*") == 2  # beside the step, and in the note below
    assert f"{best.step} *" in text
    assert f"{found[0]['figures']['rep/effective_rank_r']:.1f}" in lines[0]


def collective(world: World, folder: str, out: str) -> dict[str, dict[str, float]]:
    assert measure(world, folder, "measure.views=0", f"run.dir={out}") == 0
    return {row.sha256: row.metrics for row in dynamics.read(Path(out) / "dynamics.jsonl")}


def test_processes_agree(ranks: Ranks, run: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 2, 3):
        out = tmp_path / str(size)
        all_ranks = ranks.run(collective, size, str(run), str(out))
        assert all(found == all_ranks[0] for found in all_ranks)
        results.append(all_ranks[0])
    first, *others = results
    assert len(first) == 3
    for result in others:
        for key, figures in result.items():
            for name, value in first[key].items():
                if not name.startswith("perf/"):
                    assert figures[name] == pytest.approx(value, rel=1e-4), name
    assert not (run / "dynamics.jsonl").exists()  # run.dir took the results


def test_what_is_measured_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone(run, "measure.views=0") == 0
    path = run / "dynamics.jsonl"
    whole = path.read_text()
    calls: list[Any] = []
    original = Validation.metrics

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(Validation, "metrics", counted)
    assert alone(run, "measure.views=0", "measure.every=7") == 0
    assert path.read_text() == whole
    assert not calls

    path.write_text(whole[:-20])  # the process died while it wrote the last line
    assert alone(run, "measure.views=0") == 0
    assert len(calls) == 1
    kept = [line.split('"perf/')[0] for line in path.read_text().splitlines()]
    assert kept == [line.split('"perf/')[0] for line in whole.splitlines()]

    assert alone(run, "measure.views=0", "eval.knn_k=1") == 0  # other figures: all anew
    assert len(calls) == 4
    lines = path.read_text().splitlines()
    assert [line.split('"perf/')[0] for line in lines[:3]] == kept  # the others stay
    first, second = (json.loads(lines[i])["settings"] for i in (0, 3))
    assert first != second
    assert [row.settings for row in dynamics.latest(path)] == [second] * 3
    assert alone(run, "measure.views=0") == 0  # as at first: nothing anew, and the latest again
    assert len(calls) == 4
    assert [row.settings for row in dynamics.latest(path)] == [first] * 3
    assert len(dynamics.read(path)) == 6
    assert len(json.loads((run / "evaluate" / "dynamics.json").read_text())) == 3


def test_other_data_have_their_own_file(run: Path) -> None:
    assert alone(run, "measure.views=0", "data.name=digits", "eval.knn=false") == 0
    assert not (run / "dynamics.jsonl").exists()
    assert len(dynamics.read(run / "dynamics-digits.jsonl")) == 3
    assert (run / "evaluate" / "dynamics-digits.md").is_file()
    assert alone(run, "measure.views=0", "data.val_fraction=0.5") == 0  # other images of the same
    assert not (run / "dynamics.jsonl").exists()
    assert (run / "evaluate" / "dynamics-folder.json").is_file()


def test_a_damaged_checkpoint_is_named_and_left_out(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = run / "checkpoints" / "step_00000006.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.unlink()  # best.pt may be the same file
    damaged.write_bytes(content)
    with caplog.at_level(logging.ERROR, "ddp_ssl"):
        assert alone(run, "measure.views=0") == 1
    (said,) = caplog.messages
    assert said.startswith(f"left out: checkpoint {damaged} is damaged")
    assert [row.step for row in dynamics.read(run / "dynamics.jsonl")] == [3, 9]


def test_steps_that_a_run_went_back_on_are_not_its_way(run: Path) -> None:
    """After step 9 the run went back to step 3 and saved step 5."""
    home = run / "checkpoints"
    (home / "best.json").unlink()
    earlier, newest = home / "step_00000003.pt", home / "step_00000005.pt"
    shutil.copy(earlier, newest)
    found = store.CheckpointInfo.read(earlier.with_suffix(".json"))
    later = dataclasses.replace(found, path=newest, step=5, serial=found.serial + 100)
    newest.with_suffix(".json").write_text(later.to_json())
    way, best = dynamics.chosen(run)
    assert [one.step for one in way] == [3, 5]
    assert best is None


def test_a_best_checkpoint_whose_own_file_is_gone_counts(run: Path) -> None:
    best = store.CheckpointInfo.read(run / "checkpoints" / "best.json")
    for suffix in (".pt", ".json"):
        (run / "checkpoints" / f"step_{best.step:08d}{suffix}").unlink()
    way, sha256 = dynamics.chosen(run)
    assert [one.step for one in way] == [3, 6, 9]
    assert [one.path.name for one in way if one.sha256 == sha256] == ["best.pt"]


def test_a_run_without_checkpoints_is_one_line(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"^\S*checkpoints: no checkpoint; [^\n]*$"):
        alone(run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("measure.views=1", "measure.views: one view cannot be compared"),
        ("measure.max_images=1", "measure.max_images"),
    ],
)
def test_settings_that_cannot_be_measured(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        alone(run, override)


def test_more_processes_than_images_with_views(ranks: Ranks, run: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"measure\.views: the views of 2 validation images"):
        ranks.run(measure, 3, str(run), "measure.views=2", "measure.view_images=2")

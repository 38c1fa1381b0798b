"""ddp-ssl reproduce: every config is valid, runs are kept and resumed, tables are right."""

from __future__ import annotations

import fcntl
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddp_ssl import submit
from ddp_ssl.commands import reproduce, submit_options
from ddp_ssl.config import Config
from ddp_ssl.config.files import FOLDER
from ddp_ssl.reproduction import (
    adadim,
    configs,
    cost,
    graph,
    multiview,
    orthogonalisation,
    pictures,
    results,
    runs,
    sphere,
    theorem,
)
from ddp_ssl.reproduction.cells import Cell, Table, _published
from ddp_ssl.run import configure
from ddp_ssl.run.configure import load
from ddp_ssl.run.identity import identity

TABLES = [t for t in reproduce.EVERYTHING.values() if isinstance(t, Table)]


def table(name: str) -> Table:
    found = reproduce.EVERYTHING[name]
    assert isinstance(found, Table)
    return found


def cell(name: str, row: str, dataset: str, group: str | None = None) -> Cell:
    (found,) = (
        c
        for c in table(name).cells(dataset)
        if c.row == row and (group is None or c.group == group)
    )
    return found


def full(name: str, row: str, dataset: str, group: str | None = None) -> Config:
    return configs.resolve(cell(name, row, dataset, group), "full", 0).config


# --- configs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """Each of the project's YAMLs is parsed once and each method's schema built once."""
    parsed = cache(configure.tree_of)

    def tree_of(*what: Any) -> dict[str, Any]:
        return deepcopy(parsed(*what))

    with (
        patch.object(configure, "tree_of", tree_of),
        patch.object(configure, "with_method", cache(configure.with_method)),
    ):
        yield


def all_cells() -> Iterator[tuple[str, str, Cell]]:
    for each in TABLES:
        for dataset in each.datasets:
            for made in each.cells(dataset):
                yield each.name, dataset, made


def _experiment(config: Config) -> str:
    """The settings that make a run another one; quicker than `identity`."""
    return config.model_dump_json(exclude={"run", "checkpoint", "eval", "measure", "log"})


@pytest.mark.parametrize("paper", ["AdaDim", "multi-view"])
def test_every_config_is_valid_and_its_name_is_of_one_run_alone(paper: str) -> None:
    keys: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
    found: dict[str, tuple[str, str]] = {}
    for name, dataset, made in all_cells():
        if table(name).paper != paper:
            continue
        place = dataset, made.run
        if place in keys:
            if keys[place] != (made.base, made.overrides):
                whole = configs.resolve(made, "full", 3).config
                assert found[_experiment(whole)] == place, name
            continue
        keys[place] = made.base, made.overrides
        whole = configs.resolve(made, "full", 3).config
        assert whole.data.name == dataset
        assert whole.run.seed == 3
        assert cost.gpu_hours(cost.outline(made)) == cost.gpu_hours(whole.model_dump())
        same = found.setdefault(_experiment(whole), place)
        # Two settings agree on MoCo v2+: its own augmentation is the standardised one.
        assert same == place or "mocov2plus" in made.run, (same, place)
    assert len(found) > 150 if paper == "AdaDim" else len(found) > 90


@pytest.mark.parametrize("each", [t for t in TABLES if t.small], ids=lambda t: t.name)
def test_small_scale_keeps_the_methods_keys(each: Table) -> None:
    assert each.small is not None
    cells = {made.run: made for made in each.cells(each.datasets[0]) if each.small(made)}
    for made in cells.values():
        whole = configs.resolve(made, "full", 0).config
        small = configs.resolve(made, "small", 0).config
        assert small.data.name == "digits"
        assert small.optim.epochs == max(whole.optim.epochs // 10, 40)
        assert small.num_views == whole.num_views
        ours, theirs = small.method.model_dump(), whole.method.model_dump()
        if "alpha_every" in theirs:
            assert theirs.pop("alpha_every") == 20
            assert ours.pop("alpha_every") == 2
        assert ours == theirs
        narrower = 4 if each.paper == "AdaDim" else 1
        assert small.model.projector == [w // narrower for w in whole.model.projector]


def test_the_small_scale_has_the_rows_that_are_promised() -> None:
    for name, rows in {
        "table6": 10,
        "projector": 12,  # 64, 256, 1024 for two losses, fixed and best
        "views": 4,  # 2 and 4 views for two losses
        "samples": 6,  # 2, 4 and 8 views with as many fewer images
        "transfer": 8,  # the same and 4 views of all images
        "coefficient": 30,  # five for each of three widths
    }.items():
        each = table(name)
        assert each.small is not None
        assert sum(map(each.small, each.cells(each.datasets[0]))) == rows


@pytest.mark.parametrize(
    ("folder", "dataset"),
    [("tiny_imagenet", "tiny_imagenet"), ("cinic10", "cinic10"), ("stl10", "stl10"),
     ("medmnist", "blood"), ("medmnist", "organs"), ("cifar", "cifar100")],
)  # fmt: skip
def test_adadim_on_a_data_set_is_the_recipe_in_its_folder(folder: str, dataset: str) -> None:
    recipe = load([str(FOLDER / folder / "adadim.yaml"), f"data.name={dataset}"]).config
    assert identity(full("table15", "AdaDim", dataset)) == identity(recipe)


def test_table_6_and_12_are_the_files_as_they_are() -> None:
    for made in table("table6").cells("cifar100"):
        of_file = load([str(FOLDER / made.base)]).config
        assert identity(configs.resolve(made, "full", 0).config) == identity(of_file)
    for made in table("table12").cells("imagenet100"):
        assert not made.overrides
        whole = configs.resolve(made, "full", 0).config
        assert (whole.model.backbone, whole.optim.epochs) == ("resnet18", 400)


def test_the_standardised_setting_is_table_17s() -> None:
    for made in (*table("table9").cells("cifar10"), *table("table19").cells("cifar10")):
        whole = configs.resolve(made, "full", 0).config
        assert whole.data.views[0].recipe == "weak"
        assert whole.data.batch_size == 256
        optim = whole.optim
        assert (optim.name, optim.lr, optim.weight_decay) == ("lars", 0.4, 1e-4)
        width = 128 if made.row.startswith("SimCLR") else 2048
        assert whole.model.projector == [2048, 2048, width]
        assert whole.method.model_dump()["temperature"] == 0.1
    # Three widths of a method with a predictor: projector's hidden, predictor's hidden, output.
    for row, projector, hidden, lr in (
        ("BYOL", [4096, 256], 4096, 1.0),
        ("NNCLR", [2048, 2048, 256], 4096, 0.4),
        ("SimSiam", [2048, 2048, 2048], 512, 0.5),
    ):
        whole = full("table22", row, "cifar100")
        assert whole.model.projector == projector
        assert whole.method.model_dump()["predictor_hidden"] == hidden
        assert (whole.optim.name, whole.optim.lr) == ("lars", lr)
    large = full("table9", "SimCLR", "inat21")
    assert (large.data.views[0].size, large.model.stem) == (224, "standard")


def test_multi_view_runs_are_table_4s() -> None:
    wide = full("projector", "64", "cifar10", "barlow_twins fixed")
    assert wide.method.model_dump()["off_diagonal"] == 0.0004  # the best of 8192
    own = full("projector", "64", "cifar10", "barlow_twins optimal")
    assert own.method.model_dump()["off_diagonal"] == 0.04
    assert own.model.projector == [64, 64]
    assert (own.optim.name, own.optim.lr, own.optim.weight_decay) == ("adam", 1e-3, 1e-6)
    assert (own.optim.epochs, own.data.batch_size) == (100, 256)
    # Appendix D.1 prints one run for fixed and optimal at the widest, Barlow Twins at 4096 too.
    for loss, width in (("vicreg", "8192"), ("barlow_twins", "8192"), ("barlow_twins", "4096")):
        pair = [cell("projector", width, "cifar10", f"{loss} {k}") for k in ("fixed", "optimal")]
        assert pair[0].run == pair[1].run
    assert full("projector", "64", "cifar10", "vicreg fixed").method.model_dump()["variance"] == 750
    # fastssl's multiPatch scripts.
    for dataset, views, share, weight in (
        ("stl10", 2, 1, 0.008), ("stl10", 4, 1, 0.001), ("stl10", 4, 0.5, 0.002),
        ("cifar10", 4, 1, 0.01), ("cifar10", 8, 0.25, 0.006), ("imagenet100", 4, 0.5, 0.004),
    ):  # fmt: skip
        assert multiview.coefficient("barlow_twins", dataset, views, 256, share) == weight
    assert multiview.coefficient("barlow_twins", "cifar10", 2, 8192) == 0.0008
    # Its STL-10 crops, its ImageNet stem and ResNet; one batch norm over all views everywhere.
    group = full("views", "2 views, 256", "stl10", "vicreg").data.views[0]
    assert (group.size, group.scale, group.gray_p, group.hue) == (64, (0.2, 1.0), 0.1, 0)
    model = full("views", "2 views, 256", "imagenet100", "vicreg").model
    assert (model.backbone, model.stem) == ("resnet18", "small")
    for name, _, each in all_cells():
        if table(name).paper == "multi-view":
            assert "model.views_forward=stacked" in each.overrides
    small = configs.resolve(cell("views", "2 views, 256", "cifar10", "vicreg"), "small", 0).config
    assert small.model.views_forward == "stacked"
    few = full("samples", "8 views, 256, a quarter", "cifar10", "vicreg")
    assert (few.num_views, few.data.fraction) == (8, 0.25)
    assert few.method.model_dump()["invariance"] == 75
    crops = full("swav", "2 x 64 px + 6 x 32 px", "stl10")
    assert [(g.count, g.size) for g in crops.data.views] == [(2, 64), (6, 32)]
    assert crops.data.views[0].hue == 0
    assert full("longer", "8 views, 256", "cifar10").optim.epochs == 400
    assert own.model.views_forward == "stacked"


def test_the_search_has_every_coefficient_for_every_width_alike() -> None:
    made = table("coefficient").cells("cifar10")
    assert len(made) == 2 * 8 * len(multiview.GRID)
    for loss in multiview.LOSSES:
        tried: dict[str, set[str]] = {}
        for each in made:
            if each.group == loss:
                width, _, beta = each.row.partition(", ")
                tried.setdefault(width, set()).add(beta)
        assert set(tried) == {str(width) for width in multiview.WIDTHS}
        assert len({frozenset(betas) for betas in tried.values()}) == 1
        # Both ends leave room for what the authors' scripts have.
        best = [multiview.coefficient(loss, "cifar10", 2, width) for width in multiview.WIDTHS]
        best = best if loss == "barlow_twins" else [1 / weight for weight in best]
        assert min(multiview.GRID) < min(best) < max(best) < max(multiview.GRID)
    barlow = full("coefficient", "512, 0.04", "cifar10", "barlow_twins")
    assert barlow.method.model_dump()["off_diagonal"] == 0.04
    assert barlow.model.projector == [512, 512]
    keys = full("coefficient", "64, 0.0004", "cifar10", "vicreg").method.model_dump()
    assert (keys["invariance"], keys["variance"], keys["covariance"]) == (2500, 2500, 1)
    # The runs of `projector` with the same coefficient are these.
    shared = {c.run for c in made} & {c.run for c in table("projector").cells("cifar10")}
    assert len(shared) > 5


def test_the_projectors_have_the_published_number_of_parameters() -> None:
    """Appendix D.1's table: 135k to 83.9M for 64 to 8192 dimensions, after 2048 features."""
    published = {64: 135e3, 128: 278e3, 256: 589e3, 512: 1.3e6, 1024: 3.1e6, 2048: 8.3e6,
                 4096: 25.2e6, 8192: 83.9e6}  # fmt: skip
    for width, count in published.items():
        model = full("projector", str(width), "cifar10", "vicreg optimal").model
        widths = [2048, *model.projector]
        weights = sum(a * b for a, b in pairwise(widths))
        # The paper cuts digits off (278,528 is 278k; 8,388,608 is 8.3M) or rounds them.
        assert count - 0.005 * count < weights < 1.02 * count, width


def test_transfer_has_the_runs_of_views_and_of_samples() -> None:
    made = {c.run for c in table("transfer").cells("cifar10")}
    views = {c.run for c in table("views").cells("cifar10") if ", 8192" not in c.row[1:]}
    samples = {c.run for c in table("samples").cells("cifar10")}
    assert views | samples <= made
    row = "8 views, 256, a quarter"
    few = cell("transfer", row, "stl10", "vicreg, stl10 to cifar10")
    assert few.evaluate == ("data.name=cifar10",)
    assert full("transfer", row, "stl10", few.group).data.fraction == 0.25


def test_the_cost_is_what_the_constants_say() -> None:
    made = full("table12", "SimCLR", "imagenet100").model_dump()
    by_hand = 126_689 * 400 * 2 * 1.81e9 / (2470 * 4.09e9) / 3600
    assert cost.gpu_hours(made) == pytest.approx(by_hand)
    momentum = full("table12", "BYOL", "imagenet100").model_dump()
    assert cost.gpu_hours(momentum) == pytest.approx(by_hand * 4 / 3)
    assert [cost.show(h) for h in (0.04, 1.46, 9.94, 12.4, 1234.5)] == [
        "0.0", "1.5", "9.9", "12", "1,234",
    ]  # fmt: skip


def test_the_estimate_is_of_the_runs_as_they_will_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table12", "--only", "SimCLR", "--dry-run", "--out", str(tmp_path)]
    whole = cost.gpu_hours(full("table12", "SimCLR", "imagenet100").model_dump())
    assert reproduce.main([*command, "optim.epochs=40"]) == 0
    assert f"about {whole / 10:.1f} GPU-hours left" in capsys.readouterr().out
    other = ["--out", str(tmp_path / "other"), "data.name=folder"]
    assert reproduce.main([*command, *other]) == 0
    assert "GPU-hours of 'folder' are not known" in capsys.readouterr().out


# --- published numbers -------------------------------------------------------------------------


def test_every_published_number_stands_in_a_cell() -> None:
    placed: dict[str, int] = {}
    for each in TABLES:
        for dataset in each.datasets:
            for made in each.cells(dataset):
                for measure in made.paper:
                    suffix = {"minutes": "_minutes", "best_epoch": "_epoch"}.get(measure, "")
                    name = each.name + suffix
                    placed[name] = placed.get(name, 0) + 1
    tree = dict(_published())
    groups = {c.group for d in table("table3").datasets for c in table("table3").cells(d)}
    assert set(tree.pop("table3")) == groups
    assert placed.pop("table18") == 3 * 45
    assert placed == {name: sum(map(len, rows.values())) for name, rows in tree.items()}


@pytest.mark.parametrize(
    ("name", "row", "dataset", "group", "measure", "expected"),
    [
        ("table6", "alpha and beta adaptive", "cifar100", None, "probe", (72.73, None)),
        ("table9", "alpha 0.5", "inat21", None, "probe", (24.56, None)),
        ("table12", "AdaDim", "imagenet100", None, "probe", (80.78, None)),
        ("table15", "DeepCluster v2", "organc", None, "probe", (74.31, None)),
        (
            "table18",
            "lr 0.5, tau 0.15, decay 1e-06",
            "cifar100",
            "SimCLR, 100 epochs",
            "rank",
            (666.0, None),
        ),
        ("table18", "covariance 1.7", "cifar100", None, "probe", (58.69, None)),
        (
            "table18",
            "lr 0.5, tau 0.4, decay 1e-06",
            "cifar100",
            "NNCLR, 100 epochs",
            "information",
            (0.075, None),
        ),
        ("projector", "64", "cifar10", "vicreg fixed", "linear", (68.9, 0.2)),
        ("views", "4 views, 256", "cifar10", "vicreg", "minutes", (39.02, 0.05)),
        ("longer", "8 views, 256", "cifar10", None, "best_epoch", (140.0, None)),
    ],
)
def test_published_numbers(
    name: str,
    row: str,
    dataset: str,
    group: str | None,
    measure: str,
    expected: tuple[float, float | None],
) -> None:
    assert cell(name, row, dataset, group).paper[measure] == expected


# --- results of runs ---------------------------------------------------------------------------


def pretend(
    run: runs.Run, probes: list[float], state: str = "done", rank: float = 50, linear: float = 0
) -> None:
    """A run folder with an evaluation after every two steps of one second."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "status.json").write_text(json.dumps({"state": state}))
    rows: list[dict[str, float]] = []
    for epoch, probe in enumerate(probes, 1):
        steps = 2 * epoch - 1, 2 * epoch
        rows += [
            {"step": steps[0], "epoch": epoch, "train/loss": 1.0},
            {"step": steps[1], "epoch": epoch, "train/loss": 1.0, "perf/step_ms": 1000.0},
            {"step": steps[1], "epoch": epoch, "eval/probe_top1": probe,
             "rep/effective_rank_r": rank, "rep/mutual_information": 10 * probe},
        ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.folder / "metrics.jsonl").write_text(text)
    if linear:
        run.evaluated.parent.mkdir(exist_ok=True)
        found = {"chosen": 0, "rows": [{"top1_per_seed": [linear]}]}
        run.evaluated.write_text(json.dumps(found))


def test_a_table_has_means_deviations_differences_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = table("table6")
    planned = runs.plan(each, "cifar100", "full", 3, tmp_path, [])
    given = {"alpha 0": (0.7, 0.72, 0.74), "alpha 1": (0.6, 0.62, 0.61), "alpha 0.5": (0.73,) * 3}
    for run in planned:
        values = given.get(run.cell.row)
        if values:
            pretend(run, [0.5, values[run.seed]])
    failed = next(run for run in planned if run.cell.row == "alpha linear")
    pretend(failed, [0.5], state="failed")
    assert reproduce.main(["table6", "--collect", "--seeds", "3", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    line = next(x for x in text.splitlines() if x.startswith("| alpha 0 "))
    assert [part.strip() for part in line.split("|")[1:-1]] == [
        "alpha 0", "3 of 3", "72.00 ± 2.00", "72.14", "−0.14",
    ]  # fmt: skip
    line = next(x for x in text.splitlines() if x.startswith("| alpha linear"))
    assert "0 of 3; 1 failed; 2 not run" in line
    assert "not run yet" in line
    assert "Spearman ρ = 1.00 over 3 rows" in text
    assert "Rows differ more than seeds do" in text

    tree = json.loads((tmp_path / "full" / "table6-cifar100.json").read_text())
    first = tree["rows"][0]["measures"]["probe"]
    assert first["mean"] == pytest.approx(72)
    assert first["sd"] == pytest.approx(statistics.stdev([70, 72, 74]))
    assert first["difference"] == pytest.approx(-0.14)
    assert tree["rows"][3]["measures"]["probe"]["mean"] is None


def test_time_to_accuracy_is_training_until_the_first_rows_last_accuracy(tmp_path: Path) -> None:
    each = table("views")
    planned = runs.plan(each, "cifar10", "full", 1, tmp_path, ["barlow_twins"])
    slow, fast, never, *_ = planned
    pretend(slow, [0.5, 0.6, 0.7], linear=0.8)
    pretend(fast, [0.6, 0.71, 0.7], linear=0.9)
    pretend(never, [0.1, 0.2, 0.69])
    rows = results.collect(each, planned)["barlow_twins"]
    assert rows[0].of("minutes") == [pytest.approx(6 / 60)]
    assert rows[1].of("minutes") == [pytest.approx(4 / 60)]
    assert rows[1].of("best") == [pytest.approx(71)]
    assert rows[1].of("best_epoch") == [2]
    assert rows[2].of("minutes") == []
    assert [row.of("linear") for row in rows[:3]] == [[80.0], [90.0], []]
    assert rows[2].states() == "1 of 1; 1 to evaluate"
    text = results.markdown(each, "cifar10", "full", {"barlow_twins": rows}, "")
    assert "not reached" in next(
        x for x in text.splitlines() if x.startswith(f"| {rows[2].cell.row}")
    )


def test_minutes_have_no_mean_unless_every_seed_got_there(tmp_path: Path) -> None:
    each = table("views")
    planned = runs.plan(each, "cifar10", "full", 3, tmp_path, ["4 views, 256"])
    rows = {run.cell.row for run in planned}
    assert rows == {"2 views, 8192", "4 views, 256"}  # the target's row is planned too
    for run in planned:
        if run.cell.group == "barlow_twins":
            last = 0.7 if run.cell.row == "2 views, 8192" or run.seed == 1 else 0.6
            pretend(run, [0.5, last], linear=0.8)
    groups = results.collect(each, planned)
    target, some = groups["barlow_twins"]
    assert target.mean("minutes") == (pytest.approx(4 / 60), pytest.approx(0))
    assert some.of("minutes") == [pytest.approx(4 / 60)]
    assert some.mean("minutes") is None
    text = results.markdown(each, "cifar10", "full", groups, "")
    assert "0.07 (1 of 3)" in next(x for x in text.splitlines() if x.startswith("| 4 views, 256"))
    assert "every epoch, in the first row every 0.033 minutes" in " ".join(text.split())
    of_json = results.as_json(each, "cifar10", "full", groups)["rows"]
    found = next(r["measures"]["minutes"] for r in of_json if r["row"] == "4 views, 256")
    assert (found["reached"], found["ended"], found["mean"]) == (1, 3, None)
    assert found["difference"] is None
    assert results.beyond_noise([target, some], "minutes") is None


SEARCH = {  # width -> coefficient -> accuracy of two seeds
    64: {0.0004: (0.5, 0.5), 0.002: (0.6, 0.6), 0.04: (0.895, 0.895), 0.2: (0.8, 0.9)},
    256: {0.002: (0.7, 0.7), 0.02: (0.9, 0.92), 0.04: (0.91, 0.8)},
    1024: {0.0004: (0.7, 0.7), 0.002: (0.8, 0.9), 0.01: (0.7, 0.8)},
}


def test_the_search_prints_the_best_and_the_slope_of_their_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from scipy.stats import t

    each = table("coefficient")
    for run in runs.plan(each, "cifar10", "full", 2, tmp_path, ["barlow_twins"]):
        width, _, beta = run.cell.row.partition(", ")
        found = SEARCH.get(int(width), {}).get(float(beta))
        if found:
            pretend(run, [0.1, 0.99], linear=found[run.seed])  # the online probe decides nothing
    command = ["coefficient", "--collect", "--seeds", "2", "--out", str(tmp_path)]
    assert reproduce.main(command) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "| 64 | 0.04 | 2.6 | 89.50 | 0.04 to 0.04 |" in text
    assert "| 256 | 0.02 | 5.1 | 91.00 | 0.02 to 0.02 |" in text
    # By hand: least squares over three equal steps of log 4, then the t interval.
    logs = [math.log(beta) for beta in (0.002, 0.02, 0.04)]
    step = math.log(4)
    slope = (logs[2] - logs[0]) / (2 * step)
    middle = sum(logs) / 3
    residuals = [y - middle - slope * x for y, x in zip(logs, (-step, 0, step), strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / (2 * step**2))
    half = error * t.ppf(0.975, 1)
    assert slope == pytest.approx(math.log(20) / math.log(16))
    found_law = json.loads((tmp_path / "full" / "coefficient-cifar10.json").read_text())["slopes"]
    assert found_law["barlow_twins"] == pytest.approx([slope, half])
    assert found_law["vicreg"] is None
    low, high = results.signed(slope - half), results.signed(slope + half)
    assert f"width: +{slope:.2f}, 95 % interval {low} to {high} over 3 widths" in text
    assert "(theory: +1, which is within it)" in text
    exact = [results.Best(w, 9 / w**2, 1, (0, 1), ()) for w in (64, 256, 512, 1024)]
    assert results.law(exact) == pytest.approx((2, 0), abs=1e-6)
    picture = tmp_path / "full" / "coefficient-cifar10.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_best_at_the_end_of_the_grid_and_what_is_near_it_are_said(tmp_path: Path) -> None:
    each = table("coefficient")
    accuracy = {"64, 0.01": 0.8, "64, 0.04": 0.91, "64, 0.1": 0.915, "64, 0.2": 0.92}
    planned = runs.plan(each, "cifar10", "full", 1, tmp_path, ["vicreg"])
    for run in planned:
        if run.cell.row in accuracy:
            pretend(run, [accuracy[run.cell.row]])  # not evaluated yet
    rows = results.collect(each, planned)["vicreg"]
    (best,) = results.bests(rows)
    assert (best.width, best.coefficient, best.inside) == (64, 0.2, False)
    assert best.near == (0.04, 0.1, 0.2)
    assert results.law([best, best]) is None
    text = results.markdown(each, "cifar10", "full", {"vicreg": rows}, "")
    assert "0.2, end of the grid" in text
    assert "three widths are needed" in text


def test_curves_are_drawn_over_epochs_and_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    each = table("samples")
    planned = runs.plan(each, "cifar10", "full", 2, tmp_path, ["barlow_twins"])
    pretend(planned[0], [0.5, 0.6, 0.7])
    pretend(planned[1], [0.7, 0.8])  # a shorter one of the same row
    pretend(planned[4], [0.6, 0.9])
    # The evaluation before training is not drawn.
    before = json.dumps({"step": 0, "epoch": 0, "eval/probe_top1": 0.1})
    for run in (planned[0], planned[1], planned[4]):
        rows = run.folder / "metrics.jsonl"
        rows.write_text(f"{before}\n{rows.read_text()}")
    groups = results.collect(each, planned)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    file = tmp_path / "curves.png"
    assert pictures.draw("curves", groups, file) == f"picture: {file}"
    assert file.read_bytes().startswith(b"\x89PNG")
    epochs, minutes = pyplot.gcf().axes
    drawn = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
             for axis in (epochs, minutes) for line in axis.lines]  # fmt: skip
    first, third = planned[0].cell.row, planned[4].cell.row
    expected = [
        (first, [1, 2], [60.0, 70.0]),
        (third, [1, 2], [60.0, 90.0]),
        (first, [2 / 60, 4 / 60], [60.0, 70.0]),
        (third, [2 / 60, 4 / 60], [60.0, 90.0]),
    ]
    for (label, x, y), (row, at, values) in zip(drawn, expected, strict=True):
        assert label == row
        assert x == pytest.approx(at)
        assert y == pytest.approx(values)


def test_rank_and_entropy_are_correlated_over_runs_and_within_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    each = table("figure8")
    planned = runs.plan(each, "cifar100", "full", 1, tmp_path, [])
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(len(planned), 3, 2, generator=generator, dtype=torch.float64)
    for run, path in zip(planned, pairs.tolist(), strict=True):
        pretend(run, [])
        (run.folder / "metrics.jsonl").write_text("".join(
            json.dumps({"rep/effective_rank_r": rank, "rep/renyi_entropy_r": entropy}) + "\n"
            for rank, entropy in path
        ))  # fmt: skip
    assert reproduce.main(["figure8", "--collect", "--out", str(tmp_path)]) == 0
    over = torch.corrcoef(pairs[:, -1].T)[0, 1].item()
    within = [torch.corrcoef(path.T)[0, 1].item() for path in pairs]
    text = " ".join(capsys.readouterr().out.split())
    assert f"Pearson r = {over:.3f} over 7 runs; over the evaluations of one run" in text
    assert f"r = {min(within):.3f} to {max(within):.3f}." in text
    picture = tmp_path / "full" / "figure8-cifar100.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_correlations_are_those_of_numpy(tmp_path: Path) -> None:
    each = table("table3")
    planned = runs.plan(each, "cifar100", "full", 1, tmp_path, ["VICReg, 100 epochs"])
    generator = torch.Generator().manual_seed(0)
    probes = torch.rand(len(planned), generator=generator, dtype=torch.float64)
    ranks = 50 + 100 * torch.rand(len(planned), generator=generator, dtype=torch.float64)
    for run, probe, rank in zip(planned, probes.tolist(), ranks.tolist(), strict=True):
        pretend(run, [0.1, probe], rank=rank)
    rows = results.collect(each, planned)["VICReg, 100 epochs"]
    expected = [
        torch.corrcoef(torch.stack([probes, other]))[0, 1].abs().item()
        for other in (ranks, 10 * probes, 10 * probes / ranks)
    ]
    assert results.correlations(rows) == pytest.approx(expected)
    text = results.markdown(each, "cifar100", "full", {"VICReg, 100 epochs": rows}, "")
    assert "0.772" in text  # the published one, beside ours


def test_a_table_replaces_what_stands_between_its_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "results.md"
    command = ["table6", "--collect", "--out", str(tmp_path), "--into", str(document)]
    assert reproduce.main(command) == 2
    assert_one_line(capsys.readouterr().err, "<!-- table6-cifar100: begin -->")
    document.write_text(
        "a\n<!-- table6-cifar100: begin -->\nold\n<!-- table6-cifar100: end -->\nb\n"
    )
    assert reproduce.main(command) == 0
    assert reproduce.main(command) == 0
    text = document.read_text()
    assert text.startswith("a\n<!-- table6-cifar100: begin -->\n### cifar100\n")
    assert text.endswith("<!-- table6-cifar100: end -->\nb\n")
    assert text.count("| alpha 0 ") == 1
    assert "old" not in text


# --- starting ----------------------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
if "alpha_1" in str(folder):
    sys.exit("error: the disk is on fire")
(folder / "status.json").write_text(json.dumps({"state": "done"}))
row = {"step": 1, "epoch": 1, "train/loss": 1.0, "perf/step_ms": 5.0, "eval/probe_top1": 0.5}
with open(folder / "metrics.jsonl", "a") as file:
    file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs that take no time; the folders of those that were started."""
    started: list[Path] = []

    def command(run: runs.Run, processes: int, extra: object = ()) -> list[str]:
        started.append(run.folder)
        return [sys.executable, "-c", SCRIPT, str(run.folder)]

    monkeypatch.setattr(runs, "train_command", command)
    return started


def test_a_failed_run_is_named_the_others_go_on_and_what_ended_is_kept(
    tmp_path: Path, quick: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["alpha 0", "alpha 1", "alpha 0.5"]
    command = ["table6", "--scale", "small", "--seeds", "2", "--parallel", "2", "--out",
               str(tmp_path), "--only", *rows]  # fmt: skip
    assert reproduce.main(command) == 1
    assert len(quick) == 6
    text = capsys.readouterr()
    assert text.err.count("failed: digits, alpha 1, seed ") == 2
    assert "error: the disk is on fire" in text.err
    assert "[6/6]" in text.out

    quick.clear()
    assert reproduce.main(command) == 1
    assert {folder.parent.name for folder in quick} == {"tuned-adadim-alpha_1"}
    assert len(quick) == 2


def test_settings_that_changed_are_refused(
    tmp_path: Path, quick: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table6", "--scale", "small", "--out", str(tmp_path), "--only", "alpha 0"]
    assert reproduce.main(command) == 0
    assert reproduce.main([*command, "log.every_steps=3"]) == 0  # may differ
    (file,) = tmp_path.rglob("seed-0.yaml")
    assert configs.read(file).log.every_steps == 3
    assert reproduce.main([*command, "run.max_hours=2"]) == 0
    again = configs.read(file)
    assert again.run.max_hours == 2
    assert again.log.every_steps != 3  # the last call did not say it
    capsys.readouterr()
    assert reproduce.main(["table6", "optim.epochs=3", *command[1:]]) == 2
    assert_one_line(capsys.readouterr().err, "optim.epochs 40, which is 3 now")


def test_two_shells_do_not_train_in_one_folder(
    tmp_path: Path, quick: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table6", "--scale", "small", "--out", str(tmp_path), "--only", "alpha 0"]
    (run,) = runs.plan(table("table6"), "cifar100", "small", 1, tmp_path, ["alpha 0"])
    run.folder.parent.mkdir(parents=True)
    with open(run.config.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert reproduce.main(command) == 1
    assert run.state() == "not run"
    assert "another reproduce is at it" in capsys.readouterr().err
    assert reproduce.main(command) == 0
    assert run.state() == "done"


@pytest.mark.long
@pytest.mark.faults  # a minute and a half of training
def test_a_real_run_is_trained_evaluated_collected_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["views", "optim.epochs=1", "eval.every=0", "measure.every=0", "--scale", "small",
               "--seeds", "1", "--out", str(tmp_path), "--only", "2 views, 256"]  # fmt: skip
    each = table("views")
    planned = runs.plan(each, "cifar10", "small", 1, tmp_path, ["2 views, 256"])
    pretend(planned[1], [0.5], linear=0.5)  # VICReg's
    assert reproduce.main(command) == 0
    text = capsys.readouterr().out
    assert "2 runs, 1 ended or queued" in text
    assert "[1/1] barlow_twins, 2 views, 256, seed 0: done in" in text
    folder = planned[0].folder
    assert planned[0].state() == "done"
    assert identity(configs.read(folder / "config.yaml")) == identity(
        configs.read(folder.with_name("seed-0.yaml"))
    )
    tree = json.loads((tmp_path / "small" / "views-digits.json").read_text())
    measures = tree["rows"][0]["measures"]
    assert 20 < measures["linear"]["mean"] < 100  # chance is 10
    assert measures["linear"]["mean"] in [float(x) for x in measures["linear"]["values"]]
    assert measures["probe"]["mean"] == pytest.approx(
        100 * last_row(folder, "eval/probe_top1"), abs=1e-9
    )

    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert reproduce.main(command) == 0
    assert "2 runs, 2 ended or queued" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def last_row(folder: Path, name: str) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float([row[name] for row in rows if name in row][-1])


def test_slurm_commands_are_arrays_that_submit_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table6", "--launcher", "slurm", "--seeds", "3", "--out", str(tmp_path),
               "--submit", "--gpus-per-node 2 --partition gpu", "--root", str(tmp_path),
               "--dry-run", "--only", "alpha 0", "alpha 1"]  # fmt: skip
    assert reproduce.main(command) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "ddp_ssl.submit" in x]
    assert len(lines) == 2
    options = submit_options.parser().parse_intermixed_args(shlex.split(lines[0])[3:])
    assert (options.gpus_per_node, options.partition) == (2, "gpu")
    sweep = submit.sweep(options.arguments)
    assert len(sweep) == 3
    loaded = [load(each).config for each in sweep]
    assert [c.run.seed for c in loaded] == [0, 1, 2]
    assert {c.data.root for c in loaded} == {str(tmp_path)}
    options.alone = False
    # The folders of an array are links to those that are read here.
    folders = submit.folders(sweep, "name", options)
    assert [Path(f).name for f in folders] == ["seed=0", "seed=1", "seed=2"]


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Shell scripts that stand for Slurm's commands, found first."""
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_submitted_runs_are_linked_marked_and_not_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked"
    squeue = f"echo x >> {asked}; printf '41_0\\n41_1\\n77\\n'"
    slurm(tmp_path, monkeypatch, squeue=squeue, sbatch="echo 77")
    said = "print('job         41_0\\nrun folder  x\\njob         41_1\\n')"
    real = runs.submit_commands

    def fake(*arguments: Any) -> list[tuple[list[runs.Run], list[str]]]:
        return [(group, [sys.executable, "-c", said]) for group, _ in real(*arguments)]

    monkeypatch.setattr(runs, "submit_commands", fake)
    command = ["table6", "--launcher", "slurm", "--seeds", "2", "--out", str(tmp_path),
               "--root", str(tmp_path), "--only", "alpha 0"]  # fmt: skip
    assert reproduce.main(command) == 0
    place = tmp_path / "full" / "cifar100" / "tuned-adadim-alpha_0"
    assert (place / "seed-1.job").read_text() == "41_1\n"
    assert (place / "seed=1").resolve() == place / "seed-1"
    assert "0 of 2; 2 queued" in capsys.readouterr().out
    assert reproduce.main(command) == 0
    assert "2 runs, 2 ended or queued" in capsys.readouterr().out
    assert asked.read_text().count("x") == 2  # once each time

    # Whatever an earlier start left: while Slurm has the job it is not submitted again.
    planned = runs.plan(table("table6"), "cifar100", "full", 2, tmp_path, ["alpha 0"])
    for state in ("running", "failed", "preempted"):
        pretend(planned[0], [0.5], state=state)
        assert reproduce.main([*command, "run.max_hours=3"]) == 0
        assert "2 runs, 2 ended or queued" in capsys.readouterr().out
    assert configs.read(planned[0].config).run.max_hours is None  # as it was submitted
    pretend(planned[0], [0.5])
    assert planned[0].state() == "done"


def test_evaluations_are_submitted_once_with_the_words_of_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    slurm(tmp_path, monkeypatch, squeue="echo 78", sbatch=f'echo "$@" >> {said}; echo 78')
    planned = runs.plan(table("longer"), "cifar10", "full", 1, tmp_path, ["2 views, 256"])
    pretend(planned[0], [0.5])
    command = ["longer", "--launcher", "slurm", "--seeds", "1", "--out", str(tmp_path), "--root",
               str(tmp_path), "--only", "2 views, 256", "--submit"]  # fmt: skip
    words = "--gpus-per-node 4 --partition gpu --time 12:00:00 --sbatch qos=high"
    assert reproduce.main([*command, words]) == 0
    text = said.read_text()
    given = text.split("--output")[0].split()
    assert given == ["--parsable", "--gpus-per-node=1", "--partition=gpu", "--time=720",
                     "--qos=high"]  # fmt: skip
    assert "ddp_ssl.evaluate linear" in text
    out = capsys.readouterr().out
    assert "1 of 1; 1 evaluation queued" in out
    assert "50.00" in out  # the online probe is there
    assert reproduce.main([*command, words]) == 0
    assert said.read_text() == text
    assert "1 runs, 1 ended or queued" in capsys.readouterr().out
    # Training on CPUs asks for no GPU.
    given = submit_options.for_evaluation(["--tasks-per-node", "4"])
    assert not any("gpu" in word for word in given)
    for wrong, part in {"--partitoin gpu": "--partitoin is no option", "--time x": "'x' is not a"
                        }.items():  # fmt: skip
        (tmp_path / "full" / "cifar10" / planned[0].cell.run
         / "seed-0.linear-adam.job").unlink(missing_ok=True)  # fmt: skip
        assert reproduce.main([*command, wrong]) == 2
        assert_one_line(capsys.readouterr().err, part)


def test_a_slurm_that_does_not_answer_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(tmp_path, monkeypatch, squeue="echo the controller is down >&2; exit 1")
    (run,) = runs.plan(table("table6"), "cifar100", "full", 1, tmp_path, ["alpha 0"])
    run.folder.parent.mkdir(parents=True)
    run.marker("not run").write_text("41\n")
    assert reproduce.main(["table6", "--collect", "--out", str(tmp_path)]) == 2
    assert_one_line(capsys.readouterr().err, "squeue: the controller is down; try again")


def test_the_offline_probe_follows_and_transfer_names_the_other_data_set(tmp_path: Path) -> None:
    (run, *_) = runs.plan(table("transfer"), "cifar10", "full", 1, tmp_path, [])
    made = runs.evaluate_command(run, {"stl10": "/data/stl10"})
    assert made[2:5] == ["ddp_ssl.evaluate", "linear", str(run.folder)]
    assert {"linear.protocol=adam", "data.name=stl10", "data.root=/data/stl10"} < set(made)
    pretend(run, [0.5])
    assert run.state() == "to evaluate"
    pretend(run, [0.5], linear=0.6)
    assert run.state() == "done"
    assert run.evaluated.name == "linear-adam-stl10.json"


def test_a_small_transfer_goes_to_the_digits_in_negative(tmp_path: Path) -> None:
    group = "vicreg, digits to their negative"
    planned = runs.plan(table("transfer"), "cifar10", "small", 1, tmp_path, [group])
    assert [run.cell.row for run in planned] == [
        "2 views, 256", "4 views, 256", "4 views, 256, half", "8 views, 256, a quarter",
    ]  # fmt: skip
    folder = tmp_path / "small" / runs.NEGATIVE
    made = runs.evaluate_command(planned[0], {})
    assert {"data.name=folder", f"data.root={folder}"} < set(made)
    assert planned[0].evaluated.name == "linear-adam-folder.json"
    runs.write_configs(planned[:1], "small", [], {}, "test")
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 1797
    assert {str(f.relative_to(folder).parent) for f in files} == {
        f"{split}/{label}" for split in ("train", "val") for label in range(10)
    }
    written = files[0].stat().st_mtime_ns
    runs.write_configs(planned[:1], "small", [], {}, "test")
    assert files[0].stat().st_mtime_ns == written  # made once
    label, number = files[0].parent.name, int(files[0].stem)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert str(labels[number]) == label
    with Image.open(files[0]) as image:
        negative = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    plain = images[number].reshape(8, 8) * 255 / 16
    assert np.corrcoef(negative.flatten(), plain.flatten())[0, 1] < -0.9


def test_runs_at_the_same_time_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    given = [runs._environment(slot, 2, 2) for slot in range(2)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e, _ in given] == ["3,5", "6,7"]
    assert all(not threads for _, threads in given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runs._environment(0, 2, 1)[1] == ["run.threads=1"]


# --- what a user did wrong ---------------------------------------------------------------------


def assert_one_line(text: str, part: str) -> None:
    assert text.startswith("ddp_ssl: error: ")
    assert part in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--list names them"),
        (["tabel6"], "tabel6: no such table or figure; did you mean table6?"),
        (["x"], "x: no such table or figure; accepted: table3, table6, "),
        (["table6", "--dataset", "stl10"], "table6 has no stl10; accepted: all, cifar100"),
        (["table6", "--only", "gamma"], "'gamma' is no row of table6; accepted: alpha 0; "),
        (["table12", "--scale", "small"], "table12 is made at full scale only"),
        (["table6", "--only", "alpha 0"], "where cifar100 is: --root DIR or --root cifar100=DIR"),
        (["table6", "--only", "alpha 0", "--root", "x"], "1 GPUs are needed and there are 0"),
        (["table6", "optim.lrr=1", "--only", "alpha 0"], "did you mean optim.lr?"),
        (["transfer", "--root", "cifar10=x"], "where stl10 is, for the probe of barlow_twins, "),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    part: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert reproduce.main([*arguments, "--out", str(tmp_path)]) == 2
    assert_one_line(capsys.readouterr().err, part)


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list"]) == 0
    text = capsys.readouterr().out
    for number in (3, 6, 9, 12, 15, 18, 19, 22):
        assert f"  table{number} " in text
    for figure in ("1a", "1b", "1c", 2, 3, 5, 6, 7, 8, 11, 12, 13, 14, 15, 17, 18):
        assert f"  figure{figure} " in text
    for name in ("projector", "coefficient", "views", "samples", "pareto", "transfer", "swav",
                 "longer"):  # fmt: skip
        assert f"  {name} " in text
    assert "orthogonalisation" in text
    assert "  graph " in text
    assert "  theorem " in text
    assert "2,470 images/s" in text
    assert max(map(len, text.splitlines())) <= 100


# --- the two examples of the theory ------------------------------------------------------------


def test_weak_orthogonalisation_collapses_and_strong_spans() -> None:
    matrix = orthogonalisation.gamma(4000)
    none, strong = (orthogonalisation.train(matrix, 2, beta, 8, 1500) for beta in (0.0, 1.0))
    rank = [orthogonalisation.effective_rank(path[-1], matrix) for path in (none, strong)]
    assert rank[0].mean() < 1.2
    assert rank[1].min() > 1.99
    assert orthogonalisation.growth_gap(none, matrix) < 0.02
    first, second = orthogonalisation.learned_at(strong, matrix)
    assert first < second
    # The rank is that of the outputs' covariance, by another route.
    w = strong[-1, 0]
    values = torch.linalg.eigvalsh(matrix)
    covariance = w @ torch.diag(values.flip(0)) @ w.T
    sigma = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    p = sigma / sigma.sum()
    assert rank[1][0].item() == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-6)


def test_the_graph_of_four_images() -> None:
    p = graph.probabilities()
    assert torch.equal(p.sum(0), torch.ones(4, dtype=p.dtype))
    values = torch.linalg.eigvalsh(graph.adjacency(p)).flip(0)
    closed = [value for value, _ in graph.closed_form()]
    assert values.tolist() == pytest.approx(closed)
    found = graph.measure(200)
    told = graph.checks(found)
    assert all(agrees for claim, _, agrees in told if "ever more" not in claim), told
    # The share of equal counts by hand: two augmentations, each other, class, look or neither.
    rest = 1 - graph.MU - graph.NU
    by_hand = rest**2 + 2 * graph.MU * graph.NU
    assert found.tie[1] == pytest.approx(by_hand, abs=0.06)


@pytest.mark.parametrize(
    ("example", "options", "claims"),
    [
        (graph, ["--draws", "500"], 6),
        (theorem, ["--starts", "1"], 12),
        (sphere, ["--repetitions", "8"], 6),
    ],
    ids=["graph", "theorem", "sphere"],
)
def test_an_example_writes_text_and_picture(
    example: Any,
    options: list[str],
    claims: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *options])
    assert example.main() == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(picture.with_suffix(".json").read_text())
    assert len(rows) == claims
    assert all(row["agrees"] for row in rows), rows


def test_the_operators_of_a_graph_are_those_of_counting() -> None:
    looks = theorem.augmentations(seed=3)
    whole = theorem.of_looks(looks)
    assert set(looks.flatten().tolist()) == set(range(theorem.LOOKS))
    joint = torch.zeros(theorem.LOOKS, theorem.LOOKS, dtype=torch.float64)
    for row in looks.tolist():
        for x in row:
            for y in row:
                joint[x, y] += 1 / theorem.IMAGES / theorem.COUNT**2
    marginal = joint.sum(0)
    assert whole.marginal.tolist() == pytest.approx(marginal.tolist())
    torch.testing.assert_close(whole.kernel, joint / marginal[:, None] / marginal)
    values, functions = whole.spectrum()
    torch.testing.assert_close(
        whole.inner(functions, functions), torch.eye(theorem.LOOKS, dtype=torch.float64)
    )
    torch.testing.assert_close(whole.adjoint(whole.average(functions)), values * functions)
    assert torch.allclose(functions[:, 0].abs(), torch.ones_like(marginal))  # the constant
    # The distance from the mean, one augmentation after the other, and its value by eigenvalue.
    f = functions[:, [1, 4]]
    distance = sum(
        float((f[x] - f[row].mean(0)).square().sum()) for row in looks for x in row
    ) / looks.numel()  # fmt: skip
    assert distance == pytest.approx(float((1 - values[[1, 4]]).sum()))
    assert float(whole.invariance(f)) == pytest.approx(distance)
    assert whole.cosine(f, f @ torch.tensor([[1.0, 2], [3, 4]]).double()) == pytest.approx(1)
    assert whole.cosine(f, functions[:, [1, 2]]) < 1e-6


def test_minimisers_are_told_from_other_spaces() -> None:
    """The eigenspace of another graph, and what the loss's maximum spans."""
    looks = theorem.augmentations()
    whole, pairs = theorem.of_looks(looks), theorem.all_pairs(looks)
    leading = whole.spectrum()[1][:, : theorem.WIDTH]
    start = torch.randn(theorem.LOOKS, theorem.WIDTH, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    loss = theorem.objectives(whole, pairs)["spectral contrastive"]
    learned = theorem.minimise(loss, start)[-1]
    assert whole.cosine(learned, leading) > 0.9999
    other = theorem.of_looks(theorem.augmentations(seed=1))
    assert whole.cosine(learned, other.spectrum()[1][:, : theorem.WIDTH]) < 0.99
    negative = theorem.minimise(lambda f: -whole.invariance(theorem.orthonormal(f, whole.inner)),
                                start)[-1]  # fmt: skip
    assert whole.cosine(negative, leading) < 0.1
    # The losses' batch has every pair but those with itself: 1 / N from the distribution's.
    f = 0.5 * start
    gap = float(loss(f) - theorem.population(whole, f))
    assert abs(gap) < 5 / pairs.shape[1] * float((f @ f.T).square().max())
    assert abs(theorem.decomposition(whole, f)) < 1e-12


def test_closed_forms_of_uniform_points() -> None:
    # On the sphere u.v is uniform in [-1, 1]; on the circle E exp(4 cos) is a Bessel function.
    assert sphere.uniform_uniformity(3) == pytest.approx(math.log(math.sinh(4) / 4) - 4)
    bessel = float(torch.special.i0(torch.tensor(4.0, dtype=torch.float64)))
    assert sphere.uniform_uniformity(2) == pytest.approx(math.log(bessel) - 4)
    assert sphere.uniform_uniformity(10**6) == pytest.approx(-4, abs=1e-4)
    # On the circle E cos^2 sin^2 = 1/8, and the diagonal is 1/2.
    assert sphere.uniform_covariance(50, 2) == pytest.approx(math.sqrt(1 / 8 / 50) / (1 / 2))
    x = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64)
    assert sphere.covariance(x) == pytest.approx((0.48 / 3 * 2) ** 2)


def test_an_example_that_does_not_agree_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    real = graph.measure(100)
    wrong = replace(real, class_first=real.class_first[::-1])  # fewer augmentations, surer class
    monkeypatch.setattr(graph, "measure", lambda draws: wrong)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    assert graph.main() == 1
    rows = json.loads((tmp_path / "graph.json").read_text())
    assert [row["claim"] for row in rows if not row["agrees"]] == [
        "the class beats the look ever more surely"
    ]
    assert "DOES NOT" in capsys.readouterr().out.upper()


def test_the_tables_of_published_numbers_are_plain_yaml() -> None:
    path = Path(adadim.__file__).with_name("published.yaml")
    tree = yaml.safe_load(path.read_text())
    assert all(isinstance(row, str) for rows in tree.values() for row in rows)

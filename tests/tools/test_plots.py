"""The pictures: curves, messages about missing figures, and Table 3 from Table 18."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import pearsonr

from ddp_ssl import reproduction
from ddp_ssl.commands import plot_balance, plot_dynamics
from ddp_ssl.commands.plot_balance import Model, correlations
from ddp_ssl.evals import dynamics

TABLE_18 = Path(reproduction.__file__).with_name("adadim_table18.csv")


def write_run(folder: Path, rows: list[dict[str, Any]], method: str = "simclr") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"method:\n  name: {method}\n")
    return folder


def measured(epoch: int, **more: Any) -> dict[str, Any]:
    """A row of a measurement with every figure that is drawn, but for alpha."""
    names = [name for _, _, names in plot_dynamics.PANELS for name in names]
    values = {name: 10 * i + epoch for i, name in enumerate(names) if name != "rep/alpha"}
    values |= {"rep/cev_centred_r": 0.5, "rep/eigenvalue_count_centred_r": 33}
    return {"step": 11 * epoch, "epoch": epoch, **values, **more}


def lines(figure: Any) -> dict[str, list[tuple[list[float], list[float], str]]]:
    """The curves of each panel, with their line styles."""
    return {
        axis.get_title(): [
            (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
            for line in axis.lines
        ]
        for axis in figure.axes
    }


# --- dynamics --------------------------------------------------------------------------------


def test_curves_are_the_logged_figures(tmp_path: Path) -> None:
    rows = [
        measured(0),
        {"step": 5, "epoch": 1, "train/loss": 3.0, "rep/alpha": 0.25},
        {"step": 11, "epoch": 1, "train/loss": 3.0, "rep/alpha": 0.5},
        measured(1, **{"rep/mutual_information": "nan"}),
        measured(2),
    ]
    run = plot_dynamics.read(write_run(tmp_path / "one", rows))
    drawn = lines(plot_dynamics.draw([run]))
    assert drawn["Effective rank"] == [
        ([0, 1, 2], [0, 1, 2], "-"), ([0, 1, 2], [10, 11, 12], "--"),
    ]  # fmt: skip
    assert drawn["Mutual information I(R;Z)"] == [([0, 2], [20, 22], "-")]  # a gap, not a zero
    assert drawn["AdaDim's α"] == [([1], [0.5], "-")]  # the last of the epoch
    assert len(drawn["Accuracy of R (validation)"]) == 2
    centred = lines(plot_dynamics.draw([run], centred=True))
    assert centred["Explained by the top 30 %, centred"] == [([0, 1, 2], [0.5] * 3, "-")]
    assert centred["Eigenvalues above 1 %, centred"][0][1] == [33, 33, 33]
    assert centred["Effective rank"] == drawn["Effective rank"]


def test_what_was_measured_afterwards_is_drawn_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", [measured(0), measured(4)])
    row = dynamics.Row(22, 2, "step_00000022.pt", "ab", "cd", {"rep/effective_rank_r": 7.5})
    (folder / dynamics.FILE).write_text(row.to_json())
    drawn = lines(plot_dynamics.draw([plot_dynamics.read(folder)]))
    assert drawn["Effective rank"][0][:2] == ([0, 2, 4], [0, 7.5, 4])


def test_a_picture_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a" / "run", [measured(0), measured(1)])
    two = write_run(tmp_path / "b" / "run", [{"step": 1, "epoch": 1, "eval/knn_top1": 0.5}])
    out = tmp_path / "new" / "picture.png"
    assert plot_dynamics.main([str(one), str(two), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(out), str(out.with_suffix(".svg"))]
    first, second = said.err.splitlines()
    assert first == "a/run: has no rep/alpha"
    assert second.startswith("b/run: has no rep/effective_rank_r, rep/effective_rank_z, ")
    with Image.open(out) as image:
        assert min(image.size) > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    svg = out.with_suffix(".svg").read_text()
    for text in ("a/run", "b/run", "Effective rank", "not measured"):
        assert text in svg
    again = tmp_path / "again.png"
    assert plot_dynamics.main([str(one), str(two), "--out", str(again)]) == 0
    assert again.with_suffix(".svg").read_text() == svg


def test_a_folder_without_figures_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "young", [{"step": 1, "epoch": 1, "train/loss": 2.0}])
    for folder in (tmp_path / "young", tmp_path / "nowhere"):
        assert plot_dynamics.main([str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ddp_ssl: error: {folder}: no metrics")


@pytest.mark.parametrize("tool", [plot_dynamics, plot_balance])
@pytest.mark.parametrize(
    "line", ["[1, 2]", "no json", '{"step": 1}', '{"epoch": 1, "rep/effective_rank_r": []}']
)
def test_a_line_that_is_no_row_is_one_line(
    tool: Any, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text(line + "\n")
    assert tool.main([str(folder)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ddp_ssl: error: {folder}")


@pytest.mark.parametrize("tool", [plot_dynamics, plot_balance])
def test_matplotlib_is_an_extra(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = measured(0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tool.main([str(write_run(tmp_path / "run", [row]))]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("matplotlib is needed: pip install 'ddp_ssl[plots]'")
    )


# --- balance ---------------------------------------------------------------------------------


def test_table_3_from_table_18() -> None:
    """|r| of (I, I/ER) as printed in the paper; of ER where it can be had from its own table."""
    groups = plot_balance.groups_of(plot_balance.of_csv(TABLE_18), together=False)
    assert {name: len(models) for name, models in groups.items()} == {
        "simclr": 15, "vicreg": 15, "nnclr": 15,
    }  # fmt: skip
    printed = {"simclr": (0.323, 0.462), "vicreg": (0.772, 0.751), "nnclr": (0.229, 0.337)}
    for name, expected in printed.items():
        assert correlations(groups[name])[1:] == pytest.approx(expected, abs=2e-3)
    assert correlations(groups["vicreg"])[0] == pytest.approx(0.013, abs=2e-3)
    assert correlations(groups["nnclr"])[0] == pytest.approx(0.206, abs=2e-3)
    # The one cell that does not follow from Table 18: Table 3 prints .082.
    assert correlations(groups["simclr"])[0] == pytest.approx(0.370, abs=2e-3)


def test_correlations_against_scipy() -> None:
    models = plot_balance.of_csv(TABLE_18)
    accuracies = [model.accuracy for model in models]
    columns = [
        [model.effective_rank for model in models],
        [model.mutual_information for model in models],
        [model.mutual_information / model.effective_rank for model in models],
    ]
    expected = [abs(pearsonr(column, accuracies).statistic) for column in columns]
    assert correlations(models) == pytest.approx(expected)


def test_degenerate_correlations_are_no_number() -> None:
    assert all(map(math.isnan, correlations([Model("a", 1, 2, 3), Model("a", 2, 1, 4)])))
    same = [Model("a", 5.0, float(i), float(i)) for i in range(4)]
    assert math.isnan(correlations(same)[0])
    assert correlations(same)[1] == pytest.approx(1)
    nearly = [Model("a", 0.1 * 3 + i * 1e-17, float(i), float(i)) for i in range(4)]
    nearly[0] = Model("a", 0.3, 0.0, 0.0)  # one rounding away from the others
    assert math.isnan(correlations(nearly)[0])
    collapsed = [Model("a", float(i), 0.5, float(i)) for i in range(4)]  # one has rank 0
    assert correlations(collapsed)[0] == pytest.approx(1)
    assert math.isnan(correlations(collapsed)[2])
    assert "–" in plot_balance.table({"a": same[:2]})


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "balance.svg"
    assert plot_balance.main([str(TABLE_18), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert " ".join(printed[2].split()) == "| simclr | 15 | 47.1–55.0 | 0.370 | 0.323 | 0.463 |"
    assert [Path(line).name for line in printed[-2:]] == ["balance.png", "balance.svg"]
    with Image.open(out.with_suffix(".png")) as image:
        assert image.width > 2 * image.height  # three panels in a row
    assert "vicreg: |r| 0.01 ER, 0.77 I, 0.75 I/ER" in out.read_text()
    assert plot_balance.main([str(TABLE_18), "--together", "--out", str(out)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| all")]
    assert " ".join(line.split()).startswith("| all | 45 | 47.1–58.7 |")


def test_runs_give_their_last_measurement(tmp_path: Path) -> None:
    rows = [measured(1), measured(3), {"step": 40, "epoch": 4, "eval/probe_top1": 0.75}]
    folder = write_run(tmp_path / "one", rows, "vicreg")
    model = plot_balance.of_run(folder, "eval/probe_top1")
    assert (model.method, model.effective_rank) == ("vicreg", 3)
    assert (model.mutual_information, model.accuracy) == (23, 75)
    other = write_run(tmp_path / "two", rows, "byol")
    out = tmp_path / "two.png"
    assert plot_balance.main([str(folder), str(other), "--out", str(out)]) == 0
    svg = out.with_suffix(".svg").read_text()
    assert "vicreg" in svg  # few models: each is labelled
    assert "byol" in svg


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,accuracy\n", "no column effective_rank; needed are method, effective_rank, "),
        ("method,effective_rank,mutual_information,accuracy\na,1,2,x\n", "line 2: expected three"),
        ("method,effective_rank,mutual_information,accuracy\na,1\n", "line 2: expected three"),
        ("method,effective_rank,mutual_information,accuracy\n", "no models in it"),
    ],
)
def test_a_wrong_csv_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "models.csv"
    path.write_text(text)
    assert plot_balance.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ddp_ssl: error: {path}")
    assert message in line


def test_a_run_without_the_figure_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1, "epoch": 1, "rep/effective_rank_r": 3.0}])
    for source, message in (
        (folder, "rep/mutual_information is not in its metrics.jsonl"),
        (tmp_path / "nowhere", "No such file or directory"),
    ):
        assert plot_balance.main([str(source)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ddp_ssl: error: ")
        assert message in line


def test_folders_that_are_no_runs_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [measured(1, **{"eval/probe_top1": 0.5})])
    (tmp_path / "other").mkdir()
    nameless = write_run(tmp_path / "nameless", [measured(1, **{"eval/probe_top1": 0.5})])
    (nameless / "config.yaml").write_text("data: {name: digits}\n")
    folders = [str(run), str(tmp_path / "other"), str(nameless)]
    out = ["--out", str(tmp_path / "x.png")]
    assert plot_balance.main([*folders, *out]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"plot_balance: left out: {tmp_path}/other: no run folder (metrics.jsonl is not there)",
        f"plot_balance: left out: {nameless}/config.yaml: has no method.name",
    ]
    assert plot_balance.main([*folders[1:], *out]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("no run folder (metrics.jsonl is not there) (and 1 more)")

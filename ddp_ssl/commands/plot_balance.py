"""Draw accuracy over effective rank and I(R;Z) of models, and correlations.

    ddp-ssl plot balance RUN [RUN ...] [--out balance.png] [--accuracy eval/probe_top1]
    ddp-ssl plot balance MODELS.csv [--out balance.png] [--together]

A model is a run folder (its last measurement: effective rank of R, I(R;Z), and an accuracy) or a
line of a CSV with the columns method, effective_rank, mutual_information, accuracy (in percent).
Prints |Pearson r| of the accuracy with the effective rank, with I(R;Z) and with their ratio, per
method, as in AdaDim's Table 3; `--together` takes all models as one group. Writes a PNG and an SVG.

Exit code 2 for what cannot be read, or without matplotlib (the extra `plots`).
"""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddp_ssl.commands import common
from ddp_ssl.config import read_yaml
from ddp_ssl.logs.writer import read_metrics
from ddp_ssl.reproduction.figures import pyplot, save
from ddp_ssl.utils.files import if_readable, path_of
from ddp_ssl.utils.text import markdown_lines, summary

COLUMNS = ("method", "effective_rank", "mutual_information", "accuracy")
ENOUGH = 3  # models; any two lie on a line


@dataclass(frozen=True)
class Model:
    """A trained model: effective rank of R, I(R;Z) in nats, accuracy in percent."""

    method: str
    effective_rank: float
    mutual_information: float
    accuracy: float


def of_csv(path: Path) -> list[Model]:
    """The models in a CSV file; raises `ValueError` with the line of what is wrong."""
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        lacking = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
        if lacking:
            raise ValueError(f"{path}: no column {lacking[0]}; needed are {', '.join(COLUMNS)}")
        models = []
        for number, row in enumerate(rows, 2):
            values = if_readable(partial(_numbers, row))
            if values is None or not all(map(math.isfinite, values)):
                raise ValueError(f"{path}, line {number}: expected three numbers after the method")
            models.append(Model(row["method"], *values))
    return models


def _numbers(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in COLUMNS[1:]]


def of_run(folder: Path, accuracy: str) -> Model:
    """A run's last metrics; raises `ValueError` naming what it has not measured."""
    wanted = ("rep/effective_rank_r", "rep/mutual_information", accuracy)
    last: dict[str, float] = {}
    path = folder / "metrics.jsonl"
    for row in read_metrics(path):
        last.update({name: float(row[name]) for name in wanted if name in row})
    lacking = [name for name in wanted if not math.isfinite(last.get(name, math.nan))]
    if lacking:
        raise ValueError(f"{folder}: {lacking[0]} is not in its metrics.jsonl")
    method = read_yaml(folder / "config.yaml").get("method")
    if not isinstance(method, dict) or "name" not in method:
        raise ValueError(f"{folder / 'config.yaml'}: has no method.name")
    return Model(str(method["name"]), last[wanted[0]], last[wanted[1]], 100 * last[wanted[2]])


def models_of(sources: Sequence[Path], accuracy: str) -> list[Model]:
    """The models of all run folders and CSV files.

    Among several folders (`runs/*`) those that give none are named on stderr and left out. Raises
    `ValueError` or `OSError` for what is not there, for a wrong CSV, and if no model is left.
    """
    models: list[Model] = []
    left_out: list[str] = []
    for source in sources:
        if source.is_file():
            models += of_csv(source)
            continue
        source.stat()
        if not (source / "metrics.jsonl").is_file():
            left_out.append(f"{source}: no run folder (metrics.jsonl is not there)")
            continue
        try:
            models.append(of_run(source, accuracy))
        except ValueError as error:
            left_out.append(str(error))
    if not models:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise ValueError(left_out[0] + more if left_out else f"{sources[0]}: no models in it")
    for line in left_out:
        print(f"plot_balance: left out: {line}", file=sys.stderr)
    return models


def groups_of(models: Sequence[Model], together: bool) -> dict[str, list[Model]]:
    """The models by method, in order of appearance, or all as one."""
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault("all" if together else model.method, []).append(model)
    return groups


def correlations(models: Sequence[Model]) -> tuple[float, float, float]:
    """|Pearson r| of the accuracy with effective rank, I(R;Z) and I(R;Z) / effective rank.

    NaN with fewer than three models or where either of the two does not vary.
    """
    if len(models) < ENOUGH:
        return (math.nan,) * 3
    columns = [(m.effective_rank, m.mutual_information, m.accuracy) for m in models]
    ranks, informations, accuracies = np.array(columns).T

    def pearson(values: Any) -> float:
        if not (_varies(values) and _varies(accuracies)):
            return math.nan
        return abs(float(np.corrcoef(values, accuracies)[0, 1]))

    with np.errstate(divide="ignore", invalid="ignore"):  # a collapsed model has rank 0
        return pearson(ranks), pearson(informations), pearson(informations / ranks)


def _varies(values: Any) -> bool:
    """Whether the values differ by more than rounding; False if one is NaN."""
    return bool(np.ptp(values) > 1e-12 * np.abs(values).max())


def table(groups: dict[str, list[Model]]) -> str:
    """Markdown: a line per group."""
    rows = [["models", "number", "accuracy, %", "|r| ER", "|r| I(R;Z)", "|r| I(R;Z)/ER"]]
    for name, models in groups.items():
        accuracies = [model.accuracy for model in models]
        cells = [f"{value:.3f}" if math.isfinite(value) else "–" for value in correlations(models)]
        spread = f"{min(accuracies):.1f}–{max(accuracies):.1f}"
        rows.append([name, str(len(models)), spread, *cells])
    return "\n".join(markdown_lines(rows, "<>"))


def draw(groups: dict[str, list[Model]]) -> Any:
    """A matplotlib figure: a panel per group, or one with labels if no group is large enough."""
    labelled = max(map(len, groups.values())) < ENOUGH
    panels = {"": [m for part in groups.values() for m in part]} if labelled else groups
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot().subplots(
        rows,
        columns,
        figsize=(4.6 * columns + 0.6, 3.9 * rows),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, models) in zip(axes.flat, panels.items(), strict=False):
        ranks = [model.effective_rank for model in models]
        informations = [model.mutual_information for model in models]
        points = axis.scatter(
            ranks, informations, c=[model.accuracy for model in models], cmap="viridis", s=60,
            edgecolors="black", linewidths=0.4,
        )  # fmt: skip
        figure.colorbar(points, ax=axis, label="accuracy, %")
        if labelled:
            for model in models:
                axis.annotate(
                    f"{model.method}\n{model.accuracy:.1f}",
                    (model.effective_rank, model.mutual_information),
                    xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
                )  # fmt: skip
            axis.margins(0.35, 0.25)
        else:
            rank, information, ratio = correlations(models)
            axis.set_title(
                f"{name}: |r| {rank:.2f} ER, {information:.2f} I, {ratio:.2f} I/ER", fontsize=10
            )
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("effective rank of R")
        axis.set_ylabel("I(R;Z), nats")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl plot balance", summary(__doc__))
    add = parser.add_argument
    add("models", nargs="+", type=path_of, metavar="RUN|CSV")
    add("--out", type=path_of, default=Path("balance.png"), help="default: %(default)s")
    add("--accuracy", default="eval/probe_top1", metavar="NAME",
        help="the runs' metric to take, such as eval/knn_top1 (default: %(default)s)")  # fmt: skip
    add("--together", action="store_true", help="all models as one group")

    def plot() -> int:
        options = parser.parse_args(arguments)
        models = models_of(options.models, options.accuracy)
        groups = groups_of(models, options.together)
        print(table(groups))
        print("\n".join(map(str, save(draw(groups), options.out))))
        return 0

    return common.exit_code(plot)

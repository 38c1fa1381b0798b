"""Draw how the representations of one run or several came about, epoch by epoch.

    ddp-ssl plot dynamics RUN [RUN ...] [--out dynamics.png] [--centred]

Reads `metrics.jsonl` of each run folder, and `dynamics.jsonl` where `ddp_ssl.evaluate dynamics` was
run (the latest of several settings). docs/metrics.md explains the metrics. R is drawn solid, Z
dashed, each run in its own colour. Writes a PNG and an SVG of the same name. Metrics that a run has
not measured are named and left out.

Exit code 2 if a folder holds no metrics at all, or without matplotlib (the extra `plots`).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_ssl.commands import common
from ddp_ssl.evals import dynamics
from ddp_ssl.logs.writer import read_metrics
from ddp_ssl.reproduction.figures import pyplot, save
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.text import summary

Curve = dict[float, float]  # epoch -> value

PANELS: list[tuple[str, str, tuple[str, ...]]] = [
    ("Effective rank", "dimensions", ("rep/effective_rank_r", "rep/effective_rank_z")),
    ("Mutual information I(R;Z)", "nats", ("rep/mutual_information",)),
    ("AdaDim's α", "α", ("rep/alpha",)),
    ("Eigenvalues above 1 %", "count", ("rep/eigenvalue_count_r", "rep/eigenvalue_count_z")),
    ("Explained by the top 30 %", "share", ("rep/cev_r", "rep/cev_z")),
    ("Uniformity (lower: more)", "log potential", ("rep/uniformity_r", "rep/uniformity_z")),
    ("Rényi entropy, order 2", "nats", ("rep/renyi_entropy_r", "rep/renyi_entropy_z")),
    ("α-ReQ: decay of the spectrum", "exponent", ("rep/alpha_req_r", "rep/alpha_req_z")),
    ("Accuracy of R (validation)", "top-1", ("eval/knn_top1", "eval/probe_top1")),
]
CENTRED = ("rep/eigenvalue_count", "rep/cev")


@dataclass
class Run:
    """A run folder's curves by metric."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)

    def add(self, epoch: float, metrics: dict[str, Any]) -> None:
        """The last value of an epoch counts; what is not finite leaves a gap."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.curves.setdefault(name, {})[epoch] = float(value)


def read(folder: Path) -> Run:
    """All curves of a run folder; raises `ValueError` if there are none."""
    run = Run(folder.name)
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        try:
            for row in read_metrics(metrics):
                run.add(float(row["epoch"]), row)
        except KeyError:
            raise ValueError(f"{metrics}: a row has no epoch") from None
    for measured in dynamics.latest(folder / dynamics.FILE):
        run.add(measured.epoch, measured.metrics)
    if not any(name.startswith(("rep/", "eval/")) for name in run.curves):
        raise ValueError(
            f"{folder}: no metrics in metrics.jsonl or {dynamics.FILE}; a run folder is accepted"
        )
    return run


def names_of(metrics: Sequence[str], centred: bool) -> list[str]:
    """The metrics of a panel, of the covariance's spectrum where `centred` asks for it."""
    if centred and metrics[0].rpartition("_")[0] in CENTRED:
        return [f"{name[:-2]}_centred{name[-2:]}" for name in metrics]
    return list(metrics)


def distinct(folders: Sequence[Path]) -> list[str]:
    """A label for each: the folder's name, or as much of the path as tells them apart."""
    for count in range(1, 1 + max(len(folder.parts) for folder in folders)):
        labels = [str(Path(*folder.parts[-count:])) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def draw(runs: Sequence[Run], centred: bool = False) -> Any:
    """A matplotlib figure with a panel per quantity."""
    figure, axes = pyplot().subplots(3, 3, figsize=(12, 9.2), sharex=True, layout="constrained")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    colours = [f"C{index % 10}" for index in range(len(runs))]
    last = max(epoch for run in runs for curve in run.curves.values() for epoch in curve)
    for axis, (title, unit, names) in zip(axes.flat, PANELS, strict=True):
        drawn = False
        for run, colour in zip(runs, colours, strict=True):
            for name, style in zip(names_of(names, centred), ("-", "--"), strict=False):
                points = sorted(run.curves.get(name, {}).items())
                marker = "o" if len(points) < 30 else None
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=3)
                    drawn = True
        of_covariance = names_of(names, centred) != list(names)
        axis.set_title(title + (", centred" if of_covariance else ""), fontsize=11)
        if unit == "count":
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.spines[["top", "right"]].set_visible(False)
        if not drawn:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="gray")
            axis.set_yticks([])
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    axes[-1][-1].legend(
        [Line2D([], [], color="gray", ls=style) for style in ("-", "--")],
        ["k-NN", "online probe"], fontsize=9, frameon=False,
    )  # fmt: skip
    handles = [Line2D([], [], color=colour, lw=3) for colour in colours]
    handles += [Line2D([], [], color="black", ls=style) for style in ("-", "--")]
    labels = [run.name for run in runs] + ["R (representation)", "Z (embedding)"]
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 5), fontsize=11
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl plot dynamics", summary(__doc__))
    add = parser.add_argument
    add("runs", nargs="+", type=path_of, metavar="RUN", help="run folder")
    add("--out", type=path_of, default=Path("dynamics.png"), help="default: %(default)s")
    add("--centred", action="store_true",
        help="count and explained variance of the covariance's eigenvalues")  # fmt: skip

    def plot() -> int:
        options = parser.parse_args(arguments)
        runs = [read(folder) for folder in options.runs]
        for run, label in zip(runs, distinct(options.runs), strict=True):
            run.name = label
            wanted = [n for *_, names in PANELS for n in names_of(names, options.centred)]
            if lacking := [name for name in wanted if name not in run.curves]:
                print(f"{label}: has no {', '.join(lacking)}", file=sys.stderr)
        print("\n".join(map(str, save(draw(runs, options.centred), options.out))))
        return 0

    return common.exit_code(plot)

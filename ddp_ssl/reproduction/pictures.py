"""The picture of a table: of ended runs, with the project's plotting tools."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_ssl.config import ConfigError
from ddp_ssl.errors import cut
from ddp_ssl.reproduction import figures
from ddp_ssl.reproduction.results import ENDED, Row, bests, curve, entropies, law, searched
from ddp_ssl.reproduction.runs import Run


def draw(kind: str, groups: dict[str, list[Row]], file: Path) -> str:
    """Draw the ended runs into `file`, or one picture a group beside it; returns what was made."""
    ended = {
        group: [run for row in rows for run in row.runs if run.state() in ENDED]
        for group, rows in groups.items()
    }
    if not any(ended.values()):
        return "no picture: no run has ended yet"
    own = {"pareto": _pareto, "entropy": _entropy, "curves": _curves, "coefficient": _coefficient}
    if kind in own:
        try:
            own[kind](groups, file)
        except ConfigError as error:  # matplotlib is not installed
            return f"no picture: {error}"
        return f"picture: {file}"
    if kind == "dynamics":  # one seed: more make it unreadable
        first = [run for group in ended.values() for run in group if run.seed == 0]
        return _plot(kind, first, file) if first else "no picture: seed 0 has not ended yet"
    told = []
    for group, members in ended.items():
        plain = re.sub(r"[^\w-]+", "_", group)
        own_file = file if len(ended) == 1 else file.with_name(f"{file.stem}-{plain}.png")
        if len(members) > 2:
            told.append(_plot(kind, members, own_file, "--together"))
    return "\n".join(told)


def _plot(kind: str, ended: Sequence[Run], file: Path, *options: str) -> str:
    """Call `ddp-ssl plot`; returns what it made, or its error."""
    folders = list(dict.fromkeys(str(run.folder) for run in ended))
    command = [sys.executable, "-m", "ddp_ssl.cli", "plot", kind, *folders, "--out", str(file)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        return f"no picture: {cut((done.stderr or done.stdout).strip().splitlines()[-1])}"
    return f"picture: {file}"


def _entropy(groups: dict[str, list[Row]], file: Path) -> None:
    """Rényi entropy over effective rank, of seed 0: a line over training, a dot at its end."""
    with figures.canvas(file, 1, len(groups), (6 * len(groups), 4.5), 150) as axes:
        for axis, (group, rows) in zip(axes[0], groups.items(), strict=True):
            for row in rows:
                run = row.runs[0]
                path = entropies(run.folder) if run.state() in ENDED else []
                if path:
                    (line,) = axis.plot(*zip(*path, strict=True), linewidth=1, label=row.cell.row)
                    axis.plot(*path[-1], marker="o", color=line.get_color())
            axis.set(title=group, xlabel="effective rank of R", ylabel="Rényi entropy of R, nats")
            if axis.lines:
                axis.legend(fontsize=8)


def _pareto(groups: dict[str, list[Row]], file: Path) -> None:
    """Accuracy over minutes of training, a line for each number of views."""
    with figures.canvas(file, 1, len(groups), (5 * len(groups), 4), 150) as axes:
        for axis, (group, rows) in zip(axes[0], groups.items(), strict=True):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                accuracy = row.mean("linear") or row.mean("probe")
                minutes = [curve(run.folder).total / 60 for run in row.runs if run.state() in ENDED]
                if accuracy and minutes:
                    views = row.cell.row.partition(",")[0]
                    lines.setdefault(views, []).append((sum(minutes) / len(minutes), accuracy[0]))
            for views, points in lines.items():
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=views)
            axis.set(title=group, xlabel="minutes of training", ylabel="accuracy, %")
            if lines:
                axis.legend()


def _curves(groups: dict[str, list[Row]], file: Path) -> None:
    """The online probe over epochs and over minutes of training: mean and deviation over seeds."""
    import numpy as np

    size = (11, 4 * len(groups))
    with figures.canvas(file, len(groups), 2, size, 150, sharey="row") as axes:
        for line, (group, rows) in zip(axes, groups.items(), strict=True):
            for row in rows:
                found = [curve(run.folder) for run in row.runs if run.state() in ENDED]
                found = [each for each in found if each.accuracy]
                if not found:
                    continue
                shown = slice(  # not the one before training, at chance
                    found[0].epoch.count(0), min(len(each.accuracy) for each in found)
                )
                accuracy = np.array([each.accuracy[shown] for each in found])
                minutes = np.array([each.seconds[shown] for each in found]).mean(0) / 60
                mean, deviation = accuracy.mean(0), accuracy.std(0, ddof=min(1, len(found) - 1))
                for axis, x in zip(line, (found[0].epoch[shown], minutes), strict=True):
                    (drawn,) = axis.plot(x, mean, marker="o", markersize=3, label=row.cell.row)
                    if len(found) > 1:
                        axis.fill_between(x, mean - deviation, mean + deviation, alpha=0.2,
                                          color=drawn.get_color())  # fmt: skip
            line[0].set(title=group, xlabel="epoch", ylabel="online probe, %")
            line[1].set(title=group, xlabel="minutes of training")
            if line[0].lines:
                line[0].legend(fontsize=8)


def _coefficient(groups: dict[str, list[Row]], file: Path) -> None:
    """Accuracy over the coefficient, a line for each width; the best ones over 1 / width."""
    with figures.canvas(file, len(groups), 2, (11, 4 * len(groups)), 150) as axes:
        for (left, right), (group, rows) in zip(axes, groups.items(), strict=True):
            for width, by in searched(rows).items():
                left.plot(
                    *zip(*sorted(by.items()), strict=True), marker="o", label=f"width {width}"
                )
            left.set(title=group, xlabel="coefficient", ylabel="accuracy, %", xscale="log")
            found = bests(rows)
            if found:
                left.legend(fontsize=8)
                x = [1 / best.width for best in found]
                right.plot(x, [best.coefficient for best in found], "o", label="best of the grid")
                for best in found:
                    right.plot([1 / best.width] * 2, [min(best.near), max(best.near)], color="C0",
                               linewidth=1)  # fmt: skip
                middle = [best.coefficient * best.width for best in found]
                scale = sorted(middle)[len(middle) // 2]
                right.plot(x, [scale * value for value in x], "--", color="gray",
                           label=f"slope 1: {scale:.2g} / width")  # fmt: skip
                right.legend(fontsize=8)
            slope = law(found)
            title = "bars: within a point of the best"
            if slope:
                title = f"slope {slope[0]:.2f} ± {slope[1]:.2f}; {title}"
            right.set(title=title, xlabel="1 / width", ylabel="best coefficient",
                      xscale="log", yscale="log")  # fmt: skip

"""Values of ended runs, and a table of them beside the published ones."""

import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_ssl.config import ConfigError
from ddp_ssl.logs.writer import read_metrics
from ddp_ssl.reproduction.cells import Cell, Number, Table, published_correlations
from ddp_ssl.reproduction.runs import Run
from ddp_ssl.utils.text import markdown_lines

TITLES = {
    "probe": "online probe, %",
    "linear": "linear probe, 16 patches, %",
    "best": "best online probe, %",
    "best_epoch": "its epoch",
    "rank": "effective rank of R",
    "information": "I(R;Z)",
    "entropy": "Rényi entropy of R, nats",
    "minutes": "minutes to accuracy",
    "minutes_all": "minutes in all",
}
DIGITS = {
    "best_epoch": 0,
    "rank": 1,
    "information": 3,
    "entropy": 3,
    "probe": 2,
    "linear": 2,
    "best": 2,
}
ACCURACIES = ("probe", "linear", "best")
ENDED = ("done", "to evaluate", "evaluation queued")


@dataclass(frozen=True)
class Curve:
    """The online probe over training: percent, epochs, and seconds of training alone."""

    accuracy: tuple[float, ...]
    epoch: tuple[int, ...]
    seconds: tuple[float, ...]
    total: float

    def reaches(self, target: float) -> float | None:
        """Minutes until the probe first has `target` percent; None if it never does."""
        for accuracy, seconds in zip(self.accuracy, self.seconds, strict=True):
            if accuracy >= target:
                return seconds / 60
        return None


def curve(folder: Path) -> Curve:
    """From `metrics.jsonl`. Validation and checkpoints do not count as training."""
    accuracy, epoch, at = [], [], []
    seconds, steps = 0.0, 0
    for row in read_metrics(folder / "metrics.jsonl"):
        steps += "train/loss" in row
        if "perf/step_ms" in row:
            seconds += row["perf/step_ms"] * steps / 1000
            steps = 0
        if "eval/probe_top1" in row:
            accuracy.append(100 * row["eval/probe_top1"])
            epoch.append(int(row["epoch"]))
            at.append(seconds)
    return Curve(tuple(accuracy), tuple(epoch), tuple(at), seconds)


def values_of(run: Run) -> dict[str, float]:
    if run.state() not in ENDED:
        return {}
    last: dict[str, float] = {}
    for row in read_metrics(run.folder / "metrics.jsonl"):
        last |= row
    found: dict[str, float] = {}
    shape = curve(run.folder)
    if shape.accuracy:
        found["probe"] = shape.accuracy[-1]
        found["best"] = max(shape.accuracy)
        found["best_epoch"] = shape.epoch[shape.accuracy.index(found["best"])]
    found["minutes_all"] = shape.total / 60
    names = {
        "rank": "rep/effective_rank_r",
        "information": "rep/mutual_information",
        "entropy": "rep/renyi_entropy_r",
        "knn": "eval/knn_top1",
    }
    found |= {measure: last[name] for measure, name in names.items() if name in last}
    if run.evaluated.exists():
        tree = json.loads(run.evaluated.read_text())
        chosen = tree["rows"][tree["chosen"] or 0]  # the learning rate that was chosen
        found["linear"] = 100 * statistics.fmean(chosen["top1_per_seed"])
    return found


@dataclass
class Row:
    """One cell over its seeds."""

    cell: Cell
    runs: list[Run]
    values: list[dict[str, float]]

    def of(self, measure: str) -> list[float]:
        return [v[measure] for v in self.values if measure in v]

    def ended(self) -> int:
        """Number of seeds with metrics."""
        return sum(map(bool, self.values))

    def sample(self, measure: str) -> list[float]:
        """As `of`, but no minutes unless every ended seed got there: the others took longer."""
        values = self.of(measure)
        return values if measure != "minutes" or len(values) == self.ended() else []

    def mean(self, measure: str) -> Number | None:
        """Mean and, of several seeds, standard deviation."""
        values = self.sample(measure)
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def states(self) -> str:
        """`3 of 3`, `1 of 3; 1 running; 1 not run`."""
        states = [run.state() for run in self.runs]
        done = sum(state in ENDED for state in states)
        rest = [s for s in dict.fromkeys(states) if s != "done"]
        return "; ".join([f"{done} of {len(states)}", *(f"{states.count(s)} {s}" for s in rest)])


def collect(table: Table, runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Rows by group, in the table's order, with time to accuracy where it is asked for."""
    groups: dict[str, list[Row]] = {}
    by_cell: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_cell.setdefault((run.cell.group, run.cell.row), []).append(run)
    for (group, _), mine in by_cell.items():
        row = Row(mine[0].cell, mine, [values_of(run) for run in mine])
        groups.setdefault(group, []).append(row)
    if "minutes" in table.measures:
        for rows in groups.values():
            _add_minutes(rows)
    return groups


def _add_minutes(rows: list[Row]) -> None:
    """Add the minutes until the online probe reaches the first row's final accuracy."""
    target = rows[0].mean("probe")
    if target is None:
        return
    for row in rows:
        for run, values in zip(row.runs, row.values, strict=True):
            reached = curve(run.folder).reaches(target[0]) if values else None
            if reached is not None:
                values["minutes"] = reached


def markdown(
    table: Table, dataset: str, scale: str, groups: dict[str, list[Row]], rule: str
) -> str:
    """The table beside the published one."""
    where = "the embedded digits, small scale" if scale == "small" else dataset
    lines = [f"## {table.name} ({table.paper}): {table.what}; {where}", ""]
    if scale == "small":
        rule = f"{rule} The published figures are of {dataset}: compare orders, not values."
        lines += [*textwrap.wrap(rule, 100), ""]
    for group, rows in groups.items():
        lines += [f"### {group}", ""]
        lines += [*_grid(table, rows, scale), ""]
        remarks = _remarks(table, dataset, group, rows)
        for remark in remarks:
            table_line = not remark or remark.startswith("|")
            lines += [remark] if table_line else textwrap.wrap(remark, 100)
        lines += [""] if remarks else []
    if table.notes:
        lines += [*textwrap.wrap(table.notes, 100), ""]
    return "\n".join(lines)


def _grid(table: Table, rows: list[Row], scale: str) -> list[str]:
    heading = ["", "runs ended"]
    compared = [m for m in table.measures if any(m in row.cell.paper for row in rows)]
    if scale == "small":
        compared = [m for m in compared if m in ACCURACIES]
    centre = {m: _centre(rows, m) for m in compared}
    for measure in table.measures:
        heading.append(TITLES[measure])
        if measure in compared:
            heading.append("paper")
            heading += ["difference"] if scale == "full" else ["− mean", "paper − mean"]
    lines = []
    for row in rows:
        line = [row.cell.row, row.states()]
        for measure in table.measures:
            ours, paper = row.mean(measure), row.cell.paper.get(measure)
            digits = DIGITS.get(measure, 2)
            line.append(show(ours, digits) if ours else _why_not(row, measure))
            if measure not in compared:
                continue
            line.append(show(paper, digits) if paper else "–")
            if scale == "full":
                line.append(signed(ours[0] - paper[0], digits) if ours and paper else "–")
            else:
                of_ours, of_paper = centre[measure]
                line.append(signed(ours[0] - of_ours, digits) if ours else "–")
                line.append(signed(paper[0] - of_paper, digits) if paper else "–")
        lines.append(line)
    return markdown_lines([heading, *lines], "<>")


def _centre(rows: list[Row], measure: str) -> tuple[float, float]:
    """Means over the rows that have both values."""
    pairs = _pairs(rows, measure)
    if not pairs:
        papers = [row.cell.paper[measure][0] for row in rows if measure in row.cell.paper]
        return math.nan, statistics.fmean(papers)
    return statistics.fmean(ours for ours, _ in pairs), statistics.fmean(p for _, p in pairs)


def _pairs(rows: Sequence[Row], measure: str) -> list[tuple[float, float]]:
    """Our mean and the published one of each row that has both."""
    papers = ((row.mean(measure), row.cell.paper.get(measure)) for row in rows)
    return [(ours[0], paper[0]) for ours, paper in papers if ours and paper]


def _why_not(row: Row, measure: str) -> str:
    if measure == "minutes" and any(row.values):
        reached = row.of(measure)
        values = ", ".join(f"{value:.2f}" for value in reached)
        return f"{values} ({len(reached)} of {row.ended()})" if reached else "not reached"
    return "not yet" if any(row.values) else "not run yet"


def _remarks(table: Table, dataset: str, group: str, rows: list[Row]) -> list[str]:
    """Whether the order agrees with the paper's, and whether rows differ by more than seeds."""
    lines = []
    if "minutes" in table.measures:
        lines += _resolution(rows[0])
    for measure in table.measures:
        agreement = order(rows, measure)
        if agreement is not None:
            rho, count = agreement
            lines.append(f"Order by {TITLES[measure].split(',')[0]}, ours and the paper's: "
                         f"Spearman ρ = {rho:.2f} over {count} rows.")  # fmt: skip
        noise = beyond_noise(rows, measure)
        if noise is not None:
            spread, deviation, p = noise
            verdict = "more than" if p < 0.05 else "no more than"
            lines.append(
                f"Rows differ {verdict} seeds do: {spread:.2f} between the best and the worst, "
                f"{deviation:.2f} the standard deviation over seeds (one-way ANOVA, p = {p:.2g})."
            )
    if table.correlate:
        lines += _correlation_lines(dataset, group, rows)
    if "entropy" in table.measures:
        lines += _entropy_lines(rows)
    if table.picture == "coefficient":
        lines += _search_lines(rows)
    return lines


def entropies(folder: Path) -> list[tuple[float, float]]:
    """Effective rank and Rényi entropy of R after every evaluation."""
    names = "rep/effective_rank_r", "rep/renyi_entropy_r"
    found = read_metrics(folder / "metrics.jsonl")
    return [(row[names[0]], row[names[1]]) for row in found if all(name in row for name in names)]


def _pearson(pairs: Iterable[tuple[float, float]]) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(*zip(*pairs, strict=True)).statistic)


def _entropy_lines(rows: list[Row]) -> list[str]:
    """Pearson's r over the ended runs, and over the evaluations of each."""
    last = [(v["rank"], v["entropy"]) for row in rows for v in row.values if "entropy" in v]
    paths = [entropies(run.folder) for row in rows
             for run, v in zip(row.runs, row.values, strict=True) if "entropy" in v]  # fmt: skip
    lines = []
    if len(last) > 2:
        r = _pearson(last)
        lines.append(f"Effective rank and Rényi entropy: Pearson r = {r:.3f} over {len(last)} runs")
    within = [_pearson(path) for path in paths if len(path) > 2]
    if within:
        lines.append(
            f"Over the evaluations of one run: r = {min(within):.3f} to {max(within):.3f}."
        )
    return ["; ".join(lines).replace("; Over", "; over")] if lines else []


def _resolution(row: Row) -> list[str]:
    """The resolution of minutes: accuracy is measured after every few epochs."""
    for run, values in zip(row.runs, row.values, strict=True):
        shape = curve(run.folder) if values else None
        if shape and len(shape.epoch) > 1:
            epochs = shape.epoch[1] - shape.epoch[0]
            minutes = (shape.seconds[1] - shape.seconds[0]) / 60
            every = "every epoch" if epochs == 1 else f"every {epochs} epochs"
            return [
                f"Minutes to accuracy are those of the first evaluation at the target or above: "
                f"{every}, in the first row every {minutes:.2g} minutes."
            ]
    return []


def order(rows: Sequence[Row], measure: str) -> tuple[float, int] | None:
    """Spearman's ρ of our means and the published ones over the rows that have both."""
    from scipy.stats import spearmanr

    pairs = _pairs(rows, measure)
    if len(pairs) < 3:
        return None
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return (rho, len(pairs)) if math.isfinite(rho) else None


def beyond_noise(rows: Sequence[Row], measure: str) -> tuple[float, float, float] | None:
    """Spread of the rows' means, standard deviation within rows, p of a one-way ANOVA."""
    from scipy.stats import f_oneway

    samples = [values for row in rows if len(values := row.sample(measure)) > 1]
    if len(samples) < 2:
        return None
    means = [statistics.fmean(values) for values in samples]
    freedom = sum(len(values) - 1 for values in samples)
    within = sum((len(v) - 1) * statistics.variance(v) for v in samples) / freedom
    if within == 0:
        return None
    p = float(f_oneway(*samples).pvalue)
    return max(means) - min(means), math.sqrt(within), p


def correlations(rows: Sequence[Row]) -> list[float] | None:
    """|Pearson r| of accuracy with effective rank, I(R;Z), and I / effective rank, over runs."""
    runs = [v for row in rows for v in row.values if {"probe", "rank", "information"} <= v.keys()]
    if len(runs) < 3:
        return None
    others: list[Callable[[dict[str, float]], float]] = [
        lambda v: v["rank"], lambda v: v["information"], lambda v: v["information"] / v["rank"],
    ]  # fmt: skip
    return [abs(_pearson((v["probe"], other(v)) for v in runs)) for other in others]


@dataclass(frozen=True)
class Best:
    """The best coefficient of one width."""

    width: int
    coefficient: float
    accuracy: float
    tried: tuple[float, ...]
    near: tuple[float, ...]  # coefficients whose accuracy is within one point of the best

    @property
    def inside(self) -> bool:
        """Whether the grid goes on at both sides of it."""
        return min(self.tried) < self.coefficient < max(self.tried)


def searched(rows: Sequence[Row]) -> dict[int, dict[float, float]]:
    """Accuracy by width and coefficient, of rows named `width, coefficient`."""
    measure = _search_by(rows)
    found: dict[int, dict[float, float]] = {}
    for row in rows:
        width, _, coefficient = row.cell.row.partition(", ")
        accuracy = row.mean(measure)
        if accuracy:
            found.setdefault(int(width), {})[float(coefficient)] = accuracy[0]
    return found


def _search_by(rows: Sequence[Row]) -> str:
    """The offline probe; the online one if an ended run lacks the offline one."""
    return "linear" if all(row.of("linear") for row in rows if row.ended()) else "probe"


def bests(rows: Sequence[Row]) -> list[Best]:
    """The best coefficient of each width of which two or more have ended."""
    made = []
    for width, by in searched(rows).items():
        best = max(by, key=lambda beta: by[beta])
        near = tuple(beta for beta in by if by[beta] >= by[best] - 1)
        if len(by) > 1:
            made.append(Best(width, best, by[best], tuple(by), near))
    return made


def law(found: Sequence[Best]) -> tuple[float, float] | None:
    """Slope of log coefficient over log 1 / width by least squares, and half its 95 % interval."""
    from scipy.stats import linregress, t

    if len(found) < 3:
        return None
    x = [-math.log(best.width) for best in found]
    fit = linregress(x, [math.log(best.coefficient) for best in found])
    return float(fit.slope), float(fit.stderr * t.ppf(0.975, len(found) - 2))


def _search_lines(rows: Sequence[Row]) -> list[str]:
    found = bests(rows)
    if not found:
        return []
    heading = ["width", "best coefficient", "times width", TITLES[_search_by(rows)],
               "within a point of it"]  # fmt: skip
    lines = [
        [str(best.width), f"{best.coefficient:g}" + ("" if best.inside else ", end of the grid"),
         f"{best.coefficient * best.width:.2g}", f"{best.accuracy:.2f}",
         f"{min(best.near):g} to {max(best.near):g}"]
        for best in found
    ]  # fmt: skip
    text = "Slope of log best coefficient over log 1 / width"
    slope = law(found)
    if slope is None:
        text += ": three widths are needed."
    else:
        low, high = slope[0] - slope[1], slope[0] + slope[1]
        within = "within" if low <= 1 <= high else "NOT within"
        text += (
            f": {signed(slope[0])}, 95 % interval {signed(low)} to {signed(high)} over "
            f"{len(found)} widths (theory: +1, which is {within} it)."
        )
    return ["", *markdown_lines([heading, *lines], "<>"), "", text]


def _correlation_lines(dataset: str, group: str, rows: list[Row]) -> list[str]:
    ours = correlations(rows)
    paper = published_correlations(group, dataset)
    if ours is None and paper is None:
        return []
    lines = [["|r| of accuracy with", "ours", "paper"]]
    names = ("effective rank of R", "I(R;Z)", "I / effective rank")
    for index, name in enumerate(names):
        lines.append([name, f"{ours[index]:.3f}" if ours else "not run yet",
                      f"{paper[index]:.3f}" if paper else "–"])  # fmt: skip
    return ["", *markdown_lines(lines, "<>")]


def show(number: Number, digits: int = 2) -> str:
    """`72.31 ± 0.20`."""
    mean, deviation = number
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """`+0.31`, `−0.20`."""
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def insert(document: Path, name: str, text: str) -> None:
    """Replace the text between the marks `<!-- NAME: begin -->` and `end` in a document.

    Raises `ConfigError` if they are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = document.read_text() if document.exists() else ""
    if begin not in old or end not in old.partition(begin)[2]:
        raise ConfigError(f"--into: {document} has no lines {begin} and {end}")
    body = text.partition("\n")[2].strip()  # the document has a heading of its own
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    document.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", old))


def as_json(table: Table, dataset: str, scale: str, groups: dict[str, list[Row]]) -> dict[str, Any]:
    """All numbers, those of every seed too."""
    rows = []
    for group, members in groups.items():
        for row in members:
            measures: dict[str, Any] = {}
            for measure in table.measures:
                ours, paper = row.mean(measure), row.cell.paper.get(measure)
                measures[measure] = {
                    "values": row.of(measure),
                    "mean": ours[0] if ours else None,
                    "sd": ours[1] if ours else None,
                    "paper": paper[0] if paper else None,
                    "paper_sd": paper[1] if paper else None,
                    "difference": ours[0] - paper[0] if ours and paper else None,
                }
                if measure == "minutes":  # by the ended seeds; `values` are of these alone
                    measures[measure]["reached"] = len(row.of(measure))
                    measures[measure]["ended"] = row.ended()
            rows.append(
                {
                    "group": group,
                    "row": row.cell.row,
                    "runs": [str(run.folder) for run in row.runs],
                    "states": [run.state() for run in row.runs],
                    "measures": measures,
                }
            )
    return {
        "table": table.name,
        "paper": table.paper,
        "dataset": dataset,
        "scale": scale,
        "rows": rows,
        "spearman": {
            group: {m: found[0] for m in table.measures if (found := order(members, m))}
            for group, members in groups.items()
        },
        "correlations": {group: correlations(members) for group, members in groups.items()}
        if table.correlate
        else None,
        "slopes": {group: law(bests(members)) for group, members in groups.items()}
        if table.picture == "coefficient"
        else None,
    }

"""Results of an evaluation: tables to read and paste, JSON for programs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddp_ssl.evals.accuracy import Accuracy, Interval, over_images, over_seeds
from ddp_ssl.evals.finetune import FinetuneResult
from ddp_ssl.evals.linear import LinearResult
from ddp_ssl.evals.settings import Linear, Protocol
from ddp_ssl.utils.files import json_file
from ddp_ssl.utils.text import markdown_lines

FEW_CLASSES = 20  # up to this many classes are all listed; of more, the worst and the best


@dataclass
class Row:
    """One line of the result: its name, and its accuracies, one per seed."""

    name: str
    accuracies: list[Accuracy]
    facts: dict[str, Any] = field(default_factory=dict)  # more columns

    @property
    def top1(self) -> float:
        """Mean over seeds."""
        return sum(a.top1 for a in self.accuracies) / len(self.accuracies)

    @property
    def top5(self) -> float | None:
        """Mean over seeds; None for five classes or fewer."""
        values = [a.top5 for a in self.accuracies if a.top5 is not None]
        return sum(values) / len(values) if values else None

    @property
    def per_class(self) -> list[float]:
        """Means over seeds."""
        columns = zip(*(a.per_class for a in self.accuracies), strict=True)
        return [sum(values) / len(values) for values in columns]


@dataclass
class Report:
    """Rows under a heading; `best` is the row to quote, if it was chosen without test images."""

    rows: list[Row]
    first: str  # heading of the rows' names
    best: int | None = None
    notes: list[str] = field(default_factory=list)
    marked: bool = False
    """Whether `best` was chosen among several rows, so that the table marks it."""


def linear_report(
    protocol: Protocol, results: Sequence[LinearResult], best: int | None, settings: Linear
) -> Report:
    """A row per learning rate."""
    rows = []
    for i, lr in enumerate(protocol.lrs):
        facts: dict[str, Any] = {}
        values = [r.held_out[i] for r in results if r.held_out is not None]
        if values:
            facts["held out"] = sum(values) / len(values)
        if not all(r.finite[i] for r in results):
            facts["diverged"] = [r.seed for r in results if not r.finite[i]]
        rows.append(Row(f"{lr:g}", [r.test[i] for r in results], facts))
    notes = []
    if best is not None:
        notes.append(
            f"* lr {protocol.lrs[best]:g} is chosen: classifiers trained without "
            f"{settings.held_out:.0%} of the training images are best on these with it; those "
            "tested were trained on all"
        )
    elif len(rows) > 1:
        why = "linear.held_out is 0" if settings.per_class is None else "linear.per_class is set"
        notes.append(f"no learning rate is chosen: {why}")
    diverged = [row.name for row in rows if "diverged" in row.facts]
    if diverged:
        notes.append(f"diverged, so that the accuracy means nothing: lr {', '.join(diverged)}")
    return Report(rows, "lr", best if len(rows) > 1 else 0, notes, marked=best is not None)


def knn_report(k: Sequence[int], accuracies: Sequence[Accuracy], bank: int) -> Report:
    """A row per number of neighbours; none is chosen."""
    rows = [Row(str(each), [a]) for each, a in zip(k, accuracies, strict=True)]
    notes = [f"bank of {bank} images"]
    if max(k) > bank:
        notes.append(f"k above {bank} is the whole bank")
    if len(rows) > 1:
        notes.append("no k is chosen: choosing the best here would be choosing on the test images")
    return Report(rows, "k", 0 if len(rows) == 1 else None, notes)


def finetune_report(results: Sequence[FinetuneResult], fraction: float) -> Report:
    """A row per seed, and one over all."""
    rows = [
        Row(f"seed {r.seed}", [r.test], {"images": r.images, "steps": r.steps, "loss": r.loss})
        for r in results
    ]
    if len(rows) > 1:
        rows.insert(0, Row("all seeds", [r.test for r in results]))
    return Report(rows, f"{fraction:.3g} of the labels", 0, [])


def table(report: Report) -> str:
    """Markdown: top-1 with its interval, top-5, and the rows' other facts."""
    more = [name for name in FACTS if any(name in row.facts for row in report.rows)]
    seeds = any(over_seeds(row.accuracies) for row in report.rows)
    head = [report.first, "top-1"]
    head += ["sd over seeds", "95 % over seeds"] if seeds else []
    head.append("95 % over images")
    five = report.rows[0].top5 is not None
    head += (["top-5"] if five else []) + more
    lines = []
    for i, row in enumerate(report.rows):
        mark = " *" if i == report.best and report.marked else ""
        cells = [row.name + mark, percent(row.top1)]
        if seeds:
            sd, interval = over_seeds(row.accuracies) or (None, None)
            cells += [percent(sd), _range(interval)]
        cells.append(_range(over_images(row.accuracies)))
        cells += [percent(row.top5)] if five else []
        cells += [FACTS[name](row.facts[name]) if name in row.facts else "" for name in more]
        lines.append(cells)
    return "\n".join(markdown_lines([head, *lines]))


def class_table(report: Report, names: Sequence[str]) -> str:
    """Markdown: top-1 of each class, or of the worst and the best ones."""
    row = report.rows[report.best or 0]
    values = sorted(zip(row.per_class, names, strict=True), key=lambda pair: pair[0])
    values = [pair for pair in values if not math.isnan(pair[0])]
    if len(names) <= FEW_CLASSES:
        order = {name: i for i, name in enumerate(names)}
        shown = sorted(values, key=lambda pair: order[pair[1]])
    else:
        shown = [*values[: FEW_CLASSES // 2], *values[-FEW_CLASSES // 2 :]]
    lines = [["class", "top-1"], *([name, percent(value)] for value, name in shown)]
    return "\n".join(markdown_lines(lines))


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def percent(value: float | None) -> str:
    """A fraction as text, without the sign; nothing for None."""
    return "" if value is None else f"{100 * value:.2f}"


# The rows' other facts that the table shows, and their form.
FACTS: dict[str, Callable[[Any], str]] = {
    "held out": percent,
    "images": str,
    "steps": str,
    "loss": lambda value: f"{value:.4g}",
}


def as_json(report: Report, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as plain values; NaN is null."""
    rows = []
    for row in report.rows:
        spread = over_seeds(row.accuracies)
        seeds = None if spread is None else {"sd": spread[0], "interval_95": asdict(spread[1])}
        rows.append(
            {
                report.first: row.name,
                "top1": row.top1,
                "over_seeds": seeds,
                "over_images": {"interval_95": asdict(over_images(row.accuracies))},
                "top5": row.top5,
                **row.facts,
                "top1_per_seed": [a.top1 for a in row.accuracies],
                "per_class": [None if math.isnan(v) else v for v in row.per_class],
            }
        )
    return {**facts, "chosen": report.best, "rows": rows, "notes": report.notes}


def free_name(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """`NAME` in the folder, or `NAME-2`, ... if the file of that name has other settings."""
    path, count = folder / name, 1
    while (old := path.with_name(path.name + ".json")).exists():
        if json_file(old).get("settings") == settings:
            break
        count += 1
        path = folder / f"{name}-{count}"
    return path

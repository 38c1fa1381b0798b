"""Tables: cells, each made of one run per seed, beside the published figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ddp_ssl.config.files import FOLDER

Number = tuple[float, float | None]  # mean, sd where there is one


@dataclass(frozen=True)
class Cell:
    """One row of one group; cells of several tables that mean the same run have the same `run`."""

    group: str
    row: str
    run: str
    base: str  # YAML below `configs/`
    overrides: tuple[str, ...] = ()
    paper: dict[str, Number] = field(default_factory=dict)  # published figures by measure
    evaluate: tuple[str, ...] = ()
    """Further keys of the offline evaluation, such as another data set's."""

    @property
    def arguments(self) -> list[str]:
        """As for `ddp_ssl.run.configure.load`."""
        return [str(FOLDER / self.base), *self.overrides]


def short_name(override: str) -> str:
    """An override as a part of a run's name: `epochs_400`."""
    key, _, value = override.partition("=")
    plain = value.replace(" ", "").strip("[]").replace(",", "-")
    return f"{key.rpartition('.')[2]}_{plain}"


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper, and how it is made again."""

    name: str
    paper: str
    what: str
    datasets: tuple[str, ...]  # those it can be made for; the first is the paper's main one
    cells: Callable[[str], list[Cell]]
    measures: tuple[str, ...] = ("probe",)
    notes: str = ""
    seeds: int = 1  # number of the paper's
    small: Callable[[Cell], bool] | None = None
    """Cells that are made with `--scale small`; None: not at that scale."""
    picture: str | None = None
    """`dynamics`, `balance`, `entropy`, `pareto`, `curves` or `coefficient`, from the runs."""
    correlate: bool = False
    """Also print |Pearson r| of accuracy with rank, information and their ratio, per group."""


@dataclass(frozen=True)
class Simulation:
    """A figure that needs no training: a command."""

    name: str
    paper: str
    what: str
    command: tuple[str, ...]  # arguments of Python; `{out}` is the output folder
    cost: str


@cache
def _published() -> dict[str, Any]:
    text = (Path(__file__).parent / "published.yaml").read_text()
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


def published(table: str, row: str, column: str, measure: str = "probe") -> dict[str, Number]:
    """`{measure: (mean, sd)}` of one published figure, or nothing."""
    value = _published().get(table, {}).get(row, {}).get(column)
    if value is None:
        return {}
    mean, sd = value if isinstance(value, list) else (value, None)
    return {measure: (float(mean), sd)}


def published_correlations(row: str, column: str) -> list[float] | None:
    """|r| of accuracy with effective rank, information and their ratio (Table 3)."""
    value: list[float] | None = _published()["table3"].get(row, {}).get(column)
    return value

"""List runs, or compare some of them.

    ddp-ssl runs [DIR]         every run in DIR (default: runs), the newest last
    ddp-ssl runs RUN RUN ...   the settings that differ, and the last figures

Reads the run folders only. docs/runs.md says what the states mean.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError, read_yaml
from ddp_ssl.config.text import flow
from ddp_ssl.logs.writer import read_metrics
from ddp_ssl.run import claims
from ddp_ssl.run.overview import Overview, find_runs, is_run, overview
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.text import markdown_lines, one_line

DEFAULT = Path("runs")
Row = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl runs", __doc__)
    parser.add_argument("folders", nargs="*", type=path_of, metavar="DIR")
    return common.exit_code(lambda: run(parser.parse_args(arguments).folders))


def run(folders: Sequence[Path]) -> int:
    """Print the list or the comparison; returns the exit code."""
    lines = compare(folders) if len(folders) > 1 else listing(folders[0] if folders else DEFAULT)
    print("\n".join(lines))
    return 0


def overviews(folders: Sequence[Path]) -> list[Overview]:
    """What each run folder tells."""
    me, now = claims.this_process(0), time.time()
    return [overview(folder, me, now) for folder in folders]


def listing(folder: Path) -> list[str]:
    """A table of the runs in a folder, the latest last."""
    try:
        found = overviews(find_runs(folder))
    except OSError as error:
        if folder != DEFAULT or not isinstance(error, FileNotFoundError):
            raise ConfigError(f"{folder}: {error.strerror}; a folder is accepted") from None
        found = []
    if not found:
        return [f"no runs in {folder}"]
    return table(sorted(found, key=lambda each: each.changed))


def table(found: Sequence[Overview]) -> list[str]:
    """A line for each run."""
    now = time.time()
    rows = [("run", "state", "step", "epoch", "best", "figure", "age")]
    for each in found:
        epoch = "-" if each.epoch is None else f"{each.epoch}/{each.epochs or '?'}"
        rows.append((
            str(each.folder), state_of(each), str(each.step), epoch, best_of(each),
            each.metric or "-", age(now - each.changed),
        ))  # fmt: skip
    return markdown_lines(rows, "<<>>><>")


def state_of(each: Overview) -> str:
    """`training`, or `training, collapsed`."""
    return each.state + (", collapsed" if each.collapsed else "")


def best_of(each: Overview) -> str:
    return "-" if each.best is None else f"{each.best:.4f}"


def age(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h` or `8 d`."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


# --- comparison ----------------------------------------------------------------------------------


def compare(folders: Sequence[Path]) -> list[str]:
    """How runs stand, the settings in which they differ, and their last figures."""
    for folder in folders:
        if not is_run(folder):
            raise ConfigError(f"{folder}: no run folder (status.json is not there)")
    found = overviews(folders)
    heading = ("", *map(str, folders))
    about = [
        heading,
        ("state", *map(state_of, found)),
        ("step", *(str(each.step) for each in found)),
        ("best", *map(best_of, found)),
    ]
    if any(each.error for each in found):
        about.append(("error", *(one_line(each.error or "-") for each in found)))
    settings = _beside([_settings(folder) for folder in folders])
    differing = [row for row in settings if len({*row[1:]}) > 1 and row[0] != "run.dir"]
    figures = _beside([_figures(folder) for folder in folders])
    return [
        *markdown_lines(about),
        *_part("settings that differ", "no setting differs", heading, differing),
        *_part("last figures", "no figures", heading, figures),
    ]


def _part(title: str, none: str, heading: Row, rows: Sequence[Row]) -> list[str]:
    return ["", f"{title}:", "", *markdown_lines([heading, *rows])] if rows else ["", none]


def _beside(parts: Sequence[dict[str, str]]) -> list[Row]:
    """A row for each name in any of them; `-` where one lacks it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return [(name, *(part.get(name, "-") for part in parts)) for name in names]


def _settings(folder: Path) -> dict[str, str]:
    """Dotted keys of a run's config, and their values as text."""
    tree = read_yaml(folder / "config.yaml")
    return {
        f"{section}.{key}": flow(value)
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _figures(folder: Path) -> dict[str, str]:
    """The last value of each figure; speeds are of the machine."""
    last: dict[str, float] = {}
    path = folder / "metrics.jsonl"
    try:
        for row in read_metrics(path):
            last |= row
        return {
            name: f"{value:.4g}"
            for name, value in sorted(last.items())
            if not name.startswith("perf/") and name not in ("step", "epoch")
        }
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None

"""Tables and figures of AdaDim and of the multi-view paper, each a command.

    ddp-ssl reproduce --list
    ddp-ssl reproduce table6 --scale small --seeds 3 --parallel 2
    ddp-ssl reproduce table9 --dataset cifar10 --root DIR --seeds 3
    ddp-ssl reproduce table15 --dataset all --root cifar100=DIR \\
        --root stl10=DIR --launcher slurm \\
        --submit '--gpus-per-node 1 --partition gpu'
    ddp-ssl reproduce table6 --collect

Every cell and seed is a run, with its config beside its folder. The same
command continues: it keeps the runs that have ended, resumes those that were
interrupted, names those that failed and tries them again, and starts the
others. docs/reproduction.md says more.
"""

import argparse
import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ddp_ssl.commands import common, submit_options
from ddp_ssl.config import ConfigError
from ddp_ssl.reproduction import adadim, configs, cost, multiview, pictures, results, runs
from ddp_ssl.reproduction.cells import Simulation, Table
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.launcher import visible_gpus
from ddp_ssl.utils.text import suggest

EVERYTHING = {each.name: each for each in (*adadim.TABLES, *multiview.TABLES)}


def main(arguments: Sequence[str] | None = None) -> int:
    return common.exit_code(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    # --only takes all words that follow; a word with `=` is a key.
    options.overrides += [word for word in options.only if "=" in word]
    options.only = [word for word in options.only if "=" not in word]
    runs.slurm_jobs.cache_clear()
    common.share_import_path()
    if options.list:
        print(listing())
        return 0
    if options.table is None:
        raise ConfigError("a table or figure is missing; --list names them")
    found = EVERYTHING.get(options.table)
    if found is None:
        hint = suggest(options.table, EVERYTHING) or f"; accepted: {', '.join(EVERYTHING)}"
        raise ConfigError(f"{options.table}: no such table or figure{hint}")
    if isinstance(found, Simulation):
        return simulate(found, options)
    return max([reproduce(found, name, options) for name in _datasets(found, options)])


def listing() -> str:
    """Every table and figure, with data sets, runs of one seed, and GPU-hours of them."""
    lines: list[str] = []
    for paper in dict.fromkeys(each.paper for each in EVERYTHING.values()):
        lines += [paper, ""]
        for each in EVERYTHING.values():
            if each.paper == paper:
                lines.append(f"  {each.name:<18} {each.what}")
                text = each.cost if isinstance(each, Simulation) else _costs(each)
                lines += textwrap.wrap(
                    text, 78, initial_indent=" " * 21, subsequent_indent=" " * 21
                )
        lines.append("")
    return "\n".join([*lines, *textwrap.wrap(cost.CONSTANTS, 99)])


def _costs(table: Table) -> str:
    parts = []
    for dataset in table.datasets:
        cells = {cell.run: cell for cell in table.cells(dataset)}
        hours = sum(cost.gpu_hours(cost.outline(cell)) for cell in cells.values())
        parts.append(f"{dataset} {len(cells)} runs, {cost.show(hours)} h")
    seeds = f"; {table.seeds} seeds" if table.seeds > 1 else ""
    return "; ".join(parts) + seeds + ("; --scale small" if table.small else "")


def simulate(found: Simulation, options: argparse.Namespace) -> int:
    """Run a simulation; returns its exit code."""
    out = (options.out / found.name).absolute()
    command = [sys.executable, *(part.format(out=out) for part in found.command)]
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command).returncode


def reproduce(table: Table, dataset: str, options: argparse.Namespace) -> int:
    """Make one table for one data set; returns 1 if a run failed."""
    seeds = options.seeds or table.seeds
    roots = _roots(options.root, table.datasets)
    planned = runs.plan(table, dataset, options.scale, seeds, options.out, options.only)
    problems: list[str] = []
    if not options.collect:
        what = f"{table.name} ({table.paper})"
        runs.write_configs(planned, options.scale, options.overrides, roots, what)
        missing = [r for r in runs.distinct(planned) if r.state() not in ("done", *runs.WAITING)]
        print(_estimate(table, dataset, missing, len(runs.distinct(planned)), options), flush=True)
        problems = _start(missing, dataset, roots, options)
        if options.dry_run:
            return 0
    groups = results.collect(table, planned)
    text = results.markdown(table, dataset, options.scale, groups, configs.SMALL_RULE)
    name = f"{table.name}-{'digits' if options.scale == 'small' else dataset}"
    place = options.out / options.scale
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.md").write_text(text)
    numbers = results.as_json(table, dataset, options.scale, groups)
    (place / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{text}\nwritten: {place / name}.md, .json")
    if options.into:
        results.insert(options.into, name, text)
    if table.picture:
        print(pictures.draw(table.picture, groups, place / f"{name}.png"))
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return int(bool(problems))


def _estimate(
    table: Table, dataset: str, missing: list[runs.Run], count: int, options: argparse.Namespace
) -> str:
    what = f"{table.name}, {dataset}: {count} runs, {count - len(missing)} ended or queued"
    left = [run for run in missing if run.state() != "to evaluate"]
    trees = [configs.read(run.config).model_dump() for run in left]
    if options.scale == "small":
        minutes = sum(map(cost.cpu_minutes, trees)) / options.parallel
        return f"{what}; about {minutes:.0f} minutes, {options.parallel} at a time"
    try:
        hours = sum(map(cost.gpu_hours, trees))
    except KeyError as name:  # the constants do not cover an override
        return f"{what}; GPU-hours of {name} are not known"
    return f"{what}; about {cost.show(hours)} GPU-hours left\n{cost.CONSTANTS}"


def _start(
    missing: list[runs.Run], dataset: str, roots: dict[str, str], options: argparse.Namespace
) -> list[str]:
    """Run or submit the missing runs; returns the failures."""
    tell = partial(print, flush=True)
    if options.launcher == "slurm":
        words = shlex.split(options.submit)
        commands = runs.submit_commands(missing, words, submit_options.for_evaluation(words), roots)
        if options.dry_run:
            print("\n".join(shlex.join(command) for _, command in commands))
            return []
        _need_root(missing, dataset, roots, options)
        return runs.submit(commands, tell)
    if options.dry_run:
        for run in missing:
            if run.state() != "to evaluate":
                print(shlex.join(runs.train_command(run, options.processes)))
            if run.linear:
                print(shlex.join(runs.evaluate_command(run, roots)))
        return []
    if missing:
        _need_root(missing, dataset, roots, options)
        _need_gpus(options)
    return runs.run_here(missing, options.parallel, options.processes, roots, tell)


def _need_root(
    missing: list[runs.Run], dataset: str, roots: dict[str, str], options: argparse.Namespace
) -> None:
    given = dataset in roots or any(o.startswith("data.root=") for o in options.overrides)
    if options.scale == "full" and missing and not given:
        raise ConfigError(
            f"--root: where {dataset} is: --root DIR or --root {dataset}=DIR; "
            "--scale small needs no data, --dry-run and --collect start nothing"
        )
    if options.scale == "small":
        return
    for run in missing:
        other = run.other
        if other is not None and other not in roots:
            raise ConfigError(
                f"--root: where {other} is, for the probe of {run.label}: --root {other}=DIR"
            )


def _need_gpus(options: argparse.Namespace) -> None:
    if options.scale == "small" or "run.device=cpu" in options.overrides:
        return
    gpus = len(visible_gpus())
    need = options.parallel * options.processes
    if gpus < need:
        raise ConfigError(
            f"--launcher local: {need} GPUs are needed and there are {gpus}; accepted: --scale "
            "small, --launcher slurm, fewer --parallel or --processes, or run.device=cpu"
        )


def _datasets(table: Table, options: argparse.Namespace) -> list[str]:
    if options.dataset == "all":
        return list(table.datasets)
    name = options.dataset or table.datasets[0]
    if name not in table.datasets:
        accepted = ", ".join(("all", *table.datasets))
        raise ConfigError(f"--dataset: {table.name} has no {name}; accepted: {accepted}")
    return [name]


def _roots(given: Sequence[str], datasets: Sequence[str]) -> dict[str, str]:
    """The folder of each data set; `DIR` is for all of them, `NAME=DIR` for one."""
    roots: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if equals and name in cost.IMAGES:
            roots[name] = str(Path(place).expanduser().absolute())
        else:
            roots = dict.fromkeys(datasets, str(Path(text).expanduser().absolute())) | roots
    return roots


def _parser() -> argparse.ArgumentParser:
    parser = common.Parser("ddp-ssl reproduce", __doc__)
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help="a name that --list gives")
    add("overrides", nargs="*", default=[], metavar="key=value", help="for every run, last")
    add("--list", action="store_true", help="every table and figure, with runs and GPU-hours")
    add("--dataset", help="one of the table's, or all (default: the paper's main one)")
    add("--seeds", type=common.count, help="runs of each cell (default: as many as the paper's)")
    add("--scale", choices=("full", "small"), default="full",
        help="small: the embedded digits on a CPU")  # fmt: skip
    add("--only", nargs="+", default=[], metavar="ROW", help="these rows, or groups of rows")
    add("--out", type=path_of, default=Path("runs/reproduce"))
    add("--root", action="append", default=[], metavar="[NAME=]DIR",
        help="where the data sets are, or one of them; may be repeated")  # fmt: skip
    add("--launcher", choices=("local", "slurm"), default="local")
    add("--parallel", type=common.count, default=1, help="local: runs at the same time")
    add("--processes", type=common.count, default=1, help="local: processes of a run, one a GPU")
    add("--submit", default="--gpus-per-node 1", metavar="OPTIONS",
        help="slurm: options of python -m ddp_ssl.submit, as one word")  # fmt: skip
    add("--dry-run", action="store_true", help="write the configs and print the commands")
    add("--collect", action="store_true", help="print the table from what is there")
    add("--into", type=path_of, metavar="FILE",
        help="also put the table between its marks in a Markdown file")  # fmt: skip
    return parser

"""AdaDim's Gaussian simulation: I(R;Z) of clusters and their projection.

    ddp-ssl simulate [--out DIR] [--repetitions 100] [--seeds-from 0]
    ddp-ssl simulate --network [--out DIR] [--seeds 8] [--seeds-from 0]
    ddp-ssl simulate --treatments [--repetitions 100]

The first form projects with PCA, prints I(R;Z) beside the accepted values and checks the trends.
The second trains a small network with SimCLR and with VICReg and checks that I(R;Z) rises, then
levels off. Both write pictures (PNG, SVG) and all numbers (JSON) into DIR. The third compares ways
to deal with the singular covariance. docs/theory.md says what the paper gives
(Fig. 2, 10, 11; Eq. 3).

Exit code 1 if a value or a trend is off, with a line for each; 2 for options that cannot be used.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddp_ssl.commands import common
from ddp_ssl.errors import refused
from ddp_ssl.reproduction import figures, gaussian, gaussian_network
from ddp_ssl.reproduction.gaussian import FEATURES, STDS
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.text import summary

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart without red and green


def draw_pca(results: dict[str, Any], out: Path) -> None:
    """Fig. 2's four panels and the terms of Fig. 10."""
    figure, axes = _figure(2, 3, (12.5, 6.6))
    panels: list[tuple[Any, str, int, Sequence[float], str]] = [
        (axes[0, 0], "features", 10, FEATURES, "(a) more features, k = 10"),
        (axes[0, 1], "features", 2, FEATURES, "(b) more features, k = 2"),
        (axes[1, 0], "std", 10, STDS, "(c) more spread, k = 10"),
        (axes[1, 1], "std", 2, STDS, "(d) more spread, k = 2"),
    ]
    for axis, panel, components, positions, title in panels:
        curves = {c: v for c, v in results[panel].items() if c[0] == components}
        for colour, ((_, fixed), curve) in zip(COLOURS, curves.items(), strict=False):
            name = f"cluster std {fixed:g}" if panel == "features" else f"{fixed} features"
            _band(axis, positions, curve, colour, name)
        axis.set(title=title, ylabel="I(R;Z), nats")
        axis.legend(frameon=False, fontsize=9)
        if panel == "features":
            axis.set(xlabel="features n of R")
        else:
            _log_std(axis)
    names = (r"$\log|\Sigma_R|$", r"$\log|\Sigma_{R|Z}|_+$", r"$\log|\Sigma_Z|$")
    for colour, name, term in zip(COLOURS, names, results["terms"].values(), strict=True):
        _band(axes[0, 2], STDS, term, colour, name)
    for colour, (k, share) in zip(COLOURS, results["kept"].items(), strict=False):
        _band(axes[1, 2], STDS, share, colour, f"k = {k}")
    axes[0, 2].set(title="(e) the terms, k = 2, n = 25", ylabel="nats")
    axes[1, 2].set(title="(f) variance of R that Z keeps, n = 25", ylabel="share", ylim=(0, 1.05))
    for axis in axes[:, 2]:
        axis.legend(frameon=False, fontsize=9)
        _log_std(axis)
    figures.save(figure, out / "simulation", 130)


def draw_network(found: dict[str, list[list[float]]], out: Path) -> None:
    """Fig. 11: a thin line for each seed, the mean as a thick one."""
    figure, axes = _figure(1, len(found), (10, 4), sharey=True)
    for axis, colour, (loss, curves) in zip(axes[0], COLOURS, found.items(), strict=False):
        epochs = np.arange(len(curves[0]))
        for curve in curves:
            axis.plot(epochs, curve, color=colour, linewidth=0.7, alpha=0.45)
        mean = np.nanmean(np.array(curves), 0)
        axis.plot(epochs, mean, color=colour, linewidth=2.5, label=f"mean of {len(curves)} seeds")
        axis.set(title={"simclr": "SimCLR", "vicreg": "VICReg"}[loss], xlabel="epoch")
        axis.legend(frameon=False, loc="lower right")
    axes[0, 0].set(ylabel="I(R;Z), nats")
    figures.save(figure, out / "simulation_network", 130)


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    pyplot = figures.pyplot()
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    pyplot.rcParams.update({"axes.grid": True, "grid.alpha": 0.25})
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    return figure, axes


def _band(axis: Any, x: Sequence[float], curve: dict[str, Any], colour: str, name: str) -> None:
    mean, sd = np.array(curve["mean"]), np.array(curve["sd"])
    axis.plot(x, mean, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
    axis.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)


def _log_std(axis: Any) -> None:
    axis.set_xscale("log")
    ticks = [0.1, 0.5, 1, 2, 5, 10, 20]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("cluster std")


def run_treatments(seeds: Sequence[int]) -> None:
    """Print panels (b) and (d) under each treatment."""
    from sklearn.decomposition import PCA  # here, so that `--help` does not wait for it

    panels = {
        "k = 2, std = 0.5;  n =": [(n, 0.5) for n in FEATURES],
        "k = 2, n = 25;  std =": [(25, s) for s in STDS],
    }
    for title, cells in panels.items():
        moving = [n if "std = 0.5" in title else s for n, s in cells]
        print(f"{title:<24}" + "".join(f"{x:>7g}" for x in moving))
        rows: dict[str, list[float]] = {}
        for n, s in cells:
            data = [gaussian.blobs(n, s, seed) for seed in seeds]
            found = [
                gaussian.treatments(r, PCA(2, svd_solver="full").fit_transform(r)) for r in data
            ]
            for name in found[0]:
                rows.setdefault(name, []).append(float(np.mean([f[name] for f in found])))
        for name, means in rows.items():
            print(f"  {name:<22}" + "".join(f"{mean:>7.2f}" for mean in means))
        print()


def _print(title: str, positions: Sequence[float], terms: dict[str, Any]) -> None:
    print(f"{title:<28}" + "".join(f"{x:>7g}" for x in positions))
    for name, term in terms.items():
        print(f"  {name:<26}" + "".join(f"{v:>7.1f}" for v in term["mean"]))


def run_pca(out: Path, seeds: Sequence[int]) -> list[str]:
    """Simulate, print, draw; returns a line for each value or trend that is off."""
    results = gaussian.sweep(seeds)
    lines, off = gaussian.compare(results, len(seeds))
    print(f"I(R;Z) in nats, {len(seeds)} repetitions, k principal components of n features\n")
    print("\n".join(lines))
    _print("terms, k = 2, n = 25; std =", STDS, results["terms"])
    for (k, moving), bound in results["bound"].items():
        positions, fixed = (FEATURES, "std = 0.5") if moving == "n" else (STDS, "n = 25")
        sums = np.sum([term["mean"] for term in bound.values()], 0)
        title = f"\nbound, k = {k}, {fixed}; {moving} ="
        _print(title, positions, bound | {"H(R) - I(R;Z)": {"mean": sums}})
    draw_pca(results, out)
    tree = {
        "samples": gaussian.SAMPLES, "centers": gaussian.CENTERS, "delta": gaussian.DELTA,
        "seeds": list(seeds),
        "features": list(FEATURES), "stds": list(STDS),
        "by_features": [{"k": k, "std": s, **c} for (k, s), c in results["features"].items()],
        "by_std": [{"k": k, "features": n, **c} for (k, n), c in results["std"].items()],
        "terms": results["terms"], "kept": results["kept"],
        "bound": [{"k": k, "moving": m, **b} for (k, m), b in results["bound"].items()],
    }  # fmt: skip
    _write(out / "simulation.json", tree)
    return off + gaussian.missed_trends(results)


def run_network(out: Path, seeds: Sequence[int], epochs: int, processes: int) -> list[str]:
    """Train, print, draw; returns a line for each trend that is off."""
    found = gaussian_network.train_networks(seeds, epochs, processes)
    print()
    for loss, curves in found.items():
        first, second = gaussian_network.gains(curves)
        values = np.array(curves)
        at = gaussian_network.checkpoints(values.shape[1] - 1)
        means = "  ".join(
            f"{np.nanmean(values[:, e]):.2f} ± {np.nanstd(values[:, e]):.2f} @{e}" for e in at
        )
        rising = int((np.nan_to_num(first) > 0).sum())
        print(f"{loss}: {means}")
        print(
            f"  median at the end {np.nanmedian(values[:, -1]):.2f}; gains "
            f"{np.nanmean(first):+.2f} by epoch {at[1]} ({rising} of {len(curves)} seeds rise), "
            f"{np.nanmean(second):+.2f} from {at[2]} to {at[3]}; infinite "
            f"{int(np.isnan(values).sum())} times"
        )
    higher = sum(v[-1] > s[-1] for s, v in zip(found["simclr"], found["vicreg"], strict=True))
    print(f"vicreg ends above simclr in {higher} of {len(seeds)} seeds (not a condition)")
    draw_network(found, out)
    _write(out / "simulation_network.json", {"seeds": list(seeds), "epochs": epochs, **found})
    return gaussian_network.missed_in_training(found)


def _write(path: Path, tree: dict[str, Any]) -> None:
    text = json.dumps(tree, indent=1)
    path.write_text(text.replace("NaN", "null") + "\n")  # JSON has no NaN


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} given; {low} or more is accepted")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl simulate", summary(__doc__))
    parser.add_argument("--out", type=path_of, default=Path("runs/simulation"))
    parser.add_argument("--repetitions", type=_at_least(2), default=100)
    parser.add_argument("--seeds-from", type=_at_least(0), default=0)
    parser.add_argument("--network", action="store_true", help="train networks in place of PCA")
    parser.add_argument("--treatments", action="store_true", help="of the singular covariance")
    parser.add_argument("--seeds", type=_at_least(1), default=8, help="networks of each loss")
    parser.add_argument(
        "--epochs", type=_at_least(10), default=gaussian_network.EPOCHS, help="of the networks"
    )
    parser.add_argument("--processes", type=_at_least(1), default=2, help="networks at a time")
    return common.exit_code(lambda: run(parser.parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Run the simulation and print how its values compare; returns the exit code."""
    first = options.seeds_from
    if options.treatments:
        run_treatments(range(first, first + options.repetitions))
        return 0
    figures.pyplot()  # before the work, which takes a while
    with refused("--out: the folder cannot be created"):
        options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if options.network:
        seeds = range(first, first + options.seeds)
        wrong = run_network(options.out, seeds, options.epochs, options.processes)
    else:
        wrong = run_pca(options.out, range(first, first + options.repetitions))
    took = time.perf_counter() - start
    print(f"\n{took:.0f} s; pictures and numbers are in {options.out}")
    for line in wrong:
        print(f"off: {line}", file=sys.stderr)
    print("all values and trends as accepted" if not wrong else f"{len(wrong)} off")
    return int(bool(wrong))

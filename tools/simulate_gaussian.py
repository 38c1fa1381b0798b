"""AdaDim's Gaussian simulation: I(R;Z) of blobs and their projection (Fig. 2, 10, 11; Eq. 3).

    python tools/simulate_gaussian.py [--out DIR] [--repetitions 100] [--seeds-from 0]
    python tools/simulate_gaussian.py --network [--out DIR] [--seeds 8] [--seeds-from 0]
    python tools/simulate_gaussian.py --treatments [--repetitions 100]

The first form projects with PCA, prints I(R;Z) beside the accepted values and checks the trends;
the second trains a small network with SimCLR and with VICReg and checks that I(R;Z) rises, then
levels off; figures (PNG, SVG) and all numbers (JSON) go to DIR. The third compares ways to deal
with the singular covariance. docs/theory.md says what the paper fixes and what is a reconstruction.

Exit code 1, naming what is off, if a value or a trend is; 2 for options that cannot be used.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from torch import nn

from ddp_ssl.losses import info_nce, vicreg

Array = npt.NDArray[np.float64]

SAMPLES, CENTERS = 1000, 5  # the paper's
DELTA = 1e-3  # the noise floor, relative to the mean variance of a feature of R
FEATURES = (12, 16, 20, 25, 30, 40, 50)
STDS = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)

# Means over the seeds 0 to 99 that this project measured (the paper prints none), by another route:
# scikit-learn's PCA, then Schur's complement with a pseudo-inverse of the covariance of R.
# (components, std) -> one value for each of FEATURES.
ACCEPTED_BY_FEATURES: dict[tuple[int, float], tuple[float, ...]] = {
    (10, 0.5): (22.76, 23.57, 24.18, 24.77, 25.24, 26.01, 26.58),
    (10, 1.0): (26.59, 27.40, 28.01, 28.61, 29.08, 29.86, 30.43),
    (10, 5.0): (33.71, 34.34, 34.85, 35.37, 35.81, 36.52, 37.08),
    (2, 0.5): (8.35, 8.60, 8.80, 8.99, 9.16, 9.42, 9.63),
    (2, 1.0): (8.33, 8.58, 8.78, 8.97, 9.13, 9.39, 9.60),
    (2, 5.0): (7.90, 8.11, 8.28, 8.45, 8.60, 8.84, 9.04),
}
# (components, features) -> one value for each of STDS.
ACCEPTED_BY_STD: dict[tuple[int, int], tuple[float, ...]] = {
    (10, 25): (18.43, 24.77, 28.61, 32.24, 33.97, 35.37, 35.75, 35.78, 35.61, 35.47),
    (10, 50): (20.01, 26.58, 30.43, 34.06, 35.76, 37.08, 37.33, 37.18, 36.74, 36.42),
    (2, 25): (9.00, 8.99, 8.97, 8.88, 8.75, 8.45, 8.17, 7.84, 7.50, 7.33),
    (2, 50): (9.63, 9.63, 9.60, 9.51, 9.37, 9.04, 8.72, 8.31, 7.87, 7.60),
}

# --- the quantity ------------------------------------------------------------------------------


def blobs(features: int, std: float, seed: int) -> Array:
    """The paper's data `[1000, features]`: five isotropic clusters in the default box."""
    x, _ = make_blobs(SAMPLES, features, centers=CENTERS, cluster_std=std, random_state=seed)
    return np.asarray(x)


def information(r: Array, z: Array, delta: float = DELTA) -> float:
    """I(R;Z) in nats of jointly Gaussian `r` `[N, n]` and `z` `[N, k]`.

    1/2 (log|S_Z + jI| - log|S_Z|R + jI|) with j = `delta` * tr(S_R) / n, which is the mutual
    information of R and of Z seen through noise of variance j. S_Z|R is the covariance of what a
    linear regression on R leaves of Z: Schur's complement, in a form that is never negative.
    Without a floor it is infinite if a dimension of Z is a linear map of R. Source: AdaDim Eq. 1.
    """
    r, z = r - r.mean(0), z - z.mean(0)
    if delta == 0:
        z = _basis(z)  # scale does not matter, and a dimension that has died tells nothing
    basis = _basis(r)
    rest = z - basis @ (basis.T @ z)
    if delta == 0 and np.linalg.svd(rest, compute_uv=False).min(initial=1) < 1e-8:
        return float("inf")
    floor = delta * r.var(0, ddof=1).mean() * np.eye(z.shape[1])
    _, logs = np.linalg.slogdet(np.stack([z.T @ z, rest.T @ rest]) / (len(r) - 1) + floor)
    return float(logs[0] - logs[1]) / 2


def _basis(x: Array) -> Array:
    """Orthonormal columns that span those of a centred matrix."""
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    return np.asarray(left[:, singular > 1e-12 * max(singular[0], 1e-300)])


def spectra(features: int, std: float, seeds: Sequence[int]) -> Array:
    """Eigenvalues of the covariance of R for each seed, `[seeds, features]`, largest first."""
    covariances = [np.cov(blobs(features, std, seed), rowvar=False) for seed in seeds]
    return np.linalg.eigvalsh(np.stack(covariances))[:, ::-1]


def pca_information(eigenvalues: Array, components: int, delta: float = DELTA) -> Array:
    """`information` of R and its first principal components, `[..., features]` -> `[...]`.

    R decides Z, so S_Z|R = 0, and what is left is 1/2 sum log(1 + lambda_i / j) over the
    components, j = `delta` times the mean eigenvalue.
    """
    floor = delta * eigenvalues.mean(-1, keepdims=True)
    return np.asarray(np.log1p(eigenvalues[..., :components] / floor).sum(-1) / 2)


def log_determinants(eigenvalues: Array, components: int) -> dict[str, Array]:
    """The terms of Eq. 1: log|S_R|, log|S_R|Z| over its range (n - k dimensions), log|S_Z|."""
    logs = np.log(eigenvalues)
    return {
        "log|S_R|": logs.sum(-1),
        "log|S_R|Z|": logs[..., components:].sum(-1),
        "log|S_Z|": logs[..., :components].sum(-1),
    }


def bound_terms(eigenvalues: Array, components: int, delta: float = DELTA) -> dict[str, Array]:
    """The three terms of Eq. 3, whose sum is H(R) - I(R;Z), with the noise floor of `information`.

    Of R's first principal components seen through noise of variance j: S_Z has lambda_i + j, and
    S_Z|R is j I.
    """
    floor = delta * eigenvalues.mean(-1)
    of_z = np.log(eigenvalues[..., :components] + floor[..., None]).sum(-1)
    n = eigenvalues.shape[-1]
    return {
        "variance differential": (np.log(eigenvalues).sum(-1) - of_z) / 2,
        "conditional": components / 2 * np.log(floor),
        "total dimension": np.full_like(floor, n / 2 * np.log(2 * np.pi * np.e)),
    }


def treatments(r: Array, z: Array) -> dict[str, float]:
    """I(R;Z) by several ways to deal with a joint covariance that is singular, Z = PCA of R."""
    n, joint = r.shape[1], np.cov(np.hstack([r, z]), rowvar=False)
    s_r, s_z, s_rz = joint[:n, :n], joint[n:, n:], joint[:n, n:]
    given = s_r - s_rz @ np.linalg.solve(s_z, s_rz.T)
    eigenvalues = np.linalg.eigvalsh(given)
    large = eigenvalues[eigenvalues > 1e-9 * np.linalg.eigvalsh(s_r)[-1]]

    def log_det(x: Array, jitter: float = 0) -> float:
        return float(np.linalg.slogdet(x + jitter * np.eye(len(x)))[1])

    jittered = [log_det(x, DELTA) for x in (s_r, s_z, joint)]
    return {
        "as it stands": (log_det(s_r) - log_det(given)) / 2,
        "absolute jitter 1e-3": (jittered[0] + jittered[1] - jittered[2]) / 2,
        "pseudo-determinant": (log_det(s_r) - float(np.log(large).sum())) / 2,
        "relative floor 1e-3": information(r, z),
    }


# --- PCA ---------------------------------------------------------------------------------------


def row(samples: Sequence[Array]) -> dict[str, list[float]]:
    """Mean and standard deviation over the repetitions, at each position of a sweep."""
    return {
        "mean": [float(x.mean()) for x in samples],
        "sd": [float(x.std(ddof=1)) for x in samples],
    }


def sweep(seeds: Sequence[int]) -> dict[str, Any]:
    """Both sweeps, the terms of Eq. 1 (Fig. 10) and of Eq. 3, and the share of the variance that Z
    keeps, as `{panel: {curve: {mean, sd}}}`."""
    cells = {(n, s) for _, s in ACCEPTED_BY_FEATURES for n in FEATURES}
    cells |= {(n, s) for _, n in ACCEPTED_BY_STD for s in STDS}
    found = {(n, s): spectra(n, s, seeds) for n, s in sorted(cells)}
    terms = [log_determinants(found[25, s], 2) for s in STDS]
    swept = {"n": [found[n, 0.5] for n in FEATURES], "std": [found[25, s] for s in STDS]}
    return {
        "bound": {
            (k, moving): {
                name: row([bound_terms(at, k)[name] for at in spectra_])
                for name in bound_terms(spectra_[0], k)
            }
            for k in (10, 2)
            for moving, spectra_ in swept.items()
        },
        "features": {
            curve: row([pca_information(found[n, curve[1]], curve[0]) for n in FEATURES])
            for curve in ACCEPTED_BY_FEATURES
        },
        "std": {
            curve: row([pca_information(found[curve[1], s], curve[0]) for s in STDS])
            for curve in ACCEPTED_BY_STD
        },
        "terms": {name: row([at[name] for at in terms]) for name in terms[0]},
        "kept": {
            k: row([found[25, s][:, :k].sum(1) / found[25, s].sum(1) for s in STDS])
            for k in (10, 2)
        },
    }


def tolerance(accepted: float, sd: float, repetitions: int) -> float:
    """Three standard errors and 1 % of the value."""
    return float(3 * sd / np.sqrt(repetitions) + 0.01 * accepted)


def compare(results: dict[str, Any], repetitions: int) -> tuple[list[str], list[str]]:
    """The tables, and one line for each value that is off."""
    lines: list[str] = []
    off: list[str] = []
    panels: list[tuple[str, Any, Sequence[float], str, str]] = [
        ("features", ACCEPTED_BY_FEATURES, FEATURES, "std", "n"),
        ("std", ACCEPTED_BY_STD, STDS, "n", "std"),
    ]
    for panel, accepted_curves, positions, fixed, moving in panels:
        for curve, accepted in accepted_curves.items():
            ours = results[panel][curve]
            bounds = [
                tolerance(a, sd, repetitions) for a, sd in zip(accepted, ours["sd"], strict=True)
            ]
            verdicts = []
            for x, mean, a, bound in zip(positions, ours["mean"], accepted, bounds, strict=True):
                fine = abs(mean - a) <= bound
                verdicts.append("ok" if fine else "OFF")
                if not fine:
                    off.append(
                        f"k = {curve[0]}, {fixed} = {curve[1]:g}, {moving} = {x:g}: I(R;Z) is "
                        f"{mean:.2f}, accepted {a:.2f} within {bound:.2f}"
                    )
            title = f"k = {curve[0]}, {fixed} = {curve[1]:g};  {moving} ="
            lines.append(f"{title:<24}" + "".join(f"{x:>7g}" for x in positions))
            table = {**ours, "accepted": accepted, "within": bounds}
            for name, values in table.items():
                lines.append(f"  {name:<22}" + "".join(f"{v:>7.2f}" for v in values))
            lines += [f"{'':<24}" + "".join(f"{v:>7}" for v in verdicts), ""]
    return lines, off


def missed_trends(results: dict[str, Any]) -> list[str]:
    """What of Fig. 2 and Fig. 10 is not seen, one line each."""
    missed = []
    for (k, std), curve in results["features"].items():
        if not (np.diff(curve["mean"]) > 0).all():
            missed.append(f"I(R;Z) should rise with the features (k = {k}, std = {std:g})")
    late, early = [np.array(STDS) >= bound for bound in (5, 0.5)]
    for (k, n), curve in results["std"].items():
        mean = np.array(curve["mean"])
        if k == 10 and not (mean.argmax() > 0 and (mean[late] >= 0.97 * mean.max()).all()):
            missed.append(f"I(R;Z) should rise with the std, then level off (k = 10, n = {n})")
        if k == 2 and not (np.diff(mean[early]) < 0).all():
            missed.append(f"I(R;Z) should fall with the std (k = 2, n = {n})")
    change = {name: term["mean"][-1] - term["mean"][0] for name, term in results["terms"].items()}
    if not change["log|S_R|Z|"] > 10 * abs(change["log|S_Z|"]):
        missed.append("log|S_Z| should hardly change while log|S_R|Z| rises with the std")
    return missed


# --- the network -------------------------------------------------------------------------------

EPOCHS, BATCH, TEMPERATURE, NOISE = 1000, 256, 0.1, 0.5
LOSSES = ("simclr", "vicreg")


def network() -> nn.Sequential:
    """Five layers of 20 units with ReLU, then the projector: 5 units, ReLU, 5 outputs."""
    widths = [25, 20, 20, 20, 20, 20, 5]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 5))


def train_network(loss: str, seed: int, epochs: int = EPOCHS) -> list[float]:
    """I(R;Z) of the clean data and the network's output, before training and after each epoch.

    NaN where it is infinite.
    """
    torch.set_num_threads(1)
    clean = blobs(25, 0.01, seed)
    torch.manual_seed(seed)
    model, x = network(), torch.from_numpy(clean).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.999))

    def measured() -> float:
        exact = copy.deepcopy(model).double()  # float32's rounding would be noise in Z
        with torch.no_grad():
            z = exact(torch.from_numpy(clean)).numpy()
        value = information(clean, z, delta=0)  # Z is no linear map of R, so no floor is needed
        return value if np.isfinite(value) else float("nan")

    curve = [measured()]
    for _ in range(epochs):
        for images in torch.randperm(SAMPLES).split(BATCH):
            views = x[images] + NOISE * torch.randn(2, len(images), x.shape[1])
            z = model(views)
            value = info_nce(z, TEMPERATURE) if loss == "simclr" else vicreg(z).loss
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        curve.append(measured())
    return curve


def train_networks(
    seeds: Sequence[int], epochs: int = EPOCHS, processes: int = 2
) -> dict[str, list[list[float]]]:
    """`train_network` for both losses and every seed, some at a time."""
    jobs = [(loss, seed) for loss in LOSSES for seed in seeds]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train_network, *job, epochs) for job in jobs]
        curves = []
        for (loss, seed), future in zip(jobs, futures, strict=True):
            curves.append(future.result())
            print(f"{loss} seed {seed}: {describe_curve(curves[-1])}", flush=True)
    found: dict[str, list[list[float]]] = {loss: [] for loss in LOSSES}
    for (loss, _), curve in zip(jobs, curves, strict=True):
        found[loss].append(curve)
    return found


def checkpoints(epochs: int) -> tuple[int, ...]:
    """The epochs that are compared: start, a tenth, half, end."""
    return 0, epochs // 10, epochs // 2, epochs


def describe_curve(curve: Sequence[float]) -> str:
    """I(R;Z) at the epochs that are compared."""
    at = checkpoints(len(curve) - 1)
    return "  ".join(f"{curve[epoch]:6.2f} @{epoch}" for epoch in at)


def gains(curves: Sequence[Sequence[float]]) -> tuple[Array, Array]:
    """For each seed: what I(R;Z) gains in the first tenth and in the second half."""
    values = np.array(curves)
    start, tenth, half, end = checkpoints(values.shape[1] - 1)
    return values[:, tenth] - values[:, start], values[:, end] - values[:, half]


def missed_in_training(found: dict[str, list[list[float]]]) -> list[str]:
    """Whether the mean rises at first and then levels off, one line for each loss that does not."""
    missed = []
    for loss, curves in found.items():
        first, second = (float(np.nanmean(gain)) for gain in gains(curves))
        if not (first > 0 and abs(second) < first / 2):
            missed.append(
                f"{loss}: I(R;Z) should rise, then level off; it gains {first:.2f} in the first "
                f"tenth and {second:.2f} in the second half"
            )
    return missed


# --- figures -----------------------------------------------------------------------------------

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
            _band(axis, positions, np.array(curve["mean"]), np.array(curve["sd"]), colour, name)
        axis.set(title=title, ylabel="I(R;Z), nats")
        axis.legend(frameon=False, fontsize=9)
        if panel == "features":
            axis.set(xlabel="features n of R")
        else:
            _log_std(axis)
    names = (r"$\log|\Sigma_R|$", r"$\log|\Sigma_{R|Z}|_+$", r"$\log|\Sigma_Z|$")
    for colour, name, term in zip(COLOURS, names, results["terms"].values(), strict=True):
        _band(axes[0, 2], STDS, np.array(term["mean"]), np.array(term["sd"]), colour, name)
    for colour, (k, share) in zip(COLOURS, results["kept"].items(), strict=False):
        mean, sd = np.array(share["mean"]), np.array(share["sd"])
        _band(axes[1, 2], STDS, mean, sd, colour, f"k = {k}")
    axes[0, 2].set(title="(e) the terms, k = 2, n = 25", ylabel="nats")
    axes[1, 2].set(title="(f) variance of R that Z keeps, n = 25", ylabel="share", ylim=(0, 1.05))
    for axis in axes[:, 2]:
        axis.legend(frameon=False, fontsize=9)
        _log_std(axis)
    _save(figure, out / "simulation")


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
    _save(figure, out / "simulation_network")


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "ddp_ssl", "axes.spines.top": False})
    pyplot.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )


def _band(axis: Any, x: Sequence[float], mean: Array, sd: Array, colour: str, name: str) -> None:
    axis.plot(x, mean, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
    axis.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)


def _log_std(axis: Any) -> None:
    axis.set_xscale("log")
    ticks = [0.1, 0.5, 1, 2, 5, 10, 20]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("cluster std")


def _save(figure: Any, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def run_treatments(seeds: Sequence[int]) -> None:
    """Print what becomes of panels (b) and (d) under each treatment."""
    panels = {
        "k = 2, std = 0.5;  n =": [(n, 0.5) for n in FEATURES],
        "k = 2, n = 25;  std =": [(25, s) for s in STDS],
    }
    for title, cells in panels.items():
        moving = [n if "std = 0.5" in title else s for n, s in cells]
        print(f"{title:<24}" + "".join(f"{x:>7g}" for x in moving))
        rows: dict[str, list[float]] = {}
        for n, s in cells:
            data = [blobs(n, s, seed) for seed in seeds]
            found = [treatments(r, PCA(2).fit_transform(r)) for r in data]
            for name in found[0]:
                rows.setdefault(name, []).append(float(np.mean([f[name] for f in found])))
        for name, means in rows.items():
            print(f"  {name:<22}" + "".join(f"{mean:>7.2f}" for mean in means))
        print()


# --- the commands ------------------------------------------------------------------------------


def run_pca(out: Path, seeds: Sequence[int]) -> list[str]:
    """Simulate, print, draw; returns what is off."""
    results = sweep(seeds)
    lines, off = compare(results, len(seeds))
    print(f"I(R;Z) in nats, {len(seeds)} repetitions, k principal components of n features\n")
    print("\n".join(lines))
    print(f"{'terms, k = 2, n = 25; std =':<28}" + "".join(f"{s:>7g}" for s in STDS))
    for name, term in results["terms"].items():
        print(f"  {name:<26}" + "".join(f"{v:>7.1f}" for v in term["mean"]))
    for (k, moving), bound in results["bound"].items():
        positions, fixed = (FEATURES, "std = 0.5") if moving == "n" else (STDS, "n = 25")
        title = f"bound, k = {k}, {fixed}; {moving} ="
        print(f"\n{title:<28}" + "".join(f"{x:>7g}" for x in positions))
        for name, term in bound.items():
            print(f"  {name:<26}" + "".join(f"{v:>7.1f}" for v in term["mean"]))
        sums = np.sum([term["mean"] for term in bound.values()], 0)
        print(f"  {'H(R) - I(R;Z)':<26}" + "".join(f"{v:>7.1f}" for v in sums))
    draw_pca(results, out)
    tree = {
        "samples": SAMPLES, "centers": CENTERS, "delta": DELTA, "seeds": list(seeds),
        "features": list(FEATURES), "stds": list(STDS),
        "by_features": [{"k": k, "std": s, **c} for (k, s), c in results["features"].items()],
        "by_std": [{"k": k, "features": n, **c} for (k, n), c in results["std"].items()],
        "terms": results["terms"], "kept": results["kept"],
        "bound": [{"k": k, "moving": m, **b} for (k, m), b in results["bound"].items()],
    }  # fmt: skip
    _write(out / "simulation.json", tree)
    return off + missed_trends(results)


def run_network(out: Path, seeds: Sequence[int], epochs: int, processes: int) -> list[str]:
    """Train, print, draw; returns what is off."""
    found = train_networks(seeds, epochs, processes)
    print()
    for loss, curves in found.items():
        first, second = gains(curves)
        values = np.array(curves)
        at = checkpoints(values.shape[1] - 1)
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
    return missed_in_training(found)


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
    """From the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/simulation"))
    parser.add_argument("--repetitions", type=_at_least(2), default=100)
    parser.add_argument("--seeds-from", type=_at_least(0), default=0)
    parser.add_argument("--network", action="store_true", help="train networks in place of PCA")
    parser.add_argument("--treatments", action="store_true", help="of the singular covariance")
    parser.add_argument("--seeds", type=_at_least(1), default=8, help="networks of each loss")
    parser.add_argument("--epochs", type=_at_least(10), default=EPOCHS, help="of the networks")
    parser.add_argument("--processes", type=_at_least(1), default=2, help="networks at a time")
    options = parser.parse_args(arguments)
    first = options.seeds_from
    if options.treatments:
        run_treatments(range(first, first + options.repetitions))
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {options.out} cannot be created: {error.strerror}")
    start = time.perf_counter()
    if options.network:
        seeds = range(first, first + options.seeds)
        wrong = run_network(options.out, seeds, options.epochs, options.processes)
    else:
        wrong = run_pca(options.out, range(first, first + options.repetitions))
    took = time.perf_counter() - start
    print(f"\n{took:.0f} s; figures and numbers are in {options.out}")
    for line in wrong:
        print(f"off: {line}", file=sys.stderr)
    print("all values and trends as accepted" if not wrong else f"{len(wrong)} off")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

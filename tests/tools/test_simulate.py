"""ddp-ssl simulate: the formula, the accepted values, the paper's trends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ddp_ssl.commands import simulate
from ddp_ssl.reproduction import gaussian, gaussian_network

REPETITIONS = 8


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return gaussian.sweep(range(REPETITIONS))


def schur(r: Any, z: Any, delta: float) -> float:
    """The general formula, with a pseudo-inverse of the covariance of R."""
    n = r.shape[1]
    joint = np.cov(np.hstack([r, z]), rowvar=False)
    s_r, s_z, s_rz = joint[:n, :n], joint[n:, n:], joint[:n, n:]
    given = s_z - s_rz.T @ np.linalg.pinv(s_r, rcond=1e-12, hermitian=True) @ s_rz
    floor = delta * np.trace(s_r) / n * np.eye(len(s_z))
    return float(np.linalg.slogdet(s_z + floor)[1] - np.linalg.slogdet(given + floor)[1]) / 2


@pytest.mark.parametrize(("features", "std", "k"), [(12, 0.5, 2), (25, 5.0, 10), (50, 0.1, 10)])
def test_three_ways_to_the_same_number(features: int, std: float, k: int) -> None:
    """Eigenvalues alone; a regression; Schur's complement with scikit-learn's PCA."""
    r = gaussian.blobs(features, std, seed=3)
    z = PCA(k, svd_solver="full").fit_transform(r)
    quick = gaussian.pca_information(gaussian.spectra(features, std, [3]), k)
    assert quick.shape == (1,)
    assert gaussian.information(r, z) == pytest.approx(float(quick[0]), rel=1e-7)
    assert schur(r, z, gaussian.DELTA) == pytest.approx(float(quick[0]), rel=1e-7)


def test_a_projection_with_noise_needs_no_floor() -> None:
    """Z = a R + b noise in each dimension: I = k/2 log(1 + a^2/b^2)."""
    rng = np.random.default_rng(0)
    r = rng.normal(size=(200_000, 6))
    z = 3.0 * r[:, :2] + 0.5 * rng.normal(size=(200_000, 2))
    assert gaussian.information(r, z, 0) == pytest.approx(math.log(1 + 36), rel=0.01)
    assert schur(r, z, 0) == pytest.approx(gaussian.information(r, z, 0), rel=1e-9)
    assert gaussian.information(r, rng.normal(size=(200_000, 2)), 0) == pytest.approx(0, abs=1e-3)


def test_dimensions_that_died_or_are_linear() -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=(50, 3))
    z = np.hstack([r[:, :1] + rng.normal(size=(50, 1)), np.ones((50, 1))])
    assert gaussian.information(r, z, 0) == pytest.approx(gaussian.information(r, z[:, :1], 0))
    assert gaussian.information(r, np.ones((50, 2)), 0) == 0
    assert gaussian.information(r, np.ones((50, 2))) == pytest.approx(0)
    assert gaussian.information(r, r[:, :2] @ rng.normal(size=(2, 2)), 0) == math.inf


def test_treatments_that_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the relative floor falls with the spread, as the paper's panel (d) does."""
    found = []
    for std in (0.5, 5.0, 20.0):
        r = gaussian.blobs(25, std, 0)
        found.append(gaussian.treatments(r, PCA(2, svd_solver="full").fit_transform(r)))
    curves = {name: [f[name] for f in found] for name in found[0]}
    assert (np.diff(curves.pop("relative floor 1e-3")) < -0.3).all()
    assert min(curves.pop("as it stands")) > 30  # a constant of rounding
    for name, curve in curves.items():
        assert (np.diff(curve) > 0).all(), name
    assert simulate.main(["--treatments", "--repetitions", "2"]) == 0
    assert capsys.readouterr().out.count("pseudo-determinant") == 2


def test_the_terms_add_up() -> None:
    eigenvalues = gaussian.spectra(25, 2.0, [0, 1])
    terms = gaussian.log_determinants(eigenvalues, 2)
    covariance = np.cov(gaussian.blobs(25, 2.0, 1), rowvar=False)
    assert terms["log|S_R|"][1] == pytest.approx(np.linalg.slogdet(covariance)[1])
    assert terms["log|S_R|Z|"] + terms["log|S_Z|"] == pytest.approx(terms["log|S_R|"])


@pytest.mark.parametrize("k", [2, 10])
def test_the_terms_of_the_bound_are_those_of_the_formula(k: int) -> None:
    """From covariances with a regression, and H(R) - I(R;Z) by their sum."""
    r = gaussian.blobs(25, 2.0, seed=4)
    terms = gaussian.bound_terms(gaussian.spectra(25, 2.0, [4]), k)
    z = PCA(k, svd_solver="full").fit_transform(r)
    s_r, s_z = np.cov(r, rowvar=False), np.atleast_2d(np.cov(z, rowvar=False))
    floor = gaussian.DELTA * np.trace(s_r) / 25
    rest = z - (r - r.mean(0)) @ np.linalg.lstsq(r - r.mean(0), z, rcond=None)[0]
    given = np.cov(rest, rowvar=False) + floor * np.eye(k)
    logs = [np.linalg.slogdet(x)[1] for x in (s_r, s_z + floor * np.eye(k), given)]
    dimension = 25 / 2 * math.log(2 * math.pi * math.e)
    expected = [(logs[0] - logs[1]) / 2, logs[2] / 2, dimension]
    assert [float(term[0]) for term in terms.values()] == pytest.approx(expected, rel=1e-7)
    entropy = logs[0] / 2 + dimension
    assert sum(expected) == pytest.approx(entropy - gaussian.information(r, z), rel=1e-9)


def test_values_and_trends_are_as_accepted(results: dict[str, Any]) -> None:
    lines, off = gaussian.compare(results, REPETITIONS)
    assert off == []
    assert sum(line.count(" ok") for line in lines) == 6 * 7 + 4 * 10
    assert gaussian.missed_trends(results) == []


def test_what_is_off_is_named(results: dict[str, Any]) -> None:
    wrong = json.loads(json.dumps({"x": list(results["std"].values())}))["x"]
    wrong = {**results, "std": dict(zip(results["std"], wrong, strict=True))}
    wrong["std"][2, 25]["mean"][4] = 9.2
    _, off = gaussian.compare(wrong, REPETITIONS)
    (line,) = off
    assert line.startswith("k = 2, n = 25, std = 3: I(R;Z) is 9.20, accepted 8.75 within 0.")
    assert gaussian.missed_trends(wrong) == ["I(R;Z) should fall with the std (k = 2, n = 25)"]
    level = {c: {"mean": [1.0] * len(gaussian.FEATURES)} for c in results["features"]}
    assert len(gaussian.missed_trends({**results, "features": level})) == len(level)
    # Another noise floor is another number: the accepted values depend on it.
    eigenvalues = gaussian.spectra(25, 1.0, range(REPETITIONS))
    assert abs(gaussian.pca_information(eigenvalues, 2, 1e-2).mean() - 8.97) > 1


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert simulate.main(["--out", str(tmp_path), "--repetitions", "3", "--seeds-from", "7"]) == 0
    assert "all values and trends as accepted" in capsys.readouterr().out
    tree = json.loads((tmp_path / "simulation.json").read_text())
    assert tree["seeds"] == [7, 8, 9]
    assert len(tree["by_std"]) == 4
    assert len(tree["by_std"][0]["mean"]) == len(gaussian.STDS)
    assert [(b["k"], b["moving"]) for b in tree["bound"]] == [
        (10, "n"), (10, "std"), (2, "n"), (2, "std"),
    ]  # fmt: skip
    for kind in ("png", "svg"):
        assert (tmp_path / f"simulation.{kind}").stat().st_size > 10_000
    shifted = {c: tuple(v + 2 for v in values) for c, values in gaussian.ACCEPTED_BY_STD.items()}
    monkeypatch.setattr(gaussian, "ACCEPTED_BY_STD", shifted)
    assert simulate.main(["--out", str(tmp_path), "--repetitions", "3"]) == 1
    assert "off: k = 2, n = 50, std = 20: I(R;Z) is 7.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repetitions", "1"], "argument --repetitions: 1 given; 2 or more is accepted"),
        (["--network", "--seeds", "none"], "argument --seeds: none given; 1 or more is accepted"),
        (["--out", "/dev/null/x"], "--out: the folder cannot be created: /dev/null/x: Not a dir"),
    ],
)
def test_wrong_options(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(arguments) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("loss", gaussian_network.LOSSES)
def test_training_raises_the_information(loss: str) -> None:
    """Fifty epochs of one network: 5 nats above the start, and the same when repeated."""
    curve = gaussian_network.train_network(loss, seed=0, epochs=50)
    assert len(curve) == 51
    assert curve[50] > curve[0] + 5
    assert gaussian_network.train_network(loss, seed=0, epochs=3) == curve[:4]


def test_rise_and_plateau_are_told_from_other_curves() -> None:
    t = np.arange(101)
    plateau = [list(10 + 8 * (1 - np.exp(-t / 8))), [float("nan"), *list(9 + 0.0 * t)[1:]]]
    assert gaussian_network.missed_in_training({"simclr": plateau}) == []
    for wrong in (list(10 + 0.1 * t), list(20 - 0.1 * t), list(10 + 0.0 * t)):
        (line,) = gaussian_network.missed_in_training({"simclr": [wrong]})
        assert line.startswith("simclr: I(R;Z) should rise, then level off; it gains ")

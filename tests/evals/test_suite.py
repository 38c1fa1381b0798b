"""`ddp-ssl evaluate suite RUN`: one table over small data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ddp_ssl.evals import evaluation, suite
from ddp_ssl.evals.accuracy import Accuracy, difference, over_both, over_images, over_seeds
from ddp_ssl.evaluate import main
from tests.evals.runs import make_run
from tests.helpers import SHALLOW
from tests.ranks import Ranks

QUICK = ("run.device=cpu", "run.threads=1", "data.threads=1", "data.read_threads=2",
         "linear.epochs=3", "linear.lr=[0.1,1]", "linear.seeds=[0,1]")  # fmt: skip
NAME = "suite-step_00000007"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", photos, SHALLOW)
    return tmp_path / "run"


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of class folders: stripes of four directions, and colours with a `test/`."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for split, count in (("train", 14), ("val", 9)):
        for label, (a, b) in enumerate(((1, 0), (0, 1), (1, 1), (1, -1))):
            for i in range(count):
                wave = np.sin(a * x + b * y + rng.uniform(0, 6)) * 60 + 120
                save(root / f"stripes/{split}/{label}/{i}.png", wave + rng.normal(0, 70, (20, 20)))
    for split, count in (("train", 11), ("test", 8)):
        for label in range(3):
            for i in range(count):
                save(
                    root / f"tones/{split}/{label}/{i}.png",
                    rng.normal(90 + 30 * label, 60, (20, 20)),
                )
    return root  # fmt: skip


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)


def launched(arguments: list[str]) -> int:
    return main(arguments)


def result(folder: Path, name: str = NAME) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / f"evaluate/{name}.json").read_text())
    return read


def test_the_same_numbers_on_one_and_two_processes(
    run: Path, sets: Path, tmp_path: Path, ranks: Ranks
) -> None:
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        words = ["suite", str(run), *QUICK, "linear.epochs=5", f"data.root={sets}"]
        words += [f"run.dir={folder}", "linear.lr=[0.1,3]"]  # a rate of 3 amplifies rounding errors
        assert ranks.launch(launched, size, words) == [0] * size
        found.append(result(folder))
    one, two = found
    assert list(one["data"]) == ["digits", "stripes", "tones"]
    assert two["data"] == one["data"]
    stripes = one["data"]["stripes"]
    assert (stripes["training_images"], stripes["test_images"]) == (56, 36)
    assert one["data"]["tones"]["test_images"] == 24
    for entry in one["data"].values():
        assert list(entry["measures"]) == ["linear", "k-NN", "10 a class", "1 a class"]
        for name, each in entry["measures"].items():
            low, high = each["interval_95"]
            assert low <= each["top1"] <= high
            assert len(each["top1_per_seed"]) == {"linear": 2, "k-NN": 1}.get(name, 5)
            assert suite.rights(each).mean(1) == pytest.approx(each["top1_per_seed"])
        assert entry["measures"]["k-NN"]["row"] == "k 20"
        assert entry["measures"]["1 a class"]["row"] == "lr 0.1"
    digits = one["data"]["digits"]["measures"]
    assert digits["k-NN"]["top1"] > 0.3
    table = (tmp_path / f"1/evaluate/{NAME}.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| stripes ")]
    assert suite.cell(stripes["measures"]["k-NN"]) in line


def test_what_is_measured_is_kept(
    run: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """An interrupted suite goes on, other images and another checkpoint are measured anew."""
    measured: list[str] = []
    evaluate = evaluation.evaluate

    def counted(each: evaluation.Evaluation) -> Any:
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(f"{each.data.name} {each.command}")
        return evaluate(each)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    words = ["suite", str(run), *QUICK, f"data.root={sets}", "data.name=tones,stripes"]
    stop_at = 3
    assert main(words) == 130
    assert list(result(run)["data"]["tones"]["measures"]) == ["linear", "k-NN", "10 a class"]
    stop_at = -1
    assert main(words) == 0
    assert len(measured) == 8
    first = result(run)
    # A root with one of the two sets: the other's result stays. More threads measure nothing anew.
    (tmp_path / "some").mkdir()
    (tmp_path / "some/tones").symlink_to(sets / "tones")
    assert main([*words[:-2], f"data.root={tmp_path / 'some'}", "data.name=tones",
                 "data.read_threads=3"]) == 0  # fmt: skip
    assert len(measured) == 8
    assert result(run)["data"] == first["data"]
    # Another image, another checkpoint.
    (tmp_path / "some/tones").unlink()
    for split in ("train", "test"):
        for path in (sets / "tones" / split).rglob("*.png"):
            if path.parent.name != "2":
                target = tmp_path / "some/tones" / path.relative_to(sets / "tones")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
    assert main([*words[:-2], f"data.root={tmp_path / 'some'}", "data.name=tones"]) == 0
    assert len(measured) == 12
    assert result(run)["data"]["tones"]["num_classes"] == 2
    assert result(run)["data"]["stripes"] == first["data"]["stripes"]
    assert main([*words[:1], f"{run}:best", *words[2:-1], "data.name=tones"]) == 0
    assert len(measured) == 16
    assert result(run, "suite-best")["step"] == 5


def test_one_run_against_another(run: Path, sets: Path, tmp_path: Path, capsys: Capture) -> None:
    rest = [*QUICK, f"data.root={sets}", "data.name=stripes"]
    other = f"run.dir={tmp_path / 'other'}"
    assert main(["suite", f"{run}:best", *rest, other]) == 0
    capsys.readouterr()
    words = ["suite", str(run), *rest, "--against"]
    assert main([*words, str(tmp_path / "other")]) == 0
    lines = capsys.readouterr().out.splitlines()
    now, then = (
        found["data"]["stripes"]["measures"]
        for found in (result(run), result(tmp_path / "other", "suite-best"))
    )
    for name in suite.MEASURES:
        a, b = now[name], then[name]
        (line,) = [line for line in lines if line.startswith(f"| stripes | {name} ")]
        cells = [part.strip() for part in line.split("|")]
        assert cells[3:6] == [suite.cell(a), suite.cell(b), suite.differing(a, b)]
        assert cells[5].startswith(f"{100 * (a['top1'] - b['top1']):+.2f} (")
    # Compared with itself: no difference, and an interval of zero.
    assert main([*words, str(run / f"evaluate/{NAME}.json")]) == 0
    assert capsys.readouterr().out.count("| +0.00 (0.00 to 0.00)") == 4
    # Other settings are refused; other images are named in the table.
    assert main([*words, str(tmp_path / "other"), "knn.k=5"]) == 2
    said = (
        "knn.k: [5], but " + f"{run}:best" + " was measured with [20]; the same value is accepted"
    )
    assert said in capsys.readouterr().err
    theirs = result(run)
    theirs["data"]["stripes"]["test_digest"] = "x"
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    assert main([*words, str(tmp_path / "theirs.json")]) == 0
    assert capsys.readouterr().out.count("| other images") == 4


def test_missing_and_damaged_data_sets_are_a_line_each(
    run: Path, sets: Path, tmp_path: Path, ranks: Ranks, capsys: Capture
) -> None:
    root = tmp_path / "root"
    (root / "cifar10").mkdir(parents=True)
    (root / "blood").mkdir()
    (root / "blood/bloodmnist.npz").write_bytes(b"PK no archive")
    (root / "stripes").symlink_to(sets / "stripes")
    for i in range(6):
        for split in ("train", "test"):
            path = root / f"torn/{split}/{i % 2}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image")
    names = "data.name=blood,cifar10,food101,torn,stripes"
    words = ["suite", str(run), *QUICK, f"data.root={root}", names]
    assert main(words) == 1
    captured = capsys.readouterr()
    found = result(run)
    assert found["left_out"].keys() == {"blood", "cifar10", "torn"}
    assert list(found["data"]["stripes"]["measures"]) == list(suite.MEASURES)
    lines = (captured.err + captured.out).splitlines()
    for name, why in (("blood", "bloodmnist.npz is incomplete"), ("cifar10", "has no cifar-10-"),
                      ("torn", "can be read")):  # fmt: skip
        said = [line for line in lines if f"{name} is left out: " in line]
        assert why in said[0]
        assert f"{name} is left out: {found['left_out'][name]}" in captured.out
    assert len([line for line in lines if line.endswith(f"not in data.root={root}: food101")]) == 1
    assert "Traceback" not in captured.err
    assert ranks.launch(launched, 2, [*words, f"run.dir={tmp_path / 'two'}"]) == [1, 1]
    assert result(tmp_path / "two")["data"] == found["data"]
    assert result(tmp_path / "two")["left_out"].keys() == found["left_out"].keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.root=/nowhere"], "data.root: /nowhere is no folder"),
        (["data.name=dtd"], "data.name: dtd not in data.root, which is unset; accepted: digits"),
        (["knn.k=[5,20]"], "knn.k: [5, 20]; the suite accepts one"),
        (["linear.held_out=0"], "linear.held_out: 0 chooses none"),
        (["linear.per_class=3"], "linear.per_class: the suite takes all labels"),
        (["finetune.lr=1"], "finetune.lr: not used by suite"),
        (["--against"], "--against: a run folder or a .json file"),
        (["--against", "RUN"], "has no evaluate/suite*.json; ddp-ssl evaluate suite"),
        (["--against=RUN/config.yaml"], "config.yaml is no result of the suite"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, run: Path, capsys: Capture) -> None:
    given = [word.replace("RUN", str(run)) for word in words]
    assert main(["suite", str(run), *QUICK, *given]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said in error


def test_another_command_compares_nothing(run: Path, capsys: Capture) -> None:
    assert main(["knn", str(run), "--against", str(run)]) == 2
    assert "--against: not used by knn" in capsys.readouterr().err


def test_the_settings_of_a_run_that_belong_to_its_own_images_are_not_the_suites(
    photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    make_run(tmp_path / "run", photos, "data.val_resize=40")  # and data.val_fraction=0.3
    assert main(["suite", str(tmp_path / "run"), "--print-config"]) == 0
    text = capsys.readouterr().out
    assert str(photos) not in text
    assert "val_resize: 40" not in text
    assert "val_fraction: 0.1" in text
    assert "mean: [0.485" in text  # as in pretraining


def accuracies(right: Any) -> list[Accuracy]:
    return [
        Accuracy(float(row.mean()), None, (), int(row.sum()), len(row)) for row in right
    ]  # fmt: skip


def test_the_interval_covers_seeds_and_images() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random((4, 200)) < rng.uniform(0.5, 0.9, (4, 1))).astype(np.uint8)
    found = accuracies(right)
    mean = right.mean()
    images, spread = over_images(found), over_seeds(found)
    assert spread is not None
    seeds = spread[1]
    both = over_both(found)
    assert both.low == pytest.approx(mean - np.hypot(mean - images.low, mean - seeds.low))
    assert both.high == pytest.approx(
        min(mean + np.hypot(images.high - mean, seeds.high - mean), 1)
    )
    assert over_both(found[:1]) == over_images(found[:1])


def test_a_difference_is_paired() -> None:
    """For one seed it is Student's paired interval; for several the splits' part comes on top."""
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    a, b = ((rng.random((3, 300)) * 0.4 + hard < bound).astype(np.uint8) for bound in (0.8, 0.7))
    mean, interval = difference(a[:1], b[:1])
    oracle = stats.ttest_rel(a[0].astype(float), b[0].astype(float)).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high))
    assert mean == pytest.approx(a[0].mean() - b[0].mean())
    _, wider = difference(a, b)
    parts = [
        stats.ttest_rel(a.mean(axis), b.mean(axis)).confidence_interval(0.95) for axis in (0, 1)
    ]
    half = np.hypot(*((part.high - part.low) / 2 for part in parts))
    assert (wider.high - wider.low) / 2 == pytest.approx(half)


def test_the_interval_of_a_difference_holds_it_in_95_percent() -> None:
    """Runs of equal quality on images of which some are hard for both."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        chance = rng.beta(1, 0.5, 150)
        a, b = ((rng.random((1, 150)) < chance).astype(np.uint8) for _ in range(2))
        _, interval = difference(a, b)
        held += interval.low <= 0 <= interval.high
    assert 0.92 < held / 400 < 0.98


def test_two_suites_at_once_lose_nothing(run: Path, sets: Path) -> None:
    """An array job may measure a data set in each task, all in one file."""
    words = ["suite", str(run), f"data.root={sets}", *QUICK, "linear.epochs=1"]
    both = []
    whole = suite.Suite._write

    def late(self: suite.Suite) -> None:
        if not both:  # the other one writes between this one's start and its first write
            both.append(self)
            assert main([*words, "data.name=tones"]) == 0
        whole(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.Suite, "_write", late)
        assert main([*words, "data.name=stripes"]) == 0
    data = result(run)["data"]
    assert set(data) == {"stripes", "tones"}
    assert all(len(found["measures"]) == len(suite.MEASURES) for found in data.values())

"""`python -m ddp_ssl.evaluate` as a user types it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ddp_ssl import embed, export
from ddp_ssl.config import Config, Data, reference_of
from ddp_ssl.data.datasets import registry
from ddp_ssl.evals.features import Extractor
from ddp_ssl.evals.settings import EvaluateConfig, load_settings
from ddp_ssl.evals.weights import find_source
from ddp_ssl.evaluate import main
from ddp_ssl.utils.launcher import rank_and_size
from tests.evals.runs import make_run
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
QUICK = ("run.device=cpu", "run.threads=1", "data.threads=1", "data.read_threads=2")
LINEAR = ("linear.epochs=3", "linear.lr=[0.1,1]", "linear.seeds=[0,1]", "linear.batch_size=16")
FINETUNE = ("finetune.epochs=2", "finetune.batch_size=12", "finetune.fraction=0.5")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", photos)
    return tmp_path / "run"


def result(folder: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / f"evaluate/{name}.json").read_text())
    return read


def test_a_linear_classifier_beside_the_run(run: Path, capsys: Capture) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["linear", str(run), *QUICK, *LINEAR, "run.cache_mb=0"]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    out = capsys.readouterr().out
    found = result(run, "linear_sgd-folder-step_00000007")
    assert [row["lr"] for row in found["rows"]] == ["0.1", "1"]
    assert found["step"] == 7
    assert found["data"]["training_images"] == 34
    held = [row["held out"] for row in found["rows"]]
    assert held[found["chosen"]] == max(held)
    chosen = found["rows"][found["chosen"]]
    assert chosen["top1"] == pytest.approx(np.mean(chosen["top1_per_seed"]))
    assert chosen["top1"] > 0.3  # of four classes that differ in brightness
    assert chosen["top5"] is None
    assert f"{chosen['lr']} *" in out
    assert f"{100 * chosen['top1']:.2f}" in out
    text = (run / "evaluate/linear_sgd-folder-step_00000007.md").read_text()
    for i, accuracy in enumerate(chosen["per_class"]):
        assert any(
            line.split() == ["|", f"class{i}", "|", f"{100 * accuracy:.2f}", "|"]
            for line in text.splitlines()
        )
    # The same again replaces it, from features kept on disk; another setting does not.
    assert main(["linear", str(run), *QUICK, *LINEAR, "run.cache_mb=0"]) == 0
    assert result(run, "linear_sgd-folder-step_00000007")["rows"] == found["rows"]
    assert main(["linear", str(run), *QUICK, *LINEAR, "linear.held_out=0"]) == 0
    unchosen = result(run, "linear_sgd-folder-step_00000007-2")
    assert unchosen["chosen"] is None
    assert "no learning rate is chosen" in capsys.readouterr().out
    assert [r["top1"] for r in unchosen["rows"]] == [r["top1"] for r in found["rows"]]


def test_augmented_training_through_the_frozen_backbone(run: Path) -> None:
    settings = ("linear.augment=true", "linear.epochs=2", "linear.lr=[0.3,1]", "linear.seeds=0")
    assert main(["linear", f"{run}:best", *QUICK, *settings, "run.cache_mb=0"]) == 0
    found = result(run, "linear_sgd-folder-best")
    assert found["step"] == 5
    assert found["rows"][0]["over_seeds"] is None
    assert found["chosen"] is not None
    assert any("chosen among the run's by" in note for note in found["notes"])
    kept = list((run / "evaluate/features").iterdir())
    assert len(kept) == 2  # of the test and the held-out images, none of those trained on


def spoiled(photos: Path, folder: Path) -> Path:
    """A copy of the photos in which two training files are no images."""
    shutil.copytree(photos, folder)
    config = Data(name="folder", root=str(folder), val_fraction=0.3)
    train = registry.load(config, 0).train
    for i in (3, 5):
        Path(train.where(i)).write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("finetune", FINETUNE[:2]),
        ("linear", ("linear.augment=true", "linear.epochs=1", "linear.lr=1", "linear.seeds=0")),
    ],
)
def test_training_images_that_cannot_be_read_are_said(
    command: str,
    settings: tuple[str, ...],
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    arguments = [command, str(run), *QUICK, *settings]
    arguments.append(f"data.root={spoiled(photos, tmp_path / 'spoiled')}")
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data.max_bad_fraction: 2 of 48 images cannot be read, more than 0.01" in error
    assert main([*arguments, "data.max_bad_fraction=0.1", "run.name=x"]) == 0
    found = result(run, "x")
    assert len(found["unreadable"]) == 2
    assert "2 images cannot be read and are left out" in found["notes"]


def test_another_batch_than_asked_for_is_reported(run: Path, ranks: Ranks) -> None:
    settings = ("linear.augment=true", "linear.epochs=1", "linear.lr=1", "linear.seeds=0")
    arguments = ["linear", str(run), *QUICK, *settings, "linear.batch_size=16"]
    assert ranks.launch(launched, 3, arguments) == [0] * 3
    found = result(run, "linear_sgd-folder-step_00000007")
    assert found["batch_size"] == 15
    assert any(note.startswith("batch of 15 images instead of 16") for note in found["notes"])
    assert "batch 15," in (run / "evaluate/linear_sgd-folder-step_00000007.md").read_text()


def fails_on_rank_1(arguments: list[str]) -> tuple[Any, list[str]]:
    """The exit code and the logged errors."""

    def fail(*_: Any) -> None:
        raise KeyError("only here")

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            logging.getLogger("ddp_ssl"), "error", lambda *a, **_: said.append(a[0] % a[1:])
        )
        if rank_and_size()[0] == 1:
            patch.setattr(Extractor, "embed", fail)
        with pytest.raises(SystemExit) as end:
            main(arguments)
    return end.value.code, said


def test_a_failure_on_one_process_ends_it_at_once(run: Path, ranks: Ranks) -> None:
    """The other one waits for it in a collective, which may take `run.timeout_s`."""
    start = time.perf_counter()
    arguments = ["knn", str(run), *QUICK, "run.timeout_s=600"]
    (first, other), (second, own) = ranks.launch(fails_on_rank_1, 2, arguments)
    assert time.perf_counter() - start < 60
    assert first == second == 1
    assert own == ["KeyError: 'only here'"]
    assert other[0].startswith("another process failed or left: ")


def launched(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.parametrize(
    ("command", "name", "settings"),
    [
        ("knn", "knn", ("knn.k=[1,5]",)),
        ("linear", "linear_adam", ("linear.protocol=adam", "linear.patches=3", "linear.epochs=4")),
        ("linear", "linear_sgd", ("linear.per_class=2", "linear.epochs=4", "linear.lr=[0.1,1]")),
    ],
)
def test_three_processes_report_what_one_reports(
    run: Path, ranks: Ranks, tmp_path: Path, command: str, name: str, settings: tuple[str, ...]
) -> None:
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        arguments = [command, str(run), *QUICK, *settings, f"run.dir={folder}"]
        assert ranks.launch(launched, size, arguments) == [0] * size
        found.append(result(folder, f"{name}-folder-step_00000007"))
    one, three = found
    assert three["processes"] == 3
    assert three["rows"] == one["rows"]
    assert three["notes"] == one["notes"]


def test_fine_tuning_under_two_processes(run: Path, ranks: Ranks, capsys: Capture) -> None:
    arguments = ["finetune", str(run), *QUICK, *FINETUNE, "finetune.seeds=[0,1]"]
    assert ranks.launch(launched, 2, arguments) == [0, 0]
    found = result(run, "finetune-folder-step_00000007")
    whole, *seeds = found["rows"]
    assert whole["top1"] == pytest.approx(np.mean([row["top1"] for row in seeds]))
    assert whole["over_seeds"]["sd"] >= 0
    assert [row["images"] for row in seeds] == [16, 16]


def test_foreign_weights_need_no_method(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet18().state_dict(), "theirs.pth")
    data = ("data.name=folder", f"data.root={photos}", "data.val_size=32", "data.val_fraction=0.3")
    model = "model.backbone=resnet18"
    assert main(["knn", "theirs.pth", model, *data, *QUICK, "knn.k=3"]) == 0
    found = result(tmp_path / "runs/evaluate-theirs", "knn-folder-theirs")
    assert found["weights"].startswith("resnet18 from theirs.pth: 120 tensors")
    assert found["data"]["mean"] == [0.485, 0.456, 0.406]
    Path("config.yaml").write_text("model: {depth: 18}\n")  # of other code: this is no run
    assert main(["knn", "theirs.pth", model, *data, *QUICK, "knn.k=3"]) == 0
    assert main(["knn", "timm:resnet18", *data, *QUICK, "run.dir=there", "run.name=mine"]) == 0
    assert "random weights of seed 0" in result(tmp_path / "there", "mine")["weights"]


def test_another_data_set_with_the_runs_normalisation(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    """Digits in place of photos: root and split are the new data set's, pixels look as before."""
    assert main(["knn", str(run), "data.name=digits", "knn.k=5", *QUICK]) == 0
    found = result(run, "knn-digits-step_00000007")
    assert found["data"]["mean"] == [0.485, 0.456, 0.406]  # not the digits' own
    assert len(found["data"]["classes"]) == 10
    assert found["rows"][0]["top5"] > found["rows"][0]["top1"]
    own = load_settings(find_source(str(run)), ["data.mean=[0,0,0]"])[0]
    assert own.data.mean == (0, 0, 0)
    assert own.data.root == str(photos)


def test_a_strangers_run_executes_no_code_without_consent(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run, executed = tmp_path / "run", tmp_path / "executed"
    make_run(run, photos, "method.name=tests.outside:Outside")
    (tmp_path / "stranger.py").write_text(
        f"open({str(executed)!r}, 'w').close()\nfrom tests.outside import Outside\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("tests.outside:Outside", "stranger:Outside"))
    commands = [
        (main, ["knn", str(run), *QUICK]),
        (main, ["dynamics", str(run), *QUICK]),
        (embed.main, [str(run), "--out", str(tmp_path / "x.npz"), *QUICK]),
        (export.main, [str(run), "--format", "timm"]),
    ]
    for command, words in commands:
        for more in ([], ["method.name=other:Outside"]):
            assert command([*words, *more]) == 2
            said = capsys.readouterr().err
            assert "stranger:Outside would be imported from outside this package; if you" in said
            assert said.count("\n") == 1
    assert not executed.exists()
    assert "stranger" not in sys.modules
    named = "method.name=stranger:Outside"
    for (command, words), consent in zip(commands[:3], ["--trust", named, named], strict=True):
        assert command([*words, consent]) == 0
    assert export.load_trained(str(run), "stranger:Outside").width
    assert executed.exists()


def test_a_yaml_below_the_command_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linear.yaml").write_text("linear: {protocol: adam, epochs: 7, lr: 1e-2}\n")
    arguments = [str(tmp_path / "linear.yaml"), "linear.epochs=9"]
    settings, origins = load_settings(find_source(str(run)), arguments)
    assert (settings.linear.protocol, settings.linear.epochs) == ("adam", 9)
    assert settings.linear.lr == [0.01]
    assert origins["linear.epochs"] == "command line"
    assert origins["data.name"] == f"{run}/config.yaml"


def without_labels(run: Path, tmp: Path) -> list[str]:
    (tmp / "flat").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp / "flat" / f"{i}.png")
    return ["knn", str(run), f"data.root={tmp / 'flat'}"]


def no_weights(run: Path, tmp: Path) -> list[str]:
    (tmp / "text.pt").write_text("no weights")
    return ["knn", str(tmp / "text.pt"), "model.backbone=resnet18", "data.name=digits"]


def vit_at_50(run: Path, tmp: Path) -> list[str]:
    photos = load_settings(find_source(str(run)), [])[0].data.root
    make_run(
        tmp / "vit", Path(str(photos)), "model.backbone=vit_tiny_patch16_224",
        "model.backbone_args={img_size: 32, depth: 1}", "data.views=[{size: 32}]",
    )  # fmt: skip
    return ["knn", str(tmp / "vit"), "data.val_size=50"]


def other_weights(run: Path, tmp: Path) -> list[str]:
    torch.save({"a": torch.ones(3)}, tmp / "other.pt")
    return ["knn", str(tmp / "other.pt"), "model.backbone=resnet18", "data.name=digits"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda run, tmp: [], "one of linear, knn, finetune, dynamics"),
        (lambda run, tmp: ["lineal", str(run)], "lineal: unknown command; accepted: linear"),
        (lambda run, tmp: ["knn"], "knn: the weights are missing"),
        (lambda run, tmp: ["knn", "data.name=digits"], "knn: the weights are missing"),
        (lambda run, tmp: ["knn", "nowhere"], "nowhere does not exist; a run folder, RUN:best"),
        (lambda run, tmp: ["knn", str(tmp)], "no run folder (config.yaml is not there)"),
        (lambda run, tmp: ["knn", f"{run}/config.yaml"], "the weights come first"),
        (lambda run, tmp: ["knn", str(run), "knn.kk=3"], "knn.kk: unknown key; did you mean knn.k"),
        (lambda run, tmp: ["knn", str(run), "knn.k=0"], "knn.k.0: input should be greater"),
        (lambda run, tmp: ["knn", str(run), "k=3"], "did you mean knn.k?"),
        (lambda run, tmp: ["knn", str(run), "methd.name=x"], "methd: unknown section"),
        (lambda run, tmp: ["knn", str(run), "linear.lr=1"], "linear.lr: not used by knn"),
        (lambda run, tmp: ["knn", str(run), "eval.knn_k=1"], "eval.knn_k: not used by knn"),
        (lambda run, tmp: ["linear", str(run), "linear.lr=fast"], "linear.lr.0: input should be"),
        (lambda run, tmp: ["linear", str(run), "data.batch_size=9"], "linear.batch_size"),
        (lambda run, tmp: ["knn", str(run), "model.backbone=resnet50"], "says what its model is"),
        (lambda run, tmp: ["knn", f"{run}/metrics.jsonl"], "is no file of weights"),
        (
            lambda run, tmp: ["knn", f"{run}/checkpoints/best.json"],
            "cannot be loaded as a checkpoint",
        ),
        (lambda run, tmp: ["knn", str(run), "data.name=cifar10"], "data.root: unset"),
        (lambda run, tmp: ["knn", str(run), "data.root=/nowhere"], "/nowhere does not exist"),
        (lambda run, tmp: ["knn", "timm:resnt18", "data.name=digits"], "did you mean resnet18?"),
        (lambda run, tmp: ["dynamics", "timm:resnet18"], "dynamics: timm:resnet18 is no run"),
        (lambda run, tmp: ["knn", str(run), "run.dir=/proc/x"], "/proc/x"),
        (lambda run, tmp: ["dynamics", str(run), "run.dir=/proc/x"], "/proc/x"),
        (lambda run, tmp: ["dynamics", str(run), "run.seed=1"], "run.seed: not used by dynamics"),
        (
            lambda run, tmp: ["dynamics", str(run), "model.channels_last=false"],
            "model.channels_last: not used by dynamics",
        ),
        (
            lambda run, tmp: ["linear", str(run), "linear.per_class=2", "linear.augment=true"],
            "linear.per_class: not with linear.augment=true",
        ),
        (without_labels, "has no training image with a label"),
        (no_weights, "text.pt is no file of weights"),
        (vit_at_50, "data.val_size: the run's vit_tiny_patch16_224 cannot take images of 50"),
        (other_weights, "holds no complete resnet18: of 100 tensors 100 missing"),
        (lambda run, tmp: no_weights(run, tmp)[:2], "model.backbone: needed for"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: Callable[[Path, Path], list[str]],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    given = arguments(run, tmp_path)
    assert main([*given, *(QUICK if len(given) > 1 else ())]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in captured.err


def test_help_shows_what_a_command_reads(capsys: Capture) -> None:
    assert main(["linear", "--help"]) == 0
    text = capsys.readouterr().out
    assert "linear.protocol  (sgd | adam, default sgd)" in text
    assert "knn.k " not in text
    assert "data.batch_size" not in text
    assert main(["--help"]) == 0
    assert "finetune.fraction" in capsys.readouterr().out


def test_print_config_says_where_values_come_from(run: Path, capsys: Capture) -> None:
    assert main(["knn", str(run), "knn.k=[3]", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  k: [3]") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("  root:") and "config.yaml" in line for line in lines)


def test_the_documents_keys_exist() -> None:
    keys = {row[0] for tree in (EvaluateConfig, Config) for row in reference_of(tree)}
    for word in (
        (ROOT / "docs/evaluation.md").read_text().translate(str.maketrans("`'()", " " * 4)).split()
    ):
        head = word.partition("=")[0]
        if "=" in word and "." in head and not head.startswith(("-", "torch", "model.load")):
            assert head in keys, word

"""The commands as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ddp_ssl.driver import find_driver, install_command
from tests.runs import BIN, call

ROOT = Path(__file__).parent.parent


def test_help_shows_every_key_of_the_chosen_method() -> None:
    done = call(str(BIN / "ddp-ssl"), "train", "--help", "method.name=vicreg")
    assert done.returncode == 0
    for text in ("usage: torchrun", "optim.lr  (float, default 0.4)", "data.views", "method.route"):
        assert text in done.stdout
    assert "method.alpha_every" not in done.stdout


def test_print_config_says_where_values_come_from() -> None:
    module = (sys.executable, "-m", "ddp_ssl.train")
    done = call(*module, "configs/imagenet100/simclr.yaml", "optim.lr=0.5", "--print-config")
    assert done.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines() if "#" in line}
    assert lines["lr"].endswith("# command line")
    assert lines["epochs"].endswith("# configs/imagenet100/simclr.yaml")
    assert lines["momentum"].endswith("# default")


def test_the_console_script() -> None:
    assert call(str(BIN / "ddp-ssl"), "--version").stdout.startswith("ddp_ssl ")
    assert "train" in call(str(BIN / "ddp-ssl")).stdout
    wrong = call(str(BIN / "ddp-ssl"), "trian")
    assert wrong.returncode == 2
    assert wrong.stderr == ("ddp_ssl: error: unknown command 'trian'; did you mean train?\n")


def test_missing_dali_is_one_line_that_names_the_extra(photos: Path, tmp_path: Path) -> None:
    """A package directory without DALI comes before the installed one on the path."""
    blocker = tmp_path / "nvidia"
    blocker.mkdir()
    (blocker / "__init__.py").write_text("")
    done = call(
        sys.executable, "-m", "ddp_ssl.train", "data.name=folder", f"data.root={photos}",
        f"run.dir={tmp_path / 'run'}", "run.device=cpu", "data.batch_size=12",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "nvidia-dali is not installed" in line
    assert install_command(find_driver()) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.faults
def test_eight_processes_on_any_machine(tmp_path: Path) -> None:
    """The README's command, on the embedded default cut short."""
    done = call(
        str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "8", "-m", "ddp_ssl.train",
        "optim.epochs=1", "method.alpha_every=1", "method.alpha_batches=1", "eval.raw_pixels=false",
        "run.device=cpu", "data.batch_size=1024",
        cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-adadim-resnet18-")
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 8
    assert "8 process(es) on cpu" in (folder / "train.log").read_text()
    assert "alpha 0." in done.stderr + done.stdout


def test_a_typo_under_torchrun_is_said_once() -> None:
    done = call(
        str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "ddp_ssl.train",
        "optim.epoch=1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("ddp_ssl: error:")]
    assert lines == ["ddp_ssl: error: optim.epoch: unknown key; did you mean optim.epochs?"]


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_documents_commands_exist(name: str) -> None:
    """Config files named in the documents are in the tree, and their keys in the schema."""
    from ddp_ssl.config import reference
    from ddp_ssl.methods.adadim import AdaDimConfig

    text = (ROOT / name).read_text()
    words = text.replace("`", " ").replace("(", " ").replace(")", " ").split()
    keys = {row[0] for row in reference(AdaDimConfig)}
    for word in words:
        if word.startswith("configs/") and word.endswith(".yaml"):
            assert (ROOT / word).exists(), word
        head = word.partition("=")[0]
        if "=" in word and "." in head and not head.startswith("-"):
            assert head in keys, word

"""Whole runs: resumed to the last bit, stopped on request, refused, never saved when not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError, check_folder
from ddp_ssl.resume import arguments_of
from ddp_ssl.run.configure import load
from ddp_ssl.utils.launcher import resume_command
from tests.faults.launched import torchrun, until
from tests.helpers import graphs_run_one_by_one
from tests.ranks import Ranks
from tests.runs import (
    BARE,
    BIN,
    ROOT,
    STEPS_ONLY,
    Whole,
    arguments,
    assert_same_bits,
    complaint,
    restarted,
    rows,
    status,
    train,
)

COSTS = ("perf/log_ms", "perf/probe_ms", "perf/alpha_s", "perf/save_ms")


SIZES = (1, 3, 4)


def test_a_run_leaves_everything_in_its_folder(whole: Whole) -> None:
    for size in SIZES:
        folder = whole(size)
        names = {p.name for p in folder.iterdir()}
        assert names >= {
            "config.yaml", "environment.json", "status.json", "metrics.jsonl", "train.log",
            "checkpoints", "views.png", "result.md", "backbone.pt",
        }  # fmt: skip
        assert status(folder)["state"] == "done"
        assert json.loads((folder / "environment.json").read_text())["world_size"] == size
        table = rows(folder)
        assert all({"step", "epoch"} <= row.keys() for row in table)
        losses = [row["step"] for row in table if "train/loss" in row]
        assert losses == list(range(1, 10))
        knn = {row["step"]: row["eval/knn_bank"] for row in table if "eval/knn_top1" in row}
        assert knn == dict.fromkeys((0, 3, 6, 9), 43)
        names = set().union(*table)
        assert names >= {
            "train/nce", "train/vicreg_invariance", "train/vicreg_variance", "optim/lr",
            "train/vicreg_covariance", "rep/effective_rank_z_train", "rep/effective_rank_r",
            "rep/effective_rank_z", "rep/alpha", "rep/beta", "rep/mutual_information",
            "rep/embedding_std", "eval/probe_top1", "optim/grad_norm",
        }  # fmt: skip
        # The run's own additions cost time: logging, the probe, alpha, checkpoints.
        timed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        costs = {n: [(r["step"], r[n]) for r in timed if n in r] for n in COSTS}
        assert {step for step, _ in costs["perf/probe_ms"]} == {2, 4, 6, 8, 9}
        assert [step for step, _ in costs["perf/alpha_s"]] == [3, 6, 9]
        assert {step for step, _ in costs["perf/save_ms"]} >= {3, 4}
        assert all(value > 0 for found in costs.values() for _, value in found)
        alphas = [row["rep/alpha"] for row in table if "train/loss" in row]
        assert alphas[:3] == [0, 0, 0]
        assert 0 < alphas[3] < 1
        assert alphas[3] != alphas[6]


def test_the_exported_backbone_loads_as_the_result_says(whole: Whole) -> None:
    snippet = (whole(1) / "result.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert scope["model"].eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_world_sizes_see_the_same_images(whole: Whole) -> None:
    """Numbers differ, since augmentations are drawn per rank; the first ones are equal."""
    first = [next(r for r in rows(f) if "eval/knn_top1" in r) for f in map(whole, SIZES)]
    assert first[0]["eval/knn_top1"] == first[1]["eval/knn_top1"]
    assert first[0]["rep/effective_rank_z"] == pytest.approx(first[1]["rep/effective_rank_z"])


@pytest.mark.parametrize(
    ("size", "step"),
    [
        (1, 5), (1, 1), (3, 3), (4, 5),
        pytest.param(3, 5, marks=pytest.mark.faults), pytest.param(4, 8, marks=pytest.mark.faults),
    ],
)  # fmt: skip
def test_resume_is_exact_to_the_last_bit(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path, size: int, step: int
) -> None:
    """Killed before `step` (mid-epoch after a checkpoint, at an epoch's start, before any)."""
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, size, args, step) == ["killed"] * size
    assert status(tmp_path / "run")["state"] == "failed"
    assert ranks.launch(train, size, [*args, "run.resume=auto"]) == [0] * size
    assert rows(tmp_path / "run") == rows(whole(size))
    ours, theirs = (
        torch.load(store.find(f)[0].path, weights_only=True)["model"]
        for f in (tmp_path / "run", whole(size))
    )
    assert_same_bits(ours, theirs)


def test_a_restart_by_the_launcher_resumes(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 1, args, 7) == ["killed"]
    assert ranks.launch(restarted, 1, args) == [0]
    assert rows(tmp_path / "run") == rows(whole(1))


def test_another_world_size_keeps_the_order_and_warns(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 1, args, 5) == ["killed"]
    assert ranks.launch(train, 3, [*args, "run.resume=auto"]) == [0] * 3
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("the order of the images continues exactly at step 4") == 1
    assert [r["step"] for r in rows(tmp_path / "run") if "train/loss" in r] == list(range(1, 10))


def test_the_best_checkpoint_is_the_best_evaluated_one(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    """Also across a restart, and never one of the checkpoints between evaluations."""

    def best(folder: Path) -> tuple[int, Any]:
        saved = json.loads((folder / "checkpoints/best.json").read_text())["step"]
        knn = {r["step"]: r["eval/knn_top1"] for r in rows(folder) if "eval/knn_top1" in r}
        del knn[0]
        return saved, min(step for step, value in knn.items() if value == max(knn.values()))

    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 1, args, 8) == ["killed"]
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    for folder in (tmp_path / "run", whole(1), whole(3)):
        saved, expected = best(folder)
        assert saved == expected


def test_other_images_are_another_experiment(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    args = arguments(copy, tmp_path / "run")
    assert ranks.launch(train, 1, args, 5) == ["killed"]
    moved = [a.replace("/photos", "/moved") for a in args]
    shutil.move(copy, tmp_path / "moved")
    next((tmp_path / "moved/class1").iterdir()).unlink()
    ((code, text),) = ranks.launch(complaint, 1, [*moved, "run.resume=auto"])
    assert code == 2
    assert "train images: " in text


def test_nothing_good_left_is_said_and_nothing_is_cut(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 1, args, 5) == ["killed"]
    before = (tmp_path / "run/metrics.jsonl").read_text()
    for found in store.find(tmp_path / "run"):
        found.path.write_bytes(b"")
    ((code, text),) = ranks.launch(complaint, 1, [*args, "run.resume=auto"])
    assert code == 2
    assert "no good checkpoint in" in text
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_restart_of_a_run_that_continued_from_elsewhere(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    """The launcher repeats `run.resume=PATH`; the run's own checkpoints are newer."""
    assert ranks.launch(train, 1, arguments(photos, tmp_path / "first"), 5) == ["killed"]
    args = arguments(photos, tmp_path / "run", f"run.resume={tmp_path / 'first'}")
    assert ranks.launch(train, 1, args, 7) == ["killed"]
    assert ranks.launch(restarted, 1, args) == [0]
    losses = [r for r in rows(tmp_path / "run") if "train/loss" in r]
    assert losses == [r for r in rows(whole(1)) if "train/loss" in r][4:]


def test_one_failing_rank_ends_the_others(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """Rank 1 sees other files than rank 0: said once, by name, and nobody waits."""
    results = ranks.launch(other_files, 3, arguments(photos, tmp_path / "run"), str(tmp_path))
    assert [code for code, _ in results] == [2, 2, 2]
    assert "rank 1 sees other files than rank 0 does [rank 1]" in results[0][1]
    assert results[1][1] == results[2][1] == ""


def other_files(args: list[str], place: str) -> tuple[int | str, str]:
    if os.environ["RANK"] == "1":
        root = next(a for a in args if a.startswith("data.root=")).partition("=")[2]
        other = Path(place) / "other"
        shutil.copytree(root, other)
        next((other / "class0").iterdir()).unlink()
        args = [a for a in args if not a.startswith("data.root=")] + [f"data.root={other}"]
    return complaint(args)


def test_a_damaged_checkpoint_falls_back_to_the_older_one(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 1, args, 5) == ["killed"]
    newest = store.find(tmp_path / "run")[0].path
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    assert newest.name in (tmp_path / "run/train.log").read_text()
    assert rows(tmp_path / "run") == rows(whole(1))


def test_a_nan_stops_all_ranks_and_is_never_saved(
    ranks: Ranks, photos: Path, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train, 3, args, None, 4) == [1, 1, 1]
    state = status(tmp_path / "run")
    assert state["state"] == "failed"
    assert "nan at step 5 (epoch 2)" in state["error"]
    for found in store.find(tmp_path / "run"):
        assert found.step < 5
        model = torch.load(found.path, weights_only=True)["model"]
        assert all(torch.isfinite(v).all() for v in model.values() if torch.is_tensor(v))


def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run")
    assert ranks.launch(train_and_stop, 3, args) == [0] * 3
    assert status(tmp_path / "run")["state"] == "preempted"
    assert 0 < status(tmp_path / "run")["step"] < 9
    assert ranks.launch(go_on, 3, [str(tmp_path / "run")]) == [0] * 3
    assert not (tmp_path / "run/STOP").exists()
    assert rows(tmp_path / "run") == rows(whole(3))


def go_on(args: list[str]) -> int:
    from ddp_ssl.resume import main

    return main(args)


def test_a_run_goes_on_with_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths are meant from where it was started; its weights are its own."""
    folder = tmp_path / "seed=0"
    folder.mkdir()
    resolved = load(
        ["run.init_from=other", "data.files=/a.csv", "optim.lr=0.7", "data.name=digits"]
    )
    (folder / "config.yaml").write_text(resolved.to_yaml())
    environment = folder / "environment.json"
    environment.write_text(json.dumps({"cwd": "/started/here"}))
    tree = (folder / "config.yaml").read_text().replace("root: null", "root: images/all")
    (folder / "config.yaml").write_text(tree)
    monkeypatch.chdir(tmp_path)
    config = load(arguments_of(["seed=0", "eval.every=3"])).config
    assert config.data.root == "/started/here/images/all"
    assert (config.data.files, config.run.init_from) == ("/a.csv", None)
    assert (config.run.dir, config.run.resume, config.eval.every) == ("seed=0", "auto", 3)
    assert config.optim.lr == 0.7
    environment.write_text(json.dumps({"cwd": str(tmp_path)}))
    assert load(arguments_of(["seed=0"])).config.data.root == "images/all"
    environment.unlink()
    assert load(arguments_of(["seed=0"])).config.data.root == "images/all"
    for words, said in {
        (): "resume: one folder of a run is expected, got 0",
        ("nowhere",): "resume: nowhere is not a folder",
        (".",): "resume: . has no config.yaml",
        ("seed=0", "run.resume=never"): "run.resume=never: ddp-ssl resume goes on in seed=0",
    }.items():
        with pytest.raises(ConfigError, match=said):
            arguments_of(words)


def test_auto_needs_a_folder_or_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["run.resume=auto"]).config
    with pytest.raises(ConfigError, match=r"^run\.resume: auto needs run\.dir, since no"):
        check_folder(config)
    check_folder(load(["run.resume=auto", "run.dir=x"]).config)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    check_folder(config)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    with pytest.raises(ConfigError):
        check_folder(config)  # one node: a start has the agent's name, not the job's
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    check_folder(config)


def test_a_strangers_folder_executes_no_code_without_consent(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: {name: 'stranger:Method'}\n")
    for words in ([], ["method.name=other:Method"]):
        with pytest.raises(ConfigError, match="stranger:Method would be imported from outside"):
            arguments_of([str(tmp_path), *words])
    for words in (["--trust"], ["method.name=stranger:Method"]):
        assert "method.name=stranger:Method" in arguments_of([str(tmp_path), *words, "optim.lr=1"])
        assert "--trust" not in arguments_of([str(tmp_path), *words])


def test_the_command_that_goes_on_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """`faults/test_kills.py` runs what is printed."""
    monkeypatch.setenv("PATH", str(BIN))
    assert resume_command("a run") == "python -m ddp_ssl.resume 'a run'"
    monkeypatch.setattr(sys, "argv", [str(BIN / "ddp-ssl"), "train"])
    assert resume_command("run") == "ddp-ssl resume run"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    expected = "torchrun --standalone --nproc_per_node 4 -m ddp_ssl.resume run"
    assert resume_command("run") == expected
    monkeypatch.setenv("PATH", "")
    start = f"{sys.executable} -m torch.distributed.run --standalone"
    assert resume_command("run").startswith(start)
    monkeypatch.setenv("PATH", str(BIN))
    for name, value in {
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
    }.items():
        monkeypatch.setenv(name, value)
    assert resume_command("run") == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint n1:29400 --nproc_per_node 2 "
        "-m ddp_ssl.resume run"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    script = ROOT / "slurm/resume.sh"
    assert resume_command("run") == f"sbatch --nodes=2 --gpus-per-node=8 {script} run"


def train_and_stop(args: list[str]) -> int | str:
    """SIGTERM to rank 2 alone, in the middle."""
    return train(args, stop_at=3 if os.environ["RANK"] == "2" else None)


def test_a_used_folder_and_another_experiment_are_refused(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, whole(1))
    again = [*args, "run.resume=auto"]
    vit = "model.backbone=vit_tiny_patch16_224"
    fresh = f"run.dir={tmp_path / 'fresh'}"
    for more, texts in {
        (): ["is not empty", "run.resume=auto continues it"],
        ("run.resume=auto", "optim.lr=0.5", "method.beta=off"): [
            "optim.lr: 1.0 in the checkpoint, 0.5 now",
            "method.beta: adaptive in the checkpoint",
        ],
        ("run.resume=nowhere",): ["run.resume: nowhere"],
        (fresh, "data.root=nowhere"): ["data.root: ", "nowhere does not exist"],
        (fresh, "data.batch_size=60"): ["data.batch_size: "],
        (fresh, "model.backbone=resnet81"): ["model.backbone: timm has no model", "resnet18?"],
        (fresh, vit, "model.stem=small", "model.backbone_args={img_size: 16}"): [
            "model.stem: small is for"
        ],
        (fresh, "model.backbone=beit_base_patch16_224", "model.backbone_args={depth: 1}"): [
            "cannot take images of 16 pixels",
            "; model.backbone_args={img_size: 16} makes it for this size alone",
        ],
        (fresh, f"run.init_from={whole(1)}", "model.projector=[9]"): ["does not fit this model"],
        (fresh, f"run.init_from={whole(1)}/backbone.pt"): [
            "run.init_from: ",
            "is no checkpoint of a run",
            "backbone.pt is the backbone alone",
        ],
        (fresh, f"run.init_from={photos}/class0/00.jpg"): ["run.init_from: ", "cannot be loaded"],
    }.items():
        (code, first), (other_code, other) = ranks.launch(complaint, 2, [*args, *more])
        assert code == other_code == 2
        assert first.startswith("ddp_ssl: error: ")
        assert first.count("\n") == 1
        assert other == ""  # said once, whatever the number of ranks
        assert all(text in first for text in texts), first
    assert not (tmp_path / "fresh").exists()  # nothing started
    assert rows(whole(1))  # and nothing was lost
    assert ranks.launch(train, 1, again) == [0]  # a finished run has nothing left to do


def test_weights_alone_start_a_new_run(
    ranks: Ranks, photos: Path, whole: Whole, tmp_path: Path
) -> None:
    args = arguments(photos, tmp_path / "run", f"run.init_from={whole(3)}", "optim.epochs=1")
    assert ranks.launch(train, 1, args) == [0]
    before = [r for r in rows(whole(3)) if "rep/effective_rank_r" in r][-1]
    after = rows(tmp_path / "run")
    start = next(r for r in after if "rep/effective_rank_r" in r)
    assert start["step"] == 0
    assert start["rep/effective_rank_r"] == pytest.approx(before["rep/effective_rank_r"])
    assert [r["rep/alpha"] for r in after if "train/loss" in r] == [0, 0, 0]


def test_an_unlabelled_folder_trains_without_a_probe(
    ranks: Ranks, tmp_path: Path, photos: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        (flat / path.name).write_bytes(path.read_bytes())
    args = arguments(flat, tmp_path / "run", "optim.epochs=1")
    assert ranks.launch(train, 1, args) == [0]
    names = set().union(*rows(tmp_path / "run"))
    assert not {n for n in names if "probe" in n or "knn" in n}
    assert "rep/effective_rank_z" in names


@pytest.mark.parametrize("method", ["simclr", "vicreg", "tests.outside:Outside"])
def test_other_methods_run(ranks: Ranks, photos: Path, tmp_path: Path, method: str) -> None:
    args = [a for a in arguments(photos, tmp_path / "run") if not a.startswith("method.")]
    assert ranks.launch(train, 2, [*args, f"method.name={method}", "optim.epochs=1"]) == [0, 0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])  # muon is AdamW too
def test_other_optimisers_resume(
    ranks: Ranks, photos: Path, tmp_path: Path, optimizer: str
) -> None:
    more = (f"optim.name={optimizer}", "optim.lr=0.01", "optim.epochs=2", "optim.grad_clip=1")
    args = arguments(photos, tmp_path / "run", *more, *BARE)
    assert ranks.launch(train, 1, [a.replace("/run", "/whole") for a in args]) == [0]
    assert ranks.launch(train, 1, args, 4) == ["killed"]
    assert ranks.launch(train, 1, [*args, "run.resume=auto"]) == [0]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def compiled_train(args: list[str], die_at: int | None = None) -> int | str:
    with graphs_run_one_by_one():
        return train([*args, "model.compile=true"], die_at)


def test_a_compiled_run_resumes_to_the_last_bit(ranks: Ranks, photos: Path, tmp_path: Path) -> None:
    """A graph rounds otherwise than the network itself, so a resumed run must compile too."""
    args = arguments(photos, tmp_path / "run", "optim.lr=0.5", "optim.epochs=2", *BARE)
    whole = [a.replace("/run", "/whole") for a in args]
    assert ranks.launch(compiled_train, 1, whole) == [0]
    assert ranks.launch(compiled_train, 1, args, 4) == ["killed"]
    assert ranks.launch(compiled_train, 1, [*args, "run.resume=auto"]) == [0]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_runs_in_each_precision(ranks: Ranks, photos: Path, tmp_path: Path, precision: str) -> None:
    # 64 px: torch 2.14's bf16 convolution on CPU returns uninitialised memory as the gradient of
    # the taps that a 1 x 1 input never reaches.
    more = (f"optim.precision={precision}", "optim.epochs=1", "data.views.0.size=64")
    assert ranks.launch(train, 2, arguments(photos, tmp_path / "run", *more)) == [0, 0]


@pytest.mark.faults
def test_torchrun_restarts_after_a_kill(photos: Path, whole: Whole, tmp_path: Path) -> None:
    """A real kill -9 of one of three ranks: torchrun starts all again, and nothing is lost."""
    folder = tmp_path / "run"
    with torchrun(
        3, arguments(photos, folder), tmp_path / "output", "--max-restarts", "1"
    ) as agent:
        until(lambda: list(folder.glob("checkpoints/*.json")) and agent.going())
        os.kill(agent.workers()[2], signal.SIGKILL)
        assert agent.wait() == 0, agent.text()[-5000:]
    assert "resumed from" in (folder / "train.log").read_text()
    assert rows(folder) == rows(whole(3))


STATEFUL: dict[str, tuple[str, ...]] = {
    "deepclusterv2": ("method.prototypes=[5, 3, 4]",),
    "swav": ("method.prototypes=7", "method.queue_size=17", "method.queue_epoch=0"),
    "mocov2plus": (
        "method.queue_size=17",
        "model.ema=0.5",
        "optim.final_weight_decay=0.1",
        "optim.layer_decay=0.9",
    ),
    "dino": ("method.prototypes=9", "method.warmup_teacher_epochs=2"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_methods_with_state_resume_to_the_last_bit(
    ranks: Ranks, photos: Path, tmp_path: Path, name: str
) -> None:
    """Memory, queues, centre and momentum network through files, in the middle of an epoch."""

    def of(folder: str, *more: str) -> list[str]:
        settings = (f"method.name={name}", *STATEFUL[name], "optim.epochs=2", "optim.lr=0.1")
        settings += STEPS_ONLY
        args = arguments(photos, tmp_path / folder)
        return [a for a in args if not a.startswith("method.")] + [*settings, *more]

    assert ranks.launch(train, 2, of("whole")) == [0, 0]
    assert ranks.launch(train, 2, of("run"), 5) == ["killed"] * 2
    assert ranks.launch(train, 2, of("run", "run.resume=auto")) == [0, 0]
    assert "resumed from" in (tmp_path / "run/train.log").read_text()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    ours, theirs = (
        torch.load(store.find(tmp_path / f)[0].path, weights_only=True)["model"]
        for f in ("run", "whole")
    )
    assert_same_bits(ours, theirs)
    if "model.ema=0.5" in STATEFUL[name]:
        files = (tmp_path / f / "backbone_ema.pt" for f in ("run", "whole"))
        assert_same_bits(*(torch.load(file, weights_only=True) for file in files))
        start, end = (r for r in rows(tmp_path / "run") if "eval/knn_top1" in r)
        for row in (start, end):
            averages = {key for key in row if key.endswith("_ema")}
            assert averages == {"eval/knn_top1_ema", "eval/probe_top1_ema"}
        assert start["eval/knn_top1_ema"] == start["eval/knn_top1"]  # of the same weights

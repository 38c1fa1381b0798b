"""`ddp-ssl verify`: planted faults are named, and right losses are right."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ddp_ssl import distributed
from ddp_ssl.checks import oracle
from ddp_ssl.commands import verify
from ddp_ssl.config import ConfigError
from tests.ranks import Ranks
from tests.runs import call

SHAPE = (2, 12, 16)


def judged(ranks: Ranks, target: str, *settings: str) -> tuple[list[str], str]:
    return oracle.judge(
        {W: ranks.launch(oracle.measure, W, target, SHAPE, settings) for W in oracle.SIZES}
    )


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("right", "exact"),
        ("RightModule", "exact"),
        ("instance", "exact"),
        ("single", "exact"),
        ("whole_only", "exact"),
        ("local", "local"),
        ("divided", "gradient divided by W"),
        ("divided_in_place", "gradient divided by W"),
        ("DividedModule", "gradient divided by W"),
        ("one_sided", "gradient wrong"),
        ("own_statistics", "value wrong"),
        ("summed", "value wrong"),
        ("noisy", "not deterministic"),
        ("one_more", "collectives differ"),
        ("uneven", "collectives differ"),
        ("one_more_backward", "collectives differ"),
    ],
)
def test_planted_faults_are_named(ranks: Ranks, name: str, word: str) -> None:
    lines, found = judged(ranks, f"tests.planted:{name}")
    assert found == word, lines


@pytest.mark.parametrize(
    "target",
    ["tests.planted:contrastive", "ddp_ssl.losses:vicreg", "ddp_ssl.losses:byol", "mmcr"],
)
def test_losses_and_methods_of_this_project_are_exact(ranks: Ranks, target: str) -> None:
    lines, found = judged(ranks, target)
    assert found == "exact", lines
    assert [line[:5] for line in lines] == ["W = 1", "W = 2", "W = 3", "W = 4"]


def test_local_batch_norm_is_found(ranks: Ranks) -> None:
    assert judged(ranks, "simclr", "model.batch_norm=local")[1] == "value wrong"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("tests.planted:raises_on_one", "RuntimeError: no such row [W = 2, rank 1]"),
        ("tests.planted:leaves", "SystemExit: 0 [W = 1, rank 0]"),
        ("tests.planted:constant", "returned a loss that has no gradient [W = 1, rank 0]"),
        ("tests.planted:rows", "returned a tensor [12]; a scalar tensor, or `.loss`, is accepted"),
        ("tests.planted:three", "has 3 positional parameters without a default; one ([K, N, d])"),
        ("tests.planted:number", "is int; a function or an nn.Module is accepted"),
        ("tests.planted:absent", "cannot be imported: AttributeError: module"),
    ],
)
def test_what_cannot_be_verified_is_one_line(ranks: Ranks, target: str, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        judged(ranks, target)
    assert str(raised.value).startswith(text)


def test_the_gradient_of_each_part_counts() -> None:
    """One parameter of many may be wrong; one that is zero but for rounding is not."""

    def result(small: float, zero: float) -> oracle.Measured:
        parts = {"a": np.full(9, 100.0), "b": np.array([small]), "c": np.array([zero])}
        found = oracle.Result(1.0, parts)
        return oracle.Measured(found, found, 1e-8, {2: found, 3: found, 4: found})

    def word(small: float, zero: float) -> str:
        one, others = result(1.0, 1e-17), result(small, zero)
        return oracle.judge({1: [one], 2: [others] * 2, 3: [others] * 3, 4: [others] * 4})[1]

    assert word(1.0, -3e-16) == "exact"
    assert word(0.99, 1e-17) == "gradient wrong"
    assert word(1.0, 1e-3) == "gradient wrong"
    assert word(float("nan"), 0.0) == "gradient wrong"
    with pytest.raises(ConfigError, match="value or gradient is not finite in one process"):
        oracle.judge({1: [result(float("inf"), 0.0)]})


def test_a_value_of_zero_but_for_rounding_is_right() -> None:
    def word(value: float) -> str:
        one, others = (
            oracle.Measured(found, found, 1.5e-8, dict.fromkeys((2, 3, 4), found))
            for found in (oracle.Result(v, {"z": np.ones(2)}) for v in (1e-17, value))
        )
        return oracle.judge({1: [one], 2: [others] * 2, 3: [others] * 3, 4: [others] * 4})[1]

    assert word(-2e-17) == "exact"
    assert word(1e-10) == "value wrong"


class Sent(list[Any]):
    """What `verify` sends results into."""

    put = list.append


def all_sizes(rank_port: int, target: str, limit_s: float) -> Sent:
    """What a process of `verify` sends, with another limit of the collectives."""
    sent = Sent()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(oracle, "TIMEOUT_S", limit_s),
    ):
        verify._work(int(os.environ["RANK"]), rank_port, [target], SHAPE, (), sent)
    return sent


@pytest.mark.parametrize(
    ("target", "word"), [("slow", "exact"), ("one_more", "collectives differ")]
)
def test_a_slow_loss_is_no_other_collective(ranks: Ranks, target: str, word: str) -> None:
    """Alone, it takes longer than the limit, while the other processes wait for the next size."""
    store, port = distributed.open_store()
    sent = ranks.launch(all_sizes, 4, port, f"tests.planted:{target}", 4.0)
    del store
    found = {key: result for each in sent for key, result in each}
    assert len(found) == 10
    by_size = {W: [found[0, W, rank] for rank in range(W)] for W in oracle.SIZES}
    lines, given = oracle.judge(by_size)
    assert given == word, lines


def test_a_module_that_one_process_cannot_load_is_said_at_once(ranks: Ranks) -> None:
    """The others do not wait for it in a group."""
    store, port = distributed.open_store()
    sent = ranks.launch(all_sizes, 4, port, "tests.planted:missing_on_one", 60.0)
    del store
    found = {key: result for each in sent for key, result in each}
    by_size = {W: [found[0, W, rank] for rank in range(W)] for W in oracle.SIZES}
    assert isinstance(by_size[1][0], oracle.Measured)
    others = [by_size[W][rank] for W in (2, 3, 4) for rank in range(W) if rank != 1]
    why = oracle.Failed("another process could not load it", True)
    assert all(other == why for other in others)
    with pytest.raises(ConfigError, match=r"cannot be imported: .* \[W = 2, rank 1\]"):
        oracle.judge(by_size)


class Ended:
    """Processes of which one has ended without an error."""

    def __init__(self, codes: list[int | None]) -> None:
        self.processes = [mock.Mock(exitcode=code) for code in codes]

    def join(self, timeout: float) -> bool:
        return all(process.exitcode is not None for process in self.processes)


def test_a_process_that_ends_without_a_result_is_an_error() -> None:
    """After a process has sent its last result, the others are waited for."""
    results: queue.Queue[Any] = queue.Queue()
    for codes in ([0, 0, 0, 0], [None, None, 0, None]):
        processes = Ended(list(codes))
        with pytest.raises(ConfigError, match=r"died while it ran a:b: process \d ended without"):
            verify._receive("a:b", processes, results, {}, (0, 4))
        assert all(process.terminate.called for process in processes.processes)
    received: dict[Any, Any] = {(0, 4, 2): oracle.Failed("", False)}
    verify._receive("a:b", Ended([None, None, 0, None]), results, received, (0, 4))


def test_mistakes_on_the_command_line_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in {
        ("simclrr",): "simclrr: neither module:callable nor a method; did you mean simclr?",
        ("simclr", "--shape", "2,16,8"): "16 images cannot be split over 1 to 4 processes",
        ("simclr", "--shape", "2,x,8"): "'2,x,8' is not K,N,d, such as 2,24,16",
        ("method.temperature=1",): "nothing to verify; module:callable or a method is accepted",
    }.items():
        assert verify.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert text in captured.err


@pytest.mark.parametrize(("moved", "code", "word"), [(0.0, 0, "exact"), (0.1, 1, "value wrong")])
def test_the_exit_code_is_the_verdict_s(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moved: float,
    code: int,
    word: str,
) -> None:
    def measured(targets: Any, *_: Any) -> Iterator[Any]:
        for target in targets:
            found = {}
            for size in oracle.SIZES:
                result = oracle.Result(1 + moved * (size == 3), {"z": np.ones(2)})
                local = dict.fromkeys((2, 3, 4), result)
                found[size] = [oracle.Measured(result, result, 1e-8, local)] * size
            yield target, found

    monkeypatch.setattr(verify, "_measured", measured)
    assert verify.main(["a:b"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"verdict: {word}"


@pytest.mark.faults  # not short: five processes import torch
def test_the_command_starts_the_processes() -> None:
    """The loss of the last target ends its process, which is said after the other verdicts."""
    names = ("right", "constant", "divided", "dies")
    words = [f"tests.planted:{name}" for name in names]
    done = call(sys.executable, "-m", "ddp_ssl.cli", "verify", *words, "--shape", "2,12,16")
    assert done.returncode == 2, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("verdict")]
    assert verdicts == ["verdict: exact", "verdict: gradient divided by W"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ddp_ssl: error: ")]
    assert len(errors) == 2
    assert errors[0].startswith("ddp_ssl: error: tests.planted:constant: returned a loss that has")
    assert errors[1].startswith("ddp_ssl: error: a process died while it ran tests.planted:dies: ")

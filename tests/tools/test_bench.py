"""The verdicts and the counts of the benchmarks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import compare
import pytest
import step
import torch


@pytest.mark.parametrize("count", [*range(6, 40), 100, 1023, 2000])
def test_the_interval_holds_the_median_in_95_percent(count: int) -> None:
    low, high = compare.interval([float(i) for i in range(count, 0, -1)])
    assert low + high == count + 1

    def outside(left_out: int) -> float:
        """The probability that the median lies outside of the values that stay."""
        ways = sum(math.comb(count, k) for k in range(left_out + 1))
        return 2 * ways / 2**count

    assert outside(round(low) - 1) <= 0.05 < outside(round(low))


def test_a_verdict_needs_six_rounds_and_an_interval_without_one() -> None:
    ours = [1.0] * 6
    assert compare.verdict(ours, [1.1] * 6) == "1.10 (1.10 to 1.10)"
    assert compare.verdict(ours[:5], [1.1] * 5) == "1.10 (1.10 to 1.10: undecided)"
    assert compare.verdict(ours, [0.9, *[1.1] * 5]).endswith("undecided)")
    # The contestants are compared within each round, slow or fast.
    assert compare.verdict([1, 9, 1, 9, 1, 9], [2, 18, 2, 18, 2, 18]) == "2.00 (2.00 to 2.00)"
    assert "too few" in compare.where([1.0] * 5, 2)


class Loader:
    """Eleven steps an epoch."""

    steps_per_epoch = 11

    def __next__(self) -> None:
        return None


@pytest.mark.parametrize(
    ("device", "turn", "bare", "segments"), [("cpu", 1, 40, 4), ("cuda", 10, 4, 4)]
)
def test_the_steps_that_are_timed(
    monkeypatch: Any, device: str, turn: int, bare: int, segments: int
) -> None:
    """All but each epoch's last one; bare ones beside them."""
    monkeypatch.setattr(step.optim, "build", lambda config, groups: None)
    monkeypatch.setattr(step, "parameter_groups", lambda learner, config: [])
    job: Any = SimpleNamespace(
        loader=Loader(),
        network=SimpleNamespace(learner=torch.nn.Linear(1, 1)),
        config=SimpleNamespace(optim=None),
        world=SimpleNamespace(device=torch.device(device)),
    )
    turns = step.Turns(job, segment=10, cached=4)
    now, taken = 0.0, 0

    def bare_steps() -> float:
        nonlocal taken
        taken += 1
        return 1e-3

    monkeypatch.setattr(turns, "_clock", lambda: now)
    monkeypatch.setattr(turns, "_bare_steps", bare_steps)
    for index in range(45):
        next(turns)
        # After an epoch's last step come validation and a save.
        now += 100.0 if index % 11 == 10 else 2e-3
    assert turns.turn == turn
    assert taken == bare
    assert turns.run == pytest.approx([2.0] * segments)
    assert turns.bare == pytest.approx([1.0] * segments)

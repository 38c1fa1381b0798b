"""The losses equal the golden files."""

from __future__ import annotations

import json

import pytest

from ddp_ssl.methods._registry import builtin_methods
from tests.golden import FOLDER, STEPS, losses


@pytest.mark.parametrize("name", builtin_methods())
def test_losses_are_what_they_were(name: str) -> None:
    lines = (FOLDER / f"{name}.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines]
    assert len(expected) == STEPS
    for ours, theirs in zip(losses(name), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)

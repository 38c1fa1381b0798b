"""Moments on the device's own clock; only comparing them waits for the device."""

import time
from typing import Any

import torch


def now(device: torch.device) -> Any:
    """This moment: of the host, or where the GPU's queue is now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds between two moments; waits until the device is past the second."""
    if isinstance(end, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000

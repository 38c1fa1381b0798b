"""The tests of this folder build some hundred graphs of DALI."""

from __future__ import annotations

from nvidia.dali._utils import dali_trace

dali_trace.set_tracing(enabled=False)  # of each operator to its line of code: a fifth of the time

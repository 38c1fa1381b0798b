"""`python -m tests.faults.hanging RANK STEP ...`: train; RANK gets no batch at STEP."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.train import main

rank, step = sys.argv[1:3]
original = TrainLoader.__next__
seen = 0


def hang(self: Any) -> Any:
    global seen
    seen += 1
    if os.environ["RANK"] == rank and seen == int(step):
        time.sleep(1000)
    return original(self)


TrainLoader.__next__ = hang  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))

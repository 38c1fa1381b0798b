"""Loggers that are not in the package."""

from __future__ import annotations

import json
import os

from ddp_ssl.logs.loggers import Logger, RunInfo

LINES = "lines.jsonl"


class Lines(Logger):
    """What it is given, a line each."""

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        about = {"start": run.step, "rank": os.environ.get("RANK"), "lr": run.config["optim"]["lr"]}
        self.write(about)

    def write(self, what: object) -> None:
        with open(self.run.folder / LINES, "a") as file:
            print(json.dumps(what), file=file)

    def row(self, row: dict[str, float | int]) -> None:
        self.write(row)
        row.clear()  # others must not mind


class Rewinding(Lines):
    """The same, but cut back when the run is."""

    rewinds = True


class Raises(Logger):
    """Fails at the method that the environment names."""

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        self.fail("start")

    def fail(self, where: str) -> None:
        if os.environ.get("RAISES_AT") == where:
            raise SystemExit("planted\nin two lines") if where == "row" else KeyError("planted")

    def row(self, row: dict[str, float | int]) -> None:
        self.fail("row")

    def flush(self) -> None:
        self.fail("flush")

    def close(self) -> None:
        self.fail("close")


class Slow(Lines):
    """Writes down the state that the run's folder tells when the logger is closed."""

    def close(self) -> None:
        status = (self.run.folder / "status.json").read_text()
        (self.run.folder / "at_close.txt").write_text(json.loads(status)["state"])

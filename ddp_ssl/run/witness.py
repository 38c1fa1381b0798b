"""A small process that says in `status.json` when its run has died.

A crash in native code or a `kill -9` lets no line of Python run in the process itself. This one
waits at the other end of a pipe. It is run as a script, so that it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DIED = "the process of rank 0 died: it was killed, or crashed in native code (stderr has the stack)"


class Witness:
    """Watches over this process, which writes the run in `folder` and holds `claim` there."""

    def __init__(self, folder: Path, claim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(folder), str(claim), claim.read_text(),
             str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def dismiss(self) -> None:
        """The status is recorded: the run ends in order."""
        self._process.communicate(b"ended")


def main(folder: Path, claim: Path, held: str, pid: int) -> None:
    """Wait for the end of the process; record a death unless another run has the folder by then."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1):
        return
    for unfinished in folder.glob(f"*.{socket.gethostname()}-{pid}.tmp"):
        unfinished.unlink(missing_ok=True)
    try:
        if claim.read_text() != held:
            return
    except FileNotFoundError:
        return
    path = folder / "status.json"
    status = json.loads(path.read_text())
    if status["state"] != "running":
        return
    status |= {"state": "failed", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    status |= {"error": DIED, "retry": True}
    temporary = path.with_name(f"{path.name}.witness.tmp")
    temporary.write_text(json.dumps(status, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))

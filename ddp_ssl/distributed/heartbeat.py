"""The store in which every process leaves heartbeats that the others can read."""

import datetime
import os
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore


class HeartbeatStore:
    """One heartbeat (a text) per process, in the launcher's store, read without a collective.

    The store lives in torchrun's first agent, or in rank 0 under srun. This class has a connection
    of its own to it. Methods raise `RuntimeError` when the store does not answer.
    """

    def __init__(self, token: str, size: int, timeout_s: float) -> None:
        self._token, self._size, self._timeout_s = token, size, timeout_s
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self.outlives_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _connect(self) -> Any:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = datetime.timedelta(seconds=self._timeout_s)
        store = dist.TCPStore(host, port, timeout=timeout)  # type: ignore[attr-defined]
        heartbeats = PrefixStore(f"heartbeats {self._token}", store)
        heartbeats.set_timeout(timeout)
        return heartbeats

    def write(self, rank: int, heartbeat: str) -> None:
        """Replace this process's heartbeat."""
        self._request(lambda store: store.set(str(rank), heartbeat))

    def read(self) -> list[str]:
        """The heartbeats of all processes in rank order; each must have written one."""
        names = [str(rank) for rank in range(self._size)]
        found = self._request(lambda store: store.multi_get(names))
        return [heartbeat.decode() for heartbeat in found]

    def _request(self, request: Callable[[Any], Any]) -> Any:
        """The store's answer to one request, within the timeout.

        The request runs in a thread. The store's own timeout is not enough: if the process behind
        the store is suspended, the client waits for an answer to its cancellation. A late answer
        frees the thread for the next request. A broken connection is made anew.
        """
        answer: list[Any] = []

        def ask() -> None:
            try:
                self._store = self._store or self._connect()
                answer.append(request(self._store))
            except Exception:  # any failure means: no answer
                self._store = None

        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=ask, daemon=True)
            self._thread.start()
            self._thread.join(self._timeout_s)
        if not answer:
            raise RuntimeError("the rendezvous store does not answer")
        return answer[0]

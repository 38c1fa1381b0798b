"""A store of files on this machine: HTTP with ranges, the answers of S3, and faults on demand."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.answers import Answers

PAGE = 3  # files in one answer of a listing
Range = tuple[int, int]  # the first byte and the one after the last


class Store:
    """The files below `root`, at `url`; those of a folder B as the S3 bucket B too.

    `fault(path, count)` may answer the request number `count`: with a status, or with `short`,
    `moved` or `cut` for other bytes than those asked for; None for a good answer. `asked` are
    method, path and range of all requests.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.delay_s = root, 0.0
        self.fault: Callable[[str, int], int | str | None] = lambda path, count: None
        self.asked: list[tuple[str, str, Range | None]] = []
        self.sent = 0
        self.lock = threading.Lock()
        self.server: Server | None = None
        self.port = 0
        self.live()
        self.url = f"http://127.0.0.1:{self.port}"

    def live(self) -> None:
        """Answer at `url`, again."""
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.store = self
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Refuse connections, and drop those that are open."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for connection in server.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """No fault, no delay, nothing asked."""
        self.fault, self.delay_s, self.sent = lambda path, count: None, 0.0, 0
        self.asked = []

    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let S3's clients find this store."""
        for name, value in {
            "AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "TheSecret",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)


class Server(ThreadingHTTPServer):
    store: Store
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)


class Handler(Answers):
    server: Server
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        store, parts = self.server.store, urlsplit(self.path)
        name = unquote(parts.path)[1:]
        with store.lock:
            store.asked.append((self.command, name, self.range()))
            count = len(store.asked)
        time.sleep(store.delay_s)
        fault = store.fault(name, count)
        if isinstance(fault, int):
            return self.answer(fault, b"<Error>TheSecret</Error>")
        if "list-type=2" in parts.query:
            return self.list(name, {k: v[0] for k, v in parse_qs(parts.query).items()})
        try:
            with (store.root / name).open("rb") as file:
                about = os.fstat(file.fileno())
                first, end = self.range() or (0, about.st_size)
                if first > about.st_size:
                    return self.answer(416)
                end = min(end, about.st_size)
                body = os.pread(file.fileno(), end - first, first)
        except OSError:
            return self.answer(404)
        tag = f'"{about.st_mtime_ns:x}-{about.st_size:x}"'
        if self.headers.get("If-Match", tag) != tag:
            return self.answer(412)
        headers = {"ETag": tag, "Last_Modified": self.date_time_string(about.st_mtime)}
        if self.command == "HEAD":
            return self.answer(200, Content_Length=str(about.st_size), **headers)
        if self.range() is None:
            return self.answer(200, body, **headers)
        if fault == "short":
            body, end = body[:-1], end - 1
        if fault == "moved":
            first, end = first + 1, end + 1
        if fault == "cut":
            self.close_connection = True
            headers["Content_Length"], body = str(len(body)), body[: len(body) // 2]
        store.sent += len(body)
        self.answer(206, body, Content_Range=f"bytes {first}-{end - 1}/{about.st_size}", **headers)
        return None

    def range(self) -> Range | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2] or 1 << 60) + 1) if found else None

    def list(self, bucket: str, asked: dict[str, str]) -> None:
        """One page of S3's ListObjectsV2."""
        root = self.server.store.root / bucket
        prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
        keys = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        names = {name for name in keys if name.startswith(prefix)}
        if "delimiter" in asked:  # a folder in place of what is in it
            cut = len(prefix)
            names = {n[: cut + n[cut:].find("/") + 1] if "/" in n[cut:] else n for n in names}
        left = sorted(name for name in names if name > after)
        entries = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if name.endswith("/")
            else f"<Contents><Key>{escape(name)}</Key><Size>{(root / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in left[:PAGE]
        )
        more = len(left) > PAGE
        last = escape("".join(left[PAGE - 1 : PAGE]))
        token = f"<NextContinuationToken>{last}</NextContinuationToken>"
        self.answer(
            200,
            (
                '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
                f'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token if more else ''}{entries}"
                "</ListBucketResult>"
            ).encode(),
            Content_Type="application/xml",
        )


@contextmanager
def serving(root: Path) -> Iterator[Store]:
    """A store of the files below `root`."""
    store = Store(root)
    try:
        yield store
    finally:
        store.die()

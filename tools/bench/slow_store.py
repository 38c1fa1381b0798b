"""A web server with ranges for `data.py --latency`: files below a folder, each answer later."""

import asyncio
import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, folder: Path, delay_s: float
) -> None:
    """All requests of a connection."""
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return writer.close()
        await asyncio.sleep(delay_s)
        method, path, _ = head.split(" ", 2)
        try:
            file = os.open(folder / path[1:], os.O_RDONLY)
        except OSError:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        size = os.fstat(file).st_size
        found = re.search(r"(?i)\r\nrange: bytes=(\d+)-(\d+)", head)
        first, last = (int(found[1]), int(found[2])) if found else (0, size - 1)
        status = f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}"
        lines = [
            f"HTTP/1.1 {status if found else '200 OK'}",
            f'Content-Length: {last + 1 - first}\r\nETag: "{size}"\r\n\r\n',
        ]
        writer.write("\r\n".join(lines).encode())
        if method != "HEAD":
            writer.write(os.pread(file, last + 1 - first, first))
        os.close(file)


def serve(folder: Path, delay_s: float, port: Connection) -> None:
    async def run() -> None:
        server = await asyncio.start_server(
            lambda *streams: answer(*streams, folder, delay_s), "127.0.0.1", 0, backlog=1024
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def serving(folder: Path, delay_s: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(folder, delay_s, theirs), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()

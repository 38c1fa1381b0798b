"""A stand-in for the Hugging Face hub: what its client asks when a model is pushed and fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from threading import Thread

from tests.answers import Answers

TOKEN = "hf_" + "ThisIsTheSecret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory; who writes must show `TOKEN`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(Answers):
    server: Hub

    def say(self, said: object, code: int = 200) -> None:
        self.answer(code, json.dumps(said).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        repository, _, rest = self.path[1:].partition("/resolve/main/")
        if not rest:
            return self.answer(200 if self.path == "/" else 404)
        if repository not in self.server.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = self.server.repositories[repository]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if rest not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha1(files[rest]).hexdigest()
        return self.answer(200, files[rest], ETag=f'"{etag}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.say({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self.say({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        repository = self.path.removeprefix("/api/models/")
        if repository.endswith("/preupload/main"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            return self.say({"files": [how | {"path": file["path"]} for file in files]})
        assert repository.endswith("/commit/main")
        files = self.server.repositories[repository.removesuffix("/commit/main")]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.say({"commitUrl": f"{self.server.url}/{repository}", "commitOid": "0" * 40})


@contextmanager
def serve() -> Iterator[Hub]:
    """The stand-in, answering in a thread of this process."""
    with Hub() as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()

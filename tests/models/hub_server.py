"""A hub on this machine: what huggingface_hub asks of one, over real sockets, and its failures."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

import hmpo.models.hub as hub_module


class Hub:
    """Repositories by name, each with its commits (oldest first) and branches.

    `answers` makes the next requests of a path that holds a text fail with a status, so many
    times; `cut` ends the transfer of a file half-way, so many times.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.answers: list[list] = []
        self.cut: Counter[str] = Counter()
        self.asked: list[tuple[str, str, str]] = []
        """(method, path, range) of every request."""
        self.port = 0

    def push(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch; gives its hash."""
        digest = hashlib.sha1(name.encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        commit = digest.hexdigest()
        self.commits.setdefault(name, {})[commit] = dict(files)
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def push_folder(self, name: str, folder: Path, **others: bytes) -> str:
        """A commit with the files of a folder."""
        return self.push(name, {p.name: p.read_bytes() for p in folder.iterdir()} | others)

    def fail(self, part: str, status: int, times: int = 10**9) -> None:
        """Answer requests whose path holds `part` with a status."""
        self.answers.append([part, status, times])

    def downloaded(self) -> list[str]:
        """Names of the files that were sent."""
        gets = [p for m, p, _ in self.asked if m == "GET" and "/resolve/" in p]
        return [path.split("/resolve/")[1].partition("/")[2] for path in gets]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        for rule in hub.answers:
            if rule[0] in path and rule[2] > 0:
                rule[2] -= 1
                return self._send(rule[1], b"{}")
        if path.startswith("/api/models/"):
            name, kind, rest = self._split(path.removeprefix("/api/models/"))
        else:
            name, kind, rest = self._split(path[1:])
        if name not in hub.commits:
            return self._refuse(404, "RepoNotFound")
        open_ = self.headers.get("Authorization", "").removeprefix("Bearer ") in hub.tokens
        if name in hub.gated and not open_ and kind == "resolve":
            return self._refuse(403, "GatedRepo")
        revision, _, file = rest.partition("/")
        commit = hub.branches[name].get(revision, revision)
        files = hub.commits[name].get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if kind == "revision":
            names = [{"rfilename": path} for path in files]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": names})
        if kind == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                    for path, data in files.items()
                ]
            )
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(file, files[file], commit)

    def _split(self, path: str) -> tuple[str, str, str]:
        owner, name, kind, rest = [*path.split("/", 3), "", "", ""][:4]
        return f"{owner}/{name}", kind or "revision", rest or "main"

    def _file(self, name: str, data: bytes, commit: str) -> None:
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        if wanted:
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and self.hub.cut[name] > 0:
            self.hub.cut[name] -= 1
            self._send(status, body, headers, sent=body[: len(body) // 2])
            self.close_connection = True
            return
        self._send(status, body, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: bytes = b"*"
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent == b"*" else sent)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def fresh_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub, an empty cache in a folder that is the current one, and nobody's token."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(hub_module, "WAITS", (0.0, 0.0))
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda seconds: None)
    monkeypatch.chdir(folder)
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server

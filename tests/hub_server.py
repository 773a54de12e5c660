"""A local server that speaks the Hugging Face hub's protocol as far as its client needs it for pushes and pulls.

Repositories live in memory, with one branch, `main`. Tars and weights go through LFS, as on the hub, and downloads of
them are redirected to another path, as to its CDN.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thisTokenMustNeverBeSeen"
LARGE = (".tar", ".safetensors", ".cls", ".members")


@dataclass
class Repo:
    """One repository: the files of each commit, newest last."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])

    def sha(self, number: int) -> str:
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        numbers = [n for n in range(len(self.commits)) if revision in ("main", self.sha(n))]
        return (self.sha(numbers[-1]), self.commits[numbers[-1]]) if numbers else None


@dataclass
class Hub:
    """What the server holds, and what was asked of it."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # by "models/o/n"
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def described(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty hub on a free port of the loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, code: int, data: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def json(self, value: Any, code: int = 200) -> None:
            self.answer(code, json.dumps(value).encode(), Content_Type="application/json")

        def missing(self, what: str) -> None:
            self.answer(404, json.dumps({"error": what}).encode(), X_Error_Code=what, X_Error_Message=what)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_all(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            hub.requests.append(f"{self.command} {path}")
            body = self.body()
            if path.startswith("/cdn/"):  # signed links need no token
                return self.ranged(hub.large[path.removeprefix("/cdn/")], {})
            hub.tokens.add(self.headers.get("Authorization"))
            if path.startswith("/upload/"):
                hub.large[path.removeprefix("/upload/")] = body
                return self.answer(200)
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                kind = f"{asked.get('type') or 'model'}s"
                owner = asked.get("organization") or "me"
                private = asked.get("private") or asked.get("visibility") == "private"
                name = f"{kind}/{owner}/{asked['name']}"
                if name in hub.repos:
                    return self.json({"error": "You already created this repo", "url": f"{hub.endpoint}/{name}"}, 409)
                hub.repos[name] = Repo(private=bool(private))
                return self.json({"url": f"{hub.endpoint}/{name.removeprefix('models/')}"})
            return self.of_repo(path, query, body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_all  # noqa: N815 - names of the library

        def of_repo(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
            match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?", path)
            if match is None:
                match = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+?)(?:\.git)?/(info|resolve)/([^/]+)/(.*)", path)
            if match is None:
                return self.missing("EntryNotFound")
            kind, name, what, revision, inside = match.groups()
            repo = hub.repos.get(f"{kind or 'models'}/{name}")
            if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if what == "info":
                return self.lfs(json.loads(body))
            if what == "preupload":
                asked = json.loads(body)["files"]
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for each in asked
                ]
                return self.json({"files": modes})
            if what == "commit":
                return self.commit(f"{kind}/{name}".removeprefix("models/"), repo, body)
            held = repo.at(revision or "main")
            if held is None:
                return self.missing("RevisionNotFound")
            sha, files = held
            if what in (None, "revision"):
                siblings = [{"rfilename": each} for each in files]
                about = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
                return self.json(about | {"downloads": 0, "likes": 0, "lastModified": "2026-11-29T00:00:00.000Z"})
            if what == "tree":
                return self.json(tree(files, (inside or "").rstrip("/"), query.get("recursive") == ["true"]))
            if what == "paths-info":
                asked = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
                paths = asked.get("paths", [])
                found = [described(each, files[each]) for each in paths if each in files]
                found += [
                    {"type": "directory", "path": each, "oid": "0" * 40}
                    for each in paths
                    if any(file.startswith(f"{each}/") for file in files)
                ]
                return self.json(found)
            if what == "resolve":
                return self.resolve(sha, files, inside)
            return self.missing("EntryNotFound")

        def lfs(self, asked: dict[str, Any]) -> None:
            objects = []
            for each in asked["objects"]:
                about = {"oid": each["oid"], "size": each["size"]}
                if each["oid"] not in hub.large:
                    about["actions"] = {"upload": {"href": f"{hub.endpoint}/upload/{each['oid']}"}}
                objects.append(about)
            self.json({"transfer": "basic", "objects": objects})

        def commit(self, name: str, repo: Repo, body: bytes) -> None:
            files = dict(repo.commits[-1])
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            repo.commits.append(files)
            sha = repo.sha(len(repo.commits) - 1)
            self.json({"commitUrl": f"{hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True})

        def resolve(self, sha: str, files: dict[str, bytes], path: str) -> None:
            if path not in files:
                return self.missing("EntryNotFound")
            data, about = files[path], {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
            if not path.endswith(LARGE):
                return self.ranged(data, about | {"ETag": f'"{blob_id(data)}"'})
            oid = hashlib.sha256(data).hexdigest()
            cdn = hub.endpoint.replace("127.0.0.1", "localhost")  # another host, which gets no token
            linked = {
                "X_Linked_Etag": f'"{oid}"',
                "X_Linked_Size": str(len(data)),
                "Location": f"{cdn}/cdn/{oid}",
            }
            return self.answer(302, b"", **about, **linked)

        def ranged(self, data: bytes, headers: dict[str, str]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                return self.answer(200, data, **headers)
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self.answer(416)
            content = {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
            return self.answer(206, data[start : end + 1], **headers, **content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tree(files: dict[str, bytes], inside: str, recursive: bool) -> list[dict[str, Any]]:
    """A listing as the hub gives it."""
    start = f"{inside}/" if inside else ""
    below = {path: data for path, data in files.items() if path.startswith(start)}
    folders = {
        path[: len(start)] + "/".join(parts[:depth])
        for path in below
        for parts in [path.removeprefix(start).split("/")]
        for depth in range(1, len(parts))
        if recursive or depth == 1
    }
    listed: list[dict[str, Any]] = [{"type": "directory", "path": each, "oid": "0" * 40} for each in sorted(folders)]
    return listed + [
        described(path, data) for path, data in below.items() if recursive or "/" not in path.removeprefix(start)
    ]

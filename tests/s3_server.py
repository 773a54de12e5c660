"""A folder served by the part of the S3 protocol that caches need, with faults on demand; or a real S3 server."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

BUCKET = "bucket"
SECRET = "the-secret-of-the-tests"  # of the real server, which checks signatures
HANG_S = 2.0  # longer than the client of the test waits
Fault = str  # "503", "403", "404", "cut" (half of the body, then the connection ends), "short" (too little, said so)


@dataclass
class Get:
    """One GET of an object."""

    key: str
    start: int
    end: int
    at: float  # time.monotonic() when it came
    open_gets: int  # GETs under way then, this one included


@dataclass
class Log:
    """What clients did, and what is to go wrong: `fault` gets every GET with its number from 0."""

    gets: list[Get] = field(default_factory=list)
    fault: Callable[[int, Get], Fault | None] = lambda number, get: None
    any_fault: Callable[[str, str], Fault | None] = lambda method, key: None  # of every request about objects
    latency_s: float = 0.0  # of every answer about an object
    open_gets: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        self.gets.clear()
        self.fault = lambda number, get: None

    def of(self, suffix: str) -> list[Get]:
        return [get for get in self.gets if get.key.endswith(suffix)]


def _make_handler(root: Path, log: Log, writable: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:  # the base class's name
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            bucket, _, key = unquote(url.path).lstrip("/").partition("/")
            if bucket != BUCKET:
                self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif self._fails(key):
                pass
            elif not key:
                self._answer(200, _listing(root, parse_qs(url.query)).encode())
            elif not (root / key).is_file():
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self._object(key)

        def do_PUT(self) -> None:
            key, body = self._written()
            if self._fails(key):
                return
            with log.lock:
                exists = (root / key).exists()
                if not (exists and self.headers.get("If-None-Match") == "*"):
                    (root / key).parent.mkdir(parents=True, exist_ok=True)
                    (root / key).write_bytes(body)
                    exists = False
            if exists:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self._answer(200, b"", {"ETag": _tag(root / key)})

        def do_DELETE(self) -> None:
            key, _ = self._written()
            if not self._fails(key):
                (root / key).unlink(missing_ok=True)
                self._answer(204, b"")

        def do_POST(self) -> None:
            """Several deletions in one request."""
            _, body = self._written()
            keys = [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            if not self._fails(""):
                for key in keys:
                    (root / key).unlink(missing_ok=True)
                rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
                self._answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

        def _written(self) -> tuple[str, bytes]:
            """Key and body of a request that changes something."""
            assert writable
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2], body

        def _fails(self, key: str) -> bool:
            """Whether `any_fault` wants this request to fail; it has then."""
            fault = log.any_fault(self.command, key)
            if fault == "hang":
                time.sleep(HANG_S)
            if fault in ("hang", "cut"):
                self.close_connection = True
            elif fault is not None:
                self._answer(int(fault), f"<Error><Code>Fault{fault}</Code></Error>".encode())
            return fault is not None

        def _object(self, key: str) -> None:
            stat = (root / key).stat()
            start, end, status = 0, stat.st_size, 200
            if wanted := self.headers.get("Range"):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                start, end, status = int(low), min(int(high) + 1, end), 206
            fault = None
            if self.command == "GET":
                with log.lock:
                    log.open_gets += 1
                    get = Get(key, start, end, time.monotonic(), log.open_gets)
                    number = len(log.gets)
                    log.gets.append(get)
                fault = log.fault(number, get)
            try:
                time.sleep(log.latency_s)
                if fault in ("403", "404", "503"):
                    self._answer(int(fault), f"<Error><Code>Fault{fault}</Code></Error>".encode())
                    return
                headers = {"ETag": _tag(root / key), "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
                if status == 206:
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{stat.st_size}"
                with open(root / key, "rb") as file:
                    file.seek(start)
                    body = file.read(end - start)
                if fault == "short":
                    body = body[: len(body) // 2]
                self._answer(status, body, headers, cut=fault == "cut")
            finally:
                if self.command == "GET":
                    with log.lock:
                        log.open_gets -= 1

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

    return Handler


def _tag(path: Path) -> str:
    stat = path.stat()
    return _tag_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1000)
def _tag_of(path: Path, _size: int, _mtime_ns: int) -> str:
    return f'"{md5(path.read_bytes()).hexdigest()}"'


def _listing(root: Path, query: dict[str, list[str]]) -> str:
    prefix = query.get("prefix", [""])[0]
    folder = root / prefix.rpartition("/")[0]
    keys = sorted(str(p.relative_to(root)) for p in folder.rglob("*") if p.is_file())
    keys = [key for key in keys if key.startswith(prefix)]
    folders = set()
    if query.get("delimiter"):
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
        keys = [key for key in keys if "/" not in key[len(prefix) :]]
    rows = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{(root / key).stat().st_size}</Size>"
        f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{escape(_tag(root / key))}</ETag>"
        "</Contents>"
        for key in keys
    )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
    return (
        f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
        f"<IsTruncated>false</IsTruncated>{rows}{common}</ListBucketResult>"
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away


@contextmanager
def served(root: Path, latency_s: float = 0.0, writable: bool = False) -> Iterator[tuple[str, Log]]:
    """Serve `root` as the bucket BUCKET; gives the endpoint and the log."""
    log = Log(latency_s=latency_s)
    server = _Server(("127.0.0.1", 0), _make_handler(root, log, writable))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(endpoint: str, secret: str = "none") -> dict[str, str]:
    """What a client's environment must say."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": secret,
    }


@contextmanager
def real_server(weed: str, folder: Path, secret: str) -> Iterator[str]:
    """A SeaweedFS server with BUCKET in it, which checks signatures; gives the endpoint."""
    ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
    # fmt: off
    command = [weed, f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
               f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
               "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}.port={port}" for name, port in ports.items())]
    # fmt: on
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    with open(folder / "output.txt", "wb") as output:
        env = os.environ | environment(endpoint, secret)
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=folder)
        try:
            store = S3Store(
                BUCKET,
                endpoint=endpoint,
                region="us-east-1",
                access_key_id="tests",
                secret_access_key=secret,
                client_options={"allow_http": True},
            )
            _until_it_answers(lambda: obstore.list(store).collect())
            yield endpoint
        finally:
            server.kill()  # nothing of it is kept
            server.wait(20)


def _until_it_answers(request: Callable[[], object]) -> None:
    for _ in range(100):
        try:
            request()
            return
        except (BaseError, OSError):
            time.sleep(0.1)
    raise TimeoutError("the S3 server does not answer")


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as well as the ones 10,000 higher, which SeaweedFS takes for gRPC."""
    found: list[int] = []
    for port in random.Random(os.getpid()).sample(range(11000, 22000), 500):
        with contextlib.suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free ports")


if __name__ == "__main__":  # python tests/s3_server.py FOLDER LATENCY_S: prints its endpoint, ends with its stdin
    with served(Path(sys.argv[1]), float(sys.argv[2])) as (endpoint, _log):
        print(endpoint, flush=True)
        sys.stdin.read()

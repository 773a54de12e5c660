"""A small web server of pages that only this machine should read."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Final

Page = tuple[str, Callable[[], bytes]]  # content type, and what makes the content


def local_server(pages: Mapping[str, Page], policy: str, host: str, port: int) -> ThreadingHTTPServer:
    """A server of pages by path, which listens from now on.

    Args:
        pages: by path, such as `/`.
        policy: the Content-Security-Policy of every answer.
        host: address to listen on.
        port: port to listen on; 0 takes any free one.

    Raises:
        OSError: it cannot listen there.
    """

    class Handler(_Handler):
        pass

    Handler.policy, Handler.pages = policy, pages

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    return Server((host, port), Handler)


_HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of its pages, for requests that name this machine."""

    pages: ClassVar[Mapping[str, Page]]
    policy: ClassVar[str]
    server_version, sys_version = "tinymim", ""
    timeout = 30.0  # of a connection that says nothing

    def do_GET(self) -> None:
        """Answer with a page."""
        if not names_this_machine(self.headers.get("Host", "")):
            self._answer(403, "text/plain", b"the Host header names another machine\n")
        elif (found := self.pages.get(self.path.partition("?")[0])) is None:
            self._answer(404, "text/plain", f"there is {' and '.join(self.pages)}\n".encode())
        else:
            kind, make = found
            self._answer(200, kind, make())

    def parse_request(self) -> bool:
        """Read the request line and headers; False ends the request, as for every method but GET."""
        if super().parse_request() and self.command == "GET":
            return True
        if self.command and self.command != "GET":
            self.close_connection = True  # a body, if any, stays unread
            self._answer(405, "text/plain", b"only GET\n", (("Allow", "GET"),))
        return False

    def _answer(self, code: int, kind: str, body: bytes, more: Sequence[tuple[str, str]] = ()) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(code)
            sent = (("Content-Type", kind), ("Content-Length", str(len(body))), *more)
            for name, value in (*sent, ("Content-Security-Policy", self.policy), *_HEADERS):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for each request."""


def names_this_machine(host: str) -> bool:
    """Whether a Host header holds an address, `localhost` or this machine's name, and no other name.

    A page of another site can point a name of its own at this server (DNS rebinding), but it cannot send another
    Host header than that name.
    """
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name.lower().rstrip(".") in {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def shown_host(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host

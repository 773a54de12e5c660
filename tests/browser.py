"""A real Chromium without a window, spoken to through two pipes: what a page shows, logs, and looks like."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ANSWER_S = 90.0  # on a busy machine, Chromium takes long to start
_ERRORS = ("Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """One page of a running browser.

    Attributes:
        errors: exceptions, messages of `console.error`, and the browser's own complaints about the page.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._buffer, self._number, self._loaded = b"", 0, False
        self._session: str | None = None
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page at a width in pixels; errors of the page before it are forgotten."""
        self._go("about:blank")
        self.errors.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._go(url)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until a JavaScript expression is true."""
        until_s = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < until_s, f"{expression} stays false: {self.run('document.body.innerText')}"
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def print_pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])

    def _go(self, url: str) -> None:
        self._loaded = False
        assert "errorText" not in self._call("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], _ANSWER_S)
            assert ready, "the browser does not answer"
            self._buffer += os.read(self._back, 2**20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        found = json.loads(line)
        kind, about = found.get("method"), found.get("params", {})
        self._loaded |= kind == "Page.loadEventFired"
        if kind in _ERRORS or (kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert")):
            self.errors.append(json.dumps(about))
        return found


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile in `home`; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    read_to, write_to = os.pipe()
    read_back, write_back = os.pipe()
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={home}", "--hide-scrollbars", "--remote-debugging-pipe"]
    # Chromium reads from descriptor 3 and writes to 4.
    shell = ["bash", "-c", f'exec 3<&{read_to} 4>&{write_back} {read_to}<&- {write_back}>&-; exec "$@"', "bash"]
    if {read_to, write_back} & {3, 4}:
        shell = ["bash", "-c", f'exec 13<&{read_to} 14>&{write_back}; exec 3<&13 4>&14; exec "$@"', "bash"]
    process = subprocess.Popen(
        [*shell, *command], pass_fds=(read_to, write_back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(read_to)
    os.close(write_back)
    try:
        yield Browser(write_to, read_back)
    finally:
        os.close(write_to)
        os.close(read_back)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

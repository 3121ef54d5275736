"""A headless Chromium, spoken to over its DevTools pipe: no driver, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ANSWER_SECONDS = 300
# Chromium reads commands from descriptor 3 and answers on 4.
_LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """A Chromium on this machine: CHROMIUM names one, else the usual names."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. `errors` holds uncaught exceptions of the page's scripts."""

    def __init__(self, program: str, width: int = 1800, height: int = 1000):
        self.errors: list[str] = []
        # its helpers may still write for a moment after it has ended
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        pipes = (to_browser, from_browser)
        launch = [sys.executable, "-c", _LAUNCH, *map(str, pipes), program, *flags, "about:blank"]
        self._process = subprocess.Popen(
            launch,
            pass_fds=pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, **parameters) -> dict:
        """The answer to one DevTools command."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                details = answer["params"]["exceptionDetails"]
                thrown = details.get("exception", {})
                self.errors.append(thrown.get("description") or details.get("text", ""))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url: str) -> None:
        """Loads a page; returns when its loading has begun."""
        self.call("Page.navigate", url=url)

    def run(self, script: str):
        """The value of an expression, or what its promise resolves to."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", str(details)))
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 180):
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if value := self.run(script):
                    return value
            except RuntimeError:  # the page is still being replaced
                pass
            time.sleep(0.3)
        raise AssertionError(f"never true: {script}; errors: {self.errors}")

    def screenshot(self, path: Path, *, quality: int | None = None, clip: dict | None = None):
        """A PNG of what is shown, or a JPEG of that quality."""
        options = {"format": "png"} if quality is None else {"format": "jpeg", "quality": quality}
        if clip is not None:
            options["clip"] = {"scale": 1, **clip}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], _ANSWER_SECONDS)[0]:
                raise AssertionError("the browser does not answer")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise AssertionError("the browser went away")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

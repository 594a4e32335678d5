"""A headless Chromium that is spoken to: real mouse, finger and keys, by the DevTools protocol over two pipes.

Messages are JSON objects that end in a zero byte, read by Chromium from descriptor 3 and written to 4
(--remote-debugging-pipe): no port, and no library.
"""

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 60  # for an answer


class Browser:
    """One page of a running Chromium.

    Attributes:
        complaints: what the page's script threw or wrote to the console.
    """

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing, self._rest, self._last = reading, writing, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"])[:500])
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._reading, 1 << 16) if ready else b""
            assert part, "Chromium does not answer"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Show a page at a width; below 500 pixels as a phone, with a finger."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 500)
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """What a line of script in the page gives."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def mouse(self, *places: tuple[str, float, float], **more: Any) -> None:
        """Mouse events (mousePressed, mouseMoved, ...), one after the other."""
        for kind, x, y in places:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def fingers(self, *places: list[tuple[float, float]]) -> None:
        """Put fingers down at the first places, draw them along the others and lift them."""
        for index, points in enumerate(places):
            touches = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(points)]
            self.call("Input.dispatchTouchEvent", type="touchMove" if index else "touchStart", touchPoints=touches)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str, **more: Any) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, **more)


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Start Chromium, and end it."""
    to_it, from_it = os.pipe(), os.pipe()

    def place_pipes() -> None:
        # by way of high numbers: one of the four may itself be 3 or 4
        reading, writing = os.dup2(to_it[0], 60), os.dup2(from_it[1], 61)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place_pipes,
            close_fds=False,
        )
        try:
            os.close(to_it[0])
            os.close(from_it[1])
            yield Browser(from_it[0], to_it[1])
        finally:
            os.close(to_it[1])  # Chromium ends when its pipe does
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_it[0])

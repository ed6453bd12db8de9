"""The report's figures as PNG files, by the machine's own Chromium: what is on the page is what is in the paper.

It is driven through two pipes (Chrome DevTools Protocol), so no package and no network is needed for it.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normwise.lab.errors import LabError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, SCALE = 1180, 2
SECONDS = 120

# All parts of the page are opened; then each figure's name and place.
PLACES = """
for (const part of document.querySelectorAll('[role=tabpanel]')) part.hidden = false;
[...document.querySelectorAll('[data-picture]')].map(figure => {
  const box = figure.getBoundingClientRect();
  return [figure.closest('[role=tabpanel]').id + '-' + figure.dataset.picture,
          box.x + scrollX, box.y + scrollY, box.width, box.height];
})
"""


def find_browser() -> str:
    """The path of a Chromium or Chrome.

    Raises:
        LabError: there is none, with the cure; or this is Windows, where pipes of this kind do not exist.
    """
    if os.name == "nt":
        raise LabError("--png works on Linux and macOS; open report.html in a browser and print it instead")
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise LabError(
        f"--png needs a Chromium or Chrome, and none of {', '.join(BROWSERS)} is on the PATH; install one (on Debian: "
        "apt install chromium), or leave --png out: report.html holds the same figures"
    )


def write_pictures(page: Path, folder: Path, browser: str) -> list[Path]:
    """Write every figure of ``page`` to ``folder/TASK-FIGURE.png``, light, at twice the pixels; return the paths.

    Raises:
        LabError: the folder cannot be made or written, or the browser ended or did not answer.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{folder} cannot be made ({error.strerror}): give another --png") from error
    written = []
    with _started(browser) as ask:
        target = ask("Target.createTarget", url="about:blank")["targetId"]
        session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        light = [{"name": "prefers-color-scheme", "value": "light"}]
        ask("Emulation.setEmulatedMedia", session, features=light)
        ask(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=WIDTH,
            height=900,
            deviceScaleFactor=SCALE,
            mobile=False,
        )
        ask("Page.enable", session)
        ask("Page.navigate", session, until="Page.loadEventFired", url=page.absolute().as_uri())
        places = ask("Runtime.evaluate", session, expression=PLACES, returnByValue=True)["result"]["value"]
        for name, x, y, width, height in places:
            clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
            shot = ask("Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True)
            path = folder / f"{name}.png"
            try:
                path.write_bytes(base64.b64decode(shot["data"]))
            except OSError as error:
                raise LabError(f"{path} cannot be written ({error.strerror}): give another --png") from error
            written.append(path)
    return written


@contextmanager
def _started(browser: str) -> Iterator[Any]:
    """A browser, as a function that sends one command and returns its answer; it is ended afterwards."""
    # Above 10, so that nothing is in the way of 3 and 4, where Chromium reads commands and writes answers.
    their_read, our_write = map(_above_ten, os.pipe())
    our_read, their_write = map(_above_ten, os.pipe())
    with tempfile.TemporaryDirectory(prefix="normwise-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"]
        options += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        process = os.posix_spawnp(
            browser,
            [browser, *options],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, their_read, 3),
                (os.POSIX_SPAWN_DUP2, their_write, 4),
                *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (1, 2)),
            ],
        )
        os.close(their_read)
        os.close(their_write)
        with open(our_write, "wb", buffering=0) as commands, open(our_read, "rb", buffering=0) as answers:
            try:
                yield _Connection(commands, answers, browser).ask
            finally:
                os.kill(process, signal.SIGTERM)
                os.waitpid(process, 0)


def _above_ten(descriptor: int) -> int:
    import fcntl  # not on Windows, where find_browser has refused already

    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high


class _Connection:
    """Commands out, answers in: JSON texts that a zero byte ends."""

    def __init__(self, commands: Any, answers: Any, browser: str) -> None:
        self.commands, self.answers, self.browser = commands, answers, browser
        self.numbers, self.rest = itertools.count(1), b""

    def ask(self, method: str, session: str | None = None, *, until: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result, after the event ``until`` if one is named."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        try:
            self.commands.write(json.dumps(message).encode() + b"\0")
            result: dict[str, Any] | None = None
            seen = not until
            while result is None or not seen:
                answer = self._next()
                seen = seen or answer.get("method") == until
                if answer.get("id") == number:
                    if "error" in answer:
                        raise LabError(f"{self.browser} refused {method}: {answer['error']['message']}")
                    result = answer["result"]
        except BrokenPipeError as error:
            raise LabError(self._ended(method)) from error
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], SECONDS)
            part = self.answers.read(1 << 16) if ready else b""
            if not part:
                raise LabError(self._ended("a picture"))
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _ended(self, at: str) -> str:
        return f"{self.browser} ended or was silent for {SECONDS} s at {at}; does `{self.browser} --headless` start?"

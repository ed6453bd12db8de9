"""One headless Chromium for every test that opens a page normwise wrote, and what a page must never do.

tests/conftest.py gives every test the fixtures `browser` and `open_page`.
Playwright drives the machine's own Chromium (Debian's package `chromium`); nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, started once a test process; skipped with the reason where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright (extra 'dev') drives the browser"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; Debian has it as the package 'chromium'")
    with playwright.sync_playwright() as driver:
        # Containers give no user namespaces to a sandbox, and little shared memory.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`page = open_page(path, viewport=PHONE, color_scheme="dark")`: see `well_behaved`."""
    with well_behaved(browser) as open_:
        yield open_


@contextmanager
def well_behaved(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens files as a reader would; at the end the test fails if a page said anything on the console, threw an
    error, or asked for anything but the file itself (the network is off)."""
    contexts, faults = [], []

    def open_(path: Path, **context: Any) -> Any:
        contexts.append(browser.new_context(offline=True, **{"viewport": DESKTOP, **context}))
        page = contexts[-1].new_page()
        address = path.absolute().as_uri()

        def asked(request: Any) -> None:
            if request.url.partition("#")[0] != address and not request.url.startswith(("data:", "blob:")):
                faults.append(f"request: {request.url}")

        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda message: faults.append(f"console {message.type}: {message.text}"))
        page.on("request", asked)
        page.goto(address)
        return page

    try:
        yield open_
    finally:
        for context in contexts:
            context.close()
    if faults:
        pytest.fail("; ".join(faults), pytrace=False)


def wider_than_the_screen(page: Any) -> float:
    """By how many CSS pixels the page must be scrolled sideways to be read; 0 where it fits."""
    overflow: float = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return overflow

"""A headless Chromium with the server's page, for tests. What a page must never do fails the test that opened it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # ms: the machine may be busy with other tests


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where Chromium or Playwright is missing."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    os.environ.setdefault("PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD", "1")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression holds. Playwright's own wait needs `eval`, which the page's policy forbids."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} did not come true"
        page.wait_for_timeout(50)


class Visit:
    """One visitor with storage of its own. `page` is Playwright's.

    refusals: whether responses of 400 and more are part of the test; the browser logs them as errors.
    """

    def __init__(
        self, browser: Any, url: str, *, refusals: bool = False, settings: dict[str, Any] | None = None, **options
    ):
        options = {"viewport": {"width": 1280, "height": 800}, "accept_downloads": True} | options
        self.url, self.refusals = url, refusals
        self.faults: list[str] = []
        self.bodies: list[tuple[str, dict[str, Any]]] = []  # path and JSON body of each POST to the API
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        if settings is not None:
            value = json.dumps(json.dumps(settings))
            script = f"localStorage.getItem('retnet.settings') ?? localStorage.setItem('retnet.settings', {value})"
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        expected = self.refusals and message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not expected:
            self.faults.append(f"console: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:" + self.url)):
            self.faults.append(f"another host: {request.url}")
        if request.method == "POST" and request.post_data and request.headers.get("content-type") == "application/json":
            self.bodies.append((request.url.removeprefix(self.url), json.loads(request.post_data)))

    def open(self, view: str = "chat") -> Any:
        """The page, once it knows the model."""
        self.page.goto(f"{self.url}/#{view}")
        until(self.page, "document.title !== 'RetNet'")
        return self.page

    def say(self, text: str) -> None:
        """Send a message by the keyboard, and wait for the end of the reply."""
        self.page.locator("#composer").fill(text)
        self.page.keyboard.press("Enter")
        self.page.locator("#send").wait_for()

    def sent(self, path: str) -> list[dict[str, Any]]:
        """The bodies that were posted to a path."""
        return [body for to, body in self.bodies if to == path]


@contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Visit]:
    """A visit whose faults fail the test: exceptions, console errors, requests to another host."""
    made = Visit(browser, url, **options)
    try:
        yield made
        assert made.faults == []
    finally:
        made.context.close()


def event_stream(*chunks: dict[str, Any], done: bool = True) -> str:
    """The body of a stream of events."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if done else "")


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a chat's stream."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}

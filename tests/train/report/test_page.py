"""The page: everything from data is escaped, nothing comes from outside, it is small."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from retnet.train.report.page import FINISHED, RUNNING, STOPPED, Page, render
from tests.serve.http.browser import chromium

HOSTILE = "<script>document.title='taken'</script>\"'><img src=x onerror=alert(1)></pre>&amp;\x00\x1b\u202e\udc80"
LOG = [
    {"step": 1, "loss": 5.0, "bits_per_byte": 8.0, "learning_rate": 0.1, "tokens_per_second": 10.0, "mfu": 0.5,
     "memory_gib": 0.25, "data_wait": 0.0, "grad_norm": 1.0},
    {"step": 2, "eval_loss": 4.0, "eval_perplexity": 54.6, "eval_bits_per_byte": 6.0},
    {"step": 2, "loss": 4.0, "bits_per_byte": 6.5, "learning_rate": 0.0},
]  # fmt: skip
PAGE = Page(
    title="Training of a model",
    status=RUNNING,
    note="",
    step=2,
    max_steps=4,
    tokens_per_step=1000,
    seconds=75.0,
    log=LOG,
    tables={"Data": [("text", "1 MB")]},
    settings={"seed": 0},
)


class Elements(HTMLParser):
    """Counts elements and collects the attributes that can load or run something."""

    def __init__(self, page: bytes):
        super().__init__()
        self.tags: list[str] = []
        self.loading: list[tuple[str, str | None]] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loading += [(k, v) for k, v in attrs if k in ("src", "href", "action", "style") or k.startswith("on")]


def text_of(page: Page) -> str:
    return render(page, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)).decode()


def test_a_page_shows_the_figures_of_its_log():
    text = text_of(PAGE)
    for shown in ("2 of 4", "1 min 15 s", "6.500", "6.000", "perplexity 54.60", "2026-01-02 03:04:05 UTC", "256 MiB"):
        assert shown in text
    assert "<td>2</td><td>2k</td><td>4.0000</td><td>54.600</td><td>6.0000</td>" in text


def test_everything_from_outside_is_escaped():
    hostile = replace(
        PAGE,
        title=HOSTILE,
        note=HOSTILE,
        tables={HOSTILE: [(HOSTILE, HOSTILE)]},
        settings={HOSTILE: HOSTILE},
        samples=[(HOSTILE, HOSTILE)],
        status=STOPPED,
    )
    found, plain = Elements(render(hostile)), Elements(render(replace(PAGE, status=STOPPED, samples=[("a", "b")])))
    assert found.tags == plain.tags
    assert found.loading == plain.loading == []


def test_a_page_reloads_only_while_training_runs():
    assert 'http-equiv="refresh"' in text_of(PAGE)
    for status in (FINISHED, STOPPED):
        assert 'http-equiv="refresh"' not in text_of(replace(PAGE, status=status))


def test_a_page_before_the_first_log_entry_says_so():
    assert "No step has been logged yet" in text_of(replace(PAGE, log=[], step=0))


def test_a_page_of_a_long_run_is_small():
    long = [{**entry, "step": step} for step in range(1, 20_000, 2) for entry in LOG[:2]]
    assert len(render(replace(PAGE, log=long, samples=[("a" * 10**6, "b" * 10**6)]))) < 400_000


@pytest.mark.slow
def test_a_browser_opens_it_from_a_disk_without_scripts_or_requests(tmp_path):
    hostile = replace(PAGE, note=HOSTILE, samples=[(HOSTILE, HOSTILE)], status=FINISHED)
    file = tmp_path / "report.html"
    file.write_bytes(render(hostile))
    with chromium() as browser:
        for scheme, width in (("light", 1200), ("dark", 390)):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
            requests, complaints = [], []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("console", lambda message, seen=complaints: seen.append(message.text))
            page.goto(file.as_uri())
            assert requests == [file.as_uri()]
            assert complaints == []
            assert page.title() == "Training of a model: finished"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 24, 30)"}[scheme]

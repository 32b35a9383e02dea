"""Completion with token probabilities, and the live view of the engine, in a real browser."""

from __future__ import annotations

import math

import pytest

from tests.serve.http.browser import event_stream, until, visit

pytestmark = pytest.mark.slow
PATH = "/v1/completions"


def complete(page, text: str) -> None:
    """Continue a text by the keyboard, and wait for the end."""
    page.locator("#prompt").fill(text)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('completion-stats').textContent.includes('ended')")
    page.locator("#complete").wait_for()


def test_every_token_is_coloured_by_the_probability_that_the_server_gives(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 20, "seed": 3}) as guest:
        page = guest.open("completion")
        complete(page, "def f():")
        [body] = guest.sent(PATH)
        assert body == {
            "model": "tiny",
            "prompt": "def f():",
            "max_tokens": 20,
            "seed": 3,
            "echo": True,
            "logprobs": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = page.evaluate(
            "(body) => fetch('v1/completions', { method: 'POST', headers: { 'Content-Type': 'application/json' },"
            " body: JSON.stringify(body) }).then((r) => r.json())",
            {**body, "stream": False, "stream_options": None},
        )
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        classes = [each.get_attribute("class").split() for each in page.locator("#tokens .token").all()]
        assert len(classes) == len(logprobs) == 28

        def shade(logprob: float | None) -> str:
            if logprob is None:
                return "unrated"
            return f"p{sum(math.exp(logprob) >= limit for limit in (0.05, 0.2, 0.5, 0.9))}"

        assert [each[1] for each in classes] == [shade(logprob) for logprob in logprobs]
        assert [i for i, each in enumerate(classes) if "begins" in each] == [8]
        assert "20 tokens" in page.locator("#completion-stats").inner_text()


def test_the_arrow_keys_show_alternatives_and_another_token_continues_the_text(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 8, "seed": 3}) as guest:
        page = guest.open("completion")
        complete(page, "abc")
        page.locator("#tokens").focus()
        for _ in range(2):
            page.keyboard.press("ArrowRight")
        card = page.locator("#token-detail")
        assert "token 3 of your text" in card.inner_text()
        active = page.locator("#tokens").get_attribute("aria-activedescendant")
        assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
        assert page.locator(f"#{active}").get_attribute("aria-label").startswith("c, ")
        assert card.get_by_role("meter").count() == 6  # five, and the token itself
        use = card.get_by_role("button").first
        other = use.get_attribute("aria-label").removeprefix("Use ").removesuffix(" instead")
        use.click()
        until(page, "document.getElementById('complete').hidden === false")
        assert guest.sent(PATH)[1]["prompt"][:2] == "ab"
        if len(other) == 1 and other.isascii():
            assert guest.sent(PATH)[1]["prompt"] == "ab" + other
        page.keyboard.press("End")


def test_characters_of_several_tokens_are_whole_and_alternatives_keep_the_text(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 4, "seed": 1}) as guest:
        page = guest.open("completion")
        complete(page, "größe 🙂 end")
        text = page.locator("#tokens").inner_text()
        for whole in ("ö", "ß", "🙂", " end"):
            assert whole in text
        page.locator("#tokens .token", has_text="d").first.click()
        page.locator("#token-detail button").first.click()
        until(page, "document.getElementById('complete').hidden === false")
        assert guest.sent(PATH)[1]["prompt"].startswith("größe 🙂 en")


def test_without_rating_the_text_only_new_tokens_are_shown(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 6, "seed": 1}) as guest:
        page = guest.open("completion")
        page.get_by_label("Rate the text itself too").uncheck()
        complete(page, "some text")
        assert guest.sent(PATH)[0]["echo"] is False
        assert page.locator("#tokens .token").count() == 6
        page.locator("#tokens .token").nth(0).hover()
        page.locator("#token-detail button").first.click()
        until(page, "document.getElementById('complete').hidden === false")
        assert guest.sent(PATH)[1]["prompt"].startswith("some text")


def test_an_empty_text_is_continued_and_escape_stops(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 50_000}) as guest:
        page = guest.open("completion")
        page.get_by_role("button", name="Continue text").click()
        until(page, "document.querySelectorAll('#tokens .token').length > 20")
        page.keyboard.press("Escape")
        page.locator("#complete").wait_for()
        assert "stopped" in page.locator("#completion-stats").inner_text()
        until(page, "fetch('v1/engine').then((r) => r.json()).then((state) => state.slots.running === 0)")


def test_hostile_tokens_stay_text(browser, server):
    token = "<img src=x onerror='window.hacked = 1'>"
    logprobs = {"tokens": [token], "token_logprobs": [-1.5], "top_logprobs": [{token: -1.5}], "text_offset": [1]}
    choice = {"index": 0, "text": "a" + token, "logprobs": logprobs, "finish_reason": "length"}
    with visit(browser, server.url) as guest:
        page = guest.open("completion")
        body = event_stream({"choices": [choice]})
        page.route("**" + PATH, lambda route: route.fulfill(content_type="text/event-stream", body=body))
        complete(page, "a")
        page.locator("#tokens .token").click()
        assert page.locator("#tokens").inner_text() == token
        assert token.replace(" ", "␣") in page.locator("#token-detail").inner_text()
        assert page.locator("#main img").count() == 0
        assert page.evaluate("window.hacked") is None


def test_the_engine_view_shows_what_the_engine_does(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 100_000}) as guest:
        page = guest.open()
        page.locator("#composer").fill("run")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Engine").click()
        until(page, "document.querySelector('.slots')?.getAttribute('aria-label')?.startsWith('1 of 4')")
        assert page.locator(".slot.busy").count() == 1
        until(page, "/^[1-9]/.test(document.querySelector('.tile .value').textContent)")
        until(page, "document.querySelectorAll('.chart polyline').length === 3")
        state = page.evaluate("fetch('v1/engine').then((r) => r.json())")
        crossing = state["memory"]["state_bytes_per_stream"] // state["memory"]["kv_cache_bytes_per_token"]
        assert f"Up to {crossing:,} tokens" in page.locator(".note").first.inner_text()
        assert "Misses" in page.locator("table").inner_text()
        page.get_by_role("link", name="Chat").click()
        page.keyboard.press("Escape")
        page.locator("#send").wait_for()


def test_a_server_that_is_gone_is_told_and_found_again(browser, server):
    with visit(browser, server.url, refusals=True) as guest:
        page = guest.open("engine")
        page.route("**/v1/engine", lambda route: route.abort("connectionrefused"))
        page.locator("#offline:not([hidden])").wait_for()
        assert "cannot be reached" in page.locator("#offline").inner_text()
        page.unroute("**/v1/engine")
        until(page, "document.getElementById('offline').hidden")

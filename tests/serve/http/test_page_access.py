"""The page for everyone: keyboard alone, names and roles, contrast, narrow screens, dark mode, less motion."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.http.browser import delta, event_stream, until, visit

pytestmark = pytest.mark.slow
SHORT = {"max_tokens": 24, "seed": 1}
LONG = "x" * 3000

PROBES = (Path(__file__).parent / "page_probes.js").read_text()


def probe(page, name: str, *arguments):
    """The result of one of the probes on the page."""
    return page.evaluate(f"({PROBES.strip()}).{name}({', '.join(map(str, arguments))})")


def scenes(guest):
    """Each view with content, and each panel and dialog that can lie over it: the page after each step."""
    page = guest.open()
    yield "welcome", page
    reply = f"# Title\n\nA `code` and **bold**.\n\n> quoted\n\n- item\n\n```python\n{LONG}\n```\n\n{LONG}"
    body = event_stream(delta(reply), delta("", "length"))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    guest.say(LONG)
    page.unroute("**/v1/chat/completions")
    yield "chat", page
    page.get_by_role("button", name="Edit").click()
    yield "edit", page
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Fork here").last.click()
    page.locator(".notice").wait_for()
    yield "fork", page
    error = {"message": "no place " + LONG, "code": None, "param": None}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": error}))
    guest.say("again")
    page.unroute("**/v1/chat/completions")
    yield "error", page
    if page.get_by_role("button", name="Conversations", exact=True).is_visible():
        page.get_by_role("button", name="Conversations", exact=True).click()
        yield "conversations", page
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("More settings").click()
    page.get_by_label("Top p").fill("7")
    yield "settings", page
    page.get_by_label("Top p").fill("")
    page.locator("#settings").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    yield "dialog", page
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Completion").click()
    page.locator("#prompt").fill("one " + "y" * 200)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('completion-stats').textContent.includes('ended')")
    page.locator("#tokens").focus()
    page.keyboard.press("ArrowRight")
    yield "completion", page
    page.get_by_role("link", name="Engine").click()
    until(page, "document.querySelectorAll('.chart polyline').length >= 2")
    yield "engine", page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_controls_have_names_in_every_view(browser, server, scheme):
    with visit(browser, server.url, settings=SHORT, refusals=True, color_scheme=scheme) as guest:
        seen = []
        for scene, page in scenes(guest):
            assert probe(page, "lowContrast", 4.5) == [], scene
            assert probe(page, "unnamed") == [], scene
            assert probe(page, "small") == [], scene
            seen.append(scene)
        assert len(seen) == 9


def test_the_contrast_check_finds_grey_on_white(browser, server):
    with visit(browser, server.url) as guest:
        page = guest.open()
        page.evaluate("document.getElementById('model-name').style.color = '#999999'")
        assert [text for _, _, text in probe(page, "lowContrast", 4.5)] == ["tiny"]


@pytest.mark.parametrize("width", [320, 360, 768])
def test_no_view_is_wider_than_a_phone(browser, server, width):
    size = {"width": width, "height": 640}
    with visit(browser, server.url, settings=SHORT, refusals=True, viewport=size, has_touch=True) as guest:
        seen = []
        for scene, page in scenes(guest):
            assert probe(page, "wide") == [], scene
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width, scene
            assert page.evaluate("document.scrollingElement.scrollHeight") <= 640, scene
            assert probe(page, "small") == [], scene
            seen.append(scene)
        assert len(seen) == 10


def test_everything_is_done_by_the_keyboard(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        page.keyboard.press("Tab")
        assert probe(page, "focused") == "skip"
        assert page.locator("#skip").bounding_box()["y"] >= 0
        page.keyboard.press("Enter")
        assert probe(page, "focused") == "composer"
        page.keyboard.type("hello")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you")
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        assert guest.sent("/v1/chat/completions")[0]["messages"][0]["content"] == "hello\nyou"
        assert probe(page, "focused") == "composer"
        page.keyboard.type("more")
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        for _ in range(2):
            page.keyboard.press("Shift+Tab")
        assert probe(page, "focused") == "Regenerate"
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        assert len(guest.sent("/v1/chat/completions")) == 3
        until(page, "document.activeElement.id === 'composer'")
        page.locator("#open-settings").focus()
        page.keyboard.press("Enter")
        assert probe(page, "focused") == "setting-temperature"


def test_tab_reaches_every_control_in_the_order_of_the_page_and_shows_where_it_is(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("hello")
        page.evaluate("document.activeElement.blur()")
        wanted = probe(page, "numbered")
        page.locator("#skip").focus()
        reached = []
        for _ in wanted:
            reached.append(page.evaluate("Number(document.activeElement.dataset.number)"))
            assert probe(page, "ringed"), probe(page, "focused")
            page.keyboard.press("Tab")
        assert reached == wanted


def test_panels_over_the_text_keep_the_focus_and_escape_gives_it_back(browser, server):
    with visit(browser, server.url, settings=SHORT, viewport={"width": 360, "height": 640}) as guest:
        page = guest.open()
        for name, panel in (("Settings", "settings"), ("Conversations", "conversations")):
            page.get_by_role("button", name=name, exact=True).click()
            for _ in range(30):
                page.keyboard.press("Tab")
                inside = (
                    "document.activeElement === document.body || !!document.activeElement.closest('#" + panel + "')"
                )
                assert page.evaluate(inside)
            page.keyboard.press("Escape")
            assert page.locator(f"#{panel}").is_hidden()
            assert probe(page, "focused") == f"open-{panel}"


def test_a_streamed_reply_is_announced_at_its_start_and_its_end_only(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 400, "seed": 1}) as guest:
        page = guest.open()
        page.evaluate(
            "window.told = []; new MutationObserver(() => { const text = document.getElementById('status').textContent;"
            " if (text) window.told.push(text) }).observe(document.getElementById('status'), { childList: true })"
        )
        guest.say("hello")
        until(page, "window.told.length >= 2")
        first, last = page.evaluate("window.told")
        assert first == "The model is writing"
        assert last.startswith("Reply: ")
        live = (
            "document.querySelectorAll('#messages [aria-live], #messages [role=status], #messages [role=log]').length"
        )
        assert page.evaluate(live) == 0


def test_the_theme_follows_the_system_until_one_is_chosen(browser, server):
    ground = "getComputedStyle(document.body).backgroundColor"
    with visit(browser, server.url, color_scheme="dark") as guest:
        page = guest.open()
        dark = page.evaluate(ground)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(ground)
        assert dark != light
        button = page.locator("#theme")
        button.click()
        assert button.inner_text() == "Theme: light"
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(ground) == light
        button.click()
        page.emulate_media(color_scheme="light")
        assert page.evaluate(ground) == dark
        page.reload()
        assert page.evaluate(ground) == dark
        assert page.locator("#theme").inner_text() == "Theme: dark"
        page.locator("#theme").click()
        assert page.evaluate(ground) == light


def test_less_motion_is_given_where_it_is_asked_for(browser, server):
    animated = "getComputedStyle(document.querySelector('.pulse')).animationName"
    for motion, name in (("no-preference", "pulse"), ("reduce", "none")):
        with visit(browser, server.url, reduced_motion=motion) as guest:
            page = guest.open()
            page.route("**/v1/chat/completions", lambda route: None)  # never answered
            page.locator("#composer").fill("hello")
            page.keyboard.press("Enter")
            page.locator(".pulse").wait_for()
            assert page.evaluate(animated) == name


def test_the_first_view_says_what_the_model_is(browser, server):
    with visit(browser, server.url) as guest:
        page = guest.open()
        state = page.evaluate("fetch('v1/engine').then((r) => r.json())")
        text = page.locator("#welcome").inner_text()
        assert page.locator("h1").inner_text() == "tiny"
        assert "the same memory and the same time per token at every length" in text
        assert f"{state['memory']['state_bytes_per_stream'] / 1024:.3g} KiB" in text
        assert page.title().startswith("tiny")

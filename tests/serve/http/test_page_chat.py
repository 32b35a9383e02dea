"""Conversations on the page, in a real browser: streaming, stopping, forks, states, settings, errors, hostile texts."""

from __future__ import annotations

import json

import pytest

from retnet.serve.http.settings import Settings
from tests.serve.http.browser import delta, event_stream, until, visit
from tests.serve.http.server import live_server

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
SHORT = {"max_tokens": 24, "seed": 1}
ENDLESS = {"max_tokens": 200_000}


def messages(page):
    return page.locator("#messages > li.message")


def sessions_of(page) -> list[dict]:
    return page.evaluate("fetch('v1/sessions?limit=100').then((r) => r.json()).then((list) => list.data)")


def wait_until_idle(page) -> None:
    until(
        page,
        "fetch('v1/engine').then((r) => r.json()).then((state) => state.slots.running + state.slots.waiting === 0)",
    )


def test_a_conversation_goes_on_from_its_state_and_outlives_a_reload(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("first\nline")
        guest.say("second")
        assert messages(page).count() == 4
        assert messages(page).nth(0).locator(".text").inner_text() == "first\nline"
        first, second = guest.sent(CHAT)
        assert first["messages"] == [{"role": "user", "content": "first\nline"}]
        assert "session_id" not in first
        assert second["messages"] == [{"role": "user", "content": "second"}]
        assert second["session_id"]
        assert first["keep_session"] is second["keep_session"] is True
        stats = messages(page).nth(3).locator(".stats").inner_text()
        assert "24 tokens" in stats
        assert "prompt tokens reused" in stats
        replies = [messages(page).nth(i).locator(".text").inner_text() for i in (1, 3)]
        page.reload()
        page.locator("#conversation-list .entry:not(.other)").first.click()
        assert [messages(page).nth(i).locator(".text").inner_text() for i in (1, 3)] == replies
        guest.say("third")
        assert "session_id" in guest.sent(CHAT)[2]
        assert "prompt tokens reused" in messages(page).nth(5).locator(".stats").inner_text()


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_a_reply_is_shown_while_it_is_written_and_stops(browser, server, by):
    with visit(browser, server.url, settings=ENDLESS) as guest:
        page = guest.open()
        page.locator("#composer").fill("go on")
        page.keyboard.press("Enter")
        body = messages(page).nth(1).locator(".text")
        until(page, "document.querySelectorAll('.assistant .text')[0]?.textContent.length > 100")
        before = len(body.text_content())
        until(page, f"document.querySelectorAll('.assistant .text')[0].textContent.length > {before}")
        assert page.locator("#send").is_hidden()
        if by == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        page.locator("#send").wait_for()
        wait_until_idle(page)
        kept = body.text_content()
        assert len(kept) > before
        assert "stopped" in messages(page).nth(1).locator(".stats").inner_text()
        page.wait_for_timeout(300)
        assert body.text_content() == kept


def test_a_stopped_part_is_read_again_and_the_state_before_it_is_reused(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("one")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max new tokens").fill("200000")
        page.locator("#composer").fill("two")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.assistant .text')[1]?.textContent.length > 50")
        page.keyboard.press("Escape")
        page.locator("#send").wait_for()
        page.get_by_label("Max new tokens").fill("24")
        guest.say("three")
        asked = guest.sent(CHAT)[2]
        assert [message["role"] for message in asked["messages"]] == ["user", "assistant", "user"]
        assert asked["session_id"]


def test_a_fork_at_the_last_message_starts_from_a_copy_of_its_state(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("origin")
        text = messages(page).nth(1).locator(".text").inner_text()
        messages(page).nth(1).get_by_role("button", name="Fork here").click()
        notice = page.locator(".notice")
        notice.wait_for()
        assert "so that none of them is read again" in notice.inner_text()
        assert page.locator("#conversation-list .entry:not(.other)").count() == 2
        guest.say("branch")
        assert guest.sent(CHAT)[1]["messages"] == [{"role": "user", "content": "branch"}]
        page.locator("#conversation-list .entry:not(.other)", has_not_text="(fork)").click()
        assert messages(page).count() == 2
        assert messages(page).nth(1).locator(".text").inner_text() == text
        guest.say("trunk")
        assert guest.sent(CHAT)[2]["session_id"] != guest.sent(CHAT)[1]["session_id"]


def test_a_fork_at_an_earlier_message_and_at_one_of_the_user(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("one")
        guest.say("two")
        messages(page).nth(1).get_by_role("button", name="Fork here").click()
        page.locator(".notice").wait_for()
        assert messages(page).count() == 2
        page.locator("#conversation-list .entry:not(.other)", has_not_text="(fork)").click()
        messages(page).nth(2).get_by_role("button", name="Fork here").click()
        page.locator(".notice").wait_for()
        assert messages(page).count() == 2
        assert page.locator("#composer").input_value() == "two"
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        assert guest.sent(CHAT)[2]["session_id"]


def test_regenerating_and_editing_go_on_from_the_state_before(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 24, "temperature": 1}) as guest:
        page = guest.open()
        guest.say("one")
        guest.say("two")
        page.get_by_role("button", name="Regenerate").click()
        page.locator("#send").wait_for()
        again = guest.sent(CHAT)[2]
        assert again["messages"] == [{"role": "user", "content": "two"}]
        assert again["session_id"]
        messages(page).nth(2).get_by_role("button", name="Edit").click()
        page.get_by_label("Edit your message").fill("zwei")
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        assert guest.sent(CHAT)[3]["messages"] == [{"role": "user", "content": "zwei"}]
        assert page.locator("#conversation-list .entry:not(.other)").count() == 1
        messages(page).nth(0).get_by_role("button", name="Edit").click()
        page.get_by_label("Edit your message").fill("eins")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('#conversation-list .entry:not(.other)').length === 2")
        page.locator("#send").wait_for()
        assert messages(page).nth(0).locator(".text").inner_text() == "eins"
        assert "session_id" not in guest.sent(CHAT)[4]
        page.locator("#conversation-list .entry:not(.other)", has_not_text="(fork)").click()
        assert messages(page).nth(2).locator(".text").inner_text() == "zwei"


def test_an_expired_state_is_told_and_the_text_is_read_again(browser, server):
    with visit(browser, server.url, settings=SHORT, refusals=True) as guest:
        page = guest.open()
        guest.say("one")
        page.evaluate(
            "fetch('v1/sessions?limit=100').then((r) => r.json()).then((list) => Promise.all(list.data.map((s) =>"
            " fetch('v1/sessions/' + s.id, { method: 'DELETE' }))))"
        )
        guest.say("two")
        assert len(guest.sent(CHAT)[1]["messages"]) == 3
        assert "the stored state had expired" in messages(page).nth(3).locator(".stats").inner_text()


def test_states_of_old_messages_and_of_deleted_conversations_leave_the_server(browser):
    with live_server(max_tokens=None) as server, visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        for i in range(6):
            guest.say(f"message {i}")
        until(page, "fetch('v1/sessions').then((r) => r.json()).then((list) => list.data.length === 4)")
        page.get_by_role("button", name="Delete", exact=True).click()
        page.locator("#confirm-dialog").get_by_role("button", name="Delete").click()
        until(page, "fetch('v1/sessions').then((r) => r.json()).then((list) => list.data.length === 0)")
        assert page.locator("#conversation-list .entry:not(.other)").count() == 0
        assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_a_state_is_downloaded_and_uploaded_with_its_messages(browser, server, tmp_path):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        guest.say("keep me")
        page.locator("#conversation-name").fill("A name: <b>")
        page.keyboard.press("Enter")
        with page.expect_download() as started:
            page.get_by_role("button", name="Download state").click()
        assert started.value.suggested_filename == "A name b.safetensors"
        path = tmp_path / "state.safetensors"
        started.value.save_as(path)
        page.locator("#upload-file").set_input_files(path)
        until(page, "document.querySelectorAll('#conversation-list .entry:not(.other)').length >= 2")
        until(page, "document.getElementById('conversation-name').value === 'state'")
        assert messages(page).nth(0).locator(".text").inner_text() == "keep me"
        guest.say("go on")
        assert guest.sent(CHAT)[1]["messages"] == [{"role": "user", "content": "go on"}]
        assert "prompt tokens reused" in messages(page).last.locator(".stats").inner_text()


def test_a_file_that_is_no_state_is_refused_where_it_was_chosen(browser, server, tmp_path):
    path = tmp_path / "no.safetensors"
    path.write_bytes(b"not a state")
    with visit(browser, server.url, refusals=True) as guest:
        page = guest.open()
        page.locator("#upload-file").set_input_files(path)
        until(page, "!['', 'Uploading 11 bytes …'].includes(document.getElementById('list-note').textContent)")
        assert page.locator("#conversation-list .entry:not(.other)").count() == 0


def test_settings_are_sent_as_shown_and_empty_ones_are_not(browser, server):
    with visit(browser, server.url) as guest:
        page = guest.open()
        page.get_by_role("button", name="Settings").click()
        page.get_by_text("More settings").click()
        shown = {
            "Temperature": ("temperature", 0.5),
            "Top p": ("top_p", 0.9),
            "Max new tokens": ("max_tokens", 7),
            "Seed": ("seed", 12),
            "Top k": ("top_k", 40),
            "Min p": ("min_p", 0.01),
            "Repetition penalty": ("repetition_penalty", 1.1),
            "Presence penalty": ("presence_penalty", 0.25),
            "Frequency penalty": ("frequency_penalty", -0.5),
        }
        for label, (_, value) in shown.items():
            page.get_by_label(label, exact=True).fill(str(value))
        page.get_by_label("Stop strings").fill("\\n\\n\nEND")
        page.get_by_label("System prompt").fill("Be brief.")
        guest.say("hello")
        [body] = guest.sent(CHAT)
        fixed = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "keep_session": True}
        assert body == fixed | dict(shown.values()) | {
            "stop": ["\n\n", "END"],
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        }
        page.reload()
        page.get_by_role("button", name="Settings").click()
        page.get_by_text("More settings").click()
        assert page.get_by_label("Top k").input_value() == "40"
        for label in shown:
            if label != "Max new tokens":
                page.get_by_label(label, exact=True).fill("")
        page.get_by_label("Stop strings").fill("")
        page.get_by_label("System prompt").fill("")
        guest.say("again")
        assert guest.sent(CHAT)[1] == fixed | {"max_tokens": 7, "messages": [{"role": "user", "content": "again"}]}


def test_a_wrong_setting_is_told_at_its_field_by_the_page_and_by_the_server(browser, server):
    with visit(browser, server.url, refusals=True) as guest:
        page = guest.open()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Top p").fill("2")
        assert page.get_by_label("Top p").get_attribute("aria-invalid") == "true"
        page.locator("#composer").fill("hello")
        page.keyboard.press("Enter")
        assert guest.sent(CHAT) == []
        assert page.evaluate("document.activeElement.name") == "top_p"
        assert page.locator("#composer").input_value() == "hello"
        page.get_by_label("Top p").fill("1")
        error = {"message": "top_p is too odd; accepted: even", "type": "invalid_request_error", "param": "top_p"}
        page.route("**" + CHAT, lambda route: route.fulfill(status=400, json={"error": {**error, "code": None}}))
        guest.say("hello")
        assert page.locator("#setting-top_p-error").inner_text() == error["message"]
        assert error["message"] in messages(page).nth(1).inner_text()


HOSTILE = [
    "<img src=x onerror='window.hacked = 1'>",
    "<script>window.hacked = 2</script>",
    "[click](javascript:window.hacked=3)",
    "```html\n<iframe srcdoc='<script>parent.hacked = 4</script>'></iframe>\n```",
    "# <svg onload=window.hacked=5>",
    "- **<b onmouseover=window.hacked=6>x</b>**",
    "</article></li><style>* { display: none }</style>",
]


def test_hostile_texts_of_model_and_user_stay_text(browser, server):
    with visit(browser, server.url) as guest:
        page = guest.open()
        reply = "\n\n".join(HOSTILE)
        body = event_stream(delta(reply[:70]), delta(reply[70:]), delta("", "stop"))
        page.route("**" + CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))
        guest.say("\n".join(HOSTILE))
        page.locator("#conversation-name").fill(HOSTILE[0])
        page.keyboard.press("Enter")
        messages(page).nth(0).get_by_role("button", name="Fork here").click()
        page.reload()
        page.locator("#conversation-list .entry:not(.other)").last.click()
        assert messages(page).nth(0).locator(".text").inner_text() == "\n".join(HOSTILE)
        text = messages(page).nth(1).locator(".text").text_content()
        for piece in (
            HOSTILE[0],
            HOSTILE[1],
            HOSTILE[2],
            "<iframe srcdoc=",
            "<svg onload=window.hacked=5>",
            HOSTILE[6],
        ):
            assert piece in text
        assert page.locator("#messages").locator("img, script, iframe, style, b, a, svg").count() == 0
        assert page.locator("#conversation-list img").count() == 0
        assert page.evaluate("window.hacked") is None


def test_markdown_is_shown_and_odd_marks_stay_text(browser, server):
    reply = (
        "# Title\n\nA *word* and **two** `code <b>` but 2 * 3 * 4, snake_case and **open.\n\n"
        "- one\n- two\n  more\n1. three\n\n> quoted\n\n```python\nif a < b:\n    pass\n```\n\nlast\n\n```\nopen"
    )
    with visit(browser, server.url) as guest:
        page = guest.open()
        body = event_stream(*(delta(character) for character in reply), delta("", "stop"))
        page.route("**" + CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))
        guest.say("markdown")
        text = messages(page).nth(1).locator(".text")
        assert text.get_by_role("heading", name="Title").count() == 1
        assert text.locator("em").all_inner_texts() == ["word"]
        assert text.locator("strong").all_inner_texts() == ["two"]
        assert text.locator("p code").all_inner_texts() == ["code <b>"]
        assert "2 * 3 * 4, snake_case and **open." in text.inner_text()
        assert text.get_by_role("listitem").count() == 3
        assert text.locator("blockquote").inner_text() == "quoted"
        assert text.locator("pre").all_inner_texts() == ["if a < b:\n    pass", "open"]


def test_a_long_text_full_of_marks_is_shown_in_time(browser, server):
    with visit(browser, server.url) as guest:
        page = guest.open()
        marks = "*a" * 20_000 + "`" * 20_001 + "**b " * 20_000 + "> " * 5_000
        body = event_stream(delta(marks), delta("", "stop"))
        page.route("**" + CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))
        guest.say("marks")
        took = page.evaluate(
            "async (text) => { const { blocks, inline } = await import('/page/markdown.js');"
            " const began = performance.now(); blocks(text).forEach((block) => inline(block.source));"
            " return performance.now() - began }",
            marks * 4,
        )
        assert took < 5000


@pytest.mark.parametrize(
    ("status", "headers", "told"),
    [
        (429, {"Retry-After": "7"}, "Try again in 7 s."),
        (500, {}, "the server's log says more"),
        (400, {}, "Fork at an earlier message"),
    ],
)
def test_a_refusal_is_shown_under_the_message_with_what_to_do(browser, server, status, headers, told):
    error = {"message": "a reason", "code": "context_length_exceeded" if status == 400 else None, "param": None}
    with visit(browser, server.url, settings=SHORT, refusals=True) as guest:
        page = guest.open()
        page.route("**" + CHAT, lambda route: route.fulfill(status=status, headers=headers, json={"error": error}))
        guest.say("hello")
        box = messages(page).nth(1).get_by_role("alert")
        assert "a reason" in box.inner_text()
        assert told in box.inner_text()
        page.unroute("**" + CHAT)
        box.get_by_role("button", name="Try again").click()
        page.locator(".assistant .stats").wait_for()
        assert messages(page).count() == 2
        assert page.locator(".error").count() == 0


@pytest.mark.parametrize("how", ["error event", "cut", "unreachable"])
def test_a_reply_that_breaks_off_keeps_its_text_and_says_so(browser, server, how):
    failed = {"error": {"message": "logits are not finite", "type": "server_error", "param": None, "code": None}}
    with visit(browser, server.url, refusals=True) as guest:
        page = guest.open()

        def answer(route):
            if how == "unreachable":
                route.abort("connectionrefused")
            else:
                chunks = [delta("a part")] + ([failed] if how == "error event" else [])
                route.fulfill(content_type="text/event-stream", body=event_stream(*chunks, done=False))

        page.route("**" + CHAT, answer)
        guest.say("hello")
        told = {
            "error event": "logits are not finite",
            "cut": "The connection ended before the answer did.",
            "unreachable": "The server cannot be reached.",
        }[how]
        reply = messages(page).nth(1)
        assert told in reply.get_by_role("alert").inner_text()
        if how != "unreachable":
            assert reply.locator(".text").inner_text() == "a part"
        page.reload()
        page.locator("#conversation-list .entry:not(.other)").first.click()
        assert told in messages(page).nth(1).get_by_role("alert").inner_text()


def test_a_page_that_is_closed_while_a_reply_is_written_keeps_the_part(browser, server):
    with visit(browser, server.url, settings=ENDLESS) as guest:
        page = guest.open()
        page.locator("#composer").fill("go on")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.assistant .text')[0]?.textContent.length > 100")
        page.reload()
        wait_until_idle(page)
        page.locator("#conversation-list .entry:not(.other)").first.click()
        assert len(messages(page).nth(1).locator(".text").text_content()) > 100
        told = messages(page).nth(1).inner_text()  # by the page that ends, or by the one that finds it
        assert "The connection broke off." in told or "broken off when the page was closed" in told


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(browser, tmp_path):
    path = tmp_path / "keys"
    path.write_text("me:a-key-that-is-long-enough-0123456789\n")
    path.chmod(0o600)
    key = "a-key-that-is-long-enough-0123456789"
    settings = Settings(api_key_file=path)
    with (
        live_server(settings, max_tokens=None) as server,
        visit(browser, server.url, settings=SHORT, refusals=True) as guest,
    ):
        page = guest.page
        page.goto(server.url)
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-error').textContent !== ''")
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        until(page, "document.title !== 'RetNet'")
        guest.say("hello")
        assert messages(page).count() == 2
        assert page.locator(".error").count() == 0
        assert page.evaluate("JSON.stringify(sessionStorage)").count(key) == 1
        assert key not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert key not in page.content()
        page.reload()
        until(page, "document.title !== 'RetNet'")
        assert dialog.count() == 0
        other = guest.context.new_page()  # another tab has no key
        other.goto(server.url)
        other.get_by_role("dialog").wait_for()
        other.get_by_role("button", name="Cancel").click()
        other.locator("#offline:not([hidden])").wait_for()
        assert "key" in other.locator("#offline").inner_text()
        other.wait_for_timeout(2500)  # the page asks for the engine's state again, but not for the key
        assert other.get_by_role("dialog").count() == 0
        other.get_by_role("button", name="Try again").click()
        other.get_by_role("dialog").get_by_label("API key").fill(key)
        other.keyboard.press("Enter")
        until(other, "document.getElementById('offline').hidden")


def test_a_reply_goes_on_while_another_conversation_is_shown(browser, server):
    with visit(browser, server.url, settings={"max_tokens": 1500}) as guest:
        page = guest.open()
        page.locator("#composer").fill("long")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="New conversation").click()
        assert messages(page).count() == 0
        assert "writing" in page.locator("#conversation-list .entry:not(.other)").first.inner_text()
        assert page.locator("#send").is_visible()
        until(page, "!document.getElementById('conversation-list').textContent.includes('writing')")
        page.locator("#conversation-list .entry:not(.other)").first.click()
        assert "1,500 tokens" in messages(page).nth(1).locator(".stats").inner_text()


def test_a_full_storage_is_told_and_the_conversation_goes_on(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        page.evaluate(
            "() => { let text = 'x'.repeat(1 << 20); for (let i = 0; text.length > 8; i++) {"
            " try { localStorage.setItem('full' + i, text) } catch { text = text.slice(text.length / 2) } } }"
        )
        guest.say("hello")
        guest.say("more")
        assert messages(page).count() == 4
        assert "no room" in page.locator("#list-note").inner_text()


def test_requests_carry_no_more_than_the_page_says(browser, server):
    with visit(browser, server.url, settings=SHORT) as guest:
        page = guest.open()
        headers = []
        page.on("request", lambda request: headers.append(request.all_headers()))
        guest.say("hello")
        assert all("cookie" not in each and "referer" not in each for each in headers)
        assert json.loads(page.evaluate("localStorage.getItem('retnet.settings')"))["seed"] == 1

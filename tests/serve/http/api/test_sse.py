"""Responses of server-sent events, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from retnet.serve.http.api.sse import EventStream, event
from retnet.serve.http.errors import ApiError


class Held:
    """A stream that counts how often it was cancelled."""

    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


class Client:
    """What a response sends; each event is taken after a pause."""

    def __init__(self, pause: float = 0):
        self.messages: list[dict] = []
        self._pause = pause

    async def send(self, message) -> None:
        await asyncio.sleep(self._pause if message.get("body") else 0)
        self.messages.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


async def run(events: AsyncGenerator[bytes, None], client: Client, held: Held, **options) -> None:
    await EventStream(events, [held], **options)({}, None, client.send)  # type: ignore[arg-type]


def test_events_are_lines_of_ascii_json():
    assert event({"text": "a\n\u2028€"}) == b'data: {"text":"a\\n\\u2028\\u20ac"}\n\n'


def test_a_response_ends_after_its_last_event_and_its_streams_with_it():
    async def events():
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    client, held = Client(), Held()
    asyncio.run(run(events(), client, held))
    assert client.text == "data: 1\n\ndata: 2\n\n"
    assert client.messages[0]["status"] == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert client.messages[-1]["more_body"] is False
    assert held.cancelled == 1


def test_comments_keep_a_connection_alive_while_nothing_is_sent():
    async def events():
        await asyncio.sleep(0.1)
        yield b"data: 1\n\n"

    client = Client()
    asyncio.run(run(events(), client, Held(), keep_alive=0.02))
    before, _, after = client.text.partition("data: 1\n\n")
    assert 1 <= before.count(": keep-alive\n\n") <= 5
    assert after == ""


def test_a_client_that_does_not_read_gets_no_comments():
    async def events():
        yield b"data: 1\n\n"

    client = Client(pause=0.1)
    asyncio.run(run(events(), client, Held(), keep_alive=0.02))
    assert client.text == "data: 1\n\n"


def test_an_error_is_the_last_event():
    async def events():
        yield b"data: 1\n\n"
        raise ApiError(500, "not finite")

    client, held = Client(), Held()
    asyncio.run(run(events(), client, held))
    first, error, rest = client.text.split("\n\n")
    assert first == "data: 1"
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "not finite"
    assert rest == ""
    assert client.messages[-1]["more_body"] is False
    assert held.cancelled == 1


def test_an_unexpected_error_reaches_the_guard_and_frees_the_streams():
    async def events():
        yield b"data: 1\n\n"
        raise RuntimeError("a fault of ours")

    client, held = Client(), Held()
    with pytest.raises(RuntimeError, match="a fault of ours"):
        asyncio.run(run(events(), client, held))
    assert held.cancelled == 1


@pytest.mark.parametrize("num_events", [0, 1])
def test_a_response_that_is_cancelled_closes_its_events_and_streams(num_events):
    """While it waits for its first event, or for another one."""
    closed = []

    async def main() -> None:
        async def events():
            try:
                for _ in range(num_events):
                    yield b"data: 1\n\n"
                await asyncio.sleep(60)
            finally:
                closed.append(True)

        client, held = Client(), Held()
        task = asyncio.ensure_future(run(events(), client, held))
        while len(client.messages) < 1 + num_events:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.cancelled == 1
        assert closed == [True]
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())

"""Exchanges whose client leaves: before it has all bytes of the response, and after."""

from __future__ import annotations

import asyncio

import pytest

from retnet.serve.http.access.exchange import Exchange

START = {"type": "http.response.start", "status": 200}


def gone(headers: list[tuple[bytes, bytes]], sent: bytes) -> tuple[bool, bool]:
    """(gone, cancelled) after the client left, once `sent` was sent and the end was still to come."""

    async def play() -> tuple[bool, bool]:
        leaves = asyncio.Event()
        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            pass

        async def serve() -> bool:
            exchange = Exchange({"type": "http", "method": "GET", "headers": []}, receive, send, (), 100, 5.0)
            cancelled = False
            try:
                await exchange.read_body()
                await exchange.send({**START, "headers": headers})
                await exchange.send({"type": "http.response.body", "body": sent, "more_body": True})
                leaves.set()
                await asyncio.sleep(0.05)
                await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
            except asyncio.CancelledError:
                cancelled = True
            finally:
                exchange.close()
            return exchange.gone, cancelled

        return await asyncio.create_task(serve())

    return asyncio.run(play())


@pytest.mark.parametrize("name", [b"content-length", b"Content-Length"])
def test_a_client_that_has_all_bytes_is_not_gone(name):
    assert gone([(name, b"5")], b"12345") == (False, False)


@pytest.mark.parametrize("headers", [[(b"content-length", b"6")], []])
def test_a_client_that_leaves_before_the_end_is_gone(headers):
    assert gone(headers, b"12345") == (True, True)

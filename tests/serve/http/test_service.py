"""The service: requests of an event loop through an engine on its own thread."""

from __future__ import annotations

import asyncio

from retnet.models.decode.sampling import Sampling
from retnet.serve.request import Request
from tests.serve.http.server import tiny_server, tiny_service

GREEDY = Sampling(temperature=0)


def test_a_stream_gives_the_tokens_of_the_engine_alone():
    service = tiny_service()
    expected = service.engine.submit(Request([1, 2, 3], 20, GREEDY))
    service.engine.run()

    async def use() -> list[int]:
        async with await service.submit(Request([1, 2, 3], 20, GREEDY)) as stream:
            pieces = [piece async for piece in stream]
        assert [piece.finish_reason for piece in pieces][-1] == "length"
        return [token for piece in pieces for token in piece.tokens]

    service.start()
    try:
        assert asyncio.run(use()) == expected.tokens
    finally:
        service.stop()


def test_health_models_and_version():
    with tiny_server() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert "version" in client.get("/version").json()

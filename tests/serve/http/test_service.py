"""The service: requests of an event loop through an engine on its own thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Piece, Service, Stream
from retnet.serve.http.settings import Settings
from retnet.serve.request import Request, Status
from tests.serve.http.server import tiny_service

GREEDY = Sampling(temperature=0)


def endless(prompt: list[int] | None = None, **options: Any) -> Request:
    return Request(prompt or [1, 2, 3], None, GREEDY, ignore_eos=True, **options)


@asynccontextmanager
async def running(settings: Settings | None = None, **options: Any) -> AsyncIterator[Service]:
    service = tiny_service(settings, **({"max_tokens": None} | options))
    service.start()
    try:
        yield service
    finally:
        await asyncio.to_thread(service.stop)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.001)


async def pieces_of(stream: Stream) -> list[Piece]:
    async with stream:
        return [piece async for piece in stream]


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def free(service: Service) -> bool:
    pool = service.engine.pool
    return not service.num_streams and pool.num_free == pool.num_slots


def of_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs in an event loop, with the time that it may take."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    run.__name__ = test.__name__
    return run


@of_loop
async def test_streams_give_the_tokens_of_the_engine_alone():
    requests = [
        Request([1, 2, 3 + i], 20, Sampling(seed=i, logprobs=2 if i % 2 else None), ignore_eos=True) for i in range(9)
    ]
    service = tiny_service()
    alone = [service.engine.submit(request) for request in requests]
    service.engine.run()
    async with running() as service:
        streams = await asyncio.gather(*map(service.submit, requests))
        outputs = await asyncio.gather(*map(pieces_of, streams))
    for expected, pieces in zip(alone, outputs):
        assert tokens_of(pieces) == expected.tokens
        assert [logprob for piece in pieces for logprob in piece.logprobs] == expected.logprobs
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


@of_loop
async def test_a_slow_reader_gets_several_tokens_in_one_piece_and_none_twice():
    async with running() as service:
        stream = await service.submit(Request([1], 50, GREEDY, ignore_eos=True))
        await until(lambda: stream.ended)
        pieces = await pieces_of(stream)
    assert [len(piece.tokens) for piece in pieces] == [50]


@of_loop
async def test_nothing_comes_after_the_last_piece():
    async with running() as service:
        stream = await service.submit(Request([1], 2, GREEDY, ignore_eos=True))
        assert len(tokens_of(await pieces_of(stream))) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@of_loop
async def test_leaving_a_stream_cancels_its_request_in_the_queue_in_prefill_and_in_decoding():
    async with running(num_slots=1, prompt_chunk=64) as service:
        decoding = await service.submit(endless())
        waiting = await service.submit(endless())
        await anext(decoding)
        assert waiting.generation.status is Status.WAITING
        waiting.cancel()
        await until(lambda: waiting.ended)
        decoding.cancel()
        reading = await service.submit(endless([1] * 200_000))
        await until(lambda: reading.generation.status is Status.READING)
        reading.cancel()
        reading.cancel()
        await until(lambda: free(service))
    assert [(await pieces_of(each))[-1].finish_reason for each in (decoding, waiting, reading)] == ["cancelled"] * 3


@of_loop
async def test_a_caller_that_is_cancelled_while_it_submits_leaves_no_request():
    async with running() as service:
        going_on = threading.Event()
        blocked = asyncio.create_task(service.call(lambda _: going_on.wait(10)))
        submitting = asyncio.create_task(service.submit(endless()))
        await asyncio.sleep(0.01)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        going_on.set()
        assert await blocked
        await service.call(lambda _: None)
        await until(lambda: free(service))
        assert service.engine.stats().new_tokens <= 1


@of_loop
async def test_cancelling_races_with_finishing_and_a_request_ends_once():
    ends: list[Stream] = []
    async with running() as service:
        service.observers.append(ends.append)
        streams = []
        for i in range(120):
            stream = await service.submit(Request([1], 3, GREEDY, ignore_eos=True))
            streams.append(stream)
            if i % 3 == 0:
                await anext(stream)
            elif i % 3 == 1:
                await until(lambda stream=stream: stream.generation.num_new == 3)
            stream.cancel()
        await until(lambda: free(service))
        await service.call(lambda _: None)
    assert len(ends) == len(set(map(id, ends))) == 120
    for stream in streams:
        reason, count = stream.generation.finish_reason, stream.generation.num_new
        assert (reason == "length") == (count == 3)
        assert reason in ("length", "cancelled")


@of_loop
async def test_a_full_queue_is_a_429_and_takes_requests_again_when_one_has_left():
    async with running(Settings(max_waiting=1), num_slots=1) as service:
        streams = [await service.submit(endless()) for _ in range(2)]
        with pytest.raises(ApiError, match="2 requests run or wait") as caught:
            await service.submit(endless())
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        streams[0].cancel()
        await until(lambda: service.num_streams == 1)
        streams.append(await service.submit(endless()))
        for stream in streams:
            stream.cancel()


@of_loop
async def test_what_the_engine_cannot_serve_is_a_400():
    async with running() as service:
        for request in (Request([1, 500], 5), Request([], 5)):
            with pytest.raises(ApiError) as caught:
                await service.submit(request)
            assert caught.value.status == 400


@of_loop
async def test_calls_run_between_steps_and_hand_over_results_and_errors():
    async with running() as service:
        stream = await service.submit(endless())
        await anext(stream)
        snapshot = await service.call(lambda engine: engine.snapshot(stream.generation))
        thread = await service.call(lambda _: threading.current_thread().name)
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda _: 1 / 0)
        stream.cancel()
        copy = await service.submit(Request([], 5, GREEDY, ignore_eos=True), snapshot)
        assert len(tokens_of(await pieces_of(copy))) == 5
    assert thread == "retnet engine"


def test_a_failed_step_ends_its_requests_and_the_service_goes_on(monkeypatch, caplog):
    async def check() -> None:
        async with running() as service:
            step = service.engine._step

            def fail(*_: object) -> None:
                monkeypatch.undo()
                raise RuntimeError("out of memory")

            monkeypatch.setattr(type(step), "__call__", fail)
            last = (await pieces_of(await service.submit(endless())))[-1]
            assert last.finish_reason == "failed"
            assert "out of memory" in (last.error or "")
            assert len(tokens_of(await pieces_of(await service.submit(Request([1], 5, GREEDY, ignore_eos=True))))) == 5
            assert service.alive

    asyncio.run(check())
    assert "a step of the engine failed" in caplog.text


def test_steps_that_go_on_failing_end_all_requests_and_do_not_spin(monkeypatch):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("broken")

    async def check() -> None:
        async with running() as service:
            monkeypatch.setattr(service.engine, "step", fail)
            streams = [await service.submit(endless()) for _ in range(6)]
            for stream in streams:
                assert (await pieces_of(stream))[-1].error == "the engine failed: RuntimeError"
            count = len(calls)
            await asyncio.sleep(0.05)
            assert len(calls) == count
            monkeypatch.undo()
            assert len(tokens_of(await pieces_of(await service.submit(Request([1], 5, GREEDY, ignore_eos=True))))) == 5

    asyncio.run(check())


def test_the_end_of_the_thread_fails_what_runs_and_what_comes(monkeypatch):
    failed = threading.Event()

    def die() -> None:
        raise SystemExit

    async def check() -> None:
        async with running() as service:
            service.on_failure = failed.set
            stream = await service.submit(endless())
            await anext(stream)
            monkeypatch.setattr(service.engine, "step", die)
            last = (await pieces_of(stream))[-1]
            assert (last.finish_reason, last.error) == ("failed", "the engine does not run")
            assert failed.wait(5)
            assert not service.alive
            for late in (service.submit(endless()), service.call(lambda _: 1)):
                with pytest.raises(ApiError) as caught:
                    await late
                assert caught.value.status == 503

    asyncio.run(check())


@of_loop
async def test_a_request_with_values_that_are_not_finite_fails_alone():
    async with running() as service:
        first, second = [await service.submit(Request([1, 2], 30, GREEDY, ignore_eos=True)) for _ in range(2)]
        await anext(first)

        def poison(engine: Any) -> None:
            slot = first.generation.slot
            for layer in engine.pool.state:
                for x in layer.tensors().values():
                    if x.is_floating_point():
                        x[slot] = torch.nan

        await service.call(poison)
        last = (await pieces_of(first))[-1]
        assert last.finish_reason == "failed"
        assert "not finite" in (last.error or "")
        assert (await pieces_of(second))[-1].finish_reason == "length"


@of_loop
async def test_ending_all_cuts_what_keeps_its_state_and_ends_the_rest_with_an_error():
    async with running(num_slots=1) as service:
        kept, waiting = await service.submit(endless(keep_state=True)), await service.submit(endless(keep_state=True))
        await anext(kept)
        await service.end_all("the server is shutting down")
        last, lost = (await pieces_of(kept))[-1], (await pieces_of(waiting))[-1]
        assert (last.finish_reason, last.error) == ("length", None)
        assert (lost.finish_reason, lost.error) == ("cancelled", "the server is shutting down")
        snapshot = kept.generation.snapshot
        assert snapshot is not None
        more = await service.submit(Request([], 5, GREEDY, ignore_eos=True), snapshot)
        output = [*kept.generation.tokens, *tokens_of(await pieces_of(more))]
        whole = await service.submit(Request([1, 2, 3], len(output), GREEDY, ignore_eos=True))
        assert tokens_of(await pieces_of(whole)) == output


@of_loop
async def test_stopping_ends_what_runs():
    service = tiny_service(max_tokens=None)
    service.start()
    stream = await service.submit(endless())
    await asyncio.to_thread(service.stop)
    assert (await pieces_of(stream))[-1].error == "the server is shutting down"
    with pytest.raises(ApiError):
        await service.submit(endless())


@of_loop
async def test_tokens_do_not_wait_for_a_long_call():
    async with running() as service:
        stream = await service.submit(endless())
        seen = threading.Event()
        generated: list[int] = []
        read: list[int] = []

        def wait(_: object) -> bool:
            generated.extend(stream.generation.tokens)
            return seen.wait(5)

        async def collect() -> None:
            async for piece in stream:
                read.extend(piece.tokens)

        collecting = asyncio.create_task(collect())
        await until(lambda: len(read) > 3)
        waiting = asyncio.create_task(service.call(wait))
        await until(lambda: generated and read == generated)
        seen.set()
        assert await waiting
        stream.cancel()
        await collecting


@of_loop
async def test_an_idle_service_does_nothing():
    async with running() as service:
        await pieces_of(await service.submit(Request([1], 3, GREEDY)))
        steps, busy = service.engine.stats().steps, time.process_time()
        await asyncio.sleep(0.2)
        assert service.engine.stats().steps == steps
        assert time.process_time() - busy < 0.1
        assert service.step_seconds == 0


def test_two_services_in_one_process_and_two_loops_on_one_service():
    results = []

    def use(service: Service) -> None:
        async def ask() -> list[int]:
            return tokens_of(await pieces_of(await service.submit(Request([1, 2], 30, GREEDY, ignore_eos=True))))

        results.append(asyncio.run(ask()))

    services = [tiny_service(), tiny_service()]
    for service in services:
        service.start()
    threads = [threading.Thread(target=use, args=(service,)) for service in (*services, *services)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for service in services:
        service.stop()
    assert len(results) == 4
    assert results.count(results[0]) == 4


def test_a_loop_that_ended_with_its_streams_unread_holds_nothing_up():
    service = tiny_service(max_tokens=None)
    service.start()

    async def leave() -> None:
        await service.submit(Request([1], 200, GREEDY, ignore_eos=True))

    async def ask() -> int:
        return len(tokens_of(await pieces_of(await service.submit(Request([1], 5, GREEDY, ignore_eos=True)))))

    asyncio.run(leave())
    assert asyncio.run(ask()) == 5
    end = time.monotonic() + 20
    while not free(service):
        assert time.monotonic() < end
        time.sleep(0.01)
    service.stop()


def test_prefixes_are_shared_by_the_requests_of_a_key():
    assert tiny_service().prefix_group("alice") == "alice"
    assert tiny_service(Settings(prefix_per_key=False)).prefix_group("alice") == ""

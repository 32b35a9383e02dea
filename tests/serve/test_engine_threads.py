"""Calls from other threads and from `decode` act between steps: every request gets its own tokens."""

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request
from retnet.serve.speculation import Speculation
from tests.small_models import prompt, small_model

from .automaton import cycle
from .test_engine import text_of

GREEDY = Sampling(temperature=0)
OPTIONS = {
    "plain": {},
    "prefix cache": {"prefix_cache_bytes": 10**6, "prefix_interval": 8},
    "speculation": {"speculation": Speculation(3), "prefix_cache_bytes": 10**6},
}
CYCLE = [3, 60, 31, 32]
STACKS = ("retention", "hybrid")


def engine_of(model, **options) -> Engine:
    return Engine(model, **{"num_slots": 4, "max_tokens": 200, "prompt_chunk": 8, "decode": text_of, **options})


@torch.no_grad()
def is_greedy(model, context: list[int], tokens: list[int]) -> bool:
    """Whether tokens are the likeliest ones after the context, by one forward of the whole model."""
    if not tokens:
        return True
    logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1]
    return logits.argmax(-1).tolist() == tokens


@pytest.fixture(scope="module", params=STACKS)
def exact(request):
    """In float64, where rounding picks no other token."""
    return small_model(request.param, dtype="float64")


WITH_OPTIONS = pytest.mark.parametrize(
    ("exact", "options"),
    [
        *(("retention", options) for options in OPTIONS),
        ("hybrid", "prefix cache"),
        *(pytest.param("hybrid", options, marks=pytest.mark.slow) for options in OPTIONS if options != "prefix cache"),
    ],
    indirect=["exact"],
)


class Users:
    """Threads that submit, continue, fork and cancel requests of one engine, and what each request must give."""

    def __init__(self, engine: Engine):
        self.engine, self.asked, self.refused = engine, [], 0

    def ask(self, request: Request, earlier: list[int] | None = None, after=None) -> None:
        try:
            self.asked.append((self.engine.submit(request, after), [*(earlier or []), *request.prompt]))
        except Refused:
            self.refused += 1  # the engine's room is 200 tokens

    def act(self, seed: int, num_calls: int) -> None:
        rng = random.Random(seed)
        shared = prompt(17, seed=1)
        for _ in range(num_calls):
            choice = rng.random()
            ids = shared[: rng.randint(1, 17)] + prompt(rng.randint(0, 9), rng.randrange(50))
            grammar, group = rng.choice([None, None, None, cycle(CYCLE)]), rng.choice(["", "", "a", None])
            request = Request(ids, 12, GREEDY, grammar=grammar, prefix_group=group)
            if choice < 0.4 or not self.asked:
                self.ask(request)
                continue
            generation, _ = rng.choice(self.asked)
            if choice < 0.6:
                if rng.random() < 0.5:
                    self.engine.cancel_soon(generation)
                else:
                    self.engine.cancel(generation)
                    assert generation.finished
                continue
            try:
                snapshot = self.engine.snapshot(generation)
            except ValueError:  # it does not decode
                continue
            more = Request(prompt(rng.randint(0, 5), rng.randrange(50)), 9, GREEDY)
            self.ask(more, snapshot.tokens.tolist(), snapshot)


@pytest.mark.parametrize("actions", [12, pytest.param(60, marks=pytest.mark.slow)])
@WITH_OPTIONS
def test_calls_of_many_threads_beside_stepping_threads_change_no_token(exact, options, actions):
    engine = engine_of(exact, **OPTIONS[options])
    users, stop = Users(engine), threading.Event()

    def keep_stepping() -> int:
        steps = 0
        while not stop.is_set():
            engine.step()
            steps += 1
        return steps

    with ThreadPoolExecutor(6) as threads:
        stepping = [threads.submit(keep_stepping) for _ in range(2)]
        acting = [threads.submit(users.act, seed, actions) for seed in range(4)]
        try:
            for future in acting:
                future.result(timeout=120)
        finally:
            stop.set()
        assert sum(future.result(timeout=120) for future in stepping) > 0
    engine.run()
    assert engine.pool.num_free == engine.pool.num_slots
    assert {g.finish_reason for g, _ in users.asked} == {"length", "cancelled"}
    free = [(g, context) for g, context in users.asked if g.request.grammar is None]
    assert all(g.tokens == (CYCLE * 4)[: g.num_new] for g, _ in users.asked if g.request.grammar is not None)
    wrong = [g for g, context in free if not is_greedy(exact, context, g.tokens)]
    assert not wrong, f"{len(wrong)} of {len(free)} requests got other tokens"
    if engine.prefixes is not None:
        assert engine.stats().prefix.hits > 0


def test_a_call_waits_for_a_few_steps_at_most_though_a_thread_steps_in_a_loop(exact):
    engine = engine_of(exact)
    engine.submit(Request(prompt(5), 150, GREEDY))
    stop, waited = threading.Event(), []

    def keep_stepping() -> None:
        while not stop.is_set():
            engine.step()

    with ThreadPoolExecutor(1) as threads:
        stepping = threads.submit(keep_stepping)
        for seed in range(40):
            time.sleep(0.003)
            before = engine._num_steps
            engine.cancel(engine.submit(Request(prompt(9, seed), 5, GREEDY)))
            waited.append(engine._num_steps - before)
        stop.set()
        stepping.result(timeout=60)
    assert sum(waited) / len(waited) < 10, waited


def test_cancel_soon_waits_for_no_step(small):
    """It returns while a step runs, and while another thread has the turn without a step."""
    entered, go_on = threading.Event(), threading.Event()

    def decode(tokens) -> str:
        entered.set()
        assert go_on.wait(60)
        return text_of(tokens)

    engine = engine_of(small, num_slots=1, decode=decode)
    running = engine.submit(Request(prompt(5), 50, GREEDY, stop_strings=["zzzz"]))
    waiting = engine.submit(Request(prompt(6), 50, GREEDY))
    with ThreadPoolExecutor(1) as threads:
        stepping = threads.submit(engine.step)
        assert entered.wait(60)
        try:
            engine.cancel_soon(waiting)
            engine.cancel_soon(running)
            assert not running.finished
        finally:
            go_on.set()
        stepping.result(timeout=60)
        assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
        assert running.tokens, "the step was not broken off"
        queued = engine.submit(Request(prompt(6), 50, GREEDY))
        holding, release = threading.Event(), threading.Event()

        def hold() -> None:
            holding.set()
            assert release.wait(60)

        held = threads.submit(engine._turns.take, hold)
        assert holding.wait(60)
        try:
            engine.cancel_soon(queued)
        finally:
            release.set()
        held.result(timeout=60)
    engine.cancel_soon(queued)  # twice is once
    assert engine.stats().waiting == 0
    assert engine.idle
    assert queued.finish_reason == "cancelled"
    assert engine.pool.num_free == 1
    with pytest.raises(ValueError, match="another engine"):
        engine_of(small).cancel_soon(queued)


def test_streams_of_several_threads_share_an_engine(exact):
    engine = engine_of(exact)
    prompts = [prompt(5 + n, seed=n) for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda ids: list(engine.stream(Request(ids, 15, GREEDY))), prompts))
    assert [len(tokens) for tokens in got] == [15] * 8
    assert all(is_greedy(exact, ids, tokens) for ids, tokens in zip(prompts, got))


@WITH_OPTIONS
def test_what_decode_calls_takes_effect_after_the_step_or_is_refused(exact, options):
    refused, submitted = [], []

    def decode(tokens) -> str:
        if started and len(submitted) < 3:
            submitted.append(engine.submit(Request(prompt(9, seed=len(submitted)), 6, GREEDY)))
            engine.cancel(cancelled)
            for call in (
                lambda: engine.snapshot(kept),
                lambda: engine.fork(kept, Request([], 5)),
                engine.step,
                engine.run,
                engine.weights_changed,
            ):
                with pytest.raises(RuntimeError, match=r"called by `decode`, inside a step.*accepted there") as error:
                    call()
                refused.append(error)
        return text_of(tokens)

    engine = engine_of(exact, **{**OPTIONS[options], "decode": decode})
    started = False
    watched = engine.submit(Request(prompt(7), 12, GREEDY, stop_strings=["zzzz"]))
    cancelled, kept = (engine.submit(Request(prompt(6, seed=n), 30, GREEDY)) for n in (1, 2))
    while not kept.tokens:
        engine.step()
    started = True
    engine.run()
    assert len(refused) == 15
    assert cancelled.finish_reason == "cancelled"
    assert {g.finish_reason for g in (watched, kept, *submitted)} == {"length"}
    for generation in (watched, cancelled, kept, *submitted):
        assert is_greedy(exact, list(generation.request.prompt), generation.tokens)


def test_a_stream_dropped_before_its_first_token_gives_its_slot_back(small):
    engine = engine_of(small, max_tokens=None)
    endless = Request(prompt(5), None, GREEDY)
    stream = engine.stream(endless)
    stream.close()
    assert list(stream) == []
    engine.stream(endless)
    held = engine.stream(endless)
    engine.step()
    del held
    gc.collect()
    assert engine.idle
    assert engine.pool.num_free == engine.pool.num_slots


def test_a_stream_dropped_at_the_very_end_of_a_call_ends_with_it(small, monkeypatch):
    engine = engine_of(small, max_tokens=None)
    stream, settle = engine.stream(Request(prompt(5), None, GREEDY)), Engine._settle

    def settle_and_drop(self) -> None:
        nonlocal stream
        settle(self)
        stream = None

    engine.step()
    monkeypatch.setattr(Engine, "_settle", settle_and_drop)
    engine.warmup()
    assert engine.pool.num_free == engine.pool.num_slots
    assert engine.idle


def test_a_stream_dropped_during_a_step_ends_with_the_step(small):
    def decode(tokens) -> str:
        if streams:
            streams.clear()
            gc.collect()
        return text_of(tokens)

    engine = engine_of(small, max_tokens=None, decode=decode)
    dropped = engine.stream(Request(prompt(5), None, GREEDY))
    generation, streams = dropped.generation, [dropped]
    del dropped
    other = engine.submit(Request(prompt(5), 4, GREEDY, stop_strings=["zzzz"]))
    engine.run()
    assert generation.finish_reason == "cancelled"
    assert other.finish_reason == "length"

"""Snapshots and stores for the tests of sessions."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from retnet.models.decode.sampling import Sampling
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.http.errors import ApiError
from retnet.serve.http.sessions.store import SessionStore
from retnet.serve.http.settings import Settings
from retnet.serve.request import Request
from tests.small_models import BYTES, prompt, small_model

GREEDY = Sampling(temperature=0)


def engine_of(stack: str = "retention", **options: Any) -> Engine:
    return Engine(small_model(stack, **BYTES), **{"num_slots": 4, "max_tokens": 512, **options})


def snapshot_of(engine: Engine, length: int = 9, seed: int = 0) -> Snapshot:
    """A state after a prompt of this length and one token of output."""
    generation = engine.submit(Request(prompt(length, seed), 1, GREEDY, keep_state=True))
    engine.run()
    assert generation.snapshot is not None
    return generation.snapshot


class Clock:
    """A clock that tests set."""

    def __init__(self, now: float = 1e9):
        self.now = now

    def __call__(self) -> float:
        return self.now


def store_of(engine: Engine, folder: Path | None = None, clock: Clock | None = None, **settings: Any) -> SessionStore:
    """A store of sessions of this engine's model, in memory or in a folder."""
    return SessionStore(Settings(state_dir=folder, **settings), engine.fingerprint, clock=clock or Clock())


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots have the same tokens and the same bits."""
    pairs = zip(a.state.named_tensors().items(), b.state.named_tensors().items(), strict=True)
    return a.tokens == b.tokens and all(m == n and bool((x == y).all()) for (m, x), (n, y) in pairs)


async def refusal(work: Coroutine[Any, Any, Any]) -> ApiError:
    """The error that ends `work`."""
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value

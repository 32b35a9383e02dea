"""Launching a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.http.launch import EngineOptions, make_service
from retnet.serve.http.service import Service
from retnet.serve.http.settings import GIB, Settings
from tests.small_models import BYTES, NOPE, PAPER, Stack, small_model


def service_of(options: EngineOptions, stack: Stack = "retention") -> Service:
    return make_service(small_model(stack, **BYTES), ByteTokenizer(), "tiny", options, Settings())


def test_by_default_a_cpu_has_four_slots_any_length_and_a_prefix_cache():
    engine = service_of(EngineOptions()).engine
    assert (engine.pool.num_slots, engine.pool.max_tokens) == (4, None)
    assert engine.prefixes is not None
    assert engine.prefixes.budget_bytes == GIB


def test_a_model_whose_cache_grows_gets_a_context():
    assert service_of(EngineOptions(), "hybrid").context_limit == 8192
    assert service_of(EngineOptions(max_tokens=100), "hybrid").context_limit == 100
    short = replace(NOPE, mixer=replace(NOPE.mixer, max_context=64))
    assert service_of(EngineOptions(), [PAPER, short]).context_limit == 64


def test_the_options_reach_the_engine():
    one = service_of(EngineOptions(slots=8, max_tokens=64, prefix_cache=0, deferred_writes=16)).engine
    assert (one.pool.num_slots, one.pool.max_tokens, one.prefixes) == (8, 64, None)
    assert any(ring is not None for ring in one.pool.deferred or ())
    other = service_of(EngineOptions(memory=13 * service_of(EngineOptions()).engine.pool.cost.total)).engine
    assert other.pool.num_slots == 12
    assert service_of(EngineOptions(speculate=3)).engine.drafter is not None


def test_options_that_the_engine_refuses_are_told():
    with pytest.raises(ValueError, match="1 or a multiple of 4"):
        service_of(EngineOptions(slots=5))


def test_states_are_loaded_and_checked_before_the_server_starts(tmp_path):
    from retnet.models.snapshot import Snapshot
    from retnet.serve.engine import Engine
    from retnet.serve.request import Request
    from tests.models.test_initial_state import start_of

    model, file = small_model(**BYTES), tmp_path / "state.safetensors"

    def launched(**states):
        arguments = model, ByteTokenizer(), "tiny", EngineOptions(), Settings()
        return make_service(*arguments, {name: tmp_path / path for name, path in states.items()})

    start_of(model).save(file)
    service = launched(tiny=file.name, austen=file.name)
    assert service.model_names == ["tiny", "austen"]
    assert service.states["austen"].initial == start_of(model).initial
    with pytest.raises(FileNotFoundError, match="no snapshot at"):
        launched(austen="missing.safetensors")
    start_of(small_model(**BYTES, name="other", d_model=32, logit_soft_cap=5.0)).save(file)
    with pytest.raises(ValueError, match=r"state\.safetensors: the snapshot is of another model"):
        launched(austen=file.name)
    engine = Engine(model, num_slots=1)
    generation = engine.submit(Request([1, 2, 3], 2, keep_state=True))
    engine.run()
    assert generation.snapshot is not None
    generation.snapshot.save(file)
    with pytest.raises(ValueError, match="is a state after 4 tokens; accepted: a learned initial state"):
        launched(austen=file.name)
    start = start_of(model)
    start.state.layers[0].memory[0, 0, 0, 0] = float("nan")
    Snapshot(start.state, start.tokens, start.model).save(file)
    with pytest.raises(ValueError, match="has values that are not finite"):
        launched(austen=file.name)

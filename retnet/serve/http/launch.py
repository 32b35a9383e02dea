"""Launching a server: an engine with defaults for its device, and the service around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retnet.data.tokenizer import Tokenizer
from retnet.models.decode.sampling import SamplingParts
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.http.service import Service
from retnet.serve.http.settings import GIB, Settings
from retnet.serve.pool import default_context
from retnet.serve.request import Refused
from retnet.serve.speculation import Speculation

SLOTS = {"cpu": 4, "cuda": 16}  # a step computes all slots, which a CPU feels
WARM = (SamplingParts(), SamplingParts(draws=True), SamplingParts(draws=True, filters=True))


@dataclass(frozen=True)
class EngineOptions:
    """The engine of a server; see `Engine`.

    slots, memory: how many requests run at a time, or the bytes that they may take; neither: the default of the device.
    max_tokens: the longest context; None for 8,192 where a layer's cache grows with it, and any length elsewhere.
    speculate: draft tokens per step, 0 for none; drafts: their source, as in `Speculation.of`.
    prefix_cache: its budget in bytes, 0 for none.
    """

    slots: int | None = None
    memory: int | None = None
    max_tokens: int | None = None
    speculate: int = 0
    drafts: str = "auto"
    deferred_writes: int = 0
    prefix_cache: int = GIB


def make_service(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    options: EngineOptions,
    settings: Settings,
    states: Mapping[str, Path] | None = None,
) -> Service:
    """A service over a new engine, with its kernels compiled and its graphs captured where it runs on a GPU.

    states: files of learned initial states, by the name of the model in requests that start from them.

    Raises ValueError for options and states that the engine refuses, and FileNotFoundError for a missing state.
    """
    on = model.embedding.weight.device.type
    slots, max_tokens = options.slots, options.max_tokens
    if slots is None and options.memory is None:
        slots = SLOTS.get(on, SLOTS["cpu"])
    speculation = Speculation.of(options.speculate, options.drafts, model.config)
    if max_tokens is None:
        max_tokens = default_context(model.config, speculation)
    engine = Engine(
        model,
        num_slots=slots,
        memory_bytes=options.memory,
        max_tokens=max_tokens,
        prefix_cache_bytes=options.prefix_cache or None,
        decode=tokenizer.decode,
        speculation=speculation,
        deferred_writes=options.deferred_writes,
    )
    initial = {model_name: _initial_state(engine, path) for model_name, path in (states or {}).items()}
    if on == "cuda":
        engine.warmup(*WARM)
    return Service(engine, tokenizer, name, settings, initial)


def _initial_state(engine: Engine, path: Path) -> Snapshot:
    """A learned initial state on the engine's device."""
    snapshot = Snapshot.load(path, engine.model.embedding.weight.device)
    if not snapshot.is_initial:
        raise ValueError(
            f"{path} is a state after {len(snapshot.tokens) - 1:,} tokens; accepted: a learned initial state "
            "(retnet train method=state)"
        )
    try:
        engine.check_snapshot(snapshot)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    if not snapshot.state.is_finite:
        raise ValueError(f"{path} has values that are not finite; accepted: a finite state")
    return snapshot

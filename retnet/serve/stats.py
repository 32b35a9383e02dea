"""Counts of an engine, as its metrics show them."""

from dataclasses import dataclass

from retnet.serve.pool import SlotCost
from retnet.serve.prefix import PrefixCounts


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine.

    running: requests in slots; reading of them are still in prefill. waiting: requests without a slot. unread_tokens:
    prompt tokens that running and waiting requests have yet to read. prompt_tokens, new_tokens: read in prefill, and
    decoded, so far. drafted, accepted: draft tokens, and those that were right. prefix: None without a cache.
    """

    num_slots: int
    bytes_per_slot: SlotCost
    running: int
    reading: int
    waiting: int
    unread_tokens: int
    steps: int
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    prefix: PrefixCounts | None

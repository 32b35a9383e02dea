"""Drafters: where the draft tokens of speculative decoding come from. This one looks them up in the context."""

from collections.abc import Sequence

from retnet.models.decode.sampling import SamplingParts
from retnet.serve.lookup import PromptLookup, table_entries
from retnet.serve.speculation import Speculation


class Drafter:
    """Draft tokens for the requests in their slots."""

    def enter(self, slot: int) -> None:
        """A new request begins in a slot."""

    def index(self, slot: int, seen: Sequence[int], length: int) -> None:
        """The first `length` tokens of a prompt are read."""

    def prepare(self, parts: SamplingParts) -> None:
        """A step with these sampling parts is about to ask for drafts."""

    def draft(self, slot: int, seen: Sequence[int], count: int) -> list[int]:
        """At most `count` draft tokens after those seen."""
        raise NotImplementedError


class LookupDrafter(Drafter):
    """The text that followed the last few tokens at an earlier place."""

    def __init__(self, speculation: Speculation, num_slots: int, max_tokens: int | None):
        entries = table_entries(max_tokens)
        self.lookups = [PromptLookup(speculation.longest, entries) for _ in range(num_slots)]

    def enter(self, slot: int) -> None:
        self.lookups[slot].clear()

    def index(self, slot: int, seen: Sequence[int], length: int) -> None:
        self.lookups[slot].index(seen, length)

    def draft(self, slot: int, seen: Sequence[int], count: int) -> list[int]:
        return self.lookups[slot].draft(seen, count) if count > 0 else []

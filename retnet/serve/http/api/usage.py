"""Usage: tokens of a response, and how many of its prompt were not read again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retnet.serve.request import Generation


@dataclass
class Usage:
    """Tokens of the prompts, each counted once, and of all choices.

    cached: tokens of the prompts that a session or the prefix cache had already read. miss: why there are none.
    """

    prompt: int
    completion: int
    cached: int = 0
    miss: str | None = None

    def body(self) -> dict[str, Any]:
        """The `usage` of a response. `prefix_miss` is a field of our own: why no token of the prompt was cached."""
        details: dict[str, Any] = {"cached_tokens": self.cached}
        if not self.cached and self.miss is not None:
            details["prefix_miss"] = self.miss
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": details,
        }


def usage_of(firsts: Iterable[Generation], completion: int, reused: int = 0) -> Usage:
    """The usage of a response. firsts: of each prompt, its first choice. reused: tokens of its session's state."""
    usage = Usage(0, completion, reused)
    for generation in firsts:
        usage.prompt += generation.output_start
        usage.cached += generation.cached
        usage.miss = usage.miss or generation.prefix_miss
    return usage

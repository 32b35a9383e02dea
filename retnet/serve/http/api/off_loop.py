"""Long work of one request in another thread, so that the event loop goes on with the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")
LONG = 20_000  # characters or tokens that take a millisecond or more


async def off_loop(size: int, work: Callable[..., R], *arguments: Any, **options: Any) -> R:
    """The result of `work`, which takes time in proportion to `size`: called here if it is short."""
    if size < LONG:
        return work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)

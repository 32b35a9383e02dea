"""Streams: the tokens of one request as an iterator that drives the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from retnet.serve.request import Failed, Generation

if TYPE_CHECKING:
    from retnet.serve.engine import Engine


class TokenStream(Iterator[int]):
    """The tokens of `generation` as they come. Closing or dropping the stream cancels the request.

    It is an object and not a generator function, whose cleanup never runs if no token was asked for.
    """

    _closed = True  # until it is made

    def __init__(self, engine: Engine, generation: Generation):
        self.engine, self.generation = engine, generation
        self._sent = 0
        self._closed = False

    def __next__(self) -> int:
        generation = self.generation
        if self._closed:
            raise StopIteration
        try:
            while self._sent == generation.num_new and not generation.finished:
                self.engine.step()
        except BaseException:
            self.close()
            raise
        if self._sent < generation.num_new:  # also tokens of steps that other callers took
            token = generation.seen[generation.output_start + self._sent]
            self._sent += 1
            return token
        self._closed = True
        if generation.error is not None:
            raise Failed(f"the request failed: {generation.error}")
        raise StopIteration

    def close(self) -> None:
        """Cancel the request, unless it has finished."""
        self._closed = True
        self.engine.cancel(self.generation)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:  # globals may be gone by then
        if not self._closed and not at_exit():
            self.engine.cancel_soon(self.generation)

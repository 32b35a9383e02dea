"""Stages of the unfinished requests, and the requests whose state may not match their tokens.

A request waits for a slot, reads its prompt, and decodes. Every operation on slots first names its requests in
`in_doubt` and clears that when state and tokens agree again. An exception in between, Ctrl-C included, leaves them
there, and `drop_doubtful` takes them out; all others are as they were.
"""

from collections import deque
from dataclasses import dataclass, field

from retnet.serve.request import Generation, Status


@dataclass
class Stages:
    """The unfinished requests of one engine: in the order of arrival, in the order of reading, and by slot."""

    waiting: deque[Generation] = field(default_factory=deque)
    reading: deque[Generation] = field(default_factory=deque)
    decoding: dict[int, Generation] = field(default_factory=dict)
    in_doubt: tuple[Generation, ...] = ()

    @property
    def in_slots(self) -> list[Generation]:
        return [*self.reading, *self.decoding.values()]

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.reading or self.decoding)

    def remove(self, generation: Generation) -> None:
        """Take a request out of its stage."""
        if generation.status is Status.WAITING:
            self.waiting.remove(generation)
        elif generation.status is Status.READING:
            self.reading.remove(generation)
        elif generation.slot is not None:
            del self.decoding[generation.slot]

    def drop_doubtful(self, error: str) -> None:
        """Fail the requests in doubt with this error. May be repeated if it is interrupted."""
        doubtful = set(map(id, self.in_doubt))
        self.waiting = deque(g for g in self.waiting if id(g) not in doubtful)
        self.reading = deque(g for g in self.reading if id(g) not in doubtful)
        self.decoding = {slot: g for slot, g in self.decoding.items() if id(g) not in doubtful}
        for generation in self.in_doubt:
            if not generation.finished:
                generation.fail(error)

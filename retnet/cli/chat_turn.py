"""Turns of a conversation in a terminal, whoever answers: a model in this process, or a server."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet.system.sizes import quantity


class ChatError(ValueError):
    """The answer failed, or a command cannot be carried out; the message says why. The conversation goes on."""


@dataclass(frozen=True)
class Turn:
    """A conversation up to an answer.

    messages: with role and content, as in OpenAI's API. state: what the next answer continues from, in the form of the
    one that answers; None reads all messages again. tokens: of the context.
    """

    messages: tuple[dict[str, Any], ...] = ()
    state: Any = None
    tokens: int = 0


@dataclass
class Figures:
    """What one answer took. read, reused: tokens of the context that were read, and those that a state had read.

    not_reused: why a state was not continued.
    """

    new_tokens: int = 0
    read: int = 0
    reused: int = 0
    not_reused: str | None = None
    finish: str | None = None
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None

    def tick(self) -> None:
        """Note that a piece of the answer has come."""
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first

    def __str__(self) -> str:
        parts = [quantity(self.new_tokens, "token")]
        if self.first is not None and self.last is not None:
            parts.append(f"the first after {1e3 * (self.first - self.began):.0f} ms")
            if self.new_tokens > 1 and self.last > self.first:
                parts.append(f"then {(self.new_tokens - 1) / (self.last - self.first):.0f} per second")
        parts.append(f"{self.read} read, {self.reused} reused")
        text = ", ".join(parts)
        if self.not_reused is not None:
            text += f" ({self.not_reused})"
        return text + {"length": "; cut at the limit", "cancelled": "; stopped"}.get(self.finish or "", "")


class Answer(ABC):
    """One answer: iterate over the pieces of its text, then read `turn` and `figures`.

    stop: end it early; what was written stays. It may be called from a signal handler.
    """

    def __init__(self, before: Turn, text: str):
        self.before, self.text = before, text
        self.figures = Figures()
        self.turn = before

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that is answered."""
        return [*self.before.messages, {"role": "user", "content": self.text}]

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def stop(self) -> None: ...

    def end(self, text: str, state: Any, tokens: int) -> None:
        """Take over the answer as the conversation's last message."""
        messages = (*self.messages, {"role": "assistant", "content": text})
        self.turn = Turn(messages, state, tokens)


class Backend(ABC):
    """The one that answers. All methods raise ChatError, and OSError for files."""

    @abstractmethod
    def ask(self, turn: Turn, text: str) -> Answer:
        """Answer a new message."""

    @abstractmethod
    def fork(self, turn: Turn) -> Turn:
        """A second conversation that begins as this one does."""

    @abstractmethod
    def save(self, turn: Turn, path: Path) -> str:
        """Write the state and the messages into a file; returns what was written, in words."""

    @abstractmethod
    def load(self, path: Path) -> Turn:
        """The conversation in a file that `save` wrote."""

    @abstractmethod
    def facts(self, turn: Turn) -> list[str]:
        """What is worth knowing of a conversation, in lines."""

    def past(self, turn: Turn) -> Turn:
        """A turn as it can be gone back to, after the conversation has moved on."""
        return turn

    def close(self) -> None:
        """Leave nothing behind."""
        return

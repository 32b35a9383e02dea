"""Responses of `/v1/completions`: whole, or as events that carry the text as it comes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from retnet.serve.http.api.logprobs import TokenNames, completion_logprobs, joined, prompt_logprobs
from retnet.serve.http.api.off_loop import off_loop
from retnet.serve.http.api.output import Delta, Output
from retnet.serve.http.api.sse import DONE, event
from retnet.serve.http.api.usage import Usage, usage_of
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.use import SessionUse

LOGPROB_SIZE = 20  # of the log-probabilities of a token, beside the token's own
_json = json.JSONEncoder().encode


@dataclass
class Prompt:
    """A prompt as tokens. text: as the client wrote it, None for token ids. begin: where in tokens it begins."""

    tokens: Sequence[int]
    text: str | None
    begin: int


@dataclass
class Choice:
    """One completion of one prompt."""

    index: int
    prompt: Prompt
    output: Output


C = TypeVar("C", bound=Choice)


@dataclass
class Answer:
    """The response to one request. Its choices are ordered by prompt.

    echo: repeat the prompt before the completion. logprobs: report them. include_usage, continuous_usage: in the last
    event, and in all of them.
    """

    service: Service
    choices: list[Choice]
    use: SessionUse
    num_prompts: int
    echo: bool
    logprobs: bool
    include_usage: bool
    continuous_usage: bool

    def __post_init__(self) -> None:
        self._names = TokenNames(self.service.tokenizer)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.use.model,
        }

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        firsts = self.choices[:: len(self.choices) // self.num_prompts]
        completion = sum(choice.output.num_tokens for choice in self.choices)
        return usage_of([choice.output.stream.generation for choice in firsts], completion, self.use.reused)

    async def whole(self) -> dict[str, Any]:
        """The response without a stream."""
        entries = []
        for choice in self.choices:
            entry = self._entry(choice, await choice.output.whole())
            if self.echo:
                prompt = await self._prompt_entry(choice)
                entry["text"] = prompt["text"] + entry["text"]
                if self.logprobs:
                    entry["logprobs"] = joined(prompt["logprobs"], entry["logprobs"])
            entries.append(entry)
        session = await self._kept(self.choices[0])
        return self._head | {"choices": entries, "usage": self.usage.body()} | session

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        around = [self._around_text(choice) for choice in self.choices]
        unheard = {choice.index for choice in self.choices} if self.echo else set()
        async with aclosing(merged(self.choices)) as deltas:
            async for choice, delta in deltas:
                if choice.index in unheard:
                    unheard.remove(choice.index)
                    yield self._event(await self._prompt_entry(choice))
                if delta.finish_reason is not None:
                    yield self._event(self._entry(choice, delta), await self._kept(choice))
                elif delta.tokens or self.continuous_usage:
                    yield self._event(self._entry(choice, delta))
                else:
                    before, after = around[choice.index]
                    yield before + _json(delta.text).encode() + after
        if self.include_usage:
            yield event(self._head | {"choices": [], "usage": self.usage.body()})
        yield DONE

    async def _kept(self, choice: Choice) -> dict[str, Any]:
        """The response's `session`, after a choice has ended, if the request has a session."""
        session = await self.use.keep(choice.output.stream.generation)
        return {} if session is None else {"session": session}

    def _event(self, entry: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        data = self._head | {"choices": [entry]} | (more or {})
        if self.include_usage:
            data["usage"] = self.usage.body() if self.continuous_usage else None
        return event(data)

    def _around_text(self, choice: Choice) -> tuple[bytes, bytes]:
        """The bytes before and after the text of an event that has nothing else to say."""
        mark = secrets.token_hex(16)
        before, _, after = self._event(self._entry(choice, Delta(mark, [], 0))).partition(json.dumps(mark).encode())
        return before, after

    def _entry(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """New text of a choice, as an entry of `choices`."""
        entry = {"index": choice.index, "text": delta.text, "logprobs": None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            entry["stop_reason"] = delta.stop_reason
        if self.logprobs and (delta.tokens or delta.finish_reason is not None):
            before = len(self._shown(choice.prompt)) if self.echo else 0
            entry["logprobs"] = completion_logprobs(delta.tokens, self._names, before)
        return entry

    async def _prompt_entry(self, choice: Choice) -> dict[str, Any]:
        """The prompt of a choice, as an entry of `choices`."""
        prompt = choice.prompt
        entry = {"index": choice.index, "text": self._shown(prompt), "logprobs": None, "finish_reason": None}
        if self.logprobs:
            entry["logprobs"] = await off_loop(LOGPROB_SIZE * len(prompt.tokens), self._prompt_logprobs, choice)
        return entry

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        prompt, reported = choice.prompt, choice.output.stream.generation.prompt_logprobs
        unread = len(prompt.tokens) - len(reported)  # the first replaced the token that ended a session's output
        scored = [*[None] * unread, *reported][prompt.begin :]
        return prompt_logprobs(prompt.tokens[prompt.begin :], scored, self.service.tokenizer, self._names)

    def _shown(self, prompt: Prompt) -> str:
        return self.service.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text


async def merged(choices: list[C]) -> AsyncGenerator[tuple[C, Delta], None]:
    """The deltas of all choices as they come. A choice whose delta is not taken yet collects its tokens."""
    if len(choices) == 1:
        async for delta in choices[0].output:
            yield choices[0], delta
        return
    ready: asyncio.Queue[tuple[C, Delta | BaseException]] = asyncio.Queue(1)

    async def watch(choice: C) -> None:
        try:
            async for delta in choice.output:
                await ready.put((choice, delta))
        except Exception as error:
            await ready.put((choice, error))

    tasks = [asyncio.ensure_future(watch(choice)) for choice in choices]
    try:
        running = len(choices)
        while running:
            choice, delta = await ready.get()
            if isinstance(delta, BaseException):
                raise delta
            running -= delta.finish_reason is not None
            yield choice, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

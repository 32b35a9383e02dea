"""Responses of `/v1/chat/completions`: whole, or as events that carry the answer as it comes."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from retnet.serve.http.api.completion_answer import Choice, merged
from retnet.serve.http.api.logprobs import TokenNames, chat_logprobs
from retnet.serve.http.api.output import Delta
from retnet.serve.http.api.sse import DONE, event
from retnet.serve.http.api.usage import Usage, usage_of
from retnet.serve.http.chat.tools import CallReader, ReadCall
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.use import SessionUse


@dataclass
class ChatChoice(Choice):
    """One answer to the conversation. calls: reads its calls of tools, if it may have any."""

    calls: CallReader | None = None
    text: list[str] = field(default_factory=list)
    begun: bool = False

    def read(self, delta: Delta) -> tuple[str, list[ReadCall]]:
        """The text and the calls that a delta of the output settles."""
        text, calls = delta.text, []
        if self.calls is not None:
            text, calls = self.calls.push(delta.text, last=delta.finish_reason is not None)
        self.text.append(text)
        return text, calls

    def finish_reason(self, delta: Delta) -> str | None:
        called = delta.finish_reason == "stop" and self.calls is not None and self.calls.calls
        return "tool_calls" if called else delta.finish_reason

    def message(self) -> dict[str, Any]:
        """The answer so far as a message of a conversation, as sessions keep it."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.text)}
        if self.calls is not None and self.calls.calls:
            message["tool_calls"] = [call.for_template() for call in self.calls.calls]
        return message


@dataclass
class ChatAnswer:
    """The response to one request.

    messages: the conversation before the answer. continued: the answer continues the last of them. logprobs: report
    them. own_stops: stop strings of the request, as opposed to those of the template. include_usage, continuous_usage:
    in the last event, and in all of them.
    """

    service: Service
    choices: list[ChatChoice]
    use: SessionUse
    messages: list[dict[str, Any]]
    continued: bool
    logprobs: bool
    own_stops: Sequence[str]
    include_usage: bool
    continuous_usage: bool

    def __post_init__(self) -> None:
        self._names = TokenNames(self.service.tokenizer)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.use.model,
        }

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        completion = sum(choice.output.num_tokens for choice in self.choices)
        return usage_of([self.choices[0].output.stream.generation], completion, self.use.reused)

    async def whole(self) -> dict[str, Any]:
        """The response without a stream."""
        entries, session = [], {}
        for choice in self.choices:
            delta = await choice.output.whole()
            text, calls = choice.read(delta)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": [call.body() for call in calls]}
            entries.append(self._entry(choice, delta, {"message": message}))
            session = await self._kept(choice)
        head = self._head | {"object": "chat.completion"}
        return head | {"choices": entries, "usage": self.usage.body()} | session

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        around = [self._around_text(choice) for choice in self.choices]
        async with aclosing(merged(self.choices)) as deltas:
            async for choice, delta in deltas:
                if not choice.begun:
                    choice.begun = True
                    first = Delta("", [], delta.num_tokens)
                    yield self._event(self._entry(choice, first, {"delta": {"role": "assistant", "content": ""}}))
                text, calls = choice.read(delta)
                if delta.finish_reason is None and not (calls or delta.tokens or self.continuous_usage):
                    if text:
                        before, after = around[choice.index]
                        yield before + json.dumps(text).encode() + after
                    continue
                parts = [part for call in calls for part in call.deltas()]
                contents: list[dict[str, Any]] = [{"content": text}] if text or not parts else []
                contents += [{"tool_calls": [part]} for part in parts]
                nothing_new = Delta("", [], delta.num_tokens)
                for content in contents[:-1]:
                    yield self._event(self._entry(choice, nothing_new, {"delta": content}))
                session = await self._kept(choice) if delta.finish_reason is not None else {}
                yield self._event(self._entry(choice, delta, {"delta": contents[-1]}), session)
        if self.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage.body()})
        yield DONE

    async def _kept(self, choice: ChatChoice) -> dict[str, Any]:
        """The response's `session`, after a choice has ended, if the request has a session."""
        answer = choice.message()
        messages = [*self.messages, answer]
        if self.continued:
            before = self.messages[-1]
            messages = [*self.messages[:-1], {**before, **answer, "content": before["content"] + answer["content"]}]
        session = await self.use.keep(choice.output.stream.generation, messages)
        return {} if session is None else {"session": session}

    def _event(self, entry: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        data = self._head | {"object": "chat.completion.chunk", "choices": [entry]} | (more or {})
        if self.include_usage:
            data["usage"] = self.usage.body() if self.continuous_usage else None
        return event(data)

    def _around_text(self, choice: ChatChoice) -> tuple[bytes, bytes]:
        """The bytes before and after the text of an event that has nothing else to say."""
        mark = secrets.token_hex(16)
        entry = self._entry(choice, Delta("", [], 0), {"delta": {"content": mark}})
        before, _, after = self._event(entry).partition(json.dumps(mark).encode())
        return before, after

    def _entry(self, choice: ChatChoice, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        """An entry of `choices`. content: its message or its delta."""
        reason = choice.finish_reason(delta)
        entry = {"index": choice.index, **content, "logprobs": None, "finish_reason": reason}
        if reason is not None:
            is_own = not isinstance(delta.stop_reason, str) or delta.stop_reason in self.own_stops
            entry["stop_reason"] = delta.stop_reason if is_own else None
        if self.logprobs and (delta.tokens or reason is not None):
            entry["logprobs"] = chat_logprobs(delta.tokens, self._names)
        return entry

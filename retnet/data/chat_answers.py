"""Answers of a conversation: which of its tokens a model learns to write, under any chat template.

A model writes what follows the generation prompt, up to and including the token that ends the turn. Where that lies is
found by rendering. The conversation is rendered once more for each answer, with a character that no text has in the
answer's place: what differs is the answer, as the template writes it, tool calls and their syntax included. What the
template writes between the generation prompt and the answer (a space, an empty block of thoughts) is the answer's
beginning. A template with `{% generation %}` blocks says itself what is written, and is believed.

The special tokens that close an answer always belong to it. A template that writes none leaves the last answer open,
and the token that ends a text is put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retnet.data.chat_template import ChatTemplate, TemplateError
from retnet.data.sandbox import BEGIN, END

STAND_IN = "\ud803"
_FIRST_UNIT = 0xD900  # characters that stand for special tokens here: more halves of surrogate pairs
Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """messages: as chat templates read them. tools: as in OpenAI's API. learned: whether each message is an answer to
    be learned. options: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    learned: Sequence[bool] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def tokens_and_answers(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, one document start before them, and whether each belongs to an answer.

    Raises TemplateError if the template refuses the conversation or writes an answer other than once.
    """
    text = _Text(template, conversation)
    spans = text.answers()
    units, tokenizer = text.whole, template.tokenizer
    begin = len(units) - len(units.lstrip(text.unit(tokenizer.document_start)))  # the starts that the template writes
    parts = text.parts_of(units[begin:])
    if begin:
        parts, begin = [tokenizer.document_start, *parts], begin - 1
    places = tokenizer.places_of_parts(parts)
    tokens = [token for token, _, _ in places]
    learned = _touched([(b + begin, e + begin) for _, b, e in places], spans)
    if parts[:1] != [tokenizer.document_start]:
        tokens, learned = [tokenizer.document_start, *tokens], [False, *learned]
    learned[0] = False  # nothing comes before it
    if conversation.learned[-1] and not (spans and text.is_special(max(end for _, end in spans) - 1)):
        end = tokenizer.document_start if tokenizer.document_end is None else tokenizer.document_end
        tokens, learned = [*tokens, end], [*learned, True]
    return tokens, learned


class _Text:
    """A rendered conversation as a string of units: characters, and one unit per special token."""

    def __init__(self, template: ChatTemplate, conversation: Conversation):
        self._template, self._conversation = template, conversation
        self._units: dict[int, str] = {}
        given = conversation.messages, conversation.tools
        light, dense = (template.drawn(*given, densely=densely, **conversation.options) for densely in (False, True))
        self._densely = [p for p in light if isinstance(p, int)] != [p for p in dense if isinstance(p, int)]
        self.whole = self._joined(dense if self._densely else light)

    def answers(self) -> list[Span]:
        """The spans of the answers in `whole`, with their end tokens."""
        learned = [i for i, is_learned in enumerate(self._conversation.learned) if is_learned]
        if not any("endgeneration" in source for source in self._template.sources.values()):
            return [self._span(i) for i in learned]
        messages = enumerate(self._conversation.messages)
        others = [self._place(i) for i, m in messages if m["role"] == "assistant" and i not in learned]
        blocks = [b for b in self._blocks() if not any(b[0] < end and begin < b[1] for begin, end in others)]
        return [(begin, self._with_special(begin, end)) for begin, end in blocks]

    def _span(self, number: int) -> Span:
        """Where a model writes message `number`, from the end of its prompt to the end of its turn."""
        begin, end = self._place(number)
        alone = self._alone(number)
        return self._beginning(number, begin, alone), self._closed(end, alone)

    def unit(self, token: int) -> str:
        return self._units.setdefault(token, chr(_FIRST_UNIT + len(self._units)))

    def parts_of(self, units: str) -> list[str | int]:
        tokens = {unit: token for token, unit in self._units.items()}
        parts: list[str | int] = []
        run = 0
        for at, unit in enumerate(units):
            if unit in tokens:
                parts += [units[run:at], tokens[unit]]
                run = at + 1
        return [part for part in [*parts, units[run:]] if part != ""]

    def _joined(self, parts: Sequence[str | int]) -> str:
        return "".join(self.unit(part) if isinstance(part, int) else part for part in parts)

    def _drawn(self, count: int | None = None, **options: Any) -> str:
        """The first `count` messages as units, rendered as `whole` is. Raises TemplateError."""
        chat = self._conversation
        parts = self._template.drawn(
            chat.messages[:count], chat.tools, densely=self._densely, **chat.options, **options
        )
        return self._joined(parts)

    def _place(self, number: int) -> Span:
        """The span of message `number` in `whole`: what differs if something else stands in its place.

        A call may change how later messages are written, or be demanded by them. Then the arguments of calls stand in.
        """
        message = self._conversation.messages[number]
        try:
            span = self._differing(number, self._stand_in(number), times=1)
        except TemplateError:
            if not message.get("tool_calls"):
                raise
            span = None
        if not message.get("tool_calls") or (span is not None and span[1] <= self._next_begin(number)):
            assert span is not None
            return span
        other = {STAND_IN: STAND_IN}
        calls = [{**call, "function": {**call["function"], "arguments": other}} for call in message["tool_calls"]]
        begin, end = self._differing(number, {**message, "content": STAND_IN, "tool_calls": calls})
        until = self._drawn(number + 1)  # the syntax after the arguments is common to both
        if self.whole.startswith(until):
            return begin, len(until.rstrip())
        return begin, next((i for i in range(end, len(self.whole)) if self.is_special(i)), end)

    def _differing(self, number: int, stand_in: Mapping[str, Any], times: int | None = None) -> Span:
        """What differs in `whole` from the rendering with a stand-in, which is written so many times."""
        other = self._drawn(stand_ins={number: stand_in})
        if times is not None and other.count(STAND_IN) != times:
            raise TemplateError(
                f"the chat template writes message {number} {other.count(STAND_IN)} times; accepted: once, to know "
                "which text is its"
            )
        begin = _common(self.whole, other)
        return begin, len(self.whole) - _common(self.whole[begin:][::-1], other[begin:][::-1])

    def _next_begin(self, number: int) -> int:
        """Where the text of the next message begins."""
        if number + 1 == len(self._conversation.messages):
            return len(self.whole)
        return self._differing(number + 1, self._stand_in(number + 1))[0]

    def _stand_in(self, number: int) -> dict[str, Any]:
        message = self._conversation.messages[number]
        kept = {"role": "assistant"} if message["role"] == "assistant" else message  # no calls and no reasoning
        return {**kept, "content": STAND_IN}

    def _alone(self, number: int) -> str | None:
        """The conversation up to message `number`, a stand-in; None if the template does not write that."""
        try:
            text = self._drawn(number + 1, stand_ins={number: self._stand_in(number)})
        except TemplateError:
            return None
        return text if text.count(STAND_IN) == 1 else None

    def _beginning(self, number: int, begin: int, alone: str | None) -> int:
        """Where a model begins to write message `number`, whose own text begins at `begin`."""
        try:
            prompt = self._drawn(number, add_generation_prompt=True)
        except TemplateError:  # no template asks for an answer to nothing
            return begin
        if prompt and self.whole.startswith(prompt):
            return len(prompt)
        before = self._drawn(number)
        if alone is None or not (alone.startswith(before) and prompt.startswith(before)):
            return begin
        added = alone[len(before) : max(alone.find(STAND_IN), len(before))]
        added = added[_common(added, prompt[len(before) :]) :]
        return begin - len(added) if self.whole.endswith(added, 0, begin) else begin

    def _closed(self, end: int, alone: str | None) -> int:
        """The end of an answer with the special tokens that close it.

        These are those that follow it where it is the last message; where it is not, another may end it.
        """
        closing = "" if alone is None else alone[alone.find(STAND_IN) + 1 :]
        until = end + _common(closing, self.whole[end:])
        last = max((i for i in range(end, until) if self.is_special(i)), default=None)
        return self._with_special(end, end) if last is None else last + 1

    def _blocks(self) -> list[Span]:
        """The template's generation blocks. Raises TemplateError if marking them changes the text."""
        marked = self._drawn(marks_generation=True)
        spans, begin, at = [], None, 0
        for unit in marked:
            if unit == BEGIN:
                begin = at
            elif unit == END:
                spans.append((at if begin is None else begin, at))
                begin = None
            else:
                at += 1
        if marked.replace(BEGIN, "").replace(END, "") != self.whole:
            raise TemplateError(
                "the chat template changes what stands in its generation blocks; accepted: plain blocks"
            )
        return spans

    def is_special(self, at: int) -> bool:
        return ord(self.whole[at]) >= _FIRST_UNIT and ord(self.whole[at]) < _FIRST_UNIT + len(self._units)

    def _with_special(self, begin: int, end: int) -> int:
        """The end of a span with the special token that follows it after at most spaces, unless it ends with one."""
        last = begin + len(self.whole[begin:end].rstrip()) - 1
        if last >= begin and self.is_special(last):
            return end
        after = end
        while after < len(self.whole) and self.whole[after].isspace():
            after += 1
        return after + 1 if after < len(self.whole) and self.is_special(after) else end


def _common(a: str, b: str) -> int:
    """The length of the common beginning of two strings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _touched(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each place has a unit in one of the spans, all in order; a place without units counts where it lies."""
    spans, touched, at = sorted(spans), [], 0
    for begin, end in places:
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        touched.append(at < len(spans) and spans[at][0] < max(end, begin + 1))
    return touched

"""Chat templates: conversations as tokens, where only the template writes special tokens.

A template is Jinja, rendered in a sandbox as transformers renders it, in bounded time and size: it comes with the
model, and its input from clients. The rendered text is tokenised once.

A special token that a message spells must stay text. So its spelling is marked before rendering, with a character that
no text can hold: half of a surrogate pair. Rendered text is split at the special tokens that are not marked. A template
that trims, cuts or joins contents could still build a special token out of them. To notice that, the conversation is
rendered a second time with marks between all characters of its contents, where nothing can be built. If that gives
other special tokens, it is the one that counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from retnet.data.chat_files import DEFAULT, ChatFiles, read_chat_files
from retnet.data.sandbox import MARKS_GENERATION, TemplateError, compiled, render
from retnet.data.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TemplateError", "find_chat_template"]

MARK = "\ud800"
_HALF = re.compile("[\ud800-\udfff]")
Mark = Callable[[str], str]
AFTER = "\ud801"  # the mark after the last character of a content; a special token of the template may follow
END = "\ud802"  # where the last message ends, if it is to be continued
TOOL_USE = "tool_use"  # the template that transformers takes for conversations with tools

# Contents begin on a line of their own, so that an answer is repeated as it was generated, with or without a space.
PLAIN = """
{%- for message in messages -%}
{{ message.role | capitalize }}:{{ '\n' }}{{ message.content }}
{%- if add_generation_prompt or not loop.last %}{{ '\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{{ '\n' }}{% endif -%}
"""
# The same for training: the token that ends a text also ends an answer.
ENDED = PLAIN.replace(
    "{{ message.content }}", "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nTool:", "\nAssistant:")


@dataclass(frozen=True)
class ChatTemplate:
    """A model's way of writing conversations.

    name: where it comes from. sources: name -> Jinja; `default`, and perhaps `tool_use`. variables: what templates see
    beside the conversation, such as bos_token. stops: strings that end an answer.

    Raises ValueError for a template that is no Jinja.
    """

    tokenizer: Tokenizer
    name: str
    sources: Mapping[str, str]
    variables: Mapping[str, str]
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            try:
                compiled(source)
            except TemplateError as error:
                raise ValueError(f"the chat template {name!r} of {self.name} is not valid: {error}") from error

    @cached_property
    def _special(self) -> dict[str, int]:
        return self.tokenizer.special_tokens

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Special tokens that are not marked, the longest first, as the tokenizers library finds them."""
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile(f"(?<!{MARK})(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def mentions(self, text: str) -> bool:
        """Whether a template has this text in its source."""
        return any(text in source for source in self.sources.values())

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        known: Sequence[int] = (),
        **options: Any,
    ) -> list[int]:
        """The tokens of a conversation, with exactly one document start before them.

        messages: with `role`, `content` (text or None), and what else the template reads, as JSON. tools: as in
        OpenAI's API. add_generation_prompt: begin an answer. continue_final_message: leave the last message open
        instead. known: tokens of a session, which may be the beginning of the conversation. If their text is, they are
        returned as they are: a model may spell a text in other tokens than its tokenizer. options: further variables of
        the template.

        Raises TemplateError if the template refuses the conversation or takes too long, ValueError for text without
        tokens.
        """
        parts = self.parts(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **options,
        )
        start = self.tokenizer.document_start
        first = next((i for i, part in enumerate(parts) if part != start), len(parts))
        text = parts[first:]
        for begin in (known, known[:-1]):  # the last one may have been an end token that the template does not write
            rest = self._rest([start, *text], begin)
            if rest is not None:
                return [*begin, *self.tokenizer.encode_parts([start, *rest])[1:]]
        return self.tokenizer.encode_parts([start, *text]) if first else [start, *self.tokenizer.encode_parts(text)]

    def parts(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[str | int]:
        """The text of a conversation, with special tokens in it as numbers; arguments as for `encode`."""
        parts, safe = (self.drawn(messages, tools, densely=densely, **options) for densely in (False, True))
        return parts if _special(parts) == _special(safe) else safe

    def drawn(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        densely: bool,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        stand_ins: Mapping[int, Mapping[str, Any]] = {},
        marks_generation: bool = False,
        **options: Any,
    ) -> list[str | int]:
        """One of the two renderings that `parts` compares.

        stand_ins: messages that take the places of others unmarked, by number. marks_generation: write the template's
        generation blocks between `sandbox.BEGIN` and `sandbox.END`.

        Raises TemplateError.
        """
        mark = _densely if densely else self._lightly
        given = {"messages": [*messages], "tools": [*tools] if tools else None}
        flags = {
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            MARKS_GENERATION: marks_generation,
        }
        try:
            variables = _marked(options, self._lightly, self._lightly) | _marked(given, mark, self._lightly)
            if continue_final_message:
                variables["messages"] = _left_open(variables["messages"])
            variables["messages"] = [stand_ins.get(i, message) for i, message in enumerate(variables["messages"])]
            text = render(self._source(bool(tools)), {**self.variables, **variables, **flags})
        except RecursionError as error:
            raise TemplateError("the conversation is nested too deeply") from error
        return self._parts(_cut_at_end(text) if continue_final_message else text)

    def tokens_of_texts(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The different tokens that the texts of messages have by themselves, without those of the template."""
        texts = [message["content"].encode() for message in messages if isinstance(message.get("content"), str)]
        return sorted({int(token) for tokens in self.tokenizer.encode_batch(texts) for token in tokens})

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that the template writes after an answer, if it writes one."""
        answer = "the answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        try:
            parts = self._parts(render(self._source(False), {**self.variables, "messages": messages}))
        except TemplateError:
            return None
        for part, after in pairwise(parts):
            if isinstance(part, str) and isinstance(after, int) and part.rstrip().endswith(answer):
                return after
        return None

    def _rest(self, parts: Sequence[str | int], known: Sequence[int]) -> list[str | int] | None:
        """The parts that follow these tokens, None if the parts do not begin with them."""
        if not known:
            return None
        rest = list(parts)
        special = set(self._special.values())
        for is_special, run in groupby(known, special.__contains__):
            for part in list(run) if is_special else [self.tokenizer.decode(run)]:
                if part == "":
                    continue  # tokens of padding, which have no text
                if not rest:
                    return None
                if isinstance(part, int) or rest[0] == part:
                    if rest.pop(0) != part:
                        return None
                elif isinstance(rest[0], str) and rest[0].startswith(part):
                    rest[0] = rest[0][len(part) :]
                else:
                    return None
        return rest

    def _source(self, with_tools: bool) -> str:
        if with_tools and TOOL_USE in self.sources:
            return self.sources[TOOL_USE]
        if DEFAULT not in self.sources:
            listed = ", ".join(self.sources)
            raise TemplateError(f"{self.name} has no chat template named {DEFAULT!r}; it has: {listed}")
        return self.sources[DEFAULT]

    def _lightly(self, text: str) -> str:
        """Mark the special tokens that a text spells: before their first character and after it."""
        if half := _HALF.search(text):
            raise TemplateError(f"a text has half of a surrogate pair at character {half.start()}")
        return self._pattern.sub(lambda match: f"{MARK}{match[0][0]}{MARK}{match[0][1:]}", text)

    def _parts(self, text: str) -> list[str | int]:
        """Rendered text, split at the special tokens that are not marked."""
        parts: list[str | int] = []
        begin = 0
        for match in self._pattern.finditer(text):
            parts += [text[begin : match.start()], self._special[match[0]]]
            begin = match.end()
        parts.append(text[begin:])
        unmarked = [part if isinstance(part, int) else part.replace(MARK, "").replace(AFTER, "") for part in parts]
        return [part for part in unmarked if part != ""]


def find_chat_template(
    choice: str | None, tokenizer: Tokenizer, directory: Path | None, *, for_training: bool = False
) -> ChatTemplate | None:
    """The template that is chosen: `plain`, `none`, or a file; without a choice the model's own, otherwise plain.

    directory: of the model, if it is saved. for_training: plain answers end with the token that ends a text.

    Raises ValueError for a file that is no template, OSError if it cannot be read.
    """
    if choice == "none":
        return None
    files = ChatFiles() if directory is None else read_chat_files(directory)
    end = tokenizer.document_start if tokenizer.document_end is None else tokenizer.document_end
    special = {"bos_token": _spelling(tokenizer, tokenizer.document_start), "eos_token": _spelling(tokenizer, end)}
    special |= files.special
    if choice is None and files.templates:
        return ChatTemplate(tokenizer, str(directory), files.templates, special)
    if choice is None or choice == "plain":
        if for_training:
            return ChatTemplate(tokenizer, "plain", {DEFAULT: ENDED}, special)
        return ChatTemplate(tokenizer, "plain", {DEFAULT: PLAIN}, special, PLAIN_STOPS)
    path = Path(choice)
    if not path.is_file():
        raise FileNotFoundError(f"no chat template at {choice}; accepted: plain, none, or a file with a Jinja template")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    return ChatTemplate(tokenizer, str(path), {DEFAULT: source}, special)


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    return next((content for content, n in tokenizer.special_tokens.items() if n == token), "")


def _special(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _densely(text: str) -> str:
    """Mark every character of a text but the white space around it, which templates trim."""
    core = text.strip()
    if not core:
        return text
    begin = text.index(core)
    return f"{text[:begin]}{MARK}{MARK.join(core)}{AFTER}{text[begin + len(core) :]}"


_FIXED = {"role", "type", "id", "tool_call_id"}  # keys of closed sets, or of ids whose length templates check
_OWN_KEYS = {"properties", "$defs", "definitions"}  # their keys are the client's, and those below are a schema's again


def _marked(value: Any, mark: Mark, lightly: Mark, *, own: bool = False, arguments: bool = False) -> Any:
    """JSON with the client's texts marked: values, and keys that are the client's own (own, arguments).

    lightly: marks what templates look up and compare.
    """
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, (list, tuple)):
        return [_marked(item, mark, lightly, arguments=arguments) for item in value]
    if not isinstance(value, Mapping):
        return value
    marked = {}
    for key, item in value.items():
        if key in _FIXED and isinstance(item, str) and not arguments:
            item = lightly(item)
        else:
            below = {"own": key in _OWN_KEYS and not own, "arguments": arguments or (key == "arguments" and not own)}
            item = _marked(item, mark, lightly, **below)
        marked[(mark if own or arguments else lightly)(key)] = item
    return marked


def _left_open(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the end of the last one marked."""
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str):
        raise TemplateError("continue_final_message: the last message has no text to be continued")
    return [*messages[:-1], {**last, "content": f"{last['content']}{END} "}]


def _cut_at_end(text: str) -> str:
    """Rendered text up to the end of the last message, without the space that a template trims there."""
    before, end, after = text.rpartition(END)
    if not end:
        raise TemplateError("continue_final_message: the template does not write the last message as it is")
    return before if after.startswith(" ") else before.rstrip()

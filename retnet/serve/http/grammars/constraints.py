"""Constrained output: JSON, JSON schemas, regular expressions, choices and Lark grammars, compiled by llguidance.

`constraint_of` reads the fields of a request, `Constraints.compile` makes the grammar that the engine follows.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from llguidance import LLMatcher

from retnet.data.tokenizer import Tokenizer
from retnet.serve.grammar import Grammar
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars.matcher import GuidedGrammar, MaskThreads, packed
from retnet.serve.http.grammars.probe import COMPILE_STACK, Probe, compiled, short_error, tokenizer_of
from retnet.serve.http.grammars.vocabulary import text_of_tokens
from retnet.serve.http.service import Service
from retnet.system.checks import quoted
from retnet.system.suggest import choices

# White space between the parts of a JSON text: a space, or a line break and an indentation. More would let a model
# emit nothing else.
WHITE_SPACE = r"[ ]|\r?\n[ \t]{0,32}"
JSON_OPTIONS = {"whitespace_pattern": WHITE_SPACE}
ANY_OBJECT = '{"type": "object"}'
KINDS = ("json", "json_object", "regex", "choice", "grammar")
MAX_CHOICES = 10_000
MAX_SIZE = {"json": 128 * 2**10, "regex": 16 * 2**10, "choice": 256 * 2**10, "grammar": 64 * 2**10}  # characters
MAX_DEPTH = 64  # of a schema
CACHED = 32  # compiled grammars
COMPILERS = 2  # grammars that are compiled at a time
MAX_WAITING = 32  # grammars that wait for that
COMPILE_SECONDS = 2.0
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Constraint:
    """What an output must look like.

    kind: json (a schema), regex, choice or grammar (Lark). text: the schema or the choices as JSON, otherwise as given.
    param: the field of the request.
    """

    kind: str
    text: str
    param: str = field(compare=False)


def constraint_of(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> Constraint | None:
    """The constraint that a request asks for. Raises ApiError that names the field at fault."""
    given = _given(structured_outputs, "structured_outputs")
    found = None if response_format is None else _response_format(response_format)
    if not given:
        return found
    if found is not None:
        raise ApiError(
            400, "response_format and structured_outputs are both given; accepted: one", param="structured_outputs"
        )
    return _structured_output(given)


def _given(fields: Mapping[str, Any] | None, param: str) -> dict[str, Any]:
    if fields is None:
        return {}
    if not isinstance(fields, Mapping):
        raise ApiError(400, f"{param} is {quoted(fields)}; accepted: an object", param=param)
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(given: Mapping[str, Any]) -> Constraint | None:
    fields = _given(given, "response_format")
    kind = fields.pop("type", None)
    accepted = {"text": (), "json_object": (), "json_schema": ("json_schema",)}
    if not isinstance(kind, str) or kind not in accepted:
        raise ApiError(
            400,
            f"response_format.type is {quoted(kind)}; {choices(kind, accepted)}",
            param="response_format.type",
        )
    _refuse_others(fields, accepted[kind], "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", ANY_OBJECT, "response_format")
    param = "response_format.json_schema"
    described = _given(fields.get("json_schema"), param)
    _refuse_others(described, ("name", "schema", "strict", "description"), param)
    name, strict, description = described.get("name"), described.get("strict"), described.get("description", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400, f"{param}.name is {quoted(name)}; accepted: 1 to 64 letters, digits, _ and -", param=f"{param}.name"
        )
    if strict is not None and not isinstance(strict, bool):
        raise ApiError(400, f"{param}.strict is {quoted(strict)}; accepted: true, false, null", param=f"{param}.strict")
    if not isinstance(description, str):
        raise ApiError(400, f"{param}.description is {quoted(description)}; accepted: text", param=param)
    return json_constraint(described.get("schema"), f"{param}.schema")


def _structured_output(fields: dict[str, Any]) -> Constraint | None:
    _refuse_others(fields, KINDS, "structured_outputs")
    if fields.get("json_object") is False:
        del fields["json_object"]
    if not fields:
        return None
    if len(fields) > 1:
        raise ApiError(
            400,
            f"structured_outputs has {' and '.join(sorted(fields))}; accepted: one of {', '.join(KINDS)}",
            param="structured_outputs",
        )
    ((kind, value),) = fields.items()
    param = f"structured_outputs.{kind}"
    if kind == "json_object":
        if value is not True:
            raise ApiError(400, f"{param} is {quoted(value)}; accepted: true, false", param=param)
        return Constraint("json", ANY_OBJECT, param)
    if kind == "json":
        return json_constraint(value, param)
    if kind == "choice":
        return _choice(value, param)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{param} is {quoted(value)}; accepted: text", param=param)
    return _bounded(Constraint(kind, value, param))


def json_constraint(schema: object, param: str) -> Constraint:
    """The constraint of a JSON schema, an object or its JSON text. Raises ApiError that names `param`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(_bounded(Constraint("json", schema, param)).text)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{param} is no JSON text: {error}"[:200], param=param) from error
    if not isinstance(schema, dict):
        raise ApiError(400, f"{param} is {quoted(schema)}; accepted: a JSON schema, an object", param=param)
    _check_schema(schema, param)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        raise ApiError(400, f"{param} cannot be written as JSON: {error}"[:200], param=param) from error
    return _bounded(Constraint("json", text, param))


def _check_schema(schema: dict[str, Any], param: str) -> None:
    if "x-guidance" in schema:
        raise ApiError(400, f"{param} has x-guidance; accepted: the keywords of JSON schema", param=param)
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                reference = part.get("$ref")
                if isinstance(reference, str) and not reference.startswith("#"):
                    raise ApiError(
                        400,
                        f"{param} refers to {quoted(reference)}; accepted: references inside the schema, such as "
                        '"#/$defs/name" (no other document is fetched)',
                        param=param,
                    )
                below += part.values()
            elif isinstance(part, list):
                below += part
        level = below
    if level:
        raise ApiError(400, f"{param} is nested more than {MAX_DEPTH} levels deep; accepted: fewer", param=param)


def _choice(value: object, param: str) -> Constraint:
    accepted = f"1 to {MAX_CHOICES:,} different strings"
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
        shown = f"a list of {len(value):,}" if isinstance(value, list) else quoted(value)
        raise ApiError(400, f"{param} is {shown}; accepted: {accepted}", param=param)
    for one in value:
        if not isinstance(one, str):
            raise ApiError(400, f"{param} has {quoted(one)}; accepted: {accepted}", param=param)
    return _bounded(Constraint("choice", json.dumps(value), param))


def _bounded(constraint: Constraint) -> Constraint:
    size, most = len(constraint.text), MAX_SIZE[constraint.kind]
    if size > most:
        raise ApiError(400, f"{constraint.param} has {size:,} characters; accepted: {most:,}", param=constraint.param)
    return constraint


def _refuse_others(fields: Mapping[str, Any], accepted: Sequence[str], param: str) -> None:
    for name in fields:
        if name not in accepted:
            raise ApiError(
                400,
                f"{param} has {quoted(name)}, which is not honoured; {choices(name, accepted or ('type alone',))}",
                param=param,
            )


def _source(constraint: Constraint) -> str:
    """The constraint in llguidance's own format, which is JSON."""
    text = constraint.text
    if constraint.kind == "json":
        grammar: dict[str, Any] = {"json_schema": {**json.loads(text), "x-guidance": JSON_OPTIONS}}
    elif constraint.kind == "grammar":
        grammar = {"lark_grammar": text}
    else:
        expression = text if constraint.kind == "regex" else f"(?:{'|'.join(map(_escaped, json.loads(text)))})"
        return LLMatcher.grammar_from_regex(expression)
    return json.dumps({"grammars": [grammar]})


def _escaped(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


class Constraints:
    """Compiles constraints for one model, on threads of its own, and keeps the last ones.

    vocab_size: of the model; its tokens beyond the tokenizer's are never allowed. ends: tokens that end an output. If
    there are none, the document start ends it: the next document would begin there.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int] = ()):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ends = sorted(set(ends)) or [tokenizer.document_start]
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting = 0
        self._vocabulary: _Vocabulary | None = None
        self._compilers: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, service: Service, ends: Sequence[int] = ()) -> Constraints:
        """Constraints of a service's model. ends: tokens that end an output beside those of the model and tokenizer."""
        end = service.tokenizer.document_end
        own = (*ends, *service.engine.model.eos_token_ids, *(() if end is None else (end,)))
        return cls(service.tokenizer, service.vocab_size, [token for token in own if token < service.vocab_size])

    async def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint.

        Raises ApiError: 400 for one that cannot be compiled within its limits, 429 if too many others wait.
        """
        kept = self._look_up(constraint)
        if kept is not None:
            return kept
        if self._waiting >= MAX_WAITING:
            raise ApiError(
                429, f"{self._waiting} grammars wait to be compiled; try again later", headers={"Retry-After": "1"}
            )
        if self._compilers is None:
            self._compilers = _threads(COMPILERS)
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._compilers.submit(self.compile_here, constraint))
        finally:
            self._waiting -= 1

    def compile_here(self, constraint: Constraint) -> Grammar:
        """`compile` on the calling thread."""
        kept = self._look_up(constraint)
        if kept is not None:
            return kept
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._ends)
        try:
            source = _source(constraint)
            with self._vocabulary.probe() as probe:
                refused = probe.check(source)
            if refused is not None:
                raise ValueError(refused)
            beginning = compiled(self._vocabulary.tokenizer, source)
        except ValueError as error:
            raise ApiError(
                400, f"{constraint.param} cannot be used: {short_error(str(error))}", param=constraint.param
            ) from error
        grammar = self._vocabulary.grammar(beginning, lambda: self._forget(constraint))
        with self._lock:
            self._kept[constraint] = grammar
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return grammar

    def close(self) -> None:
        """End its threads and processes."""
        if self._compilers is not None:
            self._compilers.shutdown(cancel_futures=True)
        if self._vocabulary is not None:
            self._vocabulary.close()

    def _look_up(self, constraint: Constraint) -> Grammar | None:
        with self._lock:
            kept = self._kept.get(constraint)
            if kept is not None:
                self._kept.move_to_end(constraint)
            return kept

    def _forget(self, constraint: Constraint) -> None:
        with self._lock:
            self._kept.pop(constraint, None)


class _Vocabulary:
    """What all grammars of a model share: its tokens as llguidance reads them, the threads for masks, the probes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]):
        texts = text_of_tokens(tokenizer, vocab_size)
        for end in ends:
            texts[end] = b""
        self.tokenizer = tokenizer_of(texts, ends, tokenizer.encode)
        allowed = torch.zeros((vocab_size + 31) // 32 * 32, dtype=torch.bool)
        allowed[:vocab_size] = torch.tensor([bool(text) for text in texts])
        self._text, self._ends = packed(allowed), ends
        self._threads = MaskThreads(max(1, min(4, (os.cpu_count() or 1) // 2)))
        self._probes: SimpleQueue[Probe] = SimpleQueue()
        for _ in range(COMPILERS):
            self._probes.put(Probe(texts, ends, COMPILE_SECONDS))

    @contextmanager
    def probe(self) -> Iterator[Probe]:
        """A probe of the caller's own, as soon as one is free."""
        probe = self._probes.get()
        try:
            yield probe
        finally:
            self._probes.put(probe)

    def grammar(self, beginning: LLMatcher, failed: Callable[[], None]) -> GuidedGrammar:
        return GuidedGrammar(beginning, self._threads, self._text, self._ends, failed)

    def close(self) -> None:
        for _ in range(COMPILERS):
            self._probes.get().close()
        self._threads.close()


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have the stack that compilation needs; a pool starts threads when it gets work."""
    before = threading.stack_size(COMPILE_STACK)
    try:
        pool, all_started = ThreadPoolExecutor(count, "retnet grammars"), threading.Barrier(count + 1)
        for _ in range(count):
            pool.submit(all_started.wait)
        all_started.wait()
        return pool
    finally:
        threading.stack_size(before)

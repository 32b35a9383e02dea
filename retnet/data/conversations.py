"""Conversations in jsonl: one object per line with `messages`, as OpenAI's API and chat templates have them.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}

An answer with `"weight": 0` is read and not learned, as in OpenAI's files for fine-tuning. `chat_template_kwargs` are
variables of the template, as in TRL. Other fields beside `messages` are ignored, those of a message are the template's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retnet.data.chat_answers import Conversation
from retnet.data.compression import DamagedError, plain_name, suffix_of, unpacked
from retnet.data.kinds import BOM, JSONL_SUFFIXES, LINE_BYTES, Kind
from retnet.data.readers import DataError
from retnet.data.sources import SourceFile, find_source
from retnet.data.stores import Location
from retnet.system.files import naming
from retnet.system.sizes import format_bytes

MESSAGES = "messages"
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 16_384


def conversation_files(source: str) -> tuple[SourceFile, ...]:
    """The files of a source of conversations: jsonl whose first line has `messages`. Empty for any other source.

    Raises as `find_source` does, and DataError for a first line that cannot be read.
    """
    if not _may_be_jsonl(Path(source)):
        return ()
    found = find_source(source, MESSAGES)
    if found.kind is not Kind.TEXT or any(file.kind is not Kind.JSONL for file in found.files):
        return ()
    first = next(_records(found.files[0].path), None)
    if first is None or not isinstance(first[1], dict) or MESSAGES not in first[1]:
        return ()
    found.warn()
    return found.files


def _may_be_jsonl(path: Path) -> bool:
    """Whether a path has the name of jsonl, or a folder holds one: cheap, as most sources are something else."""
    names = [path.name] if path.is_file() else [name for _, _, files in os.walk(path) for name in files]
    return any(suffix_of(plain_name(Path(name))) in JSONL_SUFFIXES for name in names)


def read_conversations(file: Location) -> Iterator[tuple[int, Conversation]]:
    """The line of each conversation, and the conversation. Raises DataError that names the line, and OSError."""
    for line, record in _records(file):
        try:
            yield line, _conversation(record)
        except ValueError as error:
            raise DataError(f"{file}:{line}: {error}") from error


def _records(file: Location) -> Iterator[tuple[int, Any]]:
    """The line number and the JSON value of each line that is not blank."""
    with naming(file):
        try:
            with file.open("rb") as raw, unpacked(raw, file) as text:
                number = 0
                while line := text.readline(LINE_BYTES + 1):
                    number += 1
                    if len(line) > LINE_BYTES:
                        raise DataError(f"{file}:{number}: a line of more than {format_bytes(LINE_BYTES)}")
                    line = line.removeprefix(BOM) if number == 1 else line
                    if line.strip():
                        yield number, _parse(line, f"{file}:{number}")
        except DamagedError as error:
            raise DataError(str(error)) from error


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error.reason} 0x{line[error.start]:02x}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two fields named {twice!r}; accepted: one")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number; accepted: finite numbers")


def _conversation(record: Any) -> Conversation:
    """The conversation of a record. Raises ValueError that says what is accepted."""
    if not isinstance(record, dict) or MESSAGES not in record:
        given = (
            f"fields {', '.join(record) or 'none'}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        )
        raise ValueError(f"{given}; accepted: an object with {MESSAGES!r}, a list of {{role, content}}")
    messages = record[MESSAGES]
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise ValueError(f"{MESSAGES} is {_short(messages)}; accepted: a list of 1 to {MAX_MESSAGES:,} messages")
    tools, options = record.get("tools") or [], record.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {_short(tools)}; accepted: a list of objects, as in OpenAI's API")
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs is {_short(options)}; accepted: an object")
    read = [_message(message, f"{MESSAGES}[{i}]") for i, message in enumerate(messages)]
    return Conversation([m for m, _ in read], tools, [learned for _, learned in read], options)


def _message(given: Any, place: str) -> tuple[dict[str, Any], bool]:
    """A message as templates read it, and whether it is an answer to be learned."""
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(given, dict) or role not in ROLES:
        found = _short(given) if role is None else f"of role {role!r}"
        raise ValueError(f"{place} is {found}; accepted: an object with role ({', '.join(ROLES)}) and content")
    message = {key: value for key, value in given.items() if value is not None and key != "weight"}
    message["role"] = "system" if role == "developer" else role
    message["content"] = _content(given.get("content"), place)
    calls, weight = given.get("tool_calls"), given.get("weight")
    if calls:
        if role != "assistant":
            raise ValueError(f"{place} has tool_calls and role {role}; accepted: in messages of assistant")
        message["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    elif given.get("content") is None:
        accepted = "text, or tool_calls" if role == "assistant" else "text"
        raise ValueError(f"{place} has no content; accepted: {accepted}")
    if weight is not None and (role != "assistant" or weight not in (0, 1) or isinstance(weight, bool)):
        raise ValueError(f"{place} has weight {weight!r} and role {role}; accepted: 0 or 1, in messages of assistant")
    return message, role == "assistant" and weight != 0


def _content(given: Any, place: str) -> str:
    """Text as it is; the texts of a list of parts, with line breaks between them, as the server joins them."""
    if given is None or isinstance(given, str):
        return given or ""
    parts = given if isinstance(given, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f'{place}.content is {_short(given)}; accepted: text, or a list of {{"type": "text", "text": ...}}'
        )
    return "\n".join(map(str, texts))


def _calls(given: Any, place: str) -> list[Mapping[str, Any]]:
    """Tool calls with their arguments as objects, which OpenAI's API has as JSON text."""
    functions: Sequence[Any] = [call.get("function") if isinstance(call, dict) else None for call in _listed(given)]
    if not functions or not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise ValueError(f"{place} is {_short(given)}; accepted: a list of {{function: {{name, arguments}}}}")
    calls = []
    for call, function in zip(given, functions, strict=True):
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: arguments of {function['name']!r} are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError(
                f"{place}: arguments of {function['name']!r} are no object; accepted: one, or its JSON text"
            )
        calls.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return calls


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Tools: functions that a client offers, and the calls of them that the model writes in its answer.

One format of calls is read, that of Hermes, which Qwen and many fine-tuned models use. Chat templates of these models
describe it to the model:

    <tool_call>
    {"name": "weather", "arguments": {"town": "Köln"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from retnet.serve.http.constraints import JSON_OPTIONS, Constraint, json_constraint
from retnet.serve.http.errors import ApiError
from retnet.serve.http.messages import NAME
from retnet.system.checks import quoted

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)  # of JSON
MAX_GRAMMAR = 64 * 2**10  # characters


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(pattern=NAME, description="1 to 64 letters, digits, _ and -.")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool | None = Field(
        None, description="Accepted and not needed: where a call is enforced, its arguments are of the schema."
    )


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as templates read it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. choice: none, auto, required, or the name of the function to call.

    several: whether one answer may call more than once.
    """

    tools: Sequence[Tool] = ()
    choice: str = "none"
    several: bool = True
    named: bool = False

    @property
    def reads_calls(self) -> bool:
        """Whether calls are looked for in the answer."""
        return self.choice != "none"

    @property
    def enforced(self) -> bool:
        """Whether the answer must be a call."""
        return self.named or self.choice == "required"

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told about: none if it must not call any."""
        return [tool.for_template() for tool in self.tools] if self.reads_calls and self.tools else None

    def constraint(self) -> Constraint:
        """The grammar of an answer that must be a call."""
        tools = [tool for tool in self.tools if not self.named or tool.function.name == self.choice]
        calls = []
        for tool in tools:
            arguments = tool.function.parameters or {"type": "object"}
            checked = json_constraint(arguments, f"tools.{tool.function.name}.parameters").text
            schema = json.dumps({**json.loads(checked), "x-guidance": JSON_OPTIONS}, ensure_ascii=False)
            calls.append(f'"{{\\"name\\": \\"{tool.function.name}\\", \\"arguments\\": " %json {schema} "}}"')
        repeated = f'("\\n{BEGIN}\\n" call "\\n{END}")*' if self.several and not self.named else ""
        text = f'start: "{BEGIN}\\n" call "\\n{END}" {repeated}\ncall: ' + " | ".join(calls) + "\n"
        if len(text) > MAX_GRAMMAR:
            raise ApiError(
                400,
                f"the schemas of the tools have {len(text):,} characters; accepted where a call is enforced: "
                f"{MAX_GRAMMAR:,}",
                param="tools",
            )
        return Constraint("grammar", text, "tools")


def tool_use(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None, tool_format: str) -> ToolUse:
    """What a request says about tools. Raises ApiError for tools without a format, and for a choice of no tool."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, f"tool_choice is {quoted(choice)} without tools", param="tool_choice")
        return ToolUse()
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"two tools are named {quoted(twice)}; accepted: different names", param="tools")
    choice = "auto" if choice is None else choice
    if choice == "none":
        return ToolUse(tools)
    if tool_format == "none":
        raise ApiError(
            400,
            "tools are not honoured: the model's chat template describes no calls in a format that this server reads "
            "(Hermes: <tool_call>); accepted: no tools, tool_choice none, or a server with --tool-format hermes",
            param="tools",
        )
    several = parallel is None or parallel
    if choice in ("auto", "required"):
        return ToolUse(tools, choice, several)
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, dict) else None
    if name not in names:
        raise ApiError(
            400,
            f"tool_choice is {quoted(choice)}; accepted: none, auto, required, or "
            '{"type": "function", "function": {"name": ...}} with the name of a tool: ' + ", ".join(names),
            param="tool_choice",
        )
    return ToolUse(tools, name, several, named=True)


@dataclass
class ReadCall:
    """A call that was read from an answer. arguments: their JSON text, as the model wrote it."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def body(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def deltas(self) -> list[dict[str, Any]]:
        """The call as two deltas of a stream, in OpenAI's form."""
        function = {"name": self.name, "arguments": ""}
        return [
            {"index": self.index, "id": self.id, "type": "function", "function": function},
            {"index": self.index, "function": {"arguments": self.arguments}},
        ]

    def for_template(self) -> dict[str, Any]:
        """The call as messages of a conversation have it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": from_json(self.arguments)},
        }


class CallReader:
    """Reads an answer as it comes: text for the client, and calls.

    What is not a call stays text: one that cannot be read, one that the end of the answer cuts, and further ones where
    one alone is accepted. White space around calls is dropped.
    """

    def __init__(self, several: bool = True):
        self.calls: list[ReadCall] = []
        self._several = several
        self._held = ""  # white space that a call may follow, the beginning of a call, or a call that is not complete

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[ReadCall]]:
        """The text and the calls that new text of the answer settles; with the last text, all that is left."""
        held, known = self._held + text, len(self.calls)
        said: list[str] = []
        begin = searched = 0  # of the text after the last call, and of what may hold another one
        while True:
            opened = held.find(BEGIN, searched)
            closed = -1 if opened < 0 else _end_of_call(held, opened)
            if closed < 0:
                break
            call = _parsed(held[opened:closed], len(self.calls)) if self._several or not self.calls else None
            searched = closed
            if call is not None:
                self.calls.append(call)
                said.append(held[begin:opened].rstrip())
                begin = closed
        if last:
            rest = held[begin:]
            said.append("" if self.calls and not rest.strip() else rest)
            self._held = ""
        else:
            end = opened if opened >= 0 else len(held) - _length_of_begun(held[searched:])
            end = max(begin, len(held[:end].rstrip()))
            said.append(held[begin:end])
            self._held = held[end:]
        return "".join(said), self.calls[known:]


def _end_of_call(text: str, opened: int) -> int:
    """Where a call ends that begins at `opened`, -1 if it does not. An end inside a string of its JSON is none."""
    closed = text.find(END, opened)
    while closed >= 0:
        if '"' not in _STRING.sub("", text[opened:closed]):
            return closed + len(END)
        closed = text.find(END, closed + 1)
    return -1


def _length_of_begun(text: str) -> int:
    """Characters at the end of a text that may begin a call."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)


def _parsed(whole: str, index: int) -> ReadCall | None:
    """The call that a text is, if it is one."""
    inner = whole[len(BEGIN) : -len(END)]
    try:
        call = from_json(inner, allow_inf_nan=False)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return ReadCall(index, call["name"], json.dumps(arguments, ensure_ascii=False))

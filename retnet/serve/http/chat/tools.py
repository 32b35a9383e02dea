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

from retnet.serve.http.chat.messages import NAME
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars.constraints import JSON_OPTIONS, Constraint, json_constraint
from retnet.system.checks import quoted

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
_MARKS = re.compile(rf'\\.|"|{END}', re.DOTALL)  # what tells where a call ends
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
    """Reads an answer as it comes: text for the client, and calls. The cost is linear in the length of the answer.

    What is not a call stays text: one that cannot be read, one that the end of the answer cuts, and further ones where
    one alone is accepted. White space around calls is dropped.
    """

    def __init__(self, several: bool = True):
        self.calls: list[ReadCall] = []
        self._several = several
        self._held = ""  # white space that a call may follow, the beginning of a call, or a call that is not complete
        self._opened = -1  # where in it a call begins
        self._scanned = 0  # how far its end was looked for
        self._in_string = False  # whether that is inside a string of its JSON

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[ReadCall]]:
        """The text and the calls that new text of the answer settles; with the last text, all that is left."""
        self._held += text
        known = len(self.calls)
        said: list[str] = []
        begin = searched = 0  # of the text after the last call, and of what may hold another one
        while self._find_call(searched):
            whole = self._held[self._opened : self._scanned]
            call = _parsed(whole, len(self.calls)) if self._several or not self.calls else None
            if call is not None:
                self.calls.append(call)
                said.append(self._held[begin : self._opened].rstrip())
                begin = self._scanned
            searched, self._opened = self._scanned, -1
        if last:
            rest = self._held[begin:]
            said.append("" if self.calls and not rest.strip() else rest)
            self._held = ""
        else:
            end = self._opened if self._opened >= 0 else len(self._held) - _length_of_begun(self._held[searched:])
            end = max(begin, len(self._held[:end].rstrip()))
            said.append(self._held[begin:end])
            self._held = self._held[end:]
            self._opened, self._scanned = self._opened - end, self._scanned - end
        return "".join(said), self.calls[known:]

    def _find_call(self, searched: int) -> bool:
        """Look for the end of the call that has begun, or of the next one; whether `_scanned` is its end.

        An end inside a string of its JSON is none.
        """
        held = self._held
        if self._opened < 0:
            self._opened = held.find(BEGIN, searched)
            if self._opened < 0:
                return False
            self._scanned, self._in_string = self._opened + len(BEGIN), False
        while found := _MARKS.search(held, self._scanned):
            self._scanned = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            elif found[0] == END and not self._in_string:
                return True
        self._scanned = max(self._scanned, len(held) - len(END) + 1)
        return False


def _length_of_begun(text: str) -> int:
    """Characters at the end of a text that may begin a call."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)


def _parsed(whole: str, index: int) -> ReadCall | None:
    """The call that a text is, if it is one."""
    inner = whole[len(BEGIN) : -len(END)]
    try:
        call = from_json(inner, allow_inf_nan=False)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # also numbers that Python does not write
        return None
    return ReadCall(index, call["name"], text) if isinstance(arguments, dict) else None

"""Messages of a conversation: what clients send, checked, and as chat templates read it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import from_json

from retnet.serve.http.api.fields import wrong
from retnet.serve.http.api.refused import Refusals, honoured
from retnet.serve.http.errors import ApiError

MAX_MESSAGES = 16_384
MAX_TOOL_CALLS = 128
TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MEDIA_TYPES = ("image_url", "image", "input_image", "input_audio", "audio", "audio_url", "file", "video", "video_url")
NAME = r"^[a-zA-Z0-9_-]{1,64}$"

REFUSED_IN_MESSAGES: Refusals = {
    "annotations": (([],), "the model reads text"),
    "audio": ((), "the model reads text"),
    "function_call": ((), "use tool_calls"),
    "cache_control": ((), "the prefix cache finds common beginnings by itself"),
}


def _content(given: Any) -> str | None:
    """Text as it is; the texts of a list of parts, with line breaks between them."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong('text, or a list of {"type": "text", "text": ...}')
    return "\n".join(map(_part, given))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in MEDIA_TYPES:
        raise ApiError(400, f"content of type {kind} is not honoured: the model reads text", param="messages")
    key = TEXT_TYPES.get(kind) if isinstance(kind, str) else None
    if key is None or not isinstance(part.get(key), str):
        raise wrong('text, or a list of {"type": "text", "text": ...}')
    return part[key]


def _arguments(given: Any) -> dict[str, Any]:
    """The arguments of a call as an object; clients send their JSON text."""
    try:
        if isinstance(given, str):
            given = from_json(given, allow_inf_nan=False) if given.strip() else {}
        json.dumps(given, allow_nan=False)  # 1e999 is parsed as infinity
    except (ValueError, RecursionError) as error:
        raise wrong(f"the JSON text of an object ({error})") from error
    if not isinstance(given, dict):
        raise wrong("an object, or its JSON text")
    return given


class CalledFunction(BaseModel):
    """The function that a message calls."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(pattern=NAME)
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments, json_schema_input_type=str | dict[str, Any])]


class ToolCall(BaseModel):
    """A call of a tool, in a message of the assistant."""

    model_config = ConfigDict(strict=True, extra="forbid")

    index: int | None = Field(None, description="Its place in a stream, which clients send back.")
    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message. Which fields it may have depends on its role."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is the same as system."
    )
    content: Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[Any] | None)] = Field(
        None, description='Text, or a list of {"type": "text", "text": ...}, which are joined by line breaks.'
    )
    name: str | None = Field(None, max_length=256, description="Who writes. Some templates read it.")
    refusal: str | None = Field(None, description="In place of the content, in messages of the assistant.")
    reasoning_content: str | None = Field(None, description="Messages of the assistant. Some templates read it.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = Field(
        None, description="Messages of the assistant: the calls that it made."
    )
    tool_call_id: str | None = Field(None, max_length=256, description="Messages of a tool: the call they answer.")

    @model_validator(mode="before")
    @classmethod
    def _honoured(cls, given: Any) -> Any:
        return honoured(given, cls.model_fields, REFUSED_IN_MESSAGES) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_role(self) -> Message:
        for field in ("refusal", "reasoning_content", "tool_calls"):
            if getattr(self, field) is not None and self.role != "assistant":
                raise ApiError(400, f"{field} in a message of {self.role}; accepted: of assistant", param="messages")
        if self.tool_call_id is not None and self.role != "tool":
            raise ApiError(400, f"tool_call_id in a message of {self.role}; accepted: of tool", param="messages")
        if self.role == "assistant":
            if self.content is None and self.refusal is not None:
                self.content = self.refusal
            if self.content is None and not self.tool_calls:
                raise ApiError(400, "a message of assistant has neither content nor tool_calls", param="messages")
        elif self.content is None:
            raise ApiError(400, f"a message of {self.role} has no content; accepted: text", param="messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as templates read it, and as sessions keep it: JSON, without what is not given."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        return message

"""Conversations with a server, which keeps them as sessions, so that a turn sends and reads only what is new.

The standard library's client is enough for a few JSON requests and one stream of events, and saves a dependency.
Redirections are not followed: they would carry the API key to another host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from retnet.cli.chat_turn import Answer, Backend, ChatError, Turn
from retnet.system.files import written_whole
from retnet.system.sizes import format_bytes

TIMEOUT = 600.0  # seconds without a byte from the server, which sends comments while it has nothing to say
BLOCK = 1 << 20  # bytes of a file
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Kept:
    """A session of the server, and how many messages of the conversation it has."""

    id: str
    num_messages: int


class ServerBackend(Backend):
    """A client of `retnet serve`.

    url: of the server, with or without /v1. key: an API key. fields: of every request, such as temperature.

    Raises ChatError if there is no such server.
    """

    def __init__(self, url: str, key: str | None, fields: Mapping[str, Any]):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.fields = dict(fields)
        self._key = key
        handlers = [ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
        self._opener = build_opener(_NoRedirection, *handlers)
        self._sessions: set[str] = set()
        models = self.json("GET", "/v1/models").get("data") or [{}]
        self.model = str(models[0].get("id"))

    def ask(self, turn: Turn, text: str) -> Answer:
        return ServerAnswer(self, turn, text)

    def fork(self, turn: Turn) -> Turn:
        if turn.state is None:
            return turn
        forked = self.json("POST", f"/v1/sessions/{turn.state.id}/fork")
        return Turn(turn.messages, Kept(self.own(forked["id"]), turn.state.num_messages), turn.tokens)

    def past(self, turn: Turn) -> Turn:
        return Turn(turn.messages)  # the session has moved on

    def save(self, turn: Turn, path: Path) -> str:
        if turn.state is None:
            raise ChatError("there is no state to save; say something first")
        with self.open("GET", f"/v1/sessions/{turn.state.id}/state") as response, written_whole(path) as file:
            size = 0
            while block := response.read(BLOCK):
                size += len(block)
                file.write(block)
            expected = response.getheader("Content-Length")
            if expected is not None and size != int(expected):
                raise ChatError(f"the server sent {size} bytes of {expected}")
        return f"{turn.tokens} tokens, {format_bytes(size)}"

    def load(self, path: Path) -> Turn:
        with path.open("rb") as file:
            size = str(path.stat().st_size)
            headers = {"Content-Type": "application/octet-stream", "Content-Length": size}
            session = self.json("POST", "/v1/sessions", file, headers)
        session_id = self.own(session["id"])
        facts = self.json("GET", f"/v1/sessions/{session_id}?messages=true")
        if facts["messages"] is None:
            raise ChatError(f"{path} holds no messages; accepted: a file that /save wrote, or a chat's session")
        return Turn(tuple(facts["messages"]), Kept(session_id, len(facts["messages"])), facts["tokens"])

    def facts(self, turn: Turn) -> list[str]:
        lines = [f"{turn.tokens} tokens in {len(turn.messages)} messages, answered by {self.model} at {self.url}"]
        if turn.state is not None:
            session = self.json("GET", f"/v1/sessions/{turn.state.id}")
            lines.append(f"session {turn.state.id}: {format_bytes(session['bytes'], 3)}")
        return lines

    def own(self, session_id: str) -> str:
        """Note a session, to be deleted at the end."""
        self._sessions.add(session_id)
        return session_id

    def close(self) -> None:
        for session_id in self._sessions:
            try:
                self.json("DELETE", f"/v1/sessions/{session_id}")
            except ChatError:
                continue  # gone already, or the server is; it ends unused sessions by itself
        self._sessions.clear()

    def json(self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON of a response."""
        with self.open(method, path, data, headers) as response:
            try:
                return json.loads(response.read())
            except ValueError as error:
                raise ChatError(f"{self.url}{path} gave no JSON; accepted: the address of a retnet server") from error

    def open(self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None) -> HTTPResponse:
        """A response. data: bytes or a file."""
        if data is None and method == "POST":
            data = b""
        request = Request(f"{self.url}{path}", data, dict(headers or {}), method=method)
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            return self._opener.open(request, timeout=TIMEOUT)
        except HTTPError as error:
            with error:
                raise ServerError(error.code, _message(error)) from error
        except (URLError, OSError, HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise ChatError(f"no answer from {self.url}: {reason}") from error


class ServerError(ChatError):
    """A response that is an error, with its status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _message(error: HTTPError) -> str:
    """The message of an error's body, otherwise its status."""
    try:
        return str(json.loads(error.read(BLOCK))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return f"the server answers {error.code} {error.reason}"


class ServerAnswer(Answer):
    """An answer of a server, as a stream of events."""

    def __init__(self, backend: ServerBackend, before: Turn, text: str):
        super().__init__(before, text)
        self._backend = backend
        self._stopped = self._waiting = False

    def stop(self) -> None:
        self._stopped = True
        if self._waiting:
            raise KeyboardInterrupt  # the server may be silent for long

    def __iter__(self) -> Iterator[str]:
        pieces: list[str] = []
        session: dict[str, Any] | None = None
        response: HTTPResponse | None = None
        try:
            self._waiting = True
            response = self._open()
            events = _events(response)
            while not self._stopped and (data := next(events, None)) is not None:
                self._waiting = False
                if "error" in data:
                    raise ChatError(str(data["error"].get("message")))
                session = data.get("session", session)
                self._count(data.get("usage"))
                for choice in data.get("choices", ()):
                    self.figures.finish = choice.get("finish_reason") or self.figures.finish
                    if piece := choice["delta"].get("content"):
                        self.figures.tick()
                        pieces.append(piece)
                        yield piece
                self._waiting = True
        except (OSError, HTTPException) as error:
            raise ChatError(f"the connection broke off: {error}") from error
        except KeyboardInterrupt:
            if not self._stopped:
                raise
        finally:
            self._waiting = False
            if response is not None:
                response.close()
        if self._stopped and self.figures.finish is None:
            self.figures.finish = "cancelled"
        if pieces or self.figures.finish != "cancelled":
            self._finish("".join(pieces), session or {})

    def _finish(self, text: str, session: Mapping[str, Any]) -> None:
        """Take over the answer. A stream that was left changes no session; the messages since then are sent again."""
        self.figures.reused = max(self.figures.reused, session.get("reused_tokens") or 0)
        self.figures.not_reused = session.get("not_reused") or self.figures.not_reused
        kept, state = session.get("id"), self.before.state
        if kept is not None:
            state = Kept(self._backend.own(kept), len(self.messages) + 1)
        self.end(text, state, session.get("tokens") or self.before.tokens)

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        if usage is not None:
            self.figures.new_tokens = usage["completion_tokens"]
            self.figures.reused = usage["prompt_tokens_details"]["cached_tokens"]
            self.figures.read = usage["prompt_tokens"] - self.figures.reused

    def _open(self) -> HTTPResponse:
        kept: Kept | None = self.before.state
        if kept is not None:
            try:
                return self._post({"messages": self.messages[kept.num_messages :], "session_id": kept.id})
            except ServerError as error:
                if error.status not in (404, 410):
                    raise
                self.figures.not_reused = "the server has no such session any more"
        return self._post({"messages": self.messages})

    def _post(self, fields: dict[str, Any]) -> HTTPResponse:
        options = {"stream": True, "stream_options": {"include_usage": True}, "keep_session": True}
        body = json.dumps(self._backend.fields | fields | options).encode()
        return self._backend.open("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to the last."""
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise ChatError(f"the server sent an event that is no JSON: {error}") from error
            yield event if isinstance(event, dict) else {}
    raise ChatError("the stream ended before the answer did")

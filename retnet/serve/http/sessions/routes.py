"""Sessions over HTTP: list, look, fork, delete, download and upload."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import State
from starlette.types import Receive, Scope, Send

from retnet.serve.http.errors import ApiError
from retnet.serve.http.sessions.entry import Entry
from retnet.serve.http.sessions.record import Session
from retnet.serve.http.sessions.store import SessionStore
from retnet.serve.http.sessions.upload import ENDED, Uploads

CHUNK = 2**20  # bytes of a file that are sent at a time
MOST_LISTED = 100
MOST_DOWNLOADS = 8  # at a time
OCTETS = "application/octet-stream"
router = APIRouter(prefix="/v1/sessions", tags=["sessions"])


def describe(store: SessionStore, entry: Entry) -> dict[str, Any]:
    """A session as the API shows it. Times are in seconds since the epoch, sizes in bytes."""
    record = entry.record
    in_memory, on_disk = entry.session is not None, entry.is_stored
    return {
        "id": record.id,
        "object": "session",
        "tokens": record.tokens,
        "bytes": record.bytes,
        "created": int(record.created),
        "last_used": int(entry.used),
        "expires": int(entry.used + store.ttl),
        "where": [place for place, there in (("memory", in_memory), ("disk", on_disk)) if there],
        "foreign": record.foreign,
        "parent": record.parent,
        "revision": record.revision,
        "usable": record.model == store.model,
    }


@router.get("")
async def list_sessions(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED, description="Sessions per page.")] = 20,
    after: Annotated[str | None, Query(max_length=64, description="The last session of the page before.")] = None,
) -> dict[str, Any]:
    """The sessions of the caller's API key, newest first."""
    store: SessionStore = request.app.state.sessions
    entries, more = await store.list(request.state.key, limit, after)
    data = [describe(store, entry) for entry in entries]
    ids = [session["id"] for session in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": more,
    }


@router.get("/{session_id}")
async def get_session(
    request: Request,
    session_id: str,
    messages: Annotated[bool, Query(description="Add the messages of a chat; null for a session without.")] = False,
) -> dict[str, Any]:
    """Facts of a session: tokens, bytes, times, where its state lies."""
    store: SessionStore = request.app.state.sessions
    facts = describe(store, await store.look(session_id, request.state.key))
    if messages:
        facts["messages"] = (await store.open(session_id, request.state.key)).messages
    return facts


@router.delete("/{session_id}")
async def delete_session(request: Request, session_id: str) -> dict[str, Any]:
    """End a session. A request that continues it goes on, and cannot keep it."""
    store: SessionStore = request.app.state.sessions
    await store.delete(session_id, request.state.key)
    return {"id": session_id, "object": "session.deleted", "deleted": True}


@router.post("/{session_id}/fork", status_code=201)
async def fork_session(request: Request, session_id: str) -> dict[str, Any]:
    """A second session that begins as this one is. They share the state until one of them moves on."""
    store: SessionStore = request.app.state.sessions
    fork = await store.fork(session_id, request.state.key)
    return describe(store, await store.look(fork.id, request.state.key))


class Download(StreamingResponse):
    """A session as a file. It takes one of MOST_DOWNLOADS places, since it holds the state as long as it is sent."""

    def __init__(self, state: State, session: Session, head: bytes, pieces: Iterator[bytes | memoryview]):
        headers = {
            "Content-Length": str(len(head) + _data_size(head)),
            "Content-Disposition": f'attachment; filename="{session.id}.safetensors"',
        }
        super().__init__(_sent(head, pieces), media_type=OCTETS, headers=headers)
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.downloads += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._state.downloads -= 1


@router.get("/{session_id}/state", response_class=Response, responses={200: {"content": {OCTETS: {}}}})
async def download_session(
    request: Request, session_id: str, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Download:
    """A session as a safetensors file: state, tokens and messages. bfloat16 takes half the size, and is not exact."""
    state = request.app.state
    if not hasattr(state, "downloads"):
        state.downloads = 0
    if state.downloads >= MOST_DOWNLOADS:
        raise ApiError(429, f"{MOST_DOWNLOADS} downloads run; try again later", headers={"Retry-After": "1"})
    session = await state.sessions.open(session_id, request.state.key)
    messages = b"" if session.messages is None else json.dumps(session.messages).encode()
    extra = {ENDED: "yes"} if session.record.ended else {}
    pieces = session.snapshot.pieces(dtype, extra=extra, attachment=messages)
    head = bytes(await run_in_threadpool(lambda: next(pieces)))
    return Download(state, session, head, pieces)


@router.post("", status_code=201, openapi_extra={"requestBody": {"required": True, "content": {OCTETS: {}}}})
async def upload_session(request: Request) -> dict[str, Any]:
    """A new session from a file that a download gave, for the same model. It and its descendants are `foreign`."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != OCTETS:
        raise ApiError(415, f"the content type is {media_type[:80]!r}; accepted: {OCTETS}")
    state, key = request.app.state, request.state.key
    if not hasattr(state, "uploads"):
        state.uploads = Uploads(state.service)
    uploads: Uploads = state.uploads
    snapshot, messages, ended = await uploads.receive(request.stream())
    session = await state.sessions.keep(None, snapshot, key=key, messages=messages, foreign=True, ended=ended)
    return describe(state.sessions, await state.sessions.look(session.id, key))


def _data_size(head: bytes) -> int:
    """The bytes after the head of a safetensors file."""
    entries = json.loads(head[8:])
    return max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")


async def _sent(head: bytes, pieces: Iterator[bytes | memoryview]) -> AsyncIterator[bytes]:
    """The bytes of a file in copies of at most CHUNK: a piece is valid until the next is taken."""
    yield head
    async for piece in iterate_in_threadpool(pieces):
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK):
            yield bytes(view[start : start + CHUNK])

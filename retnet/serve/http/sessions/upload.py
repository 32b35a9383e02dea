"""Uploaded sessions: a file from a client is checked against the model before anything of it is kept.

The head of the file says what it holds. It is compared with the states of this model as soon as it is there, so no more
is received than such a state has. The whole file is then read by the library that reads every other session, which
checks its digest, and its values are checked: tokens in the vocabulary, states finite.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from retnet.models.snapshot import ATTACHMENT, FORMAT, Snapshot, SnapshotFile
from retnet.models.snapshot_file import DTYPES
from retnet.serve.engine import Engine
from retnet.serve.http.chat.messages import MAX_MESSAGES, Message
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.files import private_file
from retnet.system.checks import quoted
from retnet.system.sizes import format_bytes

R = TypeVar("R")
MOST_HEADER = 2**20  # bytes of JSON
MOST_MESSAGES = 16 * 2**20  # bytes of JSON
MOST_TOKENS = 2**24  # where the context has no end
MOST_UPLOADS = 4  # at a time
_MESSAGES = TypeAdapter(Annotated[list[Message], Field(max_length=MAX_MESSAGES)])
ENDED = "ended"  # a text of the file of a session whose last token ended its output
NARROW = ("F32", "BF16")  # in which wider floating point may be stored


@dataclass(frozen=True)
class StateForm:
    """The form of a sequence's state: by name the dtype and shape of each tensor, and what goes with it.

    per_token: the tensors whose second dimension has an entry per token, with the most that there may be.
    """

    model: str
    vocab_size: int
    max_tokens: int
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    per_token: Mapping[str, int]

    @classmethod
    def of(cls, engine: Engine) -> StateForm:
        """The form of the states that an engine continues."""
        state, per_token = engine.pool.state, {}
        named = state.named_tensors()
        for i, layer in enumerate(state):
            for name in named:
                if name.split(".")[0] == str(i) and name.split(".")[2] in layer.per_token:
                    per_token[name] = named[name].shape[1]
        tensors = {name: (x.dtype, (1, *x.shape[1:])) for name, x in named.items()}
        limit = engine.pool.max_tokens
        return cls(
            engine.fingerprint,
            engine.model.config.vocab_size,
            MOST_TOKENS if limit is None else limit,
            tensors,
            per_token,
        )

    def shape(self, name: str, position: int) -> list[int]:
        """The shape of a tensor after so many tokens."""
        shape = list(self.tensors[name][1])
        if name in self.per_token:
            shape[1] = min(position, self.per_token[name])
        return shape

    def check(self, snapshot: Snapshot) -> None:
        """Raise ApiError unless the values are those of a state of this model."""
        if not 1 <= len(snapshot.tokens) <= self.max_tokens:
            raise _refused(f"it has {len(snapshot.tokens)} tokens; accepted: 1 to {self.max_tokens}")
        if not 0 <= min(snapshot.tokens) <= max(snapshot.tokens) < self.vocab_size:
            raise _refused(f"it has tokens outside the vocabulary; accepted: 0 to {self.vocab_size - 1}")
        position, named = len(snapshot.tokens) - 1, snapshot.state.named_tensors()
        found = {name: (x.dtype, list(x.shape)) for name, x in named.items()}
        if found != {name: (dtype, self.shape(name, position)) for name, (dtype, _) in self.tensors.items()}:
            raise _refused("its tensors are not those of a state of this model")
        if not snapshot.state.is_finite:
            raise _refused("its state has values that are not finite")

    def check_head(self, head: bytes) -> int:
        """Raise ApiError unless the JSON head of a file is that of a state of this model; return the bytes after it."""
        try:
            entries = json.loads(head, object_pairs_hook=_no_key_twice)
        except (ValueError, RecursionError) as error:
            raise _refused("its head is not JSON of a safetensors file") from error
        if not isinstance(entries, dict):
            raise _refused("its head is not a JSON object")
        metadata = entries.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise _refused(f"it is not a snapshot; accepted: a file whose format is {FORMAT!r}")
        if metadata.get("model") != self.model:
            raise _refused(
                f"it is of another model ({quoted(metadata.get('model'))}) than this server's ({self.model!r})",
                code="session_of_another_model",
            )
        facts = {name: _facts(name, entry) for name, entry in entries.items()}
        seen = facts.pop("tokens", None)
        if seen is None or seen[0] != "I32" or len(seen[1]) != 1 or not 1 <= seen[1][0] <= self.max_tokens:
            raise _refused(f"its tokens are {quoted(seen)}; accepted: int32, 1 to {self.max_tokens} of them")
        attached = facts.pop(ATTACHMENT, None)
        if attached is not None and (attached[0] != "U8" or len(attached[1]) != 1 or attached[1][0] > MOST_MESSAGES):
            raise _refused(f"its messages are {quoted(attached)}; accepted: bytes, at most {MOST_MESSAGES:,}")
        if facts.keys() != self.tensors.keys():
            wrong = sorted(facts.keys() ^ self.tensors.keys())
            raise _refused(f"tensor {quoted(wrong[0])} is in it or in a state of this model, but not in both")
        for name, (dtype, shape, _) in facts.items():
            own = self.tensors[name][0]
            accepted = {DTYPES[own], *(NARROW if own.is_floating_point else ())}
            if shape != self.shape(name, seen[1][0] - 1) or dtype not in accepted:
                raise _refused(
                    f"tensor {name} is {dtype} {quoted(shape)}; accepted: {' or '.join(sorted(accepted))} "
                    f"{self.shape(name, seen[1][0] - 1)}"
                )
        dtypes = {name: str(dtype)[6:] for name, (dtype, _) in self.tensors.items()}
        try:
            if json.loads(metadata.get("dtypes", "")) != dtypes:
                raise ValueError
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused("its dtypes are not those of a state of this model") from error
        return max(end for _, _, (_, end) in [*facts.values(), seen, *([attached] if attached else [])])


def _facts(name: str, entry: Any) -> tuple[str, list[int], list[int]]:
    """The dtype, shape and place of a tensor in the head of a file."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and _counts(shape) and _counts(place) and len(place) == 2:
            return dtype, shape, place
    raise _refused(f"the entry of tensor {quoted(name)} is {quoted(entry)}; accepted: dtype, shape and data_offsets")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(x) is int and 0 <= x < 2**63 for x in values)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


class Uploads:
    """Receives sessions from clients. At most MOST_UPLOADS at a time; one of them is read into memory at a time."""

    def __init__(self, service: Service):
        self.service, self.limit = service, service.settings.max_upload
        self._receiving = 0
        self._reading = asyncio.Lock()
        self._form: StateForm | None = None

    async def receive(self, body: AsyncIterator[bytes]) -> tuple[Snapshot, list[dict[str, Any]] | None, bool]:
        """The state and the messages of an uploaded file, and whether its last token ended an output (see Record).

        Raises ApiError for what is not one of this model.
        """
        if self._receiving >= MOST_UPLOADS:
            raise ApiError(429, f"{MOST_UPLOADS} uploads run; try again later", headers={"Retry-After": "1"})
        self._receiving += 1
        try:
            if self._form is None:
                self._form = await self.service.call(StateForm.of)
            folder = self.service.settings.state_dir or Path(tempfile.gettempdir())
            path = folder / f".upload.{secrets.token_hex(16)}.part"
            try:
                with private_file(path) as file:
                    await self._write(body, file, self._form)
                async with self._reading:
                    return await run_in_threadpool(_read, path, self._form)
            except OSError as error:
                raise ApiError(507, f"the upload could not be stored: {error.strerror}") from error
            finally:
                path.unlink(missing_ok=True)
        finally:
            self._receiving -= 1

    async def _write(self, body: AsyncIterator[bytes], file: BinaryIO, form: StateForm) -> None:
        """Write a file as it comes, no further than its head says."""
        start, size, whole = b"", 0, None
        async for chunk in body:
            size += len(chunk)
            if size > self.limit:
                raise ApiError(413, f"the upload is larger than {format_bytes(self.limit)}, this server's limit")
            if whole is None:
                start += chunk
                whole = _whole_size(start, form)
            if whole is not None and size > whole:
                raise _refused(f"it goes on after its {whole:,} bytes")
            await run_in_threadpool(file.write, chunk)
        if whole is None or size != whole:
            raise _refused(f"it ends after {size:,} bytes" + ("" if whole is None else f" of {whole:,}"))


def _whole_size(start: bytes, form: StateForm) -> int | None:
    """The size of a file by its head; None as long as the head is not complete."""
    if len(start) < 8:
        return None
    length = int.from_bytes(start[:8], "little")
    if length > MOST_HEADER:
        raise _refused(f"its head is of {length:,} bytes; accepted: at most {MOST_HEADER:,}")
    if len(start) < 8 + length:
        return None
    return 8 + length + form.check_head(start[8 : 8 + length])


def _read(path: Path, form: StateForm) -> tuple[Snapshot, list[dict[str, Any]] | None, bool]:
    try:
        file = SnapshotFile.load(path)
    except ValueError as error:
        raise _refused(str(error).replace(str(path), "the file")) from error
    form.check(file.snapshot)
    return file.snapshot, _messages(file.attachment), ENDED in file.extra


def _messages(attachment: bytes) -> list[dict[str, Any]] | None:
    """The messages of a chat, checked as those of a request are."""
    if not attachment:
        return None
    try:
        return [message.for_template() for message in _MESSAGES.validate_python(json.loads(attachment))]
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise _refused(f"its messages are not those of a chat ({place}: {error.errors()[0]['msg']})") from error
    except ApiError as error:
        raise _refused(f"its messages are not those of a chat ({error.message})") from error
    except (ValueError, RecursionError) as error:
        raise _refused("its messages are not JSON") from error


def _refused(why: str, code: str | None = "invalid_session_file") -> ApiError:
    return ApiError(400, f"the uploaded file is refused: {why}", code=code)

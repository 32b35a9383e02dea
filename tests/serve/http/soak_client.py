"""The clients of the soak, in a process of their own: random requests, good and bad, and a check of every answer.

    python -m tests.serve.http.soak_client PORT STACK SEED KEY KEY < phases

Each line of the input is the length of a phase in seconds. At its end all connections are closed and all sessions are
deleted, and a line of JSON says how often what happened since the start. A wrong answer ends the process by an error.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.serve.http.soak_reference import Alone, Kept, Mismatch, Shown, uploaded
from tests.serve.http.soak_wire import STALL_SECONDS, Answer, Wire, ask, request

CLIENTS = 24
MOST_UNCHECKED = 300  # answers that wait to be checked, beyond which the clients wait until half are left
SESSIONS_PER_CLIENT = 6
TEXTS = ("The river", "état 😀 wide", "", "The river bends twice before it reaches the town. ", "once\n\nUser: \ud7ff")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"choice": ["yes", "no", "état"]}},
    {"structured_outputs": {"regex": "[a-f]{2,9}\\.?"}},
    {"structured_outputs": {"grammar": 'start: ("ab" | "c")+ "."'}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
)
WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": [999]}, {"prompt": {}}, {"prompt": [[1], "a"]}, {"prompt": "a" * 600}, {"prompt": [1] * 513},
    {"max_tokens": -1}, {"max_tokens": 10**6}, {"n": 129}, {"n": 0}, {"temperature": -1}, {"temperature": "hot"},
    {"logit_bias": {"300": 1}}, {"stop": [""]}, {"stop_token_ids": [257]}, {"logprobs": 21}, {"best_of": 2},
    {"suffix": "x"}, {"nonsense": 1}, {"model": "other"}, {"session_id": "x"}, {"seed": 2**70}, {"echo": 3},
    {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"grammar": "start: missing"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
    {"n": 2, "keep_session": True}, {"prompt": "a" * 70_000},
)  # fmt: skip
GARBAGE = (
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{", b"\0" * 3000,
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 9000 + b"\r\n",
)  # fmt: skip
PATHS = (
    "/", "/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/tiny", "/v1/models/no", "/v1/engine",
    "/v1/sessions", "/v1/sessions?limit=3", "/v1/sessions?limit=0", "/v1/sessions/none", "/v1/responses", "/no",
    "/page/../../etc/passwd", "/openapi.json",
)  # fmt: skip


@dataclass(eq=False)
class Session:
    """A session that a client has: its id, and what it must be."""

    id: str
    key: str
    kept: Kept = field(default_factory=Kept)


class Clients:
    """All clients of one server."""

    def __init__(self, port: int, stack: str, seed: int, keys: list[str]):
        self.port, self.keys, self.alone = port, keys, Alone(stack)
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._checker = ThreadPoolExecutor(1)
        self._unchecked = 0
        self._may_go = asyncio.Event()
        self._may_go.set()
        self._failure: BaseException | None = None

    async def phase(self, seconds: float) -> None:
        """Let all clients loose for so long, then leave nothing behind."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._client(random.Random(self.rng.random()), end))
        while self._unchecked:
            await asyncio.sleep(0.05)
        if self._failure is not None:
            raise self._failure
        for key in self.keys:
            listing = request("GET", "/v1/sessions?limit=100", self.port, key)
            while found := (await ask(listing, self.port)).json["data"]:
                for session in found:
                    await ask(request("DELETE", f"/v1/sessions/{session['id']}", self.port, key), self.port)
        self.counts["too close to tell"] = self.alone.close

    async def _client(self, rng: random.Random, end: float) -> None:
        sessions: list[Session] = []
        while time.monotonic() < end and self._failure is None:
            await self._may_go.wait()
            act = rng.choices(
                (self._generate, self._leave, self._wrong, self._garbage, self._get, self._on_session),
                (10, 3, 1, 1, 1, 3),
            )[0]
            await act(rng, sessions)
            del sessions[:-SESSIONS_PER_CLIENT]

    def _check(self, kind: str, check: Callable[..., None], *arguments: Any) -> None:
        """Check an answer in the other thread, after those before it."""

        def run() -> None:
            try:
                check(*arguments)
            except BaseException as error:
                self._failure = self._failure or error
            loop.call_soon_threadsafe(done)

        def done() -> None:
            self._unchecked -= 1
            if self._unchecked <= MOST_UNCHECKED // 2 or self._failure is not None:
                self._may_go.set()

        loop = asyncio.get_running_loop()
        self.counts[f"compared: {kind}"] += 1
        self._unchecked += 1
        if self._unchecked >= MOST_UNCHECKED:
            self._may_go.clear()
        self._checker.submit(run)

    # What clients do

    async def _generate(self, rng: random.Random, sessions: list[Session]) -> None:
        """A completion or an answer that is read to its end."""
        body, chats, session = self._body(rng, sessions)
        key = session.key if session is not None else rng.choice(self.keys)
        slow, pause = rng.random() < 0.1, rng.choice([0, 0, 0, 0, 0, rng.random()])
        async with Wire(self.port) as wire:
            await wire.send(self._encoded(body, chats, key), rng if slow else None)
            answer = await wire.answer(pause)
        kind = f"{'chat' if chats else 'completion'}{', streamed' if body.get('stream') else ''}"
        for trait, there in (("session", session is not None), ("n > 1", (body.get("n") or 1) > 1)):
            self.counts[f"with {trait}"] += there
        if answer.status == 200:
            self._take(answer, body, chats, session, key, sessions, kind)
        elif answer.status in (429, 404, 400, 507):
            self.counts[f"refused: {answer.status} {answer.json['error']['code']}"] += 1
            if session is not None and answer.status in (404, 400):  # ended to make room, or its context is full
                sessions.remove(session)
            elif answer.status in (404, 400):
                raise Mismatch(f"{answer} to {body}")
        else:
            raise Mismatch(f"{answer} to {body}")

    async def _leave(self, rng: random.Random, sessions: list[Session]) -> None:
        """A completion or an answer that is left at any moment, in one of many ways."""
        body, chats, session = self._body(rng, sessions)
        body["max_tokens"] = rng.choice([20, 300])
        how = rng.choice(["close", "reset", "half-close", "stall"])
        async with Wire(self.port, reset=how == "reset") as wire:
            data = self._encoded(body, chats, session.key if session is not None else rng.choice(self.keys))
            await wire.send(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            if how == "half-close":
                wire.writer.write_eof()
                await wire.answer()
            elif how == "stall":
                await asyncio.sleep(rng.random() * 4 if rng.random() < 0.9 else STALL_SECONDS + 3)
            else:
                await asyncio.sleep(rng.random() ** 4)
        self.counts[f"left: {how}"] += 1
        if session is not None and body.get("keep_session"):
            sessions.remove(session)  # it has moved on, or not

    async def _wrong(self, rng: random.Random, sessions: list[Session]) -> None:
        del sessions
        wrong = rng.choice(WRONG)
        body = {"prompt": "a", "max_tokens": 3} | wrong
        answer = await ask(self._encoded(body, False, rng.choice(self.keys)), self.port)
        if answer.status not in (400, 404, 413, 429, 0) or (answer.status and "error" not in answer.json):
            raise Mismatch(f"{answer} to {body}")
        self.counts[f"refused: {answer.status}, wrong on purpose"] += 1

    async def _garbage(self, rng: random.Random, sessions: list[Session]) -> None:
        del sessions
        data = rng.choice([*GARBAGE, rng.randbytes(200)])
        async with Wire(self.port) as wire:
            await wire.send(data, rng if rng.random() < 0.3 and data else None)
            if rng.random() < 0.5:
                async with asyncio.timeout(1) as limit:
                    try:
                        await wire.answer()
                    except asyncio.CancelledError:
                        if not limit.expired():
                            raise
        self.counts["garbage"] += 1

    async def _get(self, rng: random.Random, sessions: list[Session]) -> None:
        del sessions
        path = rng.choice(PATHS)
        answer = await ask(request("GET", path, self.port, rng.choice([*self.keys, "wrong"])), self.port)
        if answer.status not in (200, 400, 401, 404, 405, 501):
            raise Mismatch(f"{answer} to GET {path}")
        self.counts["looked at something"] += 1

    async def _on_session(self, rng: random.Random, sessions: list[Session]) -> None:
        """Fork, delete, download or upload a session, or try with another key."""
        if not sessions:
            return
        session = rng.choice(sessions)
        act = rng.choice([self._fork, self._download, self._delete, self._steal])
        await act(rng, sessions, session)

    async def _fork(self, rng: random.Random, sessions: list[Session], session: Session) -> None:
        answer = await ask(request("POST", f"/v1/sessions/{session.id}/fork", self.port, session.key), self.port)
        if self._is_there(answer, sessions, session, 201):
            fork = Session(answer.json["id"], session.key)
            self._check("fork", _copy, session.kept, fork.kept)
            sessions.append(fork)

    async def _delete(self, rng: random.Random, sessions: list[Session], session: Session) -> None:
        answer = await ask(request("DELETE", f"/v1/sessions/{session.id}", self.port, session.key), self.port)
        if self._is_there(answer, sessions, session, 200):
            sessions.remove(session)
            self.counts["deleted"] += 1

    async def _steal(self, rng: random.Random, sessions: list[Session], session: Session) -> None:
        other = self.keys[1 - self.keys.index(session.key)]
        answer = await ask(request("GET", f"/v1/sessions/{session.id}/state", self.port, other), self.port)
        if answer.status not in (404, 429):
            raise Mismatch(f"another key got {answer.status}")
        self.counts["refused: of another key"] += 1

    async def _download(self, rng: random.Random, sessions: list[Session], session: Session) -> None:
        dtype, leaves = rng.choice(["float32", "bfloat16"]), rng.random() < 0.2
        path = f"/v1/sessions/{session.id}/state?dtype={dtype}"
        async with Wire(self.port) as wire:
            await wire.send(request("GET", path, self.port, session.key))
            if leaves:
                await asyncio.sleep(rng.random() ** 4)
                self.counts["left: download"] += 1
                return
            answer = await wire.answer()
        if answer.status == 429 or not self._is_there(answer, sessions, session, 200):
            return
        self._check("download", self.alone.check_file, answer.body, session.kept, dtype == "float32")
        await self._upload(rng, sessions, session.key, answer.body)

    async def _upload(self, rng: random.Random, sessions: list[Session], key: str, file: bytes) -> None:
        damage = rng.choice([None, None, "cut", "flip", "left"])
        data = bytearray(file)
        if damage == "cut":
            del data[rng.randrange(len(data)) :]
        elif damage == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        message = request("POST", "/v1/sessions", self.port, key, bytes(data), "application/octet-stream")
        async with Wire(self.port) as wire:
            if damage == "left":
                await wire.send(message[: rng.randrange(len(message))])
                self.counts["left: upload"] += 1
                return
            await wire.send(message)
            answer = await wire.answer()
        if answer.status == 201 and damage is None:
            session = Session(answer.json["id"], key)
            self._check("upload", lambda: _copy(uploaded(file), session.kept))
            sessions.append(session)
        elif answer.status in (429, 507) or (damage is not None and answer.status in (400, 413)):
            self.counts[f"refused: upload {answer.status}"] += 1
        else:
            raise Mismatch(f"{answer} to an upload, {damage}")

    def _is_there(self, answer: Answer, sessions: list[Session], session: Session, status: int) -> bool:
        if answer.status == 404:  # ended to make room
            self.counts["refused: session gone"] += 1
            sessions.remove(session)
        elif answer.status not in (status, 429, 507):
            raise Mismatch(f"{answer} of a session")
        return answer.status == status

    # Bodies and answers

    def _encoded(self, body: dict[str, Any], chats: bool, key: str) -> bytes:
        path = "/v1/chat/completions" if chats else "/v1/completions"
        return request("POST", path, self.port, key, json.dumps(body).encode())

    def _body(self, rng: random.Random, sessions: list[Session]) -> tuple[dict[str, Any], bool, Session | None]:
        """A request that is all right, whether it is a chat, and the session that it continues."""
        chats = rng.random() < 0.3
        session = rng.choice(sessions) if sessions and rng.random() < 0.4 else None
        letters = {str(letter): rng.choice([20, 30]) for letter in b"abcdefgh\xc3\xa9"}
        body: dict[str, Any] = {
            "max_tokens": rng.choice([1, 2, 5, 20, 40]),
            "temperature": rng.choice([0, 0.3, 1.0, 1.7]),
            "seed": rng.randrange(2**63),
            "stream": rng.random() < 0.5,
        }
        options = {
            "top_k": [-1, 0, 4], "top_p": [1, 0.5], "min_p": [0, 0.1], "presence_penalty": [0, 0.7],
            "frequency_penalty": [0.3, -0.2], "logit_bias": [letters], "stop_token_ids": [[99]],
            "stop": ["a", ["bc", "dd", "é"], "<|document|>"],
        }  # fmt: skip
        body |= {name: rng.choice(values) for name, values in options.items() if rng.random() < 0.3}
        if rng.random() < 0.15:
            body |= rng.choice(CONSTRAINTS)
        if session is not None:
            body["session_id"] = session.id
        if rng.random() < 0.3:
            body["keep_session"] = True
        elif rng.random() < 0.2:
            body["n"] = rng.randint(2, 3)
        if body["stream"] and rng.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
        if chats:
            roles = ["user"] if session is not None else rng.choice([["user"], ["system", "user"]])
            body["messages"] = [{"role": role, "content": rng.choice(TEXTS)} for role in roles]
            if rng.random() < 0.3:
                body |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])}
            return body, True, session
        prompts: list[Any] = [rng.choice(TEXTS), [*rng.choice(TEXTS).encode()] or [256]]
        if session is None and not body.get("keep_session"):
            prompts += [[TEXTS[0], TEXTS[1]], [[1, 2, 3], [4]]]
        body["prompt"] = rng.choice(prompts)
        if rng.random() < 0.3:
            body["logprobs"] = rng.choice([0, 3])
        if session is None and rng.random() < 0.2:
            body["echo"] = True
        return body, False, session

    def _take(
        self,
        answer: Answer,
        body: dict[str, Any],
        chats: bool,
        session: Session | None,
        key: str,
        sessions: list[Session],
        kind: str,
    ) -> None:
        """Note what an answer says, to be checked."""
        shown, last = read(answer, body, chats)
        kept = None
        if body.get("keep_session"):
            found = last["session"]
            if found["not_kept"] is None:
                kept = Kept()
            else:
                self.counts["not kept"] += 1
            if session is not None:
                sessions.remove(session)
            if kept is not None:
                sessions.append(Session(found["id"], key, kept))
        self._check(kind, self.alone.check, body, shown, None if session is None else session.kept, kept)


def _copy(source: Kept, target: Kept) -> None:
    target.snapshot, target.ended, target.messages = source.snapshot, source.ended, source.messages


def read(answer: Answer, body: dict[str, Any], chats: bool) -> tuple[list[Shown], dict[str, Any]]:
    """The choices of an answer, and the response or the event that ended it."""
    if not body.get("stream"):
        response = answer.json
        _check_usage(response["usage"], len(response["choices"]))
        found = []
        for choice in response["choices"]:
            text = choice["message"]["content"] if chats else choice["text"]
            found.append(Shown(text, choice["finish_reason"], _logprobs(choice, chats)))
        return found, response
    events = answer.events()
    if not events or events.pop() is not None:
        raise Mismatch(f"no end mark in {answer}")
    wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    has_usage = bool(events) and events[-1].get("choices") == []
    if has_usage != wants_usage:
        raise Mismatch(f"usage {has_usage}, wanted {wants_usage}: {events[-1]}")
    if has_usage:
        events.pop()
    by_index: dict[int, Shown] = {}
    last = {}
    for event in events:
        if "error" in event:
            raise Mismatch(f"{event} to {body}")
        [choice] = event["choices"]
        one = by_index.setdefault(choice["index"], Shown("", "", None))
        if one.finish_reason:
            raise Mismatch(f"{event} after its end")
        one.text += (choice["delta"].get("content") or "") if chats else choice["text"]
        if choice["logprobs"] is not None:
            one.logprobs = (one.logprobs or []) + (_logprobs(choice, chats) or [])
        one.finish_reason = choice["finish_reason"] or ""
        last = event if "session" in event else last
    return [by_index[i] for i in sorted(by_index)], last


def _logprobs(choice: dict[str, Any], chats: bool) -> list[float | None] | None:
    found = choice["logprobs"]
    if found is None:
        return None
    return [entry["logprob"] for entry in found["content"]] if chats else found["token_logprobs"]


def _check_usage(usage: dict[str, Any], choices: int) -> None:
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"] or not choices:
        raise Mismatch(f"usage {usage}")


async def main() -> None:
    port, stack, seed, *keys = sys.argv[1:]
    clients = Clients(int(port), stack, int(seed), keys)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        work: Coroutine[Any, Any, None] = clients.phase(float(line))
        await work
        print(json.dumps(clients.counts), flush=True)


if __name__ == "__main__":
    asyncio.run(main())

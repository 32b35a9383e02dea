"""The reference of the soak: what an engine gives one request alone.

It reads the body of a request by itself, and shares with the server only the engine, the chat template's text and the
compiled grammars.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retnet.data.chat_template import find_chat_template
from retnet.data.tokenizer import DOCUMENT_START, DOCUMENT_START_TOKEN, ByteTokenizer
from retnet.models.decode.sampling import Sampling
from retnet.models.snapshot import Snapshot, SnapshotFile
from retnet.serve.engine import Engine
from retnet.serve.http.grammars.constraints import Constraints, constraint_of
from retnet.serve.request import Generation, Request
from tests.serve.naive import pick
from tests.small_models import BYTES, small_model

SLOTS, CONTEXT, CHUNK = 4, 512, 32
NEAR = 1e-4  # a decision as close as this may fall either way: states that were cached are rounded otherwise
SEED_STEP, SEED_MASK = 0x9E3779B97F4A7C15, 2**63 - 1
TOKENIZER = ByteTokenizer()
Message = dict[str, Any]


@dataclass
class Kept:
    """A session as it must be. snapshot: None until it is known. messages: of a chat."""

    snapshot: Snapshot | None = None
    ended: bool = False
    messages: list[Message] | None = None


@dataclass
class Shown:
    """One choice of a response as a client saw it. logprobs: of its tokens, if they were asked for."""

    text: str
    finish_reason: str
    logprobs: list[float | None] | None = None


class Mismatch(AssertionError):
    """A response that is not what the engine gives alone."""


class Alone:
    """An engine that serves one request at a time, without a prefix cache."""

    def __init__(self, stack: str):
        self.model = small_model(stack, **BYTES)
        self.exact = small_model(stack, **BYTES, dtype="float64")
        self.engine = Engine(
            self.model, num_slots=SLOTS, max_tokens=CONTEXT, prompt_chunk=CHUNK, decode=TOKENIZER.decode
        )
        template = find_chat_template("plain", TOKENIZER, None)
        assert template is not None
        self.template = template
        self.constraints = Constraints(TOKENIZER, BYTES["vocab_size"], ())
        self.close = 0  # choices that differ after a decision that was too close to tell

    def check(self, body: dict[str, Any], shown: list[Shown], session: Kept | None, kept: Kept | None) -> None:
        """Compare the choices of a response, and note what the session that it left must be."""
        generation = None
        for index, choice in enumerate(shown):
            which, number = divmod(index, body.get("n") or 1)
            generation, before = self._run(body, which, number, session)
            self._compare(body, choice, generation, before)
        if kept is not None:
            assert generation is not None
            kept.snapshot, kept.ended = generation.snapshot, generation.finish_reason == "stop_token"
            if "messages" in body:
                earlier = (session.messages or []) if session is not None else []
                answer = {"role": "assistant", "content": shown[0].text}
                kept.messages = [*earlier, *body["messages"], answer]

    def check_file(self, file: bytes, session: Kept, exact: bool) -> None:
        """Compare the file of a session."""
        found, snapshot = load(file), session.snapshot
        assert snapshot is not None
        if list(found.snapshot.tokens) != list(snapshot.tokens):
            self._close_or_raise(snapshot, list(found.snapshot.tokens), "the tokens of a file")
            return
        for name, x in found.snapshot.state.named_tensors().items():
            y = snapshot.state.named_tensors()[name]
            near = torch.allclose(x.double(), y.double(), rtol=1e-4 if exact else 1e-2, atol=1e-4 if exact else 1e-2)
            if not near:
                raise Mismatch(f"{name} of a file differs by {(x.double() - y.double()).abs().max()}")
        messages = json.loads(found.attachment) if found.attachment else None
        if messages != session.messages:
            raise Mismatch(f"the messages of a file are {messages}, not {session.messages}")

    def _run(self, body: dict[str, Any], which: int, number: int, session: Kept | None) -> tuple[Generation, str]:
        """The generation of one choice, and the text that an echo puts before it."""
        echoed, start = "", None
        if "messages" in body:
            earlier = (session.messages or []) if session is not None else []
            known = () if session is None or session.snapshot is None else session.snapshot.tokens
            prompt = self.template.encode([*earlier, *body["messages"]], known=known)
            rounded = session.snapshot if session is not None else None
            if rounded is not None and rounded.rounding_error:  # the state of a file in bfloat16, which no prompt gives
                start, prompt = rounded.begin_of(prompt) or (None, prompt)
        else:
            given = body["prompt"]
            prompts = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
            given = (prompts or [""])[which]
            prompt = [*given.encode()] if isinstance(given, str) else given
            echoed = given if isinstance(given, str) else TOKENIZER.decode(given)
            if session is not None and session.snapshot is not None:
                start = session.snapshot
                if session.ended and prompt:
                    start, prompt = start.ending_with(prompt[0]), prompt[1:]
            elif isinstance(given, str) or not given:
                prompt = [DOCUMENT_START, *prompt]
        generation = self.engine.submit(self._request(body, prompt, number), start)
        self.engine.run()
        return generation, echoed if body.get("echo") else ""

    def _request(self, body: dict[str, Any], prompt: list[int], number: int) -> Request:
        wants = body.get("logprobs")
        top_k, top_p, min_p = body.get("top_k"), body.get("top_p"), body.get("min_p")
        given = body.get("stop") or []
        stops = [given] if isinstance(given, str) else given
        tokens = {*(body.get("stop_token_ids") or ())}
        if DOCUMENT_START_TOKEN in stops:
            tokens.add(DOCUMENT_START)
        if "messages" in body:
            stops = [*stops, *self.template.stops]
            wants = None if not wants else body.get("top_logprobs") or 0
        sampling = Sampling(
            temperature=body.get("temperature", 1.0),
            top_k=top_k if top_k and top_k > 0 else None,
            top_p=None if top_p == 1 else top_p,
            min_p=min_p or None,
            presence_penalty=body.get("presence_penalty") or 0.0,
            frequency_penalty=body.get("frequency_penalty") or 0.0,
            logit_bias={int(token): bias for token, bias in (body.get("logit_bias") or {}).items()},
            logprobs=wants,
            seed=(body["seed"] + number * SEED_STEP) & SEED_MASK,
        )
        wanted = constraint_of(body.get("response_format"), body.get("structured_outputs"))
        return Request(
            prompt,
            body["max_tokens"],
            sampling,
            sorted(tokens),
            tuple(dict.fromkeys(stops)),
            keep_state=bool(body.get("keep_session")),
            prompt_logprobs=wants if body.get("echo") else None,
            grammar=None if wanted is None else asyncio.run(self.constraints.compile(wanted)),
        )

    def _compare(self, body: dict[str, Any], shown: Shown, generation: Generation, before: str) -> None:
        reason, tokens = generation.finish_reason, generation.tokens
        text = TOKENIZER.decode(tokens[:-1] if reason == "stop_token" else tokens)
        if reason == "stop_string":
            text = text[: min(text.find(stop) for stop in generation.request.stop_strings if stop in text)]
        expected = before + text, "length" if reason == "length" else "stop"
        if (shown.text, shown.finish_reason) != expected:
            same = next((i for i, (a, b) in enumerate(zip(shown.text, expected[0], strict=False)) if a != b), None)
            what = f"{shown}, not {expected}, from character {same}, of {body}"
            if self._closest(generation, len(tokens)) > NEAR:
                raise Mismatch(what)
            self.close += 1
            return
        if shown.logprobs is None:
            return
        own = [entry.logprob for entry in generation.logprobs]
        if body.get("echo"):
            given = body["prompt"]
            is_text = isinstance(given if isinstance(given, str) else given[0], str)
            first = int(is_text)  # a text is read after a document start
            own = [None if entry is None else entry.logprob for entry in generation.prompt_logprobs][first:] + own
        if "messages" in body and reason in ("stop_token", "stop_string"):  # tokens that are no text are left out
            own = own[: max(len(shown.logprobs), len(text))]
        if len(own) != len(shown.logprobs) or any(
            (a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > NEAR)
            for a, b in zip(own, shown.logprobs, strict=True)
        ):
            raise Mismatch(f"log-probabilities {shown.logprobs}, not {own}, of {body}")

    def _close_or_raise(self, snapshot: Snapshot, found: list[int], what: str) -> None:
        if list(snapshot.tokens)[: len(found)] == found:
            raise Mismatch(f"{what}: {found}, not {list(snapshot.tokens)}")
        self.close += 1

    @torch.no_grad()
    def _closest(self, generation: Generation, count: int) -> float:
        """How far the closest decision of an output was from falling otherwise, in a forward in float64."""
        seen, margin = list(generation.seen), float("inf")
        logits = self.exact(torch.tensor([seen])).logits[0].numpy()
        begin = len(seen) - count
        for t in range(begin, len(seen)):
            if generation.constraint is not None:
                return 0.0  # its masks are not known here
            output = seen[generation.counted_from : t]
            _, near = pick(logits[t - 1], t, set(), output, generation.request.sampling, generation.seed)
            margin = min(margin, near)
        return margin


def load(file: bytes) -> SnapshotFile:
    """A downloaded session."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "session")
        path.write_bytes(file)
        return SnapshotFile.load(path)


def uploaded(file: bytes) -> Kept:
    """The session that an uploaded file must become."""
    found = load(file)
    return Kept(found.snapshot, "ended" in found.extra, json.loads(found.attachment) if found.attachment else None)

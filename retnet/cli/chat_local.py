"""Conversations with a model in this process, which keeps a state per conversation and reads only what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retnet.cli.chat_turn import Answer, Backend, ChatError, Turn
from retnet.data.chat_template import ChatTemplate, TemplateError
from retnet.data.tokenizer import Tokenizer
from retnet.models.cost import transformer_cache_bytes
from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot, SnapshotFile
from retnet.serve.engine import Engine
from retnet.serve.pool import default_context
from retnet.serve.request import Generation, Refused, Request
from retnet.serve.speculation import Speculation
from retnet.serve.stopping import StopStrings
from retnet.system.sizes import format_bytes


class LocalBackend(Backend):
    """An engine with one slot.

    max_tokens: of an answer; None for no limit. Raises ValueError for options that the engine refuses.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        max_tokens: int | None,
        speculate: int = 0,
        drafts: str = "auto",
    ):
        self.tokenizer, self.template, self.sampling, self.max_tokens = tokenizer, template, sampling, max_tokens
        self.config = model.config
        speculation = Speculation.of(speculate, drafts, model.config)
        self.engine = Engine(
            model,
            num_slots=1,
            max_tokens=default_context(model.config, speculation),
            decode=tokenizer.decode,
            speculation=speculation,
        )

    def ask(self, turn: Turn, text: str) -> Answer:
        return LocalAnswer(self, turn, text)

    def fork(self, turn: Turn) -> Turn:
        return turn  # a snapshot does not change

    def save(self, turn: Turn, path: Path) -> str:
        if turn.state is None:
            raise ChatError("there is no state to save; say something first")
        snapshot: Snapshot = turn.state
        snapshot.save(path, attachment=json.dumps(turn.messages).encode())
        return f"{turn.tokens} tokens, {format_bytes(path.stat().st_size)}"

    def load(self, path: Path) -> Turn:
        try:
            file = SnapshotFile.load(path, self.engine.pool.state.position.device)
            messages = json.loads(file.attachment or b"null")
        except (ValueError, RecursionError) as error:
            raise ChatError(str(error)) from error
        if file.snapshot.model != self.engine.fingerprint:
            raise ChatError(f"{path} is of another model; accepted: a conversation with the same weights")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ChatError(f"{path} holds no messages; accepted: a file that /save wrote, or a chat's session")
        return Turn(tuple(messages), file.snapshot, len(file.snapshot.tokens))

    def facts(self, turn: Turn) -> list[str]:
        state = format_bytes(self.engine.pool.cost.state, 3)
        cache = format_bytes(transformer_cache_bytes(self.config, max(1, turn.tokens)), 3)
        return [
            f"{turn.tokens} tokens in {len(turn.messages)} messages",
            f"{state} of state; a Transformer's KV cache of this width and depth: {cache}",
        ]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


class LocalAnswer(Answer):
    """An answer of the engine, which steps as the text is asked for."""

    def __init__(self, backend: LocalBackend, before: Turn, text: str):
        super().__init__(before, text)
        self._backend = backend
        self._stopped = False
        self._generation = self._submit()

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[str]:
        engine, generation = self._backend.engine, self._generation
        watch = StopStrings(self._backend.template.stops, self._backend.tokenizer.stream_decoder())
        pieces: list[str] = []
        sent = 0
        try:
            while not generation.finished:
                if self._stopped:
                    engine.cancel(generation)
                    break
                engine.step()
                tokens = generation.tokens[sent:]
                sent += len(tokens)
                if tokens:
                    self.figures.tick()
                for token in tokens:
                    watch.push(token)
                if piece := watch.take():
                    pieces.append(piece)
                    yield piece
        finally:
            engine.cancel(generation)  # if the reader has left; a finished one does not change
        watch.flush()
        if piece := watch.take(all=True):
            pieces.append(piece)
            yield piece
        self.figures.new_tokens, self.figures.finish = generation.num_new, generation.finish_reason
        if generation.finish_reason == "failed":
            raise ChatError(f"the answer failed: {generation.error}")
        if generation.snapshot is not None:  # not if it was stopped while it read
            self.end("".join(pieces), generation.snapshot, len(generation.snapshot.tokens))

    def _submit(self) -> Generation:
        backend, before = self._backend, self.before
        template = backend.template
        known: Snapshot | None = before.state
        try:
            context = template.encode(self.messages, known=() if known is None else known.tokens)
        except TemplateError as error:
            raise ChatError(str(error)) from error
        begun = None if known is None else known.begin_of(context)
        after, prompt = (None, context) if begun is None else begun
        if known is not None and begun is None:
            common = known.common(context)
            self.figures.not_reused = f"only {common} of {len(known.tokens)} tokens of the state begin the conversation"
        self.figures.read, self.figures.reused = len(prompt), 0 if after is None else len(after.tokens) - 1
        ends = {backend.tokenizer.document_end, template.turn_end} - {None}
        sampling = backend.sampling
        counted = template.tokens_of_texts(self.messages) if sampling.repetition_penalty != 1 else None
        try:
            request = Request(
                prompt,
                backend.max_tokens,
                sampling,
                sorted(token for token in ends if token is not None),
                template.stops,
                keep_state=True,
                counted=counted,
            )
            return backend.engine.submit(request, after)
        except Refused as error:
            raise ChatError(str(error)) from error

"""Use of a session by one request: the state that it goes on from, and the one that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from retnet.models.snapshot import Snapshot
from retnet.serve.http.api.off_loop import off_loop
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.record import Session
from retnet.serve.http.sessions.store import SessionStore
from retnet.serve.request import Generation
from retnet.system.checks import quoted


class SessionFields(Protocol):
    """The fields of a request that name a model and a session."""

    model: str | None
    session_id: str | None
    keep_session: bool | None


@dataclass
class SessionUse:
    """The session of one request: `open` it, choose the prompt by `go_on` or `go_on_with`, submit, then `keep`.

    after, prompt: what `Service.submit` gets: a state to continue, if any, and the tokens to read after it.
    initial: the learned initial state of a context that begins here; None: the empty one.
    not_reused: why the request does not continue the session's state, if it names one.
    """

    store: SessionStore
    service: Service
    key: str
    session: Session | None
    keeps: bool
    after: Snapshot | None = None
    prompt: Sequence[int] = ()
    not_reused: str | None = None
    initial: Snapshot | None = None
    model: str = ""

    @classmethod
    async def open(
        cls, store: SessionStore, service: Service, key: str, fields: SessionFields, *, outputs: int = 1
    ) -> SessionUse:
        """The session that a request names, if it names one; outputs: of the request, prompts times n.

        Raises ApiError: 404 for a session that the key does not have, 400 for keep_session with several outputs, 409
        for a session that began from another initial state than the one that the request names.
        """
        keeps = bool(fields.keep_session)
        if keeps and outputs != 1:
            raise ApiError(
                400,
                f"keep_session is true and the request has {outputs} outputs; accepted: one prompt and n 1, because a "
                "session has one state",
                param="keep_session",
            )
        session = None if fields.session_id is None else await store.open(fields.session_id, key)
        name = service.model_name if fields.model is None else fields.model
        initial = service.states.get(name)
        if session is not None and initial is not None and name != service.model_name:
            _check_began_from(session, initial, name, service)
        return cls(store, service, key, session, keeps, initial=initial, model=name)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return list(self.session.messages or ()) if self.session is not None else []

    @property
    def prefix_group(self) -> str | None:
        """The group of the prefix cache. None if the session was uploaded: its state must not reach other requests."""
        foreign = self.session is not None and self.session.foreign
        return None if foreign else self.service.prefix_group(self.key)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole context before the output, for limits."""
        return len(self.prompt) + (0 if self.after is None else len(self.after.tokens))

    @property
    def reused(self) -> int:
        """Tokens that the session's state has read, so that the request does not."""
        return 0 if self.after is None else len(self.after.tokens) - 1

    async def go_on(self, text: Sequence[int]) -> None:
        """Continue with the tokens of new text. A token that ended the session's last output gives way to it."""
        if self.session is None:
            self._begin(text)
            return
        snapshot = self.session.snapshot
        if text and self.session.record.ended:
            ending = await off_loop(len(snapshot.tokens), snapshot.ending_with, text[0])
            await self._continue(ending, text[1:])
        else:
            await self._continue(snapshot, text)

    async def go_on_with(self, context: Sequence[int]) -> None:
        """Continue with the tokens of the whole conversation: from the session's state if that begins in the same way.

        The last token of a session is not in its state yet, so it may differ.
        """
        self._begin(context)
        if self.session is None:
            return
        snapshot = self.session.snapshot
        begun = await off_loop(len(context), snapshot.begin_of, context)
        if begun is not None:
            await self._continue(*begun)
            return
        common = await off_loop(len(context), snapshot.common, context)
        self.not_reused = (
            f"only the first {common} of the session's {len(snapshot.tokens)} tokens begin the conversation"
        )

    async def keep(self, generation: Generation, messages: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
        """Keep the state of a finished generation if that was asked for; return the response's `session`.

        messages: the conversation with the new answer. A request that was cancelled or has failed changes no session.
        """
        if self.session is None and not self.keeps:
            return None
        session, not_kept = self.session, None
        if self.keeps:
            snapshot, reason = generation.snapshot, generation.finish_reason
            if snapshot is None or reason in ("cancelled", "failed"):
                not_kept = f"the request was {reason}"
            else:
                try:
                    session = await self.store.keep(
                        self.session,
                        await on_host(self.service, snapshot),
                        key=self.key,
                        messages=messages,
                        ended=reason == "stop_token",
                    )
                except ApiError as error:
                    session, not_kept = None, error.message
        return {
            "id": None if session is None else session.id,
            "tokens": None if session is None else session.record.tokens,
            "reused_tokens": self.reused,
            "not_reused": self.not_reused,
            "not_kept": not_kept,
        }

    def _begin(self, context: Sequence[int]) -> None:
        """Read a context from its initial state."""
        begun = None if self.initial is None else self.initial.begin_of(context)
        self.after, self.prompt = begun or (None, context)

    async def _continue(self, snapshot: Snapshot, text: Sequence[int]) -> None:
        self.after, self.prompt = await on_device(self.service, snapshot), text


def _check_began_from(session: Session, initial: Snapshot, name: str, service: Service) -> None:
    """Raise ApiError for a session that began from another initial state than the one that a request names."""
    if session.snapshot.initial != initial.initial:
        raise ApiError(
            409,
            f"session {session.id} did not begin from the state of {quoted(name)}; accepted: model "
            f"{quoted(service.model_name)}, which continues any session",
            code="session_of_another_state",
            param="session_id",
        )


async def on_host(service: Service, snapshot: Snapshot) -> Snapshot:
    """The snapshot in the host's memory. The engine's thread copies, because a CUDA graph may be captured there."""
    return await _moved(service, snapshot, "cpu")


async def on_device(service: Service, snapshot: Snapshot) -> Snapshot:
    """The snapshot in the memory of the model's device."""
    return await _moved(service, snapshot, str(service.engine.pool.state.position.device))


async def _moved(service: Service, snapshot: Snapshot, device: str) -> Snapshot:
    if str(snapshot.state.position.device) == device:
        return snapshot
    return await service.call(lambda _: replace(snapshot, state=snapshot.state.to(device)))

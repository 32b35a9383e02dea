"""The guard: checks of every request before the application sees it."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from retnet.serve.http.settings import Settings


class Guard:
    """ASGI middleware. It leaves `key` and `request_id` in the state of the request."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            state["key"], state["request_id"] = "", secrets.token_hex(12)
        await self.app(scope, receive, send)

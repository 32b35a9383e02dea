"""JSON bodies: strict JSON, in which every number is finite and every text is Unicode, of bounded depth.

Python's own parser takes NaN and halves of surrogate pairs, and gives up on deep nesting with a RecursionError.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from retnet.serve.http.errors import ApiError


class JsonRequest(Request):
    """A request whose `json` raises ApiError for a body that is not JSON."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}; accepted: an object in UTF-8") from error
        return self._json


class JsonRoute(APIRoute):
    """Routes with a JSON body: `APIRouter(route_class=JsonRoute)`. A body that is not JSON is a 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            if self.body_field is not None:
                await request.json()
            return await handle(request)

        return strict

"""JSON bodies: strict JSON, in which every number is finite, every text is Unicode and every key of an object differs,
of bounded depth.

Python's own parser takes NaN and halves of surrogate pairs, and gives up on deep nesting with a RecursionError; it is
what finds a repeated key, after pydantic's has read the body. The number of keys is bounded too: each may be an error
of its own, and pydantic collects them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from retnet.serve.http.errors import ApiError
from retnet.system.checks import quoted

MAX_KEYS = 50_000  # of all objects of a body together
SHORT = 4 * MAX_KEYS  # bytes; a key takes at least as many as `"":1,` has


class JsonRequest(Request):
    """A request whose `json` raises ApiError for a body that is not JSON."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                given = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}; accepted: an object in UTF-8") from error
            count = num_keys(given)
            if len(await self.body()) > SHORT and count > MAX_KEYS:
                raise ApiError(400, f"the body has {count} keys; accepted: {MAX_KEYS}")
            if (await self.body()).count(b":") > count:  # a key was lost, or a text has a colon
                try:
                    json.loads(await self.body(), object_pairs_hook=_refuse_repeated)
                except ValueError as error:
                    raise ApiError(400, f"the body is not accepted: {error}") from error
            self._json = given
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


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    """Raise ValueError for an object with a key twice, of which one value would be lost in silence."""
    seen: set[str] = set()
    if len({key for key, _ in pairs}) < len(pairs):
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{quoted(twice)} is given twice in one object; accepted: once")


def num_keys(value: Any) -> int:
    """The keys of all objects inside a JSON value."""
    waiting, count = [value], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            count += len(value)
            value = list(value.values())
        if isinstance(value, list) and not {dict, list}.isdisjoint(map(type, value)):
            waiting += [item for item in value if isinstance(item, (dict, list))]
    return count

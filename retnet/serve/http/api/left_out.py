"""Routes of OpenAI's API that the server leaves out: each says so, and what to use instead."""

from __future__ import annotations

from fastapi import APIRouter

from retnet.serve.http.errors import ApiError

INSTEAD = {
    "/v1/responses": "use /v1/chat/completions, and keep_session for state on the server",
    "/v1/embeddings": "the model predicts tokens and gives no embeddings",
}

router = APIRouter(include_in_schema=False)


def _leave_out(path: str, advice: str) -> None:
    @router.api_route(path, methods=["GET", "POST"])
    async def left_out() -> None:
        raise ApiError(404, f"{path} is left out of this server: {advice}", code="not_supported")


for _path, _advice in INSTEAD.items():
    _leave_out(_path, _advice)

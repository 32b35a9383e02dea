"""Whether the server is alive and ready, its version and its models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from retnet import __version__

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    alive = request.app.state.service.alive
    return JSONResponse({"status": "ok" if alive else "the engine does not run"}, 200 if alive else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    alive = request.app.state.service.alive
    return JSONResponse({"status": "ready" if alive else "the engine does not run"}, 200 if alive else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service = request.app.state.service
    model = {"id": service.model_name, "object": "model", "created": 0, "owned_by": "retnet"}
    return {"object": "list", "data": [model | {"max_model_len": service.context_limit}]}

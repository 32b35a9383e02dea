"""Health, readiness, version and the list of models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from retnet import __version__
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Service

LONG_STEP_SECONDS = 60.0  # of one step, after which the server is not ready
STARTED = int(time.time())
router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Whether the engine's thread lives. If not, this process is about to end."""
    service: Service = request.app.state.service
    if service.failure is not None:
        return JSONResponse({"status": "failed", "reason": f"the engine ended: {type(service.failure).__name__}"}, 503)
    return JSONResponse({"status": "ok"} if service.alive else {"status": "stopped"}, 200 if service.alive else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether the server takes requests: the model is loaded, the engine steps, and the server is not about to end."""
    service: Service = request.app.state.service
    reason = None
    if not service.alive:
        reason = "the engine does not run"
    elif service.draining:
        reason = "the server is shutting down"
    elif service.step_seconds > LONG_STEP_SECONDS:
        reason = f"the engine's step takes {service.step_seconds:.0f} s already"
    if reason is not None:
        return JSONResponse({"status": "not ready", "reason": reason}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of retnet."""
    return {"version": __version__}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, and its learned initial states, which requests name as they name a model."""
    service: Service = request.app.state.service
    return {"object": "list", "data": [_model(service, name) for name in service.model_names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """A model, by its name."""
    service: Service = request.app.state.service
    if name not in service.model_names:
        accepted = ", ".join(map(repr, service.model_names))
        raise ApiError(404, f"there is no model {name[:80]!r}; accepted: {accepted}", code="model_not_found")
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, and two of vLLM's: `max_model_len`, the longest context (null: any length), and `parent`, the
    model of a learned initial state."""
    facts = {"id": name, "object": "model", "created": STARTED, "owned_by": "retnet"}
    facts |= {"max_model_len": service.context_limit}
    return facts if name == service.model_name else facts | {"parent": service.model_name}

"""The page at `/`, and the state of the engine as JSON at `/v1/engine`.

The files of the page are read once. A request names one of them and is never turned into a path. The page loads nothing
from other hosts and has no inline script or style, so that it works under the policy that the guard sends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from retnet.models.cost import transformer_cache_bytes
from retnet.serve.engine import Engine
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Service
from retnet.serve.pool import growing_layer

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CACHING = {"Cache-Control": "no-cache"}  # a browser asks each time, and gets a 304 while the file is the same

router = APIRouter()


@dataclass(frozen=True)
class File:
    """A file of the page. etag: of its content."""

    content: bytes
    media_type: str
    etag: str


@cache
def files() -> dict[str, File]:
    """The files of the page by name."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = File(content, TYPES[path.suffix], f'"{sha256(content).hexdigest()[:32]}"')
    return found


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    return _answer(request, "index.html")


@router.get("/page/{name}", include_in_schema=False)
async def asset(request: Request, name: str) -> Response:
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = files().get(name)
    if file is None:
        raise ApiError(404, "the page has no such file")
    headers = CACHING | {"ETag": file.etag}
    known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    if any(tag in (file.etag, "*") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


@router.get("/v1/engine")
async def engine(request: Request) -> dict[str, Any]:
    """The model, the slots, the memory per stream and the prefix cache. Counters only grow; rates are their differences
    over `time_s`, the server's clock in seconds."""
    service: Service = request.app.state.service
    return await service.call(lambda engine: _state(engine, service.model_name))


def _state(engine: Engine, name: str) -> dict[str, Any]:
    stats, config = engine.stats(), engine.model.config
    weight, prefix = engine.model.embedding.weight, stats.prefix
    return {
        "object": "engine",
        "time_s": time.monotonic(),
        "model": {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
            "layers": len(config.layers),
            "width": config.d_model,
            "vocab_size": config.vocab_size,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "context_limit": engine.pool.max_tokens,
            "constant_state": growing_layer(config) is None,
        },
        "slots": {"total": stats.num_slots, "running": stats.running, "waiting": stats.waiting},
        "tokens": {
            "prompt": stats.prompt_tokens,
            "generated": stats.new_tokens,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
        },
        "memory": {
            "state_bytes_per_stream": stats.bytes_per_slot.state,
            "bytes_per_slot": stats.bytes_per_slot.total,
            # Keys and values of a multi-head Transformer of this width and depth, 2 bytes each.
            "kv_cache_bytes_per_token": transformer_cache_bytes(config, 1),
        },
        "prefix": None
        if prefix is None
        else {
            "hits": prefix.hits,
            "misses": dict(prefix.misses),
            "prompt_tokens": prefix.prompt_tokens,
            "tokens_saved": prefix.tokens_saved,
            "states": prefix.states,
            "state_bytes": prefix.state_bytes,
        },
    }

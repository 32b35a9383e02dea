"""The guard: every request passes it before the application sees it.

In this order: the Host and Origin headers, the API key, quotas, the type and size of the body. It also ends a request
whose client left or whose time is over, gives every response its security headers and every error its form, and writes
the request's log line. It is plain ASGI, so a streamed token passes through one function call.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from retnet.serve.http.access.exchange import ClientGone, Exchange
from retnet.serve.http.access.hosts import AllowedHosts
from retnet.serve.http.access.keys import ApiKeys
from retnet.serve.http.access.log import log_failure, log_request
from retnet.serve.http.access.quota import Quotas
from retnet.serve.http.access.record import RECORD, Record
from retnet.serve.http.errors import ApiError
from retnet.serve.http.metrics import Metrics
from retnet.serve.http.service import Service
from retnet.serve.http.settings import Settings
from retnet.system.checks import quoted

OPEN_PATHS = frozenset({"/", "/favicon.ico", "/health", "/ready", "/version"})
OPEN_PREFIX = "/page/"  # the files of the page, which asks for the key itself
UPLOADS = frozenset({"/v1/sessions"})  # bodies of bytes, read as they come
UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})  # methods that change something
BODY_SECONDS = 30.0
CLIENT_GONE = 499  # the status of a request whose client left, in logs and metrics
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)
SHUTTING_DOWN = "the server is shutting down"
JSON_TYPE, UPLOAD_TYPE = "application/json", "application/octet-stream"
_LABEL = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Guard:
    """ASGI middleware. It leaves `key` (an id, "" without keys) and `request_id` in the state of the request."""

    def __init__(self, app: ASGIApp, service: Service, settings: Settings, keys: ApiKeys | None, metrics: Metrics):
        self.app, self.service, self.settings, self.keys, self.metrics = app, service, settings, keys, metrics
        self.hosts = AllowedHosts(settings.host, settings.allowed_hosts, settings.allowed_origins)
        self.quotas = Quotas(settings.rate, settings.concurrency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record(secrets.token_hex(12), scope["method"])
        state = scope.setdefault("state", {})
        state["key"], state["request_id"] = "", record.request_id
        headers = (*SECURITY_HEADERS, (b"x-request-id", record.request_id.encode()))
        limit = self.settings.max_upload if scope["path"] in UPLOADS else self.settings.max_body
        exchange = Exchange(scope, receive, send, headers, limit, BODY_SECONDS)
        token = RECORD.set(record)
        self.service.num_exchanges += scope["method"] in UNSAFE
        try:
            error = await self._error_of(scope, exchange, record)
            if error is not None:
                record.error = error.kind
                await exchange.fail(error)
        finally:
            exchange.close()
            self.service.num_exchanges -= scope["method"] in UNSAFE
            RECORD.reset(token)
            record.status = CLIENT_GONE if exchange.gone else exchange.status
            record.seconds = time.perf_counter() - record.began
            self.metrics.count_request(record)
            log_request(record)

    async def _error_of(self, scope: Scope, exchange: Exchange, record: Record) -> ApiError | None:
        """Serve a request; the error that it ended with, if the response does not say so yet."""
        time_limit = asyncio.timeout(self.settings.timeout)
        try:
            async with time_limit:
                await self._pass(scope, exchange, record)
        except ApiError as error:
            return error
        except (ClientGone, ClientDisconnect):
            return None
        except TimeoutError as error:
            if not time_limit.expired():
                return _unexpected(error, record)
            message = f"the request took longer than {self.settings.timeout:g} s, the limit of this server"
            return ApiError(504, message, type="timeout_error")
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                return _unexpected(error, record)
            task.uncancel()
            return None if exchange.gone else ApiError(503, SHUTTING_DOWN)
        except Exception as error:
            return _unexpected(error, record)
        return None

    async def _pass(self, scope: Scope, exchange: Exchange, record: Record) -> None:
        """Check a request and hand it to the application."""
        headers = Headers(scope=scope)
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        changes_state = scope["method"] in UNSAFE
        record.label = _label(headers.get("x-request-id", ""))
        self.hosts.check(hosts, origins if changes_state else ())
        caller = self._authenticate(scope, headers)
        if self.keys is not None:
            record.key = scope["state"]["key"] = caller
        if changes_state and self.service.draining:
            raise ApiError(503, SHUTTING_DOWN, headers={"Retry-After": "5"})
        with self.quotas.place(caller) if changes_state else nullcontext():
            check_body_headers(headers, exchange.limit, scope["path"] in UPLOADS)
            if scope["path"] not in UPLOADS:
                await exchange.read_body()
            inner = dict(scope)
            # In this version of ASGI a response is streamed without a task of its own that waits for the client.
            inner["asgi"] = {**scope.get("asgi", {}), "spec_version": "2.4"}
            if scope["method"] == "HEAD":
                inner["method"] = "GET"
            try:
                await self.app(inner, exchange.receive, exchange.send)
            finally:
                record.route = getattr(inner.get("route"), "path", record.route)

    def _authenticate(self, scope: Scope, headers: Headers) -> str:
        """The caller: the id of its API key, or its address on a server without keys.

        Raises ApiError 401 for a key that is missing or unknown, where one is needed.
        """
        path = scope["path"]
        if self.keys is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            client = scope.get("client")
            return "" if self.keys is not None or client is None else client[0]
        kind, _, key = headers.get("authorization", "").partition(" ")
        caller = self.keys.find(key.strip().encode("latin-1")) if kind.lower() == "bearer" else None
        if caller is None:
            message = "no API key or a wrong one; accepted: the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return caller


def check_body_headers(headers: Headers, limit: int, upload: bool) -> None:
    """Raise ApiError for a body that is too large or of another type.

    Browsers send these types to another site only if that site allows it, which this server does not.
    """
    if "content-length" in headers and "transfer-encoding" in headers:  # a proxy could read another body than we do
        raise ApiError(400, "the headers Content-Length and Transfer-Encoding are both given; accepted: one of the two")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise ApiError(413, f"the body has {int(length):,} bytes; accepted: {limit:,}")
    if length == "0" and "transfer-encoding" not in headers:
        return
    given = headers.get("content-type", "")
    accepted = UPLOAD_TYPE if upload else JSON_TYPE
    if given.partition(";")[0].strip().lower() not in (accepted, JSON_TYPE):
        raise ApiError(415, f"the content type is {quoted(given)}; accepted: {accepted}")


def _label(given: str) -> str | None:
    """A client's own id of a request, for its logs and ours: it identifies nothing here."""
    return given if _LABEL.fullmatch(given) else None


def _unexpected(error: BaseException, record: Record) -> ApiError:
    log_failure("a request failed", error, record)
    return ApiError(500, f"the server failed on this request; its log says more under {record.request_id}")

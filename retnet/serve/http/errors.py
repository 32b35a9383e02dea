"""Errors of the API, in the form that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from retnet.serve.http.access.record import RECORD
from retnet.system.checks import quoted

LONGEST_PARAM = 200  # characters; a field's path can have a key that the client wrote
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ErrorFields(BaseModel):
    """What was given, and what is accepted. param: the field at fault. code: for programs."""

    message: str = Field(examples=["max_tokens is 9000; accepted: at most 4096, this server's limit"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["max_tokens"])
    code: str | None = Field(examples=["context_length_exceeded"])


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


class ApiError(Exception):
    """A request that is refused, or that failed.

    status: of the HTTP response. type: by default the one of the status. param: the field at fault. code: for programs,
    such as "context_length_exceeded". headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.type = type or TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the response, and of an error event in a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """The error in one word for logs: its code, otherwise its type. The message may quote what a client sent."""
        return self.code or self.type

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first of pydantic's errors as a 400 that names the field."""
    first = errors[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(map(str, place))[:LONGEST_PARAM] or None
    if first["type"] == "extra_forbidden":
        message = f"{param} is not a field that this server honours"
    elif first["type"] == "missing":
        message = f"{param or 'the body'} is missing"
    elif first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    else:
        message = f"{param or 'the body'} is {quoted(first.get('input'))}: {first['msg']}"
    return ApiError(400, message, param=param)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of the application an ApiError's response, and name it in the record of its request."""

    async def own(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        record = RECORD.get()
        if record is not None:
            record.error = error.kind
        return error.response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await own(request, validation_error(list(error.errors())))

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return _not_allowed(request)
        message = "there is no such path here" if error.status_code == 404 else str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)


def _not_allowed(request: Request) -> Response:
    """405 with the methods that the path has; for OPTIONS, these alone."""
    allowed = [method for method in METHODS if _has(request, method)]
    headers = {"Allow": ", ".join([*allowed, "OPTIONS"] + (["HEAD"] if "GET" in allowed else []))}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    message = f"{request.method} is not a method of this path; accepted: {', '.join(allowed)}"
    return ApiError(405, message, headers=headers).response()


def _has(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(dict(scope))[0] is Match.FULL for route in request.app.router.routes)

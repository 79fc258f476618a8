"""Errors in the shape of the engine that is imitated, by one class and one function."""

from __future__ import annotations

from http import HTTPStatus

import orjson

from backends.simulator.kv_events import Dialect

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that cannot be served, and what to tell the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind or _TYPES.get(status) or HTTPStatus(status).phrase


def error_value(error: ApiError, dialect: Dialect, *, in_stream: bool = False) -> dict[str, object]:
    """Return the JSON value: vLLM nests it, SGLang does so only inside a stream."""
    fields: dict[str, object] = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.status,
    }
    if dialect == "vllm" or in_stream:
        return {"error": fields}
    return {"object": "error", **fields}


def error_body(error: ApiError, dialect: Dialect, path: str) -> bytes:
    """Return the body of an error answer."""
    if error.status == 401:
        return b'{"error":"Unauthorized"}'  # both engines check keys before anything else
    if path.startswith("/v1/messages"):
        return orjson.dumps(anthropic_error(error))
    return orjson.dumps(error_value(error, dialect))


def anthropic_error(error: ApiError) -> dict[str, object]:
    """Return the error as Anthropic clients read it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}

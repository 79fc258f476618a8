"""Refusals of the service, in the shape of OpenAI's errors, and what becomes of all others.

Whatever a handler raises ends here: a refusal as itself, one of aiohttp's in the same shape, and
anything unforeseen as a 500 whose cause is in the log and not in the answer. An answer that has
begun is cut instead: a second one would stand in the midst of the content that the first promised.
"""

from __future__ import annotations

from collections.abc import Callable

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from backends.log import Log
from backends.tasks import place_of

RETRY_AFTER_S = 5


class ApiError(Exception):
    """What a client is told when it asks for something that it cannot have."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_response(error: ApiError) -> web.Response:
    """Write a refusal; what is over for now says when to ask again."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 401:
        kind = "authentication_error"
    problem = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in {429, 503} else {}
    return web.Response(
        status=error.status,
        body=orjson.dumps({"error": problem}),
        content_type="application/json",
        headers=headers,
    )


def _require_plain(request: web.Request) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        message = "Compressed request bodies are not read here."
        raise ApiError(415, message, code="unsupported_content_encoding")


def _require_text(request: web.Request) -> None:
    """Refuse ids that no database takes for text."""
    if any("\0" in text for text in (request.path, *request.query.values())):
        raise ApiError(400, "A NUL character.", code="invalid_id")


def error_middleware(log: Log, translate: Callable[[Exception], ApiError | None]) -> Middleware:
    """Return the middleware; `translate` knows the errors of the store."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _require_plain(request)
            _require_text(request)
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            told = ApiError(error.status, error.text or error.reason)
        except ConnectionError:
            if request.transport is not None and not request.transport.is_closing():
                raise  # which cuts an answer that is under way
            return web.Response(status=499)  # whoever asked has gone: nobody reads this
        except Exception as error:  # noqa: BLE001  # the last line: told, and answered
            told = refusal(request, error)
        if request.writer.output_size:
            raise ConnectionError(f"the answer was cut: {told}")
        return error_response(told)

    def refusal(request: web.Request, error: Exception) -> ApiError:
        told = error if isinstance(error, ApiError) else translate(error)
        if told is None:
            what = f"{type(error).__name__}: {error}"
            log.fault("request_failed", path=request.path, error=what, where=place_of(error))
            told = ApiError(500, "The service failed at this request; its log has the cause.")
        return told

    return answer

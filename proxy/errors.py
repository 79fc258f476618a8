"""Every way a request can fail, once: status, OpenAI type and code, log word, may it be retried.

A failure is raised where it is known and answered in one place (`io/endings.py`, `io/server.py`).
Bodies have OpenAI's shape, because its clients read nothing else, and where Anthropic's clients are
served the shape that they read; `code` is in both. `x-should-retry` is
sent because the official clients obey it before any rule of their own; `Retry-After` stays at or
below 120 s because above that they give up instead of waiting (openai-python, `_base_client.py`).

Imports nothing of ours.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final

import orjson

RETRY_AFTER_S_MAX = 120


class Dialect(enum.Enum):
    """Whose client library reads the error."""

    OPENAI = enum.auto()
    ANTHROPIC = enum.auto()


def dialect_of(path: bytes) -> Dialect:
    """Return the dialect of a raw path. Paths that are not served have one, too."""
    return Dialect.ANTHROPIC if path.startswith(b"/v1/messages") else Dialect.OPENAI


# The words of each vendor for the kind of an error, which say little more than the status does.
OPENAI_TYPES: Final = frozenset(
    (
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "rate_limit_error",
        "server_error",
    )
)
ANTHROPIC_TYPES: Final = frozenset(
    (
        *(OPENAI_TYPES - {"server_error"}),
        "billing_error",
        "request_too_large",
        "conflict_error",
        "timeout_error",
        "api_error",
        "overloaded_error",
    )
)
_OPENAI_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Final = {
    **_OPENAI_TYPES,
    402: "billing_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def openai_type(status: int) -> str:
    """Return OpenAI's `type` for a status."""
    return _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def anthropic_type(status: int) -> str:
    """Return Anthropic's `type` for a status."""
    return _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


class ProxyError(Exception):
    """A request that ends with an answer of our own. The message is for the client to read."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # OpenAI's `type`
    code: ClassVar[str] = "internal_error"  # OpenAI's `code`, and the word in the access log
    should_retry: ClassVar[bool] = False
    closes: ClassVar[bool] = False  # the connection's framing can no longer be trusted
    retry_after_s: ClassVar[int] = 0

    def __init__(self, message: str, param: str | None = None, *, wait_s: int = 0) -> None:
        """`wait_s` is what the client should wait before it asks again, where that is known."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.wait_s = wait_s or self.retry_after_s
        self.wait_ms = 0  # the same to the millisecond, where it is known so well

    def body(self, dialect: Dialect = Dialect.OPENAI) -> bytes:
        """Return the JSON object that the client reads."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        if dialect is Dialect.ANTHROPIC:
            error["type"] = anthropic_type(self.status)
            return orjson.dumps({"type": "error", "error": error})
        return orjson.dumps({"error": error})

    def event(self, dialect: Dialect) -> bytes:
        """Return the last event of a stream that fails. Anthropic's clients skip nameless ones."""
        name = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
        return name + b"data: " + self.body(dialect) + b"\n\n"


class InvalidRequestError(ProxyError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"


class BadHeadError(InvalidRequestError):
    """Octets that are not plainly one well-formed request head (RFC 9112)."""

    code = "bad_request_head"
    closes = True


class BadBodyFramingError(InvalidRequestError):
    code = "bad_body_framing"
    closes = True


class InvalidJSONError(InvalidRequestError):
    code = "invalid_json"


class MissingModelError(InvalidRequestError):
    code = "missing_model"


class HeadTooLargeError(InvalidRequestError):
    status = 431
    code = "request_head_too_large"
    closes = True


class TargetTooLongError(InvalidRequestError):
    status = 414
    code = "target_too_long"
    closes = True


class VersionNotSupportedError(InvalidRequestError):
    status = 505
    code = "http_version_not_supported"
    closes = True


class MethodNotImplementedError(InvalidRequestError):
    status = 501
    code = "not_implemented"
    closes = True


class NotFoundError(InvalidRequestError):
    status = 404
    code = "unknown_path"


class MethodNotAllowedError(InvalidRequestError):
    status = 405
    code = "method_not_allowed"


class ModelNotFoundError(InvalidRequestError):
    status = 404
    code = "model_not_found"


class RequestTimeoutError(InvalidRequestError):
    status = 408
    code = "request_timeout"
    should_retry = True
    closes = True


class BodyTooLargeError(InvalidRequestError):
    status = 413
    code = "request_too_large"
    closes = True


class UnsupportedEncodingError(InvalidRequestError):
    status = 415
    code = "unsupported_content_encoding"


class UnauthorizedError(ProxyError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class HopRefusedError(ProxyError):
    """It claims to come from another region, and is not believed; or it has been here before."""

    status = 403
    kind = "permission_error"
    code = "hop_refused"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        wait_s: int = 0,
        told: bytes = b"refused",
    ) -> None:
        """`told` is for who has sent it: go elsewhere; or `moved`: find out who is here now."""
        super().__init__(message, param, wait_s=wait_s)
        self.told = told


class HopMisdirectedError(HopRefusedError):
    """Another region has sent it here, where it may not be computed (RFC 9110 §15.5.20)."""

    status = 421
    code = "hop_misdirected"


class KeysUnknownError(ProxyError):
    """Which keys are right is not known here yet; nobody is let in on trust."""

    status = 503
    code = "keys_not_known"
    should_retry = True
    retry_after_s = 1


class RegionNotAllowedError(InvalidRequestError):
    """It may be computed in certain regions only, and none of them serves its model from here."""

    status = 403
    code = "region_not_allowed"


class KeyTooNarrowError(ProxyError):
    """What it asks for would be done with more than this key may."""

    status = 403
    kind = "permission_error"
    code = "key_too_narrow"


class OverloadedError(ProxyError):
    """More requests in flight than this proxy or every replica may hold."""

    status = 429
    kind = "rate_limit_error"
    code = "too_many_requests"
    should_retry = True
    retry_after_s = 1


class RateLimitError(OverloadedError):
    """The tenant has used what it may within a minute, or at a time; it may come again."""

    code = "rate_limit_exceeded"


class OverRateLimitError(OverloadedError):
    """It asks for more tokens than its tenant may have in a whole minute."""

    code = "over_rate_limit"
    should_retry = False
    retry_after_s = 0


class QuotaError(OverloadedError):
    """The tenant has used its tokens or its budget of the day."""

    code = "insufficient_quota"
    should_retry = False
    retry_after_s = 0


class QueueFullError(OverloadedError):
    """As many requests wait for a replica as may."""

    code = "queue_full"


class NoSpareError(OverloadedError):
    """It takes only what is spare (`x-doherty-class`), and nothing is."""

    code = "no_spare_capacity"


class QueueTimeoutError(InvalidRequestError):
    """It waited for a replica as long as it may; nobody has begun it."""

    status = 408
    code = "queue_timeout"
    should_retry = True
    retry_after_s = 1


class NoReplicaError(ProxyError):
    """Nobody can take the request now, and nobody has begun it."""

    status = 503
    code = "no_replica"
    should_retry = True
    retry_after_s = 1


class NotAwakeError(NoReplicaError):
    """Nothing of the model is awake, and what was to come up has not: it may, soon."""

    code = "not_awake"


class PreemptedError(NoReplicaError):
    """Online work needed its place before it was answered, and it has nowhere to wait."""

    code = "preempted"


class DrainingError(ProxyError):
    status = 503
    code = "draining"
    should_retry = True
    retry_after_s = 1
    closes = True


class ReplicaUnreachableError(ProxyError):
    """No connection to any replica that was tried; none can have begun the request."""

    status = 502
    code = "replica_unreachable"
    should_retry = True


class ReplicaLostError(ProxyError):
    """The replica had the request and went away; it may have done the work, so we do not repeat."""

    status = 502
    code = "replica_lost"
    should_retry = True


class BadReplicaAnswerError(ProxyError):
    status = 502
    code = "bad_replica_answer"
    should_retry = True


class ReplicaTimeoutError(ProxyError):
    status = 504
    code = "replica_timeout"
    should_retry = True


class DeadlineExceededError(ProxyError):
    """It waited, and its first token can no longer come when it was wanted; nobody has begun it.

    Repeated at once it would be as late again.
    """

    status = 504
    code = "deadline_exceeded"


class OfflineUnreachableError(ProxyError):
    """Nobody answers where files and batches are kept; nothing of the request went anywhere."""

    status = 503
    code = "offline_unreachable"
    should_retry = True
    retry_after_s = 1


class OfflineLostError(ProxyError):
    """It had the request and went away, and may have done what it was asked: no blind repeat.

    A second job would cost as much as the first.
    """

    status = 502
    code = "offline_lost"


class OfflineReadLostError(OfflineLostError):
    """It went away while it was asked for what repeating cannot change."""

    code = "offline_read_lost"
    should_retry = True


class OfflineTimeoutError(ProxyError):
    status = 504
    code = "offline_timeout"


class InternalError(ProxyError):
    closes = True


# Outcomes that no answer tells: log words only.
CLIENT_GONE = "client_gone"  # 499 in the access log, as nginx has it
CLIENT_GONE_STATUS = 499
OK = "ok"
STREAM_CUT = "stream_cut"  # the replica went away after its first byte; the client sees a cut

# Every error that a client can meet. deploy/guides/failures.md lists them, and a test holds it so.
ALL_ERRORS: tuple[type[ProxyError], ...] = (
    BadHeadError, BadBodyFramingError, InvalidJSONError, InvalidRequestError, MissingModelError,
    HeadTooLargeError, TargetTooLongError, VersionNotSupportedError, MethodNotImplementedError,
    NotFoundError, MethodNotAllowedError, ModelNotFoundError, KeyTooNarrowError,
    RegionNotAllowedError, RequestTimeoutError, BodyTooLargeError, UnsupportedEncodingError,
    UnauthorizedError, HopRefusedError, HopMisdirectedError, KeysUnknownError, OverloadedError,
    RateLimitError, OverRateLimitError, QuotaError, QueueFullError, NoSpareError,
    QueueTimeoutError, NoReplicaError, NotAwakeError, PreemptedError, DrainingError,
    ReplicaUnreachableError, ReplicaLostError, BadReplicaAnswerError, ReplicaTimeoutError,
    DeadlineExceededError, OfflineUnreachableError, OfflineLostError, OfflineReadLostError,
    OfflineTimeoutError, InternalError,
)  # fmt: skip

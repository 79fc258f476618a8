"""What a whole request asks for: which model, and the chain by which it is placed."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from proxy.core import multipart
from proxy.core.classes import UNSAID, class_of_tier
from proxy.core.policy import Request
from proxy.core.preamble import Preamble
from proxy.core.prefix import form_chain, prefix_chain
from proxy.core.routes import PromptKind, Route
from proxy.core.scan import Scanned, scan_body
from proxy.core.session import response_key, session_of_body

_RESPONSES: Final = b"/v1/responses/"


class Asked:
    """The facts of one body. `model` is empty where the path or a form names none.

    `tier` is how it is served, as its answer has to tell; empty where it did not ask for any.
    `body` is what goes to a replica.
    """

    __slots__ = (
        "added", "cache_salt", "model", "output_tokens", "request", "scanned", "service_tier",
        "stream", "tier",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        *,
        stream: bool,
        request: Request,
        service_tier: str | None = None,
        cache_salt: str | None = None,
        output_tokens: int = 0,
        scanned: Scanned | None = None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.request = request
        self.service_tier = service_tier
        self.cache_salt = cache_salt
        self.output_tokens = output_tokens  # that the answer may have; 0: it does not say
        self.scanned = scanned  # of a body of JSON
        self.tier = b""
        self.added = b""  # to the body, where an engine gets it


def read_body(
    route: Route,
    preamble: Preamble,
    body: bytes,
    *,
    strict: bool = False,
    tenant: bytes = b"",
    adapters: Container[str] = (),
) -> Asked:
    """Read a body as its route has it. Raises the kinds of `errors.InvalidRequestError`.

    `strict`: a request that names a session is pinned to its home. Requests of two tenants share no
    prefix. `adapters` are the model names that mean one, and that some replica has loaded.
    """
    if not route.json:
        return _read_form(preamble, body, strict=strict, tenant=tenant)
    scanned = scan_body(body)
    key = preamble.session_key
    if key is None:
        key = session_of_body(scanned)
    work_class = preamble.wishes.work_class
    if work_class == UNSAID:
        work_class = class_of_tier(scanned.service_tier)
    request = Request(
        prefix_chain(route.prompt, scanned, key, tenant),
        has_session=key is not None,
        pinned=strict and key is not None,
        stream=bool(scanned.stream),
        work_class=work_class,
        adapter=scanned.lora_path or (scanned.model if scanned.model in adapters else ""),
        response_key=_built_upon(route, scanned),
        spare=preamble.wishes.spare,
    )
    return Asked(
        scanned.model,
        stream=request.stream,
        request=request,
        service_tier=scanned.service_tier,
        cache_salt=scanned.cache_salt,
        output_tokens=scanned.output_tokens,
        scanned=scanned,
    )


def _built_upon(route: Route, scanned: Scanned) -> int:
    """Return the key of the response that this one continues, which one replica may hold; or 0."""
    response_id = scanned.previous_response_id
    if response_id is None or route.prompt is not PromptKind.RESPONSES:
        return 0
    return response_key(response_id.encode("utf-8", "surrogatepass"))


def _read_form(preamble: Preamble, body: bytes, *, strict: bool, tenant: bytes) -> Asked:
    """Read a form, which holds a file of sound; or no body, where the path asks for a response."""
    content_type = preamble.head.special.get(b"content-type", b"")
    form = multipart.read_form(content_type, body)
    key = preamble.session_key
    path = preamble.path
    asked_for = path[len(_RESPONSES) :] if path.startswith(_RESPONSES) else b""
    request = Request(
        form_chain(form.model, body, form.file_begin, form.file_end, key, tenant),
        has_session=key is not None,
        pinned=strict and key is not None,
        work_class=preamble.wishes.work_class,
        spare=preamble.wishes.spare,
        response_key=response_key(asked_for.partition(b"/")[0]),
    )
    return Asked(form.model, stream=False, request=request)

"""What a whole request asks for: which model, and the chain by which it is placed."""

from __future__ import annotations

from proxy.core import multipart
from proxy.core.policy import Request
from proxy.core.preamble import Preamble
from proxy.core.prefix import NO_CHAIN, prefix_chain
from proxy.core.routes import Route
from proxy.core.scan import scan_body
from proxy.core.session import session_of_body


class Asked:
    """The facts of one body. `model` is empty where the path or a form names none."""

    __slots__ = ("model", "request", "stream")

    def __init__(self, model: str, *, stream: bool, request: Request) -> None:
        self.model = model
        self.stream = stream
        self.request = request


def read_body(route: Route, preamble: Preamble, body: bytes) -> Asked:
    """Read a body as its route has it. Raises the kinds of `errors.InvalidRequestError`."""
    key = preamble.session_key
    if route.json:
        scanned = scan_body(body)
        if key is None:
            key = session_of_body(scanned)
        chain = prefix_chain(route.prompt, scanned, key)
        request = Request(
            chain,
            has_session=key is not None,
            stream=bool(scanned.stream),
            adapter=scanned.lora_path or "",
        )
        return Asked(scanned.model, stream=bool(scanned.stream), request=request)
    form = preamble.head.special.get(b"content-type", b"")
    model = multipart.model_field(form, body) if body else ""
    return Asked(model, stream=False, request=Request(NO_CHAIN, has_session=key is not None))

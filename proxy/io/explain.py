"""A dry run of one request: what this worker would do with it now, and why. Nothing is changed.

It goes through the same calls as a request that comes in, so that it says what would happen; only a
policy that draws lots may draw otherwise the next time.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from proxy import errors
from proxy.core.classes import NAMES
from proxy.core.explanation import candidates, candidates_abroad, chain_shown, hot_octets, priced
from proxy.core.fleet import Pool
from proxy.core.http1 import Field
from proxy.core.policy import Decision, Request
from proxy.core.preamble import Preamble, read_preamble
from proxy.core.principal import ANYBODY
from proxy.core.routes import find_route
from proxy.io.plane import Plane


def explain(plane: Plane, path: bytes, fields: Sequence[Field], body: bytes) -> tuple[int, bytes]:
    """Return a status and JSON: the explanation, or the error that the client would read."""
    try:
        return 200, orjson.dumps(_explain(plane, path, fields, body), option=orjson.OPT_INDENT_2)
    except errors.ProxyError as error:
        return error.status, error.body(errors.dialect_of(path))


def _explain(plane: Plane, path: bytes, fields: Sequence[Field], body: bytes) -> dict[str, object]:
    lines = [b"%b: %b" % field for field in ((b"host", b"explained"), *fields)]
    preamble = read_preamble(b"\r\n".join((b"POST %b HTTP/1.1" % path, *lines)))
    route = preamble.route or find_route(preamble.method, preamble.path)
    if route.local:
        raise errors.InvalidRequestError("the proxy answers this path itself")
    if preamble.passes:
        raise errors.InvalidRequestError(
            "no replica answers this path: it is the offline service's"
        )
    plane.judge_length(len(body))
    principal = ANYBODY
    if preamble.credential_fields:  # explained as theirs: what they may ask for, and where
        principal = plane.authentication.who_asks(preamble)
    asked = plane.read(route, preamble, body, principal)
    request, picture = asked.request, plane.picture
    pool = plane.find_pool(asked.model, request.regions, lookup=route.lookup)
    now_s, turn = plane.clock.now_s(), picture.turn
    # First, for prices let go of what must be done by now, which not every policy looks at.
    able = candidates(request, pool, picture, plane.sharing.hearsay, now_s)
    decision = plane.choose(request, pool, picture, now_s)
    picture.turn = turn  # it is still the next one's
    held = plane.holds(decision, request, asked.model, lookup=route.lookup, now_s=now_s)
    shown: dict[str, object] = {
        "path": preamble.path_text,
        "route": route.name,
        "model": asked.model,
        "stream": asked.stream,
        "tenant": principal.tenant,
        "key_id": principal.key_id,
        "class": NAMES[request.work_class],
        "policy": plane.config.policy,
        "session": _session(request, preamble),
        "continues_response": bool(request.response_key),
        "chain": chain_shown(request),
        "decision": None,
        "held": held,
        "waiting": plane.waiting.count,
    }
    if decision is not None:
        shown["decision"] = _decision(decision, request, pool, plane, now_s)
    elif not held:
        shown["error"] = orjson.Fragment(plane.nobody(asked.model, pool, (), "").body())
    home = decision if decision is not None and not decision.replica.remote else None
    abroad = candidates_abroad(request, pool, picture, home, now_s) if pool.remotes else []
    shown["candidates"] = able + abroad
    return shown


def _session(request: Request, preamble: Preamble) -> dict[str, object] | None:
    """Return where its key comes from; the key itself is the client's secret."""
    if not request.has_session:
        return None
    given_by = "header" if preamble.session_key is not None else "body"
    return {"given_by": given_by, "pinned": request.pinned}


def _decision(
    decision: Decision, request: Request, pool: Pool, plane: Plane, now_s: float
) -> dict[str, object]:
    octets, picture = request.chain.prompt_bytes, plane.picture
    return {
        "replica": decision.replica.name,
        "reason": decision.reason,
        "prompt_tokens": picture.tokens_of(octets, decision.slot),
        "cached_octets": decision.cached_octets,
        "hot_octets": hot_octets(decision, request, pool, picture),
        **priced(decision, request, pool, picture, now_s).as_dict(),
    }

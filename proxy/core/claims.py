"""What a request may claim: its class, its deadline, where it may be computed, and for whom.

*Class.* The first that says one counts: the head (`core.wishes`), the body's `service_tier`, the
policy of the key, the pool of the model. What comes of it is then held against the key: of the
classes that it may have, a request gets the one it asks for or else the next lower. Lower than all
of them it may always go: to be served later costs nobody anything. The path says nothing of it: who
waits for an embedding may be a person who searches, or a night's index. Only what is sent as a file
of lines (`/v1/batches`) is offline work by that, and its sender says so in the head of each line.

*Deadline.* When the first token is wanted, counted from the moment in which the head came, because
that is when the client's own clock began. Where the client says none, its tenant may, for online
requests; and after its client's patience nobody listens any more. That is patience with silence:
comments in a stream that waits begin it anew.

*Residency.* The regions that both the key and the model allow.

*Models.* One that the key may not ask for is answered as one that is not there, as OpenAI does it
(404 `model_not_found`): whether it exists is nothing that such a client has to know. An adapter
counts as a model, whichever way the body names it.

All of it is laid on the request once, when its body is whole; whoever orders, places or sends it
reads it there.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.core import limits
from proxy.core.classes import NAMES, OFFLINE, ONLINE, UNSAID
from proxy.core.policy import Request
from proxy.core.principal import ALL_CLASSES, Principal
from proxy.core.wishes import Wishes


def lay(
    request: Request,
    wishes: Wishes,
    principal: Principal,
    *,
    pool_class: int,
    arrived_s: float,
    kept_alive: bool = False,
) -> None:
    """Lay class, times and tenant on a request, of which `work_class` is what it asked for.

    `kept_alive`: while it waits its client hears something before it loses patience. Raises the
    error of a head that asks for a time that is none.
    """
    if wishes.error is not None:
        raise wishes.error
    wanted = request.work_class
    if wanted == UNSAID:
        wanted = pool_class if principal.default_class == UNSAID else principal.default_class
    if principal.classes != ALL_CLASSES:
        wanted = allowed_class(wanted, principal.classes)
    request.work_class = wanted
    if wanted == OFFLINE:
        request.weight = limits.FLEX_WEIGHT
    request.tenant = principal.tenant
    request.tenant_weight = principal.weight
    request.tpot_s = wishes.tpot_s
    ttft_s = wishes.ttft_s
    if not ttft_s and wanted == ONLINE:
        ttft_s = principal.slo_ttft_s
    if ttft_s:
        request.deadline_s = arrived_s + ttft_s
    if wishes.patience_s and not kept_alive:
        request.listens_until_s = arrived_s + wishes.patience_s
        if not ttft_s or request.deadline_s > request.listens_until_s:
            request.deadline_s = request.listens_until_s


def allowed_class(wanted: int, classes: int) -> int:
    """Return the class itself where it is among these bits, else the next lower that is.

    One that is lower than all of them needs no leave.
    """
    for work_class in range(wanted, len(NAMES)):
        if classes >> work_class & 1:
            return work_class
    return wanted


def may_ask(principal: Principal, model: str, adapter: str) -> bool:
    """Whether the key may ask for this model, and for the adapter that the body names beside it."""
    models = principal.models
    return models is None or (model in models and (not adapter or adapter in models))


def regions_of(
    principal: Principal, model: str, model_regions: Mapping[str, frozenset[str]]
) -> frozenset[str] | None:
    """Return the regions that the key and the model both allow; None: all. It may be empty."""
    of_model = model_regions.get(model) if model_regions else None
    if of_model is None:
        return principal.regions
    return of_model if principal.regions is None else of_model & principal.regions


def tier_used(asked: int, used: int) -> bytes:
    """Return OpenAI's name for how a request was served that named a tier.

    `asked` is the class that it asked for itself. What its pool or its key chose is their default,
    unless that is the cheap one.
    """
    if used == OFFLINE:
        return b"flex"
    return b"priority" if used == ONLINE and asked == ONLINE else b"default"

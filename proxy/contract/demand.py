"""What a proxy tells its manager of the work that it has: the manager scales by it.

An engine's own metrics say what it computes; what waits in front of all engines, and for a model
that has none awake, only a proxy knows. A report is a whole: one that is lost is made good by the
next, and a proxy that has said nothing for `DEMAND_AGE_S_MAX` is gone, its requests with it. It
comes every `DEMAND_INTERVAL_S`, and at once when a request begins to wait for a model that has
nothing awake: such a burst is not to lose the interval as well. One that ends in order says so
last, so that nobody waits for its silence.

Whoever drains a replica by these counts must know what the proxy knew when it counted: until all of
its workers have heard that the replica drains, one of them may send it a request after a count of
none. So a report names the snapshot that all of them had taken before they counted.

A request that may have only what is spare (`x-doherty-class: spare`) is no demand: nothing starts,
stays up or comes back for it. So it is in none of a model's counts but `spare`. On a replica it
counts as any other: one that drains has to finish it.

Of other regions a report says two things. What each could do for a model (`elsewhere`), so that the
manager, who alone decides what is started for its demand, can leave a part to one that has replicas
sooner or has some at all. And what each asks of this region (`wanted`): requests in flight that it
is to have replicas for, over and above those of its own proxies. All proxies of a region tell the
same of another, so neither is summed over them.

What is not of this form, or counts less than nothing, is no report and is refused as a whole: the
manager divides by sums of these.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

DEMAND_PATH = "/v1/demand"
DEMAND_INTERVAL_S = 0.5
DEMAND_AGE_S_MAX = 5.0
DEMAND_BYTES_MAX = 4 * 1024 * 1024

_Count = Annotated[int, Meta(ge=0, le=2**53)]  # beyond it a float is not exact
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Inputs = Annotated[float, Meta(ge=0, le=1e6)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Id = Annotated[str, Meta(max_length=128)]


class ReplicaDemand(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one proxy has on one replica."""

    in_flight: _Count = 0  # requests sent there and not ended, spare ones as well
    tokens: _Count = 0  # prompt tokens of these that no cache held and no answer has begun for
    spare: _Count = 0  # those of these requests that may have only what is spare


class ModelDemand(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one proxy has for one model. Counters are since the proxy's start."""

    in_flight: _Count = 0
    in_flight_tokens: _Count = 0
    queued: _Count = 0  # requests that wait for a replica
    queued_tokens: _Count = 0  # prompt tokens of these that no cache holds
    queued_s: _Seconds = 0.0  # the longest wait of those that wait now
    arrivals_total: _Count = 0
    refused_total: _Count = 0  # 429s: there was no room to wait
    spare: _Count = 0  # requests sent and not ended that may have only what is spare


class Elsewhere(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another region could do for a model, as its proxies have said just now."""

    start_s: _Seconds = 0.0  # until one that is ordered now serves us, its round trip included
    startable: _Count = 0  # replicas that it could start now
    coming: _Count = 0  # on their way up there
    free: _Count = 0  # requests that would begin there at once
    in_flight: _Count = 0  # requests of this proxy that are there, and not ended
    carries: _Inputs = 0.0  # requests in flight that a replica there is meant to have; 0: not known
    share: _Share = 1.0  # of the requests that wait here, that may be computed there


class Demand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of one proxy, over its workers. Models by the names that pools serve."""

    proxy_id: _Id
    sequence: _Count  # grows with each report of this proxy
    models: dict[str, ModelDemand] = {}
    replicas: dict[str, ReplicaDemand] = {}
    elsewhere: dict[str, dict[_Id, Elsewhere]] = {}  # by model, then by region
    wanted: dict[str, dict[_Id, _Inputs]] = {}  # the same: what they ask of this one
    last: bool = False  # it has ended, and has nothing on any replica
    # The `FleetSnapshot` by which every worker chose, at least, when it counted; 0: none yet.
    fleet_epoch: _Id = ""
    fleet_version: _Count = 0


def encode_demand(demand: Demand) -> bytes:
    return msgspec.json.encode(demand)


def decode_demand(body: bytes) -> Demand:
    """Return the report in `body`; raises `msgspec.MsgspecError` when it is not one."""
    try:
        return _DECODER.decode(body)
    except RecursionError as error:
        raise msgspec.DecodeError("it is nested too deeply") from error


_DECODER = msgspec.json.Decoder(Demand)

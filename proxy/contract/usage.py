"""What one request has used, as `proxy.usage_log` has it: one JSON line each, of one key.

Lines are of requests that a replica has had. `cost` is in the currency of the models' prices;
`estimated` says that the engine told no usage and the proxy counted for itself. A request that
another region computed is written where its client had come, and nowhere else.
"""

from __future__ import annotations

import msgspec


class UsageRecord(msgspec.Struct, gc=False, rename={"work_class": "class"}):
    """One line. Who shows no key is the tenant of no name."""

    at: float  # Unix time of its end
    request_id: str
    tenant: str
    key_id: str
    model: str
    work_class: str
    region: str
    status: int
    prompt_tokens: int  # those that were cached among them
    cached_tokens: int
    completion_tokens: int
    estimated: bool
    cost: float
    stream: bool


def decode_usage(line: bytes) -> UsageRecord:
    """Return the record of one line; raises `msgspec.MsgspecError` when it is none."""
    return _DECODER.decode(line)


_DECODER = msgspec.json.Decoder(UsageRecord)

"""The fuzz targets: each a law, the plain reading that is timed, and octets to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from proxy import errors
from proxy.core import note_wire, notes, peer_wire
from proxy.core.prefix import PrefixChain, prefix_chain
from proxy.core.routes import ROUTES, PromptKind
from proxy.core.scan import scan_body
from proxy.core.usage import Usage, read_usage
from tests.conformance.engine_vectors import ENGINE
from tests.conformance.reader import read_requests, read_response
from tests.conformance.vectors import REQUESTS
from tests.fuzz import laws

FOLDER: Final = Path(__file__).parent
_SEED_BYTES_MAX: Final = 2048


class Target(NamedTuple):
    law: Callable[[bytes], None]
    read: Callable[[bytes], object]  # once, as the proxy would: its processor time is bounded
    seeds: Callable[[], list[bytes]]


def _requests() -> list[bytes]:
    return [v.octets for v in REQUESTS if len(v.octets) <= _SEED_BYTES_MAX]


def _answers() -> list[bytes]:
    return [v.octets for v in ENGINE if len(v.octets) <= _SEED_BYTES_MAX]


_MESSAGES: Final = [
    {"role": "system", "content": 'say "user"'},
    {"role": "user", "content": [{"type": "text", "text": '\\"é😀\\\\'}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]},
]


def _bodies() -> list[bytes]:
    whole = {
        "model": "m", "stream": True, "messages": _MESSAGES, "service_tier": "flex",
        "prompt_cache_key": "k", "session_id": 7, "cache_salt": "s", "lora_path": None,
        "tools": [{"type": "function"}], "temperature": 1e-7, "max_tokens": 9,
    }  # fmt: skip
    return [
        json.dumps(whole).encode(),
        json.dumps(whole, ensure_ascii=False, indent=1).encode(),
        b'{"model":"a","model":"b","stream":null,"prompt":["x",[1,2]]}',
        b'{"mod\\u0065l":"\\ud83d\\ude00","input":"\\ud800","instructions":""}',
        b'{"model":"m","input":[1, [2] ,"]"\n],"previous_response_id":"r","messages":[{},{} ]}',
        b'{"model":"m","messages":[{"data" : "data:a/b;base64,%b"},{"url":"\\/"}]}'
        % (b"Aa0+" * 1100),
        b'{"model":"m","x":NaN}',
        b'{"model":"m","x":' + b"[" * 40 + b"]" * 40 + b"}",
        b'\xef\xbb\xbf{"model":"m"}',
        b'[{"role":"user"}]',
        b"{}",
    ]


def _chains() -> list[bytes]:
    return [*_bodies(), json.dumps(_MESSAGES).encode(), b'["a", {"role" : "user"} ,1 ]']


def _usages() -> list[bytes]:
    counts = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": None}
    return [
        json.dumps({"choices": [], "usage": counts}).encode(),
        b'data: {"usage" : {"input_tokens":1,"output_tokens":2,"cache_read_input_tokens":3}}\n\n',
        b'"usage":{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
        b"data: [DONE]\n\n",
        b'"usage":null,"usage":"usage","usage":{}}',
    ]


def _event_streams() -> list[bytes]:
    event = b'data: {"a":1}\n\n'
    choices = (
        b"\x00\x10\x20\x20\x20\x20",
        b"\x00\x40\x01\x0e\xff\x03",
        b"\x01\x00\x0e\x0e\x0e\x0e",
    )
    streams = (
        event * 3,
        event.replace(b"\n", b"\r\n") * 2,
        b": ping\n\nevent: x\ndata: a\ndata: b\n\n" + event,
        b"data: a\r\rdata: b\n\r\n\ndata\n\n",
    )
    return [choice + stream for choice in choices for stream in streams]


def _paths() -> list[bytes]:
    made = (b"/v1/models/org/m", b"/v1/responses/resp_1", b"/v1/responses/r-1/cancel", b"/sleep")
    return [*ROUTES, *made, b"/v1/models/%2e%2e/sleep", b"/v1/responses/..%2f..%2fsleep"]


def _batches() -> list[bytes]:
    lease = notes.OpenLease(7, notes.replica_key("a"), 10, 0, 40, stream=True, weight=1.0)
    chain = PrefixChain(0, (5, 6), (20, 40), 40)
    return [
        note_wire.write_dispatched(lease, chain) + note_wire.write_prefill_ended(7),
        note_wire.write_released(7, Usage(5, 6, None)) + note_wire.write_cleared(1),
        b"".join(note_wire.write_open_leases([lease], 8)),
        note_wire.write_holds(lease.replica_key, [1, 2], [3, 4]) + note_wire.write_evicted(1, [2]),
        note_wire.write_state(notes.State(1, True, 2, 3, 0.5)) + note_wire.write_response(1, 2),
    ]


def _frames() -> list[bytes]:
    return [
        peer_wire.make_hello("local", bytes(16), bytes(32), None),
        peer_wire.write_notes(1, 0.5, b"batch"),
        peer_wire.write_page(1, b"batch", last=True),
        peer_wire.write_beat(peer_wire.BEAT, 1.0),
        peer_wire.write_gone(1),
        peer_wire.write_whole(),
    ]


def _usual(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """A refusal is a verdict."""

    def usual(octets: bytes) -> object:
        try:
            return read(octets)
        except errors.ProxyError as error:
            return error

    return usual


def _read_chain(octets: bytes) -> object:
    return prefix_chain(PromptKind.CHAT, scan_body(octets), None)


TARGETS: Final[dict[str, Target]] = {
    "requests": Target(laws.requests, lambda octets: read_requests([octets]), _requests),
    "answers": Target(laws.answers, lambda octets: read_response([octets]), _answers),
    "routes": Target(laws.routes, laws.routes, _paths),
    "body": Target(laws.body, _usual(scan_body), _bodies),
    "chain": Target(laws.chain, _usual(_read_chain), _chains),
    "usage": Target(laws.usage, read_usage, _usages),
    "event_stream": Target(laws.event_stream, laws.event_stream, _event_streams),
    "notes": Target(laws.heard, laws.heard, _batches),
    "peers": Target(laws.peers, laws.peers, _frames),
}


def kept(name: str) -> Iterator[tuple[str, bytes]]:
    """Return what is kept for a target: seeds that fuzzing found, and every crash ever found."""
    for kind in ("seeds", "crashes"):
        for path in sorted((FOLDER / kind / name).glob("*")):
            yield f"{kind}/{name}/{path.name}", path.read_bytes()

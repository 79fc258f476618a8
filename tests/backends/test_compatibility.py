"""What deploy/guides/compatibility.md promises of processes and files of another release."""

from __future__ import annotations

import json

import msgspec
import pytest

from backends.journal import Launch, Ready, replay
from proxy.contract import FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.contract.demand import Demand, ReplicaDemand, decode_demand
from proxy.contract.key_file import KeyFileError, parse_key_file

_RECORD = ReplicaRecord(
    replica_id="r-0", url="http://127.0.0.1:1", models=("demo",), state=ReplicaState.READY
)
_LAUNCH = Launch(
    launch_id="l", replica_id="r-0", launch_hash="h", engine="vllm", model="m", pool="m",
    port=1, stop_grace_s=1.0, starts=1, at_s=0.0,
)  # fmt: skip


def _with_news(value: object) -> bytes:
    """Return it as a later release might send it: with a field more, in each of its records."""

    def grown(part: dict[str, object]) -> dict[str, object]:
        records = {
            key: [grown(each) if isinstance(each, dict) else each for each in value]
            for key, value in part.items()
            if isinstance(value, list)
        }
        return part | records | {"of_a_later_release": [1]}

    return json.dumps(grown(json.loads(msgspec.json.encode(value)))).encode()


def test_a_fleet_of_a_later_manager_is_read() -> None:
    snapshot = FleetSnapshot(epoch="e", version=3, region="eu", replicas=(_RECORD,))
    assert msgspec.json.decode(_with_news(snapshot), type=FleetSnapshot) == snapshot


def test_a_fleet_of_an_earlier_manager_is_read() -> None:
    """It has what has no default, and no more."""
    told = b'{"epoch":"e","version":1,"region":"eu"}'
    assert msgspec.json.decode(told, type=FleetSnapshot).replicas == ()


def test_what_a_later_proxy_asks_for_is_read() -> None:
    demand = Demand(proxy_id="p", sequence=1, fleet_epoch="e", last=True)
    told = json.loads(msgspec.json.encode(demand)) | {"of_a_later_release": {"a": 1}}
    told["replicas"] = {"r-0": {"in_flight": 2, "of_a_later_release": 1}}
    read = decode_demand(json.dumps(told).encode())
    assert read == msgspec.structs.replace(demand, replicas={"r-0": ReplicaDemand(in_flight=2)})


def test_a_journal_of_a_later_manager_is_read_as_far_as_it_is_known() -> None:
    unknown = b'{"entry":"of_a_later_release","launch_id":"l"}'
    lines = [_with_news(_LAUNCH), unknown, _with_news(Ready(launch_id="l"))]
    live, damaged = replay(lines)
    assert damaged == 1
    assert live == {"l": msgspec.structs.replace(_LAUNCH, ready=True)}


def test_keys_of_a_later_release_are_refused_in_words() -> None:
    with pytest.raises(KeyFileError, match=r"^keys.json: no file of keys: .*of_a_later_release"):
        parse_key_file(b'{"version": 1, "of_a_later_release": 1}', "keys.json")

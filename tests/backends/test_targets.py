"""Where Prometheus is told to scrape engines."""

from __future__ import annotations

from backends.targets import groups_of
from proxy.contract import ReplicaRecord, ReplicaState


def _record(replica_id: str, url: str, **more: object) -> ReplicaRecord:
    return ReplicaRecord(replica_id=replica_id, url=url, **more)  # type: ignore[arg-type]


def test_a_group_names_address_and_scheme_and_what_we_call_the_engine() -> None:
    record = _record(
        "demo-0", "http://10.0.0.4:30000", pool="demo", engine="vllm", models=("m", "m:lora")
    )
    assert groups_of([record]) == [
        {
            "targets": ["10.0.0.4:30000"],
            "labels": {
                "__scheme__": "http",
                "replica": "demo-0",
                "pool": "demo",
                "region": "local",
                "engine": "vllm",
                "served_model": "m",
            },
        }
    ]


def test_addresses_of_version_six_and_ports_that_go_without_saying() -> None:
    urls = ["https://[2001:db8::1]", "http://[::1]:8123", "http://engine"]
    found = [group["targets"] for group in groups_of(_record("a", url) for url in urls)]
    assert found == [["[2001:db8::1]:443"], ["[::1]:8123"], ["engine:80"]]


def test_only_who_can_answer_is_a_target() -> None:
    records = [_record(state, "http://e:1", state=state) for state in ReplicaState]
    records.append(_record("asleep", "http://e:1", asleep=True))
    names = [group["labels"]["replica"] for group in groups_of(records)]  # type: ignore[index]
    assert names == ["ready", "draining"]

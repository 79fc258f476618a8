"""Pools written out, one value for each replica."""

from __future__ import annotations

from backends.spec import replica_specs
from proxy.config import parse_config


def test_a_pools_settings_are_those_of_each_replica() -> None:
    config = parse_config(
        "models: [{name: m, pools: [{engine: vllm, replicas: 2, gpus: 4, sleep: true, "
        "adapters: {sql: /lora/sql}}]}]",
        "f",
    )
    specs = replica_specs(config)
    assert [spec.replica_id for spec in specs] == ["m-0", "m-1"]
    for spec in specs:
        assert (spec.gpus, spec.sleep, spec.adapters) == (4, True, {"sql": "/lora/sql"})


def test_unsaid_they_are_off() -> None:
    (spec,) = replica_specs(parse_config("models: [{name: m, pools: [{engine: vllm}]}]", "f"))
    assert (spec.gpus, spec.sleep, spec.adapters) == (None, False, {})

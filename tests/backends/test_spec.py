"""Pools written out, one value for each replica."""

from __future__ import annotations

import msgspec

from backends.spec import pool_specs
from proxy.config import parse_config
from tests.fakes.specs import replica_specs


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


def test_a_scaled_pool_names_replicas_by_number_and_none_for_ever() -> None:
    pool = "{engine: vllm, class: offline, max_inputs: 8, autoscale: {max: 3}}"
    text = f"models: [{{name: org/m, pools: [{pool}]}}]"
    config = parse_config(text, "f")
    assert replica_specs(config) == ()
    (made,) = pool_specs(config)
    assert (made.pool_id, made.replicas, made.first.work_class) == ("org-m", None, "offline")
    assert made.replica(7) == msgspec.structs.replace(made.first, replica_id="org-m-7")
    assert made.number_of("org-m-7") == 7
    assert {made.number_of(name) for name in ("org-m", "m-7", "org-m-x", "org-m--1")} == {None}

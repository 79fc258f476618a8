"""The JSON schema of the file, for editors: what `config` reads, and no more.

It is msgspec's schema of the structs, with what that cannot know: words that are understood
although no field has them, fields that are filled from elsewhere, examples, and where it is from.
What spans several keys (an autoscale without a target) only `doherty check` can say.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec

from proxy.config import ALIASES, VERSION, Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_ID = f"urn:doherty:configuration:{VERSION}"

# By section and key, where the type alone does not show what is meant.
EXAMPLES: dict[str, dict[str, list[Any]]] = {
    "Config": {"version": [VERSION], "region": ["eu", "us-east"]},
    "ProxyConfig": {
        "worker_urls": [["http://10.0.0.1:30000", "http://10.0.0.2:30000"]],
        "manager_url": ["http://127.0.0.1:8002"],
        "access_log": ["-", "off", "/var/log/doherty/access.log"],
        "peer_listen": ["0.0.0.0:8004", "unix:/run/doherty/peers.sock"],
        "peers": [["10.0.0.1:8004", "10.0.0.2:8004"]],
        "offline_url": ["http://127.0.0.1:8003"],
        "keys_path": ["/etc/doherty/keys.json"],
        "usage_log": ["/var/log/doherty/usage.jsonl"],
        "upgrade_socket": ["/run/doherty/upgrade.sock"],
    },
    "ManagerConfig": {
        "gpus": ["auto", "none", "0,2-3", [0, 1]],
        "keys_follow": ["https://eu.example:8005"],
        "keys_listen": ["0.0.0.0:8005"],
    },
    "DockerConfig": {
        "images": [{"vllm": "vllm/vllm-openai:v0.26.0"}],
        "mounts": [["/models:ro", "/scratch:/tmp:rw"]],
    },
    "RayConfig": {"address": ["local", "auto", "ray://head.example:10001"]},
    "OfflineConfig": {
        "store": ["/var/lib/doherty/offline.db", "postgresql://doherty@db.example/jobs"],
        "work_url": ["http://10.0.0.1:8003"],
    },
    "ModelConfig": {"name": ["qwen3-8b"], "prompt_price": [0.2]},
    "PoolConfig": {
        "model_path": ["Qwen/Qwen3-8B", "/models/qwen3-8b"],
        "args": [["--max-model-len", "32768"]],
        "env": [{"VLLM_LOGGING_LEVEL": "WARNING"}],
        "adapters": [{"sql": "/models/sql-lora"}],
        "resources": [{"CPU": 8}],
    },
    "TenantConfig": {"name": ["product"], "classes": [["offline"]], "models": [["qwen3-8b"]]},
    "JwtConfig": {
        "issuer": ["https://login.example"],
        "tenant_claim": ["sub", "org.team"],
    },
    "RemoteRegionConfig": {"url": ["https://us.example"], "peer": ["us-1.example:8004"]},
}
# YAML 1.1 reads a bare off as false; the reader takes it for the word.
_OFF = ("access_log", "kv_events", "tls_client_auth")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file."""
    _, sections = msgspec.json.schema_components([Config], ref_template="#/$defs/{name}")
    del sections["AccessConfig"], sections["ModelAccess"]  # made of the top of the file
    proxy = sections["ProxyConfig"]["properties"]
    del proxy["access"]
    for name, aliases in ALIASES.items():
        proxy[name]["enum"] = [*proxy[name]["enum"], *aliases]
    for name in _OFF:
        words = {key: proxy[name].pop(key) for key in ("type", "enum") if key in proxy[name]}
        proxy[name]["anyOf"] = [words, {"const": False}]
    for section, keys in EXAMPLES.items():
        for key, values in keys.items():
            sections[section]["properties"][key]["examples"] = values
    for section in sections.values():
        for each in section["properties"].values():
            if isinstance(each.get("default"), dict) and each["default"]:
                del each["default"]  # a section, whose own keys say theirs
    whole = sections.pop("Config") | {"title": "Doherty configuration"}
    whole["properties"]["version"]["maximum"] = VERSION
    schema = {"$schema": DIALECT, "$id": SCHEMA_ID, **whole, "$defs": sections}
    # As it is written: lists, where structs have tuples.
    return cast("dict[str, Any]", _plain(msgspec.json.decode(msgspec.json.encode(schema))))


def _plain(value: Any) -> Any:
    """Return it with 1 for 1.0: `typing` takes annotations with the one for those with the other,
    so that which of them is told would depend on what else was imported.
    """
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

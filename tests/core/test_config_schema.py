"""The JSON schema for editors: what the reader takes it takes, and it refuses what that refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from proxy.config import ALIASES, EMBEDDED_DEFAULT, ConfigError, parse_config
from proxy.config_schema import EXAMPLES, json_schema

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = ROOT / "deploy/doherty.schema.json"
_COMMENT = "# yaml-language-server: $schema="
EXAMPLE_FILES = [
    path for path in sorted(ROOT.glob("deploy/**/*.yaml")) if _COMMENT in path.read_text("utf-8")
]


def _problems(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text) or {})]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    assert SCHEMA["$id"] == "urn:doherty:configuration:1"


def test_the_shipped_one_is_what_the_command_prints() -> None:
    shipped = SHIPPED.read_text(encoding="utf-8")
    assert shipped == json.dumps(SCHEMA, indent=2) + "\n", (
        "doherty check --schema > deploy/doherty.schema.json"
    )


def test_it_has_every_section_of_the_file() -> None:
    assert set(SCHEMA["$defs"]) == {
        "ProxyConfig", "ManagerConfig", "ModelConfig", "PoolConfig", "AutoscaleConfig",
        "DockerConfig", "RayConfig", "ReclaimNoticeConfig", "OfflineConfig", "ClassesConfig",
        "JwtConfig", "RemoteRegionConfig", "TenantConfig",
    }  # fmt: skip
    assert SCHEMA["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in SCHEMA["$defs"].values())


@pytest.mark.parametrize("name", ["Config", *SCHEMA["$defs"]])
def test_every_key_is_described_and_examples_are_of_its_kind(name: str) -> None:
    section = SCHEMA if name == "Config" else SCHEMA["$defs"][name]
    assert len(section["description"]) > 5
    for key, value in section["properties"].items():
        assert len(value["description"]) > 3, key
        for example in value.get("examples", ()):
            jsonschema.Draft202012Validator(value | {"$defs": SCHEMA["$defs"]}).validate(example)
    assert EXAMPLES.get(name, {}).keys() <= section["properties"].keys()


def test_the_examples_of_the_folder_name_it_and_are_valid() -> None:
    assert len(EXAMPLE_FILES) >= 6
    for path in EXAMPLE_FILES:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert (path.parent / first.removeprefix(_COMMENT)).resolve() == SHIPPED, path
        assert _problems(path.read_text(encoding="utf-8")) == [], path


def test_every_file_that_is_a_configuration_names_it() -> None:
    """Whatever of deploy/ the reader takes is such a file; an editor should know it as one."""
    for path in sorted(ROOT.glob("deploy/**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^(models|proxy):", text, re.MULTILINE):  # not what is within a ConfigMap
            assert path in EXAMPLE_FILES, path


def test_the_demo_is_valid() -> None:
    assert _problems(EMBEDDED_DEFAULT) == []


@pytest.mark.parametrize(
    "text",
    [
        *(f"proxy: {{{name}: {alias}}}" for name in ALIASES for alias in ALIASES[name]),
        "proxy: {access_log: off, kv_events: off, tls_client_auth: off}",
        "manager: {gpus: 0}",
        "manager: {gpus: [0, 1, GPU-8932f937]}",
        "proxy: {queue_timeout_secs: 1, manager_url: null}",
        "models: [{name: a, pools: [{engine: vllm, class: semi-online, resources: {CPU: 1}}]}]",
        "jwt: {issuer: 'https://a.example', audience: a}\nversion: 1",
    ],
)
def test_what_the_reader_takes_it_takes(text: str) -> None:
    if "resources" not in text:  # which spans sections: they are for Ray alone
        parse_config(text, "f")
    assert _problems(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "prxoy: {}",
        "version: 2",
        "proxy: {prot: 1}",
        "proxy: {port: 65536}",
        "proxy: {port: '80'}",
        "proxy: {policy: fastest}",
        "proxy: {access: {tenants: [{name: a}]}}",
        "proxy: {access_log: true}",
        "proxy: {api_key: ''}",
        "models: [{name: a}]",
        "models: [{name: a, pools: []}]",
        "models: [{name: a, pools: [{engine: tgi}]}]",
        "models: [{name: a, pools: [{engine: vllm, args: [--max-model-len, 32768]}]}]",
        "tenants: [{name: 'a b'}]",
        "classes: {online_reserve: 1.0}",
        "jwt: {issuer: a}",
    ],
)
def test_what_the_reader_refuses_it_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text, "f")
    assert _problems(text)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    return (
        [leaf for each in value for leaf in _leaves(each)] if isinstance(value, list) else [value]
    )


def test_a_section_shows_no_default_of_its_own() -> None:
    assert "default" not in SCHEMA["properties"]["proxy"]
    assert "access" not in SCHEMA["$defs"]["ProxyConfig"]["properties"]
    assert "AccessConfig" not in " ".join(str(leaf) for leaf in _leaves(SCHEMA))


def _wrong(value: dict[str, Any]) -> list[Any]:
    """Return values that the schema of a key excludes."""
    wrong: list[Any] = []
    for kind in value.get("anyOf", [value]):
        wrong += [kind[bound] - 1 for bound in ("minimum",) if bound in kind]
        wrong += [kind[bound] + 1 for bound in ("maximum", "exclusiveMaximum") if bound in kind]
        wrong += ["no-such-word"] if "enum" in kind else []
        wrong += [""] if kind.get("minLength") else []
        wrong += [["a", 1]] if kind.get("type") == "boolean" else []
    return [each for each in wrong if not _takes(value, each)]


def _takes(value: dict[str, Any], candidate: Any) -> bool:
    return jsonschema.Draft202012Validator(value | {"$defs": SCHEMA["$defs"]}).is_valid(candidate)


@pytest.mark.parametrize("name", ["proxy", "manager", "offline", "classes"])
def test_reader_and_schema_agree_on_each_bound(name: str) -> None:
    section = SCHEMA["$defs"][SCHEMA["properties"][name]["$ref"].rsplit("/", 1)[-1]]
    tried = 0
    for key, value in section["properties"].items():
        for wrong in _wrong(value):
            tried += 1
            with pytest.raises(ConfigError):
                parse_config(json.dumps({name: {key: wrong}}), "f")
        default = value.get("default")
        if default is not None:
            parse_config(json.dumps({name: {key: default}}), "f")
            assert _takes(value, default), key
    assert tried >= 2

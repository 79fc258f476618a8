"""What `doherty up` gives to its processes where there are tenants."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from backends.keys.file import change
from backends.settings import manager_config_of, plan_of
from backends.up_plan import Plan, services
from proxy.config import ConfigError
from proxy.contract.keys import KeyRecord

MODELS = "models: [{name: m, pools: [{engine: simulator, replicas: 1}]}]\n"
SECRET = "DOHERTY_INTERNAL_KEY"


def plan(tmp_path: Path, text: str, **environ: str) -> Plan:
    path = tmp_path / "doherty.yaml"
    path.write_text(text + MODELS)
    return plan_of({"config": str(path)}, environ)


def test_a_secret_of_this_run_is_shared_by_those_who_need_it(tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    text = f"tenants: [{{name: acme}}]\nproxy: {{keys_path: {keys}}}\n"
    made = plan(tmp_path, text)
    commands = services(made, {})
    assert commands.offline is not None
    secret = commands.proxy.env[SECRET]
    assert len(secret) >= 32
    assert commands.offline.env[SECRET] == secret
    assert SECRET not in commands.manager.env
    everything = (commands.proxy, commands.offline, commands.manager)
    assert not [command for command in everything if secret in " ".join(command.argv)]
    again = services(plan(tmp_path, text), {})
    assert again.proxy.env[SECRET] != secret
    assert commands.manager.env["DOHERTY_KEYS_PATH"] == keys


def test_a_secret_that_is_given_is_kept_and_without_tenants_there_is_none(tmp_path: Path) -> None:
    keyed = plan(tmp_path, "proxy: {keys_path: k}\n", DOHERTY_INTERNAL_KEY="ours")
    assert keyed.proxy.internal_key == "ours"
    plain = services(plan(tmp_path, ""), {})
    assert SECRET not in plain.proxy.env
    assert "DOHERTY_KEYS_PATH" not in plain.manager.env


def test_a_region_that_follows_has_no_file(tmp_path: Path) -> None:
    made = plan(tmp_path, "tenants: [{name: a}]\nmanager: {keys_follow: 'https://eu:9'}\n")
    assert made.about_keys() is None
    assert made.keyed
    assert "DOHERTY_KEYS_PATH" not in services(made, {}).manager.env


def test_it_says_how_the_first_key_is_made(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    made = plan(tmp_path, f"tenants: [{{name: acme}}]\nproxy: {{keys_path: {keys}}}\n")
    assert made.about_keys() == (
        f"no API keys yet: doherty keys create --tenant acme --config {made.config_path}"
    )
    change(str(keys), lambda nothing: nothing)
    assert made.about_keys() is None


def test_it_says_that_the_proxy_was_given_a_clients_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    held = KeyRecord(key_id="id", tenant="acme", digest=sha256(b"his").hexdigest())
    change(str(keys), lambda none: msgspec.structs.replace(none, keys=(held,)))
    text = f"tenants: [{{name: acme}}]\nproxy: {{keys_path: {keys}}}\n"
    said = plan(tmp_path, text, DOHERTY_API_KEY="his").about_keys()
    assert said is not None
    assert "DOHERTY_API_KEY) is the key id of tenant acme" in said
    assert plan(tmp_path, text, DOHERTY_API_KEY="ours").about_keys() is None


def test_a_key_file_that_cannot_be_used_is_told_before_anything_is_started(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    change(str(keys), lambda none: none)
    keys.chmod(0o644)
    made = plan(tmp_path, f"tenants: [{{name: acme}}]\nproxy: {{keys_path: {keys}}}\n")
    with pytest.raises(ConfigError, match="chmod 600"):
        made.about_keys()


def test_tenants_of_which_nobody_can_be_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="doherty keys create --tenant acme"):
        plan(tmp_path, "tenants: [{name: acme}]\n")
    plan(tmp_path, "tenants: [{name: acme}]\n", DOHERTY_API_KEY="one-for-all")


def test_keys_cannot_be_kept_here_and_elsewhere(tmp_path: Path) -> None:
    text = "manager: {keys_path: k, keys_follow: 'https://eu:9'}\n"
    with pytest.raises(ConfigError, match="exclude each other"):
        plan(tmp_path, text)
    environ = {"DOHERTY_KEYS_PATH": "k"}
    path = tmp_path / "doherty.yaml"
    path.write_text("manager: {keys_follow: 'https://eu:9'}\n")
    with pytest.raises(ConfigError, match="exclude each other"):
        manager_config_of({"config": str(path)}, environ)


def test_the_manager_reads_the_environment_of_the_proxy(tmp_path: Path) -> None:
    path = tmp_path / "doherty.yaml"
    path.write_text("proxy: {keys_path: here}\n")
    config, _ = manager_config_of({"config": str(path)}, {"DOHERTY_PEER_KEY": "shared"})
    assert config.proxy.peer_key == "shared"

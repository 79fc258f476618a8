"""What `doherty check` says of keys."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from backends.cli import main
from backends.keys import checking
from backends.keys.changes import added
from backends.keys.checking import check_keys
from backends.keys.file import change
from proxy.config import ConfigError, parse_config
from proxy.contract.extras import install_command
from proxy.contract.keys import KeyRecord

NOW_S = 1_000_000.0
CONFIG = """
proxy: {keys_path: %s}
tenants: [{name: a, models: [m]}, {name: b}, {name: c}]
"""


def key(number: int, tenant: str, **more: object) -> KeyRecord:
    values = {"key_id": f"k{number}", "tenant": tenant, "digest": f"{number:064x}", **more}
    return KeyRecord(**values)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    for record in (
        key(1, "a"),
        key(2, "a", models=("x",)),
        key(3, "gone"),
        key(4, "b", expires_at=NOW_S + 86_400),
        key(5, "c", revoked_at=5.0),
        key(6, "gone", revoked_at=5.0),
    ):
        change(str(path), lambda keys, record=record: added(keys, record))  # type: ignore[misc]
    return path


def test_each_key_is_held_against_its_tenant(path: Path) -> None:
    warnings = check_keys(parse_config(CONFIG % path, "test"), {}, NOW_S)
    assert len(warnings) == 4
    text = "\n".join(warnings)
    assert "key k2: none of its models is one that its tenant a may use" in text
    assert "key k3: its tenant 'gone' is not configured" in text
    assert "key k4 of tenant b ends in 1.0 days" in text
    assert "tenant c has no key in force" in text


def test_what_a_start_would_lack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    telling = "manager: {keys_path: none.json, keys_listen: '127.0.0.1:9'}\n"
    shared = {"DOHERTY_PEER_KEY": "shared"}
    assert "set proxy.peer_key" in check_keys(parse_config(telling, "test"), {}, NOW_S)[0]
    assert "no keys yet" in check_keys(parse_config(telling, "test"), shared, NOW_S)[0]
    tokens = parse_config("jwt: {issuer: 'https://i.example', audience: d}\n", "test")
    assert check_keys(tokens, {}, NOW_S) == []
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "jwt" else name)
    assert install_command("jwt") in check_keys(tokens, {}, NOW_S)[0]


def test_a_file_that_is_none_yet_or_that_others_may_read(path: Path, tmp_path: Path) -> None:
    config = parse_config(CONFIG % path, "test")
    none = {"DOHERTY_KEYS_PATH": str(tmp_path / "none")}
    assert "no keys yet" in check_keys(config, none, NOW_S)[0]
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"keys_path: .*chmod 600"):
        check_keys(config, {}, NOW_S)


def test_tenants_of_which_nobody_can_be_one() -> None:
    assert "nobody can show" in check_keys(parse_config("tenants: [{name: a}]", "t"), {}, NOW_S)[0]
    followed = "tenants: [{name: a}]\nmanager: {keys_follow: 'http://127.0.0.1:1'}"
    assert check_keys(parse_config(followed, "t"), {}, NOW_S) == []
    assert check_keys(parse_config("", "t"), {}, NOW_S) == []


def test_a_tenants_key_that_is_the_proxys_as_well(path: Path) -> None:
    own = key(7, "a", digest=sha256(b"both").hexdigest())
    change(str(path), lambda keys: added(keys, own))

    def warned(api_key: str) -> set[str]:
        text = CONFIG.replace("%s}", f"%s, api_key: {api_key}}}") % path
        return set(check_keys(parse_config(text, "test"), {}, NOW_S))

    (more,) = warned("both") - warned("other")
    assert more.startswith("api_key (DOHERTY_API_KEY) is the key k7 of tenant a")


def test_the_command_warns_and_says_no_digest(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOHERTY_KEYS_PATH", raising=False)
    file = tmp_path / "doherty.yaml"
    file.write_text(CONFIG % path)
    assert main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "warning: key k2" in err
    assert f"{1:064x}" not in out + err
    path.chmod(0o666)
    assert main(["check", str(file)]) == 2
    assert "chmod 600" in capsys.readouterr().err

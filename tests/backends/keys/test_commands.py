"""`doherty keys`, as people and scripts call it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.cli import main
from backends.keys.making import miscopied
from backends.keys.showing import moment
from proxy.contract.key_file import read_key_file

Keys = Callable[..., tuple[int, str, str]]
CONFIG = """
proxy: {keys_path: %s}
tenants:
  - {name: chat, classes: [online, semi-online], models: [m]}
  - {name: batch}
"""


@pytest.fixture
def keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Keys:
    """Run `doherty keys` over a file; return status, output and words."""
    monkeypatch.delenv("DOHERTY_CONFIG", raising=False)
    monkeypatch.setenv("DOHERTY_KEYS_PATH", str(tmp_path / "keys.json"))

    def run(*arguments: str, given: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        status = main(["keys", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def digests(tmp_path: Path) -> list[str]:
    return [key.digest for key in read_key_file(str(tmp_path / "keys.json")).keys]


def test_a_key_is_printed_once_and_alone_and_kept_as_a_digest(keys: Keys, tmp_path: Path) -> None:
    status, out, err = keys("create", "--tenant", "chat", "--name", "web", "--expires", "90d")
    secret = out.removesuffix("\n")
    assert status == 0
    assert not miscopied(secret)
    assert "\n" not in secret
    assert digests(tmp_path) == [hashlib.sha256(secret.encode()).hexdigest()]
    shown = [keys("list"), keys("list", "--json"), keys("show", "web"), (0, "", err)]
    for _, text, words in shown:
        assert secret not in text + words
        assert secret.split("_")[2] not in text + words + (tmp_path / "keys.json").read_text()
        assert digests(tmp_path)[0] not in text + words
    assert "web" in shown[0][1]


def test_json_has_the_key_beside_what_it_may(keys: Keys) -> None:
    _, out, _ = keys("create", "--tenant", "t", "--models", "a,b", "--classes", "offline", "--json")
    made = json.loads(out)
    assert made["models"] == ["a", "b"]
    assert made["classes"] == ["offline"]
    assert made["key_id"] in made["key"]
    listed = json.loads(keys("list", "--json")[1])
    assert "key" not in listed[0]
    assert listed[0]["key_id"] == made["key_id"]


def test_what_a_key_does_not_say_is_told_as_what_it_means(keys: Keys) -> None:
    keys("create", "--tenant", "t", "--name", "n", "--models", "a,b")
    page = keys("show", "n")[1]
    assert "\nexpires_at  never\n" in page
    assert "\nmodels      a, b\n" in page
    assert "\nregions     what its tenant may\n" in page


def test_a_key_for_what_the_configuration_does_not_have_is_made_with_a_warning(
    keys: Keys, tmp_path: Path
) -> None:
    config = tmp_path / "doherty.yaml"
    models = "models: [{name: qwen, pools: [{engine: simulator}]}]\n"
    config.write_text(CONFIG % (tmp_path / "keys.json") + models)
    made = ("create", "--tenant", "batch", "--config", str(config))
    status, _, err = keys(*made, "--models", "qwem", "--regions", "eu")
    assert status == 0
    assert "warning: " in err
    assert "no model 'qwem'; did you mean 'qwen'?" in err
    assert "no region 'eu'; there are local" in err
    assert "warning" not in keys(*made, "--models", "qwen", "--regions", "local")[2]
    config.write_text(config.read_text() + "remote_regions: [{region: eu, url: 'http://eu'}]\n")
    assert "warning" not in keys(*made, "--models", "theirs", "--regions", "eu")[2]


def test_rotation_leaves_the_old_key_a_while_and_gives_the_new_one_its_rights(
    keys: Keys, tmp_path: Path
) -> None:
    keys("create", "--tenant", "t", "--name", "n", "--models", "m", "--expires", "1w")
    status, out, err = keys("rotate", "n", "--grace", "2h")
    assert status == 0
    old, new = read_key_file(str(tmp_path / "keys.json")).keys
    assert f"the old one, {old.key_id}, ends at {moment(old.expires_at)}" in err
    assert new.digest == hashlib.sha256(out.strip().encode()).hexdigest()
    assert (new.name, new.models) == ("n", ("m",))
    assert old.expires_at == pytest.approx(new.created_at + 7200, abs=1)
    assert new.expires_at - new.created_at == pytest.approx(7 * 86400, abs=1)
    keys("revoke", new.key_id)
    status, _, err = keys("rotate", new.key_id)
    assert (status, "was revoked" in err) == (1, True)


def test_keys_are_revoked_by_id_by_name_and_by_tenant(keys: Keys) -> None:
    for number, tenant in enumerate(("a", "a", "b", "b")):
        keys("create", "--tenant", tenant, "--name", f"n{number}")
    first = json.loads(keys("show", "n0", "--json")[1])["key_id"]
    assert keys("revoke", first, "n2", "--tenant", "a")[0] == 0
    states = {key["name"]: key["state"] for key in json.loads(keys("list", "--all", "--json")[1])}
    assert states == {"n0": "revoked", "n1": "revoked", "n2": "revoked", "n3": "in force"}
    assert [key["name"] for key in json.loads(keys("list", "--json")[1])] == ["n3"]
    assert keys("prune", "--over", "0s")[0] == 0
    assert len(json.loads(keys("list", "--all", "--json")[1])) == 1


def test_a_wrong_name_among_right_ones_revokes_nothing(keys: Keys) -> None:
    keys("create", "--tenant", "a", "--name", "n")
    status, _, err = keys("revoke", "n", "nn")
    assert (status, "no key has the id or the name 'nn'" in err) == (1, True)
    assert keys("revoke", "--tenant", "c")[0] == 1
    assert keys("revoke")[0] == 2
    assert json.loads(keys("list", "--json")[1])[0]["state"] == "in force"


def test_a_key_from_elsewhere_comes_by_standard_input(keys: Keys, tmp_path: Path) -> None:
    secret = "sk-" + "0123456789" * 4
    status, out, err = keys("import", "--tenant", "a", given=secret + "\n")
    assert status == 0
    assert secret not in out + err
    assert digests(tmp_path) == [hashlib.sha256(secret.encode()).hexdigest()]
    again = keys("import", "--tenant", "b", given=secret)
    assert (again[0], "there already" in again[2]) == (1, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "of 0 characters"),
        ("0123456789012345678", "of 19 characters"),
        ("doh_0123456789012345678901234", "part of it is lost"),
        ("0123456789 0123456789", "without spaces"),
        ("0123456789é0123456789", "printable ASCII"),
    ],
)
def test_what_is_no_key_is_not_taken_in(keys: Keys, given: str, words: str) -> None:
    status, _, err = keys("import", "--tenant", "a", given=given)
    assert (status, words in err) == (2, True)
    assert given not in err or not given


def test_the_configuration_names_file_and_tenants(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOHERTY_KEYS_PATH")
    path, file = tmp_path / "doherty.yaml", tmp_path / "keys.json"
    path.write_text(CONFIG % file)
    config = ("--config", str(path))
    assert keys("create", "--tenant", "chat", "--models", "m", *config)[0] == 0
    assert len(digests(tmp_path)) == 1
    for arguments, words in (
        (("--tenant", "chta"), "has no tenant 'chta'; did you mean 'chat'?"),
        (("--tenant", "chat", "--models", "x"), "may not have the model 'x'"),
        (("--tenant", "chat", "--classes", "offline"), "may not have the class 'offline'"),
        (("--tenant", "batch", "--classes", "offlin"), "'offlin' is no class"),
    ):
        status, _, err = keys("create", *arguments, *config)
        assert (status, words in err) == (2, True), err
    assert keys("create", "--tenant", "batch", "--classes", "offline", *config)[0] == 0
    path.write_text(f"manager: {{keys_path: {file}}}")
    status, _, err = keys("create", "--tenant", "t", *config)
    assert (status, "has no tenants" in err) == (2, True)


def test_where_no_file_is_named_the_command_says_how(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOHERTY_KEYS_PATH")
    status, _, err = keys("list")
    assert (status, "--keys FILE, DOHERTY_KEYS_PATH" in err) == (2, True)
    follows = tmp_path / "us.yaml"
    follows.write_text("manager: {keys_follow: 'https://eu:9'}\n")
    status, _, err = keys("list", "--config", str(follows))
    assert (status, "it follows https://eu:9, where keys are made" in err) == (2, True)
    assert keys("list", "--keys", str(tmp_path / "none.json"))[0] == 0  # none yet


@pytest.mark.parametrize("text", ["90", "d", "-1d", "1y", "1.5h", ""])
def test_a_time_has_a_unit(keys: Keys, text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        keys("create", "--tenant", "a", f"--expires={text}")
    assert ended.value.code == 2

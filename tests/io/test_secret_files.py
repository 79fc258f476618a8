"""Keys that stand in files of their own: `DOHERTY_X_FILE` in place of `DOHERTY_X`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.service import environment
from backends.settings import offline_settings, plan_of
from proxy import flags
from proxy.config import ConfigError, OfflineConfig

URLS = ("--worker-urls", "http://127.0.0.1:9")
KEYS = ("api_key", "admin_api_key", "peer_key", "internal_key")


def secret(folder: Path, text: str) -> str:
    path = folder / "secret"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", KEYS)
def test_each_key_may_stand_in_a_file(name: str, tmp_path: Path) -> None:
    told = {f"DOHERTY_{name.upper()}_FILE": secret(tmp_path, "s3cret\n")}
    assert getattr(flags.read(URLS, told), name) == "s3cret"


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    told = {"DOHERTY_API_KEY_FILE": secret(tmp_path, "s3cret")}
    assert flags.read((*URLS, "--api-key", "other"), told).api_key == "other"


def test_it_is_read_again_with_the_settings(tmp_path: Path) -> None:
    told = {"DOHERTY_API_KEY_FILE": secret(tmp_path, "before")}
    invocation = flags.parse(URLS, told)
    assert invocation.settings().api_key == "before"
    secret(tmp_path, "after")
    assert invocation.settings().api_key == "after"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("x" * 20_000, "longer than"),
        ("two words", "DOHERTY_API_KEY"),
    ],
)
def test_what_is_no_secret_is_refused(text: str, words: str, tmp_path: Path) -> None:
    told = {"DOHERTY_API_KEY_FILE": secret(tmp_path, text)}
    with pytest.raises(ConfigError, match=words):
        flags.read(URLS, told)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        told = {"DOHERTY_API_KEY_FILE": str(path)}
        with pytest.raises(ConfigError, match=r"no regular file|cannot be read"):
            flags.read(URLS, told)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = {"DOHERTY_ADMIN_API_KEY_FILE": str(tmp_path / "absent")}
    with pytest.raises(ConfigError, match=r"DOHERTY_ADMIN_API_KEY_FILE: .*absent cannot be read"):
        flags.read(URLS, told)


def test_one_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    told = {"DOHERTY_API_KEY_FILE": secret(tmp_path, "a"), "DOHERTY_API_KEY": "b"}
    with pytest.raises(ConfigError, match="both set"):
        flags.read(URLS, told)


def test_one_that_names_no_file_says_nothing() -> None:
    told = {"DOHERTY_API_KEY_FILE": "", "DOHERTY_API_KEY": "b"}
    assert flags.read(URLS, told).api_key == "b"


def test_only_secrets_have_files(tmp_path: Path) -> None:
    told = {"DOHERTY_POLICY_FILE": secret(tmp_path, "random")}
    assert flags.read(URLS, told).policy == "prefix"


def test_those_of_the_offline_service(tmp_path: Path) -> None:
    told = {"DOHERTY_WORK_KEY_FILE": secret(tmp_path, "w0rk")}
    assert offline_settings(OfflineConfig(), {}, told).work_key == "w0rk"
    told = {"DOHERTY_STORE_FILE": secret(tmp_path, "postgresql://u:p@db/jobs")}
    assert offline_settings(OfflineConfig(), {}, told).store == "postgresql://u:p@db/jobs"


def test_up_leaves_it_in_the_file_but_where_another_is_said(tmp_path: Path) -> None:
    told = {"DOHERTY_API_KEY_FILE": secret(tmp_path, "s3cret")}
    assert plan_of({"config": None}, told).proxy.api_key == "s3cret"
    assert "s3cret" not in environment(told, {}).values()
    assert environment(told, {"DOHERTY_API_KEY": "x"}).keys() == {
        "DOHERTY_API_KEY",
        "PYTHONUNBUFFERED",
    }

"""`doherty up` with tenants: their keys, their jobs, and what is written of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from backends.cli import main
from backends.keys.usage import Usage
from tests.fakes.offline_stage import CHAT, jsonl, request
from tests.fakes.programs import CLI, running, until

pytestmark = pytest.mark.faults

_CONFIG = """
region: here
proxy: {keys_path: KEYS, usage_log: USAGE}
offline: {hold_secs: 2}
tenants: [{name: acme}, {name: beta}]
models:
- name: demo
  pools:
  - {engine: simulator, replicas: 1, args: [--profile, fast]}
"""
_PORTS = ("--port=0", "--admin-port=0", "--manager-port=0")


@pytest.fixture
def key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `doherty keys` over the test's file; return what it prints."""
    monkeypatch.setenv("DOHERTY_KEYS_PATH", str(tmp_path / "keys.json"))

    def run(*arguments: str) -> str:
        assert main(["keys", *arguments]) == 0
        return capsys.readouterr().out.strip()

    return run


def _secrets_of(pid: int) -> list[str]:
    """Return the secret of a run, from the environment of one of its processes."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [entry.partition(b"=") for entry in entries]
    return [value.decode() for name, _, value in found if name == b"DOHERTY_INTERNAL_KEY"]


def test_jobs_are_a_tenants_through_rotations_and_count_as_its_use(
    tmp_path: Path, key: Callable[..., str]
) -> None:
    config, usage_path = tmp_path / "config.yaml", tmp_path / "usage.jsonl"
    text = _CONFIG.replace("KEYS", str(tmp_path / "keys.json")).replace("USAGE", str(usage_path))
    config.write_text(text)
    argv = (*CLI, "up", str(config), *_PORTS, f"--run-dir={tmp_path / 'run'}")
    with running(argv, tmp_path / "up.log") as up:
        up.until_said("no API keys yet: doherty keys create --tenant acme")
        url = up.until_said(r"Ready: (http://\S+)")[1]
        keys = {"old": key("create", "--tenant", "acme", "--name", "n")}
        keys["other"] = key("create", "--tenant", "beta")
        clients = {
            name: OpenAI(base_url=url, api_key=secret, max_retries=0)
            for name, secret in keys.items()
        }

        def let_in(client: OpenAI) -> bool:
            try:
                return bool(client.models.list())
            except openai.AuthenticationError:
                return False

        for client in clients.values():
            until(lambda client=client: let_in(client), "the key to be known")  # type: ignore[misc]
        old, other = clients["old"], clients["other"]
        file = old.files.create(file=("a.jsonl", jsonl([request(0), request(1)])), purpose="batch")
        # The key is rotated at once, and the tenant goes on with what it has.
        keys["new"] = key("rotate", "n", "--grace", "0s")
        new = OpenAI(base_url=url, api_key=keys["new"], max_retries=0)
        until(lambda: let_in(new) and not let_in(old), "the rotation")
        with pytest.raises(openai.NotFoundError):
            other.files.retrieve(file.id)
        batch = new.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        until(lambda: new.batches.retrieve(batch.id).status == "completed", "the batch to end")
        assert [b.id for b in other.batches.list()] == []
        # What its lines took is the tenant's.
        assert until(lambda: _used(usage_path), "the usage records") == {
            ("acme", "internal", "offline"): 2
        }
        secrets = [*keys.values(), *_secrets_of(int(_note(tmp_path, "proxy")))]
        assert len(secrets) == 4
        for client in (*clients.values(), new):
            client.close()
        seen = _all_that_is_seen(tmp_path)
    assert not [secret for secret in secrets if secret in seen]
    assert json.loads((tmp_path / "keys.json").read_text())["version"] == 3


def _used(path: Path) -> dict[tuple[str, ...], int]:
    """Return how many requests each tenant, key and class has had, once there are two."""
    usage = Usage(("tenant", "key", "class"))
    usage.read(path.read_bytes().splitlines())
    counts = {values: sums.requests for values, sums in usage.sums.items()}
    return counts if sum(counts.values()) > 1 else {}


def _note(folder: Path, name: str) -> str:
    return (folder / "run" / f"{name}.pid").read_text().split()[0]


def _all_that_is_seen(folder: Path) -> str:
    """Return logs, records, files and stores of a run, and the arguments of our processes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    arguments = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile
            arguments.append(Path(f"/proc/{entry}/cmdline").read_bytes())
    parts = [*(path.read_bytes() for path in files), *arguments]
    return "\n".join(part.decode("latin-1") for part in parts)

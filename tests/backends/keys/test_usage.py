"""What was used, from the lines that proxies write."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import pytest

from backends.cli import main
from proxy.contract.usage import UsageRecord

DAY_S = 86_400.0


def line(tenant: str, key: str, tokens: int, at: float = 10.0, **more: object) -> bytes:
    values = {
        "at": at, "request_id": "r", "tenant": tenant, "key_id": key, "model": "m",
        "class": "online", "region": "eu", "status": 200, "prompt_tokens": tokens,
        "cached_tokens": tokens // 2, "completion_tokens": 1, "estimated": False,
        "cost": 0.5, "stream": True,
    } | more  # fmt: skip
    return msgspec.json.encode(msgspec.convert(values, UsageRecord)) + b"\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(
        line("a", "k1", 10)
        + line("a", "k1", 20, estimated=True)
        + line("a", "k2", 5)
        + line("b", "k3", 7, at=DAY_S + 1, model="=SUM(A1)")
        + b'{"at":1\n\n'
    )
    return path


def test_sums_by_column_and_lines_that_are_none(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "usage", str(log), "--by", "tenant,key", "--json"]) == 0
    out, err = capsys.readouterr()
    sums = {(row["tenant"], row["key"]): row for row in json.loads(out)}
    assert sums["a", "k1"] == {
        "tenant": "a", "key": "k1", "requests": 2, "prompt_tokens": 30, "cached_tokens": 15,
        "completion_tokens": 2, "estimated": 1, "cost": 1.0,
    }  # fmt: skip
    assert set(sums) == {("a", "k1"), ("a", "k2"), ("b", "k3")}
    assert "1 lines were no usage records" in err


def test_csv_is_read_back_and_is_no_formula(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "usage", str(log), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["tenant"], row["key"], row["day"], row["requests"]) for row in rows] == [
        ("a", "k1", "1970-01-01", "2"),
        ("a", "k2", "1970-01-01", "1"),
        ("b", "k3", "1970-01-02", "1"),
    ]
    assert rows[2]["model"] == "'=SUM(A1)"
    assert rows[0]["cost"] == "1.000000"


def test_one_tenant_and_a_time(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "usage", str(log), "--tenant", "b", "--by", "tenant"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in table] == [["tenant", "requests"], ["b", "1"]]
    assert main(["keys", "usage", str(log), "--since", "1d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_configuration_names_the_records(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOHERTY_CONFIG", raising=False)
    config = tmp_path / "c.yaml"
    config.write_text(f"proxy: {{usage_log: {log}}}")
    assert main(["keys", "usage", "--config", str(config), "--by", "key", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "which usage records?"),
        (["/nowhere/usage.jsonl"], 1, "cannot be read: No such file"),
        (["x", "--by", "tenant,colour"], 2, "'colour' is none of tenant"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("DOHERTY_CONFIG", raising=False)
    assert main(["keys", "usage", *arguments]) == status
    assert words in capsys.readouterr().err

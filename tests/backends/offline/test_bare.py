"""All lines in one call: the yardstick of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backends.offline.bare import main, read_lines


def _input(tmp_path: Path) -> Path:
    rows = [
        {"custom_id": f"r{n}", "url": "/v1/completions", "body": {"model": name, "prompt": "a b"}}
        for n, name in enumerate(["m", "m", "other"])
    ]
    path = tmp_path / "input.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_the_figures_are_the_sums_of_all_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engine", "simulator", "--model", "m", "--input", str(_input(tmp_path))]
    assert main([*words, "--", "--profile", "fast"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["lines"], figures["failed"], figures["completion_tokens"]) == (3, 1, 32)
    assert figures["tokens_per_s"] > 0


def test_what_is_no_input_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong"
    path.write_text("{}\n")
    with pytest.raises(SystemExit) as end:
        main(["--engine", "simulator", "--model", "m", "--input", str(path)])
    assert end.value.code == 2
    assert "is no input file of a batch" in capsys.readouterr().err


def test_lines_are_numbered_in_the_order_of_the_file() -> None:
    lines = read_lines(b'{"url": "/a", "body": {"x": 1}}\n\n{"url": "/b", "body": {}}\n')
    assert [(line.number, line.url, bytes(line.body)) for line in lines] == [
        (0, "/a", b'{"x": 1}'),
        (1, "/b", b"{}"),
    ]


def test_a_worker_needs_only_what_vllm_brings_along() -> None:
    """An engine's own Python has aiohttp and msgspec of what Doherty needs, and not the others."""
    ours = ("orjson", "uvloop", "xxhash", "yaml", "asyncpg", "zmq", "prometheus_client", "openai")
    code = f"""
import sys
for name in {ours!r}:
    sys.modules[name] = None
import backends.offline.worker, backends.offline.vllm_engine, backends.offline.bare
"""
    subprocess.run([sys.executable, "-c", code], check=True)

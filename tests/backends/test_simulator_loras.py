"""Adapters of a simulated engine that come and go by each dialect's paths."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backends.simulator.flags import LORA_VARIABLE, parse_flags
from tests.fakes.simulator import simulator

PREFIX = {"vllm": "/v1", "sglang": ""}
A, B = {"lora_name": "a", "lora_path": "/a"}, {"lora_name": "b", "lora_path": "/b"}


def ask(model: str, tokens: int = 4) -> dict[str, Any]:
    return {"model": model, "prompt": "p" * 40, "max_tokens": tokens}


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_what_is_loaded_is_served_and_what_is_unloaded_is_not(dialect: str) -> None:
    prefix = PREFIX[dialect]
    async with simulator(dialect=dialect, adapters=("a",), lora_updates=True) as engine:
        assert (await engine.post("/v1/completions", ask("b")))[0] == 404
        assert (await engine.post(f"{prefix}/load_lora_adapter", B))[0] == 200
        assert (await engine.post(f"{prefix}/unload_lora_adapter", A))[0] == 200
        _, models = await engine.get("/v1/models")
        parents = {model["id"]: model["parent"] for model in models["data"]}
        assert parents == {"demo": None, "b": "demo"}
        assert (await engine.post("/v1/completions", ask("b")))[0] == 200
        assert (await engine.post("/v1/completions", ask("a")))[0] == 404


REFUSED = [
    ("vllm", "load", A, 400, "already been loaded"),
    ("vllm", "load", {"lora_name": "b"}, 400, "must be provided"),
    ("vllm", "unload", B, 404, "cannot be found"),
    ("sglang", "load", A, 400, "already exists"),
    ("sglang", "unload", B, 400, "does not exist"),
]


@pytest.mark.parametrize(("dialect", "call", "body", "expected", "words"), REFUSED)
async def test_what_cannot_be_says_why(
    dialect: str, call: str, body: dict[str, str], expected: int, words: str
) -> None:
    async with simulator(dialect=dialect, adapters=("a",), lora_updates=True) as engine:
        status, answer = await engine.post(f"{PREFIX[dialect]}/{call}_lora_adapter", body)
        assert status == expected
        assert words in str(answer)


@pytest.mark.parametrize(("dialect", "expected"), [("vllm", 404), ("sglang", 400)])
async def test_without_room_there_is_none(dialect: str, expected: int) -> None:
    async with simulator(dialect=dialect) as engine:
        status, _ = await engine.post(f"{PREFIX[dialect]}/load_lora_adapter", A)
        assert status == expected


async def test_sglang_unloads_once_nobody_uses_it_and_takes_no_more() -> None:
    async with simulator(dialect="sglang", adapters=("a",), lora_updates=True) as engine:
        using = asyncio.ensure_future(engine.post("/v1/completions", ask("a", 20_000)))
        await engine.until(lambda state: state["running"] == 1)
        unloading = asyncio.ensure_future(engine.post("/unload_lora_adapter", A))
        while (await engine.post("/v1/completions", ask("a")))[0] != 404:
            await asyncio.sleep(0.005)
        assert not unloading.done()
        assert (await engine.post("/abort_request", {"abort_all": True}))[0] == 200
        assert (await using)[0] == 200
        status, answer = await unloading
        assert (status, answer["success"], answer["loaded_adapters"]) == (200, True, {})


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        ("--lora-modules a=/a", "True", True),
        ("--lora-modules a=/a", "", False),
        ("--enable-lora", "1", True),
        ("", "1", False),
        ("--dialect sglang --lora-paths a=/a", "", True),
        ("--dialect sglang --enable-lora", "", True),
        ("--dialect sglang", "", False),
    ],
)
def test_who_has_room(
    flags: str, variable: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LORA_VARIABLE, variable)
    assert parse_flags(flags.split()).lora_updates is expected

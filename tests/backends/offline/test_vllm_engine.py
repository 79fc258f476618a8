"""vLLM's `LLM` as an engine of lines, over stand-ins for vLLM's modules."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from backends.log import Log
from backends.offline.line_engine import EngineError, FlagsError
from backends.offline.vllm_engine import VllmEngine, find
from backends.offline.work import Line, Result
from tests.fakes.vllm_modules import Engine, install

Scene = Callable[[VllmEngine, Engine], Awaitable[None]]


def line(content: str = "hello", number: int = 0, **fields: object) -> Line:
    """Return a line that asks for a chat."""
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
    raw = msgspec.Raw(json.dumps(body).encode())
    return Line("job", number, "/v1/chat/completions", raw)


def play(monkeypatch: pytest.MonkeyPatch, scene: Scene, *flags: str) -> Engine:
    """Run a scene with a started engine; return vLLM's."""
    built: list[Engine] = []

    def build(sequences_max: int) -> Engine:
        built.append(Engine(sequences_max))
        return built[0]

    install(monkeypatch, build)

    async def run() -> None:
        engine = VllmEngine("m", "/models/m", flags, Log())
        await engine.start()
        try:
            async with asyncio.timeout(20):
                await scene(engine, built[0])
        finally:
            await engine.close()

    asyncio.run(run())
    return built[0]


def error_of(result: Result) -> dict[str, object]:
    """Return the error of a body."""
    found: dict[str, object] = json.loads(bytes(result.body))["error"]
    return found


def test_a_line_is_answered_in_the_servers_words_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        assert (engine.models, engine.gpus, engine.sequences_max) == (("m", "adapter"), 2, 4)
        assert engine.urls == ("/v1/chat/completions",)
        result = await engine.do(line(max_tokens=5, stream=True, request_id="mine"))
        assert (result.status, result.prompt_tokens) == (200, 3)
        assert (result.cached_tokens, result.completion_tokens) == (1, 5)
        assert result.request_id.startswith("chatcmpl-")
        assert "mine" not in result.request_id, "two lines may have chosen the same id"
        assert json.loads(bytes(result.body))["schema"] == "asked for"

    engine = play(monkeypatch, scene)
    assert engine.adapters == ["adapter-file"]
    assert engine.calls == ["shutdown"]


def test_the_batch_stays_full_while_lines_come_in_two_portions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        first = [asyncio.ensure_future(engine.do(line(number=n, max_tokens=20))) for n in range(8)]
        await first[0]
        second = [engine.do(line(number=8 + n, max_tokens=20)) for n in range(8)]
        assert all(result.status == 200 for result in await asyncio.gather(*first, *second))

    engine = play(monkeypatch, scene)
    assert set(engine.loads[1:80]) == {4}, "16 lines of 20 tokens by 4: 80 steps, none with less"
    assert sum(engine.loads) == 16 * 20


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (line("too long"), 400, "context_length_exceeded"),
        (line(model="unknown"), 404, "model_not_found"),
        (line("go on"), 404, None),
        (line(messages=[]), 400, None),
        (line(messages=None), 400, None),
        (Line("job", 0, "/v1/embeddings", msgspec.Raw(b"{}")), 400, None),
    ],
)
def test_what_is_wrong_with_one_line_is_its_result(
    monkeypatch: pytest.MonkeyPatch, asked: Line, status: int, code: str | None
) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        wrong, right = await asyncio.gather(engine.do(asked), engine.do(line(number=1)))
        assert (wrong.status, error_of(wrong)["code"]) == (status, code)
        assert error_of(wrong)["type"] == "invalid_request_error"
        assert right.status == 200

    play(monkeypatch, scene)


def test_a_field_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        error = error_of(await engine.do(line(max_tokens="many")))
        assert error["param"] == "max_tokens"
        assert str(error["message"]).startswith("max_tokens: ")
        error = error_of(await engine.do(line(tools="many")))
        assert error["param"] == "tools"
        assert "[" not in str(error["message"])

    play(monkeypatch, scene)


def test_a_cancelled_line_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        task = asyncio.ensure_future(engine.do(line(max_tokens=10_000)))
        while not inner.loads:
            await asyncio.sleep(0.001)
        assert engine.gauges().running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while inner.has_unfinished_requests():
            await asyncio.sleep(0.001)
        assert (await engine.do(line())).status == 200

    engine = play(monkeypatch, scene)
    assert any(call.startswith("abort ") for call in engine.calls)


def test_a_line_that_cannot_be_added_leaves_the_engine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        odd = await engine.do(line("odd"))
        assert (odd.status, error_of(odd)["type"]) == (500, "server_error")
        assert not inner.has_unfinished_requests(), "it would be waited for for ever"
        assert (await engine.do(line())).status == 200

    play(monkeypatch, scene)


@pytest.mark.parametrize(("prompt", "why"), [("die", "EngineCore died"), ("gone", "is gone")])
def test_a_dead_engine_is_no_result_of_a_line(
    monkeypatch: pytest.MonkeyPatch, prompt: str, why: str
) -> None:
    async def scene(engine: VllmEngine, inner: Engine) -> None:
        both = await asyncio.gather(
            engine.do(line(max_tokens=10_000)), engine.do(line(prompt, 1)), return_exceptions=True
        )
        assert all(isinstance(error, EngineError) for error in both)
        assert why in await engine.dead
        with pytest.raises(EngineError, match=why):
            await engine.do(line())

    play(monkeypatch, scene)


def test_a_model_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(sequences_max: int) -> Engine:
        raise ValueError("no such model")

    install(monkeypatch, build)

    async def run() -> None:
        engine = VllmEngine("m", "", (), Log())
        with pytest.raises(EngineError, match="vLLM did not start: ValueError: no such model"):
            await engine.start()
        await engine.close()

    asyncio.run(run())


def test_flags_that_vllm_does_not_take_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)

    async def run() -> None:
        engine = VllmEngine("m", "", ("--no-such-flag",), Log())
        with pytest.raises(FlagsError):
            await engine.start()
        await engine.close()

    asyncio.run(run())
    assert "--no-such-flag" in capsys.readouterr().err


def test_a_release_without_a_name_is_said() -> None:
    with pytest.raises(EngineError, match="this vLLM has no LLM that we know: No module"):
        find("LLM")


def test_of_two_requests_with_one_id_the_second_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(engine: VllmEngine, _: Engine) -> None:
        def add(inner: Engine) -> None:
            inner.add_request("same", "hello", 5, lora_request=None, priority=0)

        first = asyncio.ensure_future(engine._stepper.request("same", add))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="same"):
            await engine._stepper.request("same", add)
        assert (await first).finished

    play(monkeypatch, scene)

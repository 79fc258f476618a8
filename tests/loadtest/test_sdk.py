"""The official client as a judge: what it says of the proxy, and how that is counted."""

from __future__ import annotations

import asyncio
import json
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from loadtest import sdk
from loadtest.__main__ import main
from loadtest.run import RunError
from loadtest.sdk import TEST_FILES, Suite, fetch_sources, models_of, run_tests, table
from loadtest.sdk_engine import SdkEngine

FAILING = """
def test_no():
    assert 1 == 2, "why"


class TestIn:
    def test_yes(self):
        pass
"""
PASSING = "def test_it():\n    pass\n"
NAMED = 'import os\n\n\ndef test_where():\n    assert os.environ["TEST_API_BASE_URL"] == "http://here/v1"\n'


def sources_of(folder: Path, **texts: str) -> Path:
    """Write the client's sources as the archive has them; `texts` by the stem of their file."""
    for file in TEST_FILES:
        path = folder / "tests" / "api_resources" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(path.stem if path.parent.name != "chat" else "chat", PASSING))
    for place in ("", "api_resources", "api_resources/chat"):
        (folder / "tests" / place / "__init__.py").touch()
    return folder


def test_every_call_of_ours_passes_through_the_proxy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sdk.json"
    assert main(["sdk", "--quick", "--json", str(file)]) == 0
    (suite,) = json.loads(file.read_text())
    assert set(suite["direct"]) == set(suite["through"])
    assert {"sync stored", "sync leave_stream", "async acancel_many"} < set(suite["through"])
    assert not any(suite["direct"].values())
    assert not any(suite["through"].values())
    count = len(suite["through"])
    assert f"{count} of {count}" in capsys.readouterr().out


def test_what_passes_directly_must_pass_through() -> None:
    direct = {"a": "", "b": "", "c": "broken anyway", "d": ""}
    suite = Suite("tests", direct, {"a": "", "b": "405", "c": "broken anyway"})
    assert suite.broken == {"b": "405", "d": "was not run"}
    lines = table([suite]).splitlines()
    assert lines[1].split() == ["tests", "3", "of", "4", "1", "of", "4"]
    assert lines[2:] == [
        "fails directly: c: broken anyway",
        "fails through: b: 405",
        "fails through: d: was not run",
    ]


@pytest.mark.parametrize(
    ("direct", "through", "status"),
    [
        ({"a": ""}, {"a": ""}, 0),
        ({"a": "broken"}, {"a": "broken"}, 0),
        ({"a": ""}, {"a": "broken"}, 1),
        ({"a": ""}, {}, 1),
        ({}, {}, 1),
    ],
)
def test_a_loss_fails_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    direct: dict[str, str],
    through: dict[str, str],
    status: int,
) -> None:
    async def run_suites(sources: Path | None) -> list[Suite]:
        assert sources is None
        return [Suite("tests", direct, through)]

    monkeypatch.setattr(sdk, "run_suites", run_suites)
    assert main(["sdk", "--quick", "--json", "-"]) == status
    shown = capsys.readouterr()
    assert json.loads(shown.out) == [{"name": "tests", "direct": direct, "through": through}]
    assert "through Doherty" in shown.err


async def test_the_clients_tests_are_run_where_they_are_told(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, test_models=FAILING, test_embeddings=NAMED)
    results = await run_tests(sources, "http://here/v1")
    place = "tests/api_resources/"
    assert results.pop(place + "test_models.py::test_no").startswith("AssertionError: why")
    assert results == {
        place + "test_models.py::TestIn::test_yes": "",
        place + "test_embeddings.py::test_where": "",
        place + "test_completions.py::test_it": "",
        place + "chat/test_completions.py::test_it": "",
    }


async def test_tests_that_do_not_run_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did not run"):
        await run_tests(tmp_path, "http://here/v1")


def test_models_are_those_that_the_tests_name(tmp_path: Path) -> None:
    text = (
        'client.create(\n    model="gpt-a",\n)\nclient.retrieve(\n    "ft:gpt-b:c",\n    "no",\n)\n'
    )
    assert models_of(sources_of(tmp_path, test_models=text)) == {"gpt-a", "ft:gpt-b:c"}


@pytest.mark.parametrize("has_tests", [True, False])
def test_sources_are_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tests: bool
) -> None:
    fetched: list[str] = []

    async def download(version: str, folder: str) -> None:
        fetched.append(version)
        made = tmp_path / "made" / f"openai-{version}"
        if has_tests:
            sources_of(made)
        else:
            made.mkdir(parents=True)
        with tarfile.open(Path(folder) / f"openai-{version}.tar.gz", "w:gz") as archive:
            archive.add(made, made.name)

    monkeypatch.setattr(sdk, "_download", download)
    if has_tests:
        folder = fetch_sources("1.2.3", tmp_path / "cache")
        assert fetch_sources("1.2.3", tmp_path / "cache") == folder
        assert (folder / "tests" / "api_resources" / TEST_FILES[0]).is_file()
    else:
        with pytest.raises(RunError, match="has no tests"):
            fetch_sources("1.2.3", tmp_path / "cache")
    assert fetched == ["1.2.3"]


def test_a_version_without_sources_is_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def download(version: str, folder: str) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(sdk, "_download", download)
    with pytest.raises(RunError, match="no source distribution"):
        fetch_sources("1.2.3", tmp_path)


def test_the_command_asks_for_the_installed_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fetch(version: str, cache: Path) -> Path:
        asked.append((version, cache))
        return tmp_path

    async def run_suites(sources: Path | None) -> list[Suite]:
        asked.append(sources)
        return [Suite("tests", {"a": ""}, {"a": ""})]

    monkeypatch.setattr(sdk, "fetch_sources", fetch)
    monkeypatch.setattr(sdk, "run_suites", run_suites)
    assert main(["sdk", "--cache", str(tmp_path / "c")]) == 0
    assert asked == [(metadata.version("openai"), tmp_path / "c"), tmp_path]
    asked.clear()
    assert main(["sdk", "--sources", str(tmp_path / "s")]) == 0
    assert asked == [tmp_path / "s"]


async def test_a_program_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    status, said = await sdk._finished(["/bin/sh", "-c", "echo words; exit 3"], 10.0)
    assert (status, said) == (3, "words\n")
    with pytest.raises(RunError, match="took more than"):
        await sdk._finished(["/bin/sh", "-c", "exec sleep 60"], 0.05)


async def test_a_proxy_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    engine = SdkEngine(())
    async with engine.serving():
        with pytest.raises(RunError, match="the proxy ended with 1"):
            async with sdk._proxy_before(engine):
                pass

"""Every form of request in jobs on one engine worker, and the same bodies at the engine's server.

What a line asks for and what is right of its answer is in `forms`. The samples that are kept, one
of each kind from either side, are for reading when something is wrong.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
import orjson

from loadtest.gpu.forms import (
    EMBEDDINGS,
    KINDS,
    RESPONSES,
    Body,
    Kind,
    body_of,
    differences,
    texts,
    wrong,
)
from loadtest.gpu.offline_stage import MODEL, Setting, desk, server
from loadtest.gpu.steps import Findings, SkipError
from loadtest.offline import stage
from loadtest.offline.lines import CHAT, COMPLETIONS
from loadtest.run import RunError

POLL_S = 0.2
JOB_S = 60.0
ASKED_S = 60.0
GENERATING = (CHAT, COMPLETIONS, RESPONSES)
# A model without sense would write spaces for ever where a grammar lets it.
VLLM = (
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
Answer = tuple[int, Body]
Key = tuple[int, int]  # of `KINDS`, and which of its lines


class Forms:
    """The answers that lines were given, to be held against the server's."""

    def __init__(self, setting: Setting, folder: Path, store: Path) -> None:
        self._setting = setting
        self._folder = folder
        self._store = store
        self._simulated = setting.engine != "vllm"
        self._answers: dict[Key, Answer] = {}
        self._samples: dict[str, dict[str, Answer]] = {}

    async def generated(self, found: Findings) -> None:
        """Have lines of chat, completions and responses done; ask for what cannot be."""
        extra = () if self._simulated else VLLM
        async with desk(self._setting, self._folder, self._store, found, *extra) as url:
            for endpoint in GENERATING:
                await self._job(found, url, endpoint)
            await self._refused(found, url)

    async def embedded(self, found: Findings) -> None:
        """Have embeddings done, by a worker of their own."""
        extra = ("--task", "embed") if self._simulated else ("--runner", "pooling")
        folder = self._folder / "embedded"
        folder.mkdir(exist_ok=True)
        async with desk(self._setting, folder, self._store, found, *extra) as url:
            await self._job(found, url, EMBEDDINGS)

    async def served(self, found: Findings) -> None:
        """Ask the engine's own server for the same."""
        if not self._answers:
            raise SkipError("needs the answers of the step 'forms'")
        extra = () if self._simulated else VLLM
        alike: Counter[str] = Counter()
        async with server(self._setting, self._folder, *extra) as url:
            theirs = await _ask_all(url, {key: self._body(key) for key in self._answers})
        for key, (status, body) in theirs.items():
            kind, ours = KINDS[key[0]], self._answers[key]
            self._samples[_name(kind)].setdefault("server", (status, body))
            found.claim(status == ours[0], f"{_name(kind)}: {ours[0]}, {status} of the server")
            if status != 200 or ours[0] != 200:
                continue
            for text in differences(ours[1], body):
                found.claim(False, f"{_name(kind)}: {text}")
            if _settled(kind):
                alike["greedy"] += 1
                alike["same"] += texts(ours[1]) == texts(body)
        found.broken[:] = list(dict.fromkeys(found.broken))
        found.figures["answers compared"] = len(theirs)
        found.figures["greedy ones with the same text"] = f"{alike['same']} of {alike['greedy']}"
        self._keep()

    def _keep(self) -> None:
        (self._folder / "forms.json").write_bytes(orjson.dumps(self._samples))

    # --- one job -------------------------------------------------------------------------------

    def _keys(self, endpoint: str) -> list[Key]:
        return [
            (index, number)
            for index, kind in enumerate(KINDS)
            if kind.url == endpoint and (kind.simulated or not self._simulated)
            for number in range(self._setting.form_lines)
        ]

    def _body(self, key: Key) -> Body:
        return body_of(KINDS[key[0]], MODEL, key[1])

    async def _job(self, found: Findings, url: str, endpoint: str) -> None:
        """Have all kinds of an endpoint done in one job, good and bad lines beside each other."""
        keys = self._keys(endpoint)
        content = _input_file([(_id(key), self._body(key)) for key in keys], endpoint)
        batch, rows = await _done(url, content, endpoint)
        answers = {
            row["custom_id"]: (row["response"]["status_code"], row["response"]["body"])
            for row in rows
            if row["response"] is not None
        }
        complaints: dict[str, str] = {}
        good: Counter[str] = Counter()
        for key in keys:
            kind = KINDS[key[0]]
            answer = answers.get(_id(key))
            said = wrong(kind, *answer) if answer is not None else ["no answer"]
            if said:
                complaints.setdefault(_name(kind), said[0])
            good[_name(kind)] += not said
            if answer is not None:
                self._samples.setdefault(_name(kind), {"line": answer})
            if answer is not None and endpoint != EMBEDDINGS:
                self._answers[key] = answer
        self._keep()
        for name, count in good.items():
            found.figures[name] = f"{count} of {self._setting.form_lines}"
        for name, text in complaints.items():
            found.claim(False, f"{name}: {text}")
        counts = batch["request_counts"]
        said_well = sum(KINDS[key[0]].status == 200 for key in keys)
        expected = {"total": len(keys), "completed": said_well, "failed": len(keys) - said_well}
        found.claim(counts == expected, f"{endpoint}: counts {counts}, not {expected}")

    async def _refused(self, found: Findings, url: str) -> None:
        """What never reaches an engine: other endpoints, other models."""
        async with aiohttp.ClientSession(url) as session:
            line = [("one", {"model": MODEL, "messages": []})]
            file_id = await stage.upload(session, _input_file(line, "/v1/unknown"))
            asked = {"input_file_id": file_id, "completion_window": "24h"}
            asked["endpoint"] = "/v1/unknown"
            async with session.post("/v1/batches", json=asked) as answer:
                found.claim(answer.status == 400, f"unknown endpoint: {answer.status}")
            batch = await _until_ended(session, await stage.begin(session, file_id, CHAT))
            codes = [error["code"] for error in (batch["errors"] or {"data": []})["data"]]
            found.claim(codes == ["invalid_url"], f"unknown url: {batch['status']}, {codes}")
            other = [("one", {"model": "another", "messages": [{"role": "user", "content": "a"}]})]
            file_id = await stage.upload(session, _input_file(other, CHAT))
            batch = await stage.begin(session, file_id, CHAT)
            await asyncio.sleep(2.0)  # the worker would have taken it
            await stage.answer_json(session.post(f"/v1/batches/{batch['id']}/cancel"))
            batch = await _until_ended(session, batch)
            rows = await stage.rows(session, batch)
            codes = [row["error"]["code"] for row in rows if row["error"]]
            found.claim(codes == ["batch_cancelled"], f"another model: {batch['status']}, {rows}")


def _name(kind: Kind) -> str:
    return f"{kind.url.removeprefix('/v1/')}: {kind.name}"


def _id(key: Key) -> str:
    return f"{key[0]}-{key[1]}"


def _settled(kind: Kind) -> bool:
    return not kind.fields.get("temperature")


def _input_file(lines: list[tuple[str, Body]], url: str) -> bytes:
    rows = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, body in lines]
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


async def _done(url: str, content: bytes, endpoint: str) -> tuple[Body, list[Body]]:
    """Have a job done; return the batch and its lines. Raises `RunError`."""
    async with aiohttp.ClientSession(url) as session:
        batch = await stage.begin(session, await stage.upload(session, content), endpoint)
        try:
            batch = await _until_ended(session, batch)
        except TimeoutError:  # what was answered says which line it hangs at
            await stage.answer_json(session.post(f"/v1/batches/{batch['id']}/cancel"))
            batch = await _until_ended(session, batch)
        if batch["status"] == "failed":
            raise RunError(f"{endpoint}: {batch['errors']}")
        return batch, await stage.rows(session, batch)


async def _until_ended(session: aiohttp.ClientSession, batch: Body) -> Body:
    async with asyncio.timeout(JOB_S):
        while batch["status"] not in stage.ENDED:
            await asyncio.sleep(POLL_S)
            batch = await stage.answer_json(session.get(f"/v1/batches/{batch['id']}"))
    return batch


async def _ask_all(url: str, bodies: dict[Key, Body]) -> dict[Key, Answer]:
    """Ask for all at once; return what was answered. Raises `RunError`."""
    timeout = aiohttp.ClientTimeout(total=ASKED_S)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:

        async def ask(key: Key) -> tuple[Key, Answer]:
            async with session.post(KINDS[key[0]].url, json=bodies[key]) as answer:
                return key, (answer.status, orjson.loads(await answer.read()))

        try:
            return dict(await asyncio.gather(*map(ask, bodies)))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RunError(f"the server does not answer: {error!r}") from error

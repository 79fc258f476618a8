"""/v1/files on the wire: uploads in every form, refusals, lists, content, deletion, tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from backends.offline import files_api, forms, queries
from backends.offline.records import UnavailableError
from backends.offline.store import Store
from tests.fakes.offline_stage import (
    CHAT,
    PATIENCE_S,
    HttpWorker,
    jsonl,
    offline_stage,
    request,
    until_state,
)


def _form(*parts: tuple[str, str | bytes]) -> tuple[bytes, dict[str, str]]:
    """Return a form with these parts in this order; octets are a file."""
    body = b""
    for name, value in parts:
        filename = '; filename="a.jsonl"' if isinstance(value, bytes) else ""
        octets = value if isinstance(value, bytes) else value.encode()
        head = f'--cut\r\ncontent-disposition: form-data; name="{name}"{filename}\r\n\r\n'
        body += head.encode() + octets + b"\r\n"
    return body + b"--cut--\r\n", {"content-type": "multipart/form-data; boundary=cut"}


async def _post(url: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/files", data=body, headers=headers) as response,
    ):
        return response.status, await response.json()


async def test_an_upload_says_what_it_is_before_or_after_its_content(tmp_path: Path) -> None:
    content = b"x" * 300_000
    async with offline_stage(tmp_path) as stage:
        for parts in (
            (("purpose", "batch"), ("file", content)),
            (("file", content), ("purpose", "batch")),
            (
                ("expires_after[anchor]", "created_at"),
                ("expires_after[seconds]", "7200"),
                ("file", content),
                ("purpose", "batch"),
            ),
        ):
            status, file = await _post(stage.url, *_form(*parts))
            assert status == 200
            assert file["bytes"] == len(content)
            assert (file["object"], file["purpose"], file["status"]) == (
                "file",
                "batch",
                "processed",
            )
            assert file["filename"] == "a.jsonl"
            kept_s = 7_200 if len(parts) > 2 else 30 * 86_400
            assert file["expires_at"] - file["created_at"] == kept_s


_NO_UPLOADS: list[tuple[tuple[tuple[str, str | bytes], ...], int, str | None]] = [
    ((("purpose", "batch"),), 400, "file"),
    ((("file", b"x"),), 400, "purpose"),
    ((("purpose", "fine-tune"), ("file", b"x")), 400, "purpose"),
    ((("purpose", "batch"), ("file", b"x" * 2_000)), 413, "file"),
    ((("file", b"x"), ("file", b"y"), ("purpose", "batch")), 400, "file"),
    ((("purpose", "b" * 2_000), ("file", b"x")), 400, "purpose"),
    ((("expires_after[seconds]", "7200"), ("file", b"x")), 400, "expires_after"),
    (
        (
            ("expires_after[anchor]", "created_at"),
            ("expires_after[seconds]", "60"),
            ("file", b"x"),
        ),
        400,
        "expires_after",
    ),
    (
        (("file", b"x"), ("expires_after[anchor]", "created_at")),
        400,
        "expires_after",
    ),
    (tuple((f"field{n}", "x") for n in range(20)), 400, None),
]


async def test_an_upload_that_is_none(tmp_path: Path) -> None:
    async with offline_stage(tmp_path, {"file_bytes_max": 1_000}) as stage:
        for parts, status, param in _NO_UPLOADS:
            told, answer = await _post(stage.url, *_form(*parts))
            assert (told, answer["error"]["param"]) == (status, param), parts
            assert answer["error"]["type"] == "invalid_request_error"
        async with stage.client() as client:
            assert (await client.files.list()).data == []


_NO_FORMS = [
    (b"{}", {"content-type": "application/json"}),
    (b"--cut\r\n", {"content-type": "multipart/form-data"}),
    (b"nothing", {"content-type": "multipart/form-data; boundary=cut"}),
    (b"--cut\r\nno head", {"content-type": "multipart/form-data; boundary=cut"}),
    (
        b'--cut\r\ncontent-disposition: form-data; name="file"\r\n\r\nnever ends',
        {"content-type": "multipart/form-data; boundary=cut"},
    ),
]


async def test_a_body_that_is_no_form(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        for body, headers in _NO_FORMS:
            status, answer = await _post(stage.url, body, headers)
            assert status == 400, body
            assert answer["error"]["message"]
        async with stage.client() as client:
            assert (await client.files.list()).data == []


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        host, _, port = stage.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body, headers = _form(("purpose", "batch"), ("file", b"x" * 3_000_000))
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += f"content-type: {headers['content-type']}\r\nauthorization: Bearer key\r\n\r\n"
        writer.write(head.encode() + body[:2_000_000])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            while True:  # it has been noticed, and dropped
                async with session.get(stage.url + "/metrics") as response:
                    page = await response.text()
                if "doherty_offline_uploads 0.0" in page and "_stored_bytes 0.0" in page:
                    break
                await asyncio.sleep(0.02)
        assert (await client.files.list()).data == []


async def test_a_client_that_falls_silent_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "SILENCE_S_MAX", 0.05)
    monkeypatch.setattr(queries, "BODY_S_MAX", 0.05)
    async with offline_stage(tmp_path) as stage:
        host, _, port = stage.url.removeprefix("http://").partition(":")
        content_type = _form()[1]["content-type"]
        for path, part in (("/v1/files", b"--cut\r\n"), ("/v1/batches", b"{")):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n"
            writer.write(head.encode() + f"content-type: {content_type}\r\n\r\n".encode() + part)
            async with asyncio.timeout(20):
                assert (await reader.readline()).startswith(b"HTTP/1.1 408 "), path
            writer.close()


async def test_no_more_uploads_at_a_time_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_api, "UPLOADS_MAX", 0)
    async with (
        offline_stage(tmp_path) as stage,
        aiohttp.ClientSession() as session,
        session.post(stage.url + "/v1/files", data=b"x") as response,
    ):
        assert response.status == 503
        assert response.headers["retry-after"]


async def test_a_refused_upload_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_api, "UPLOADS_MAX", 1)
    body, headers = _form(("purpose", "batch"), ("file", b"content"))
    async with offline_stage(tmp_path) as stage:
        for key, status in (("k" * 256, 400), ("k", 200), ("l" * 256, 400), ("m", 200)):
            found, _ = await _post(stage.url, body, {**headers, "Idempotency-Key": key})
            assert found == status


async def test_lists_are_read_page_by_page(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        ids = [
            (await client.files.create(file=(f"{n}", b"x"), purpose="batch")).id for n in range(5)
        ]
        page = await client.files.list(limit=2)
        assert [file.id for file in page.data] == ids[:-3:-1]
        assert page.has_more
        assert [file.id async for file in await client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in await client.files.list(limit=2, order="asc")] == ids
        assert (await client.files.list(purpose="batch_output")).data == []
        batches = [
            (
                await client.batches.create(
                    input_file_id=ids[0], endpoint=CHAT, completion_window="24h"
                )
            ).id
            for _ in range(5)
        ]
        first = await client.batches.list(limit=3)
        assert [batch.id for batch in first.data] == batches[:-4:-1]
        assert [batch.id async for batch in await client.batches.list(limit=3)] == batches[::-1]
        for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "x" * 200}):
            with pytest.raises(openai.BadRequestError):
                await client.files.list(**wrong)
        with pytest.raises(openai.NotFoundError):
            await client.files.list(after="file-unknown")


async def test_content_is_given_whole_or_from_an_offset(tmp_path: Path) -> None:
    content = bytes(n % 251 for n in range(200_000))
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        file = await client.files.create(file=("ä b.jsonl", content), purpose="batch")
        assert file.filename == "ä b.jsonl"
        assert (await client.files.content(file.id)).content == content
        url = f"{stage.url}/v1/files/{file.id}/content"
        async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as session:
            async with session.get(url, headers={"range": "bytes=123456-"}) as response:
                assert response.status == 206
                assert response.headers["content-range"] == "bytes 123456-199999/200000"
                assert await response.read() == content[123_456:]
            async with session.get(url, headers={"range": "bytes=200000-"}) as response:
                assert response.status == 416


async def test_a_deleted_file_is_gone_and_the_input_of_a_running_batch_is_kept(
    tmp_path: Path,
) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        file = await client.files.create(file=("a", jsonl([request(0)])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        with pytest.raises(openai.ConflictError, match=batch.id):
            await client.files.delete(file.id)
        await until_state(client, batch.id, "in_progress")
        await HttpWorker(stage.url).work()
        batch = await until_state(client, batch.id, "completed")
        for file_id in (file.id, batch.output_file_id):
            assert file_id is not None
            assert (await client.files.delete(file_id)).deleted
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(file_id)
            with pytest.raises(openai.NotFoundError):
                await client.files.content(file_id)
            with pytest.raises(openai.NotFoundError):
                await client.files.delete(file_id)


async def test_what_one_tenant_has_does_not_exist_for_another(tmp_path: Path) -> None:
    async with (
        offline_stage(tmp_path) as stage,
        stage.client("one") as one,
        stage.client("two") as two,
    ):
        file = await one.files.create(file=("a", jsonl([request(0)])), purpose="batch")
        batch = await one.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        for attempt in (
            two.files.retrieve(file.id),
            two.files.content(file.id),
            two.files.delete(file.id),
            two.batches.retrieve(batch.id),
            two.batches.cancel(batch.id),
            two.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
            two.get(f"/batches/{batch.id}/results", cast_to=object),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt
        assert (await two.files.list()).data == (await two.batches.list()).data == []


async def test_where_the_proxy_demands_a_key_the_service_does_too(tmp_path: Path) -> None:
    async with offline_stage(tmp_path, api_key="secret") as stage:
        async with stage.client("other") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.files.list()
            with pytest.raises(openai.AuthenticationError):
                await client.files.create(file=("a", b"x"), purpose="batch")
        async with stage.client("secret") as client:
            assert (await client.files.list()).data == []
        async with aiohttp.ClientSession() as session:
            url = stage.url + "/v1/files"
            async with session.get(url, headers={"x-api-key": "secret"}) as response:
                assert response.status == 200
            async with session.get(url) as response:
                assert response.status == 401


async def test_an_upload_sent_again_with_its_key_is_the_same_file(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        again = {"Idempotency-Key": "once"}
        ids = set()
        for _ in range(3):
            file = await client.files.create(
                file=("a", b"content"), purpose="batch", extra_headers=again
            )
            ids.add(file.id)
        assert len(ids) == 1
        assert [file.id for file in (await client.files.list()).data] == list(ids)
        assert (await client.files.content(file.id)).content == b"content"
        await client.files.delete(file.id)
        file = await client.files.create(
            file=("a", b"content"), purpose="batch", extra_headers=again
        )
        assert (await client.files.content(file.id)).content == b"content"


async def test_a_full_store_says_so(tmp_path: Path) -> None:
    async with offline_stage(tmp_path, {"store_bytes_max": 500_000}) as stage:
        status, answer = await _post(
            stage.url, *_form(("purpose", "batch"), ("file", b"x" * 900_000))
        )
        assert (status, answer["error"]["code"]) == (507, "storage_full")


async def test_content_that_the_store_cannot_go_on_with_is_cut_and_nothing_stands_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> AsyncIterator[bytes]:
        yield b"x" * 1000
        raise UnavailableError("the database is away")

    async with offline_stage(tmp_path) as stage:
        _, file = await _post(stage.url, *_form(("purpose", "batch"), ("file", b"x" * 5000)))
        monkeypatch.setattr(Store, "read_file", fail)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{stage.url}/v1/files/{file['id']}/content") as response,
        ):
            assert (response.status, response.content_length) == (200, 5000)
            assert await response.content.readexactly(1000) == b"x" * 1000
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()


def test_who_sends_an_octet_now_and_then_holds_no_place_for_long() -> None:
    assert not forms.too_slow(1, 59.0)  # a slow start
    assert forms.too_slow(60, 61.0)
    assert not forms.too_slow(10**6, 300.0)
    assert forms.too_slow(10**6, 310.0)


async def test_an_upload_that_breaks_off_is_no_fault_of_the_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with offline_stage(tmp_path) as stage, aiohttp.ClientSession() as session:
        host, port = stage.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n"
            b"content-type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
        )
        await writer.drain()
        await _until_uploads(session, stage.url, 1)
        writer.close()
        await _until_uploads(session, stage.url, 0)
    assert not [record for record in caplog.records if record.name == "aiohttp.server"]


async def _until_uploads(session: aiohttp.ClientSession, url: str, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with session.get(url + "/metrics") as response:
                if f"doherty_offline_uploads {count}.0" in await response.text():
                    return
            await asyncio.sleep(0.02)

"""/v1/files: uploads that go straight to the store, lists, content, deletion.

An upload is never whole in memory: pieces go to the store as they come, and the client is held back
by its connection while the store writes. What a broken upload left behind is dropped at once, or by
pruning if the service dies with it. The content of output and error files is read the same way,
while the job still runs, too.

An upload with an `Idempotency-Key` that an earlier one had is read and dropped, and answered with
that one's file: a client whose connection broke can send it again without having it twice.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import quote

from aiohttp import web

from backends.offline.api_errors import ApiError
from backends.offline.forms import clean_name, read_upload
from backends.offline.objects import file_object, page_object
from backends.offline.queries import after_of, expires_after, id_of, idempotency_key, limit_of
from backends.offline.records import FileRecord, StoreError
from backends.offline.store import Store
from backends.offline.tenants import Door

PATH = "/v1/files"
PURPOSE = "batch"
UPLOADS_MAX = 64  # at a time; each holds about 2 MiB
FORM_BYTES_MAX = 64 * 1024  # of a form beside its file
LIMIT, LIMIT_MAX = 10_000, 10_000  # OpenAI's
WRITE_TIMEOUT_S = 60.0  # a reader that takes no bytes for this long is gone

_FROM = re.compile(r"bytes=(\d{1,15})-")


class FilesApi:
    """The handlers."""

    def __init__(self, store: Store, door: Door, file_bytes_max: int) -> None:
        self._store = store
        self._door = door
        self._file_bytes_max = file_bytes_max
        self.uploads = 0  # in progress
        self.uploaded_bytes = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(PATH, self._upload),
            web.get(PATH, self._list),
            web.get(PATH + "/{file_id}", self._get),
            web.delete(PATH + "/{file_id}", self._delete),
            web.get(PATH + "/{file_id}/content", self._content),
        ]

    def _owner(self, request: web.Request) -> str:
        return self._door.asker(request.headers).owner

    async def _upload(self, request: web.Request) -> web.Response:
        owner = self._owner(request)
        if (request.content_length or 0) > self._file_bytes_max + FORM_BYTES_MAX:
            raise self._too_large()
        if self.uploads >= UPLOADS_MAX:
            raise ApiError(503, f"{UPLOADS_MAX} files are being uploaded already.")
        key, taken = idempotency_key(request), list[str]()
        self.uploads += 1
        try:
            record = await self._take(request, owner, taken)
            if key:
                record = await self._store.rename_file(owner, record.id, id_of("file-", owner, key))
        except BaseException:
            for file_id in taken:
                await _discard(self._store, file_id)
            raise
        finally:
            self.uploads -= 1
        return web.json_response(file_object(record))

    async def _take(self, request: web.Request, owner: str, taken: list[str]) -> FileRecord:
        async def take(name: str, fields: dict[str, str], pieces: AsyncIterator[bytes]) -> str:
            record = await self._store.create_file(owner, name, PURPOSE, expires_after(fields))
            taken.append(record.id)
            total = 0
            async for piece in pieces:
                total += len(piece)
                if total > self._file_bytes_max:
                    raise self._too_large()
                await self._store.append_file(record.id, piece)
                self.uploaded_bytes += len(piece)
            return record.id

        upload = await read_upload(request, take)
        purpose = upload.fields.get("purpose")
        if purpose is None:
            raise ApiError(400, "'purpose' is a required property", param="purpose")
        if purpose != PURPOSE:
            message = f"'{clean_name(purpose)}' is not served here; the purpose is '{PURPOSE}'."
            raise ApiError(400, message, param="purpose")
        assert upload.file_id is not None
        return await self._store.finish_file(upload.file_id)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The file has more than {self._file_bytes_max} bytes.",
            param="file",
            code="file_too_large",
        )

    async def _list(self, request: web.Request) -> web.Response:
        order = request.query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise ApiError(400, "order is 'asc' or 'desc'.", param="order")
        page = await self._store.files(
            self._owner(request),
            purpose=request.query.get("purpose"),
            after=after_of(request),
            limit=limit_of(request, LIMIT, LIMIT_MAX),
            newest_first=order == "desc",
        )
        found = [file_object(record) for record in page.items]
        return web.json_response(page_object(found, more=page.more))

    async def _get(self, request: web.Request) -> web.Response:
        record = await self._store.file(self._owner(request), request.match_info["file_id"])
        return web.json_response(file_object(record))

    async def _delete(self, request: web.Request) -> web.Response:
        file_id = request.match_info["file_id"]
        await self._store.delete_file(self._owner(request), file_id)
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        owner, file_id = self._owner(request), request.match_info["file_id"]
        record = await self._store.file(owner, file_id)
        begin = _FROM.fullmatch(request.headers.get("Range", ""))
        start = int(begin[1]) if begin else 0
        response = web.StreamResponse(status=206 if start else 200)
        response.content_type = "application/octet-stream"
        name = quote(record.filename)
        response.headers["content-disposition"] = f"attachment; filename*=UTF-8''{name}"
        if start:
            if start >= record.bytes:
                raise ApiError(416, f"The file has {record.bytes} bytes.")
            last = record.bytes - 1
            response.headers["content-range"] = f"bytes {start}-{last}/{record.bytes}"
        left = record.bytes - start  # a running job adds to its files meanwhile
        response.content_length = left
        await response.prepare(request)
        async for piece in self._store.read_file(owner, file_id, start):
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(piece[:left])
            left -= len(piece)
            if left <= 0:
                break
        if left > 0:  # deleted under our hands: a cut body, which the client notices
            raise ConnectionError("the file is gone")
        return response


async def _discard(store: Store, file_id: str) -> None:
    with suppress(StoreError):  # pruning finds it
        await store.discard_file(file_id)

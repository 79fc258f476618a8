"""What a line of an output or error file looks like, and to which of the two it belongs.

The form is OpenAI's: an id, the client's custom id, and either a response or an error. A response
with a status of 400 or more is an error to the one who counts and stands in the error file, as what
it is: a response. The id of a line depends on nothing but its job and number.
"""

from __future__ import annotations

import msgspec

from backends.offline.work import Result

_encode = msgspec.json.Encoder().encode
_NOTHING = b"{}"


def line_id(job_id: str, number: int) -> str:
    """Name a line: the same each time that it is asked."""
    return f"batch_req_{job_id.removeprefix('batch_')}_{number}"


def failed(result: Result) -> bool:
    return result.error is not None or not 200 <= result.status < 400


def written(custom_id: str, result: Result) -> bytes:
    """Write a result as a line of JSON with a newline at its end."""
    name = line_id(result.job_id, result.number)
    head = b'{"id":"%b","custom_id":%b,"response":' % (name.encode(), _encode(custom_id))
    if result.error is not None:
        return b'%bnull,"error":%b}\n' % (head, _encode(result.error))
    body = bytes(result.body) or _NOTHING
    if b"\n" in body or b"\r" in body:
        # Within a string JSON has no such octet, so these only lay out; a line must not end here.
        body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    if not body.isascii():  # a file is read as a whole: one faulty answer must not spoil it
        body = body.decode("utf-8", "replace").encode()
    request_id = _encode(result.request_id or name)
    response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (result.status, request_id, body)
    return b'%b%b,"error":null}\n' % (head, response)

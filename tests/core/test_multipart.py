"""The fields of a form: found where each is a field of its own, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.multipart import read_form

_TYPE = b"multipart/form-data; boundary=XX"


def model_field(content_type: bytes, body: bytes) -> str:
    return read_form(content_type, body).model


def _part(disposition: bytes, value: bytes, *fields: bytes) -> bytes:
    lines = [b"Content-Disposition: form-data; " + disposition, *fields]
    return b"--XX\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + value + b"\r\n"


_FILE = _part(b'name="file"; filename="a.wav"', b"\x00\xff--X\r\n", b"Content-Type: audio/wav")
_MODEL = _part(b'name="model"', b"org/whisper")


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (_MODEL + b"--XX--\r\n", "org/whisper"),
        (_FILE + _MODEL + b"--XX--", "org/whisper"),
        (_MODEL + _FILE + b"--XX--\r\n", "org/whisper"),
        (b"preamble\r\n" + _FILE + _MODEL + b"--XX--\r\nepilogue", "org/whisper"),
        (_part(b"name=model", b"m") + b"--XX--", "m"),
        (_part(b'filename="x"; name="model" ; x=y', b"m") + b"--XX--", "m"),
        (_MODEL.replace(b"C", b"c").replace(b"D", b"d") + b"--XX--", "org/whisper"),
        (_part(b'name="model"', b"m", b"Content-Type: text/plain") + b"--XX--", "m"),
        (_part(b'name="model"', "é".encode()) + b"--XX--", "é"),
        (_part(b'name="model"', b"\xff") + b"--XX--", "\ufffd"),
        (_part(b'name="model"', b"m\r\nn") + b"--XX--", "m\r\nn"),
    ],
)
def test_found(body: bytes, model: str) -> None:
    assert model_field(_TYPE, body) == model


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--XX--\r\n",
        _FILE + b"--XX--",
        _MODEL,  # the form does not end
        _part(b'name="model"', b"") + b"--XX--",
        _part(b'name="models"', b"m") + b"--XX--",
        _part(b'name="the model"', b"m") + b"--XX--",
        _part(b'name="file"; filename="model"', b"m") + b"--XX--",
        _part(b'name="file"', b'Content-Disposition: form-data; name="model"\r\n\r\nm') + b"--XX--",
        _part(b'name="x"', b"m", b'X-Odd: Content-Disposition: form-data; name="model"')
        + b"--XX--",
        _part(b'name="model"', b"m" * (limits.MODEL_BYTES_MAX + 1)) + b"--XX--",
        _part(b'name="a"', b"b", b"X: " + b"y" * 5000) + _MODEL + b"--XX--",
        _part(b'name="a"', b"b") * 64 + _MODEL + b"--XX--",
        b'--XX\r\nContent-Disposition: form-data; name="model"\r\n--XX--',
    ],
)
def test_not_found(body: bytes) -> None:
    assert model_field(_TYPE, body) == ""


@pytest.mark.parametrize(
    ("body", "file"),
    [
        (_FILE + _MODEL + b"--XX--", b"\x00\xff--X\r\n"),
        (_MODEL + _FILE + _part(b'name="file"', b"other") + b"--XX--", b"\x00\xff--X\r\n"),
        (_MODEL + b"--XX--", b""),
        (_part(b'name="files"', b"x") + b"--XX--", b""),
    ],
)
def test_where_the_file_lies(body: bytes, file: bytes) -> None:
    form = read_form(_TYPE, body)
    assert body[form.file_begin : form.file_end] == file


@pytest.mark.parametrize(
    ("content_type", "found"),
    [
        (_TYPE, True),
        (b'Multipart/Form-Data;charset=utf-8; Boundary="XX"', True),
        (b"multipart/form-data; boundary=XX; charset=utf-8", True),
        (b"multipart/form-data;boundary=XX ", True),
        (b"multipart/form-data; boundary=YY", False),
        (b"multipart/form-data", False),
        (b"multipart/mixed; boundary=XX", False),
        (b"application/json; boundary=XX", False),
        (b"multipart/form-data; boundary=", False),
        (b"", False),
    ],
)
def test_the_boundary_comes_from_the_content_type(content_type: bytes, found: bool) -> None:
    assert model_field(content_type, _MODEL + b"--XX--") == ("org/whisper" if found else "")


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_any_octets_are_read_without_a_fault(content_type: bytes, body: bytes) -> None:
    model_field(content_type, body)
    model_field(_TYPE, _FILE + body + b"--XX--")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), st.binary())
def test_a_model_is_found_beside_any_file(model: str, file: bytes) -> None:
    if b"--XX" in file + model.encode():
        return
    body = _part(b'name="file"', file) + _part(b'name="model"', model.encode()) + b"--XX--\r\n"
    assert model_field(_TYPE, body) == model

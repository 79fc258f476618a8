"""Pictures and sound in a prompt: which strings they are, and that they weigh as an engine's do."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits, media
from proxy.core.prefix import PrefixChain, prefix_chain
from proxy.core.routes import PromptKind
from proxy.core.scan import Scanned, scan_body
from tests.core.test_prefix import chain_of

WEIGHT = limits.MEDIA_TOKENS * limits.BYTES_PER_TOKEN
_RANDOM = random.Random(7)


def data(size: int) -> str:
    """Return so many octets of base64."""
    return base64.b64encode(_RANDOM.randbytes(size * 3 // 4 + 3)).decode()[:size]


_PICTURE = data(30_000)
_SAMPLES = {
    "openai": {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _PICTURE}},
    "responses": {"type": "input_image", "image_url": "data:image/jpeg;base64," + _PICTURE},
    "file": {"type": "input_file", "file_data": "data:application/pdf;base64," + _PICTURE},
    "audio": {"type": "input_audio", "input_audio": {"data": _PICTURE, "format": "wav"}},
    "anthropic": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": _PICTURE},
    },
    "embeddings": {"image": _PICTURE},
}
_TEXTS = {
    "text": {"type": "text", "text": _PICTURE},
    "content": {"role": "tool", "content": "data:image/png;base64," + _PICTURE},
    "document": {"type": "document", "source": {"type": "text", "data": "plain words " * 2000}},
    "reference": {"type": "image_url", "image_url": {"url": "https://a.example/" + "x" * 5000}},
    "small": {"type": "input_audio", "input_audio": {"data": _PICTURE[:4095], "format": "wav"}},
    "arguments": {"function": {"arguments": json.dumps({"data": _PICTURE})}},
    "element": {"data": [_PICTURE]},
}


def _scanned(value: Any, **style: Any) -> Scanned:
    return scan_body(json.dumps({"model": "m", "messages": [value, value]}, **style).encode())


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}])
@pytest.mark.parametrize("form", _SAMPLES)
def test_data_of_every_dialect_is_seen(form: str, style: dict[str, Any]) -> None:
    scanned = _scanned(_SAMPLES[form], **style)
    assert scanned.media_parts == 2
    assert 2 * 30_000 <= scanned.media_bytes <= 2 * 30_100
    for at in (0, 4):
        assert scanned.octets[: scanned.media[at + 1]].endswith(_PICTURE.encode())


@pytest.mark.parametrize("form", _TEXTS)
def test_text_stays_text(form: str) -> None:
    assert _scanned(_TEXTS[form]).media == ()


def test_escaped_slashes_and_broken_lines_are_data_too() -> None:
    lines = "\r\n".join(_PICTURE[at : at + 76] for at in range(0, 30_000, 76))
    for text in ("data:image/png;base64," + _PICTURE, lines):
        body = json.dumps({"model": "m", "prompt": [{"data": text}]}).replace("/", "\\/")
        assert scan_body(body.encode()).media_parts == 1


def test_of_doubles_the_last_counts_and_what_is_no_prompt_does_not() -> None:
    one = json.dumps([_SAMPLES["audio"]])
    for name, count in (("messages", 1), ("documents", 2), ("image_data", 1), ("x", 1)):
        body = f'{{"model":"m","messages":{one},"{name}":{one}}}'
        assert scan_body(body.encode()).media_parts == count


_ITEMS = st.one_of(
    st.sampled_from([json.dumps(value) for value in _SAMPLES.values()]),
    st.sampled_from([json.dumps(value) for value in _TEXTS.values()]),
    st.builds(
        lambda name, space, lead, run, rest: f'{{{name}{space}:{space}"{lead}{run}{rest}"}}',
        st.sampled_from(['"data"', '"url"', '"x\\"data"', '"d\\u0061ta"', '"data","data"', '"a"']),
        st.sampled_from(["", " ", "\n" * 40, " " * 41]),
        st.sampled_from(["", "data:", "data:,", 'data:\\",', "data:" + "x" * 122 + ",", "x,"]),
        st.integers(2040, 2052).map(lambda size: "B" * size),
        st.sampled_from(
            ["", '\\"' * 900, "\\\\" * 1400, "é" * 1100, "\\n" * 1030, "=", "A" * 5000]
        ),
    ),
    st.sampled_from(["1", '"data"', '"A\\\\"', '{"data":null}', '{"url":""}', " ", "x" * 1500]).map(
        lambda text: text if text[:1] not in (" ", "x") else json.dumps(text)
    ),
)


@st.composite
def prompts_with_media(draw: st.DrawFn) -> bytes:
    """Return an array of what is data, what looks like it, and what does not; mostly valid."""
    items = draw(st.lists(_ITEMS, max_size=6))
    times = draw(st.sampled_from([1, 1, 1, 1, 1, 15]))
    return ("[" + ",".join(items * times) + "]").encode()


@given(st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([0, 4096, 9000, 200_000])),
                max_size=5),
       st.sampled_from([PromptKind.CHAT, PromptKind.RESPONSES, PromptKind.INPUT]),
       st.booleans())  # fmt: skip
def test_a_prompt_weighs_its_text_and_a_fixed_weight_for_each_picture(
    turns: list[tuple[int, int]], kind: PromptKind, tools: bool
) -> None:
    field = "messages" if kind is PromptKind.CHAT else "input"
    messages: list[Any] = []
    pictures: list[int] = []
    before: PrefixChain | None = None
    for text, picture in turns:
        parts: list[Any] = [{"type": "text", "text": "word " * (text // 5)}]
        if picture:
            parts.append({"type": "image_url", "image_url": {"url": "A" * picture}})
            pictures.append(picture)
        messages.append({"role": "user", "content": parts})
        body = {"model": "m", field: messages, **({"tools": [{"a": "b"}]} if tools else {})}
        chain = chain_of(kind, body)
        heads = len(json.dumps(body["tools"])) if tools and kind is not PromptKind.INPUT else 0
        octets = len(json.dumps(messages)) - 1 + heads
        assert chain.prompt_bytes == octets - sum(pictures) + WEIGHT * len(pictures)
        assert list(chain.ends) == sorted(chain.ends)
        assert chain.ends[-1] == chain.prompt_bytes
        # What the turn before was known by weighs the same in this one.
        now = dict(zip(chain.hashes, chain.ends, strict=True))
        if before is not None and kind is not PromptKind.INPUT:
            assert before.hashes[-1] in now
            for name, end in zip(before.hashes, before.ends, strict=True):
                assert now.get(name, end) == end
        before = chain


def test_the_hashes_are_of_the_octets_alone() -> None:
    body = {"model": "m", "messages": [_SAMPLES["openai"], {"role": "user", "content": "go on"}]}
    scanned = scan_body(json.dumps(body).encode())
    light = prefix_chain(PromptKind.CHAT, scanned, None)
    scanned.media = ()
    heavy = prefix_chain(PromptKind.CHAT, scanned, None)
    assert (light.home_key, list(light.hashes)) == (heavy.home_key, list(heavy.hashes))
    assert (
        heavy.prompt_bytes - light.prompt_bytes == len("data:image/png;base64,") + 30_000 - WEIGHT
    )


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(4096, 60_000), st.integers(1, 4)),
                max_size=6),
       st.integers(0, 60), st.data())  # fmt: skip
def test_weights_rise_and_are_no_more_than_octets(
    runs: list[tuple[int, int, int]], tail: int, draw: st.DataObject
) -> None:
    regions: list[int] = []
    at = 0
    for text, octets, strings in runs:
        at += text
        regions += (at, at + octets * strings, octets * strings, strings)
        at += octets * strings
    at += tail
    places = sorted(draw.draw(st.lists(st.integers(0, at), max_size=12)))
    weights = media.weighed([*places, at], regions)
    assert all(before <= after for before, after in pairwise([0, *weights]))
    assert all(weight <= place for weight, place in zip(weights, [*places, at], strict=True))
    assert weights[-1] == sum(t + s * WEIGHT for t, _, s in runs) + tail


def test_a_point_within_a_picture_knows_what_is_before_it() -> None:
    assert media.weighed([100, 101, 5000, 10_099, 10_100, 10_200], (100, 10_100, 10_000, 1)) == [
        100, 100, 100, 100, 100 + WEIGHT, 200 + WEIGHT,
    ]  # fmt: skip


def test_very_many_pictures_are_weighed_together() -> None:
    count = limits.MEDIA_REGIONS_MAX + 10
    scanned = _scanned([{"data": "A" * 5000}, "text"] * (count // 2))
    assert len(scanned.media) == media.FIELDS * limits.MEDIA_REGIONS_MAX
    assert (scanned.media_parts, scanned.media_bytes) == (count, 5000 * count)


_LOOKALIKES: dict[str, Callable[[int], bytes]] = {
    "unnamed": lambda n: b'["' + b"A" * n + b'"]',
    "short": lambda n: b"[" + b'{"data":"%b"},' % (b"A" * 3000) * (n // 3000) + b"1]",
    "urls": lambda n: b"[" + b'{"url":"data:%b"},' % (b"x" * 1100) * (n // 1100) + b"1]",
    "names": lambda n: b"[" + b'{"data":"' * (n // 9) + b"A" * 1100 + b'"' + b"}" * (n // 9) + b"]",
    "escapes": lambda n: b'[{"data":"%b"}]' % (b"\\\\" * (n // 2)),
    "quotes": lambda n: b'[{"data":"%b%b"}]' % (b"A" * 2048, b'\\"' * (n // 2)),
    "pictures": lambda n: b"[" + b'{"data":"%b"},' % (b"A" * 4096) * (n // 4096) + b"1]",
}


def _processor_s(octets: bytes) -> float:
    spent_s = []
    for _ in range(3):
        start_s = time.process_time()
        media.find_media(octets, 0, len(octets))
        spent_s.append(time.process_time() - start_s)
    return min(spent_s)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", _LOOKALIKES)
def test_the_search_grows_with_the_prompt_and_no_faster(shape: str) -> None:
    """Sixteen times the prompt: linear is 16, quadratic 256. Processor time, the least of three."""
    make = _LOOKALIKES[shape]
    small_s, large_s = _processor_s(make(1 << 17)), _processor_s(make(1 << 21))
    assert large_s <= 64 * max(small_s, 1e-4)

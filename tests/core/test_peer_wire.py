"""Two proxies know each other, and nobody else can say a word in between."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import peer_wire
from proxy.core.peer_wire import Frame, Link, WireError

ONE, OTHER = b"1" * peer_wire.PROXY_ID_BYTES, b"2" * peer_wire.PROXY_ID_BYTES
NONCE, FRESH = b"n" * peer_wire.NONCE_BYTES, b"m" * peer_wire.NONCE_BYTES
MINE = peer_wire.make_hello("eu", ONE, NONCE, "key")
THEIRS = peer_wire.make_hello("eu", OTHER, NONCE, "key")


def linked(key: str | None = "key", other_key: str | None = "key") -> tuple[Link, Link]:
    """Return both ends of one link."""
    dialler = Link(key, MINE, THEIRS, dialled=True)
    return dialler, Link(other_key, THEIRS, MINE, dialled=False)


def opened(link: Link, sealed: bytes) -> bytes:
    return link.inward.open(sealed[peer_wire.LENGTH.size :])


@pytest.mark.parametrize("key", ["key", None])
def test_who_has_the_key_is_believed_in_both_directions(key: str | None) -> None:
    dialler, acceptor = linked(key, key)
    dialler.check(acceptor.proof)
    acceptor.check(dialler.proof)
    for one, other in ((dialler, acceptor), (acceptor, dialler)):
        for frame in (b"first", b"second"):
            assert opened(other, one.outward.close(frame)) == frame


def test_a_proof_fits_no_other_key_part_or_link() -> None:
    dialler, acceptor = linked("key", "other")
    for link, proof in ((dialler, acceptor.proof), (acceptor, dialler.proof)):
        with pytest.raises(WireError, match="does not have our peer_key"):
            link.check(proof)
    again = Link("key", peer_wire.make_hello("eu", ONE, FRESH, "key"), THEIRS, dialled=True)
    for proof in (dialler.proof, again.proof, b"", linked(None, None)[1].proof):
        with pytest.raises(WireError):  # its own, that of another link, none
            linked()[0].check(proof)


def test_a_frame_that_is_changed_repeated_left_out_or_turned_round_is_found() -> None:
    dialler, acceptor = linked()
    first, second = dialler.outward.close(b"first"), dialler.outward.close(b"second")
    head = peer_wire.LENGTH.size
    for sealed in (second, first[:-1] + b"T", first[:head], b"\0\0\0\3abc"):
        with pytest.raises(WireError, match="changed"):
            opened(linked()[1], sealed)
    assert opened(acceptor, first) == b"first"
    with pytest.raises(WireError, match="changed"):
        opened(acceptor, first)
    with pytest.raises(WireError, match="changed"):
        opened(dialler, linked()[0].outward.close(b"first"))


def changed(**other: object) -> bytes:
    hello = msgspec.msgpack.decode(MINE, type=peer_wire.Hello)
    return msgspec.msgpack.encode(msgspec.structs.replace(hello, **other))


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (changed(notes_version=99), "another version"),
        (changed(chain_version=b"0"), "another version"),
        (changed(region="us"), "its region is 'us', ours is 'eu'"),
        (changed(keyed=False), "other has none"),
        (changed(magic=b"hello"), "not speak"),
        (changed(proxy_id=b"short"), "not speak"),
        (changed(nonce=b""), "not speak"),
        (b"GET / HTTP/1.1\r\n", "not speak"),
        (b"", "not speak"),
        (MINE.replace(b"eu", b"\xff\xff"), "not speak"),
    ],
)
def test_whom_we_cannot_talk_to_is_told_apart(octets: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        peer_wire.read_hello(octets, "eu", "key")
    assert peer_wire.read_hello(MINE, "eu", "key").proxy_id == ONE


@pytest.mark.parametrize(
    ("octets", "frame"),
    [
        (peer_wire.write_notes(7, 0.5, b"xyz"), Frame(peer_wire.NOTES, 7, 0.5, b"xyz")),
        (peer_wire.write_gone(7), Frame(peer_wire.GONE, 7)),
        (peer_wire.write_beat(peer_wire.BEAT, 1.25), Frame(peer_wire.BEAT, 0, 1.25)),
        (peer_wire.write_beat(peer_wire.ECHO, 1.25), Frame(peer_wire.ECHO, 0, 1.25)),
        (peer_wire.write_whole(), Frame(peer_wire.WHOLE)),
        (peer_wire.write_ask(9), Frame(peer_wire.ASK, 9)),
        (peer_wire.write_page(9, b"p", last=False), Frame(peer_wire.PAGE, 9, 0.0, b"p")),
        (peer_wire.write_page(9, b"", last=True), Frame(peer_wire.PAGE, 9, 1.0)),
    ],
)
def test_frames_come_as_they_were_sent_or_are_refused(octets: bytes, frame: Frame) -> None:
    assert peer_wire.read_frame(octets) == frame
    fixed = len(octets) - len(frame.batch)
    for cut in range(fixed):
        with pytest.raises(WireError):
            peer_wire.read_frame(octets[:cut])
    if not frame.batch and frame.kind != peer_wire.PAGE:
        with pytest.raises(WireError):
            peer_wire.read_frame(octets + b"x")


def test_notes_from_the_future_or_of_no_age_are_refused() -> None:
    for age_s in (-1.0, 1e9, float("nan")):
        with pytest.raises(WireError, match="impossible age"):
            peer_wire.read_frame(peer_wire.write_notes(1, age_s, b""))


@given(st.binary(max_size=64), st.integers(0, 9))
def test_any_octets_are_a_frame_or_refused(octets: bytes, kind: int) -> None:
    for frame in (octets, bytes((kind,)) + octets):
        try:
            assert peer_wire.read_frame(frame).kind == frame[0]
        except WireError:
            continue


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("proxy-2:7000", ("proxy-2", 7000)),
        ("[::1]:0", ("::1", 0)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("unix:/run/p.sock", ("unix:/run/p.sock", -1)),
    ],
)
def test_addresses(address: str, place: tuple[str, int]) -> None:
    assert peer_wire.parse_address(address) == place


@pytest.mark.parametrize(
    "address", ["", "host", ":7000", "host:", "host:65536", "host:-1", "::1:7000", "unix:", "[]:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="peer address"):
        peer_wire.parse_address(address)

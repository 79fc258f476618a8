"""What two proxies say to each other: who they are, and then frames of notes and messages.

Both say hello at once: versions, region, a name that is drawn anew for each life, and a nonce. Then
each proves that it has the key that both were given, over both hellos and its own part in the
link, so that a proof fits neither another link nor the other direction. From there on each frame
carries a tag over its number and its octets: who sits between them can read, but neither change,
repeat nor leave out. Without a key there is no proof and no tag: for loopback, unix sockets, and
networks that are trusted.

Proxies of one region share notes, and so must be of one version. Those of two regions send each
other only messages that say what they mean by themselves, and need not be.

Frames are read totally: whatever comes, a value or `WireError`.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from hashlib import blake2b, sha256
from struct import Struct, error
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from proxy.core import limits
from proxy.core.note_wire import NOTES_VERSION
from proxy.core.prefix import CHAIN_VERSION

MAGIC: Final = b"doherty notes"
LENGTH: Final = Struct("!I")
NONCE_BYTES: Final = 32
PROXY_ID_BYTES: Final = 16
TAG_BYTES: Final = 16
UNIX: Final = "unix:"
NAME: Final = "dns:"
_NEAR: Final = (UNIX, "127.", "localhost:", "[::1]:", "::1:")

NOTES: Final = 1
GONE: Final = 2
BEAT: Final = 3
ECHO: Final = 4
WHOLE: Final = 5
ASK: Final = 6
PAGE: Final = 7
SUMMARY: Final = 8
WANTED: Final = 10
QUOTAS: Final = 11  # what tenants have used
COUNTS: Final = 12  # what a proxy that leaves has counted

# Frames whose octets are read by who asked for that kind (`io.peers.Peers.listen`).
MESSAGES: Final = frozenset((SUMMARY, WANTED, QUOTAS, COUNTS))

_NOTES: Final = Struct("<BIf")
_GONE: Final = Struct("<BI")
_BEAT: Final = Struct("<Bd")
_ASK: Final = Struct("<BI")
_PAGE: Final = Struct("<BIB")
_COUNT: Final = Struct("<Q")
AGE_S_MAX: Final = 3600.0


class WireError(Exception):
    """The other side is not one of ours, or no longer; the text says why."""


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What comes first from each side."""

    magic: Annotated[bytes, Meta(max_length=32)]
    notes_version: int
    chain_version: Annotated[bytes, Meta(max_length=16)]
    region: Annotated[str, Meta(max_length=128)]
    proxy_id: Annotated[bytes, Meta(min_length=PROXY_ID_BYTES, max_length=PROXY_ID_BYTES)]
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    keyed: bool


_hello_decoder: Final = msgspec.msgpack.Decoder(Hello)


def make_hello(region: str, proxy_id: bytes, nonce: bytes, key: str | None) -> bytes:
    hello = Hello(MAGIC, NOTES_VERSION, CHAIN_VERSION, region, proxy_id, nonce, key is not None)
    return msgspec.msgpack.encode(hello)


def read_hello(octets: bytes, region: str, key: str | None, others: Collection[str] = ()) -> Hello:
    """Return who is there. Raises `WireError` when it cannot be talked to.

    `others` are the regions besides ours whose proxies may link to us.
    """
    try:
        hello = _hello_decoder.decode(octets)
    except (msgspec.MsgspecError, ValueError) as fault:  # text that is no UTF-8 is the latter
        raise WireError("it does not speak as a proxy does") from fault
    if hello.magic != MAGIC:
        raise WireError("it does not speak as a proxy does")
    versions = (hello.notes_version, hello.chain_version)
    if hello.region not in (region, *others):
        named = "; remote_regions names no proxy there" if others else ""
        raise WireError(f"its region is {hello.region!r}, ours is {region!r}{named}")
    if hello.region == region and versions != (NOTES_VERSION, CHAIN_VERSION):
        raise WireError("it is of another version; notes go on when both are of one")
    if hello.keyed != (key is not None):
        raise WireError("one of us has a peer_key and the other has none")
    return hello


class Link:
    """What both hellos make: the proofs to show and to expect, and the seals of both ways."""

    def __init__(self, key: str | None, ours: bytes, theirs: bytes, *, dialled: bool) -> None:
        self._key = key.encode() if key is not None else None
        dialler, acceptor = (ours, theirs) if dialled else (theirs, ours)
        self._both = sha256(dialler).digest() + sha256(acceptor).digest()
        us, them = (b"dialler", b"acceptor") if dialled else (b"acceptor", b"dialler")
        self.proof = self._derive(b"proof of " + us)
        self._expected = self._derive(b"proof of " + them)
        self.outward = Seal(self._derive(b"frames of " + us))
        self.inward = Seal(self._derive(b"frames of " + them))

    def check(self, proof: bytes) -> None:
        """Raises `WireError` when the other side has not shown that it has the key."""
        if not hmac.compare_digest(proof, self._expected):
            raise WireError("it does not have our peer_key")

    def _derive(self, purpose: bytes) -> bytes:
        if self._key is None:
            return b""
        return hmac.digest(self._key, purpose + b"\0" + self._both, "sha256")


class Seal:
    """Tags the frames of one direction, or checks them; with no key it does neither."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def close(self, frame: bytes) -> bytes:
        """Return the frame as it is sent, behind its length."""
        tag = self._tag(frame) if self._key else b""
        return LENGTH.pack(len(tag) + len(frame)) + tag + frame

    def open(self, sealed: bytes) -> bytes:
        """Return the frame that came. Raises `WireError`."""
        if not self._key:
            return sealed
        frame = sealed[TAG_BYTES:]
        if not hmac.compare_digest(sealed[:TAG_BYTES], self._tag(frame)):
            raise WireError("a frame was changed on its way")
        return frame

    def _tag(self, frame: bytes) -> bytes:
        self._count += 1
        mac = blake2b(_COUNT.pack(self._count), digest_size=TAG_BYTES, key=self._key)
        mac.update(frame)
        return mac.digest()


class Frame(NamedTuple):
    """One frame. `number` is an origin or a transfer; `figure` an age, a moment, or 1 for last."""

    kind: int
    number: int = 0
    figure: float = 0.0
    batch: bytes = b""


def write_notes(origin: int, age_s: float, batch: bytes) -> bytes:
    return _NOTES.pack(NOTES, origin, age_s) + batch


def write_gone(origin: int) -> bytes:
    """The worker behind this origin is no more."""
    return _GONE.pack(GONE, origin)


def write_beat(kind: int, at_s: float) -> bytes:
    """I am there, at this moment of my clock; or, as `ECHO`, yours is back."""
    return _BEAT.pack(kind, at_s)


def write_whole() -> bytes:
    """Tell me everything that is open."""
    return bytes((WHOLE,))


def write_ask(transfer: int) -> bytes:
    """Tell me what is cached where, in pages of this transfer."""
    return _ASK.pack(ASK, transfer)


def write_page(transfer: int, batch: bytes, *, last: bool) -> bytes:
    return _PAGE.pack(PAGE, transfer, int(last)) + batch


def write_message(kind: int, octets: bytes) -> bytes:
    """Say something that is one of `MESSAGES`."""
    return bytes((kind,)) + octets


def read_frame(octets: bytes) -> Frame:
    """Raises `WireError`."""
    kind = octets[0] if octets else 0
    try:
        if kind == NOTES:
            _, origin, age_s = _NOTES.unpack_from(octets)
            if not 0.0 <= age_s <= AGE_S_MAX:
                raise WireError("notes of an impossible age")
            return Frame(kind, origin, age_s, octets[_NOTES.size :])
        if kind == PAGE:
            _, transfer, last = _PAGE.unpack_from(octets)
            return Frame(kind, transfer, float(last), octets[_PAGE.size :])
        if kind in (BEAT, ECHO):
            return Frame(kind, 0, _BEAT.unpack(octets)[1])
        if kind in (GONE, ASK):
            return Frame(kind, _GONE.unpack(octets)[1])
    except error as fault:
        raise WireError("a frame is broken") from fault
    if kind in MESSAGES:
        return Frame(kind, batch=octets[1:])
    if kind == WHOLE and len(octets) == 1:
        return Frame(kind)
    raise WireError(f"no frame is of kind {kind}")


def is_near(address: str) -> bool:
    """Whether an address of ours is on this machine, by its looks."""
    return address.startswith(_NEAR)


def is_name(address: str) -> bool:
    """Say whether an address is a name that stands for every address that it has."""
    return address.startswith(NAME)


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port, or `unix:` and its path with port -1. Raises `ValueError`.

    Of a name that stands for many (`is_name`) it is the name and the port of each.
    """
    if address.startswith(UNIX):
        if len(address) == len(UNIX):
            raise ValueError(f"peer address {address!r} names no path")
        return address, -1
    host, colon, port = address.removeprefix(NAME).rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    possible = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536
    if not colon or not possible or not bare or (":" in bare and bare == host):
        raise ValueError(f"peer address {address!r} must look like HOST:PORT or unix:PATH")
    return bare, int(port)


assert max(_NOTES.size, _PAGE.size) + TAG_BYTES < limits.PEER_HELLO_BYTES_MAX

"""The few words of rtnetlink (rtnetlink(7)) that a cell's network is made of.

Said to the kernel directly, because `ip` is not on every machine that has GPUs, and five processes
of it would cost more than the rest of a cell.
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Network

_ROUTE = 0  # NETLINK_ROUTE
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_ERROR = 2  # NLMSG_ERROR; with number 0 it is the acknowledgement
_NEWLINK, _NEWADDR, _NEWROUTE = 16, 20, 24
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_UNICAST, _UNREACHABLE = 1, 7
_TABLE_LOCAL, _STATIC = 255, 4
_UNIVERSE, _LINK = 0, 253
_UP = 1
_ANSWER_BYTES_MAX = 65_536


def add_pair(name: str, peer: str, peer_namespace: int) -> None:
    """Make a link `name` whose other end, `peer`, is in the namespace of a descriptor.

    Raises `OSError`, `FileExistsError` for a name that is taken.
    """
    there = _link() + _text(_IFLA_IFNAME, peer) + _number(_IFLA_NET_NS_FD, peer_namespace)
    data = _attribute(_INFO_DATA, _attribute(_VETH_PEER, there))
    info = _attribute(_IFLA_LINKINFO, _text(_INFO_KIND, "veth") + data)
    _ask(_NEWLINK, _CREATE | _EXCL, _link() + _text(_IFLA_IFNAME, name) + info)


def set_up(name: str) -> None:
    """Raises `OSError`."""
    _ask(_NEWLINK, 0, _link(socket.if_nametoindex(name), _UP))


def add_address(name: str, address: str) -> None:
    """Give a link an address that is nobody else's. Raises `OSError`."""
    head = struct.pack("=BBBBI", socket.AF_INET, 32, 0, _UNIVERSE, socket.if_nametoindex(name))
    octets = socket.inet_aton(address)
    body = _attribute(_IFA_LOCAL, octets) + _attribute(_IFA_ADDRESS, octets)
    _ask(_NEWADDR, _CREATE | _EXCL, head + body)


def add_local_route(name: str, to: str, source: str) -> None:
    """Reach `to` by a link, from `source`, in the table that is asked first. Raises `OSError`."""
    body = _attribute(_RTA_DST, socket.inet_aton(to))
    body += _number(_RTA_OIF, socket.if_nametoindex(name))
    body += _attribute(_RTA_PREFSRC, socket.inet_aton(source))
    _ask(_NEWROUTE, _CREATE | _EXCL, _route(32, _LINK, _UNICAST) + body)


def make_unreachable(network: IPv4Network) -> None:
    """Have what is in `network` and has no way of its own be nowhere. Raises `OSError`."""
    head = _route(network.prefixlen, _UNIVERSE, _UNREACHABLE)
    body = _attribute(_RTA_DST, network.network_address.packed)
    _ask(_NEWROUTE, _CREATE | _REPLACE, head + body)


def _link(index: int = 0, flags: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def _route(prefix: int, scope: int, kind: int) -> bytes:
    words = (socket.AF_INET, prefix, 0, 0, _TABLE_LOCAL, _STATIC, scope, kind, 0)
    return struct.pack("=BBBBBBBBI", *words)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return _attribute(kind, struct.pack("=I", number))


def _attribute(kind: int, data: bytes) -> bytes:
    size = 4 + len(data)
    return struct.pack("=HH", size, kind) + data + b"\0" * (-size % 4)


def _ask(kind: int, flags: int, body: bytes) -> None:
    """Send one request and read whether it was done. Raises `OSError`."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE) as link:
        link.bind((0, 0))
        head = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0)
        link.send(head + body)
        answer = link.recv(_ANSWER_BYTES_MAX)
    _, answered, _, _, _, number = struct.unpack_from("=IHHIIi", answer)
    if answered == _ERROR and number:
        raise OSError(-number, os.strerror(-number))

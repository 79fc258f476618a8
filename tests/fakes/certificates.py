"""Certificates made on the spot, and contexts for the test's ends of a connection."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """An authority of its own; what it issues lies in `folder`, which may be shared."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.path = str(folder / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str = "server", *names: str, expired: bool = False) -> tuple[str, str]:
        """Write a certificate and its key; return their paths."""
        ends = datetime.now(UTC) + timedelta(days=-1 if expired else 30)
        begins = ends - timedelta(days=60)
        issued = self._ca.issue_cert(
            *(names or ("127.0.0.1", "localhost")), not_before=begins, not_after=ends
        )
        cert, key = (self._folder / f"{name}.{kind}.pem" for kind in ("cert", "key"))
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return str(cert), str(key)

    def server_context(self, name: str = "engine", *names: str) -> ssl.SSLContext:
        """Return the context of a server that this authority vouches for."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(name, *names))
        return context

    def client_context(self, *pair: str) -> ssl.SSLContext:
        """Return the context of a client that trusts this authority and shows `pair`, if any."""
        context = ssl.create_default_context(cafile=self.path)
        if pair:
            context.load_cert_chain(*pair)
        return context

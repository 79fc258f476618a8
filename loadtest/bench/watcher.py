"""One who watches a proxy's view and looks at none of it: `watcher PORT`, of the admin listener."""

from __future__ import annotations

import http.client
import sys
import time

RETRY_S = 0.1
OCTETS_AT_ONCE = 1 << 16


def _watch(port: int) -> None:
    """Take what comes until there is no more. Raises `OSError` or `HTTPException`."""
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.request("GET", "/view/watch", headers={"accept-encoding": "gzip"})
    answer = client.getresponse()
    while answer.read1(OCTETS_AT_ONCE):
        pass


if __name__ == "__main__":
    while True:
        try:
            _watch(int(sys.argv[1]))
        except (OSError, http.client.HTTPException):
            time.sleep(RETRY_S)  # it has not begun yet, or is gone

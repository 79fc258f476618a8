"""Draw the keys of a stack that it does not have yet: `draw_keys.py FOLDER`.

Each stands in a file of its own, for its owner and its group (Prometheus and Grafana are in it, to
read theirs). One that is there is never changed: write your own before the first start, or replace
one and restart who reads it.
"""

import os
import secrets
import sys
from pathlib import Path

NAMES = ("admin_api_key", "internal_key", "peer_key", "work_key", "grafana_admin_password")


def draw(folder: Path) -> list[str]:
    """Write those that are missing; return their names."""
    drawn = []
    for name in NAMES:
        try:
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o440)
        except FileExistsError:
            continue
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32))
        drawn.append(name)
    return drawn


if __name__ == "__main__":
    print("drawn:", *(draw(Path(sys.argv[1])) or ["nothing, all are there"]))

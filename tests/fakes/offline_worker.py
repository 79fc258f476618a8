"""A worker at the desk that waits for each answer, and asks again while nobody is there."""

from __future__ import annotations

import urllib.error
import urllib.request

import msgspec

from backends.offline.work import Ask, Chunk, Receipt, Report
from tests.fakes.offline_stage import CHAT, answer
from tests.fakes.programs import until


class BlockingWorker:
    """Does the lines of one chunk at a time."""

    def __init__(self, url: str, lines_max: int) -> None:
        self._url = url
        self._lines_max = lines_max
        self.computed = 0

    def do_some(self) -> bool:
        """Do a chunk; False: there is none."""
        ask = Ask(worker_id="w", models=("demo",), urls=(CHAT,), lines_max=self._lines_max)
        said = self._post("/desk/ask", ask)
        if not said:
            return False
        chunk = msgspec.json.decode(said, type=Chunk)
        self.computed += len(chunk.lines)
        report = Report(
            worker_id="w",
            chunk_id=chunk.chunk_id,
            fence=chunk.fence,
            results=tuple(answer(line) for line in chunk.lines),
            done=True,
        )
        msgspec.json.decode(self._post("/desk/report", report), type=Receipt)
        return True

    def _post(self, path: str, what: msgspec.Struct) -> bytes:
        body = msgspec.json.encode(what)

        def attempt() -> tuple[bytes] | None:
            try:
                with urllib.request.urlopen(self._url + path, data=body, timeout=30) as response:
                    return (response.read(),)
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise AssertionError(error.read()) from error
                return None
            except OSError:
                return None

        return until(attempt, f"an answer to {path}")[0]

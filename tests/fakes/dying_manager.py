"""Managers that die by SIGKILL at a step that a test names: `dying_manager.py CONFIG`.

One process imports everything and forks a manager for each line that it reads, so that a table of
many deaths is quick; it writes the pid of each. The step is what the file `die` beside the
configuration says, looked at whenever there is one, so it can be named while a manager runs:
`before` or `after` and the step's name.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from backends.fetch import HttpFetch
from backends.journal import Entry, Journal
from backends.providers.process import LocalProcess, ProcessProvider
from backends.serve import serve
from backends.snapshots.suspend import Freezer
from proxy.config import load_config


def main() -> None:
    path = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _install(path.with_name("die"))
    for _ in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            config = load_config(str(path))
            os._exit(asyncio.run(serve(config, str(path))))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def name_of(entry: Entry) -> str:
    """Return the step that noting `entry` is."""
    state = [name for name in ("suspended", "turning", "staged") if getattr(entry, name, False)]
    if getattr(entry, "level", None) is not None:
        state.append("asleep")
    return " ".join(["note", type(entry).__name__, *state])


def _install(where: Path) -> None:
    def step(order: str, name: str) -> None:
        try:
            named = where.read_text()
        except OSError:
            return
        if named == f"{order} {name}":
            where.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    append = Journal.append

    def noted(journal: Journal, entry: Entry) -> None:
        step("before", name_of(entry))
        append(journal, entry)
        step("after", name_of(entry))

    Journal.append = noted  # type: ignore[method-assign]
    spawn = ProcessProvider.spawn

    def spawned(*args: Any) -> Any:
        process = spawn(*args)
        step("after", "spawn")
        return process

    ProcessProvider.spawn = spawned  # type: ignore[method-assign]
    kill = LocalProcess.signal_group

    def signalled(process: LocalProcess, number: int) -> None:
        kill(process, number)
        step("after", signal.Signals(number).name)

    LocalProcess.signal_group = signalled  # type: ignore[method-assign]

    def around(act: Callable[..., Awaitable[Any]], name: Callable[..., str]) -> Any:
        async def acted(*args: Any) -> Any:
            step("before", name(*args))
            result = await act(*args)
            step("after", name(*args))
            return result

        return acted

    Freezer.suspend = around(Freezer.suspend, lambda *_: "suspend")  # type: ignore[method-assign]
    Freezer.resume = around(Freezer.resume, lambda *_: "resume")  # type: ignore[method-assign]
    HttpFetch.post = around(  # type: ignore[method-assign]
        HttpFetch.post, lambda _, url, *__: "post /" + url.split("/", 3)[3].partition("?")[0]
    )


if __name__ == "__main__":
    main()

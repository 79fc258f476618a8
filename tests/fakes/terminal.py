"""A terminal with a shell in it, as an operator has one: keys in, what was written out.

Use as `async with Terminal(80, 24) as terminal`. The shell has job control, so that Ctrl-Z and `fg`
do what they do.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from typing import Self

# What moves the cursor or colours (ECMA-48, 5.4: control sequences), and Textual's questions.
_CONTROL = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[P_^].*?\x1b\\|.)"
)


class Terminal:
    def __init__(self, columns: int, lines: int, environment: dict[str, str] | None = None) -> None:
        self._size = (columns, lines)
        self._environment = environment or {}
        self.written = b""
        self._keyboard = -1
        self._screen = -1
        self._came = asyncio.Event()
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        self._keyboard, self._screen = pty.openpty()
        self._resize(*self._size)
        environment = {
            "TERM": "xterm-256color",
            **os.environ,
            **self._environment,
            "PS1": "ready> ",
        }
        environment.pop("COLORTERM", None)
        self._process = await asyncio.create_subprocess_exec(
            *("setsid", "--ctty", "--wait", "bash", "--norc", "--noprofile", "--noediting", "-i"),
            stdin=self._screen,
            stdout=self._screen,
            stderr=self._screen,
            env=environment,
        )
        asyncio.get_running_loop().add_reader(self._keyboard, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._keyboard)
        os.close(self._screen)
        os.close(self._keyboard)  # hangs up: the shell and what runs in it end
        await self._process.wait()

    def type(self, keys: str) -> int:
        """Press keys; return how much had been written before."""
        before = len(self.written)
        os.write(self._keyboard, keys.encode())
        return before

    def resize(self, columns: int, lines: int) -> int:
        before = len(self.written)
        self._resize(columns, lines)
        os.killpg(self.foreground(), signal.SIGWINCH)
        return before

    def foreground(self) -> int:
        """Return the process group that has the terminal."""
        return os.tcgetpgrp(self._keyboard)

    def text(self, after: int = 0) -> str:
        """Return what was written from there on, without what only moves and colours."""
        return _CONTROL.sub(b"", self.written[after:]).decode(errors="replace")

    async def until(self, words: str, after: int = 0) -> str:
        """Wait for words to be written; return all from there on."""
        while words not in (text := self.text(after)):
            self._came.clear()
            await self._came.wait()
        return text

    async def quiet(self) -> None:
        """Wait until nothing was written for a while."""
        written = -1
        while written != len(self.written):
            written = len(self.written)
            await asyncio.sleep(0.3)

    async def run(self, command: str) -> str:
        """Have the shell run a command to its end; return what it wrote."""
        before = self.type(f'echo "<$({command})>"\n')
        while (said := re.search(r"<([^$<>]*)>", self.text(before))) is None:
            self._came.clear()
            await self._came.wait()
        return said[1]

    def _resize(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        try:
            self.written += os.read(self._keyboard, 65_536)
        except OSError:  # nobody has the other end any more
            asyncio.get_running_loop().remove_reader(self._keyboard)
        self._came.set()

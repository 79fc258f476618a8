"""The GPUs of this machine as the keepers meet them: taken before a start, given back after an end.

A card is given back when its memory is. The kernel frees that when the last process that has the
card open is gone, which can be later than the death of the server: a driver call under way, a core
that outlived its parent. Until then the card stays with the replica that had it, so that no other
one starts into memory that is not there; the replica itself may start again at once, and gets the
same cards. What is still held after `FREED_S_MAX` is told, with the processes that nvidia-smi
names, and the card is given back all the same: one that nobody may use helps nobody.

A replica that finds too few cards waits, and is woken when some have been given back.

One that is suspended lends its cards: they are given back like those of a life that is over, and
when it returns it gets the same ones, or others of their model if it can be moved to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from backends.gpus import GpuInventory, GpuLeases, NoGpuError, bound_to_node, pinned
from backends.inventory import CardUse
from backends.log import Log
from backends.tasks import cancel_all, spawn

FREED_S_MAX = 15.0
FREED_POLL_S = 0.5
SLACK_MIB = 256  # what a driver takes for itself moves; a CUDA context alone is more than this


class Placement(msgspec.Struct, frozen=True):
    """Where one life of a replica runs."""

    devices: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    prefix: tuple[str, ...] = ()  # put before its command


class Back(msgspec.Struct, frozen=True):
    """The cards of a replica that returns; `moved`: new UUIDs by the old, where they are others."""

    devices: tuple[str, ...] = ()
    moved: dict[str, str] | None = None
    before: tuple[str, ...] = ()  # then: those that it had


class Cards:
    """Leases of GPUs, and what follows from them.

    Without `leases` nothing is leased; without `use` cards are given back unseen.
    """

    def __init__(
        self,
        leases: GpuLeases | None,
        log: Log,
        use: Callable[[], CardUse] | None = None,
        poll_s: float = FREED_POLL_S,
    ) -> None:
        self._leases = leases
        self._log = log
        self._use = use
        self._poll_s = poll_s
        self._used_before: dict[str, dict[str, int]] = {}
        self._lent: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[str, Callable[[], None]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def leases(self) -> GpuLeases | None:
        """What is given out now; None: no cards are managed."""
        return self._leases

    def take(
        self,
        owner: str,
        count: int,
        env: Mapping[str, str],
        args: Sequence[str],
        wake: Callable[[], None],
    ) -> Placement:
        """Return where `owner` is to start; `env` and `args` are its pool's own.

        Raises `NoGpuError`; then `wake` is called when it is worth another try.
        """
        if self._leases is None:
            return Placement()
        self._cancel(owner)
        self._waiting.pop(owner, None)
        own = pinned(env, args, count)
        if own is not None:
            lease = self._leases.claim(owner, own)
            environment: dict[str, str] = {}  # its own says it already
        else:
            try:
                lease = self._leases.lease(owner, count)
            except NoGpuError:
                self._waiting[owner] = wake
                raise
            environment = lease.environment
        self._look_before(owner, lease.devices)
        return Placement(lease.devices, environment, bound_to_node(lease, args))

    def withdraw(self, devices: frozenset[str]) -> None:
        """Give these out no more, and others again that were not given out so far."""
        if self._leases is not None and devices != self._leases.withdrawn:
            self._leases.withdrawn = devices
            self._wake()

    def renew(self, inventory: GpuInventory) -> None:
        """Give out these from now on; what is held of others stays held until its owner ends."""
        if self._leases is not None and inventory != self._leases.inventory:
            self._leases.inventory = inventory
            self._wake()

    def claim(self, owner: str, devices: Sequence[str]) -> None:
        """Note the cards of a process that a manager before has started."""
        if self._leases is not None and devices:
            self._leases.claim(owner, devices)

    def lend(self, owner: str, devices: Sequence[str] = ()) -> None:
        """Let others have the cards of `owner`, which is suspended.

        `devices`: those that it was suspended on, where it has others now, or none.
        """
        held = self._leases.holders.get(owner, ()) if self._leases is not None else ()
        self.ended(owner)
        if held or devices:
            self._lent[owner] = tuple(devices or held)

    def take_back(
        self,
        owner: str,
        env: Mapping[str, str],
        args: Sequence[str],
        wake: Callable[[], None],
        *,
        moves: bool,
    ) -> Back:
        """Return where `owner` is to be resumed. Raises `NoGpuError`, as `take` does."""
        lent = self._lent.get(owner, ())
        if self._leases is None or not lent:
            return Back(self._leases.holders.get(owner, ()) if self._leases is not None else ())
        self._cancel(owner)
        self._waiting.pop(owner, None)
        if pinned(env, args, len(lent)) is not None:
            devices = self._leases.claim(owner, lent).devices
        else:
            try:
                devices = self._leases.lease_again(owner, lent, moves=moves)
            except NoGpuError:
                self._waiting[owner] = wake
                raise
        del self._lent[owner]
        self._look_before(owner, devices)
        pairs = {self._uuid(old): self._uuid(new) for old, new in zip(lent, devices, strict=True)}
        return Back(devices, pairs, lent) if devices != lent else Back(devices)

    def ended(self, owner: str) -> None:
        """Give the cards of a life that is over back, as soon as they are free.

        At once where that cannot be seen: another one uses the card as well, or the life was so
        short that not even what was used before it is known yet.
        """
        self._lent.pop(owner, None)
        devices = self._leases.holders.get(owner, ()) if self._leases is not None else ()
        short = owner in self._tasks and owner not in self._used_before
        if self._use is None or not devices or short or self._shared(owner, devices):
            self._cancel(owner)
            self._release(owner)
        else:
            self._start(owner, self._give_back(owner, devices, self._use))

    def lent(self, owner: str) -> tuple[str, ...]:
        """Return the cards that `owner` was suspended on, and has not come back to."""
        return self._lent.get(owner, ())

    def forget(self, owner: str) -> None:
        """Let `owner` wait for nothing any more."""
        self._waiting.pop(owner, None)
        self._lent.pop(owner, None)

    def wait_no_more(self, owner: str) -> None:
        """Do not wake `owner` when cards are given back."""
        self._waiting.pop(owner, None)

    async def settled(self) -> None:
        """Wait until all that is being given back is free, or has been told of."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def hurry(self) -> None:
        """Wait for nothing from now on: cards are given back unseen."""
        self._use = None
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        await cancel_all(list(self._tasks.values()))

    def _look_before(self, owner: str, devices: tuple[str, ...]) -> None:
        self._used_before.pop(owner, None)
        if devices and self._use is not None:
            self._start(owner, self._note_use(owner, self._use))

    def uuids(self, devices: Sequence[str]) -> tuple[str, ...]:
        """Return what the driver calls these cards."""
        return tuple(map(self._uuid, devices))

    def described(self, devices: Sequence[str]) -> str:
        """Return the models of these cards, in words: an image fits no other ones."""
        leases = self._leases
        known = [leases.inventory.gpu(device) for device in devices] if leases is not None else []
        return ", ".join(gpu.name or gpu.device for gpu in known if gpu is not None)

    def _uuid(self, device: str) -> str:
        gpu = self._leases.inventory.gpu(device) if self._leases is not None else None
        return gpu.uuid if gpu is not None else device

    async def _note_use(self, owner: str, use: Callable[[], CardUse]) -> None:
        """Remember what is used before the engine uses anything: it imports for seconds first."""
        self._used_before[owner] = (await asyncio.to_thread(use)).used_mib

    async def _give_back(
        self, owner: str, devices: tuple[str, ...], use: Callable[[], CardUse]
    ) -> None:
        """Release the cards once as much is free as before, or after the longest wait."""
        before = self._used_before.pop(owner, {})
        polls_left = int(FREED_S_MAX / FREED_POLL_S)
        while held := self._held(devices, before, await asyncio.to_thread(use)):
            if not polls_left:
                self._log.caution("gpu_memory_held", replica=owner, held=held)
                break
            polls_left -= 1
            await asyncio.sleep(self._poll_s)
        self._release(owner)

    def _held(self, devices: tuple[str, ...], before: Mapping[str, int], now: CardUse) -> str:
        assert self._leases is not None
        told = []
        for device in devices:
            more_mib = now.used_mib.get(device, 0) - before.get(device, 0)
            if more_mib <= SLACK_MIB:
                continue
            gpu = self._leases.inventory.gpu(device)
            users = [user for user in now.users if gpu and user.uuid == gpu.uuid]
            by = ", ".join(f"pid {user.pid} ({user.used_mib:,} MiB)" for user in users)
            told.append(f"GPU {device}: {more_mib:,} MiB by {by or 'no process that it names'}")
        return "; ".join(told)

    def _shared(self, owner: str, devices: tuple[str, ...]) -> bool:
        assert self._leases is not None
        others = (d for name, d in self._leases.holders.items() if name != owner)
        return any(set(devices) & set(theirs) for theirs in others)

    def _release(self, owner: str) -> None:
        if self._leases is not None and self._leases.release(owner):
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for wake in waiting.values():  # afterwards: whoever gives them back may be about to start
            asyncio.get_running_loop().call_soon(wake)

    def _start(self, owner: str, coroutine: Coroutine[Any, Any, None]) -> None:
        """Begin a chore of `owner`; it has one at a time."""
        self._cancel(owner)
        task = spawn(coroutine, f"cards {owner}", self._log)
        self._tasks[owner] = task
        task.add_done_callback(lambda done: self._done(owner, done))

    def _done(self, owner: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(owner) is task:
            del self._tasks[owner]

    def _cancel(self, owner: str) -> None:
        task = self._tasks.pop(owner, None)
        if task is not None:
            task.cancel()

"""The images of one replica: it starts from one where one fits, and makes one where none does.

An image is made of a replica that has just become ready and serves nobody yet: it has compiled,
captured and answered a few requests of several lengths, so that its copies need do none of that,
and no client's words are in it. (One that is made of a replica that has served, see `posing`, may
hold clients' words.) It is put to rest as deep as it goes first, because what it holds
then has to be written once and read at every start. Whatever fails on the way, the replica serves
on, or is started anew where nobody knows how it is; and no image is tried for for a time.

A restore that fails is followed by another start at once, cold or from an older image: nobody above
decides that, and it is not the replica's fault.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.cards import Placement
from backends.engines.base import Engine, launch_hash
from backends.engines.probe import Program
from backends.engines.release import Release
from backends.journal import Staged
from backends.ladder import Rung
from backends.lifecycle import Event
from backends.ports import ReplicaPorts
from backends.snapshots.base import Progress, Snapshot, SnapshotError, SnapshotKey, Snapshots
from backends.spec import ReplicaSpec
from backends.starting import Start, enclosed, prepare
from backends.surroundings import Surroundings
from backends.turns import Life, Turns
from backends.weights import model_files, model_folder

RESTORE_S_MAX = 600.0  # 140 GB from a disk of 250 MB/s; the cell gives up by itself before
CREATE_S_MAX = 1800.0  # the same to be written
WARM_UP_WORDS = (1, 60, 700, 3000)  # decode alone, and prefills below and above usual chunks
WARM_UP_TOKENS = 16
WARM_UP_TIMEOUT_S = 120.0
_CPU = Path("/proc/cpuinfo")
_DRIVER = Path("/sys/module/nvidia/version")


class Images:
    """What one replica has to do with images."""

    def __init__(self, engine: Engine, around: Surroundings, turns: Turns, replica_id: str) -> None:
        self.progress = Progress()
        self.key: SnapshotKey | None = None  # of what the life under way may be made into
        self._source: Snapshot | None = None  # of the life under way, until it is ready
        self._port = 0
        self._posing = False  # it is being made into one
        self._engine = engine
        self._around = around
        self._turns = turns
        self._pool_id = pool_id_of(replica_id)

    async def find(
        self, spec: ReplicaSpec, release: Release, gpus: Sequence[str]
    ) -> Snapshot | None:
        """Return the image that a start of `spec` on these cards takes; None: none fits."""
        if not await asyncio.to_thread(self._works, spec):  # the first answer takes a second
            return None
        cards = self._around.cards.described(gpus)
        self.key = await asyncio.to_thread(key_of, self._engine, spec, str(release), cards)
        image = await asyncio.to_thread(self._around.snapshots.find, self.key)
        self._around.shelf.put(self._pool_id, image)
        return image

    def prepare(
        self,
        spec: ReplicaSpec,
        ports: ReplicaPorts,
        program: Program,
        release: Release,
        place: Placement,
        found: Snapshot | None,
    ) -> Start:
        """Return a start from `found`, or a cold one. Raises what `starting.prepare` does."""
        self._source = None
        cold = (self._engine, spec, ports, program, release, place)
        if not self._works(spec):
            self.key = None
            return prepare(*cold)
        try:
            start = enclosed(
                *(self._engine, spec, program, release, place),
                snapshots=self._around.snapshots,
                found=found,
            )
        except SnapshotError as error:
            self._around.log.caution("no_cell", replica=spec.replica_id, reason=str(error))
            if found is not None:
                self._discard(found, str(error))
                return self.prepare(spec, ports, program, release, place, None)
            self.key = None
            return prepare(*cold)
        self._source, self._port = found, start.port
        return start._replace(image_of=self.key.launch_hash if self.key else "")

    # --- from an image --------------------------------------------------------------------------

    async def revive(self, life: Life) -> str:
        """Bring a copy to where it can be asked; return what went wrong, if anything did."""
        snapshot = self._source
        assert snapshot is not None
        try:
            async with asyncio.timeout(RESTORE_S_MAX):
                await self._around.snapshots.restored(life.pid, life.launch_id)
        except (SnapshotError, TimeoutError) as error:
            return f"not restored: {str(error) or f'no end after {RESTORE_S_MAX:g} s'}"
        self._turns.revived(snapshot)
        problem = await self._turns.up(life)
        return "" if problem is None else f"restored, and no more: {problem[1]}"

    @property
    def known(self) -> bool:
        """Say whether there is one that a start would take, as far as was seen."""
        return self._around.shelf.has(self._pool_id)

    @property
    def restoring(self) -> bool:
        """Say whether the life under way is a copy that has not served yet."""
        return self._source is not None

    def ready(self) -> None:
        """The life under way serves: its image, if it came from one, is good."""
        self._source = None

    def ended(self) -> bool:
        """The life under way is over; say whether its image is to blame."""
        if self._posing:  # in its warm-up, say: without one it might have served
            self._turns.failed(Rung.SNAPSHOTTED)
        source, self._source, self.key = self._source, None, None
        if self.progress.doing:
            self.progress = Progress(problem="it ended before there was one")
        if source is not None:
            self._discard(source, "a copy of it ended before it served")
        return source is not None

    def _discard(self, snapshot: Snapshot, reason: str) -> None:
        """Never use it again: it would fail the next start, too, which takes the one before it."""
        self._around.shelf.drop(snapshot.snapshot_id)
        self._around.snapshots.discard(snapshot.snapshot_id, reason)
        self._around.log.caution("image_discarded", snapshot=snapshot.snapshot_id)

    # --- into an image --------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Say whether the life under way, which has just become ready, is to be made into one."""
        return self.lacking and not self._around.shelf.making

    @property
    def lacking(self) -> bool:
        """Say whether there is none of it, and may be one."""
        if self.key is None or self._source or Rung.SNAPSHOTTED in self._turns.out:
            return False
        return not self._around.shelf.has(self._pool_id, self.key)

    def take_key(self, key: SnapshotKey | None, port: int) -> None:
        """The life under way would be an image of this, and listens there in its cell."""
        self.key, self._port = key, port

    async def make(self, life: Life) -> tuple[Event, str] | None:
        """Make an image of it; return what went wrong if it cannot serve on."""
        self._around.shelf.making = self._posing = True
        began_s = self._around.clock.now_s()
        try:
            return await self._make(life, began_s)
        finally:
            self._around.shelf.making = self._posing = False

    async def _make(self, life: Life, began_s: float) -> tuple[Event, str] | None:
        around = self._around
        self._turns.risen()  # what follows is no part of the start
        self.progress = Progress("warming up")
        await warm_up(life, around)
        try:
            around.journal.append(Staged(life.launch_id, staged=True))
        except OSError as error:
            self._fail(life, f"not noted: {error}")
            return None
        self.progress = Progress("putting it to rest")
        event, reason = await self._turns.lower_for_image(life)
        if event is Event.BROKE:
            self._fail(life, reason)
            return Event.HURRY, reason
        if event is not Event.BALKED:
            problem = await self._dump(life, began_s)
            if problem is not None:
                return problem
        else:
            self._fail(life, reason)
        back = await self._turns.up(life)
        if back is not None:
            self._fail(life, back[1])
            return Event.HURRY, f"it did not come back after its image was made: {back[1]}"
        around.note(Staged(life.launch_id, staged=False))
        return None

    async def _dump(self, life: Life, began_s: float) -> tuple[Event, str] | None:
        assert self.key is not None
        around, turns = self._around, self._turns
        await around.fetch.drop(life.url)  # an open connection cannot be restored
        try:
            async with asyncio.timeout(CREATE_S_MAX):
                made = await around.snapshots.create(
                    life.pid,
                    self.key,
                    self._port,
                    self._teller(life.spec.replica_id),
                    suspended=turns.suspended,
                    nap_level=turns.naps.level if turns.naps.asleep else 0,
                    devices=around.cards.uuids(turns.gpus),
                )
        except (SnapshotError, TimeoutError) as error:
            words = str(error) or f"no end after {CREATE_S_MAX:g} s"
            self._fail(life, words)
            running = isinstance(error, SnapshotError) and error.running
            return None if running else (Event.HURRY, f"it was lost to its image: {words}")
        around.shelf.put(self._pool_id, made)
        turns.measured(Rung.SNAPSHOTTED, down_s=around.clock.now_s() - began_s)
        name, size = life.spec.replica_id, made.image_bytes
        self.progress = Progress(snapshot=made.snapshot_id, image_bytes=size)
        around.log.tell("image_made", replica=name, snapshot=made.snapshot_id, image_bytes=size)
        return None

    def _fail(self, life: Life, reason: str) -> None:
        self._turns.failed(Rung.SNAPSHOTTED)
        self.progress = Progress(problem=reason)
        self._around.log.caution("no_image", replica=life.spec.replica_id, reason=reason)

    def _teller(self, replica_id: str) -> Callable[[str, float], None]:
        """Return what keeps the progress, and logs each thing that is being done, once."""
        told: set[str] = set()

        def tell(what: str, share: float) -> None:
            self.progress = Progress(what, share)
            if what not in told:
                told.add(what)
                self._around.log.tell("image_progress", replica=replica_id, doing=what)

        return tell

    def _works(self, spec: ReplicaSpec) -> bool:
        return spec.snapshot and self._around.snapshots.probe().works


async def warm_up(life: Life, around: Surroundings) -> None:
    """Have it answer requests of several lengths; what it does not answer it does without."""
    for words in WARM_UP_WORDS:
        if not life.go_on():
            return
        body = {
            "model": life.spec.model,
            "prompt": " ".join(f"{words} {number}" for number in range(words)),
            "max_tokens": WARM_UP_TOKENS,
            "temperature": 0,
        }
        url = life.url + "/v1/completions"
        answer = await around.fetch.post(url, msgspec.json.encode(body), WARM_UP_TIMEOUT_S)
        if answer.status != 200:
            name, status = life.spec.replica_id, answer.status
            around.log.tell("warm_up_refused", replica=name, words=words, status=status)


def image_of(engine: Engine, spec: ReplicaSpec, snapshots: Snapshots) -> Snapshot | None:
    """Return the image that a start of `spec` would take, as far as can be told without a start.

    Which release it would be of, and on which cards, is known then; here the image is believed.
    """
    for image in snapshots.images(spec.pool):
        if key_of(engine, spec, image.key.engine_version, image.key.gpu) == image.key:
            return image
    return None


def pool_id_of(replica_id: str) -> str:
    """Return the pool that a replica is of: its id ends in its number."""
    return replica_id.rpartition("-")[0]


def key_of(engine: Engine, spec: ReplicaSpec, release: str, cards: str) -> SnapshotKey:
    """Return what an image of `spec` on these cards is an image of, on this machine."""
    model = hashlib.sha256(launch_hash(engine, spec).encode())
    model.update(msgspec.json.encode(sorted(spec.adapters.items())))
    for path in model_paths(spec):
        with suppress(OSError):
            seen = path.stat()
            model.update(f"{path} {seen.st_size} {seen.st_mtime_ns}\n".encode())
    return SnapshotKey(
        pool=spec.pool,
        model=spec.model,
        engine=engine.name,
        engine_version=release,
        launch_hash=model.hexdigest()[:32],
        gpu=cards,
        driver=_text(_DRIVER).strip(),
        host=host_words(),
    )


def model_paths(spec: ReplicaSpec) -> Sequence[Path]:
    """Return the files of the model, which may be others under the same name tomorrow."""
    folder = model_folder(spec.model_path or spec.model, os.environ | spec.env)
    return () if folder is None else tuple(model_files(folder))


def host_words(cpu: Path = _CPU) -> str:
    """Return kernel and processor: processes keep what they once found out of both."""
    lines = (line.partition(":") for line in _text(cpu).splitlines())
    first = {name.strip(): value.strip() for name, _, value in reversed(list(lines))}
    flags = hashlib.sha256(first.get("flags", "").encode()).hexdigest()[:8]
    return f"{platform.release()} {platform.machine()} {first.get('model name', '')} {flags}"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

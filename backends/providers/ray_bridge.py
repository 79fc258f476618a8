"""The process that speaks with Ray, for a manager that must outlive whatever becomes of that.

Ray's client library is loud, slow to import and, where it loses its cluster, ends its own process.
So it has one to itself: orders come on standard input, news go to standard output (`ray_words`),
and at the end of the input this is over; engines are detached and run on. It keeps nothing that
could be lost with it. What it finds in the cluster, it goes on with: an actor is known by its
launch.

Each launch is an actor in a placement group of one bundle, so all GPUs of one engine are of one
node, and an autoscaler sees what is waited for. The bundle of one that has a lease names its node,
by the resource that Ray gives each for that; where the node dies, or has no room after all, the
launch ends, and the next one gets another lease.

An actor that Ray cannot reach is asked again until Ray says that it is dead: only then may its
launch be started elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import ray
import ray.cloudpickle
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util import list_named_actors
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backends.cluster_cards import Node, believed
from backends.providers import ray_actor, ray_guard
from backends.providers.ray_actor import EngineActor
from backends.providers.ray_words import (
    LINE_BYTES_MAX,
    Cluster,
    Connected,
    Exited,
    Failed,
    Follow,
    Keep,
    Need,
    News,
    Nodes,
    Order,
    Runs,
    Said,
    Signal,
    Start,
    Waits,
    nodes_of,
    one_line,
    unplaced_words,
    waits_for,
)

PREFIX = "doherty-"
POLL_S = 5.0  # that an actor may keep a question
WAITS_S = 3.0  # a start takes a second or two; what takes longer is waited for
PAUSE_S = 0.5
LOOK_S = 1.0  # between two looks at the nodes
ROOM_S_MAX = 10.0  # what is leased is free, unless somebody else was quicker
KILLED_S_MAX = 5.0  # after which one that was told to die is no longer asked whether it did
ENDED_BY_US = 2


class Launched:
    """One launch as it is followed."""

    def __init__(self, launch_id: str, need: Need) -> None:
        self.launch_id = launch_id
        self.need = need
        self.actor: Any = None
        self.node = ""
        self.host = ""
        self.killed = ""  # by what, in words, though nobody has seen it
        self.killing = asyncio.Event()


class Bridge:
    """The orders of one manager, as they are carried out."""

    def __init__(self, cluster: Cluster, news_fd: int) -> None:
        self._cluster = cluster
        self._news_fd = news_fd
        self._launched: dict[str, Launched] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._guard = Path(ray_guard.__file__).read_text()
        self._told: tuple[Node, ...] = ()
        self._seen: tuple[Node, ...] = ()

    def tell(self, news: News) -> None:
        line = msgspec.json.encode(news) + b"\n"
        while line:
            line = line[os.write(self._news_fd, line) :]

    def connect(self) -> None:
        """Find the cluster, and what runs there. Raises what Ray raises."""
        ray.init(
            address=self._cluster.address,
            namespace=self._cluster.namespace,
            log_to_driver=False,
            configure_logging=False,
        )
        ray.cloudpickle.register_pickle_by_value(ray_actor)
        self._told = self._seen = _nodes()
        self.tell(Connected(tuple(_names()), self._told))

    def begin(self) -> None:
        """Tell from now on what becomes of the nodes."""
        self._own(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        now = await asyncio.to_thread(_nodes)
        told = believed(self._told, self._seen, now)
        self._seen = now
        if told != self._told:
            self._told = told
            self.tell(Nodes(told))

    def obey(self, order: Order) -> None:
        match order:
            case Start():
                self._begin(order, order)
            case Follow():
                self._begin(order, None)
            case Signal():
                self._own(self._signal(order))
            case Keep():
                self._own(self._sweep(set(order.launch_ids)))

    def _begin(self, order: Start | Follow, start: Start | None) -> None:
        launched = Launched(order.launch_id, order.need)
        self._launched[order.launch_id] = launched
        self._own(self._live(launched, start))

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        """Whatever Ray could not answer leaves us knowing nothing: begin anew, in a new process."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.tell(Failed(one_line(error)))
            os._exit(ENDED_BY_US)

    async def _live(self, launched: Launched, start: Start | None) -> None:
        """Follow one from wherever it is to its end."""
        name = PREFIX + launched.launch_id
        launched.actor = await asyncio.to_thread(_find, name)
        if launched.actor is None and start is not None:
            make = functools.partial(_make, name, start, self._guard, self._cluster)
            launched.actor = await asyncio.to_thread(make)
        if launched.actor is None:
            ended = Exited(launched.launch_id, problem="its cluster has forgotten it")
        else:
            ended = await self._until_ended(launched)
        await asyncio.to_thread(_clear, name, launched.actor)
        del self._launched[launched.launch_id]
        self.tell(ended)

    async def _until_ended(self, launched: Launched) -> Exited:
        taken, told = -1, False
        while True:
            try:
                said = await self._ask(launched, taken)
            except ActorUnavailableError:
                await asyncio.sleep(PAUSE_S)
                continue
            except RayActorError as error:
                words = await asyncio.to_thread(_end_in_words, launched, error)
                await self._look()  # first, or it would be started there again
                return Exited(launched.launch_id, problem=words)
            if said is None:
                return Exited(launched.launch_id, problem=launched.killed)
            taken = said["upto"]
            if not told and said["pid"]:
                told = True
                self.tell(Runs(launched.launch_id, launched.host, launched.node, said["pid"]))
            if said["text"]:
                self.tell(Said(launched.launch_id, said["text"], max(0, said["lost"])))
            if said["ended"] is not None:
                return Exited(launched.launch_id, **said["ended"])

    async def _ask(self, launched: Launched, taken: int) -> dict[str, Any] | None:
        """Return the actor's next answer; None: it has been killed, and has none."""
        wait_s = POLL_S if launched.host else 0.0
        answer = _future(launched.actor.poll.remote(taken, wait_s))
        waited_s = 0.0
        killing = asyncio.get_running_loop().create_task(launched.killing.wait())
        try:
            while True:
                timeout_s = None if launched.host else WAITS_S
                both = {answer, killing}
                done, _ = await asyncio.wait(
                    both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if answer in done:
                    said: dict[str, Any] = answer.result()
                    launched.host, launched.node = said["host"], said["node"]
                    return said
                if killing in done:
                    return None
                waited_s += WAITS_S
                words, hopeless = await asyncio.to_thread(_waits_in_words, launched, waited_s)
                if hopeless:
                    await self._look()
                    launched.killed = words
                    return None
                self.tell(Waits(launched.launch_id, words))
        finally:
            killing.cancel()
            # Not cancelled: Ray would answer nobody, and says so loudly.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _signal(self, order: Signal) -> None:
        launched = self._launched.get(order.launch_id)
        if launched is None:
            return
        if not launched.host:
            launched.killed = unplaced_words(order.number)
            launched.killing.set()
            return
        with suppress(RayActorError, GetTimeoutError, TimeoutError):
            async with asyncio.timeout(KILLED_S_MAX):
                await _future(launched.actor.signal.remote(order.number))
        if order.number == signal.SIGKILL:
            await asyncio.sleep(KILLED_S_MAX)
            # It has not told its end, nor has Ray: with its actor and its bundle it ends itself.
            launched.killed = "killed by SIGKILL, which its node did not confirm"
            launched.killing.set()

    async def _sweep(self, keep: set[str]) -> None:
        for launch_id in await asyncio.to_thread(_names):
            if launch_id not in keep and launch_id not in self._launched:
                name = PREFIX + launch_id
                actor = await asyncio.to_thread(_find, name)
                await asyncio.to_thread(_clear, name, actor)


def _names() -> list[str]:
    """Return the launches of which the namespace has an actor, or only a placement group."""
    names = set(list_named_actors())
    names |= {
        group["name"].rpartition("/")[2]
        for group in placement_group_table().values()
        if group["state"] != "REMOVED" and group["name"].startswith(_namespace() + "/")
    }
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def _namespace() -> str:
    return str(ray.get_runtime_context().namespace)


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name)
    except ValueError:
        return None


def _make(name: str, start: Start, guard: str, cluster: Cluster) -> Any:
    """Ask for a bundle and for the actor in it; Ray makes it when there is room."""
    bundle = start.need.bundle
    group_name = f"{cluster.namespace}/{name}"
    try:
        group = get_placement_group(group_name)
    except ValueError:
        group = placement_group(
            [bundle], strategy="STRICT_PACK", name=group_name, lifetime="detached"
        )
    others = {k: v for k, v in bundle.items() if k not in {"CPU", "GPU", "memory"}}
    options: dict[str, Any] = {
        "name": name,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_concurrency": 16,  # a question that waits must not keep a signal
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "resources": others,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group),
    }
    if "memory" in bundle:
        options["memory"] = bundle["memory"]
    if cluster.runtime_env:
        options["runtime_env"] = cluster.runtime_env
    mark = f"DOHERTY_LAUNCH_ID={start.launch_id}"
    actor = ray.remote(EngineActor).options(**options)
    return actor.remote(guard, mark, start.argv, start.env, start.ports, _where)


def _where() -> tuple[str, str]:
    """Return the address of the node that this runs on, and its name."""
    return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()


def _clear(name: str, actor: Any) -> None:
    """Leave nothing of a launch: the actor's end ends its engine."""
    if actor is not None:
        ray.kill(actor)
    with suppress(ValueError):
        remove_placement_group(get_placement_group(f"{_namespace()}/{name}"))


def _end_in_words(launched: Launched, error: RayActorError) -> str:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if launched.node and launched.node not in alive:
        return f"its node {launched.host} is gone"
    return f"its actor ended: {one_line(error)}"


def _waits_in_words(launched: Launched, waited_s: float) -> tuple[str, bool]:
    """Say what one waits for that has been asked for and is not there yet, and whether in vain."""
    try:
        group = get_placement_group(f"{_namespace()}/{PREFIX}{launched.launch_id}")
        state = placement_group_table(group)["state"]
    except (ValueError, KeyError):
        state = ""
    if state != "PENDING":
        return "its node starts it" if state == "CREATED" else "waits for the cluster", False
    nodes = [node for node in ray.nodes() if node["Alive"]]
    host = launched.need.node
    if host and host not in {node["NodeManagerAddress"] for node in nodes}:
        return f"its node {host} is gone", True
    if host and waited_s > ROOM_S_MAX:
        return f"somebody else has the GPUs of node {host}", True
    has = [node["Resources"] for node in nodes]
    return waits_for(launched.need, has, ray.available_resources()), False


def _nodes() -> tuple[Node, ...]:
    """Look at the nodes. What each has free, only who is in the cluster is told."""
    free = ray.get(_FREE.remote()) if ray.util.client.ray.is_connected() else _free()
    return nodes_of(ray.nodes(), free, placement_group_table().values(), _namespace())


def _free() -> dict[str, dict[str, float]]:
    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


_FREE = ray.remote(num_cpus=0)(_free)


def _future(ref: Any) -> asyncio.Future[Any]:
    return asyncio.wrap_future(ref.future())


async def run(news_fd: int) -> int:
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    cluster = msgspec.json.decode(await reader.readline(), type=Cluster)
    bridge = Bridge(cluster, news_fd)
    try:
        await asyncio.to_thread(bridge.connect)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        bridge.tell(Failed(one_line(error)))
        return 1
    bridge.begin()
    decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
    while line := await reader.readline():
        bridge.obey(decoder.decode(line))
    return 0


def main() -> None:
    news_fd = os.dup(1)
    os.dup2(2, 1)  # whatever Ray prints is no news
    status = asyncio.run(run(news_fd))
    os._exit(status)  # not through Ray's farewells: nothing here is to be saved


if __name__ == "__main__":
    main()

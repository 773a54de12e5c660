"""Stage one on a Ray cluster: this process hands units to workers, each with a teacher, and adds up what they report.

Units are calls of an actor's method, a few ahead of its work; a worker that dies
is replaced, and what it had comes again. Leases protect the units from other runs, and from a dead worker's ghost.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from tinymim.configs.errors import InternalError, RecipeError, TinymimError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.sections import ClusterConfig
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import say
from tinymim.stages.run.ray import join_ray
from tinymim.stages.units.board import CacheBoard
from tinymim.stages.units.job import TeacherJob
from tinymim.stages.units.ledger import LOOK_AGAIN_S, Ledger, UnitReport
from tinymim.stages.units.prepare import cache_place, prepare
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter

CALLS_AT_ONCE = 1000  # of one worker: units ahead wait in it, each in a thread, for their turn
CLOSE_S = 20.0  # a worker's time to commit what is whole
WAIT_S = 1.0
SAY_AGAIN_S = 60.0


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster, or begin one on this machine; where this process is in one already, use that.

    To be entered before `StopFlag`: a Ray that begins here takes the signals for itself.

    Raises:
        RecipeError: there is no such cluster.
    """
    if ray.is_initialized():
        yield
        return
    join_ray(config.address)
    try:
        yield
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- a worker


class CacheWorker:
    """The actor: a teacher on its share of a GPU, or on CPUs. Errors of ours come back as values, whole."""

    def __init__(self) -> None:
        self.requested = self.requeue = False  # as a job wants to be told to stop
        self._inbox: queue.Queue[UnitId] = queue.Queue()
        self._promised: dict[UnitId, Future[UnitReport | TinymimError]] = {}
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None

    def open(self, recipe: CacheTeacherRecipe, source: ShardSet) -> int | TinymimError:
        """Load the teacher, join the cache's writers, begin to work. The number of units to send ahead."""
        try:
            assert recipe.cluster is not None
            gpus = recipe.cluster.gpus_per_worker
            if not gpus and recipe.run.device == "auto":  # Ray hides no GPU from an actor that asks for none
                recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cpu"})})
            if 0 < gpus < 1 and torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(gpus)
            parts = prepare(recipe, source)
            writer = CacheWriter.open(cache_place(recipe, parts.manifest), parts.manifest, recipe.lease_s)
            try:
                job = TeacherJob(recipe, parts.device, source, parts.teacher, writer)
            except BaseException:
                writer.close()
                raise
        except TinymimError as error:
            return error
        self._thread = threading.Thread(target=self._work, args=(job, writer), name="tinymim-worker", daemon=True)
        self._thread.start()
        return job.units_ahead

    def compute(self, unit: UnitId) -> UnitReport | TinymimError:
        """Make a unit; returns when it is committed, or when it is clear that it will not be."""
        promise: Future[UnitReport | TinymimError] = Future()
        self._promised[unit] = promise
        self._inbox.put(unit)
        if isinstance(self._broken, TinymimError):
            return self._broken
        if self._broken is not None:
            raise self._broken
        return promise.result()

    def close(self) -> None:
        """Stop at the next batch, commit what is whole, and give back the leases."""
        self.requested = True
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _work(self, job: TeacherJob, writer: CacheWriter) -> None:
        try:
            with writer:
                job.run(self, self)
        except Interrupted:
            pass
        except BaseException as error:
            self._broken = error
            for promise in self._open_promises():
                if isinstance(error, TinymimError):
                    promise.set_result(error)
                else:
                    promise.set_exception(error)
        for unit, promise in list(self._promised.items()):
            if not promise.done():
                promise.set_result(UnitReport(unit, "unfinished"))

    def _open_promises(self) -> list[Future[UnitReport | TinymimError]]:
        return [promise for promise in list(self._promised.values()) if not promise.done()]

    # ---- as the job's source of units

    def take(self, may_wait: bool) -> UnitId | None:
        """The next unit that was sent."""
        with suppress(queue.Empty):
            return self._inbox.get(may_wait, timeout=0.05)
        return None

    @property
    def more_may_come(self) -> bool:
        """Until it is closed."""
        return not self.requested

    def settle(self, report: UnitReport) -> None:
        """Answer the call about a unit, or keep it for another try."""
        if report.outcome == "unfinished":
            self._inbox.put(report.unit)
        else:
            self._promised.pop(report.unit).set_result(report)

    def advance(self, unit: UnitId, views: int) -> None:
        """Whole units are counted, where they are added up."""


# ---------------------------------------------------------------- all of them, seen from here


@dataclass(eq=False)
class _Member:
    """A worker and what it has been sent, the oldest first. `units_ahead` is 0 until it is open."""

    actor: Any
    units_ahead: int = 0
    units: list[UnitId] = field(default_factory=list)


class Crew:
    """The workers of one run.

    Args:
        recipe: of the cache, with a cluster.
        source: the shards.
        ledger: of the units.
        board: is told what becomes of them.

    Raises:
        RecipeError: the cluster has no room for a single worker, and none is asked for by number.
    """

    def __init__(self, recipe: CacheTeacherRecipe, source: ShardSet, ledger: Ledger, board: CacheBoard) -> None:
        assert recipe.cluster is not None
        self.config, self.ledger, self.board, self.retries = recipe.cluster, ledger, board, recipe.retries
        self._recipe, self._source = ray.put(recipe), ray.put(source)
        self._flights: dict[Any, tuple[_Member, UnitId | None]] = {}  # by the call's reference; None: `open`
        self._deaths = 0  # since the last commit
        self._waiting_since_s = time.monotonic()
        self.members = [self._start() for _ in range(min(self._wanted(), max(1, len(ledger.left()))))]
        say(f"cache-teacher: {len(self.members)} workers on {len(_nodes())} nodes")

    def work(self, stop: StopFlag) -> None:
        """Until every unit is committed or given up.

        Raises:
            Interrupted: a signal came.
            TinymimError: what a worker raised that is no fault of a unit.
            InternalError: workers die, one after the other, and nothing gets done.
        """
        looked_s = time.monotonic()
        while True:
            if stop.requested:
                raise Interrupted("committed units are safe; the same command continues", stop.requeue)
            if self.ledger.idle and time.monotonic() - looked_s > (LOOK_AGAIN_S if self.ledger.left() else 0):
                looked_s = time.monotonic()
                if not self.ledger.look():
                    return
            self._hand_out()
            for call in self._next_landed():
                if call in self._flights:  # not so where its worker has died by an earlier one's word
                    self._landed(call)
            self.board.meter.advance(0)
            self._say_if_nobody_works()

    def stop(self, politely: bool) -> None:
        """End all workers; politely: they commit what is whole and give back their leases, within `CLOSE_S`."""
        closing = [member.actor.close.remote() for member in self.members if member.units_ahead]
        if closing and politely:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for member in self.members:
            ray.kill(member.actor)

    def _next_landed(self) -> list[Any]:
        """Calls that have come back, after a wait of `WAIT_S` at most."""
        if not self._flights:  # other jobs have all that is left
            time.sleep(WAIT_S)
            return []
        return ray.wait(list(self._flights), timeout=WAIT_S)[0]

    def _wanted(self) -> int:
        if self.config.workers is not None:
            return self.config.workers
        room = sum(self._room(resources) for resources in _nodes())
        if not room:
            raise RecipeError(
                "the Ray cluster has no room for a worker",
                got="; ".join(f"{node.get('GPU', 0):g} GPU, {node.get('CPU', 0):g} CPU" for node in _nodes()),
                expected=f"{self.config.gpus_per_worker:g} GPU and {self.config.cpus_per_worker:g} CPU on one node",
                hint="cluster.gpus_per_worker: 0 works on CPUs; cluster.workers: N waits for nodes that are to come",
            )
        return room

    def _room(self, resources: dict[str, float]) -> int:
        by_cpu = resources.get("CPU", 0.0) / self.config.cpus_per_worker
        gpus, each = resources.get("GPU", 0.0), self.config.gpus_per_worker
        return int(by_cpu if not each else min(by_cpu, gpus * int(1 / each + 1e-6) if each < 1 else gpus))

    def _start(self) -> _Member:
        options = {
            "num_cpus": self.config.cpus_per_worker,
            "num_gpus": self.config.gpus_per_worker,
            "max_concurrency": CALLS_AT_ONCE,
            "max_restarts": 0,  # a new one is hired: what the old one had is known here
            "scheduling_strategy": "SPREAD",
        }
        member = _Member(ray.remote(CacheWorker).options(**options).remote())
        self._flights[member.actor.open.remote(self._recipe, self._source)] = member, None
        return member

    def _hand_out(self) -> None:
        """Give units to those who have the fewest, no more ahead than they need, nor than their share of the rest."""
        share = -(-len(self.ledger.left()) // len(self.members))
        while True:
            free = [member for member in self.members if len(member.units) < min(member.units_ahead, share)]
            unit = self.ledger.take() if free else None
            if unit is None:
                return
            member = min(free, key=lambda one: len(one.units))
            member.units.append(unit)
            self._flights[member.actor.compute.remote(unit)] = member, unit

    def _landed(self, call: Any) -> None:
        member, unit = self._flights[call]
        try:
            answer = ray.get(call)
        except RayError as error:
            return self._replace(member, error)
        del self._flights[call]
        if isinstance(answer, TinymimError):
            raise answer
        if unit is None:
            member.units_ahead = answer
        else:
            member.units.remove(unit)
            self._deaths = 0 if answer.outcome == "committed" else self._deaths
            self.board.settle(answer)

    def _replace(self, member: _Member, error: RayError) -> None:
        """A worker has died or is broken. The unit it was at may be why; those behind it are not."""
        cause = getattr(error, "cause", None) or error
        reason = f"its worker is lost ({type(cause).__name__}: {_reason(cause)})"
        say(f"cache-teacher: a worker is lost and replaced: {type(cause).__name__}: {_reason(cause)}")
        self._flights = {call: flight for call, flight in self._flights.items() if flight[0] is not member}
        self.members.remove(member)
        ray.kill(member.actor)
        for unit in reversed(member.units[1:]):
            self.board.settle(UnitReport(unit, "unfinished"))
        for unit in member.units[:1]:
            self.board.settle(UnitReport(unit, "failed", reason))
        self._deaths += 1
        if self._deaths > (self.retries + 1) * (len(self.members) + 1):
            raise InternalError(
                f"{self._deaths} workers were lost since the last unit was committed",
                got=_reason(cause),
                hint="the logs of the workers are in Ray's session folder, /tmp/ray/session_latest/logs",
            )
        self.members.append(self._start())

    def _say_if_nobody_works(self) -> None:
        now_s = time.monotonic()
        if any(member.units for member in self.members):
            self._waiting_since_s = now_s
        elif now_s - self._waiting_since_s > SAY_AGAIN_S:
            self._waiting_since_s = now_s
            waiting = sum(not member.units_ahead for member in self.members)
            say(
                f"cache-teacher: waiting: {waiting} of {len(self.members)} workers have not begun (no room in the "
                f"cluster?), {len(self.ledger.left())} units are left, of which other jobs may have some"
            )


def _nodes() -> list[dict[str, float]]:
    """What each living node of the cluster has, by Ray's names."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _reason(error: BaseException) -> str:
    """The first sentence of what Ray says of a death; the others are for those who know Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("The actor is dead")]
    return (told or lines or [type(error).__name__])[0].split(". ")[0][:200]

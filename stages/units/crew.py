"""Stage one on a Ray cluster: this driver sends units to workers, each with a teacher, and adds up their reports.

A unit is a call of an actor's method, sent a few units ahead of the work. A worker that dies is replaced, and its
units are sent again. Leases keep other runs away from a unit, and also a worker that Ray only believes dead.
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

from tinymim.configs.errors import InternalError, LoaderKilled, RecipeError, TinymimError, is_final
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.sections.run import ClusterConfig
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import logger
from tinymim.stages.run.ray import join_ray
from tinymim.stages.units.board import CacheBoard
from tinymim.stages.units.job import TeacherJob
from tinymim.stages.units.ledger import LOOK_AGAIN_S, Ledger, UnitReport
from tinymim.stages.units.prepare import cache_place, prepare
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter

CALLS_AT_ONCE = 1000  # per worker: each unit sent ahead waits in a thread of the actor
CLOSE_S = 20.0  # the time a worker has to commit whole units
WAIT_S = 1.0
SAY_AGAIN_S = 60.0


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster, or start one on this machine; a process that is in a cluster already stays in it.

    Enter before `StopFlag`: a Ray that starts here installs signal handlers of its own.

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
    """The actor: a teacher on its share of a GPU, or on CPUs.

    It is the job's `Units` and `Stop` as well. A TinymimError is returned, not raised: Ray would wrap it.
    """

    def __init__(self) -> None:
        self.requested = self.requeue = False  # the `Stop` protocol
        self._inbox: queue.Queue[UnitId] = queue.Queue()
        self._promised: dict[UnitId, Future[UnitReport | TinymimError]] = {}
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None

    def open(self, recipe: CacheTeacherRecipe, source: ShardSet) -> int | TinymimError:
        """Load the teacher, join the cache's writers and start working; returns the number of units to send ahead."""
        try:
            assert recipe.cluster is not None
            gpus = recipe.cluster.gpus_per_worker
            if not gpus and recipe.run.device == "auto":  # Ray hides no GPU from an actor that asks for none
                recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cpu"})})
            if 0 < gpus < 1 and torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(gpus)
            parts = prepare(recipe, source)
            place = cache_place(recipe, parts.layers)
            writer = CacheWriter.open(place, parts.manifest, list(parts.layers.values()), recipe.lease_s)
            try:
                job = TeacherJob(recipe, parts.device, source, parts.teachers, writer)
            except BaseException:
                writer.close()
                raise
        except TinymimError as error:
            return error
        self._thread = threading.Thread(target=self._work, args=(job, writer), name="tinymim-worker", daemon=True)
        self._thread.start()
        return job.units_ahead

    def compute(self, unit: UnitId) -> UnitReport | TinymimError:
        """Make a unit; returns its report when it is committed, failed or given back."""
        promise: Future[UnitReport | TinymimError] = Future()
        # The promise comes first: the job's thread may settle the unit as soon as it is in the inbox.
        self._promised[unit] = promise
        self._inbox.put(unit)
        # Checked only now: `_work` may have broken between an earlier check and the promise, and nobody would keep it.
        if isinstance(self._broken, TinymimError) and is_final(self._broken):
            return self._broken
        if self._broken is not None:
            raise self._broken
        return promise.result()

    def close(self) -> None:
        """Stop at the next batch, commit whole units and give back the leases."""
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
        # Every call must return, or its driver would wait for ever. The list is a copy: calls go on arriving.
        for unit, promise in list(self._promised.items()):
            if promise.done():
                continue
            if self._broken is None:
                promise.set_result(UnitReport(unit, "unfinished"))
            elif isinstance(self._broken, TinymimError) and is_final(self._broken):
                promise.set_result(self._broken)
            else:
                promise.set_exception(self._broken)

    # ---- the job's `Units`

    def take(self, may_wait: bool) -> UnitId | None:
        """The next unit that the driver sent."""
        with suppress(queue.Empty):
            return self._inbox.get(may_wait, timeout=0.05)
        return None

    @property
    def more_may_come(self) -> bool:
        """True until the worker is closed."""
        return not self.requested

    def settle(self, report: UnitReport) -> None:
        """Return the report to the unit's call; an unfinished unit is queued again."""
        if report.outcome == "unfinished":
            self._inbox.put(report.unit)
        else:
            self._promised.pop(report.unit).set_result(report)

    def advance(self, unit: UnitId, views: int) -> None:
        """Does nothing: the driver counts whole units."""


# ---------------------------------------------------------------- the driver


@dataclass(eq=False)
class _Member:
    """A worker and the units it was sent, oldest first. `units_ahead` is 0 until the worker is open."""

    actor: Any
    units_ahead: int = 0
    units: list[UnitId] = field(default_factory=list)


class Crew:
    """The workers of one run.

    Args:
        recipe: the cache recipe, with a cluster.
        source: the shards.
        ledger: the ledger of units.
        board: the board that adds up reports.

    Raises:
        RecipeError: the cluster has no room for a single worker, and `cluster.workers` is not set.
    """

    def __init__(self, recipe: CacheTeacherRecipe, source: ShardSet, ledger: Ledger, board: CacheBoard) -> None:
        assert recipe.cluster is not None
        self.config, self.ledger, self.board, self.retries = recipe.cluster, ledger, board, recipe.retries
        self._recipe, self._source = ray.put(recipe), ray.put(source)  # once, not once per worker
        self._calls: dict[Any, tuple[_Member, UnitId | None]] = {}  # by the call's reference; None: a call of `open`
        self._deaths = 0  # since the last commit
        self._idle_since_s = time.monotonic()
        self.members = [self._start() for _ in range(min(self._wanted(), max(1, len(ledger.left()))))]
        logger.info(f"cache-teacher: {len(self.members)} workers on {len(_nodes())} nodes")

    def work(self, stop: StopFlag) -> None:
        """Send units until every one is committed or given up.

        Raises:
            Interrupted: a signal came.
            TinymimError: a worker's error that no single unit caused.
            InternalError: workers die one after the other and commit nothing.
        """
        looked_s = time.monotonic()
        while True:
            if stop.requested:
                raise Interrupted("committed units are safe; the same command continues", stop.requeue)
            # A look lists the cache, so it is due only when this run has nothing to do: other jobs may have committed
            # their units by then, or died and left them.
            if self.ledger.idle and time.monotonic() - looked_s > (LOOK_AGAIN_S if self.ledger.left() else 0):
                looked_s = time.monotonic()
                if not self.ledger.look():
                    return
            self._send_units()
            for call in self._finished_calls():
                if call in self._calls:  # `_replace` drops all calls of a dead worker at its first error
                    self._receive(call)
            self.board.meter.advance(0)  # keeps the meter's line and status.json current
            self._say_if_nobody_works()

    def stop(self, politely: bool) -> None:
        """End all workers. If `politely`, they first commit whole units and give back leases, within `CLOSE_S`."""
        closing = [member.actor.close.remote() for member in self.members if member.units_ahead]
        if closing and politely:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for member in self.members:
            ray.kill(member.actor)

    def _finished_calls(self) -> list[Any]:
        """References of finished calls, after a wait of at most `WAIT_S`."""
        if not self._calls:  # other jobs hold all units that are left, and `ray.wait` rejects an empty list
            time.sleep(WAIT_S)
            return []
        return ray.wait(list(self._calls), timeout=WAIT_S)[0]

    def _wanted(self) -> int:
        """Workers to start: as many as the recipe names, else as many as fit on the nodes."""
        if self.config.workers is not None:
            return self.config.workers
        room = sum(self._room(resources) for resources in _nodes())
        if not room:
            raise RecipeError(
                "the Ray cluster has no room for a worker",
                got="; ".join(f"{node.get('GPU', 0):g} GPU, {node.get('CPU', 0):g} CPU" for node in _nodes()),
                expected=f"{self.config.gpus_per_worker:g} GPU and {self.config.cpus_per_worker:g} CPU on one node",
                hint="cluster.gpus_per_worker: 0 works on CPUs; cluster.workers: N waits for nodes to join",
            )
        return room

    def _room(self, resources: dict[str, float]) -> int:
        """Workers that fit on a node; fractions of a GPU do not add up across GPUs."""
        by_cpu = resources.get("CPU", 0.0) / self.config.cpus_per_worker
        gpus, each = resources.get("GPU", 0.0), self.config.gpus_per_worker
        return int(by_cpu if not each else min(by_cpu, gpus * int(1 / each + 1e-6) if each < 1 else gpus))

    def _start(self) -> _Member:
        options = {
            "num_cpus": self.config.cpus_per_worker,
            "num_gpus": self.config.gpus_per_worker,
            "max_concurrency": CALLS_AT_ONCE,
            "max_restarts": 0,  # `_replace` starts a new one: Ray would not send the old one's units again
            "scheduling_strategy": "SPREAD",
        }
        member = _Member(ray.remote(CacheWorker).options(**options).remote())
        self._calls[member.actor.open.remote(self._recipe, self._source)] = member, None
        return member

    def _send_units(self) -> None:
        """Send units to the workers that have the fewest."""
        # No worker gets more than its share of the rest: near the end, units queued at one would leave others idle.
        share = -(-len(self.ledger.left()) // len(self.members))
        while True:
            free = [member for member in self.members if len(member.units) < min(member.units_ahead, share)]
            unit = self.ledger.take() if free else None
            if unit is None:
                return
            member = min(free, key=lambda one: len(one.units))
            member.units.append(unit)
            self._calls[member.actor.compute.remote(unit)] = member, unit

    def _receive(self, call: Any) -> None:
        member, unit = self._calls[call]
        try:
            answer = ray.get(call)
        except RayError as error:
            return self._replace(member, error)
        del self._calls[call]
        if isinstance(answer, TinymimError):
            raise answer
        if unit is None:
            member.units_ahead = answer
        else:
            member.units.remove(unit)
            self._deaths = 0 if answer.outcome == "committed" else self._deaths
            self.board.settle(answer)

    def _replace(self, member: _Member, error: RayError) -> None:
        """Start a new worker for one that is dead or broken, and settle its units."""
        cause = getattr(error, "cause", None) or error
        reason = f"its worker is lost ({type(cause).__name__}: {_reason(cause)})"
        logger.info(f"cache-teacher: a worker is lost and replaced: {type(cause).__name__}: {_reason(cause)}")
        self._calls = {call: sent for call, sent in self._calls.items() if sent[0] is not member}
        self.members.remove(member)
        ray.kill(member.actor)  # it may be broken and still alive, and hold its GPU
        # Only the oldest unit may have killed the worker, so only that one counts a failure. The others return to the
        # head of the queue; reversed, because each is put before the one settled earlier.
        for unit in reversed(member.units[1:]):
            self.board.settle(UnitReport(unit, "unfinished"))
        for unit in member.units[:1]:
            self.board.settle(UnitReport(unit, "failed", reason))
        # As many deaths as all workers and retries could cause: then the cause is the cluster or the recipe, not units.
        self._deaths += 1
        if self._deaths > (self.retries + 1) * (len(self.members) + 1):
            if isinstance(cause, LoaderKilled):
                raise cause
            raise InternalError(
                f"{self._deaths} workers were lost since the last unit was committed",
                got=_reason(cause),
                hint="the logs of the workers are in Ray's session folder, /tmp/ray/session_latest/logs",
            )
        self.members.append(self._start())

    def _say_if_nobody_works(self) -> None:
        now_s = time.monotonic()
        if any(member.units for member in self.members):
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s > SAY_AGAIN_S:
            self._idle_since_s = now_s
            waiting = sum(not member.units_ahead for member in self.members)
            logger.info(
                f"cache-teacher: waiting: {waiting} of {len(self.members)} workers have not started (no room in the "
                f"cluster?), {len(self.ledger.left())} units are left, some perhaps held by other jobs"
            )


def _nodes() -> list[dict[str, float]]:
    """The resources of each living node, by Ray's names."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _reason(error: BaseException) -> str:
    """The first sentence of Ray's report of a death; the rest is advice about Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    deaths = [line for line in lines if line.startswith("The actor is dead")]
    return (deaths or lines or [type(error).__name__])[0].split(". ")[0][:200]

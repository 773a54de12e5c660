"""Fill a cache: compute every missing unit, in this process or on a cluster; several jobs may fill one cache."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.run.folder import RunFolder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.stages.units.board import CacheBoard, raise_failures
from tinymim.stages.units.job import TeacherJob
from tinymim.stages.units.ledger import LOOK_AGAIN_S, Ledger, UnitReport, missing_units
from tinymim.stages.units.prepare import Prepared, cache_place
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter


def fill(recipe: CacheTeacherRecipe, parts: Prepared, cut_like: Collection[UnitId] = ()) -> None:
    """Write or complete the recipe's cache; other jobs may do the same at the same time, and a stopped run resumes.

    Args:
        recipe: the cache recipe to run.
        parts: the source, teachers, manifest and layers, from `prepare`; further layers than the recipe's are left out.
        cut_like: former units of the layers; their missing views become the same units again, not parts of longer ones.

    Raises:
        CacheMismatch: the existing cache was made from another recipe or other data.
        UnitsFailed: some units could not be made; the others are committed.
        Interrupted: stopped by a signal; committed units are safe.
    """
    source, manifest = parts.source, parts.manifest
    layers = {name: parts.layers[name] for name in recipe.layers}
    named = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"

    # ---- join the jobs that write this cache
    place = cache_place(recipe, layers)
    with (
        _cluster(recipe),
        CacheWriter.open(place, manifest, list(layers.values()), recipe.lease_s) as writer,
        RunFolder(recipe, None) as log,  # a metric line per committed unit, of every job
        StopFlag() as stop,
    ):
        for difference in writer.environment_differences:
            logger.info(f"cache-teacher: warning: {difference}")
        record_bytes = sum(
            spec.size_bytes for name, layer in layers.items() for spec in parts.kinds[name].specs(layer.shapes)
        )
        logger.info(
            f"cache-teacher: {source.num_samples:,} images x {recipe.num_views} views x {record_bytes / 1024:.1f} KiB "
            f"= {source.num_samples * recipe.num_views * record_bytes / 2**30:.2f} GiB before compression, "
            + "; ".join(f"layer {name}, spec {layer.spec_id}" for name, layer in layers.items())
        )
        if recipe.further_sizes:
            sizes = ", ".join(map(str, (recipe.views.size, *recipe.further_sizes)))
            logger.info(f"cache-teacher: every view is rendered at {sizes} px, and has a digest at each size")

        def missing() -> list[UnitId]:
            held = [writer.refresh(name) for name in layers]
            view_units = [unit for name in writer.view_layers for unit in writer.refresh(name)]
            return missing_units(source, held, view_units, recipe.num_views, recipe.views_per_unit, cut_like)

        ledger = Ledger(missing, recipe.retries)
        is_complete = "is complete" if len(layers) == 1 else "are complete"
        complete = f"{named} of {place} {is_complete}: {recipe.num_views} views of every image"
        if not ledger.left():
            logger.info(f"cache-teacher: nothing to do, {complete}")
            return

        # ---- teacher over every batch; a unit is written when its last batch is encoded
        with Meter("cache-teacher", 0, "views") as meter:
            board = CacheBoard(ledger, source, meter, log, counts_batches=recipe.cluster is None)
            meter.total = board.views_left()
            if recipe.cluster is None:
                job = TeacherJob(recipe, parts.device, source, parts.teachers, writer)
                _work_here(job, ledger, board, stop)
            else:
                _work_on_cluster(recipe, source, ledger, board, stop)
    raise_failures(ledger, f"{named} of {place}")
    logger.info(f"cache-teacher: {complete}; `tinymim cache info {place}` describes it")


# ---------------------------------------------------------------- in this process


class _LedgerUnits:
    """The `Units` of a job in this process."""

    more_may_come = False  # the ledger knows all units from the start

    def __init__(self, ledger: Ledger, board: CacheBoard) -> None:
        self._ledger, self._board = ledger, board

    def take(self, may_wait: bool) -> UnitId | None:
        return self._ledger.take()

    def settle(self, report: UnitReport) -> None:
        self._board.settle(report)

    def advance(self, unit: UnitId, views: int) -> None:
        self._board.advance(unit, views)


def _work_here(job: TeacherJob, ledger: Ledger, board: CacheBoard, stop: StopFlag) -> None:
    """Run rounds of the job until the cache is complete."""
    waiting_for = ""
    elsewhere: set[UnitId] = set()
    while ledger.look():
        # Units that other jobs held in the last round: this job waits for them, because a job that dies leaves its
        # units to whoever claims them once its leases have expired.
        if elsewhere:
            holders = ", ".join(map(str, job.writer.holders(elsewhere))) or "another job"
            if holders != waiting_for:  # once per set of holders, not every two seconds
                logger.info(
                    f"cache-teacher: {holders} is at work on all that is left: waiting, to take over if it dies"
                )
                waiting_for = holders
            time.sleep(LOOK_AGAIN_S if not stop.requested else 0)
            if stop.requested:
                raise Interrupted("committed units are safe; the same command continues", stop.requeue)
        job.run(_LedgerUnits(ledger, board), stop)
        elsewhere = ledger.elsewhere()


# ---------------------------------------------------------------- on a cluster


@contextmanager
def _cluster(recipe: CacheTeacherRecipe) -> Iterator[None]:
    if recipe.cluster is None:
        yield
        return
    from tinymim.stages.units.crew import connected  # Ray is an extra

    with connected(recipe.cluster):
        yield


def _work_on_cluster(
    recipe: CacheTeacherRecipe, source: ShardSet, ledger: Ledger, board: CacheBoard, stop: StopFlag
) -> None:
    from tinymim.stages.units.crew import Crew

    crew = Crew(recipe, source, ledger, board)
    politely = False  # after an error there is no point in waiting for workers
    try:
        crew.work(stop)
        politely = True
    except Interrupted:
        politely = True
        raise
    finally:
        crew.stop(politely)

"""How far a cache is: one line for people and one of JSON for every committed unit, whoever made it."""

from collections import Counter

from tinymim.configs.errors import UnitsFailed
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.run.folder import RunFolder
from tinymim.stages.run.progress import Meter, say
from tinymim.stages.units.ledger import Ledger, UnitReport
from tinymim.stages.units.timing import percentages, shares
from tinymim.storage.layout import UnitId

LISTED = 20


class CacheBoard:
    """Adds up what the jobs of one run report, for the meter and the run folder.

    Args:
        ledger: of the units.
        source: the shards.
        meter: of views.
        log: gets a line per committed unit.
        counts_batches: the job calls `advance`; else views are counted when their unit is committed.
    """

    def __init__(self, ledger: Ledger, source: ShardSet, meter: Meter, log: RunFolder, counts_batches: bool) -> None:
        self.ledger, self.meter, self.log, self._counts_batches = ledger, meter, log, counts_batches
        self._samples = {shard.name: shard.num_samples for shard in source.shards}
        self._seconds: Counter[str] = Counter()
        self._begun: Counter[UnitId] = Counter()  # views of units in hand that the meter has counted
        self.images = self.stored_bytes = 0

    def settle(self, report: UnitReport) -> None:
        """Note what became of a unit, and say what a person should know of it."""
        given_up = self.ledger.settle(report)
        del self._begun[report.unit]
        self._seconds.update(report.seconds)
        self.log.session.device_s = self._seconds["wall"]  # of all workers, each with a device
        if report.outcome == "failed":
            then = "given up" if given_up else "to be tried again"
            say(f"cache-teacher: unit {report.unit} failed, {then}: {report.reason}")
        if report.outcome == "committed":
            self._count(report)
        # A unit that fails comes again, and others may have committed theirs.
        self.meter.total = self.meter.done + self.views_left()

    def advance(self, unit: UnitId, views: int) -> None:
        """Count views of a unit that is in hand."""
        self._begun[unit] += views
        self.meter.advance(views)

    def _count(self, report: UnitReport) -> None:
        self.images += report.images
        self.stored_bytes += report.stored_bytes
        if not self._counts_batches:
            self.meter.advance(report.views)
        self.meter.advance(0, self.note())
        self.log.log(self.ledger.committed, records=report.views, **self.numbers())

    def views_left(self) -> int:
        """Views still to come, whoever makes them, if all images can be read."""
        return sum(unit.num_views * self._samples[unit.shard] - self._begun[unit] for unit in self.ledger.left())

    def numbers(self) -> dict[str, float]:
        """For JSON: rates of this run, what it has written, what it waits for."""
        rate = self.meter.rate
        return {
            "views_per_s": rate,
            "images_per_s": self.images_per_s(),
            "gib_written": self.stored_bytes / 2**30,
            "units_left": len(self.ledger.left()),
            "units_failed": len(self.ledger.failures),
            "eta_s": self.views_left() / rate if rate else -1.0,
            **{f"{phase}_share": share for phase, share in shares(self._seconds).items()},
        }

    def images_per_s(self) -> float:
        """Images of committed units, in the time of the meter."""
        return self.images / max(self.meter.elapsed_s, 1e-9)

    def note(self) -> str:
        """What stands beside the meter's count of views."""
        units, left = self.ledger.committed, len(self.ledger.left())
        failed = f", {len(self.ledger.failures)} failed" if self.ledger.failures else ""
        return (
            f"{units:,}/{units + left:,} units{failed}, {self.images_per_s():,.1f} images/s, "
            f"{self.stored_bytes / 2**30:.2f} GiB, {percentages(self._seconds)}"
        )


def raise_failures(ledger: Ledger, place: object) -> None:
    """Raises UnitsFailed if units were given up, naming them."""
    if not ledger.failures:
        return
    lines = [f"\n  {unit}: {reason}" for unit, reason in sorted(ledger.failures.items())]
    more = f"\n  and {len(lines) - LISTED} more, named above as they failed" if len(lines) > LISTED else ""
    raise UnitsFailed(
        f"{len(lines)} unit(s) of {place} could not be made; all the others are committed:"
        + "".join(lines[:LISTED])
        + more,
        hint="mend these shards and run the same command again, or train on what there is with on_missing: skip",
    )

"""Progress of a cache: the meter's line, and one line of metrics per committed unit."""

from collections import Counter

from tinymim.configs.errors import UnitsFailed
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.run.folder import RunFolder
from tinymim.stages.run.progress import Meter, logger
from tinymim.stages.units.ledger import Ledger, UnitReport
from tinymim.stages.units.timing import percentages, shares
from tinymim.storage.layout import UnitId

LISTED = 20  # failed units that an error names


class CacheBoard:
    """Adds up the reports of a run's workers, for the meter and the run folder.

    Args:
        ledger: the ledger of units.
        source: the shards.
        meter: the meter that counts views.
        log: the run folder, which gets a line per committed unit.
        counts_batches: True where the job calls `advance`. False counts views when their unit is committed.
    """

    def __init__(self, ledger: Ledger, source: ShardSet, meter: Meter, log: RunFolder, counts_batches: bool) -> None:
        self.ledger, self.meter, self.log, self._counts_batches = ledger, meter, log, counts_batches
        self._samples = {shard.name: shard.num_samples for shard in source.shards}
        self._seconds: Counter[str] = Counter()
        self._begun: Counter[UnitId] = Counter()  # views that the meter has counted, by unit in progress
        self.images = self.stored_bytes = 0

    def settle(self, report: UnitReport) -> None:
        """Record a unit's report; print failures, log commits."""
        given_up = self.ledger.settle(report)
        del self._begun[report.unit]
        self._seconds.update(report.seconds)
        self.log.session.device_s = self._seconds["wall"]  # the sum over workers, each with a device of its own
        if report.outcome == "failed":
            then = "given up" if given_up else "to be tried again"
            logger.info(f"cache-teacher: unit {report.unit} failed, {then}: {report.reason}")
        if report.outcome == "committed":
            self.images += report.images
            self.stored_bytes += report.stored_bytes
            if not self._counts_batches:
                self.meter.advance(report.views)
            self.meter.advance(0, self.note())
            self.log.log(self.ledger.committed, records=report.views, **self.numbers())
        # Recomputed, not subtracted: a failed unit counts again, and other jobs commit units that this run counted in.
        self.meter.total = self.meter.done + self.views_left()

    def advance(self, unit: UnitId, views: int) -> None:
        """Count views of a unit in progress."""
        self._begun[unit] += views
        self.meter.advance(views)

    def views_left(self) -> int:
        """Views that are not made yet, including those of other jobs, if all images can be read."""
        return sum(unit.num_views * self._samples[unit.shard] - self._begun[unit] for unit in self.ledger.left())

    def numbers(self) -> dict[str, float]:
        """Metrics of this run: rates, GiB written, units left and failed, share of time by phase."""
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
        """Images of committed units per second since the meter started."""
        return self.images / max(self.meter.elapsed_s, 1e-9)

    def note(self) -> str:
        """The meter's note: units, images per second, GiB, share of time by phase."""
        units, left = self.ledger.committed, len(self.ledger.left())
        failed = f", {len(self.ledger.failures)} failed" if self.ledger.failures else ""
        return (
            f"{units:,}/{units + left:,} units{failed}, {self.images_per_s():,.1f} images/s, "
            f"{self.stored_bytes / 2**30:.2f} GiB, {percentages(self._seconds)}"
        )


def raise_failures(ledger: Ledger, owner: str) -> None:
    """Raises UnitsFailed if units of `owner` were given up; it names the first `LISTED` of them."""
    if not ledger.failures:
        return
    lines = [f"\n  {unit}: {reason}" for unit, reason in sorted(ledger.failures.items())]
    more = f"\n  and {len(lines) - LISTED} more, listed above when they failed" if len(lines) > LISTED else ""
    raise UnitsFailed(
        f"{len(lines)} unit(s) of {owner} could not be made; all the others are committed:"
        + "".join(lines[:LISTED])
        + more,
        hint="repair these shards and run the same command again, or train on the rest with on_missing: skip",
    )

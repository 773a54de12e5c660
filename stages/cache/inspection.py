"""The inspection of a whole cache, which `cache verify` and `cache repair` share."""

from dataclasses import dataclass
from typing import Any

from tinymim.stages.run.progress import Meter
from tinymim.storage.check import Finding, Survey, check_unit, survey, unit_bytes
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import Store


@dataclass(frozen=True)
class Inspection:
    """The findings of `survey` and `check_unit`, and the amount of data that was read.

    Attributes:
        survey: the state of groups, constants and commit records.
        findings: all problems; those of the survey come first.
        num_files: number of files of units.
        num_bytes: total bytes of these files, as recorded.
    """

    survey: Survey
    findings: list[Finding]
    num_files: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        manifest = self.survey.manifest
        return {
            "spec_id": manifest.spec_id,
            "sound": not self.findings,
            "covered_views": sum(
                info.unit.num_views * manifest.shards[info.unit.shard].num_samples for info in self.survey.units
            ),
            "num_views": sum(shard.num_samples for shard in manifest.source) * manifest.num_views,
            "units": len(self.survey.units),
            "files": self.num_files,
            "bytes": self.num_bytes,
            "findings": [
                {
                    "kind": found.kind,
                    "unit": str(found.unit) if found.unit else None,
                    "path": found.path,
                    "what": found.what,
                }
                for found in self.findings
            ],
            "foreign": self.survey.foreign,
            "being_written": [
                {"lease": name, "holder": str(holder) if holder else None}
                for name, holder in sorted(self.survey.writers.items())
            ],
        }


def inspect_cache(store: Store, command: str, manifest: Manifest | None = None) -> Inspection:
    """Check every byte of a cache and show progress under the name `command`; errors as `storage.check.survey`."""
    surveyed = survey(store, manifest)
    findings = list(surveyed.findings)
    with Meter(command, len(surveyed.units), "units") as meter:
        for info in surveyed.units:
            findings += check_unit(store, info)
            meter.advance(1)
    num_files = sum(len(info.files) for info in surveyed.units)
    return Inspection(surveyed, findings, num_files, sum(map(unit_bytes, surveyed.units)))

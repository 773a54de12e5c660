"""The inspection of a whole cache that `cache verify` and `cache repair` share, with its progress."""

from dataclasses import dataclass
from typing import Any

from tinymim.stages.run.progress import Meter
from tinymim.storage.check import Finding, Survey, check_unit, survey, unit_bytes
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import Store


@dataclass(frozen=True)
class Inspection:
    """What `survey` and `check_unit` found, and how much they looked at.

    Attributes:
        survey: groups, constants, commit records.
        findings: everything that is wrong, that of the survey first.
        num_files: files of units that were read.
        num_bytes: how many bytes those are, as recorded.
    """

    survey: Survey
    findings: list[Finding]
    num_files: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
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
    """Look at every byte of a cache; arguments and errors of `storage.check.survey`, and the command's name."""
    surveyed = survey(store, manifest)
    findings = list(surveyed.findings)
    with Meter(command, len(surveyed.units), "units") as meter:
        for info in surveyed.units:
            findings += check_unit(store, info)
            meter.advance(1)
    return Inspection(
        surveyed,
        findings,
        sum(len(info.files) for info in surveyed.units),
        sum(map(unit_bytes, surveyed.units)),
    )

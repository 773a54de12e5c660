"""The inspection of a whole cache, which `cache verify` and `cache repair` share."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tinymim.stages.run.progress import Meter
from tinymim.storage.check import Finding, Survey, check_unit, survey
from tinymim.storage.commit import UnitInfo
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import Store

UNITS_AT_ONCE = 4  # in an object store


@dataclass(frozen=True)
class Inspection:
    """The findings of `survey` and `check_unit`.

    Attributes:
        survey: the state of groups, layers, constants and commit records.
        findings: all problems; those of the survey come first.
    """

    survey: Survey
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        units = self.survey.units
        return {
            "spec_id": self.survey.manifest.spec_id,
            "sound": not self.findings,
            "layers": {
                layer: {
                    "units": len(units[layer]),
                    "records": sum(info.num_records for info in units[layer]),
                    "bytes": sum(info.size_bytes for info in units[layer]),
                }
                for layer in (*self.survey.view_layers, *self.survey.layers)
            },
            "units": len(self.survey.all_units()),
            "bytes": sum(info.size_bytes for info in self.survey.all_units()),
            "findings": [
                {
                    "kind": found.kind,
                    "layer": found.layer,
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
    units = surveyed.all_units()

    def check(info: UnitInfo) -> list[Finding]:
        return check_unit(store, info, surveyed.arrays(info.layer), surveyed.sizes.get(info.path))

    def all_of(found: Iterable[list[Finding]]) -> None:
        with Meter(command, len(units), "units") as meter:
            for some in found:
                findings.extend(some)
                meter.advance(1)

    if store.distant:
        with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
            all_of(pool.map(check, units))
    else:
        all_of(map(check, units))
    return Inspection(surveyed, findings)

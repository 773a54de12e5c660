"""What `make-shards` saw, took and passed over: nothing that goes in is left out in silence (I12)."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinymim.pipeline.decode import Facts
from tinymim.pipeline.tar import UNLABELLED

UNREADABLE = "unreadable image"


@dataclass
class Survey:
    """Counts of one run.

    Attributes:
        seen: files, or members of tars, by ending.
        skipped: what was passed over: count and first example, by reason.
        labels: the form in which labels were found.
        notes: sentences for the user.
        unreadable: origin and reason of each image that cannot be read.
        resized: the number of images that were made smaller.
    """

    seen: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    labels: str = "none"
    notes: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    resized: int = 0
    _colours: Counter[str] = field(default_factory=Counter)
    _orientations: Counter[int] = field(default_factory=Counter)
    _classes: Counter[int] = field(default_factory=Counter)
    _extensions: Counter[str] = field(default_factory=Counter)
    _widths: "array[int]" = field(default_factory=lambda: array("I"))
    _heights: "array[int]" = field(default_factory=lambda: array("I"))
    _size_bytes: int = 0

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Count something that is passed over."""
        before, first = self.skipped.get(reason, (0, example))
        self.skipped[reason] = (before + count, first)

    def fail(self, origin: str, reason: str) -> None:
        """List an image that cannot be read."""
        self.unreadable.append({"origin": origin, "reason": reason})
        self.skip(UNREADABLE, origin)

    def take(self, facts: Facts, size_bytes: int, label: int) -> None:
        """Count an image that is written to a shard, as it was found."""
        self._extensions[facts.extension] += 1
        self._colours[facts.colours] += 1
        self._orientations[facts.orientation] += 1
        self._widths.append(facts.width)
        self._heights.append(facts.height)
        self._size_bytes += size_bytes
        self._classes[label] += 1

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """The counts as plain JSON.

        Args:
            classes: the names of the classes by number; empty where they have none.
        """
        numbers = range(len(classes)) if classes else sorted(self._classes.keys() - {UNLABELLED})
        counts = {classes[n] if n < len(classes) else str(n): self._classes[n] for n in numbers}
        numbers_beyond = sorted(n for n in self._classes if classes and n >= len(classes))
        counts |= {str(n): self._classes[n] for n in numbers_beyond}
        shorter = sorted(map(min, self._widths, self._heights))
        return {
            "seen": dict(self.seen.most_common()),
            "taken": len(self._widths),
            "taken_by_format": dict(self._extensions.most_common()),
            "skipped": [
                {"reason": reason, "count": count, "first": first} for reason, (count, first) in self.skipped.items()
            ],
            "labels": self.labels,
            "unlabelled": self._classes[UNLABELLED],
            "classes": counts,
            "near_empty_classes": near_empty(counts),
            "width": spread(sorted(self._widths)),
            "height": spread(sorted(self._heights)),
            "short_side": spread(shorter),
            "size_bytes": self._size_bytes,
            "colours": dict(self._colours.most_common()),
            "orientations": {str(tag): self._orientations[tag] for tag in sorted(self._orientations)},
            "notes": self.notes,
        }


def near_empty(counts: dict[str, int]) -> list[str]:
    """Classes with less than two images, or less than a tenth of the median."""
    median = sorted(counts.values())[len(counts) // 2] if counts else 0
    return [name for name, count in counts.items() if count < max(2, median / 10)]


def spread(values: Sequence[int]) -> dict[str, int]:
    """Smallest, median and largest of sorted values; empty of none."""
    return {"min": values[0], "median": values[len(values) // 2], "max": values[-1]} if values else {}

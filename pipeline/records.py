"""Slices of units for one rank: read ahead by threads, each once per pass, in bounded memory (I9).

A slice is one view of one shard in one layer: an array [I, ...] per name, in the order of the shard's I cached images.
Loader workers hold none: their rank reads for all of them.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy.typing as npt

from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import UnitId

T = TypeVar("T")

Arrays = dict[str, npt.NDArray[Any]]
Units = Mapping[str, Mapping[str, Sequence[UnitInfo]]]  # by layer, then by shard, ascending by view

_THREADS: Final = 4  # reading, checksums and unpacking release the GIL


def named(layer: str, array: str) -> str:
    """The name of a layer's array among the records of a batch."""
    return f"{layer}/{array}"


def of_layer(records: Mapping[str, T], layer: str) -> dict[str, T]:
    """One layer's arrays, by their own names, among the records of a batch."""
    begin = named(layer, "")
    return {name.removeprefix(begin): array for name, array in records.items() if name.startswith(begin)}


class UnitReader(Protocol):
    """The part of a cache's reader that replaying needs."""

    def read_views(self, info: UnitInfo, views: Sequence[int], arrays: Sequence[str] | None = None) -> Arrays:
        """Arrays [k, I, ...] of k views of a unit; safe for threads."""
        ...

    def keys(self, shard: str) -> list[str]:
        """The keys of a shard's I cached images."""
        ...


class SliceId(NamedTuple):
    """The name of a slice."""

    layer: str
    shard: str
    view: int


class Slice:
    """A slice that has been read, or is being read by a thread together with other views of its unit."""

    def __init__(self, run: Future[Arrays], row: int) -> None:
        self._run, self._row = run, row

    def arrays(self) -> Arrays:
        """The arrays [I, ...] by name; waits for the thread. Raises what `UnitReader.read_views` raises."""
        return {name: array[self._row] for name, array in self._run.result().items()}


class Slices:
    """The slices that a rank needs, requested in the order of training.

    A lane keeps the `per_lane` slices per layer that it used last. Every caller keeps those it was given as long as it
    needs them. So in memory are at most lanes x `per_lane` slices per layer, and those of the batches in flight.

    Args:
        reader: the cache.
        units: the units to read from.
        arrays: names of the arrays to read, by layer.
        per_lane: number of slices to keep; `SampleOrder.slices_per_lane` is enough to read each once per pass.

    Attributes:
        pool: the threads, which take jobs in the order of submission.
    """

    def __init__(self, reader: UnitReader, units: Units, arrays: Mapping[str, Sequence[str]], per_lane: int) -> None:
        self._reader, self._units, self._arrays, self._per_lane = reader, units, arrays, per_lane
        self._kept: dict[tuple[int, str], OrderedDict[SliceId, Slice]] = {}  # by lane and layer, latest use last
        self._alive: WeakValueDictionary[SliceId, Slice] = WeakValueDictionary()
        self.pool = ThreadPoolExecutor(_THREADS, "tinymim-records")

    def request(self, lane: int, ids: Sequence[SliceId]) -> dict[SliceId, Slice]:
        """The slices by name. Threads read those that are not in memory.

        Args:
            lane: the lane whose samples need them.
            ids: the names in the order of first use, so that a lane keeps those of its next samples.
        """
        found = {name: self._alive.get(name) for name in ids}
        missing: dict[tuple[str, UnitId], tuple[UnitInfo, list[int]]] = {}
        for name in (name for name, held in found.items() if held is None):
            info = self._unit(name)
            missing.setdefault((name.layer, info.unit), (info, []))[1].append(name.view)
        read: dict[SliceId, Slice] = {}
        for (layer, unit), (info, views) in missing.items():
            run = self.pool.submit(self._reader.read_views, info, views, self._arrays[layer])
            read |= {SliceId(layer, unit.shard, view): Slice(run, row) for row, view in enumerate(views)}
        slices = {name: held or read[name] for name, held in found.items()}
        self._alive.update(read)
        for name, held in slices.items():
            kept = self._kept.setdefault((lane, name.layer), OrderedDict())
            kept[name] = held
            kept.move_to_end(name)
            if len(kept) > self._per_lane:
                kept.popitem(last=False)
        return slices

    def _unit(self, name: SliceId) -> UnitInfo:
        """The unit that holds a slice."""
        infos = self._units[name.layer][name.shard]
        return infos[bisect_right(infos, name.view, key=lambda info: info.unit.first_view) - 1]

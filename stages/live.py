"""`tinymim live`: a local web page of running and finished jobs and of caches. Reads their files; writes nothing."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from tinymim.configs.errors import RecipeError, TinymimError, UserError, first_line
from tinymim.configs.place import joined, parse_place
from tinymim.configs.strict_yaml import parse_yaml
from tinymim.stages.pages.live import page
from tinymim.stages.pages.live import policy as page_policy
from tinymim.stages.run.folder import (
    AUDIT_NAME,
    EVALUATION_NAME,
    FINETUNED_NAME,
    LOG_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    STATUS_NAME,
)
from tinymim.stages.run.local_server import Page, is_loopback, local_server, shown_host
from tinymim.stages.run.loggers import BOARD_NAME
from tinymim.stages.run.metrics import MISSING, audit_metrics, formatted, in_order, members, metric
from tinymim.stages.run.owner import LOCK_NAME
from tinymim.storage.catalog import caches_below, listed
from tinymim.storage.entries import Entry, TooLarge
from tinymim.storage.layout import LEASES
from tinymim.storage.leases import Leases
from tinymim.storage.packed import open_cache_store
from tinymim.storage.store import Store, open_store

_LIMIT_BYTES = 2**20  # of a file that is read whole
_TAIL_BYTES = 64 * 2**20  # of a file that grows, in one reading
_MOST_POINTS = 240  # of a curve
_MOST_JOBS = 200
_MOST_MESSAGES = 6
_LEAST_S = 1.0  # between two readings, however many browsers ask
_RECENT_S = 600.0

Json = dict[str, Any]
_T = TypeVar("_T")


def run(places: Sequence[Path | str], host: str, port: int, every_s: float) -> None:
    """Serve the page until Ctrl-C; prints its address.

    Raises:
        UserError: as `open_server`.
    """
    with open_server(places, host, port, every_s) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://{shown_host(host)}:{server.server_address[1]}/", flush=True)
        if not is_loopback(host):
            print("warning: everyone who reaches this port can read the page", file=sys.stderr, flush=True)
        server.serve_forever()


def open_server(
    places: Sequence[Path | str] = (), host: str = "127.0.0.1", port: int = 8360, every_s: float = 5.0
) -> ThreadingHTTPServer:
    """A server of a page of running and finished jobs, and of `/state.json`, which holds the page's data. Reads only.

    It listens from now on, and answers while its `serve_forever()` runs. `server_address` is (host, port).

    Args:
        places: run folders, caches, or folders or URLs of them; empty: `runs` and `caches` here.
        host: address to listen on. The default is reached from this machine alone.
        port: port to listen on; 0 takes any free one.
        every_s: seconds between two updates of the page.

    Raises:
        UserError: a place does not exist, or the port is taken.
    """
    places = [*map(parse_place, places)]
    places = places or [folder for folder in (Path("runs"), Path("caches")) if folder.is_dir()] or [Path()]
    for place in places:
        if isinstance(place, Path) and not place.is_dir():
            raise UserError("there is no such folder", got=place, hint="name run folders, caches, or folders of them")
    try:
        return _served(Jobs(places), host, port, every_s)
    except OSError as error:
        raise RecipeError(
            "the page cannot be served there",
            got=f"{host}, port {port}: {error.strerror or error}",
            hint="choose another --port; 0 takes any free one",
        ) from error


def _served(jobs: "Jobs", host: str, port: int, every_s: float) -> ThreadingHTTPServer:
    content = page(every_s).encode()
    pages: dict[str, Page] = {
        "/": ("text/html; charset=utf-8", lambda: content),
        "/state.json": ("application/json", lambda: json.dumps(jobs.state(), allow_nan=False).encode()),
    }
    return local_server(pages, page_policy(every_s), host, port)


# ---------------------------------------------------------------- what is read


class GrowingFile:
    """The JSON lines of a file that grows; each reading reads what was added. Lines that hold no object are skipped."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._begin()

    def _begin(self) -> None:
        self.lines: list[Json] = []
        self._done, self._last = 0, b""  # bytes that were read in whole lines, and the last of these lines

    def read(self, size_bytes: int) -> list[Json]:
        """All lines, of a file that has this size now."""
        if size_bytes < self._done:
            self._begin()
        while self._done < size_bytes:
            begin = self._done - len(self._last)
            [part] = self._store.read_ranges(self._name, [(begin, min(size_bytes, begin + _TAIL_BYTES))])
            data = bytes(part)
            if not data.startswith(self._last):  # a run that resumed has written the file again
                self._begin()
                continue
            new = data[len(self._last) :]
            whole = new[: new.rfind(b"\n") + 1]
            if not whole:
                break
            rows = whole.splitlines(keepends=True)
            self._done, self._last = self._done + len(whole), rows[-1]
            self.lines += [found for found in map(_object, rows) if found is not None]
        return self.lines


class Run:
    """A run folder, in a folder or an object store."""

    def __init__(self, place: Path | str, name: str) -> None:
        self.place, self.name = place, name
        self._store = open_store(place)
        self._metrics = GrowingFile(self._store, METRICS_NAME)
        self._audits = GrowingFile(self._store, AUDIT_NAME)

    def state(self, now: datetime) -> Json:
        """What the page shows of it."""
        files = {entry.path: entry for entry in _files(self._store)}
        recipe = self._yaml(files)
        status = self._json(files, STATUS_NAME)
        metrics = self._read(self._metrics, files, METRICS_NAME)
        audits = self._read(self._audits, files, AUDIT_NAME)
        newest = metrics[-1] if metrics else {}
        beats = [files[name].modified for name in (LOCK_NAME, STATUS_NAME, METRICS_NAME) if name in files]
        return {
            "kind": "run",
            "name": self.name,
            "place": str(self.place),
            "stage": str(recipe.get("stage", "unknown")),
            "phase": str(status.get("phase", "unknown")),
            "owned": LOCK_NAME in files,
            "heartbeat_s": max(0.0, (now - max(beats)).total_seconds()) if beats else None,
            "where": f"process {status['pid']} on {status['host']}" if "pid" in status and "host" in status else "",
            "done": _number(status.get("done")),
            "total": _number(status.get("total")),
            "unit": str(status.get("unit", "")),
            "rate_per_s": _number(status.get("rate_per_s")),
            "eta_s": _number(status.get("eta_s")),
            "note": str(status.get("note", "")),
            "limits": _limits(newest),
            "shares": {part: share for part, share in _shares(newest).items() if share > 0.0005},
            "curves": _curves(metrics, audits),
            "numbers": self._numbers(files, newest, audits),
            "alarms": [f"after {_step(line)} steps: {text}" for line in audits for text in _alarms(line)],
            "messages": self._messages(files),
        }

    def _numbers(self, files: Mapping[str, Entry], newest: Json, audits: Sequence[Json]) -> list[list[str]]:
        """(name, value) of the newest metrics, the last audit and the results of an evaluation."""
        values = {name: value for name, value in newest.items() if not name.endswith("_share") and name != "eta_s"}
        values |= _audit_values(audits[-1]) if audits else {}
        values |= self._json(files, EVALUATION_NAME)
        for prefix, result in self._json(files, FINETUNED_NAME).items():
            if isinstance(result, Mapping):
                values |= {f"finetuned_{prefix}_{name}": value for name, value in result.items()}
        numbers = {name: number for name, value in values.items() if (number := _number(value)) is not None}
        return [[metric(name).header, formatted(name, numbers[name])] for name in in_order(numbers)]

    def _read(self, file: GrowingFile, files: Mapping[str, Entry], name: str) -> list[Json]:
        return file.read(files[name].size_bytes) if name in files else []

    def _json(self, files: Mapping[str, Entry], name: str) -> Json:
        return (_object(self._whole(name)) if name in files else None) or {}

    def _yaml(self, files: Mapping[str, Entry]) -> Json:
        found = (
            parse_yaml(self._whole(RECIPE_NAME).decode(errors="replace"), RECIPE_NAME) if RECIPE_NAME in files else {}
        )
        return found if isinstance(found, dict) else {}

    def _whole(self, name: str) -> bytes:
        try:
            return self._store.read(name, _LIMIT_BYTES)
        except (FileNotFoundError, TooLarge):
            return b""

    def _messages(self, files: Mapping[str, Entry]) -> list[str]:
        if (entry := files.get(LOG_NAME)) is None:
            return []
        begin = max(0, entry.size_bytes - 8192)
        [part] = self._store.read_ranges(LOG_NAME, [(begin, entry.size_bytes)])
        return bytes(part).decode(errors="replace").splitlines()[-_MOST_MESSAGES:]


class Cache:
    """A cache, by the names of its files and the leases of its writers; no record is read."""

    def __init__(self, place: Path | str, name: str) -> None:
        self.place, self.name = place, name
        self._leases = Leases(open_cache_store(place))  # it remembers which writers it has seen beat

    def state(self, now: datetime) -> Json:
        """What the page shows of it."""
        [found] = [cache for cache in caches_below(self.place) if cache.place == self.place]
        if found.manifest is None:
            raise found.problem or UserError(f"the cache {self.place} cannot be read")
        store, shards = self._leases.store, len(found.manifest.shards)
        entries = list(store.list())
        layers = []
        for name, layer in listed(entries, found.manifest, found.layers).items():
            times = [entry.modified for entry in layer.entries if entry.modified.timestamp()]  # a packed cache has none
            ages = [(now - modified).total_seconds() for modified in times]
            layers.append(
                {
                    "name": name,
                    "units": layer.num_units,
                    "shards": layer.begun_shards,
                    "views": [layer.least_views, layer.most_views],
                    "records": layer.num_records,
                    "bytes": layer.size_bytes,
                    "last_commit_s": max(0.0, min(ages)) if ages else None,
                    "recent_units": sum(age < _RECENT_S for age in ages),
                }
            )
        beats = {entry.path: entry.modified for entry in entries if entry.path.startswith(f"{LEASES}/")}
        return {
            "kind": "cache",
            "name": self.name,
            "place": str(self.place),
            "spec_id": found.manifest.spec_id,
            "num_shards": shards,
            "num_images": sum(shard.num_samples for shard in found.manifest.source),
            "layers": layers,
            "writers": [
                {"lease": name, "holder": str(holder) if holder else "unknown", "age_s": _age(name, beats, now)}
                for name, holder in sorted(self._leases.living().items())
            ],
        }


def _age(lease: str, beats: Mapping[str, datetime], now: datetime) -> float | None:
    own = [modified for path, modified in beats.items() if path.startswith(f"{LEASES}/{lease}.g")]
    return max(0.0, (now - max(own)).total_seconds()) if own else None


class Jobs:
    """All runs and caches at some places, up to two folders deep; new ones appear at the next reading."""

    def __init__(self, places: Sequence[Path | str]) -> None:
        self._places = places
        self._known: dict[str, Run | Cache] = {}
        self._lock = threading.Lock()
        self._state: Json = {}
        self._read_s = -math.inf

    def state(self) -> Json:
        """The content of state.json. One reading serves all browsers that ask within a second."""
        with self._lock:
            if time.monotonic() - self._read_s >= _LEAST_S:
                self._state = self._read()
                self._read_s = time.monotonic()
            return self._state

    def _read(self) -> Json:
        now = datetime.now(UTC)
        jobs: list[Json] = []
        problems: list[Json] = []
        for place in self._places:
            for found in self._guarded(place, problems, partial(self._all_below, place)) or []:
                if len(jobs) == _MOST_JOBS:
                    problems.append({"place": str(place), "problem": f"only the first {_MOST_JOBS} jobs are shown"})
                    break
                state = self._guarded(found.place, problems, partial(found.state, now))
                jobs += [state] if state is not None else []
        return {"time": now.isoformat(timespec="seconds"), "jobs": jobs, "problems": problems}

    @staticmethod
    def _guarded(place: Path | str, problems: list[Json], read: Callable[[], _T]) -> _T | None:
        """The result of `read`, or None and a problem: whatever one job's files hold, the others are shown."""
        try:
            return read()
        except (TinymimError, OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            what = error.what if isinstance(error, TinymimError) else first_line(error)
            problems.append({"place": str(place), "problem": what})
            return None

    def _all_below(self, place: Path | str) -> list[Run | Cache]:
        return list(self._below(place, "", 2))

    def _below(self, place: Path | str, name: str, depth: int) -> Iterator[Run | Cache]:
        """The runs and caches at a place, and in its folders down to a depth."""
        store = open_store(place)
        own = name or str(place).rstrip("/").rpartition("/")[2]
        if store.exists(RECIPE_NAME):
            yield self._kept(Run, place, own)
        elif any(cache.place == place for cache in caches_below(place)):
            yield self._kept(Cache, place, own)
            return
        for folder in sorted(store.folders() - {BOARD_NAME}) if depth else ():
            yield from self._below(joined(place, folder), f"{name}/{folder}" if name else folder, depth - 1)

    def _kept(self, kind: type[Run] | type[Cache], place: Path | str, name: str) -> Run | Cache:
        found = self._known.get(str(place))
        if found is None or not isinstance(found, kind):
            found = self._known[str(place)] = kind(place, name)
        return found


def _files(store: Store) -> Iterator[Entry]:
    """The files directly in a run folder."""
    yield from (entry for entry in store.list() if "/" not in entry.path)


def _object(data: bytes) -> Json | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: object) -> float | None:
    """A finite number, which JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e300:
        return None
    return value


def _step(line: Mapping[str, Any]) -> str:
    step = _number(line.get("step"))
    return MISSING if step is None else f"{step:,.0f}"


def _alarms(line: Mapping[str, Any]) -> list[str]:
    alarms = line.get("alarms")
    return [str(text) for text in alarms] if isinstance(alarms, list) else []


def _shares(newest: Mapping[str, Any]) -> dict[str, float]:
    found = {part: _number(newest[name]) for name, part in members("*_share", newest).items()}
    return {part: share for part, share in found.items() if share is not None}


def _limits(newest: Mapping[str, Any]) -> str:
    """What takes most of the time, where the run records it."""
    shares = {part: share for part, share in _shares(newest).items() if part != "start"}
    if not shares:
        return ""
    part = max(shares, key=lambda name: shares[name])
    return f"{part} ({shares[part]:.0%} of the time)"


def _audit_values(line: Json) -> Json:
    with contextlib.suppress(KeyError, TypeError):
        return audit_metrics(line)
    return {}


def _curves(metrics: Sequence[Json], audits: Sequence[Json]) -> list[Json]:
    """The losses and accuracies by step, with few points."""
    found: dict[str, list[tuple[float, float]]] = {}
    for lines, file in ((metrics, METRICS_NAME), ([line | _audit_values(line) for line in audits], AUDIT_NAME)):
        for line in lines:
            step = _number(line.get("step"))
            for name, value in line.items() if step is not None else ():
                number = _number(value)
                if number is not None and name != "step" and metric(name).curve == file:
                    found.setdefault(name, []).append((step, number))  # type: ignore[arg-type]  # checked above
    return [
        {"name": metric(name).header, "points": _thinned(found[name]), "last": formatted(name, found[name][-1][1])}
        for name in in_order(found)
    ]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point, and the last one."""
    every = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:every], points[-1]]

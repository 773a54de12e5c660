"""Who counts as dead: absence of proof is no proof of death, and no two clocks are compared."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymim.storage import atomic, leases
from tinymim.storage.atomic import canonical_json, machine, process_is_dead, process_started, remove_partials
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import DEFAULT_LEASE_S, Leases, shard_lease
from tinymim.storage.local import LocalStore
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny, workers

A = UnitId("train-000.tar", 0, 3)
NOBODY = 65534
NO_PROCESS = 2**22 + 1


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "cache")


def write_lease(store: LocalStore, name: str = "a", **fields: Any) -> str:
    """A lease of a process of another machine."""
    path = f"leases/{name}.g1.json"
    owner = {
        "token": "t",
        "host": "far",
        "machine": "other/pid:[1]",
        "pid": 1,
        "started": "1",
        "beat": 0,
        "lease_s": 1.0,
    }
    store.write(path, canonical_json(owner | fields))
    return path


class Clock:
    """A monotonic clock that only sleeping moves, and what happens meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None] = lambda now_s: None) -> None:
        self.now_s, self._tick = 0.0, tick
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._tick(self.now_s)


# ---- processes


def test_a_process_is_dead_only_when_that_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(process.pid)
    assert not process_is_dead(process.pid) and not process_is_dead(process.pid, started)
    assert process_is_dead(process.pid, "0")  # another process had its id
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert process_is_dead(process.pid, started)  # its parent has not waited for it yet
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    assert process_is_dead(process.pid, started) and process_is_dead(NO_PROCESS)
    assert not process_is_dead(2**40)  # an impossible id proves nothing

    # A living process of another user, whose folder in /proc is hidden.
    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    monkeypatch.setattr(atomic, "_process_stat", lambda pid: None)
    assert not process_is_dead(NO_PROCESS) and not process_is_dead(NO_PROCESS, "1")


def test_a_lease_of_a_hidden_process_is_watched(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fakes; the test with a real /proc is below."""
    clock = Clock(monkeypatch)
    write_lease(store, machine=machine(), pid=os.getppid(), started="1", lease_s=30)
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError))
    monkeypatch.setattr(atomic, "_process_stat", lambda pid: None)
    watcher = Leases(store)
    assert not watcher.claim("a") and watcher.living() != {}
    clock.now_s = 29
    assert not watcher.claim("a")
    clock.now_s = 31
    assert watcher.claim("a")  # it did not beat
    watcher.close()


@pytest.mark.parametrize("lost", [True, False])
def test_the_dead_of_this_machine_are_buried_at_once(store: LocalStore, lost: bool) -> None:
    write_lease(store, machine=machine(), pid=NO_PROCESS if lost else os.getpid(), started="1", lease_s=1e9)
    watcher = Leases(store)
    assert watcher.living() == {}
    assert watcher.claim("a")
    watcher.close()


def test_without_an_identity_of_the_machine_nothing_is_proved(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (atomic, leases):
        monkeypatch.setattr(module, "machine", lambda: None)
    write_lease(store, machine=None, pid=NO_PROCESS, lease_s=1e9)
    watcher = Leases(store)
    assert not watcher.claim("a") and list(watcher.living()) == ["a"]
    partial = atomic.partial_path(tmp_path / "x")
    partial.write_bytes(b"")
    monkeypatch.setattr(atomic, "_NOWHERE", "another process")
    remove_partials([tmp_path])
    assert partial.exists()


# ---- how long a lease is watched


@pytest.mark.parametrize(
    ("lease_s", "limit_s"),
    [
        (0.5, 0.5),
        (90_000, 90_000),
        (1e9, 1e9),
        (10**400, None),
        (0, DEFAULT_LEASE_S),
        (-1, DEFAULT_LEASE_S),
        (True, DEFAULT_LEASE_S),
        ("7", DEFAULT_LEASE_S),
        (None, DEFAULT_LEASE_S),
        ([1], DEFAULT_LEASE_S),
    ],
)
def test_the_time_of_the_owner_counts_for_others(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, lease_s: Any, limit_s: float | None
) -> None:
    clock = Clock(monkeypatch)
    write_lease(store, lease_s=lease_s)
    watcher = Leases(store, lease_s=3.0)
    assert not watcher.claim("a")
    clock.now_s = 0.999 * (limit_s or 1e15)
    assert not watcher.claim("a")
    if limit_s:
        clock.now_s = 1.001 * limit_s
        assert watcher.claim("a")
    watcher.close()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_times_that_are_none_count_as_the_default(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    clock = Clock(monkeypatch)
    store.write("leases/a.g1.json", b'{"lease_s": %s}' % text.encode())
    watcher = Leases(store)
    assert not watcher.claim("a")
    clock.now_s = DEFAULT_LEASE_S + 1
    assert watcher.claim("a")
    watcher.close()


@pytest.mark.parametrize("age_s", [-90_000.0, 0.0, 90_000.0, 1e9])
def test_living_compares_no_clocks(store: LocalStore, monkeypatch: pytest.MonkeyPatch, age_s: float) -> None:
    """A beating job whose clock, or whose file server's, is days off lives; a silent one does not, after its time."""
    beats = itertools.count(1)

    def beat(now_s: float = 0.0) -> None:
        path = write_lease(store, "beating", beat=next(beats), lease_s=60)
        os.utime(store.place / path, (time.time() - age_s,) * 2)

    clock = Clock(monkeypatch, beat)
    beat()
    silent = write_lease(store, "silent", lease_s=60)
    os.utime(store.place / silent, (time.time() - age_s,) * 2)
    holder = leases.Holder("far", 1)
    assert Leases(store).living() == {"beating": holder, "silent": holder}  # nobody was watched
    before = {path: (store.place / path).read_bytes() for path in [silent]}
    assert Leases(store).living(watch_s=90) == {"beating": holder}
    assert 60 < clock.now_s < 63
    assert (store.place / silent).read_bytes() == before[silent]
    clock.now_s = 0
    assert set(Leases(store).living(watch_s=30)) == {"beating", "silent"}  # not watched for long enough
    store.remove([silent])
    clock.now_s = 0
    assert set(Leases(store).living(watch_s=90)) == {"beating"} and clock.now_s < 1  # a beat suffices


def test_living_drops_what_is_released_meanwhile(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lease(store, lease_s=60)
    Clock(monkeypatch, lambda now_s: store.remove([path] if now_s > 5 else []))
    assert Leases(store).living(watch_s=90) == {}


def test_living_does_not_wait_for_processes_that_it_sees(tmp_path: Path) -> None:
    manifest = tiny.make_manifest()
    process, connection = workers.start(workers.claim_and_hang, tmp_path, manifest, A, 1e6)
    assert connection.recv() == "claimed"
    began_s = time.monotonic()
    living = Leases(open_store(tmp_path)).living(watch_s=60)
    assert time.monotonic() - began_s < 10
    assert {name: holder and holder.pid for name, holder in living.items()} == {shard_lease(A.shard): process.pid}
    process.kill()
    process.join()
    assert Leases(open_store(tmp_path)).living() == {}


def test_a_claim_whose_answer_was_lost_is_ours(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file was created, but the folder could not be made durable: the same process may try again."""
    ours = Leases(store)
    real = LocalStore.create_all

    def failing(self: LocalStore, files: Any) -> list[str]:
        real(self, files)
        raise OSError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "create_all", failing)
        with pytest.raises(OSError, match="lost"):
            ours.claim("a")
    assert not Leases(store).claim("a")
    assert ours.claim("a") and ours.holds("a")
    ours.close()
    assert ours.names() == set()


# ---- unfinished files


def partial_of(machine: str, pid: int) -> str:
    return f"v0-2.zip.{machine}-{pid}-0.partial"


def test_unfinished_files_go_by_proof_or_by_lease_and_not_by_age(tmp_path: Path) -> None:
    manifest, here = tiny.make_manifest(2), atomic._machine_digest()
    CacheWriter.open(tmp_path, manifest, [tiny.make_layer()]).close()
    names = {
        "dead": partial_of(here, NO_PROCESS),
        "living": partial_of(here, os.getppid()),
        "elsewhere": partial_of("0badcafe", NO_PROCESS),
        "foreign": "notes.partial",
    }
    folders = [tmp_path, tmp_path / "views", tmp_path / "views/train-000", tmp_path / "views/train-001"]
    for folder, name in itertools.product(folders, names.values()):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (0, 0))  # as old as can be
    with CacheWriter.open(tmp_path, manifest, [tiny.make_layer()]) as writer:
        for folder in folders[:2]:
            left = {path.name for path in folder.glob("*.partial")}
            assert left == set(names.values()) - {names["dead"]}
        tiny.write_units(writer, [A])
        assert not list(folders[2].glob("*.partial"))  # the lease of the shard proves that nobody writes there
        assert len(list(folders[3].glob("*.partial"))) == 4
    assert CacheReader(tmp_path).units()[0].unit == A


def test_opening_does_not_disturb_a_living_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock a day ahead, and another pid namespace of the same host name (by a fake)."""
    manifest, layers = tiny.make_manifest(), [tiny.make_layer()]
    with (
        CacheWriter.open(tmp_path, manifest, layers) as writer,
        writer.begin(VIEWS, A, tiny.make_keys(A.shard)) as draft,
    ):
        draft.add({name: values[:1] for name, values in tiny.make_arrays(VIEWS, A).items()})
        [partial] = tmp_path.glob("views/train-000/*.partial")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda real=time.time: real() + 10 * 86_400)
            for module in (atomic, leases):
                patch.setattr(module, "machine", lambda: f"{machine()}-container")
            patch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(ProcessLookupError))
            with CacheWriter.open(tmp_path, manifest, layers) as other:
                assert not other.claim(VIEWS, A) and other.claim(VIEWS, UnitId("train-001.tar", 0, 3))
        assert partial.exists()
        draft.add({name: values[1:] for name, values in tiny.make_arrays(VIEWS, A).items()})
        draft.commit({})


# ---- real processes in namespaces of their own

OPEN_AND_CLAIM = """
import sys
from pathlib import Path
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
import os, socket
place = Path(sys.argv[1])
with CacheWriter.open(place, tiny.make_manifest(), [tiny.make_layer()]) as writer:
    claimed = [writer.claim(VIEWS, UnitId(f"train-00{n}.tar", 0, 3)) for n in (0, 1)]
    living = sorted(Leases(open_store(place)).living())
    print(os.getpid(), socket.gethostname(), claimed, living, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def unshared() -> list[str]:
    """The beginning of a command in a pid namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a pid namespace")
    return command


def test_containers_with_one_host_name_do_not_take_each_other_for_dead(tmp_path: Path, unshared: list[str]) -> None:
    """A job here, and a real second one in another pid namespace, where the process ids of here mean nothing."""
    manifest, layers = tiny.make_manifest(), [tiny.make_layer()]
    with (
        CacheWriter.open(tmp_path, manifest, layers) as writer,
        writer.begin(VIEWS, A, tiny.make_keys(A.shard)) as draft,
    ):
        draft.add({name: values[:1] for name, values in tiny.make_arrays(VIEWS, A).items()})
        [partial] = tmp_path.glob("views/train-000/*.partial")
        inside = subprocess.Popen(
            [*unshared, sys.executable, "-c", OPEN_AND_CLAIM, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert inside.stdout is not None and inside.stdin is not None
        pid, _, rest = inside.stdout.readline().partition(" ")
        assert int(pid) < 100  # its own count of processes
        assert rest.strip() == (f"{platform.node()} [False, True] ['shards/train-000', 'shards/train-001']")
        assert partial.exists()
        # And the other way round: nothing here has the process id of the job inside, which lives.
        other = tmp_path / "views/train-001"
        other.mkdir()
        theirs = json.loads(next((tmp_path / "leases/shards").glob("train-001*")).read_bytes())
        digest = atomic.digest_hex(theirs["machine"].encode())[:8]
        held = other / partial_of(digest, NO_PROCESS)
        held.write_bytes(b"")
        with CacheWriter.open(tmp_path, manifest, layers) as third:
            assert not third.claim(VIEWS, UnitId("train-001.tar", 0, 3)) and held.exists()
        draft.add({name: values[1:] for name, values in tiny.make_arrays(VIEWS, A).items()})
        draft.commit({})
        inside.stdin.close()
        assert inside.wait(60) == 0
        inside.stdout.close()
    assert len(CacheReader(tmp_path).units()) == 1


AS_NOBODY = """
import ctypes, os, subprocess, sys
from pathlib import Path
from tinymim.storage.atomic import process_is_dead, process_started, machine
from tinymim.storage.leases import Leases
from tinymim.storage.store import open_store
place, pid = Path(sys.argv[1]), int(sys.argv[2])
leases = Leases(open_store(place))
if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS: what is mounted below is seen by nobody else
    sys.exit(77)
for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"]):
    if subprocess.run(command, capture_output=True).returncode:
        sys.exit(77)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
if os.path.exists(f"/proc/{pid}"):
    sys.exit(77)
print(process_started(pid), process_is_dead(pid), leases.claim("shards/train-000"), list(leases.living()))
"""


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 8), reason="/proc is mounted once for all before Linux 5.8"
)
def test_a_job_of_another_user_lives_although_proc_hides_it(tmp_path: Path) -> None:
    """A real job of root, and a process of another user below a real /proc with hidepid=2."""
    if os.getuid():
        pytest.skip("no right to mount /proc and to change the user")
    place = tmp_path / "cache"
    process, connection = workers.start(workers.claim_and_hang, place, tiny.make_manifest(), A, 60.0)
    assert connection.recv() == "claimed"
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    command = [sys.executable, "-c", AS_NOBODY, str(place), str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True)
    process.kill()
    process.join()
    if done.returncode == 77:
        pytest.skip("no right to mount /proc with hidepid")
    assert done.stdout.strip() == "None False False ['shards/train-000']", done.stderr


# ---- beats


def test_beats_go_on_while_a_store_fails_for_a_moment(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, failed = Leases(store, 0.2), threading.Event()
    assert ours.claim("a")

    def failing(self: LocalStore, path: str, data: bytes) -> None:
        failed.set()
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", failing)
        assert failed.wait(20)
    [path] = ours._generations("a").values()
    before = store.read(path, 4096)
    began_s = time.monotonic()
    while store.read(path, 4096) == before:
        assert time.monotonic() - began_s < 20
        time.sleep(0.01)
    assert ours.holds("a")
    ours.close()

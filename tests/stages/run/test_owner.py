"""A run folder has one owner: under a race, after a kill, and where the file system locks within one machine only."""

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinymim.configs.errors import UserError
from tinymim.stages import train_student
from tinymim.stages.run import owner
from tinymim.stages.run.owner import LOCK_NAME, owned
from tinymim.stages.training.launch import run_folders
from tinymim.tests.stages import tiny

RACER = """
import os, sys, time
from pathlib import Path
from tinymim.configs.errors import UserError
from tinymim.stages.run.owner import owned
folder, wins = Path(sys.argv[1]), 0
end = time.monotonic() + 4
while time.monotonic() < end:
    try:
        with owned([folder / "run"]):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails if another is inside
            wins += 1
            time.sleep(0.001)
            os.unlink(folder / "inside")
    except UserError:
        pass
print(wins)
"""
HOLDER = """
import sys, time
from pathlib import Path
from tinymim.stages.run.owner import owned
with owned([Path(sys.argv[1])]):
    print("owns", flush=True)
    time.sleep(60)
"""


def started(program: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)


def test_of_four_racing_processes_one_is_inside_at_a_time(tmp_path: Path) -> None:
    racers = [started(RACER, tmp_path) for _ in range(4)]
    wins = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4 and sum(wins) > 20
    assert [path for path in tmp_path.rglob("*") if path.name != "run"] == []


def test_a_killed_owner_leaves_the_folder_free_at_once(tmp_path: Path) -> None:
    holder = started(HOLDER, tmp_path / "run")
    assert holder.stdout is not None and holder.stdout.readline() == "owns\n"
    with (
        pytest.raises(UserError, match=rf"another run works(.|\n)*process {holder.pid} on "),
        owned([tmp_path / "run"]),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "run" / LOCK_NAME).exists()
    began_s = time.monotonic()
    with owned([tmp_path / "run"]):
        assert time.monotonic() - began_s < 2
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_an_owner_on_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is not seen here, as on a network file system that locks within one machine only."""
    monkeypatch.setattr(owner, "_WATCH_S", 1.0)
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(0.1):
            number += 1
            (tmp_path / LOCK_NAME).write_text(json.dumps({"host": "elsewhere", "pid": 7, "beat": number}))

    (tmp_path / LOCK_NAME).write_text(json.dumps({"host": "elsewhere", "pid": 7, "beat": 0}))
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="process 7 on elsewhere"), owned([tmp_path]):
        pass
    over.set()
    thread.join()
    began_s = time.monotonic()
    with owned([tmp_path]):
        assert time.monotonic() - began_s >= 1.0


def test_without_locks_the_beat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(owner, "_WATCH_S", 1.0)
    monkeypatch.setattr(owner, "_BEAT_S", 0.1)
    with owned([tmp_path]), pytest.raises(UserError, match="another run works"), owned([tmp_path]):
        pass
    with owned([tmp_path]):
        pass


def test_an_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_BEAT_S", 0.05)
    with owned([tmp_path]):
        first = (tmp_path / LOCK_NAME).read_bytes()
        time.sleep(0.5)
        assert (tmp_path / LOCK_NAME).read_bytes() != first


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[]", b"{", b"\xff"])
def test_any_content_of_a_lock_is_survived(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_WATCH_S", 0.1)
    (tmp_path / LOCK_NAME).write_bytes(content)
    with owned([tmp_path]):
        pass


def test_a_second_training_is_refused_and_the_first_ones_record_stays(tmp_path: Path) -> None:
    recipe = tiny.student_recipe(tmp_path)
    folder = recipe.run.folder
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    with owned([folder]), pytest.raises(UserError, match="another run works"):
        train_student.run(recipe)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert (folder / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_several_students_own_their_folders_too(tmp_path: Path) -> None:
    students = {name: {"model": tiny.STUDENT} for name in ("a", "b")}
    recipe = tiny.student_recipe(tmp_path, student=None, students=students)
    folder = recipe.run.folder
    assert run_folders(recipe) == {folder, folder / "a", folder / "b"}
    with owned([folder / "b"]), pytest.raises(UserError, match="another run works"), owned(run_folders(recipe)):
        pass
    assert not folder.exists()

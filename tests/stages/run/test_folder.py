"""The files of a run folder, and what its readers make of a line that a kill has cut short."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinymim.stages.run.folder import (
    AUDIT_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SESSIONS_NAME,
    VERSIONS_NAME,
    RunFolder,
    read_audits,
    read_lines,
    read_metrics,
    read_sessions,
)
from tinymim.tests.stages.tiny import student_recipe


def lines(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "session": f"s{step}", "loss": 1 / (step + 1)} for step in range(count)]


def text(found: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in found)


@pytest.mark.parametrize(
    ("name", "read"), [(METRICS_NAME, read_metrics), (AUDIT_NAME, read_audits), (SESSIONS_NAME, read_sessions)]
)
def test_a_torn_line_costs_itself_alone(
    name: str, read: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert read(tmp_path) == []
    whole = text(lines(3)).encode()
    for end in range(len(text(lines(2))), len(whole) - 1):  # the last line is cut at every byte
        (tmp_path / name).write_bytes(whole[:end])
        assert read(tmp_path) == lines(2)
    (tmp_path / name).write_bytes(whole[:-9] + whole)  # the next process appends to the torn line
    assert read(tmp_path) == [*lines(2), *lines(3)[1:]] if read is not read_sessions else lines(3)


def test_what_is_no_object_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    path.write_bytes(b'3\n[1]\n\n"x"\n{"step": "x"}\n{"note": "\xff"}\n{"step": 4}\n')
    assert read_lines(path) == [{"step": "x"}, {"note": "�"}, {"step": 4}]
    assert read_metrics(tmp_path) == [{"step": 4}]


def test_a_resumed_run_has_every_step_once_and_no_torn_line(tmp_path: Path) -> None:
    recipe = student_recipe(tmp_path)
    folder = recipe.run.folder
    with RunFolder(recipe, 0) as log:
        for step in range(6):
            log.log(step, loss=step / 3)
    whole = (folder / METRICS_NAME).read_text()
    with (folder / METRICS_NAME).open("a") as file:
        file.write('{"step": 3')
    (folder / AUDIT_NAME).write_text(text(lines(6)))
    with RunFolder(recipe, 4) as log:
        log.log(4, loss=4 / 3)
        log.log(5, loss=5 / 3)
    assert (folder / METRICS_NAME).read_text() == whole
    assert read_audits(folder) == lines(5)  # of 4 steps done, too
    with RunFolder(recipe, None) as log:
        log.log(5, loss=0.0)
    assert len(read_metrics(folder)) == 7
    assert {RECIPE_NAME, VERSIONS_NAME} <= {path.name for path in folder.iterdir()}


def test_a_full_disk_at_the_end_names_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is buffered is written when the file is closed, and that error knows no file."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(student_recipe(tmp_path))
    folder._metrics.close()
    monkeypatch.setattr(folder, "_metrics", SimpleNamespace(close=full))
    with pytest.raises(OSError, match="No space left") as caught, folder:
        pass
    assert caught.value.filename == str(folder.path)

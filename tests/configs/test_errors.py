"""What reaches a terminal: foreign text as escapes, refusals of the machine with the file and the place."""

import errno
import os
from pathlib import Path

import pytest

from tinymim import cli
from tinymim.configs.errors import UserError, naming, printable, refusal_text
from tinymim.stages.pages.tables import plain_table
from tinymim.stages.run.progress import ProgressFiles, logger
from tinymim.storage import atomic

EVIL = "a\x1b[2Jb\x07c\r\x9bd\u202ee\u2028f\x7f\ud800"
SHOWN = r"a\x1b[2Jb\x07c\x0d\x9bd\u202ee\u2028f\x7f\ud800"


def test_every_character_that_a_terminal_obeys_becomes_its_escape() -> None:
    assert printable(EVIL) == SHOWN
    every = "".join(map(chr, range(0x3000)))
    assert all(char.isprintable() or char in "\t\n" or ord(char) > 0x9F for char in printable(every))
    kept = "Ünïcode, 日本語, \N{GRINNING FACE}, نص\tend"
    assert printable(kept) == kept


def test_line_feeds_are_kept_only_before_our_own_indented_lines() -> None:
    error = str(UserError("one", got="two\nerror: forged", hint="three"))
    assert printable(error) == "one\n  got: two\\nerror: forged\n  hint: three"
    assert printable("a\nb\n  c", "") == "a\nb\n  c" and printable("a\n  b", "\n") == r"a\n  b"


def test_errors_logs_and_tables_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, shown = EVIL.removesuffix("\ud800"), SHOWN.removesuffix(r"\ud800")  # xdist cannot send what pytest captures
    with ProgressFiles(tmp_path / "log.txt", tmp_path / "status.json"):
        logger.info(f"shard {evil}\nforged")
    assert capsys.readouterr().err == f"shard {shown}\\nforged\n"
    assert (tmp_path / "log.txt").read_text().endswith(f" shard {shown}\\nforged\n")
    lines = plain_table([["name", "b"], [f"{EVIL}\nrow", "1"]], [1]).splitlines()
    assert len(lines) == 3 and lines[2] == rf"{SHOWN}\nrow  1"


@pytest.mark.parametrize("name", ["\x1b[31mred.yaml", "two\nlines.yaml"])
def test_a_recipe_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / name
    path.write_text('stage: evaluate\n"\\e]0;title\\a": 1\nmodel: {name: "\\e[2J"}\n')
    for arguments in (["evaluate", path], ["evaluate", path, "--debug"], ["cache", "info", path], ["evaluate", name]):
        code = cli.run_command([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2 and "\x1b" not in out + err and "\a" not in out + err
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_a_full_disk_is_named_with_the_file_and_its_free_space(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "state.pt"
    with pytest.raises(OSError, match="No space") as caught, naming(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    text = refusal_text(caught.value)
    assert text.startswith(f"No space left on device: {path}\n  got: ") and "GiB are free on /" in text
    with pytest.raises(OSError, match="full") as caught, naming(path):
        raise OSError(errno.EDQUOT, "full", "named")
    assert refusal_text(caught.value).startswith("full: named\n")
    with pytest.raises(FileNotFoundError) as missing, naming(path):
        raise FileNotFoundError("s3://bucket/absent")
    assert str(missing.value) == "s3://bucket/absent"  # a store's error names its own file
    assert refusal_text(PermissionError(errno.EACCES, "Permission denied", "x")) == "Permission denied: x"


def test_a_write_to_a_full_disk_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        atomic.write_bytes_atomic(tmp_path / "file", b"x")
    assert caught.value.filename == str(tmp_path / "file") and list(tmp_path.iterdir()) == []

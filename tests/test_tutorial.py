"""Every block of docs/tutorial.md runs as it stands, in order, with fewer photos and steps."""

import re
import shlex
from pathlib import Path

import pytest

from tinymim import cli
from tinymim.pipeline.drawn import samples

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
# Added to the tutorial's commands, to be quick.
SMALLER = {
    "cache-teacher": ["--set", "loader.workers=0", "--set", "audit_views=1"],
    "train-student": ["--set", "loader.workers=0", "--set", "optim.steps=2", "--set", "optim.batch_size=8"],
    "evaluate": ["--set", "loader.workers=0"],
    "plan": ["--set", "loader.workers=0", "--set", "audit_views=1", "--set", "optim.batch_size=8", "--seconds", "1"],
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)


def take_photos(folder: Path) -> None:
    """Generated textures, as JPEG files in a folder per class: 10 in `train`, 10 in `val`."""
    for split, first, count in (("train", 0, 10), ("val", 10, 10)):
        for key, jpeg, _ in samples(seed=1, first=first, count=count):
            photo = folder / split / f"{key}.jpg"
            photo.parent.mkdir(parents=True, exist_ok=True)
            photo.write_bytes(jpeg)


def test_every_block_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    take_photos(tmp_path / "photos")
    ran = []
    for language, text in blocks():
        if language == "yaml":
            name = re.match(r"# (\w+\.yaml)\n", text)
            assert name, "a recipe begins with its file's name"
            Path(name[1]).write_text(text)
        elif language == "python":
            exec(text, {})
        else:
            for line in text.splitlines():
                _, verb, *rest = shlex.split(line, comments=True)
                code = cli.run_command([verb, *rest, *SMALLER.get(verb, [])])
                assert code == 0, line
                ran.append(verb)
    assert {"make-shards", "plan", "cache-teacher", "train-student", "evaluate", "compare"} <= set(ran)
    assert "<html" in Path("compare.html").read_text()

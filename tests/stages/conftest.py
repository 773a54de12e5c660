"""Caches for the tests of `tinymim cache`, made once; other modules have a `made` and a `home` of their own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim import cli
from tinymim.stages import cache_teacher, make_shards
from tinymim.tests.stages.caches import hidden, recipe
from tinymim.tests.stages.tiny import write_teacher

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 images in three tars; a cache of two views that grew by a third; a hidden cache of two."""
    root = tmp_path_factory.mktemp("made")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=24, images_per_shard=8, seed=5))
    write_teacher(root / "teacher.safetensors")
    cache_teacher.run(recipe(root, num_views=2))
    cache_teacher.run(recipe(root))
    cache_teacher.run(hidden(root))
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of both caches; their recipes are still those of `made`."""
    for name in ("cache", "hidden"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run_command([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call

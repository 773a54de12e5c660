"""What most tests of stages start from, made once per process. Modules that need more have a `made` of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim import cli
from tinymim.stages import cache_teacher, train_student
from tinymim.tests.stages.tiny import cache_recipe, copied, student_recipe, write_set

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 36 images in three tars, a random teacher, a cache, a student of 20 steps. Do not write to it."""
    root = write_set(tmp_path_factory.mktemp("made"))
    cache_teacher.run(cache_recipe(root))
    train_student.run(student_recipe(root))
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A private copy of `made` without its runs."""
    return copied(made, tmp_path / "home")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run_command([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call

"""Caches for the tests of `tinymim cache`, made once."""

import shutil
from pathlib import Path

import pytest

from tinymim.stages import cache_teacher
from tinymim.tests.stages.cache.caches import hidden, recipe
from tinymim.tests.stages.tiny import write_set


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 images in three tars; a cache of two views that grew by a third; a hidden cache of two."""
    root = write_set(tmp_path_factory.mktemp("caches"), count=24, images_per_shard=8)
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

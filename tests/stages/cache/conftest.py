"""Caches for the tests of `tinymim cache`, made once."""

import shutil
from pathlib import Path

import pytest

from tinymim.stages import cache_teacher
from tinymim.tests.stages.cache.caches import hidden, recipe
from tinymim.tests.stages.tiny import write_set


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 images in three tars; a cache whose sketch layer grew from two views to three, and a hidden layer
    of two views."""
    root = write_set(tmp_path_factory.mktemp("caches"), count=24, images_per_shard=8)
    cache_teacher.run(recipe(root, num_views=2))
    cache_teacher.run(recipe(root))
    cache_teacher.run(hidden(root))
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of the cache; its recipes are still those of `made`."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path

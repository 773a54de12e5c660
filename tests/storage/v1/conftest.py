"""Copies of committed format-1 caches."""

from pathlib import Path

import pytest

from tinymim.tests.storage.v1.forged import copied


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied("cache_v1", tmp_path)


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    return copied("cache_v1_hidden", tmp_path)

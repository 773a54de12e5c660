"""Fixtures of the storage tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, so waiting for a busy disk (20 s of a run) would show nothing.

    The processes that get killed do wait, and the steps at which they may die are the same.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)

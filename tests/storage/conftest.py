"""Fixtures of the storage tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, so fsync on a busy disk (20 s of a run) would test nothing.

    The processes that get killed do wait, and the steps at which they may die are the same.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)

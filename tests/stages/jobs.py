"""Jobs of `cache-teacher` in processes of their own, to share a cache, to be killed and to come back."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages import cache_teacher
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tinymim.tests.stages.jobs"])  # import torch once, not for every job


def start(recipe: CacheTeacherRecipe, dies_after: int = 0) -> tuple[BaseProcess, Connection]:
    """Run a recipe; the connection tells "open", then ("claimed", unit) and ("committed", unit).

    The process is killed right after the commit number `dies_after`, of any layer.
    """
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(
        target=_run, args=(dict(os.environ), recipe.model_dump(mode="json"), there, dies_after)
    )
    process.start()
    there.close()
    return process, here


def said(connection: Connection, to_the_end: bool = False) -> list[Any]:
    """What a job has said by now, or all that it will ever say."""
    found: list[Any] = []
    try:
        while to_the_end or connection.poll():
            found.append(connection.recv())
    except EOFError:
        pass
    return found


def _run(environment: dict[str, str], fields: dict[str, Any], connection: Connection, dies_after: int) -> None:
    os.environ.update(environment)
    recipe = CacheTeacherRecipe.model_validate(fields)
    claim, commit, commits = CacheWriter.claim_for, CacheWriter.commit, itertools.count(1)

    def claimed(self: CacheWriter, layers: Sequence[str], unit: UnitId) -> list[str]:
        new = unit not in self._claimed
        done = claim(self, layers, unit)
        if done and new:
            connection.send(("claimed", unit))
        return done

    def committed(self: CacheWriter, info: Any, file: Any) -> None:
        commit(self, info, file)
        if next(commits) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if info.layer in recipe.layers:
            connection.send(("committed", info.unit))

    CacheWriter.claim_for, CacheWriter.commit = claimed, committed  # type: ignore[method-assign]
    connection.send("open")
    cache_teacher.run(recipe)

"""What the tests of `tinymim cache` share: recipes of two caches, and damage."""

from pathlib import Path
from typing import Any

from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.stages.cache import repair
from tinymim.tests.stages.tiny import cache_recipe, run_in

HIDDEN: dict[str, Any] = {"name": "hidden", "calibration_views": 8}


def recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"num_views": 3} | changes))


def hidden(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return recipe(root, **({"codec": HIDDEN, "num_views": 2, "cache": root / "hidden"} | changes))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


def repaired(root: Path, made: Path, **changes: Any) -> dict[str, Any]:
    return repair.run(recipe(made, **({"cache": root / "cache", "run": run_in(root / "run")} | changes)))

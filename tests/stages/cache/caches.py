"""What the tests of `tinymim cache` share: recipes of two layers of one cache, and damage."""

from pathlib import Path
from typing import Any

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages.cache import repair
from tinymim.tests.stages.tiny import cache_recipe, run_in

HIDDEN: dict[str, Any] = {"name": "hidden", "calibration_views": 8}
SKETCH_LAYER, HIDDEN_LAYER = "vit_tiny_patch16_224-b2-sketch", "vit_tiny_patch16_224-b2-hidden"


def recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"num_views": 3} | changes))


def hidden(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return recipe(root, **({"codec": HIDDEN, "num_views": 2, "run": run_in(root / "run-hidden")} | changes))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


def repaired(root: Path, made: Path, of: Any = recipe, **changes: Any) -> dict[str, Any]:
    return repair.run(of(made, **({"cache": root / "cache", "run": run_in(root / "run")} | changes)))

"""The commands as functions."""

import importlib
from pathlib import Path
from typing import Any

from tinymim.configs.load import load_recipes
from tinymim.configs.schema import RECIPES
from tinymim.stages.export import run as export
from tinymim.stages.hub import pull, push
from tinymim.stages.run.preflight import preflight

__all__ = ["export", "pull", "push", "run_recipe"]


def run_recipe(recipe: str | Path, *overrides: str) -> Any:
    """Run a recipe as the command that its `stage:` names.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: fields to set, such as "optim.steps=300", as with `--set`.

    Returns:
        What the command prints, as JSON values; None for commands that print nothing.

    Raises:
        TinymimError: as the command; `str` of it is the message.
    """
    [loaded] = load_recipes([Path(recipe)], tuple(RECIPES), overrides)
    preflight(loaded)
    stage = importlib.import_module(f"tinymim.stages.{loaded.stage.replace('-', '_')}")
    return stage.run(loaded)

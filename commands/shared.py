"""Shared by all commands: the RECIPE argument, `--set`, and data on stdout."""

import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinymim.configs.errors import printable
from tinymim.configs.shipped import shipped_recipes

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext


def _recipes(context: "CompletionContext") -> list[str]:
    """Candidates for RECIPE: shipped recipes, and the YAML files and folders that start with what was typed."""
    begun = context.incomplete
    found = [path for path in glob.glob(f"{glob.escape(begun)}*") if path.endswith(".yaml") or os.path.isdir(path)]
    return [*shipped_recipes(), *(f"{path}/" if os.path.isdir(path) else path for path in found)]


RecipeArgument = Annotated[Path, Parameter(help="A YAML file, or the name of a shipped recipe.", completer=_recipes)]
SetOption = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Set one field, e.g. --set optim.steps=300. May be repeated."),
]


class StdoutClosed(Exception):
    """The reader of stdout has gone: `tinymim recipes | head -1`."""


def print_text(text: str) -> None:
    """Print data to stdout. Raises StdoutClosed if its reader has gone."""
    try:
        print(printable(text, line_feeds=""), flush=True)
    except BrokenPipeError:
        raise StdoutClosed from None


def print_json(data: dict[str, Any] | list[Any]) -> None:
    """Print JSON to stdout. Raises StdoutClosed like `print_text`."""
    print_data(data, "", as_json=True)


def print_data(data: dict[str, Any] | list[Any], text: str, as_json: bool) -> None:
    """Print data to stdout as JSON or as a text about it. Raises StdoutClosed like `print_text`."""
    print_text(json.dumps(data, indent=2) if as_json else text)

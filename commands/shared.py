"""What the commands share: the recipe's argument, and data on stdout."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

RecipeArgument = Annotated[Path, Parameter(help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Set one field, e.g. --set optim.steps=300; may be repeated."),
]


class StdoutClosed(Exception):
    """Whoever read our output has gone: `tinymim recipes | head -1`."""


def print_text(text: str) -> None:
    """Data, to stdout. Raises StdoutClosed where nobody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise StdoutClosed from None


def print_json(data: dict[str, Any] | list[Any]) -> None:
    """JSON, to stdout; errors as `print_text`."""
    print_text(json.dumps(data, indent=2))

"""`tinymim recipes`: list and print the recipes inside the package. Imports nothing heavy."""

from tinymim.configs.errors import RecipeError
from tinymim.configs.load import RECIPE_FILES, shipped_recipes


def text(name: str) -> str:
    """Return the YAML of a shipped recipe with its comments. Raises RecipeError for an unknown name."""
    if name not in (shipped := shipped_recipes()):
        raise RecipeError(f"no shipped recipe is named '{name}'", expected=", ".join(shipped))
    return RECIPE_FILES.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def listing() -> str:
    """Return one line per shipped recipe: its name and the first line of its header comment."""
    names = shipped_recipes()
    width = max(map(len, names), default=0)
    return "\n".join(f"{name:{width}}  {_headline(text(name))}" for name in names)


def names_for(stage: str) -> list[str]:
    """Return the names of the shipped recipes of one command."""
    return [name for name in shipped_recipes() if f"stage: {stage}" in text(name).splitlines()]


def _headline(yaml: str) -> str:
    first = yaml.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""

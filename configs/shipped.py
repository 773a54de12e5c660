"""`tinymim recipes`: list and print the recipes inside the package. Imports nothing heavy."""

from functools import cache
from pathlib import Path

from tinymim.configs.errors import RecipeError

RECIPE_FILES = Path(__file__).with_name("recipes")


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package, sorted, without `.yaml`: `demo-teacher`, ..."""
    files = RECIPE_FILES.rglob("*.yaml")
    return sorted(file.relative_to(RECIPE_FILES).with_suffix("").as_posix() for file in files)


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe."""
    return RECIPE_FILES / f"{name}.yaml"


def text(name: str) -> str:
    """Return the YAML of a shipped recipe with its comments. Raises RecipeError for an unknown name."""
    if name not in (shipped := shipped_recipes()):
        raise RecipeError(f"no shipped recipe is named '{name}'", expected=", ".join(shipped))
    return recipe_file(name).read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """The YAML of every shipped recipe by its name, with its comments; the first one says what the recipe is for."""
    return {name: text(name) for name in shipped_recipes()}


def listing() -> str:
    """Return one line per shipped recipe: its name and the first line of its header comment."""
    found = texts()
    width = max(map(len, found), default=0)
    return "\n".join(f"{name:{width}}  {_headline(yaml)}" for name, yaml in found.items())


@cache
def names_by_stage() -> dict[str, list[str]]:
    """Return the names of the shipped recipes by command, from their `stage:` lines."""
    names: dict[str, list[str]] = {}
    for name in shipped_recipes():
        for line in recipe_file(name).read_text(encoding="utf-8").splitlines():
            if line.startswith("stage: "):
                names.setdefault(line.removeprefix("stage: "), []).append(name)
    return names


def _headline(yaml: str) -> str:
    first = yaml.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""

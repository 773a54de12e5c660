"""Reading and writing recipes: a YAML file and `--set a.b=c` give one frozen, validated recipe, or one RecipeError.

Relative paths inside a recipe are relative to the working directory of the command, not to the recipe.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim.configs.errors import RecipeError, first_line, short
from tinymim.configs.shipped import recipe_file, shipped_recipes
from tinymim.configs.strict_yaml import dump_yaml, parse_yaml

if TYPE_CHECKING:
    # At run time by the functions that need it, once the YAML has been read: its import takes longer than reading.
    from pydantic_core import ErrorDetails

    from tinymim.configs.schema.recipes import Recipe
    from tinymim.configs.sections.base import Section

_MOST_BYTES = 1_000_000  # of a file


# ---- reading ----


def load_recipe(path: Path, stage: str, overrides: Sequence[str] = ()) -> "Recipe":
    """Read and validate the recipe of one command.

    Args:
        path: a file, or the bare name of a shipped recipe such as `demo-teacher`; a file wins.
        stage: the command, a key of RECIPES; the recipe's `stage:` line must name it.
        overrides: `a.b=value`, value in YAML; they override the file, later ones override earlier ones.

    Raises:
        RecipeError: unreadable file, bad YAML (with line), wrong stage, or all schema problems, one per line.
    """
    data = parse_yaml(_read(path), f"recipe {path}")
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path} has no fields", got=short.repr(data), expected=f"`stage: {stage}` and its fields"
        )
    from pydantic import ValidationError

    from tinymim.configs.overrides import overridden
    from tinymim.configs.schema.recipes import RECIPES

    for override in overrides:
        data = overridden(data, override, RECIPES[stage])
    _check_stage(data, path, stage, list(RECIPES))
    try:
        return RECIPES[stage].model_validate(data)
    except ValidationError as error:
        lines = [_problem(RECIPES[stage], details) for details in error.errors(include_url=False)]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        what = "\n  ".join([f"recipe {path} has {count}:", *lines])
        raise RecipeError(what, hint=f"print every field and its meaning: tinymim recipes --fields {stage}") from error


def load_recipes(paths: Sequence[Path], stages: Sequence[str], overrides: Sequence[str] = ()) -> "list[Recipe]":
    """Read several recipes, each for the command that its `stage:` line names.

    Args:
        paths: files or names of shipped recipes, as for `load_recipe`.
        stages: the allowed commands.
        overrides: `a.b=value`; each applies to the recipes that have a field `a`.

    Raises:
        RecipeError: as `load_recipe`; a recipe for another command; an override whose field no recipe has.
    """
    named: list[tuple[Path, str]] = []
    for path in paths:
        data = parse_yaml(_read(path), f"recipe {path}")
        stage = data.get("stage") if isinstance(data, dict) else None
        if not isinstance(stage, str) or stage not in stages:
            raise RecipeError(
                f"recipe {path} cannot be used here",
                got=f"stage: {short.repr(stage)}",
                expected=" or ".join(f"stage: {each}" for each in stages),
            )
        named.append((path, stage))
    from tinymim.configs.schema.recipes import RECIPES

    fields = {stage: RECIPES[stage].model_fields for _, stage in named}
    firsts = [override.partition("=")[0].strip().split(".")[0] for override in overrides]
    for override, first in zip(overrides, firsts, strict=True):
        if not any(first in known for known in fields.values()):
            everything = sorted({name for known in fields.values() for name in known})
            raise RecipeError(
                f"--set {override}: none of the recipes has this field",
                got=first,
                hint=_did_you_mean(first, everything) or f"fields: {', '.join(everything)}",
            )
    return [
        load_recipe(path, stage, [o for o, first in zip(overrides, firsts, strict=True) if first in fields[stage]])
        for path, stage in named
    ]


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_dir():  # not is_file(): a pipe will do
            with open(path, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
        elif (name := path.as_posix()) in (shipped := shipped_recipes()):
            data = recipe_file(name).read_bytes()
        else:
            raise RecipeError(
                f"recipe {path} not found",
                got="a folder" if path.is_dir() else "neither a file nor a shipped recipe",
                expected=f"a file, or a shipped recipe: {', '.join(shipped) or '(none)'}",
                hint=_did_you_mean(name.removesuffix(".yaml"), shipped),
            )
        if len(data) > _MOST_BYTES:
            raise RecipeError(f"recipe {path} is too long", got=f"over {_MOST_BYTES:,} bytes", expected="a YAML file")
        return data.decode()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        if isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
            raise RecipeError(f"recipe {path}, line {line}: not valid UTF-8", got=error.reason) from error
        raise RecipeError(f"recipe {path} cannot be read", got=first_line(error)) from error


# ---- checks ----


def _check_stage(data: dict[Any, Any], path: Path, stage: str, stages: Sequence[str]) -> None:
    got = data.get("stage")
    if got == stage:
        return
    if got is None:
        raise RecipeError(
            f"recipe {path} does not name its command",
            got="no `stage:` line",
            expected=f"stage: {stage}",
            hint=f"commands with recipes: {', '.join(stages)}",
        )
    if isinstance(got, str) and got in stages:
        raise RecipeError(
            f"recipe {path} is for `tinymim {got}`, not for `tinymim {stage}`",
            got=f"stage: {got}",
            expected=f"stage: {stage}",
            hint=f"run: tinymim {got} {path}",
        )
    raise RecipeError(
        f"recipe {path} names an unknown command",
        got=f"stage: {short.repr(got)}",
        expected=f"stage: {stage}",
        hint=_did_you_mean(str(got), stages) or f"commands with recipes: {', '.join(stages)}",
    )


def _problem(recipe: "type[Section]", error: "ErrorDetails") -> str:
    """One line: dotted name, message, value."""
    section, names = _walk(recipe, error["loc"])
    name = ".".join(map(str, names)) or "recipe"
    got = short.repr(error["input"])
    match error["type"]:
        case "missing":
            return f"{name}: required, but missing"
        case "value_error":  # from a validator of the schema, which states the values itself
            return f"{name}: {error['msg'].removeprefix('Value error, ')}"
        case "union_tag_not_found":
            return f"{name}.name: missing, and it has no default"
        case "union_tag_invalid":
            tags = error["ctx"]["expected_tags"]
            return f"{name}.name: got {error['ctx']['tag']!r}; expected one of {tags}"
        case "extra_forbidden":
            fields = section.model_fields
            near = _did_you_mean(str(names[-1]), fields) or f"fields here: {', '.join(fields)}"
            return f"{name}: unknown key (value {got}); {near}"
        case _:
            return f"{name}: got {got}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _walk(recipe: "type[Section]", loc: Sequence[int | str]) -> "tuple[type[Section], list[int | str]]":
    """Return the innermost section along `loc`, and `loc` without the tags that pydantic adds for unions."""
    from tinymim.configs.sections.base import sections_in

    section: type[Section] = recipe
    choices: dict[str, type[Section]] = {}  # the sections that the last field may be, by tag
    names: list[int | str] = []
    for part in loc:
        if isinstance(part, str) and len(choices) > 1 and part in choices:
            section, choices = choices[part], {}
            continue
        names.append(part)
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            kinds = sections_in(field.annotation)
            unions = kinds if len(kinds) > 1 else []
            choices = {" ".join(kind.choice().values()): kind for kind in unions}
            section = kinds[0] if len(kinds) == 1 else section
    return section, names


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else None


# ---- writing ----


def dump_recipe(recipe: "Section") -> str:
    """Return the recipe with all defaults, in the order of the schema, as YAML that loads back equal.

    Fields that all training recipes share come last.
    """
    data = recipe.model_dump(mode="json")
    data = {name: data[name] for name in dict.fromkeys([*type(recipe).__annotations__, *data])}
    return dump_yaml(data)


def recipe_digest(recipe: "Section") -> str:
    """blake2b-128 of the canonical JSON of a recipe or a section: 32 hex digits, equal for equal values."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

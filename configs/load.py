"""Reading and writing recipes: a YAML file and `--set a.b=c` give one frozen, validated recipe, or one RecipeError.

The YAML is 1.1 as PyYAML reads it, with two differences: `1e-3` is a number, and a repeated key is an error.
Relative paths inside a recipe are relative to the working directory of the command, not to the recipe.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any, get_args

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from tinymim.configs.errors import RecipeError
from tinymim.configs.shipped import recipe_file, shipped_recipes

if TYPE_CHECKING:
    # At run time by the functions that need it, once the YAML has been read: its import takes longer than reading.
    from pydantic_core import ErrorDetails

    from tinymim.configs.schema import Recipe
    from tinymim.configs.sections import Section

# Values in messages are cut: a recipe may hold a section where a number belongs.
_short = Repr()
_short.maxstring = _short.maxother = 60


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
    data = _parse(_read(path), f"recipe {path}")
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path} has no fields", got=_short.repr(data), expected=f"`stage: {stage}` and its fields"
        )
    for override in overrides:
        data = _overridden(data, override)
    from pydantic import ValidationError

    from tinymim.configs.schema import RECIPES

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
        data = _parse(_read(path), f"recipe {path}")
        stage = data.get("stage") if isinstance(data, dict) else None
        if not isinstance(stage, str) or stage not in stages:
            raise RecipeError(
                f"recipe {path} cannot be used here",
                got=f"stage: {_short.repr(stage)}",
                expected=" or ".join(f"stage: {each}" for each in stages),
            )
        named.append((path, stage))
    from tinymim.configs.schema import RECIPES

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
            data = path.read_bytes()
        elif (name := path.as_posix()) in (shipped := shipped_recipes()):
            data = recipe_file(name).read_bytes()
        else:
            raise RecipeError(
                f"recipe {path} not found",
                got="a folder" if path.is_dir() else "neither a file nor a shipped recipe",
                expected=f"a file, or a shipped recipe: {', '.join(shipped) or '(none)'}",
                hint=_did_you_mean(name.removesuffix(".yaml"), shipped),
            )
        return data.decode()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read", got=error) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"recipe {path}, line {line}: not valid UTF-8", got=error.reason) from error


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and gives every malformed value its line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            identity, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if identity in first_line:
                problem = f"key `{key.value}` is repeated; it first appears in line {first_line[identity]}"
                raise ComposerError(None, None, problem, key.start_mark)
            first_line[identity] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # `!!int x`, `!!bool x`, `2024-13-01`
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"not a valid {kind}: {error}", node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes what _Loader reads back: sections as blocks, lists inline."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


# YAML 1.1 requires a dot and a signed exponent, so PyYAML reads 1e-3 as a string. The dumper needs the same rule,
# because it quotes a string only if it would be read as something else.
_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, _represent_list)


def _parse(text: str, origin: str) -> Any:
    """YAML text -> plain Python values. Raises RecipeError that names origin and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{origin}{where}: not valid YAML", got=problem) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{origin}, line {line}: not valid YAML", got=error.reason) from error
    except RecursionError as error:
        raise RecipeError(f"{origin}: nested too deeply") from error


# ---- overrides and checks ----


def _overridden(data: dict[Any, Any], override: str) -> dict[Any, Any]:
    """Return a copy of data with one `a.b=value` applied."""
    name, equals, value = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            "--set needs a dotted name, `=` and a value", got=override, expected="such as optim.steps=300"
        )
    return _replaced(data, keys, _parse(value, f"--set {override}"), override)


def _replaced(section: Any, keys: Sequence[str], value: Any, override: str) -> dict[Any, Any]:
    # Copies along the path: two sections that share a YAML anchor must not change together.
    if section is not None and not isinstance(section, dict):
        raise RecipeError(f"--set {override}: `{keys[0]}` cannot be set inside a plain value", got=_short.repr(section))
    section = section or {}
    head, *rest = keys
    return {**section, head: _replaced(section.get(head), rest, value, override) if rest else value}


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
        got=f"stage: {_short.repr(got)}",
        expected=f"stage: {stage}",
        hint=_did_you_mean(str(got), stages) or f"commands with recipes: {', '.join(stages)}",
    )


def _problem(recipe: "type[Section]", error: "ErrorDetails") -> str:
    """One line: dotted name, message, value."""
    section, names = _walk(recipe, error["loc"])
    name = ".".join(map(str, names)) or "recipe"
    got = _short.repr(error["input"])
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
            kinds = _sections_in(field.annotation)
            unions = kinds if len(kinds) > 1 else []  # each member of a union has a literal name, its tag
            choices = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in unions}
            section = kinds[0] if len(kinds) == 1 else section
    return section, names


def _sections_in(annotation: Any) -> "list[type[Section]]":
    """The section classes that an annotation names, in order."""
    from tinymim.configs.sections import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections_in(inner)]


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
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def recipe_digest(recipe: "Section") -> str:
    """blake2b-128 of the canonical JSON of a recipe or a section: 32 hex digits, equal for equal values."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

"""Reading and writing recipes: a YAML file and `--set a.b=c` give one frozen, validated recipe, or one RecipeError.

The YAML is 1.1 as PyYAML reads it, with two differences: `1e-3` is a number, and a repeated key is an error.
Relative paths inside a recipe are relative to the working directory of the command, not to the recipe.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from tinymim.configs.errors import RecipeError, first_line
from tinymim.configs.shipped import recipe_file, shipped_recipes

if TYPE_CHECKING:
    # At run time by the functions that need it, once the YAML has been read: its import takes longer than reading.
    from pydantic_core import ErrorDetails

    from tinymim.configs.schema.recipes import Recipe
    from tinymim.configs.sections.base import Section

# Values in messages are cut: a recipe may hold a section where a number belongs.
_short = Repr()
_short.maxstring = _short.maxother = 60
_MOST_BYTES = 1_000_000  # of a file
_MOST_VALUES = 10_000  # with aliases written out
_MOST_DIGITS = 100  # of a number or date


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
            f"recipe {path} has no fields", got=_short.repr(data), expected=f"`stage: {stage}` and its fields"
        )
    from pydantic import ValidationError

    from tinymim.configs.schema.recipes import RECIPES

    for override in overrides:
        data = _overridden(data, override, RECIPES[stage])
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
                got=f"stage: {_short.repr(stage)}",
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


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and bombs, and gives every malformed value its line."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _expanded(node, {}, set())
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value: str = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise ConstructorError(None, None, "text that no file name can hold: null or surrogate", node.start_mark)
        if not node.tag.endswith(":str") and len(value) > _MOST_DIGITS:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"not a valid {kind}: {len(value):,} characters", node.start_mark)
        return value

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
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            OverflowError,
        ) as error:  # `!!int x`, `!!bool x`, `2024-13-01`
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"not a valid {kind}: {error}", node.start_mark) from error


def _expanded(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """The number of values below a node once its aliases are written out. Raises ComposerError where it is too large.

    Args:
        node: the node.
        sizes: the numbers that are known, by node.
        above: the nodes that it is in.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise ComposerError(None, None, "an alias to a section that it is in", node.start_mark)
    if id(node) not in sizes:
        pairs = isinstance(node, yaml.MappingNode)
        below = [each for pair in node.value for each in pair] if pairs else node.value
        sizes[id(node)] = 1 + sum(_expanded(each, sizes, above | {id(node)}) for each in below)
        if sizes[id(node)] > _MOST_VALUES:
            raise ComposerError(None, None, f"aliases that stand for over {_MOST_VALUES:,} values", node.start_mark)
    return sizes[id(node)]


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


def parse_yaml(text: str, origin: str) -> Any:
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
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply") from None  # its traceback has a thousand frames


# ---- overrides and checks ----


def _overridden(data: dict[Any, Any], override: str, recipe: "type[Section]") -> dict[Any, Any]:
    """Return a copy of data with one `a.b=value` applied."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            "--set needs a dotted name, `=` and a value", got=override, expected="such as optim.steps=300"
        )
    return _replaced(data, keys, _value(text, keys, override, recipe), override)


def _value(text: str, keys: Sequence[str], override: str, recipe: "type[Section]") -> Any:
    """The value of an override: YAML; the text as it stands where the field is text and the YAML is none."""
    kinds = [kind for field in _fields_at(recipe, keys) for kind in _kinds(field)]
    only_text = bool(kinds) and all(kind in (str, Path, NoneType) for kind in kinds)
    try:
        value = parse_yaml(text, f"--set {override}")
    except RecipeError:
        if only_text and "\0" not in text:
            return text
        raise
    null = value is None and not text.lstrip().startswith("#")
    return value if not only_text or isinstance(value, str) or null else text.strip()


def _fields_at(section: "type[Section]", keys: Sequence[str]) -> Iterator[Any]:
    """The annotations of the field with a dotted name, in each of the sections that may stand there."""
    head, *rest = keys
    field = section.model_fields.get(head)
    if field is None:
        return
    if not rest:
        yield field.annotation
    named = any(get_origin(each) is dict for each in (field.annotation, *get_args(field.annotation)))
    below = rest[1:] if named else rest
    for inner in _sections_in(field.annotation) if below else ():
        yield from _fields_at(inner, below)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types of an annotation, with those of its literals."""
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        yield from _kinds(arguments[0])
    elif get_origin(annotation) is Literal:
        yield from map(type, arguments)
    elif get_origin(annotation) in (Union, UnionType):
        for each in arguments:
            yield from _kinds(each)
    else:
        yield annotation


def _replaced(section: Any, keys: Sequence[str], value: Any, override: str) -> dict[Any, Any]:
    # Copies along the path: two sections that share a YAML anchor must not change together.
    if section is not None and not isinstance(section, dict):
        raise RecipeError(f"--set {override}: `{keys[0]}` cannot be set inside a plain value", got=_short.repr(section))
    section = section or {}
    # A name may hold dots, as those of layers do: the longest one that the section has.
    count = next((n for n in range(len(keys), 1, -1) if ".".join(keys[:n]) in section), 1)
    head, rest = ".".join(keys[:count]), keys[count:]
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
            unions = kinds if len(kinds) > 1 else []
            choices = {" ".join(kind.choice().values()): kind for kind in unions}
            section = kinds[0] if len(kinds) == 1 else section
    return section, names


def _sections_in(annotation: Any) -> "list[type[Section]]":
    """The section classes that an annotation names, in order."""
    from tinymim.configs.sections.base import Section

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

"""`--set a.b=c`: one value of a recipe replaced, before the schema sees it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tinymim.configs.errors import RecipeError, short
from tinymim.configs.sections.base import Section, sections_in
from tinymim.configs.strict_yaml import parse_yaml


def overridden(data: dict[Any, Any], override: str, recipe: type[Section]) -> dict[Any, Any]:
    """Return a copy of data with one `a.b=value` applied."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            "--set needs a dotted name, `=` and a value", got=override, expected="such as optim.steps=300"
        )
    return _replaced(data, keys, _value(text, keys, override, recipe), override)


def _value(text: str, keys: Sequence[str], override: str, recipe: type[Section]) -> Any:
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


def _fields_at(section: type[Section], keys: Sequence[str]) -> Iterator[Any]:
    """The annotations of the field with a dotted name, in each of the sections that may stand there."""
    head, *rest = keys
    field = section.model_fields.get(head)
    if field is None:
        return
    if not rest:
        yield field.annotation
    named = any(get_origin(each) is dict for each in (field.annotation, *get_args(field.annotation)))
    below = rest[1:] if named else rest
    for inner in sections_in(field.annotation) if below else ():
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
        raise RecipeError(f"--set {override}: `{keys[0]}` cannot be set inside a plain value", got=short.repr(section))
    section = section or {}
    # A name may hold dots, as those of layers do: the longest one that the section has.
    count = next((n for n in range(len(keys), 1, -1) if ".".join(keys[:n]) in section), 1)
    head, rest = ".".join(keys[:count]), keys[count:]
    return {**section, head: _replaced(section.get(head), rest, value, override) if rest else value}

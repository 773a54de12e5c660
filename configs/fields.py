"""The fields of every recipe as text: `tinymim recipes --fields STAGE` and `docs/recipes.md`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.sections.base import Section, sections_in
from tinymim.configs.sections.values import LARGEST

ALL = "all"  # in place of a stage: every stage, as docs/recipes.md has it

_INTRO = """# Recipes

A recipe is a YAML file that describes one whole run. This page lists every field of every recipe.

    tinymim recipes                                # list the shipped recipes
    tinymim recipes tinyimagenet40-mae > mine.yaml # copy one to start from
    tinymim recipes --fields pretrain-mae          # print the fields of one command
    tinymim pretrain-mae mine.yaml --set optim.steps=200 --set run.folder=runs/short
    tinymim pretrain-mae tinyimagenet40-mae        # a shipped recipe also runs by its name

- **`stage:`** names the command that the recipe is for.
- **`--set a.b=c`** sets one field and may be repeated. The value is YAML: `null`, `1e-3`, `[0.2, 1.0]`, `cpu`. Where
  the field is text, any value is taken as it stands: `--set source.pattern=*.tar`.
  Flags override the file, and later flags override earlier ones.
- **Paths** are relative to the working directory, not to the recipe. A file wins over a shipped recipe of that name.
- **Mistakes** are reported all at once, before anything is read or written. Each is named by its dotted field.
- **The run folder** receives `recipe.yaml`, the recipe with every default filled in. It is a recipe itself.

Longer explanations: [object stores](object-stores.md), [training](training.md) (several students, many GPUs,
resume, memory), [student audits](audits.md), [clusters](cluster.md), [views](views.md), [fine-tuning](finetune.md).

This page is generated: `tinymim recipes --fields all > docs/recipes.md`."""

MOST_PLACES = 4  # places of a section that its title names


def text(stage: str) -> str:
    """The fields of one recipe and of its sections as Markdown tables.

    Args:
        stage: the command of the recipe, such as "train-student", or "all" for the whole of `docs/recipes.md`.

    Raises:
        RecipeError: no command of this name has a recipe.
    """
    if stage not in (ALL, *RECIPES):
        raise RecipeError("no command of this name has a recipe", got=stage, expected=f"{', '.join(RECIPES)} or {ALL}")
    recipes = list(RECIPES.values()) if stage == ALL else [RECIPES[stage]]
    parts = [_INTRO] if stage == ALL else []
    parts += [_part(f"Recipe of `{_stage(recipe)}`", recipe) for recipe in recipes]
    parts += [_part(f"Section {title}", section) for title, section in _titled_sections(recipes)]
    return "\n\n".join(parts) + "\n"


def _stage(recipe: type[Section]) -> str:
    name: str = get_args(recipe.model_fields["stage"].annotation)[0]
    return name


# ---- sections and where they stand ----


def _titled_sections(recipes: Iterable[type[Section]]) -> Iterator[tuple[str, type[Section]]]:
    """Every section below these recipes with its title: the dotted names under which it stands."""
    places: dict[type[Section], dict[str, None]] = {}
    users: dict[type[Section], list[str]] = {}
    for recipe in recipes:
        for place, section in _sections_below(recipe, ""):
            places.setdefault(section, {})[place] = None
            if _stage(recipe) not in users.setdefault(section, []):
                users[section].append(_stage(recipe))
    for section, names in places.items():
        listed = [f"`{name}`" for name in names]
        title = ", ".join(listed[:MOST_PLACES]) + (", ..." if len(listed) > MOST_PLACES else "")
        shared = any(set(names) & set(others) for other, others in places.items() if other is not section)
        if choice := section.choice():
            title += f" with {', '.join(f'`{name}: {value}`' for name, value in choice.items())}"
        elif shared:
            title += f" of {', '.join(f'`{user}`' for user in users[section])}"
        yield title, section


def _sections_below(section: type[Section], place: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        named = place + name + (".NAME" if dict in _origins(field.annotation) else "")
        for inner in sections_in(field.annotation):
            yield named, inner
            yield from _sections_below(inner, f"{named}.")


def _origins(annotation: Any) -> list[Any]:
    return [get_origin(each) for each in (annotation, *get_args(annotation))]


# ---- one table ----


def _part(title: str, section: type[Section]) -> str:
    """Heading, docstring and table of a recipe or a section."""
    first, _, rest = (section.__doc__ or "").strip().partition("\n")
    lines = [f"## {title}", "", first, *(line.strip() for line in rest.splitlines()), ""]
    lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {_values(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in ((name, section.model_fields[name]) for name in _in_order(section))
    ]
    return "\n".join(lines)


def _in_order(section: type[Section]) -> Iterable[str]:
    """Names of the fields, those of a base class last, as `dump_recipe` writes them."""
    return dict.fromkeys([*section.__annotations__, *section.model_fields])


def _cell(meaning: str) -> str:
    return meaning.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    value, extra = field.default, field.json_schema_extra
    if isinstance(extra, dict) and "default" in extra:  # filled in by a validator
        return str(extra["default"])
    if field.is_required():
        return "required"
    if isinstance(value, Section):
        return "see section"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f"`{value}`" if isinstance(value, str) else _plain(value)


def _plain(value: object) -> str:
    """A value as YAML has it: true, null, 0.75, 1e-6, qk."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("e-0", "e-")
    if isinstance(value, Section):  # of a list: by its name
        return f"{{{', '.join(f'{name}: {chosen}' for name, chosen in value.choice().items())}}}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- what a field accepts, in words ----


def _values(field: FieldInfo) -> str:
    return _listed(dict.fromkeys(_kinds(field.annotation, field.metadata)))


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


_WORDS = {bool: "true or false", str: "text", Path: "path", Path | str: "path or URL"}


def _kinds(annotation: Any, limits: Iterable[Any]) -> Iterator[str]:
    """The alternatives of an annotation: `integer >= 1`, `path`, `section`, ..."""
    arguments = get_args(annotation)
    if annotation is NoneType:
        return
    if annotation in _WORDS:
        yield _WORDS[annotation]
    elif hasattr(annotation, "__metadata__"):  # Annotated
        yield from _kinds(arguments[0], [*limits, *annotation.__metadata__])
    elif get_origin(annotation) is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield "section"
    elif get_origin(annotation) is tuple and Ellipsis in arguments:
        yield f"list of {_listed(dict.fromkeys(_kinds(arguments[0], ())))}"
    elif get_origin(annotation) is tuple:
        yield f"{len(arguments)} numbers"
    elif get_origin(annotation) is dict and not sections_in(arguments[1]):
        yield "values by name"
    elif get_origin(annotation) is dict:
        yield "sections by name"
    elif annotation in (int, float):
        yield ("integer" if annotation is int else "number") + _range(limits)
    else:  # a union
        for each in arguments:
            yield from _kinds(each, limits)


def _range(limits: Iterable[Any]) -> str:
    """The bounds among an annotation's metadata: ` >= 1`, ` from 0 to 1`, ` > 0, < 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found: dict[str, float] = {}
    for limit in limits:
        for each in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            for name, narrower in (("ge", max), ("gt", max), ("le", min), ("lt", min)):
                if (bound := getattr(each, name, None)) is not None:
                    found[name] = narrower(bound, found.get(name, bound))
    found = {name: bound for name, bound in found.items() if abs(bound) < LARGEST}  # larger: the types' own limits
    if found.keys() == {"ge", "le"}:
        return f" from {_plain(found['ge'])} to {_plain(found['le'])}"
    return "".join(f"{',' * (i > 0)} {signs[name]} {_plain(value)}" for i, (name, value) in enumerate(found.items()))

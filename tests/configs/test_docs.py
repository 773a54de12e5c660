"""docs/recipes.md explains every field of the schema, with the default it has."""

import re
from pathlib import Path
from typing import get_args

import pytest

from tinymim.configs.load import shipped_recipes
from tinymim.configs.schema import RECIPES
from tinymim.configs.sections import Section

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
DOCUMENTED = set(re.findall(r"`([a-z0-9_.]+)`", TEXT))


def _sections(kind: object, found: set[type[Section]]) -> set[type[Section]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        found.add(kind)
        for field in kind.model_fields.values():
            _sections(field.annotation, found)
    for inner in get_args(kind):
        _sections(inner, found)
    return found


@pytest.mark.parametrize("stage", RECIPES)
def test_every_field_stands_in_the_table(stage: str) -> None:
    last_parts = {name.rpartition(".")[2] for name in DOCUMENTED}
    sections = _sections(RECIPES[stage], set())
    missing = [f"{s.__name__}.{name}" for s in sections for name in s.model_fields if name not in last_parts]
    assert missing == []


def test_every_row_is_about_a_field_that_exists() -> None:
    known = {name for kind in RECIPES.values() for s in _sections(kind, set()) for name in s.model_fields}
    rows = re.findall(r"^\| `([a-z0-9_.]+)`(?:, `([a-z0-9_.]+)`)*", TEXT, re.MULTILINE)
    named = {name.rpartition(".")[2] for row in rows for name in row if name}
    assert len(named) > 40 and named <= known


def test_numeric_defaults_of_the_tables_are_those_of_the_schema() -> None:
    defaults: dict[str, set[float]] = {}
    for kind in RECIPES.values():
        for section in _sections(kind, set()):
            for name, field in section.model_fields.items():
                if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                    defaults.setdefault(name, set()).add(float(field.default))
    checked = 0
    for name, stated in re.findall(r"^\| `([a-z0-9_.]+)` \| ([0-9.e-]+) \|", TEXT, re.MULTILINE):
        assert float(stated) in defaults[name.rpartition(".")[2]], name
        checked += 1
    assert checked > 25


def test_shipped_recipes_that_are_named_exist() -> None:
    named = set(re.findall(r"tinymim (?:recipes|pretrain-mae) ([a-z0-9-]+)(?= |$)", TEXT, re.MULTILINE))
    assert named and named <= set(shipped_recipes())

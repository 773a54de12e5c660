"""The schema explains every field; `tinymim recipes --fields` prints that, and docs/recipes.md is the same text."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tinymim.configs import fields
from tinymim.configs.errors import RecipeError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.sections.base import Section
from tinymim.configs.shipped import shipped_recipes

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def _sections(kind: object) -> Iterator[type[Section]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
        for field in kind.model_fields.values():
            yield from _sections(field.annotation)
    for inner in get_args(kind):
        yield from _sections(inner)


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text() == fields.text("all"), "run: tinymim recipes --fields all > docs/recipes.md"


@pytest.mark.parametrize("stage", RECIPES)
def test_every_field_of_a_recipe_has_a_row_with_a_meaning(stage: str) -> None:
    text = fields.text(stage)
    for section in _sections(RECIPES[stage]):
        for name, field in section.model_fields.items():
            description = field.description or ""
            where = f"{section.__name__}.{name}"
            assert re.match(r"[A-Z`].*\.$", description), where
            assert len(description.split()) <= 30, where
            row = re.escape(f"| `{name}` | ") + "[^|]+" + re.escape("| ") + "[^|]+" + re.escape(f"| {description} |")
            assert re.search(f"^{row}$", text, re.M), where


def test_a_stage_prints_its_own_sections_only_each_once() -> None:
    titles = re.findall("^## (.*)$", fields.text("pretrain-mae"), re.M)
    assert titles[0] == "Recipe of `pretrain-mae`" and len(set(titles)) == len(titles)
    assert "Section `mae`" in titles and "Section `teacher`" not in titles
    everywhere = re.findall("^## (.*)$", fields.text("all"), re.M)
    assert len(set(everywhere)) == len(everywhere) and "Section `optim` of `finetune`" in everywhere


def test_values_and_defaults_are_in_words() -> None:
    text = fields.text("all")
    for row in (
        "| `flip` | number from 0 to 1 | 0.5 |",
        "| `mask_ratio` | number > 0, < 1 | 0.75 |",
        "| `precision` | `fp32`, `bf16` or `fp16` | `fp32` |",
        "| `relations` | list of `qk`, `vv`, `qq` or `kk` | [qk, vv] |",
        "| `shards` | path or URL | required |",
        "| `clip_norm` | number > 0 | null |",
        "| `drop_path` | number >= 0, < 1 | the recipe's |",
        "| `batch_size` | integer from 1 to 1048576 or `auto` | 64 |",
    ):
        assert row in text


def test_an_unknown_stage_is_refused_with_the_stages_there_are() -> None:
    with pytest.raises(RecipeError, match=r"train-student.* or all"):
        fields.text("pre-train")


def test_a_wrong_recipe_names_the_command_that_explains_its_fields(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: evaluate\nwheights: random\n")
    with pytest.raises(RecipeError, match="tinymim recipes --fields evaluate"):
        load_recipe(recipe, "evaluate")


def test_shipped_recipes_that_the_page_names_exist() -> None:
    named = re.findall(r"tinymim (?:recipes|pretrain-mae) ([a-z0-9-]+)(?= |$)", PAGE.read_text(), re.M)
    assert {name for name in named if not name.startswith("-")} <= set(shipped_recipes())

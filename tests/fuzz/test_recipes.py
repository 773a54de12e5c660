"""Any value in any field of any recipe gives a RecipeError that names the field, or a recipe that loads back equal."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import RecipeError
from tinymim.configs.load import dump_recipe, load_recipe, recipe_digest
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.shipped import recipe_file, shipped_recipes
from tinymim.configs.strict_yaml import parse_yaml
from tinymim.tests.fuzz.damage import damaged, outcomes
from tinymim.tests.fuzz.odd import VALUES, places, put

STARTS = {
    "pretrain-mae": "mae-lite-tiny",
    "pretrain": "imagenet-fastmim-swin-b",
    "cache-teacher": "imagenet-sample-topk",
    "train-student": "imagenet-tinymim-t",
    "finetune": "imagenet-mae-lite-finetune",
    "evaluate": "tinyimagenet40-eval",
    "fidelity": "imagenet-sample-fidelity",
    "chain": "imagenet-tinymim-chain",
}


def whole(stage: str) -> Any:
    """A valid recipe with every field written out, as JSON values."""
    recipe = load_recipe(Path(STARTS[stage]), stage)
    data = recipe.model_dump(mode="json")
    if stage == "train-student":
        data |= {"ema": {"decay": 0.5, "warmup": True}}
        knn = {"train": data["source"], "val": data["source"], "k": 3, "temperature": 0.1, "resize_ratio": 1.0}
        data["audit"] = {"cache": "a", "source": data["source"], "every_epochs": 1.0, "num_images": 8, "knn": knn}
    if stage == "cache-teacher":
        cluster = {"address": "auto", "workers": 2, "gpus_per_worker": 0.5, "cpus_per_worker": 2.0}
        data |= {"cluster": cluster}
    return data


def check(path: Path, stage: str) -> str:
    """Load a recipe; what it holds must come back from its own dump, and have a digest."""
    recipe = load_recipe(path, stage)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert recipe_digest(load_recipe(path, stage)) == recipe_digest(recipe)
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False)
    return "valid"


@pytest.mark.parametrize(
    "every",
    [150, pytest.param(1, marks=pytest.mark.slow)],  # slow: all of 32,000 values, four minutes
)
@pytest.mark.parametrize("stage", RECIPES)
def test_every_value_in_every_field(stage: str, every: int, tmp_path: Path) -> None:
    start = json.dumps(whole(stage))
    cases = [(keys, value) for keys in places(json.loads(start)) for value in VALUES][::every]
    path = tmp_path / "recipe.yaml"

    def read(number: int) -> str:
        keys, value = cases[number]
        data = json.loads(start)
        put(data, keys, value)
        path.write_text(json.dumps(data), encoding="utf-8")
        try:
            return check(path, stage)
        except RecipeError as error:
            if str(keys[0]) not in str(error):
                raise AssertionError(f"{keys} = {value!r} is not named: {error}") from error
            return "RecipeError"

    found = outcomes(read, len(cases))
    print(f"{stage}: {sum(found.values()):,} values: {dict(found)}")
    assert set(found) == {"valid", "RecipeError"}


@pytest.mark.parametrize(
    "count",
    [300, pytest.param(20_000, marks=pytest.mark.slow)],  # slow: two minutes, for rare combinations
)
def test_damaged_files(count: int, tmp_path: Path) -> None:
    texts = {name: recipe_file(name).read_bytes() for name in shipped_recipes()}
    rng, path = random.Random(0), tmp_path / "recipe.yaml"

    def read(_number: int) -> str:
        name = rng.choice(list(texts))
        path.write_bytes(damaged(texts[name], rng))
        return check(path, parse_yaml(texts[name].decode(), name)["stage"])

    found = outcomes(read, count)
    print(f"recipes: {sum(found.values()):,} damaged files: {dict(found)}")
    assert set(found) == {"valid", "RecipeError"}

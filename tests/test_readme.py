"""Every command that README and the shipped recipes show can be typed as it stands."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tinymim.configs.load import load_recipe, load_recipes
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.shipped import shipped_recipes
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.timm_folder import Pixels, timm_config
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_vit
from tinymim.stages.run.folder import STUDENT_NAME, write_weights

ROOT = Path(__file__).parent.parent
OTHER_VERBS = {"compare", "make-shards", "cache", "recipes", "demo"}


def commands() -> list[list[str]]:
    files = [ROOT / "README.md", *(ROOT / "configs" / "recipes").glob("*.yaml")]
    texts = [re.sub(r"\\\n#? +", "", file.read_text()) for file in files]  # a line that ends with \ goes on
    lines = [line for text in texts for line in re.findall(r"^(?:    |#   )(tinymim .*)$", text, re.M)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_shown_command_names_a_verb_and_a_recipe_that_exist(command: list[str]) -> None:
    verb, *rest = command
    if verb in OTHER_VERBS:
        return
    if verb == "plan":
        load_recipes([Path(word) for word in rest if not word.startswith("-")], ("cache-teacher", "train-student"))
        return
    assert verb in RECIPES
    overrides = [value for flag, value in pairwise(rest) if flag == "--set"]
    load_recipe(Path(rest[0]), verb, overrides)


def test_a_student_loads_into_timm_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    recipe = load_recipe(Path("imagenet-tinymim-t"), "train-student")
    assert isinstance(recipe, TrainStudentRecipe) and recipe.student is not None
    student = build_vit(recipe.student)
    (tmp_path / recipe.run.folder).mkdir(parents=True)
    pixels = Pixels(IMAGENET_MEAN, IMAGENET_STD)
    config = timm_config(student, recipe.student, pixels)
    write_weights(tmp_path / recipe.run.folder / STUDENT_NAME, to_safetensors(student.state_dict(), {}), config)
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {}
    exec(block, shown)
    assert student.cls_token is not None and torch.equal(shown["model"].cls_token, student.cls_token)
    assert shown["transform"].transforms[-1].mean.tolist() == pytest.approx(IMAGENET_MEAN)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "configs" / "recipes" / f"{name}.yaml").read_text()
    stage = re.search(r"^stage: (\S+)$", text, re.M)
    assert stage is not None
    load_recipe(Path(name), stage[1])
    assert f"tinymim {stage[1]} {name}" in text


def test_local_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

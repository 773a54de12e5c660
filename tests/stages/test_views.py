"""`tinymim views`: the sheet shows what both stages draw, and names from outside are text."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.masks import mask_order
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import make_shards, views
from tinymim.stages.pages.views import step_text
from tinymim.tests.stages.conftest import Run
from tinymim.tests.stages.test_pretrain_mae import recipe as mae_recipe
from tinymim.tests.stages.tiny import cache_recipe

LAW: dict[str, Any] = {"size": 32, "operations": {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5}}


def pictures(page: str) -> list[np.ndarray[Any, Any]]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_page_holds_every_view_with_box_and_operations(made: Path, tmp_path: Path) -> None:
    recipe = cache_recipe(made, views=LAW)
    found = views.run(recipe, views.Options(tmp_path / "v.html", images=3, views=4))
    assert found["images"] == 3 and "rand-m9" in str(found["law"])
    assert Image.open(io.BytesIO((tmp_path / "v.png").read_bytes())).width > 800
    page = (tmp_path / "v.html").read_text()
    shown, law = pictures(page), RandomViews(ViewConfig.model_validate(LAW))
    assert len(shown) == 12 and page.count("<h2>") == 3
    source = open_shards(recipe.source)
    key = source.shards[0].members().keys[0]
    batch = ImageViews(source.shards, law, 0).batch(np.array([[0, 0, view] for view in range(4)]))
    for view, (top, left, height, width, flip) in enumerate(batch.views):
        assert np.array_equal(shown[view][::3, ::3].transpose(2, 0, 1), batch.pixels[view].numpy())
        row = page.split(f"<tr><td>{view}</td>")[1].split("</tr>")[0]
        assert f"{width} x {height} at ({left}, {top})</td><td>{'yes' if flip else 'no'}" in row
        assert all(step_text(step) in row for step in law.steps(key, view))


@pytest.mark.parametrize("stage", ["pretrain-mae", "cache-teacher"])
def test_masks_of_both_stages_are_shown(stage: str, drawn_shards: Path, tmp_path: Path) -> None:
    if stage == "pretrain-mae":
        recipe: Any = mae_recipe(drawn_shards, tmp_path / "run")
    else:
        recipe = cache_recipe(tmp_path, source={"shards": drawn_shards}, mask={"ratio": 0.75})
    found = views.run(recipe, views.Options(tmp_path / "v.html", images=1, views=1))
    assert "masks: 0.75 of units of 1 patches, seed 0" in str(found["law"])
    page = (tmp_path / "v.html").read_text()
    assert "mask: 12 of 16 patches hidden" in page
    key = open_shards(recipe.source).shards[0].members().keys[0]
    grey = (pictures(page)[0][::3, ::3] == 128).all(axis=2).reshape(4, 8, 4, 8).all(axis=(1, 3))
    assert np.array_equal(grey.ravel(), mask_order(0, key, 0, 4, 4) >= 4)


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "<script>$x_1$"
    folder.mkdir(parents=True)
    for name in ("a&b", "broken"):
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(folder / f"{name}.png")
    make_shards.run(str(tmp_path / "images"), tmp_path / "<b>shards", make_shards.Options())
    recipe = cache_recipe(tmp_path, source={"shards": tmp_path / "<b>shards"}, views={"size": 32})
    views.run(recipe, views.Options(tmp_path / "v.html", images=9, views=2))
    page = (tmp_path / "v.html").read_text()
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and "&lt;b&gt;shards" in page and page.count("<h2>") == 2


def test_the_command_takes_both_stages_and_refuses_the_rest(made: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "sheet.html"
    overrides = ["--set", f"source.shards={made / 'shards'}", "--images", 1, "--views", 1]
    code, out, _ = run("views", "demo-cache", target, *overrides)
    assert code == 0 and json.loads(out)["picture"] == str(tmp_path / "sheet.png") and target.exists()
    code, _, err = run("views", "demo-wide", target)
    assert code == 2 and "train-student" in err


@pytest.mark.parametrize(("name", "images"), [("v.png", 1), ("v.html", 0), ("v.html", 101)])
def test_a_sheet_without_content_is_refused(made: Path, tmp_path: Path, name: str, images: int) -> None:
    with pytest.raises(RecipeError):
        views.run(cache_recipe(made), views.Options(tmp_path / name, images, 1))

"""`tinymim look`: one image of a cache with a layer of every kind, with teacher and student; what is not at hand."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages import cache_teacher, look, make_shards, train_student
from tinymim.stages.pages.image import ImagePage, LayerPicture, SeenView, image_page
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import cache_recipe, copied, student_recipe

TARGETS: dict[str, Any] = {
    "sketch": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}},
    "ff": {"codec": {"kind": "ff", "rows": 8}},
    "gram": {"codec": {"kind": "gram", "rows": 8, "columns": 8}},
    "features": {"codec": {"kind": "features", "tokens": 8}},
    "cls": {"codec": {"kind": "cls"}},
    "bank": {"codec": {"kind": "bank", "anchors": 20, "tau": 0.5}},
    "attention": {"codec": {"kind": "attention", "rows": 8}},
    "hidden": {"codec": {"name": "hidden", "calibration_views": 8}},
}
LEARNT: dict[str, Any] = {name: {} for name in TARGETS if name != "hidden"}


def every_kind(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"codec": None, "targets": TARGETS, "cache": root / "kinds"} | changes))


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a layer of every kind, and a student of all but one."""
    root = copied(made, tmp_path_factory.mktemp("look") / "made")
    cache_teacher.run(every_kind(root))
    optim = {"batch_size": 8, "steps": 2, "base_lr": 0.1, "warmup": 0.2}
    train_student.run(student_recipe(root, cache=root / "kinds", layers=LEARNT, optim=optim))
    return root


def options(root: Path, **changes: Any) -> look.Options:
    key = CacheReader(root / "kinds").keys("shard-000001.tar")[2]
    fields: dict[str, Any] = {"key": key, "target": root / "look.html", "recipe": None, "source": None, "students": ()}
    return look.Options(**(fields | {"views": 2, "lines": 2} | changes))


def test_every_kind_is_shown_by_teacher_cache_and_student(made: Path, tmp_path: Path) -> None:
    whole = options(made, target=tmp_path / "a.html", recipe=every_kind(made), students=[made / "run-student"])
    found = look.run(made / "kinds", whole)
    assert found["shard"] == "shard-000001.tar" and found["views"] == found["same_pixels"] == [0, 1]
    assert found["layers"].keys() == TARGETS.keys()
    for name, layer in found["layers"].items():
        learnt = ["run-student"] if name in LEARNT else []
        assert layer["columns"] == ["teacher", "in the cache", *learnt]
        assert list(layer["losses"]) == learnt
        assert all(np.isfinite(value) for losses in layer["losses"].values() for value in losses.values())
    page = (tmp_path / "a.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2 + len(TARGETS)
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert page.count("the same pixels as the teacher saw") == 2
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as picture:
        assert picture.width > 400 and picture.height > 1000


def test_without_images_the_page_shows_what_is_stored(made: Path, tmp_path: Path) -> None:
    found = look.run(made / "kinds", options(made, target=tmp_path / "a.html", views=1))
    assert found["views"] == [0] and found["same_pixels"] == []
    assert {tuple(layer["columns"]) for layer in found["layers"].values()} == {("in the cache",)}
    assert "name them with --source" in (tmp_path / "a.html").read_text()


def test_with_images_alone_views_are_drawn_and_compared(made: Path, tmp_path: Path) -> None:
    shown = options(made, target=tmp_path / "a.html", source=str(made / "shards"), students=[made / "run-student"])
    found = look.run(made / "kinds", shown)
    assert found["same_pixels"] == [0, 1]
    assert found["layers"]["gram"]["columns"] == ["in the cache", "run-student"]


def test_other_pixels_are_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "low_digests", lambda batch: np.zeros(len(batch.keys), np.uint32))
    found = look.run(made / "kinds", options(made, target=tmp_path / "a.html", source=str(made / "shards")))
    assert found["same_pixels"] == []
    assert (tmp_path / "a.html").read_text().count("OTHER PIXELS here") == 2


def test_what_does_not_belong_is_refused(made: Path, tmp_path: Path) -> None:
    cache = made / "kinds"
    with pytest.raises(UserError, match=r"no image of this key(.|\n)*such as "):
        look.run(cache, options(made, key="no/such"))
    with pytest.raises(RecipeError, match=r"FILE\.html"):
        look.run(cache, options(made, target=tmp_path / "a.png"))
    with pytest.raises(RecipeError, match="out of range"):
        look.run(cache, options(made, views=0))
    with pytest.raises(CheckpointError, match="not the run folder of one student"):
        look.run(cache, options(made, students=[tmp_path]))
    make_shards.run("drawn", tmp_path / "others", make_shards.Options(12, count=36, seed=6))
    with pytest.raises(CacheMismatch, match="not the one the teacher saw"):
        look.run(cache, options(made, source=str(tmp_path / "others")))
    others = TARGETS | {"gram": {"codec": {"kind": "gram", "rows": 4, "columns": 8}}}
    with pytest.raises(CacheMismatch, match=r"layer gram(.|\n)*rows"):
        look.run(cache, options(made, recipe=every_kind(made, targets=others)))
    assert list(tmp_path.iterdir()) == [tmp_path / "others"], "nothing was written"


def test_masked_layers_are_shown_as_their_teacher_saw_them(made: Path, tmp_path: Path) -> None:
    """The dense answers of teacher and cache are the same numbers, so the student's loss is that of dense targets."""
    root = copied(made, tmp_path / "made")
    masked = {"targets": {"rel": {"codec": {"name": "dense"}, "mask": {"ratio": 0.5, "seed": 4}}}}
    cache_teacher.run(every_kind(root, **masked))
    optim = {"batch_size": 8, "steps": 2, "base_lr": 0.1, "warmup": 0.2}
    train_student.run(student_recipe(root, cache=root / "kinds", layer="rel", optim=optim))
    shown = options(root, recipe=every_kind(root, **masked), students=[root / "run-student"])
    found = look.run(root / "kinds", shown)
    assert found["same_pixels"] == [0, 1]
    assert found["layers"]["rel"]["columns"] == ["teacher", "in the cache", "run-student"]
    assert found["layers"]["gram"]["columns"] == ["in the cache"], "another recipe's layer"


def test_mixed_views_are_drawn_with_their_partners(made: Path, tmp_path: Path) -> None:
    root = copied(made, tmp_path / "made")
    views = cache_recipe(root).views.model_dump(mode="json", exclude_none=True) | {
        "pairs": {"mixup": 0.8, "cutmix": 1.0}
    }
    mixed = {"views": views, "targets": {"cls": TARGETS["cls"]}, "cache": root / "mixed"}
    cache_teacher.run(every_kind(root, **mixed))
    with pytest.raises(UserError, match="mixed with those of other images"):
        look.run(root / "mixed", options(root))
    found = look.run(root / "mixed", options(root, recipe=every_kind(root, **mixed)))
    assert found["same_pixels"] == [0, 1]


def test_names_from_outside_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    layer = LayerPicture({evil: evil}, [evil], [], {evil: {evil: 1.0}})
    page = image_page(ImagePage(evil, evil, evil, evil, None, [SeenView(0, 1, None, None)], {evil: layer}))
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror") >= 8

"""Class logits and labels: the teacher's accuracy in a cache's description, the label term, class maps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import tinymim
from tinymim.configs.class_map import class_map_sha256
from tinymim.configs.errors import CacheMismatch, RecipeError, SourceError, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher, make_shards, train_student
from tinymim.stages.cache import deep
from tinymim.stages.cache.info import describe, format_info
from tinymim.stages.run.folder import read_metrics
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import make_kind
from tinymim.tests.stages.tiny import STATED, TEACHER, cache_recipe, student_recipe, tree, write_set

CLASSES, IMAGES, VIEWS = 10, 14, 3  # drawn images have ten classes
MAP = [1, 0, -1, *range(2, CLASSES - 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled shards, a classifier, its cached logits, and `map.txt`."""
    root = write_set(tmp_path_factory.mktemp("labels"), IMAGES, 7)
    torch.manual_seed(3)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    model: Any = timm.create_model(str(TEACHER["name"]), num_classes=CLASSES, **sizes)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), root / "teacher.safetensors", STATED)
    (root / "map.txt").write_text("\n".join(map(str, MAP)))
    cache_teacher.run(recipe(root))
    return root


def recipe(
    root: Path, home: Path | None = None, codec: dict[str, Any] | None = None, **changes: Any
) -> CacheTeacherRecipe:
    codec = {"kind": "logits", "classes": CLASSES, "name": "topk", "head_k": 3} | (codec or {})
    parts = {"num_views": VIEWS, "views_per_unit": 2, "views_per_decode": 1, "batch_size": 3, "layer": "logits"}
    return cache_recipe(root, **parts | {"codec": codec, "cache": (home or root) / "cache"} | changes)


def expected_hits(recipe: CacheTeacherRecipe, constants: dict[str, Any]) -> int:
    """Views whose label is the teacher's first class, counted in one batch."""
    shards, kind = open_shards(recipe.source), make_kind(*recipe.layers["logits"], constants=constants)
    views = ImageViews(shards.shards, RandomViews(recipe.views), recipe.views.seed)
    items = [(s, i, v) for s, shard in enumerate(shards.shards) for i in range(shard.num_samples) for v in range(VIEWS)]
    batch = views.batch(torch.tensor(items).numpy())
    hits = kind.hits(Teacher(recipe.teacher, kind.taps)(batch.pixels), batch.labels)
    assert hits is not None and hits.isfinite().all()
    return int(hits.sum())


def test_info_has_the_teachers_accuracy_where_images_have_labels(made: Path, tmp_path: Path) -> None:
    hits = expected_hits(recipe(made), {})
    views, layer = describe(made / "cache")["layers"]
    assert 0 < hits < IMAGES * VIEWS and views["teacher_top1"] is None
    assert layer["teacher_top1"] == {"accuracy": hits / (IMAGES * VIEWS), "labelled_views": IMAGES * VIEWS}
    assert layer["fidelity"] == {} and not [name for name in layer["fidelity"] if "top1" in name]
    words = f"the label of {hits / (IMAGES * VIEWS):.2%} of {IMAGES * VIEWS} labelled views"
    assert words in format_info(describe(made / "cache"))
    json.dumps(layer, allow_nan=False)
    make_shards.run(str(made / "shards"), tmp_path / "shards", make_shards.Options(7, labels="none"))
    cache_teacher.run(recipe(made, tmp_path, source={"shards": tmp_path / "shards"}))
    layer = describe(tmp_path / "cache")["layers"][1]
    assert layer["teacher_top1"] is None and "labelled" not in format_info(describe(tmp_path / "cache"))


def test_a_student_learns_from_labels_beside_logits(made: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"device": "cpu", "threads": 1, "log_every": 1}
    found = {}
    for name, targets in (("without", {}), ("with", {"label_weight": 0.5})):
        folder = tmp_path / name
        train_student.run(
            student_recipe(made, run=run | {"folder": folder}, targets=targets, optim={"batch_size": 6, "steps": 3})
        )
        found[name] = read_metrics(folder)
    first, other = found["with"][0], found["without"][0]
    assert "kl_labels" not in other and first["kl_logits"] == pytest.approx(other["kl_logits"])
    assert first["loss"] == pytest.approx(first["kl_logits"] + first["kl_labels"], rel=1e-5)
    assert 0.5 < first["kl_labels"] < 5 and found["with"][-1]["loss"] != found["without"][-1]["loss"]


def test_losses_of_a_loop_of_ones_own_have_the_label_term(made: Path) -> None:
    cache = tinymim.open_cache(made / "cache", targets={"logits": {"label_weight": 0.5}})
    batch = next(iter(cache.loader(made / "shards", batch_size=4, workers=0)))
    z = torch.randn(4, CLASSES)
    losses = cache.losses({"logits": (z,)}, batch)
    assert losses.keys() == {"logits/kl_logits", "logits/kl_labels"}
    wanted = 0.5 * torch.nn.functional.cross_entropy(z, batch.labels)
    torch.testing.assert_close(losses["logits/kl_labels"], wanted)
    unlabelled = replace(batch, labels=torch.full((4,), -1))
    with pytest.raises(UserError, match="has no label of the 10 classes of layer logits"):
        cache.losses({"logits": (z,)}, unlabelled)


def test_images_without_a_label_of_the_classes_are_refused(made: Path, tmp_path: Path) -> None:
    make_shards.run(str(made / "shards"), tmp_path / "shards", make_shards.Options(7, labels="none"))
    source = {"shards": tmp_path / "shards"}
    cache_teacher.run(recipe(made, tmp_path, source=source))
    wanted = {
        "source": source,
        "cache": tmp_path / "cache",
        "targets": {"label_weight": 1},
        "optim": {"batch_size": 6, "steps": 1},
    }
    with pytest.raises(SourceError, match=r"has no label of the teacher's classes.*\n  got: no label"):
        train_student.run(student_recipe(tmp_path, **wanted))
    with pytest.raises(RecipeError, match=r"targets\.label_weight is for another kind of target"):
        make_kind(
            cache_recipe(made).layers[cache_recipe(made).layer_name].codec, 1, student_recipe(made, **wanted).targets
        )


def test_mapped_classes_are_cached_with_the_digest_of_the_map(made: Path, tmp_path: Path) -> None:
    codec = {"class_map": {"file": made / "map.txt"}}
    wanted = recipe(made, tmp_path, codec)
    cache_teacher.run(wanted)
    reader = CacheReader(tmp_path / "cache")
    held = reader.layers["logits"].target["parameters"]["class_map"]
    assert held == {"file": None, "absent": "zero", "sha256": class_map_sha256(tuple(MAP))}
    constants = reader.constants("logits")
    assert constants is not None and constants["class_map"].tolist() == MAP
    layer = describe(tmp_path / "cache")["layers"][1]
    hits = expected_hits(wanted, {"class_map": torch.tensor(MAP)})
    assert layer["teacher_top1"]["accuracy"] == hits / (IMAGES * VIEWS)
    assert deep.run(wanted, tmp_path / "cache", 20, 1.0, 0)["passed"]
    student = {
        "targets": {"label_weight": 0.5},
        "optim": {"batch_size": 6, "steps": 2},
        "source": {"shards": made / "shards"},
    }
    train_student.run(student_recipe(tmp_path, **student))
    before = tree(tmp_path / "cache")
    (tmp_path / "other.txt").write_text("\n".join(map(str, reversed(MAP))))
    with pytest.raises(CacheMismatch, match=r"class_map\.sha256"):
        cache_teacher.run(recipe(made, tmp_path, {"class_map": {"file": tmp_path / "other.txt"}}))
    assert tree(tmp_path / "cache") == before


def test_a_map_that_does_not_fit_the_teacher_writes_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("\n".join(map(str, [*MAP[:-1], CLASSES])))
    with pytest.raises(RecipeError, match="names a class that the teacher lacks"):
        cache_teacher.run(recipe(made, tmp_path, {"class_map": {"file": tmp_path / "map.txt"}}))
    assert not (tmp_path / "cache").exists()

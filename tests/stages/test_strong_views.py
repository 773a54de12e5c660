"""Views with operations: both stages draw the same pixels, whatever the loader does, or stop and name the reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tinymim.configs.errors import CacheMismatch, ViewMismatch
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import policies
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.operations import registry
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.pipeline.operations.registry import CANARIES, OPERATIONS, Step, apply
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache import deep
from tinymim.stages.cache.info import describe, format_info
from tinymim.stages.pages.card import card
from tinymim.storage.blocks import DIGEST
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import cache_recipe, losses, stored, student_recipe

OPERATIONS_ON: dict[str, Any] = {
    "color_jitter": [0.4, 0.4, 0.2, 0.1],
    "grayscale": 0.2,
    "blur": 0.3,
    "solarize": 0.2,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.5,
}
LAW: dict[str, Any] = {"size": 32, "operations": OPERATIONS_ON}
STEPS = {"batch_size": 8, "steps": 3}


@pytest.fixture(scope="module")
def strong(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with a cache of strong views. Do not write to it."""
    root = tmp_path_factory.mktemp("strong") / "home"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("cache", "run-*"))
    cache_teacher.run(cache_recipe(root, views=LAW))
    return root


@pytest.fixture
def copy(strong: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(strong, tmp_path / "home"))


@pytest.mark.parametrize(("workers", "batch", "together"), [(2, 8, 2), (0, 5, 1)])
def test_a_cache_is_the_same_for_any_workers_batch_and_decodes(
    strong: Path, copy: Path, workers: int, batch: int, together: int
) -> None:
    shutil.rmtree(copy / "cache")
    changes = {"loader": {"workers": workers}, "batch_size": batch, "views_per_decode": together}
    cache_teacher.run(cache_recipe(copy, views=LAW, **changes))
    pixels = [{name: data for name, data in stored(root).items() if "/views/" in f"/{name}"} for root in (strong, copy)]
    assert pixels[0] and pixels[0] == pixels[1]


def test_stage_two_sees_the_pixels_of_stage_one(strong: Path, copy: Path) -> None:
    """A student checks every digest. The digests are of pixels after the operations, which change most views."""
    train_student.run(student_recipe(copy, optim=STEPS))
    first = losses(copy)
    shutil.rmtree(copy / "run-student")
    order = {"shuffle_units": 2, "views_per_decode": 2, "views_per_epoch": 2}
    train_student.run(student_recipe(copy, optim=STEPS, order=order, loader={"workers": 2, "prefetch": 2}))
    shutil.rmtree(copy / "run-student")
    train_student.run(student_recipe(copy, optim=STEPS, loader={"workers": 2}))
    assert losses(copy) == first

    shards, law = open_shards(cache_recipe(strong).source).shards, RandomViews(ViewConfig.model_validate(LAW))
    plain = ImageViews(shards, RandomViews(ViewConfig(size=32)), 0)
    reader = CacheReader(strong / "cache")
    info = reader.units()[0]
    number = [shard.name for shard in shards].index(info.unit.shard)
    for view, digests in enumerate(reader.read_views(info)[DIGEST].tolist()):
        items = np.array([[number, sample, view] for sample in range(len(digests))])
        before = plain.batch(items)
        after = ImageViews(shards, law, 0).batch(items)
        assert after.views == before.views  # operations take none of the box's draws
        assert after.stored()[DIGEST].tolist() == digests
        for key, old, new in zip(before.keys, before.pixels.numpy(), after.pixels.numpy(), strict=True):
            assert np.array_equal(new, apply(old, law.steps(key, view)))
        assert (before.pixels != after.pixels).flatten(1).any(dim=1).float().mean() > 0.5


def test_other_operations_are_refused_by_the_digest(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that passes its canary, drawn by another law."""

    def other(self: RandomViews, key: str, view: int) -> list[Step]:
        return [Step("invert")]

    monkeypatch.setattr(RandomViews, "steps", other)
    with pytest.raises(ViewMismatch, match="not those the teacher saw") as caught:
        train_student.run(student_recipe(copy, optim=STEPS))
    assert "canary." not in str(caught.value)
    assert deep.run(cache_recipe(copy, views=LAW), copy / "cache", 20, 1.0)["wrong_pixels"]


def test_a_changed_operation_is_named_before_any_view_is_made(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(pixels: Pixels, *arguments: Any) -> Pixels:
        return OPERATIONS["invert"](pixels)

    monkeypatch.setattr(registry, "OPERATIONS", {**OPERATIONS, "rotate": other})
    starts: list[Callable[[], object]] = [
        lambda: train_student.run(student_recipe(copy)),
        lambda: cache_teacher.run(cache_recipe(copy, views=LAW, num_views=3)),
        lambda: deep.run(cache_recipe(copy, views=LAW), copy / "cache", 20, 1.0),
    ]
    for start in starts:
        with pytest.raises(ViewMismatch, match=r"other pixels here: rotate\n"):
            start()


def test_an_operation_that_another_version_changed_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions agree with their own canaries: the manifest's digest tells them apart."""

    def other(pixels: Pixels, *arguments: Any) -> Pixels:
        return OPERATIONS["invert"](pixels)

    monkeypatch.setattr(registry, "OPERATIONS", {**OPERATIONS, "hue": other, "erase_const": other})
    monkeypatch.setattr(registry, "CANARIES", registry.canary_digests())
    starts: list[Callable[[], object]] = [
        lambda: train_student.run(student_recipe(copy)),
        lambda: cache_teacher.run(cache_recipe(copy, views=LAW, num_views=3)),
    ]
    for start in starts:
        with pytest.raises(ViewMismatch, match=r"other pixels here: hue\n") as caught:  # erasing is by noise here
            start()
        assert caught.value.expected == CANARIES["hue"]


def test_the_manifest_states_the_law_and_its_canaries(strong: Path, made: Path) -> None:
    manifest = CacheReader(strong / "cache").manifest
    assert manifest.views["operations"]["fill"] == [124, 116, 104] and manifest.views["operations"]["version"] == 1
    names = {name.removeprefix("canary.") for name in manifest.environment if name.startswith("canary.")}
    assert {"rotate", "hue", "gaussian_blur", "grayscale", "solarize", "erase_pixel", "normal_quantiles"} <= names
    assert "erase_const" not in names
    assert all(manifest.environment[f"canary.{name}"] == CANARIES[name] for name in names)
    text = format_info(describe(strong / "cache"))
    assert "rand-m9-mstd0.5-inc1 + erasing (pixel) in 0.5 of views, fill [124, 116, 104]" in text
    assert "canary.rotate" not in text
    assert "blur [0.1, 2] in 0.3 of views" in text and "rand-m9" in card(describe(strong / "cache"))

    plain = CacheReader(made / "cache").manifest
    assert "operations" not in plain.views and not any(name.startswith("canary.") for name in plain.environment)


def test_operations_are_part_of_the_identity(copy: Path) -> None:
    other = {**LAW, "operations": {**OPERATIONS_ON, "fill": [0, 0, 0]}}
    with pytest.raises(CacheMismatch, match=r"views\.operations\.fill"):
        cache_teacher.run(cache_recipe(copy, views=other))
    with pytest.raises(CacheMismatch, match=r"views\.operations"):
        cache_teacher.run(cache_recipe(copy, views={"size": 32}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "no operation is on"),
        ({"color_jitter": [0, 0, 0, 0]}, "no operation is on"),
        ({"rand_augment": "rand-x9"}, "section 'x9'"),
        ({"blur": 0.5, "blur_sigma": [2.0, 0.1]}, "low <= high"),
        ({"erasing": 0.5, "version": 2}, "Input should be 1"),
        ({"erasing": 0.5, "fill": [256, 0, 0]}, "less than or equal to 255"),
    ],
)
def test_laws_that_draw_nothing_or_are_unknown_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ViewConfig.model_validate({"operations": fields})


def test_fine_tuning_has_its_own_section() -> None:
    fields = {"stage": "finetune", "views": {"operations": {"erasing": 0.5}}}
    shards = {"shards": "x"}
    fields |= {"train": shards, "val": shards, "model": {}, "weights": "hub", "optim": {"steps": 1}}
    with pytest.raises(ValidationError, match="`augment` instead"):
        FinetuneRecipe.model_validate(fields | {"run": {"folder": "r"}})


def test_the_law_of_dino_can_be_written() -> None:
    fields = {"color_jitter": [0.4, 0.4, 0.2, 0.1], "grayscale": 0.2, "blur": 1.0, "solarize": 0.2}
    law = RandomViews(ViewConfig.model_validate({"operations": fields}))
    drawn = [[step.operation for step in law.steps("a", view)] for view in range(2000)]
    for name, share in {"hue": 0.8, "grayscale": 0.2, "gaussian_blur": 1.0, "solarize": 0.2}.items():
        assert abs(sum(name in steps for steps in drawn) / len(drawn) - share) < 0.03
    assert len(policies.policies_of_views(law.config.operations)) == 4

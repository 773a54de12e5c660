"""Both stages end to end on a tiny set: replay is exact, differences are refused, runs resume to the same numbers."""

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, RecipeError, UnitsFailed, UserError, ViewMismatch
from tinymim.pipeline import drawn
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import decode, environment
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.stages.units import draft
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import (
    STATED,
    STUDENT,
    TEACHER,
    Overrides,
    cache_recipe,
    losses,
    signal_in_step,
    stored,
    student_recipe,
    tree,
    write_teacher,
)

# ---------------------------------------------------------------- exact replay


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # fewer cores here
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_both_stages_give_the_same_numbers_with_any_number_of_workers(made: Path, home: Path, workers: int) -> None:
    shutil.rmtree(home / "cache")
    loader = {"workers": workers}
    cache_teacher.run(cache_recipe(home, loader=loader))
    assert stored(home) == stored(made)
    train_student.run(student_recipe(home, loader=loader, optim={"batch_size": 8, "steps": 3}))  # checks every digest
    fresh = losses(home)
    shutil.rmtree(home / "run-student")
    train_student.run(student_recipe(home, optim={"batch_size": 8, "steps": 3}))
    assert losses(home) == fresh


def test_golden_losses_of_twenty_steps(made: Path) -> None:
    golden = json.loads((Path(__file__).parent.parent / "data" / "golden_student_losses.json").read_text())
    np.testing.assert_allclose(losses(made), golden, rtol=2e-4, atol=1e-4)
    assert losses(made)[-1] < 0.9 * losses(made)[0]


def test_golden_records(made: Path) -> None:
    """Boxes, flips and digests are fixed by (seed, key, view) for all time; the teacher's numbers to rounding."""
    reader = CacheReader(made / "cache")
    info = reader.units(reader.layer().name)[0]
    golden = json.loads((Path(__file__).parent.parent / "data" / "golden_records.json").read_text())
    assert reader.keys(info.unit.shard)[:4] == golden["keys"]
    recipe = cache_recipe(made)
    items = np.array([[0, image, view] for image in range(4) for view in range(2)])
    views = ImageViews(open_shards(recipe.source).shards, RandomViews(recipe.views)).batch(items).views
    assert [list(view[:4]) for view in views] == golden["box"]
    assert [int(view.flip) for view in views] == golden["flip"]
    records = {name: by_image(values) for name, values in reader.read_views(info).items()}
    for name in ("qk_entropy", "vv_entropy"):
        np.testing.assert_allclose(records[name][:20], golden[name], rtol=1e-4)
    if reader.manifest.environment["canary"] == golden["canary"]:
        digests = by_image(reader.read_views(reader.units()[0])["digest"])
        assert [f"{digest:08x}" for digest in digests[:8].tolist()] == [digest[8:] for digest in golden["digest"]]


def by_image(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[V, I, ...] as [I x V, ...], the order of the golden records."""
    return values.swapaxes(0, 1).reshape(-1, *values.shape[2:])


# ---------------------------------------------------------------- differences are refused


def rewrite_shard(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], reverse: bool = False) -> None:
    """Write a tar anew, each image through `change`."""
    with (
        tarfile.open(path) as old,
        webdataset.TarWriter(f"{path}.new", mtime=0, user="", group="", encoder=False) as new,
    ):
        files = {member.name: old.extractfile(member).read() for member in old}  # type: ignore[union-attr]
        for name, data in sorted(files.items(), reverse=reverse):
            if name.endswith(".jpg"):
                key, image = change(name.removesuffix(".jpg"), data)
                new.write({"__key__": key, "jpg": image, "cls": files[name.replace(".jpg", ".cls")]})
    os.replace(f"{path}.new", path)


def forge_content_hashes(root: Path) -> None:
    """Have `index.json` claim that the shards are the cached ones, so that only keys and pixels can tell."""
    path = root / "shards" / "index.json"
    index = json.loads(path.read_text())
    for row in index["shards"]:
        row["size_bytes"] = (root / "shards" / row["name"]).stat().st_size
    path.write_text(json.dumps(index))


def requality(key: str, data: bytes) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, format="JPEG", quality=60)
    return key, buffer.getvalue()


def test_another_jpeg_quality_of_the_same_image_is_refused_by_content_hash(home: Path) -> None:
    rewrite_shard(home / "shards" / "shard-000001.tar", requality)
    (home / "shards" / "index.json").unlink()
    with pytest.raises(CacheMismatch, match=r"shard-000001\.tar"):
        train_student.run(student_recipe(home))
    with pytest.raises(CacheMismatch, match=r"shard-000001\.tar"):
        cache_teacher.run(cache_recipe(home))


def test_another_jpeg_quality_is_refused_by_its_pixels_where_the_hash_was_forged(home: Path) -> None:
    rewrite_shard(home / "shards" / "shard-000001.tar", requality)
    forge_content_hashes(home)
    with pytest.raises(ViewMismatch, match=r"shard-000001\.tar, view \d"):
        train_student.run(student_recipe(home))


def test_records_are_joined_by_key_and_a_missing_key_is_named(made: Path, home: Path) -> None:
    rewrite_shard(home / "shards" / "shard-000001.tar", lambda key, data: (key, data), reverse=True)
    forge_content_hashes(home)
    train_student.run(student_recipe(home))  # the same images in another order: every digest still agrees
    assert losses(home) == losses(made)
    shutil.rmtree(home / "run-student")
    lost = f"{drawn.CLASSES[5]}/000015"
    rewrite_shard(home / "shards" / "shard-000001.tar", lambda key, data: (f"{key}x" if key == lost else key, data))
    forge_content_hashes(home)
    with pytest.raises(CacheCorrupt, match=lost):
        train_student.run(student_recipe(home))


def test_a_changed_pixel_is_refused_and_the_image_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_decoder(data: bytes, *how: int) -> torch.Tensor:
        image = decode(data, *how)
        image[:, image.shape[1] // 2, image.shape[2] // 2] ^= 1
        return image

    monkeypatch.setattr("tinymim.pipeline.dataset.decode", another_decoder)
    with pytest.raises(ViewMismatch, match=r"image '\w+/\d+' of shard shard-\d+\.tar, view \d") as caught:
        train_student.run(student_recipe(home))
    assert "digest" in str(caught.value.got)
    assert not (home / "run-student" / "student.safetensors").exists()


def test_another_version_of_a_library_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinymim.pipeline.dataset.decode", lambda data, *how: 255 - decode(data, *how))
    versions = environment() | {"torchvision": "99.0"}
    monkeypatch.setattr("tinymim.pipeline.mismatch.environment", lambda: versions)
    with pytest.raises(ViewMismatch, match=r"torchvision .* -> 99\.0"):
        train_student.run(student_recipe(home))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"views": {"size": 32, "seed": 1}}, "views.seed"),
        ({"views": {"size": 32, "scale": (0.5, 1.0)}}, "views.scale"),
        ({"codec": {"rows": 6, "head_k": 1, "tail_k": 4}}, "target.parameters.tail_k"),
    ],
)
def test_another_recipe_on_the_same_cache_is_refused(home: Path, changes: Overrides, field: str) -> None:
    before = tree(home / "cache")
    with pytest.raises(CacheMismatch, match=field):
        cache_teacher.run(cache_recipe(home, **changes))
    assert tree(home / "cache") == before


def test_another_view_size_is_refused_in_both_stages(home: Path) -> None:
    teacher = TEACHER | {"block": 2, "weights": str(home / "teacher.safetensors"), "img_size": 40}
    with pytest.raises(CacheMismatch, match=r"views\.size|teacher\.arch"):
        cache_teacher.run(cache_recipe(home, views={"size": 40}, teacher=teacher))
    with pytest.raises(CacheMismatch, match=r"student\.img_size"):
        train_student.run(student_recipe(home, student=STUDENT | {"img_size": 40}))
    with pytest.raises(CacheMismatch, match="tokens"):
        train_student.run(student_recipe(home, student=STUDENT | {"args": {"reg_tokens": 2}}))


def test_another_teacher_is_refused(home: Path) -> None:
    write_teacher(home / "teacher.safetensors", seed=1)
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256"):
        cache_teacher.run(cache_recipe(home))


def test_views_of_another_size_than_the_teacher_are_refused(home: Path) -> None:
    with pytest.raises(RecipeError, match=r"views\.size"):
        cache_teacher.run(cache_recipe(home, views={"size": 64}, cache=home / "other"))


def test_a_width_that_does_not_split_into_the_teachers_heads_is_refused_before_training(home: Path) -> None:
    with pytest.raises(RecipeError, match="heads"):
        train_student.run(student_recipe(home, student=STUDENT | {"embed_dim": 12, "num_heads": 1}, cache=_odd(home)))


def _odd(home: Path) -> Path:
    """A cache of a teacher with 8 heads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 8}
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).state_dict(), home / "t8.safetensors", STATED
    )
    teacher = {"name": "vit_tiny_patch16_224", "block": 1, "weights": str(home / "t8.safetensors"), **sizes}
    cache_teacher.run(cache_recipe(home, teacher=teacher, cache=home / "cache8", run={"folder": home / "run8"}))
    return home / "cache8"


def test_a_flipped_byte_in_the_cache_is_named(home: Path) -> None:
    payload = next((home / "cache" / "layers").rglob("v0-1.zip"))
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 0x10
    payload.write_bytes(data)
    with pytest.raises(CacheCorrupt, match=r"view [01] does not have its committed checksum"):
        train_student.run(student_recipe(home))


# ---------------------------------------------------------------- worst days


def test_unreadable_images_are_listed_and_left_out(home: Path) -> None:
    rewrite_shard(
        home / "shards" / "shard-000002.tar", lambda key, data: (key, data[:60] if key.endswith("30") else data)
    )
    (home / "shards" / "index.json").unlink()
    with pytest.raises(
        UnitsFailed, match=r"2\.tar v0-1: too many unreadable .* got 1 of 12 unreadable, expected at most 1"
    ):
        cache_teacher.run(cache_recipe(home, cache=home / "other"))
    assert len(CacheReader(home / "other").units()) == 2
    cache_teacher.run(cache_recipe(home, cache=home / "other", max_unreadable=0.2))
    units = CacheReader(home / "other").units()
    assert [unit.num_images for unit in units] == [12, 12, 11]
    assert units[2].statistics["unreadable"][0][0] == f"{drawn.CLASSES[0]}/000030"
    train_student.run(student_recipe(home, cache=home / "other", optim={"batch_size": 7, "steps": 5}))


def test_a_cache_without_its_source_says_so(home: Path) -> None:
    for path in (home / "shards").iterdir():
        path.rename(path.with_name("other-" + path.name))
    with pytest.raises(UserError, match="covers no shard"):
        train_student.run(student_recipe(home))


def test_a_cache_grows_by_views_and_by_shards_and_a_partial_one_trains(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(home / "cache")
    first = {"shards": home / "shards", "pattern": "shard-00000[01].tar"}
    cache_teacher.run(cache_recipe(home, source=first, num_views=1))
    before = stored(home)
    cache_teacher.run(cache_recipe(home, num_views=3))
    assert before.items() <= stored(home).items()
    reader = CacheReader(home / "cache")
    assert {reader.coverage(layer).complete_views for layer in (VIEWS, *reader.layers)} == {3}
    assert reader.coverage().complete
    shutil.rmtree(home / "cache")
    cache_teacher.run(cache_recipe(home, source=first))
    few = {"batch_size": 8, "steps": 4}
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards .* shard-000002\.tar[\s\S]*on_missing: skip"):
        train_student.run(student_recipe(home, optim=few))
    train_student.run(student_recipe(home, optim=few, on_missing="skip"))  # the third shard is skipped
    assert "skipped 1 shards" in capsys.readouterr().err


# ---------------------------------------------------------------- resume


def test_a_student_stopped_at_any_step_resumes_to_the_same_losses(
    made: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(made / "run-student" / "student.safetensors")
    for stop_at in (1, 7, 19):
        shutil.rmtree(home / "run-student", ignore_errors=True)
        signal_in_step(student_step, stop_at - 1, signal.SIGINT, monkeypatch)
        with pytest.raises(Interrupted, match=f"step {stop_at}") as caught:
            train_student.run(student_recipe(home))
        assert not caught.value.requeue
        train_student.run(student_recipe(home, loader={"workers": 0, "prefetch": 2}))  # loading may change (I10)
        assert losses(home) == losses(made)
        torch.testing.assert_close(load_file(home / "run-student" / "student.safetensors"), weights, rtol=0, atol=0)


def test_all_views_of_an_epoch_from_one_decode_resume_in_the_middle_of_a_chunk(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"shuffle_units": 1, "lanes": 2, "views_per_decode": 2, "views_per_epoch": "all"}
    recipe = student_recipe(home, order=order, optim={"batch_size": 8, "epochs": 1, "base_lr": 0.1})
    train_student.run(recipe)
    whole = losses(home)
    assert len(whole) == 36 // 8 * 2
    shutil.rmtree(home / "run-student")
    signal_in_step(student_step, 2, signal.SIGINT, monkeypatch)
    with pytest.raises(Interrupted, match="step 3"):
        train_student.run(recipe)
    train_student.run(recipe)
    assert losses(home) == whole


def test_a_state_of_another_recipe_is_refused(home: Path) -> None:
    train_student.run(student_recipe(home, optim={"batch_size": 8, "steps": 2}))
    with pytest.raises(UserError, match="another recipe"):
        train_student.run(student_recipe(home, optim={"batch_size": 8, "steps": 3}))


def test_an_interrupted_cache_continues_to_the_same_bytes(
    made: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "cache")
    encode, calls = draft.encode, iter(range(100))

    def interrupt(*args: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", interrupt)
    with pytest.raises(Interrupted):
        cache_teacher.run(cache_recipe(home))
    monkeypatch.setattr("tinymim.stages.units.job.encode", encode)
    committed = CacheReader(home / "cache").coverage().complete_shards
    assert 0 < committed < 3
    cache_teacher.run(cache_recipe(home))
    assert stored(home) == stored(made)


# ---------------------------------------------------------------- export


def test_the_student_loads_into_timm_strictly_and_says_what_was_trained(made: Path) -> None:
    tensors = load_file(made / "run-student" / "student.safetensors")
    sizes = {name: value for name, value in STUDENT.items() if name != "name"}
    model = timm.create_model(str(STUDENT["name"]), num_classes=0, **sizes)
    model.load_state_dict(tensors, strict=True)
    trained = json.loads((made / "run-student" / "trained.json").read_text())
    assert trained["fixed"] == ["pos_embed"]
    assert trained["never_updated"] == []
    assert {*trained["trained"], *trained["fixed"]} == set(tensors)


def test_the_run_folder_says_what_made_it(made: Path) -> None:
    folder = made / "run-student"
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["libraries"]["torch"] and versions["recipe_digest"]
    assert "batch_size: 8" in (folder / "recipe.yaml").read_text()
    assert any((folder / "tensorboard").iterdir())
    assert {"step", "loss", "kl_qk", "kl_vv", "lr", "views_per_s"} <= read_metrics(folder)[0].keys()

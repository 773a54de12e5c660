"""Masks that teacher and student share: records of visible patches, students on them, and the loss on hidden pixels."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from tinymim.api import open_cache
from tinymim.configs.errors import CacheCorrupt, CacheMismatch, CheckpointError, RecipeError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.masks import MaskConfig
from tinymim.models.vit import Normalise
from tinymim.pipeline.masks import mask_order, visible_patches
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache import deep
from tinymim.stages.run.folder import read_audits, read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.stages.training.states import read_state
from tinymim.storage.layout import VIEWS
from tinymim.storage.manifest import Layer
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import (
    STUDENT,
    TEACHER,
    cache_recipe,
    copied,
    losses,
    signal_in_step,
    student_recipe,
    tree,
)

MASK = {"ratio": 0.75, "unit": 1, "seed": 3}
DENSE = {"kind": "attention", "name": "dense"}
MIM = {"decoder_dim": 8, "decoder_heads": 2}
STEPS = 6
OPTIM = {"batch_size": 8, "steps": STEPS, "base_lr": 0.1, "warmup": 0.2}
NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
LAYERS: dict[str, Any] = {
    "attn": {"codec": DENSE, "mask": MASK},
    "rel": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}, "mask": MASK},
    "whole": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}},
    "cls": {"codec": {"kind": "cls", "name": "int8"}},
}


def masked_cache(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"codec": None, "targets": LAYERS, "cache": root / "masked"} | changes))


def recipe(root: Path, **changes: Any) -> TrainStudentRecipe:
    fields: dict[str, Any] = {"cache": root / "masked", "layer": "attn", "mim": MIM, "optim": OPTIM}
    return student_recipe(root, **(fields | {"jitter": NO_JITTER} | changes))


def elsewhere(root: Path, name: str) -> dict[str, Any]:
    return {"run": {"folder": root / name, "device": "cpu", "threads": 1, "log_every": 1}}


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of `made` with a cache of masked and whole layers, and a student of 6 steps on a masked one."""
    root = copied(made, tmp_path_factory.mktemp("masked") / "made")
    cache_teacher.run(masked_cache(root))
    train_student.run(recipe(root))
    return root


# ---------------------------------------------------------------- stage one


def visible(key: str, view: int) -> list[int]:
    return [patch for patch, place in enumerate(mask_order(3, key, view, 4, 4).tolist()) if place < 4]


@torch.no_grad()
def reference_attention(root: Path, pixels: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """q k^T / sqrt(d) of block 2, written out for one view of visible patches, in float64."""
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    teacher: Any = timm.create_model(TEACHER["name"], num_classes=0, **sizes).double().eval()
    teacher.load_state_dict(load_file(root / "teacher.safetensors"))
    patches = teacher.patch_embed(Normalise()(pixels[None]).double())[0] + teacher.pos_embed[0, 1:]
    tokens = torch.cat([teacher.cls_token[0] + teacher.pos_embed[0, :1], patches[kept]])[None]
    x = teacher.blocks[1].norm1(teacher.blocks[0](tokens))
    q, k, _ = teacher.blocks[1].attn.qkv(x)[0].reshape(len(kept) + 1, 3, 2, 8).permute(1, 2, 0, 3)
    found: torch.Tensor = q @ k.mT / 8**0.5
    return found


def test_a_record_holds_the_teacher_s_answer_for_visible_patches_alone(made: Path) -> None:
    layer = CacheReader(made / "masked").layer("attn")
    assert (layer.shapes.tokens, layer.shapes.prefix_tokens, layer.shapes.grid) == (5, 1, (4, 4))
    assert layer.target["mask"] == MASK | {"version": 1} and layer.mask == MaskConfig(**MASK)  # type: ignore[arg-type]
    cache = open_cache(made / "masked")
    batch = next(iter(cache.loader(made / "shards", batch_size=8, workers=0, layers=["attn"])))
    patches = cache.visible("attn", batch)
    assert patches is not None and cache.visible("whole", batch) is None
    logits = batch.records["attn"]["logits"]
    assert logits.shape == (8, 2, 5, 5)
    for row, (key, view) in enumerate(zip(batch.keys, batch.views.tolist(), strict=True)):
        wanted = reference_attention(made, batch.pixels[row], visible(key, view))
        assert patches[row].tolist() == visible(key, view)
        torch.testing.assert_close(logits[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_layers_of_one_pass_are_those_of_a_run_alone_and_unmasked_ones_do_not_change(made: Path, home: Path) -> None:
    """Also with another batch size: a record does not depend on the batch around it."""
    for name, own in LAYERS.items():
        cache_teacher.run(cache_recipe(home, layer=name, cache=home / "apart", batch_size=12, **own))
    ours, theirs = CacheReader(made / "masked"), CacheReader(home / "apart")
    assert {name: layer.spec_id for name, layer in ours.layers.items()} == {
        name: layer.spec_id for name, layer in theirs.layers.items()
    }
    for name in (VIEWS, *LAYERS):
        for mine, other in zip(ours.units(name), theirs.units(name), strict=True):
            for (view, a), (_, b) in zip(ours.each_view(mine), theirs.each_view(other), strict=True):
                assert a.keys() == b.keys() and view in (0, 1)
                for array in a:
                    np.testing.assert_allclose(a[array], b[array], rtol=1e-4, atol=1e-5, err_msg=name)
    cache_teacher.run(cache_recipe(home, layer="whole", cache=home / "plain"))
    plain = CacheReader(home / "plain").layer("whole")
    assert plain.spec_id == ours.layer("whole").spec_id and "mask" not in plain.target


def test_the_masked_layer_s_audit_compares_a_masked_student(home: Path) -> None:
    cache_teacher.run(masked_cache(home, cache=home / "new", audit_views=6, targets={"attn": LAYERS["attn"]}))
    [info, *_] = CacheReader(home / "new").units("attn")
    found = info.statistics["fidelity"]
    assert found["views"] == 6 and found["attention"]["relative_error"][0] < 1e-9  # a dense record is the target


def test_a_deep_check_recomputes_masked_records(made: Path) -> None:
    found = deep.run(masked_cache(made), made / "masked", sample=8)
    assert found["passed"] and found["agreement"] == 1.0


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ({"unit": 3}, r"mask\.unit does not divide the patch grid"),
        ({"ratio": 0.99}, r"mask\.ratio leaves no patch to see"),
        ({"ratio": 0.01}, r"mask\.ratio leaves no patch to see"),
    ],
)
def test_a_mask_that_does_not_fit_the_teacher_is_refused(home: Path, mask: dict[str, Any], error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        cache_teacher.run(cache_recipe(home, mask=mask, cache=home / "new"))
    assert not (home / "new").exists()


def test_another_mask_is_another_layer(made: Path, home: Path) -> None:
    before = tree(home / "masked")
    for changed in ({"seed": 4}, {"ratio": 0.5}, {"unit": 2}):
        with pytest.raises(CacheMismatch, match=rf"target\.mask\.{next(iter(changed))}"):
            cache_teacher.run(masked_cache(home, targets={"attn": {"codec": DENSE, "mask": MASK | changed}}))
    with pytest.raises(CacheMismatch, match=r"target\.mask"):
        cache_teacher.run(masked_cache(home, targets={"attn": {"codec": DENSE}}))
    assert tree(home / "masked") == before
    assert cache_recipe(home, mask=MASK).layer_name == cache_recipe(home).layer_name + "-masked"


def test_a_stored_mask_that_is_damaged_or_newer_is_refused(made: Path) -> None:
    held = CacheReader(made / "masked").layer("attn").to_json()
    for changed in ({"ratio": 1.0}, {"ratio": "half"}, {"unit": 0}, {"seed": 2**64}, {"more": 1}, {"version": 0}):
        target = held["target"] | {"mask": held["target"]["mask"] | changed}
        with pytest.raises(CacheCorrupt, match=r"target\.mask"):
            Layer.from_json(held | {"target": target}, "here")
    newer = Layer.from_json(
        held | {"target": held["target"] | {"mask": held["target"]["mask"] | {"version": 2}}}, "here"
    )
    with pytest.raises(CacheMismatch, match="mask of an unknown version"):
        _ = newer.mask


# ---------------------------------------------------------------- stage two


def test_the_student_sees_the_teacher_s_patches_and_the_losses_are_logged(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], list[int]] = {}
    real = visible_patches

    def noted(mask: Any, named: Any, *place: Any) -> Any:
        kept = real(mask, named, *place)
        assert kept is not None
        seen.update(zip(named, kept.tolist(), strict=True))
        return kept

    monkeypatch.setattr(student_step, "visible_patches", noted)
    train_student.run(recipe(home))
    assert len(seen) == STEPS * 8 and all(kept == visible(*name) for name, kept in seen.items())
    lines = read_metrics(home / "run-student")
    assert [line["loss"] for line in lines] == losses(made)
    for line in lines:
        assert line["loss"] == pytest.approx(line["distance_attention"] + line["distance_pixels"], rel=1e-6)
    assert lines[-1]["distance_pixels"] < lines[0]["distance_pixels"]


def test_the_export_is_a_plain_timm_model(made: Path) -> None:
    sizes = {name: value for name, value in STUDENT.items() if name != "name"}
    plain: Any = timm.create_model(STUDENT["name"], num_classes=0, **sizes)
    plain.load_state_dict(load_file(made / "run-student" / "student.safetensors"), strict=True)
    assert plain.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 8)


def test_the_mask_of_the_layer_is_the_student_s_and_another_one_is_refused(made: Path, home: Path) -> None:
    train_student.run(recipe(home, mask=MASK))
    assert losses(home) == losses(made)
    for changed in ({"seed": 4}, {"ratio": 0.5}, {"unit": 2}, {"hide": "token"}):
        with pytest.raises(CacheMismatch, match=rf"mask\.{next(iter(changed))} is not that of the layer"):
            train_student.run(recipe(home, mask=MASK | changed, **elsewhere(home, "other")))
    with pytest.raises(RecipeError, match="layer whole: the student does not see the patches"):
        train_student.run(recipe(home, layer=None, layers={"attn": {}, "whole": {}}, **elsewhere(home, "other")))
    for finer in ({"patch_size": 4}, {"patch_size": 16}):  # 8 x 8 would be pooled
        with pytest.raises(RecipeError, match="does not see the patches"):
            train_student.run(recipe(home, student=STUDENT | finer, **elsewhere(home, "other")))
    with pytest.raises(RecipeError, match="mim predicts hidden patches"):
        train_student.run(recipe(home, layer="whole", **elsewhere(home, "other")))
    with pytest.raises(RecipeError, match=r"mim\.block is outside"):
        train_student.run(recipe(home, mim=MIM | {"block": 3}, **elsewhere(home, "other")))
    assert not (home / "other").exists()


def test_a_resumed_run_has_the_same_losses_and_another_mim_another_identity(
    made: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in_step(student_step, 3, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train_student.run(recipe(home))
    for changed in ({"mim": None}, {"mim": MIM | {"weight": 2.0}}, {"mim": MIM | {"block": 1}}):
        with pytest.raises(CheckpointError):
            train_student.run(recipe(home, **changed))
    train_student.run(recipe(home))
    assert losses(home) == losses(made)


def test_layers_at_blocks_of_the_student_train_audit_and_resume(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"attn": {"student_block": 2}, "rel": {"student_block": 1, "weight": 0.5, "end_weight": 0.0}}
    audit = {"cache": home / "masked", "source": {"shards": home / "shards"}, "num_images": 12}
    fields: dict[str, Any] = {"layer": None, "layers": layers, "audit": audit}
    train_student.run(recipe(home, **fields, **elsewhere(home, "whole")))
    whole = [line for line in read_metrics(home / "whole") if "loss" in line]  # the others are audits
    [first, *_, last] = whole
    assert last["distance_attn/attention"] < first["distance_attn/attention"] and last["weight_rel"] == 0
    assert any(name.startswith("attn/attention") for name in read_audits(home / "whole")[-1])
    state = read_state(home / "whole")["parts"]["student"]
    assert {name for name in state if name.startswith("head.")} == {"head.0.adapter"}  # no projections of their own
    signal_in_step(student_step, 3, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train_student.run(recipe(home, **fields))
    with pytest.raises(CheckpointError):
        train_student.run(recipe(home, **fields | {"layers": layers | {"attn": {"student_block": 1}}}))
    train_student.run(recipe(home, **fields))
    again = [line["loss"] for line in read_metrics(home / "run-student") if "loss" in line]
    assert again == [line["loss"] for line in whole]
    beyond = layers | {"attn": {"student_block": 3}}
    with pytest.raises(RecipeError, match="layer attn: student_block is outside the student"):
        train_student.run(recipe(home, **fields | {"layers": beyond}, **elsewhere(home, "other")))
    assert not (home / "other").exists()


@pytest.mark.slow
def test_parts_and_ranks_train_like_one(made: Path, home: Path) -> None:
    changes = {"layer": None, "layers": {"attn": {}, "rel": {"weight": 0.5}}, "mim": MIM | {"block": 1}}
    order = {"shuffle_units": 2, "lanes": 2}
    train_student.run(recipe(home, order=order, **changes, **elsewhere(home, "one")))
    train_student.run(recipe(home, order=order, workers=2, **changes, **elsewhere(home, "two")))
    one, two = (read_metrics(home / name) for name in ("one", "two"))
    for name in ("loss", "distance_attn/attention", "kl_rel/qk", "distance_pixels"):
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-4)
    painted = {"layer": "whole", "mask": MASK | {"hide": "token"}, "order": order}
    train_student.run(recipe(home, **painted, **elsewhere(home, "painted-one")))
    train_student.run(recipe(home, workers=2, **painted, **elsewhere(home, "painted-two")))
    one, two = (read_metrics(home / f"painted-{name}") for name in ("one", "two"))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
    train_student.run(recipe(home, optim=OPTIM | {"accumulate": 2}))
    np.testing.assert_allclose(losses(home), losses(made), rtol=1e-4)


def test_a_painted_student_is_compared_with_a_teacher_of_whole_views(home: Path) -> None:
    painted = {"layer": "whole", "mask": MASK | {"hide": "token"}}
    train_student.run(recipe(home, **painted))
    train_student.run(recipe(home, mim=None, **painted, **elsewhere(home, "alone")))
    train_student.run(recipe(home, mim=None, layer="whole", **elsewhere(home, "seeing")))
    first, alone, seeing = (read_metrics(home / name)[0] for name in ("run-student", "alone", "seeing"))
    assert first["kl_qk"] == alone["kl_qk"] != seeing["kl_qk"]
    assert first["loss"] == pytest.approx(first["kl_qk"] + first["kl_vv"] + first["distance_pixels"], rel=1e-6)
    assert "distance_pixels" not in alone
    assert "mask_token" not in load_file(home / "alone" / "student.safetensors")
    train_student.run(recipe(home, mim=None, layer="cls", mask=MASK, **elsewhere(home, "cls")))  # needs no grid
    with pytest.raises(RecipeError, match="does not see the patches"):
        train_student.run(recipe(home, mim=None, layer="whole", mask=MASK, **elsewhere(home, "no")))


def test_a_masked_student_is_audited_on_its_visible_patches(home: Path) -> None:
    audit = {"cache": home / "masked", "layer": "attn", "source": {"shards": home / "shards"}, "num_images": 12}
    train_student.run(recipe(home, audit=audit))
    trained = [line["loss"] for line in read_metrics(home / "run-student") if "loss" in line]
    lines = read_audits(home / "run-student")
    assert len(trained) == STEPS and lines[-1]["attention"]["measure"] == "distance"
    cache_teacher.run(masked_cache(home, cache=home / "other", targets={"attn": {"codec": DENSE}}))
    with pytest.raises(CacheMismatch, match=r"target\.mask"):
        train_student.run(recipe(home, audit=audit | {"cache": home / "other"}, **elsewhere(home, "no")))


def test_a_teacher_in_the_loop_sees_the_visible_patches_alone(home: Path) -> None:
    """Records of a masked layer that are computed in training have the bits of stored ones."""
    short: dict[str, Any] = {"mim": None, "optim": OPTIM | {"steps": 3}}
    train_student.run(recipe(home, **short, **elsewhere(home, "cached")))
    for folder in (home / "masked" / "layers" / "attn").iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    train_student.run(recipe(home, on_missing="teacher", num_views=2, **short, **elsewhere(home, "computed")))
    ours, theirs = (losses(home / name) for name in ("cached", "computed"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert {line["computed_share"] for line in read_metrics(home / "computed")} == {1.0}

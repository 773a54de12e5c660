"""Students that learn from several layers at once: a weighted sum of their losses, exact in every way of training."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError, UserError
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.run.folder import read_audits, read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.tests.stages.tiny import (
    STUDENT,
    TEACHER,
    cache_recipe,
    copied,
    losses,
    signal_in_step,
    student_recipe,
    write_teacher,
)

STEPS = 8
OPTIM = {"batch_size": 8, "steps": STEPS, "base_lr": 0.1, "warmup": 0.2}
LAYERS: dict[str, Any] = {"rel": {}, "other.cls": {"weight": 0.5, "end_weight": 2.0}, "feat": {"weight": 0.25}}
NAMES = {
    "rel": ("kl_rel/qk", "kl_rel/vv"),
    "other.cls": ("distance_other.cls/cls",),
    "feat": ("distance_feat/features",),
}


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `made` with layers of relations, features, and the class embedding of a second teacher."""
    root = copied(made, tmp_path_factory.mktemp("layers") / "made")
    (root / "cache").rename(root / "alone")
    write_teacher(root / "other.safetensors", seed=1)
    cache_teacher.run(cache_recipe(root, layer="rel"))
    cache_teacher.run(cache_recipe(root, layer="feat", codec={"kind": "features", "name": "int8"}))
    other = TEACHER | {"block": 2, "weights": str(root / "other.safetensors")}
    cache_teacher.run(cache_recipe(root, layer="other.cls", teacher=other, codec={"kind": "cls", "name": "int8"}))
    train_student.run(recipe(root))
    return root


def recipe(root: Path, **changes: Any) -> TrainStudentRecipe:
    return student_recipe(root, **({"layers": LAYERS, "optim": OPTIM} | changes))


def elsewhere(root: Path, name: str) -> dict[str, Any]:
    return {"run": {"folder": root / name, "device": "cpu", "threads": 1, "log_every": 1}}


def test_the_loss_is_the_weighted_sum_and_every_part_is_logged(made: Path) -> None:
    lines = read_metrics(made / "run-student")
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        weights = {"rel": 1.0, "other.cls": 0.5 + 1.5 * step / (STEPS - 1), "feat": 0.25}
        assert {name: line[f"weight_{name}"] for name in weights} == pytest.approx(weights)
        parts = [weight * line[name] for layer, weight in weights.items() for name in NAMES[layer]]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-6)
    for name in (*NAMES["other.cls"], *NAMES["feat"]):
        assert np.mean([line[name] for line in lines[-3:]]) < np.mean([line[name] for line in lines[:3]]), name


def test_one_layer_of_weight_one_is_the_short_form_to_the_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = recipe(home, layers=None, layer="rel", **elsewhere(home, "short"))
    train_student.run(short)
    signal_in_step(student_step, 3, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train_student.run(recipe(home, layers={"rel": {}}))
    train_student.run(recipe(home, layers=None, layer="rel"))  # its states are the same
    assert losses(home) == [line["loss"] for line in read_metrics(home / "short")]
    assert not {
        name for line in read_metrics(home / "run-student") for name in line if "rel" in name or "weight" in name
    }


def test_a_layer_of_weight_zero_changes_nothing_and_is_logged(home: Path) -> None:
    train_student.run(recipe(home, layers=None, layer="rel", **elsewhere(home, "short")))
    train_student.run(recipe(home, layers={"rel": {}, "feat": {"weight": 0.0}}))
    assert losses(home) == [line["loss"] for line in read_metrics(home / "short")]
    assert all(line["distance_feat/features"] > 0 == line["weight_feat"] for line in read_metrics(home / "run-student"))


def test_a_resumed_run_has_the_same_losses_and_other_weights_another_identity(
    made: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in_step(student_step, 4, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train_student.run(recipe(home))
    for changed in ({"weight": 0.3}, {"weight": 0.25, "end_weight": 1.0}, {"weight": 0.25, "targets": {"loss": "mse"}}):
        with pytest.raises(CheckpointError):
            train_student.run(recipe(home, layers=LAYERS | {"feat": changed}))
    train_student.run(recipe(home))
    assert losses(home) == losses(made)


def test_students_among_several_learn_as_alone(made: Path, home: Path) -> None:
    students = {"as-is": {"model": STUDENT}, "wide": {"model": STUDENT | {"embed_dim": 12}, "ema": {"decay": 0.9}}}
    train_student.run(recipe(home, student=None, students=students))
    found = [line["loss"] for line in read_metrics(home / "run-student" / "as-is")]
    assert found == losses(made)
    assert "kl_rel/qk" in read_metrics(home / "run-student" / "wide")[0]


@pytest.mark.slow
def test_parts_and_ranks_train_like_one(made: Path, home: Path) -> None:
    train_student.run(recipe(home, optim=OPTIM | {"accumulate": 2}))
    np.testing.assert_allclose(losses(home), losses(made), rtol=1e-4)
    order = {"shuffle_units": 2, "lanes": 2}
    train_student.run(recipe(home, order=order, **elsewhere(home, "one")))
    train_student.run(recipe(home, order=order, workers=2, **elsewhere(home, "two")))
    one, two = (read_metrics(home / name) for name in ("one", "two"))
    for name in ("loss", "kl_rel/qk", "distance_feat/features", "weight_other.cls"):
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-4)


def test_a_kept_projector_has_the_name_of_its_layer(made: Path, home: Path) -> None:
    layers = LAYERS | {"feat": {"weight": 0.25, "targets": {"keep_projector": True}}}
    train_student.run(recipe(home, layers=layers))
    kept = load_file(home / "run-student" / "student" / "projector.safetensors")
    assert set(kept) == {"feat/0.weight", "feat/0.bias"} and losses(home) == losses(made)
    assert not (made / "run-student" / "student" / "projector.safetensors").exists()


def test_mistakes_name_the_layer(home: Path) -> None:
    with pytest.raises(UserError, match="has no layer none") as caught:
        train_student.run(recipe(home, layers={"rel": {}, "none": {}}))
    assert "feat, other.cls, rel" in str(caught.value.got)
    with pytest.raises(RecipeError, match=r"layer rel: targets\.loss mse is not a loss of sampled"):
        train_student.run(recipe(home, targets={"loss": "mse"}))
    with pytest.raises(RecipeError, match=r"^a 2-D sine-cosine position table"):  # no layer is at fault
        train_student.run(recipe(home, student=STUDENT | {"embed_dim": 9, "num_heads": 3}))
    with pytest.raises(CacheMismatch, match="layer rel: the student's tokens"):
        train_student.run(recipe(home, student=STUDENT | {"args": {"reg_tokens": 2}}))
    assert not (home / "run-student").exists()


def test_a_finer_grid_is_pooled_a_coarser_one_grows_and_a_class_embedding_needs_neither(home: Path) -> None:
    fine = STUDENT | {"patch_size": 4}  # 8 x 8 patches for the teacher's 4 x 4
    train_student.run(recipe(home, student=fine, **elsewhere(home, "fine")))
    lines = read_metrics(home / "fine")
    assert lines[-1]["distance_feat/features"] < lines[0]["distance_feat/features"]
    coarse = STUDENT | {"patch_size": 16}
    for layer in ("other.cls", "feat"):
        train_student.run(recipe(home, student=coarse, layers=None, layer=layer, **elsewhere(home, f"coarse {layer}")))
    lines = read_metrics(home / "coarse feat")
    assert lines[-1]["distance_features"] < lines[0]["distance_features"]


# ---------------------------------------------------------------- audits


def audit_of(home: Path, **layers: dict[str, Any]) -> dict[str, Any]:
    for layer, changes in layers.items():
        cache_teacher.run(cache_recipe(home, cache=home / "audit", num_views=1, layer=layer, **changes))
    return {"cache": home / "audit", "source": {"shards": home / "shards"}, "every_epochs": 1, "num_images": 12}


def test_every_layer_is_audited_where_the_audit_s_cache_has_whole_targets_of_it(
    made: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, features = {"codec": {"name": "dense"}}, {"codec": {"kind": "features", "name": "int8"}}
    train_student.run(recipe(home, audit=audit_of(home, x=dense, y=features)))
    trained = [line["loss"] for line in read_metrics(home / "run-student") if "loss" in line]
    assert trained == losses(made)
    lines = read_audits(home / "run-student")
    assert set(lines[-1]["train_kl"]) == {"rel/qk", "rel/vv", "feat/features"}
    assert lines[-1]["feat/features"]["measure"] == "distance"
    logged = [line for line in read_metrics(home / "run-student") if "audit_kl_rel/qk" in line]
    assert len(logged) == len(lines) and all("audit_distance_feat/features" in line for line in logged)
    assert "audit: layer other.cls is not audited: " in capsys.readouterr().err
    # As an audit of that layer alone.
    alone = audit_of(home) | {"layer": "x"}
    train_student.run(recipe(home, layers=None, layer="rel", audit=alone, **elsewhere(home, "alone-run")))
    first, only = lines[0], read_audits(home / "alone-run")[0]
    assert first["rel/qk"] == only["qk"]


def test_an_audit_that_fits_no_layer_is_refused(home: Path) -> None:
    audit = audit_of(home, x={"codec": {"rows": 4}})
    with pytest.raises(CacheMismatch):
        train_student.run(recipe(home, audit=audit))

"""Audits in real trainings: they change nothing of them, and find targets that belong to other images."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheMismatch, RecipeError, UserError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.audits import AuditConfig
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.teacher import Teacher
from tinymim.models.vit import build_vit
from tinymim.stages import cache_teacher, make_shards, train_student
from tinymim.stages.audits.batch import AuditBatch, audit_batches
from tinymim.stages.audits.student_audits import StudentAudits
from tinymim.stages.cache.opened import Opened, opened_kind
from tinymim.stages.run.folder import read_audits, read_metrics
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.training import student_step
from tinymim.stages.training.device_stream import CPU
from tinymim.stages.training.terms import Term
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import STUDENT, TEACHER, cache_recipe, signal_in_step, student_recipe, write_teacher

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """A random teacher, its cache of two shards of drawn images, and dense and hidden caches of the third."""
    root = tmp_path_factory.mktemp("audits")
    shutil.copytree(drawn_shards, root / "shards")
    write_teacher(root / "teacher.safetensors")
    cache_teacher.run(cache_recipe(root, source=trained(root)))
    cache_teacher.run(held_out_cache(root))
    return root


def trained(root: Path) -> dict[str, Any]:
    return {"shards": root / "shards", "pattern": "shard-00000[02].tar"}


def held_out(root: Path) -> dict[str, Any]:
    return {"shards": root / "shards", "pattern": "shard-000001.tar"}


def held_out_cache(root: Path, **changes: Any) -> CacheTeacherRecipe:
    fields = {"cache": root / "audit", "codec": {"name": "dense"}, "num_views": 1}
    return cache_recipe(root, **({"source": held_out(root)} | fields | changes))


def audit(root: Path, **changes: Any) -> dict[str, Any]:
    """Every five steps: an epoch is of 35 images in batches of 7."""
    return {"cache": root / "audit", "source": held_out(root), "every_epochs": 1, "num_images": NUM_IMAGES} | changes


def recipe(root: Path, **changes: Any) -> TrainStudentRecipe:
    optim = {"batch_size": 7, "steps": 12, "base_lr": 0.1, "warmup": 0.2}
    return student_recipe(root, **({"source": trained(root), "optim": optim} | changes))


def steps_of(root: Path, name: str = "run-student") -> list[int]:
    return [line["step"] for line in read_audits(root / name)]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


# ---------------------------------------------------------------- an audit changes nothing


def test_training_is_the_same_to_the_bit_with_and_without_audits(home: Path) -> None:
    students = {"plain": {"model": STUDENT}, "averaged": {"model": STUDENT | {"embed_dim": 12}, "ema": {"decay": 0.9}}}
    recipes = {"student": None, "students": students, "drop_path": 0.3}
    without = recipe(home, **recipes, run={"folder": home / "without", "device": "cpu", "threads": 1, "log_every": 1})
    train_student.run(without)
    knn = {"train": trained(home), "val": held_out(home), "k": 5}
    before = torch.get_rng_state()
    train_student.run(recipe(home, **recipes, audit=audit(home, knn=knn, num_images=20)))
    torch.manual_seed(0)  # as `train` does for every student
    assert torch.get_rng_state().shape == before.shape
    for name in students:
        folder = home / "run-student" / name
        assert losses(folder) == losses(home / "without" / name)
        for weights in ("student.safetensors", "student-ema.safetensors"):
            theirs = home / "without" / name / weights
            assert not theirs.exists() or tensors_of(folder / weights) == tensors_of(theirs)
        lines = read_audits(folder)
        assert [line["step"] for line in lines] == [0, 5, 10, 12]
        assert [line["epoch"] for line in lines] == [0.0, 1.0, 2.0, 2.4]
        assert all(0 <= line["knn_top1"] <= line["knn_top5"] <= 1 and line["seconds"] > 0 for line in lines)
        assert ("ema_qk" in lines[0], "ema_knn_top1" in lines[0]) == (name == "averaged",) * 2
        assert lines[0]["train_kl"] == {} and set(lines[1]["train_kl"]) == {"qk", "vv"}
        assert np.shape([line["vv"]["per_head"] for line in lines]) == (4, 2)
        logged = [line for line in read_metrics(folder) if "audit_kl_qk" in line]
        assert [line["step"] for line in logged] == [0, 4, 9, 11]
        assert [line["audit_kl_vv"] for line in logged] == [line["vv"]["kl"] for line in lines]


def tensors_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def test_a_student_is_in_training_mode_and_no_number_is_drawn_after_an_audit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def watched(self: StudentAudits, *args: Any) -> None:
        state = torch.get_rng_state()
        after(self, *args)
        seen.append(all(subject.student.training for subject in self._subjects))
        assert torch.equal(torch.get_rng_state(), state)

    after = StudentAudits.after
    monkeypatch.setattr(StudentAudits, "after", watched)
    train_student.run(recipe(home, audit=audit(home, knn={"train": trained(home), "val": held_out(home), "k": 5})))
    assert seen == [True] * 13


def test_a_stopped_run_has_every_audit_once_and_one_without_audits_may_go_on_with_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(home, audit=audit(home), run={"folder": home / "whole", "device": "cpu", "threads": 1})
    train_student.run(whole)
    with monkeypatch.context() as patched:
        signal_in_step(student_step, 6, signal.SIGTERM, patched)  # a state of step 7, after the audit of step 5
        with pytest.raises(Interrupted):
            train_student.run(recipe(home, audit=audit(home)))
    assert steps_of(home) == [0, 5]
    with (home / "run-student" / "audit.jsonl").open("a") as lines:  # one that a kill has cut short, and a lost one
        lines.write('{"step": 10, "epoch": 2.0}\n{"step": 1')
    train_student.run(recipe(home, audit=audit(home)))
    assert steps_of(home) == [0, 5, 10, 12]
    for mine, theirs in zip(read_audits(home / "run-student"), read_audits(home / "whole"), strict=True):
        assert (mine["qk"], mine["vv"]) == (theirs["qk"], theirs["vv"])
    train_student.run(recipe(home, audit=audit(home)))  # done: nothing is added
    assert steps_of(home) == [0, 5, 10, 12]

    late = {"folder": home / "late", "device": "cpu", "threads": 1}
    with monkeypatch.context() as patched:
        signal_in_step(student_step, 6, signal.SIGTERM, patched)
        with pytest.raises(Interrupted):
            train_student.run(recipe(home, run=late))
    train_student.run(recipe(home, run=late, audit=audit(home)))
    assert steps_of(home, "late") == [7, 10, 12]
    train_student.run(recipe(home, run=late, checkpoint={"resume": False}))  # begun anew, without
    assert not read_audits(home / "late")


def test_a_signal_during_the_knn_costs_that_knn_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: StopFlag) -> StopFlag:
        flag = enter(self)
        self.requested = self.requeue = True
        return flag

    enter = StopFlag.__enter__
    monkeypatch.setattr(StopFlag, "__enter__", ask)
    with pytest.raises(Interrupted, match="state of step 1 saved"):
        train_student.run(recipe(home, audit=audit(home, knn={"train": trained(home), "val": held_out(home), "k": 5})))
    (line,) = read_audits(home / "run-student")
    assert "qk" in line and "knn_top1" not in line


# ---------------------------------------------------------------- what it measures


def batch_of(root: Path, cache: Path, targets: TargetsConfig | None = None) -> AuditBatch:
    config = AuditConfig.model_validate(audit(root, cache=cache))
    reader = CacheReader(root / "cache")
    layer = reader.layer()
    kind = opened_kind(reader, layer, targets or TargetsConfig(), CPU)
    [found] = audit_batches(config, reader.manifest, [Opened(layer, kind, Term(kind, layer.shapes))], 32)
    return found


def test_the_kl_is_that_of_dense_rows_of_the_first_images_and_hidden_records_give_the_same(home: Path) -> None:
    torch.manual_seed(0)
    vit = build_vit(recipe(home).student)  # type: ignore[arg-type]
    reader = CacheReader(home / "cache")
    head = opened_kind(reader, reader.layer(), TargetsConfig(), CPU).head(shapes_of(vit), reader.layer().shapes)
    student = StudentModel(vit, head).eval()
    found = batch_of(home, home / "audit").compare(student)

    reader = CacheReader(home / "audit")
    records = reader.read_views(reader.units(reader.layer().name)[0])
    batch = batch_of(home, home / "audit")
    with torch.no_grad():
        q, k, v = student(batch._images)
    for name, (a, b) in {"qk": (q, k), "vv": (v, v)}.items():
        teacher = torch.from_numpy(records[f"{name}_probs"][0, :NUM_IMAGES]).double()
        log = (a.double() @ b.double().transpose(-1, -2) / a.shape[-1] ** 0.5).log_softmax(-1)
        kl = torch.special.entr(teacher).sum(-1).neg() - (teacher * log).sum(-1)
        np.testing.assert_allclose(found[name].per_head, kl.mean((0, 2)), rtol=1e-4)
        other = torch.special.entr(teacher).sum(-1).neg() - (teacher * log.roll(-1, 0)).sum(-1)
        assert found[name].gap == pytest.approx(float((other - kl).mean()), rel=1e-3, abs=1e-7)
        even = np.log(17) - float(torch.special.entr(teacher).sum(-1).mean())
        assert found[name].yardstick.even == pytest.approx(even, rel=1e-3, abs=1e-7)
        means = (teacher.sum(0) - teacher) / (NUM_IMAGES - 1)
        common = float((teacher * (teacher.log() - means.log())).sum(-1).mean())
        assert found[name].yardstick.common == pytest.approx(common, rel=1e-2, abs=1e-7)

    codec = {"name": "hidden", "calibration_views": 8}
    cache_teacher.run(held_out_cache(home, cache=home / "hidden", codec=codec))
    by_hidden = batch_of(home, home / "hidden").compare(student)
    for name in ("qk", "vv"):
        np.testing.assert_allclose(by_hidden[name].per_head, found[name].per_head, rtol=5e-3)
    assert set(batch_of(home, home / "hidden", TargetsConfig(relations=("vv",))).compare(student)) == {"vv"}


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"teacher": TEACHER | {"block": 1}}, "target.taps differs"),
        ({"teacher": TEACHER | {"block": 2, "mean": (0.1, 0.1, 0.1)}}, "teacher.mean differs"),
        ({"codec": {"rows": 4}}, "holds no whole targets"),
        ({"codec": {"name": "dense", "relation_heads": 4}}, "into other heads"),
    ],
)
def test_a_cache_that_cannot_audit_this_training_is_refused(home: Path, changes: dict[str, Any], names: str) -> None:
    changes = {key: value | {"weights": str(home / "teacher.safetensors")} if key == "teacher" else value
               for key, value in changes.items()}  # fmt: skip
    cache_teacher.run(held_out_cache(home, cache=home / "other", **changes))
    with pytest.raises(CacheMismatch, match=names):
        train_student.run(recipe(home, audit=audit(home, cache=home / "other")))
    assert not (home / "run-student").exists()


def test_too_few_images_other_relations_and_training_images_are_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="too few images") as caught:
        train_student.run(recipe(home, audit=audit(home, num_images=26)))
    assert caught.value.got == 25
    cache_teacher.run(held_out_cache(home, cache=home / "qk", codec={"name": "dense", "relations": ["qk"]}))
    with pytest.raises(RecipeError, match="does not hold the relation vv"):
        train_student.run(recipe(home, audit=audit(home, cache=home / "qk")))
    cache_teacher.run(held_out_cache(home, cache=home / "same", source=trained(home)))
    config = AuditConfig.model_validate(audit(home, cache=home / "same", source=trained(home)))
    reader = CacheReader(home / "cache")
    kind, shapes = opened_kind(reader, reader.layer(), TargetsConfig(), CPU), reader.layer().shapes
    audit_batches(config, reader.manifest, [Opened(reader.layer(), kind, Term(kind, shapes))], 32)
    assert "audit: warning: the training's cache also holds shard-000000.tar" in capsys.readouterr().err


# ---------------------------------------------------------------- wrong targets


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """The demo's teacher, trained on such images: a right cache, one whose rows are the image's before, an audit's."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(drawn_shards, root / "shards")
    make_shards.run("drawn", root / "held-out", make_shards.Options(count=32, images_per_shard=32, seed=1))
    loaded = load_recipe(Path("demo-cache"), "cache-teacher")
    assert isinstance(loaded, CacheTeacherRecipe)
    fields = {"teacher": loaded.teacher.model_dump(), "views": {"size": 64}, "batch_size": 16}
    forward = Teacher.forward

    def of_the_image_before(self: Teacher, pixels: torch.Tensor, *which: Any, **mask: Any) -> Any:
        tapped = forward(self, pixels, *which, **mask)
        return {tap: tuple(side.roll(2, 0) for side in sides) for tap, sides in tapped.items()}  # two views an image

    codec = {"rows": 65, "tail_k": 8}
    cache_teacher.run(cache_recipe(root, codec=codec, **fields))
    held = {"source": {"shards": root / "held-out"}, "num_views": 1, "codec": {"name": "dense"}}
    cache_teacher.run(cache_recipe(root, cache=root / "audit", **held, **fields))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Teacher, "forward", of_the_image_before)
        cache_teacher.run(cache_recipe(root, cache=root / "wrong", codec=codec, **fields))
    return root


def demo_recipe(root: Path, name: str, **changes: Any) -> TrainStudentRecipe:
    config = {"cache": root / "audit", "source": {"shards": root / "held-out"}, "num_images": 32, "every_epochs": 1.7}
    return student_recipe(
        root,
        cache=root / name,
        student=STUDENT | {"img_size": 64, "embed_dim": 24, "num_heads": 4},
        optim={"batch_size": 10, "steps": 60, "base_lr": 0.25, "warmup": 0.1},
        drop_path=0.0,
        audit=config | changes,
        run={"folder": root / f"run-{name}", "device": "cpu", "threads": 1, "log_every": 10},
    )


def test_targets_of_other_images_raise_an_alarm_and_right_ones_none(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_student.run(demo_recipe(demo, "cache"))
    right = read_audits(demo / "run-cache")
    assert [line["step"] for line in right] == [0, 10, 20, 30, 40, 50, 60]
    assert [line["alarms"] for line in right] == [[]] * 7 and "ALARM" not in capsys.readouterr().err

    train_student.run(demo_recipe(demo, "wrong"))
    wrong = read_audits(demo / "run-wrong")
    err = capsys.readouterr().err
    # Its loss falls, and so does the KL to the right rows: by these alone all is well.
    assert (
        wrong[-1]["train_kl"]["qk"] < 0.7 * wrong[1]["train_kl"]["qk"]
        and wrong[-1]["qk"]["kl"] < 0.5 * wrong[0]["qk"]["kl"]
    )
    assert wrong[-1]["alarms"] and wrong[0]["alarms"] == wrong[1]["alarms"] == []
    assert "train-student: AUDIT ALARM after 60 steps: qk: the student answers alike for any image" in err


def test_an_alarm_may_end_the_training_with_its_state_saved(demo: Path) -> None:
    root = demo
    asked = demo_recipe(root, "wrong", on_alarm="stop")
    asked = asked.model_copy(update={"run": asked.run.model_copy(update={"folder": root / "run-stopped"})})
    with pytest.raises(UserError, match="raised an alarm") as caught:
        train_student.run(asked)
    assert caught.value.exit_code == 2 and "alike for any image" in str(caught.value.got)
    last = read_audits(root / "run-stopped")[-1]
    assert [path.name for path in (root / "run-stopped").glob("state-*")] == [f"state-{last['step']:08d}.pt"]
    assert json.loads(json.dumps(last))["alarms"] and not (root / "run-stopped" / "student.safetensors").exists()

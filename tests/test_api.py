"""The library: the same batches, targets and losses as `train-student`, in a loop of one's own."""

import ast
import itertools
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import tinymim
import tinymim.api
from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError
from tinymim.configs.load import dump_recipe
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.dataset import ViewBatch
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.training.student_step import StudentStep
from tinymim.tests.models.own_models import SHAPES, Mixer
from tinymim.tests.stages.tiny import STUDENT, TEACHER, cache_recipe, copied, stored, student_recipe, tree, write_set

HEAVY = ("torch", "timm", "zarr", "numpy", "pydantic")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a cache of two layers and two views."""
    root = write_set(tmp_path_factory.mktemp("api"))
    cache_teacher.run(cache_recipe(root, layer="sketch", audit_views=4))
    features = {"kind": "features", "name": "int8"}
    cache_teacher.run(cache_recipe(root, layer="features", codec=features, run={"folder": root / "run-features"}))
    return root


def student() -> timm.models.VisionTransformer:
    sizes = {name: value for name, value in STUDENT.items() if name != "name"}
    torch.manual_seed(0)
    model = timm.create_model(STUDENT["name"], num_classes=0, **sizes)
    assert isinstance(model, timm.models.VisionTransformer)
    return model


def loader(root: Path, **changes: Any) -> tinymim.Loader:
    values: dict[str, Any] = {"batch_size": 8, "workers": 0, "verify_first": 10**6}
    return tinymim.open_cache(root / "cache").loader(root / "shards", **values | changes)


def names(batch: tinymim.Batch) -> list[tuple[str, int]]:
    return list(zip(batch.keys, batch.views.tolist(), strict=True))


def test_import_loads_nothing_heavy() -> None:
    cache = Path(__file__).parent / "data" / "cache_v2"
    code = f"""
import sys, tinymim, tinymim.api
tinymim.__version__, tinymim.recipes()
print([n for n in {HEAVY} if n in sys.modules])
tinymim.cache_info({str(cache)!r}), tinymim.cache_verify({str(cache)!r})
print([n for n in ("torch", "timm") if n in sys.modules])
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["[]", "[]"]


def test_the_page_is_made_of_the_docstrings() -> None:
    root = Path(__file__).parents[1]
    page = runpy.run_path(str(root / "docs" / "make_api.py"))["page"]()
    assert (root / "docs" / "api.md").read_text() == page, "run: python docs/make_api.py > docs/api.md"


def test_the_example_is_safe_as_a_script_with_loader_processes() -> None:
    lines = [line for line in (tinymim.api.__doc__ or "").splitlines() if line.startswith("    ") or not line]
    *definitions, guard = ast.parse(textwrap.dedent("\n".join(lines))).body
    assert all(isinstance(each, ast.Import | ast.FunctionDef) for each in definitions)
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'"


def test_names_are_loaded_at_first_use_and_others_do_not_exist() -> None:
    assert tinymim.open_cache is sys.modules["tinymim.api"].open_cache
    assert set(tinymim.__all__) <= set(dir(tinymim))
    with pytest.raises(AttributeError, match="no attribute 'opencache'"):
        tinymim.opencache  # noqa: B018


def test_a_cache_describes_itself(root: Path) -> None:
    cache = tinymim.open_cache(root / "cache")
    assert cache.layers == ("features", "sketch") and cache.view_size == 32
    assert cache.teachers["sketch"]["shapes"]["heads"] == 2
    assert cache.coverage["sketch"].complete and cache.coverage["features"].num_records == 72
    assert cache.fidelity["sketch"]["audited_views"] > 0 and cache.fidelity["features"] == {}


def test_batches_hold_the_pixels_and_targets_of_all_layers(root: Path) -> None:
    cache = tinymim.open_cache(root / "cache")
    both = loader(root)
    assert (len(both), both.images, both.num_views, both.layers) == (4, 36, 2, ("features", "sketch"))
    batch = next(iter(both))
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (8, 3, 32, 32)
    assert batch.images().dtype == torch.float32 and len(set(batch.view_keys.tolist())) == 8
    assert batch.labels.shape == (8,) and set(batch.targets) == {"features", "sketch"}
    for (key, view), pixels in zip(names(batch), batch.pixels, strict=True):
        assert torch.equal(cache.replay(root / "shards", key, view), pixels)
    for layer in both.layers:
        alone = next(iter(loader(root, layers=[layer])))
        assert names(alone) == names(batch) and alone.records.keys() == {layer}
        for name, array in alone.records[layer].items():
            assert torch.equal(array, batch.records[layer][name])


def test_heads_and_losses_train_a_student_on_both_layers(root: Path) -> None:
    cache, model = tinymim.open_cache(root / "cache"), student()
    heads = torch.nn.ModuleDict({layer: cache.head(layer, model) for layer in cache.layers})
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)
    batch = next(iter(loader(root)))
    totals = []
    for _ in range(8):
        tokens = model.forward_features(batch.images())
        losses = cache.losses({layer: head(tokens) for layer, head in heads.items()}, batch)
        total = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert {name.partition("/")[0] for name in losses} == {"features", "sketch"}
    assert totals[-1] < totals[0]


def test_the_stream_is_that_of_train_student(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    step = StudentStep.take

    def take(self: StudentStep, number: int, batch: ViewBatch) -> None:
        seen.append(batch.keys)
        step(self, number, batch)

    monkeypatch.setattr(StudentStep, "take", take)
    changes = {"optim": {"batch_size": 8, "steps": 8}, "run": {"folder": root / "run-s", "device": "cpu"}}
    train_student.run(student_recipe(root, layer="sketch", **changes))
    own = loader(root, layers=["sketch"], shuffle_units=2)
    assert [batch.keys for _ in range(2) for batch in own] == seen


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_loaded_state_continues_with_the_same_batches(root: Path, stop: int) -> None:
    whole = loader(root, views_per_decode=2, views_per_epoch="all")
    wanted = [names(batch) for _ in range(2) for batch in whole]
    begun = loader(root, views_per_decode=2, views_per_epoch="all")
    done = [names(batch) for batch in itertools.islice(begun, stop)]
    resumed = loader(root, views_per_decode=2, views_per_epoch="all")
    resumed.load_state_dict(begun.state_dict())
    rest = [names(batch) for batch in resumed]
    assert done + rest == wanted[: len(whole)]
    with pytest.raises(CheckpointError):
        loader(root, batch_size=4).load_state_dict(begun.state_dict())


def test_ranks_share_every_batch_and_workers_change_nothing(root: Path) -> None:
    alone = [names(batch) for batch in loader(root, lanes=2)]
    ranks = [loader(root, lanes=2, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    parts = zip(*([names(batch) for batch in each] for each in ranks), strict=True)
    assert [one + other for one, other in parts] == alone


def test_layers_that_hold_less_limit_the_views_and_shards(root: Path, tmp_path: Path) -> None:
    home = copied(root, tmp_path / "home")
    first, *others = sorted(path.name for path in (home / "shards").glob("*.tar"))
    part = {"shards": home / "shards", "pattern": first}
    classes = {"kind": "cls", "name": "int8"}
    cache_teacher.run(cache_recipe(home, layer="part", codec=classes, source=part, num_views=1))
    with pytest.raises(tinymim.UserError, match="lacks 2 of 3 shards"):
        loader(home)
    some = loader(home, on_missing="skip")
    assert (some.images, some.num_views, list(some.skipped)) == (12, 1, others)
    assert set(next(iter(some)).targets) == {"features", "part", "sketch"}


def test_mistakes_have_a_remedy(root: Path) -> None:
    cache = tinymim.open_cache(root / "cache")
    with pytest.raises(tinymim.UserError, match="no layer sketsch"):
        loader(root, layers=["sketsch"])
    with pytest.raises(tinymim.UserError, match="no view 2 of an image"):
        cache.replay(root / "shards", next(iter(loader(root))).keys[0], 2)
    with pytest.raises(RecipeError, match=r"no teacher that computes(.|\n)*`tinymim train-student`(.|\n)*write_back"):
        loader(root, on_missing="teacher")
    with pytest.raises(RecipeError, match="rank is not below"):
        loader(root, rank=2, world_size=2)
    with pytest.raises(RecipeError, match="more than the images"):
        loader(root, batch_size=64)
    with pytest.raises(RecipeError, match="views_per_epoch must be a multiple"):
        loader(root, views_per_decode=2)
    with pytest.raises(tinymim.UserError, match="sizes of this student are unknown"):
        cache.head("sketch", torch.nn.Linear(2, 2))
    with pytest.raises(CacheMismatch, match="tokens are not"):
        cache.head("sketch", tinymim.Shapes(2, 4, 5, 1, (2, 2)))
    with pytest.raises(tinymim.UserError, match="no targets of layer sketch"):
        cache.losses({"sketch": ()}, next(iter(loader(root, layers=["features"]))))
    with pytest.raises(RecipeError, match="targets of layer sketch"):
        tinymim.open_cache(root / "cache", {"sketch": {"relation": ["qk"]}})


def answers_of(model: Any, images: torch.Tensor, taps: Any) -> dict[str, torch.Tensor]:
    tokens: torch.Tensor = model.forward_features(images)
    return {tap: tokens[:, 0] if tap.startswith("cls") else tokens for tap in taps}


def test_a_cache_is_written_with_a_module_in_hand(root: Path, tmp_path: Path) -> None:
    teacher, fields = Mixer(), {"mean": [0.5] * 3, "std": [0.5] * 3, "workers": 0, "batch_size": 8, "device": "cpu"}
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    own: dict[str, Any] = {"taps": answers_of, "shapes": SHAPES, "views": {"size": 32}, **fields}
    features = {"kind": "features", "name": "int8"}
    cache = tinymim.TeacherCache.write(tmp_path / "own", teacher, root / "shards", codec=features, layer="own", **own)
    assert cache.layers == ("own",) and cache.coverage["own"].complete
    assert cache.teachers["own"]["arch"]["factory"].endswith("own_models:Mixer")
    assert teacher.training and all(torch.equal(before[name], each) for name, each in teacher.state_dict().items())
    kept = tree(tmp_path / "own")
    tinymim.TeacherCache.write(tmp_path / "own", teacher, root / "shards", codec=features, layer="own", **own)
    assert tree(tmp_path / "own") == kept  # nothing was left to do
    unit, *_ = (tmp_path / "own" / "layers" / "own").rglob("*.zip")
    unit.unlink()
    unit.with_suffix(".json").unlink(missing_ok=True)
    tinymim.TeacherCache.write(tmp_path / "own", teacher, root / "shards", codec=features, layer="own", **own)
    assert tree(tmp_path / "own") == kept  # as after a kill: the missing unit alone, with the same bytes
    batch = next(iter(cache.loader(root / "shards", batch_size=8, workers=0)))
    tokens = teacher.eval().forward_features((batch.pixels / 255 - 0.5) / 0.5)
    losses = cache.losses({"own": cache.head("own", teacher)(tokens)}, batch)
    assert {name.partition("/")[0] for name in losses} == {"own"}
    # A second layer beside it, and refusals.
    classes = {"kind": "cls", "name": "int8"}
    cache = tinymim.TeacherCache.write(tmp_path / "own", teacher, root / "shards", codec=classes, layer="cls", **own)
    assert cache.layers == ("cls", "own")
    with pytest.raises(CacheMismatch, match="weights_sha256"):
        tinymim.TeacherCache.write(tmp_path / "own", Mixer(seed=1), root / "shards", codec=classes, layer="cls", **own)
    with pytest.raises(tinymim.UserError, match="belong together"):
        tinymim.TeacherCache.write(tmp_path / "own", teacher, root / "shards", **own | {"shapes": None})
    with pytest.raises(tinymim.UserError, match="give run_folder"):
        tinymim.TeacherCache.write("s3://bucket/own", teacher, root / "shards", **own)


def test_a_timm_teacher_in_hand_gives_the_records_of_its_recipe(root: Path, tmp_path: Path) -> None:
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    teacher: Any = timm.create_model(TEACHER["name"], num_classes=0, **sizes)
    teacher.load_state_dict(load_file(root / "teacher.safetensors"))
    fields: dict[str, Any] = {"views": {"size": 32, "scaled_decode": False}, "workers": 0, "device": "cpu"}
    codec = {"rows": 6, "head_k": 1, "tail_k": 3}
    pixels: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    tinymim.TeacherCache.write(
        tmp_path / "cache", teacher, root / "shards", codec=codec, block=2, layer="sketch", **fields, **pixels
    )
    assert len(teacher.blocks) == 2
    own = {n: d for n, d in stored(tmp_path).items() if n.endswith(".zip")}
    assert own and own.items() <= {n: d for n, d in stored(root).items() if n.endswith(".zip")}.items()


def test_run_recipe_is_the_command_of_its_stage(root: Path, tmp_path: Path) -> None:
    recipe = student_recipe(root, layer="sketch", run={"folder": tmp_path / "run", "device": "cpu"})
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    ran = tinymim.run_recipe(tmp_path / "mine.yaml", "optim.steps=2")
    assert ran == {"stage": "train-student", "folder": str(tmp_path / "run")}
    assert (tmp_path / "run" / "student.safetensors").is_file()
    assert tinymim.export(str(tmp_path / "run"), str(tmp_path / "out"), "timm")["max_difference"] == 0.0
    with pytest.raises(tinymim.UserError, match=r"optim\.steps"):
        tinymim.run_recipe(tmp_path / "mine.yaml", "optim.steps=none")

"""The demo from end to end at a minute size: seven encoders, one report, resumable, one folder per seed."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.errors import CacheMismatch, CheckpointError, SourceError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import demo
from tinymim.stages.pages.demo import RELATIONS_NAME
from tinymim.tests.stages.tiny import STATED

SIZE = demo.DemoSize(train_images=20, val_images=10, images_per_shard=10, steps=2, batch_size=8, workers=0, threads=1)
ARMS = [
    ("teacher, block 5 of 6", "masked autoencoder"),
    ("wide student", "distilled from the cache"),
    ("wide student", "masked autoencoder"),
    ("wide student", "not at all"),
    ("narrow student", "distilled from the cache"),
    ("narrow student", "masked autoencoder"),
    ("narrow student", "not at all"),
]


class Made(NamedTuple):
    folder: Path
    weights: str
    output: str


def write_teacher(path: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).state_dict(), path, STATED)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished demo with a random teacher, and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    weights = write_teacher(root / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: None if "file" in kwargs else lines.append(args[0]))
        path = Path(demo.run(root / "demo", 0, SIZE, weights)["report"])
    assert path == root / "demo" / "report.html"
    return Made(root / "demo", weights, "\n".join(lines))


def table_of(output: str) -> list[str]:
    return output.split("\n\n")[0].splitlines()


def test_the_table_holds_all_seven_encoders(made: Made) -> None:
    _, _, *rows = table_of(made.output)
    cells = [re.split(r"\s{2,}", row) for row in rows]
    assert [(row[0], row[2]) for row in cells] == ARMS
    assert [row[4] for row in cells] == ["-", "1 for both", "0", "0", "1 for both", "0", "0"]
    assert made.output.isascii()


def test_the_output_names_teacher_report_and_next_commands(made: Made) -> None:
    assert "1.2 M-parameter ViT (128 wide, 6 blocks)" in made.output
    assert f"\nreport: {made.folder / 'report.html'}\n" in made.output
    assert "tinymim train-student demo-wide" in made.output


def test_the_report_is_self_contained_and_shows_the_same_table(made: Made) -> None:
    page = (made.folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert page.count('src="data:image/png;base64,iVBORw0KGgo') == 2
    assert (made.folder / RELATIONS_NAME).stat().st_size > 10_000
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.split("<tbody>")[1].split("</tbody>")[0])
    printed = [cell for row in table_of(made.output)[2:] for cell in re.split(r"\s{2,}", row)]
    assert cells == printed


def test_results_are_kept_for_machines(made: Made) -> None:
    results = json.loads((made.folder / "results.json").read_bytes())
    assert results["seed"] == 0
    assert [(arm["model"], arm["how_trained"]) for arm in results["arms"]] == ARMS


def test_a_finished_demo_is_not_run_again(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["cache/zarr.json", *(f"runs/eval-{name}/evaluation.json" for name in ("teacher", "wide", "narrow-mae"))]
    written = [(made.folder / name).stat().st_mtime_ns for name in kept]
    report = (made.folder / "report.html").read_bytes()
    demo.run(made.folder, 0, SIZE, made.weights)
    assert table_of(capsys.readouterr().out) == table_of(made.output)
    assert (made.folder / "report.html").read_bytes() == report
    assert [(made.folder / name).stat().st_mtime_ns for name in kept] == written


def test_another_seed_or_size_or_teacher_needs_another_folder(made: Made, tmp_path: Path) -> None:
    report = (made.folder / "report.html").read_bytes()
    with pytest.raises(CacheMismatch, match=r"views\.seed(.|\n)*give another --folder"):
        demo.run(made.folder, 1, SIZE, made.weights)
    with pytest.raises(CacheMismatch, match=r"weights_sha256(.|\n)*give another --folder"):
        demo.run(made.folder, 0, SIZE, write_teacher(tmp_path / "other.safetensors", seed=1))
    with pytest.raises(SourceError, match=r"holds other images(.|\n)*give another --folder"):
        demo.run(made.folder, 0, demo.DemoSize(workers=0), made.weights)
    longer = dataclasses.replace(SIZE, steps=3)
    with pytest.raises(CheckpointError, match=r"another recipe(.|\n)*give another --folder"):
        demo.run(made.folder, 0, longer, made.weights)
    assert (made.folder / "report.html").read_bytes() == report


def test_an_absent_teacher_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        demo.run(tmp_path / "demo", 0, SIZE, str(tmp_path / "none.safetensors"))
    assert not (tmp_path / "demo").exists()


def test_drawing_that_was_stopped_starts_again(tmp_path: Path) -> None:
    left_over = tmp_path / "train.partial"
    left_over.mkdir()
    (left_over / "shard-000000.tar").write_bytes(b"half")
    demo.draw_images(tmp_path / "train", 4, 100, 4)
    assert not left_over.exists()
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "index.json",
        "index.members",
        "shard-000000.tar",
    ]


def test_any_folder_name_comes_through_the_recipes(tmp_path: Path) -> None:
    root = tmp_path / "a: b # c 'd' \"e\" ünï"
    recipes = demo.load_recipes(root, 3, SIZE, demo.TEACHER)
    assert recipes.cache.cache == root / "cache"
    assert recipes.students["wide"].run.folder == root / "runs" / "wide"
    trained: list[TrainStudentRecipe | PretrainMaeRecipe] = [*recipes.students.values(), *recipes.autoencoders.values()]
    assert {recipe.run.seed for recipe in trained} | {recipe.order.seed for recipe in trained} == {3}
    assert {recipes.cache.views, *(recipe.views for recipe in recipes.autoencoders.values())} == {recipes.cache.views}


@pytest.mark.parametrize("name", demo.STUDENTS)
def test_the_untaught_twin_differs_in_nothing_but_the_teaching(name: str) -> None:
    cache = load_recipe(Path("demo-cache"), "cache-teacher")
    student = load_recipe(Path(f"demo-{name}"), "train-student")
    twin = load_recipe(Path(f"demo-{name}-mae"), "pretrain-mae")
    assert isinstance(cache, CacheTeacherRecipe)
    assert isinstance(student, TrainStudentRecipe) and isinstance(twin, PretrainMaeRecipe)
    assert twin.model == student.student
    assert (twin.optim.steps, twin.optim.batch_size) == (student.optim.steps, student.optim.batch_size)
    assert twin.views == cache.views
    assert twin.source == student.source == cache.source
    assert student.cache == cache.cache

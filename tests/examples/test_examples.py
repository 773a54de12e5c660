"""Every example runs on a tiny set, is short, and lowers its loss; those of extras skip without them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.shards import labels_of, open_shards
from tinymim.stages import cache_teacher
from tinymim.tests.stages.tiny import cache_recipe, write_set

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The cache and the shards."""
    root = write_set(tmp_path_factory.mktemp("examples"))
    cache_teacher.run(cache_recipe(root, layer="relations"))
    features = {"kind": "features", "name": "int8"}
    cache_teacher.run(cache_recipe(root, layer="features", codec=features, run={"folder": root / "run-features"}))
    return str(root / "cache"), str(root / "shards")


def example(name: str, *needs: str) -> Any:
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(f"tinymim.examples.{name}")


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 5 and max(lengths.values()) < 80, lengths


def lowers(main: Callable[..., float], *arguments: str, **options: Any) -> bool:
    """Whether four epochs end with a lower loss than one, from the same initial weights."""
    ends = []
    for epochs in (1, 4):
        torch.manual_seed(0)
        ends.append(main(*arguments, epochs=epochs, batch_size=12, workers=0, **options))
    return ends[1] < ends[0]


def test_plain_loop(place: tuple[str, str]) -> None:
    assert lowers(example("plain_loop").main, *place, width=48)


def test_supervised(place: tuple[str, str]) -> None:
    classes = int(labels_of(open_shards(SourceConfig(shards=place[1])).shards).max()) + 1
    main = example("supervised").main
    assert lowers(lambda *given, **options: sum(main(*given, classes, **options)), *place)


def test_timm_task(place: tuple[str, str]) -> None:
    assert lowers(example("timm_task", "timm.task").main, *place)


@pytest.mark.filterwarnings("ignore")  # of the package, about this machine
def test_lightning(place: tuple[str, str], tmp_path: Path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    main = example("lightning_module", "lightning").main
    assert lowers(main, *place, accelerator="cpu", default_root_dir=str(tmp_path), **quiet)


@pytest.mark.filterwarnings("ignore")  # of the package, about this machine
def test_huggingface_trainer(place: tuple[str, str], tmp_path: Path) -> None:
    assert lowers(example("huggingface_trainer", "transformers", "accelerate").main, *place, str(tmp_path / "trainer"))

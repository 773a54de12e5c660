"""The shipped teacher is what its recipe says, and worth learning from."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.models.checkpoints import read_checkpoint, read_metadata
from tinymim.models.files import weights_file
from tinymim.models.probes import knn_predict, top_k_accuracy
from tinymim.models.vit import Normalise, build_vit
from tinymim.models.weights import load_weights
from tinymim.pipeline import drawn
from tinymim.pipeline.decode import render
from tinymim.pipeline.shards import hash_file
from tinymim.pipeline.views import CentreView
from tinymim.stages import make_shards

PATH, _ = weights_file("package:demo-teacher")


def recipe() -> PretrainMaeRecipe:
    loaded = load_recipe(Path("demo-teacher"), "pretrain-mae")
    assert isinstance(loaded, PretrainMaeRecipe)
    return loaded


def test_the_file_was_made_by_the_shipped_recipe(tmp_path: Path) -> None:
    metadata = read_metadata(PATH)
    (tmp_path / "recipe.yaml").write_text(metadata["recipe"])
    assert load_recipe(tmp_path / "recipe.yaml", "pretrain-mae") == recipe()
    assert int(metadata["steps"]) == recipe().optim.steps
    lines = [json.loads(line) for line in (PATH.parent / "demo-teacher.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == int(metadata["steps"]) - 1
    assert lines[-1]["loss"] < 0.5 < 1.5 < lines[0]["loss"]


def test_at_most_four_megabytes_of_fp16() -> None:
    assert PATH.stat().st_size <= 4_000_000
    assert {tensor.dtype for tensor in read_checkpoint(PATH).tensors.values()} == {torch.float16}


@pytest.mark.slow  # draws 1,000 images, 10 s: guards the drawn set, which a version number guards too
def test_its_first_shard_is_drawn_again_to_the_byte(tmp_path: Path) -> None:
    make_shards.run("drawn", tmp_path / "shards", make_shards.Options(count=1000, seed=1))
    source = json.loads(read_metadata(PATH)["source"])
    assert hash_file(tmp_path / "shards" / "shard-000000.tar") == source["shard-000000.tar"]


@pytest.mark.slow  # 12 s; guards a file that does not change
def test_its_features_tell_textures_apart_far_better_than_random_ones() -> None:
    torch.manual_seed(0)
    model = build_vit(recipe().model).eval()
    chance = knn_accuracy(model)
    load_weights(model, "package:demo-teacher")
    assert knn_accuracy(model) > chance + 0.08


@torch.no_grad()
def knn_accuracy(model: torch.nn.Module) -> float:
    """k-NN top-1 of 150 fresh images among 450 others (chance: 0.1)."""
    pixels, labels = _fresh_images(600)
    features = torch.cat([model.forward_features(Normalise()(part))[:, 1:].mean(1) for part in pixels.split(100)])  # type: ignore[operator]
    scores = knn_predict(features[:450], labels[:450], features[450:], 10, k=10, temperature=0.07)
    return top_k_accuracy(scores, labels[450:], 1)


@cache
def _fresh_images(count: int) -> tuple[Tensor, Tensor]:
    law = CentreView(64, 1.143)
    view = law("", 0, drawn.IMAGE_SIZE, drawn.IMAGE_SIZE)
    images, labels = zip(*(drawn.draw(77, index) for index in range(count)), strict=True)
    pixels = [render(torch.from_numpy(image).permute(2, 0, 1), view, 64, "bicubic") for image in images]
    return torch.stack(pixels), torch.tensor(labels)

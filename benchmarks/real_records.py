"""Records for benchmarks of what lies on disk: as large as a ViT-L's, from the relations of photographs."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.taps import Tap
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.targets.kinds import make_kind

Block = tuple[Tapped, Tensor]  # what a teacher gave for some views, and the views' keys

TAP = Tap("qkv", 9)  # the recipe's
HEADS, TOKENS = 16, 197
IMAGES = 128  # whose relations are drawn from again and again: draws do not repeat
BATCH = 16
SCALES = (1.35, 1.35, 0.8)  # of random q, k, v: their gaps then take as many bits as those of photographs


def real_blocks(data: Path, images: int) -> list[Block]:
    """What imagenet-sample's teacher gives for one view of each image, in batches.

    Args:
        data: holds the shards `imagenet-sample` and the teacher's weights.
        images: how many of them.
    """
    overrides = [
        f"source.shards={data / 'imagenet-sample'}",
        f"teacher.weights={data / 'teachers' / 'vit_small_patch14_dinov2.fp16.safetensors'}",
    ]
    recipe = load_recipe(Path("imagenet-sample-cache"), "cache-teacher", overrides)
    assert isinstance(recipe, CacheTeacherRecipe)
    teacher, source = Teacher(recipe.teacher, [TAP]), open_shards(recipe.source)
    views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
    blocks: list[Block] = []
    missing = images
    for number, shard in enumerate(source.shards):
        for items in view_batches(number, shard.num_samples, range(1), BATCH):
            if missing > 0:
                batch = views.batch(items[:missing])
                blocks.append((teacher(batch.pixels), batch.view_keys))
                missing -= len(batch.keys)
    return blocks


def make_records(data: Path, count: int) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The default codec's arrays [count, ...] by name, and where their relations are from: photographs, if at hand."""
    if real := data.is_dir():
        blocks = [tapped for tapped, _ in real_blocks(data, min(count, IMAGES))]
    else:
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor(SCALES).reshape(3, 1, 1, 1, 1)
        shape = (3, BATCH, HEADS, TOKENS, 64)
        blocks = [{TAP: tuple(scale * torch.randn(shape, generator=generator))} for _ in range(4)]
    kind = make_kind(codec_config(relation_heads=HEADS), TAP.place)
    made: list[dict[str, Tensor]] = []
    done = 0
    while done < count:
        tapped = blocks[len(made) % len(blocks)]
        keys = torch.arange(done, done + len(tapped[TAP][0]))
        made.append(kind.encode(tapped, keys))
        done += len(keys)
    arrays = {name: np.concatenate([record[name].numpy() for record in made])[:count] for name in made[0]}
    return arrays, f"ViT-S/14 (DINOv2) on {min(count, IMAGES)} ImageNet photographs" if real else "random q, k, v"

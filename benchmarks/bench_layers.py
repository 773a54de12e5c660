"""Stage one with four layers from one pass of the teacher against one layer, in turn; bytes of a layer of logits.

    python benchmarks/bench_layers.py time IMAGES.tar TEACHER.safetensors [--views 8] [--rounds 3] > table.md
    python benchmarks/bench_layers.py logits IMAGES.tar TEACHER.safetensors --anchors OTHER.tar [OTHER.tar ...]

`time` runs `cache-teacher` without unit audits, and prints wall and CPU time of each arm. `logits` gives the teacher a
classifier whose classes are other images: a row of it is the class token of an image, over a temperature. It writes
all views of the images, and prints the bytes a view, everything included. Keep the tables under benchmarks/results/.
"""

import argparse
import statistics
import textwrap
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import provenance
import torch
from safetensors.torch import load_file, save_file

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.configs.taps import Tap
from tinymim.models.teacher import Teacher
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.cache.info import describe, format_info
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import prepare

NAME = "vit_small_patch14_dinov2"
LOGIT_CODECS = {"draws": {}, "topk": {"name": "topk"}}
TAU = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="several layers from one pass")
    parser.add_argument("what", choices=["time", "logits"])
    parser.add_argument("images", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--anchors", type=Path, nargs="+", help="images whose class tokens are the classes of logits")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=196)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", type=int, nargs="+", default=range(6), help="of `time`, by their places in `arms`")
    options = parser.parse_args()
    print(f"`{provenance.command()}`, commit {provenance.commit()}, {provenance.processor()},")
    print(f"{provenance.cores()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads\n")
    with TemporaryDirectory() as folder:
        (time_layers if options.what == "time" else logit_bytes)(options, Path(folder))


def recipe(options: argparse.Namespace, cache: Path, targets: dict[str, Any], **teacher: Any) -> CacheTeacherRecipe:
    """A recipe for all views of the images, in batches of 16 views."""
    own = {"name": NAME, "img_size": options.size, "weights": str(options.teacher), "block": 12, **teacher}
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": {"shards": options.images.parent, "pattern": options.images.name},
        "views": {"size": options.size},
        "num_views": options.views,
        "teacher": own,
        "targets": targets,
        "cache": cache,
        "audit_views": 0,
        "views_per_decode": min(options.views, 8),
        "batch_size": max(1, 16 // min(options.views, 8)),
        "loader": {"workers": 0},
        "run": {"folder": cache.with_name(f"run-{cache.name}"), "device": "cpu"},
    }
    return CacheTeacherRecipe.model_validate(fields)


# ---------------------------------------------------------------- time


def arms() -> dict[str, dict[str, Any]]:
    """The targets of each arm. An arm of four is compared with the one whose last tap is as deep."""
    four: dict[str, dict[str, Any]] = {}
    for place in ("final", "block"):
        for kind in ("ff", "features", "cls"):
            four.setdefault(place, {})[kind] = {"codec": {"kind": kind, "at": place}}
    return {
        "one, relations of block 12": {"relations": {}},
        "four: relations of block 12, ff, features, cls of the end": {"relations": {}, **four["final"]},
        "one, relations of block 9": {"relations": {"block": 9}},
        "four of block 9": {"relations": {"block": 9}, **{k: {"block": 9, **own} for k, own in four["block"].items()}},
        "four: relations of block 9, ff, features, cls of the end": {"relations": {"block": 9}, **four["final"]},
        "one, features of the end": {"features": four["final"]["features"]},
    }


def time_layers(options: argparse.Namespace, folder: Path) -> None:
    """Print each arm's times and bytes, and `info` of a cache of four layers."""
    chosen = {name: targets for place, (name, targets) in enumerate(arms().items()) if place in options.arms}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for number in range(options.rounds):
        for place, (name, targets) in enumerate(chosen.items()):
            wanted = recipe(options, folder / f"cache-{place}-{number}", targets)
            parts = prepare(wanted)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            fill(wanted, parts)
            found[name].append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
    print(f"{options.views} views of each image, n = {options.rounds} rounds, median (spread)\n")
    print("| layers | wall s | CPU s | bytes a view, views included |\n|---|---|---|---|")
    for place, (name, times) in enumerate(found.items()):
        wall, cpu = zip(*times, strict=True)
        size = sum(layer["bytes_per_view"] for layer in describe(folder / f"cache-{place}-0")["layers"])
        print(f"| {name} | {_spread(wall)} | {_spread(cpu)} | {size:,.0f} |")
    print("\n" + textwrap.indent(format_info(describe(folder / "cache-0-0")), "    "))


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


# ---------------------------------------------------------------- logits


def logit_bytes(options: argparse.Namespace, folder: Path) -> None:
    """Print the bytes a view of a cache of logits, by component."""
    weights = load_file(options.teacher)
    rows = anchors(options)
    classifier = {"head.weight": (rows / TAU).to(torch.float32), "head.bias": torch.zeros(len(rows))}
    metadata = Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()
    save_file(weights | classifier, folder / "teacher.safetensors", metadata)
    targets = {
        name: {"codec": {"kind": "logits", "classes": len(rows), **codec}} for name, codec in LOGIT_CODECS.items()
    }
    wanted = recipe(options, folder / "cache", targets, weights=str(folder / "teacher.safetensors"))
    wanted = wanted.model_copy(update={"audit_views": 16})
    fill(wanted, prepare(wanted))
    report = describe(folder / "cache")
    views, *layers = report["layers"]
    for layer in layers:
        total = (views["bytes"] + layer["bytes"]) / layer["coverage"]["num_records"]
        print(f"{layer['name']}: {total:.2f} bytes a view with the view layer, everything included")
    print("\n" + textwrap.indent(format_info(report), "    "))


def anchors(options: argparse.Namespace) -> torch.Tensor:
    """[L, C]: class tokens of the first view of other images, of unit length after their mean is taken off.

    They are divided by the mean length of a token less the mean, so that a logit is about a cosine over `TAU`.
    """
    config = TeacherConfig(name=NAME, img_size=options.size, weights=str(options.teacher), block=12)
    tap, teacher = Tap("cls"), Teacher(config, [Tap("cls")])
    law, found = ViewConfig(size=options.size, seed=7), []
    for path in options.anchors:
        source = open_shards(SourceConfig(shards=path.parent, pattern=path.name))
        views = ImageViews(source.shards, RandomViews(law), law.seed)
        for shard, held in enumerate(source.shards):
            for start in range(0, held.num_samples, 16):
                items = [(shard, image, 0) for image in range(start, min(start + 16, held.num_samples))]
                found.append(teacher(views.batch(torch.tensor(items).numpy()).pixels)[tap][0])
        if sum(map(len, found)) >= options.classes:
            break
    tokens = torch.cat(found)[: options.classes]
    apart = tokens - tokens.mean(0)
    rows: torch.Tensor = torch.nn.functional.normalize(apart, dim=1) / torch.linalg.vector_norm(apart, dim=1).mean()
    return rows


if __name__ == "__main__":
    main()

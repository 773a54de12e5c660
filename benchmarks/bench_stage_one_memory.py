"""Stage one's peak memory by the number of views: 1,000 images, records of 16.9 KB, one process.

    python benchmarks/bench_stage_one_memory.py [--views 1 16 300] [--images 1000] > table.md

A ViT of one block and width 208 answers at 144 px, and `features` with `int8` stores all of its 81 patch tokens: 16.9
KB a record before compression, as a sketch of a ViT-L. Each row is a `tinymim cache-teacher` of its own, into its own
cache, of batches of 64 images with up to 8 views each. The base is the same command for 8 images and one view. Memory
is the process's largest resident set, which counts the pages of files that it has mapped. Exit code 1 where a run takes
more than 1 GiB above the base. Keep the table under benchmarks/results/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import provenance
import timm
import torch
from safetensors.torch import save_file

from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.stages import make_shards

SIZES: dict[str, Any] = {"img_size": 144, "patch_size": 16, "embed_dim": 208, "depth": 1, "num_heads": 4}
MOST_BYTES = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description="stage one's peak memory by the number of views")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 16, 300], metavar="V")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    print(f"# Stage one's memory, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"- torch {torch.__version__}\n")
    print("| images | views | views in a unit | records, MB | peak, MiB | above the base, MiB | time, s |")
    print("|---|---|---|---|---|---|---|")
    most = 0
    with TemporaryDirectory() as folder:
        root = Path(folder)
        weights = root / "weights.safetensors"
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES)
        save_file(model.state_dict(), weights, Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata())
        base, _ = peak(root, "base", 8, 1)
        for views in args.views:
            size_bytes, took_s = peak(root, f"v{views}", args.images, views)
            most = max(most, size_bytes - base)
            record = 81 * (SIZES["embed_dim"] + 1)
            print(
                f"| {args.images:,} | {views} | {min(views, 50)} | {args.images * views * record / 1e6:,.0f} "
                f"| {size_bytes / 2**20:,.0f} | {(size_bytes - base) / 2**20:,.0f} | {took_s:.0f} |",
                flush=True,
            )
        print(f"\nThe base, 8 images with one view each: {base / 2**20:,.0f} MiB.")
    return int(most > MOST_BYTES)


def peak(root: Path, name: str, images: int, views: int) -> tuple[int, float]:
    """Bytes of the largest resident set of a `cache-teacher`, and its seconds."""
    shards = root / f"shards-{images}"
    if not shards.exists():
        make_shards.run("drawn", shards, make_shards.Options(images, count=images, seed=1))
    recipe = root / f"{name}.yaml"
    content = {
        "stage": "cache-teacher",
        "source": {"shards": str(shards)},
        "views": {"size": SIZES["img_size"]},
        "num_views": views,
        "teacher": {"name": "vit_tiny_patch16_224", "weights": str(root / "weights.safetensors"), "block": 1, **SIZES},
        "codec": {"kind": "features", "name": "int8"},
        "cache": str(root / name),
        "loader": {"workers": 0},
        "run": {"folder": str(root / f"run-{name}"), "device": "cpu"},
    }
    recipe.write_text(json.dumps(content))
    began = time.perf_counter()
    command = [sys.executable, "-c", "from tinymim.cli import main; main()", "cache-teacher", str(recipe)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(errors.decode())
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return usage.ru_maxrss * unit, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())

"""What it costs to open, list, describe and claim in a cache of many shards.

The cache is synthetic: real commit records, and unit files that have the right size and no content.

    python benchmarks/bench_open.py --shards 10000 --images 1000 --views 10
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinymim.storage.blocks import VIEW_ARRAYS, Block, UnitParts
from tinymim.storage.commit import UnitInfo, encode_commit, holds_keys
from tinymim.storage.layout import LAYERS, METADATA, VIEWS, UnitId, commit_file, layer_group, plain_group, root_group
from tinymim.storage.manifest import Layer, Manifest, SourceShard

TEACHER = {
    "name": "vit_large_patch16_224",
    "arch": {},
    "weights_sha256": "ab" * 32,
    "weights_origin": "hub",
    "license": "apache-2.0",
    "precision": "bf16",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "shapes": {"heads": 16, "head_dim": 64, "tokens": 197, "prefix_tokens": 1, "grid": (14, 14)},
}
TARGET = {
    "taps": ["qkv@18"],
    "name": "sketch",
    "version": 2,
    "parameters": {"rows": 26, "tail_k": 8},
    "arrays": {"qk_tail_gap": {"dtype": "uint8", "shape": [16, 26, 8]}},
}
LAW = {"size": 224, "scale": (0.2, 1.0), "ratio": (0.75, 1.25), "interpolation": "bicubic", "flip": 0.5, "seed": 0}
FIDELITY = {"views": 16, "qk": {"kl": [0.01] * 16}, "vv": {"kl": [0.01] * 16}, "cosine": 0.99}


def make(place: Path, shards: int, images: int, views: int, targets: int) -> Manifest:
    """Write the cache; returns its manifest."""
    environment = {"tinymim": "0.2.0", "canary": "6bd3bd716049e8ec", "torch": "2.14.1"}
    source = tuple(
        SourceShard(f"train-{i:06d}.tar", 10**8 + i, images, hashlib.sha256(b"%d" % i).hexdigest())
        for i in range(shards)
    )
    manifest = Manifest(source, LAW, environment)
    layers = [Layer(f"layer-{i}", manifest.spec_id, TEACHER, TARGET, environment) for i in range(targets)]
    for name in (VIEWS, LAYERS, *(f"{LAYERS}/{layer.name}" for layer in layers)):
        (place / name).mkdir(parents=True)
        (place / name / METADATA).write_bytes(plain_group())
    (place / METADATA).write_bytes(root_group(manifest))
    rng = np.random.default_rng(0)
    for layer in (None, *layers):
        name = VIEWS if layer is None else layer.name
        if layer is not None:
            (place / LAYERS / name / METADATA).write_bytes(layer_group(layer))
        raw = sum(
            dtype.itemsize * int(np.prod(shape)) for dtype, shape in (layer.arrays if layer else VIEW_ARRAYS).values()
        )
        for shard in source:
            unit = UnitId(shard.name, 0, views)
            blocks = [Block(raw * images, int(crc)) for crc in rng.integers(0, 2**32, views)]
            keys = Block(20 * images, 7) if holds_keys(name, unit) else None
            digest = hashlib.blake2b(shard.name.encode(), digest_size=16).hexdigest()
            info = UnitInfo(
                layer=name,
                unit=unit,
                spec_id=manifest.spec_id if layer is None else layer.spec_id,
                content_hash=shard.content_hash,
                num_images=images,
                key_digest=digest,
                parts=UnitParts(Block(1200, 1), keys, tuple(blocks), Block(900, 2), digest),
                statistics={"unreadable": []} if layer is None else {"fidelity": FIDELITY},
            )
            path = place / commit_file(name, unit)
            path.parent.mkdir()
            path.write_bytes(encode_commit(info))
            with open(place / info.path, "wb") as file:
                os.truncate(file.fileno(), info.size_bytes)
    return manifest


STEPS = {
    "open": "from tinymim.storage.reader import CacheReader\nREADY()\nCacheReader(place)",
    "open, units of a layer": "from tinymim.storage.reader import CacheReader\nREADY()\n"
    "CacheReader(place).units('layer-0')",
    "list": "from tinymim.stages.cache import list as stage\nREADY()\nstage.format_list(stage.run(place), place)",
    "info": "from tinymim.stages.cache import info as stage\nREADY()\nstage.format_info(stage.describe(place))",
    "claim, first": "from tinymim.storage.writer import CacheWriter\nfrom tinymim.storage.reader import CacheReader\n"
    "from tinymim.storage.layout import UnitId\nr = CacheReader(place)\n"
    "w = CacheWriter.open(place, r.manifest, [r.layers['layer-0']])\nunit = UnitId('train-000007.tar', 10, 1)\n"
    "READY()\nassert w.claim('layer-0', unit)\nDONE()\nw.close()",
}
TIMER = """
import resource, sys, time
from pathlib import Path
place = Path(sys.argv[1])
def READY():
    global began, held, cpu
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
def DONE():
    global took, more, used
    if took is None:
        took, used = time.perf_counter() - began, time.process_time() - cpu
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
took = None
{step}
DONE()
print(took, used, more)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--targets", type=int, default=1, help="target layers besides the view layer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the cache here, or use the one that is here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder) / "cache"
        if not (place / METADATA).exists():
            began = time.perf_counter()
            make(place, given.shards, given.images, given.views, given.targets)
            print(f"made in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        print(
            f"{given.shards:,} shards x {given.images:,} images x {given.views} views, views and {given.targets} "
            f"target layer(s); median of {given.repeats}, each in a process of its own, files in the page cache"
        )
        print("\n| step | seconds | CPU seconds | MiB more |\n|---|---|---|---|")
        for name, step in STEPS.items():
            runs = []
            for _ in range(given.repeats):
                command = [sys.executable, "-c", TIMER.format(step=step), str(place)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                runs.append((float(out[0]), float(out[1]), float(out[2]) / 1024))
            seconds, used, more = (float(np.median(values)) for values in zip(*runs, strict=True))
            print(f"| {name} | {seconds:.2f} | {used:.2f} | {more:.0f} |")
    print(f"\nlargest process so far: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()

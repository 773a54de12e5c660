"""Which decoder and which resize: views per CPU second, and whether the bits agree with Pillow's and with themselves.

    OMP_NUM_THREADS=1 python benchmarks/bench_decoders.py [--shards FOLDER] [--images 150] > page.md

Decoders that are not installed are left out (opencv-python-headless, pyvips-binary); all others take turns in one
process. Exactness is checked in processes of their own, with other numbers of threads and other CPU features. Keep the
page under benchmarks/results/. Needs photographs: any folder of shards.
"""

import argparse
import hashlib
import importlib
import io
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import decode, jpeg_size, pixel_digest, render
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews, View

SIZE = 224
LARGE = 4  # full-size photographs are imitated by enlarging this many times
Decoder = Callable[[bytes, View], Any]
Crop = Callable[[Any, View], torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description="decoders and resizes")
    parser.add_argument("--shards", type=Path, default=Path("../shared/data/imagenet-sample"))
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--digest", action="store_true", help="print one digest of all views, and nothing else")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    if flags.digest:
        print(digest_of_views(flags.shards, flags.images))
        return 0
    torch.set_num_threads(1)
    shards = open_shards(SourceConfig(shards=flags.shards)).shards
    data = [shard.read(sample) for shard in shards for sample in range(shard.num_samples)]
    data = [image for image in data if jpeg_size(image)][: flags.images]
    law = RandomViews(ViewConfig(size=SIZE))
    boxes = [law(str(i), 0, *(jpeg_size(image) or (0, 0))) for i, image in enumerate(data)]
    print(header(flags, len(data)))
    print(decoder_table(data, boxes, flags.repeats))
    print(resize_table([decode(image) for image in data], boxes, flags.repeats))
    print(scaled_table(data[:20], flags.repeats))
    print(exactness(flags))
    return 0


def decoders() -> dict[str, Decoder]:
    """By name: bytes and box to [height, width, 3] (torchvision: [3, height, width]); only what is installed."""
    found: dict[str, Decoder] = {
        "simplejpeg": lambda data, box: simplejpeg.decode_jpeg(data, "RGB"),
        "simplejpeg, down to the box's last row (used)": lambda data, box: decode(data, 1, box.top + box.height),
        "simplejpeg, fast DCT and upsampling": lambda data, box: simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=True
        ),
        "Pillow": lambda data, box: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision decode_jpeg": lambda data, box: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
        ),
    }
    try:
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        found["OpenCV imdecode"] = lambda data, box: cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except ImportError:
        pass
    try:
        vips = importlib.import_module("pyvips").Image
        found["libvips, only the box"] = lambda data, box: (
            vips.new_from_buffer(data, "", access="sequential").crop(box.left, box.top, box.width, box.height).numpy()
        )
    except ImportError:
        pass
    return found


def resizes() -> dict[str, Crop]:
    """By name: uint8 [3, height, width] with packed pixels, and a box, to uint8 [3, SIZE, SIZE]."""

    def by_pillow(image: torch.Tensor, box: View) -> torch.Tensor:
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        return torch.from_numpy(np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=edges))).permute(
            2, 0, 1
        )

    return {
        "torch, packed pixels to planes (used)": lambda image, box: render(image, box, SIZE, "bicubic"),
        "torchvision resized_crop": lambda image, box: F.resized_crop(
            image, *box[:4], [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True
        ),
        "torchvision resized_crop of planes": lambda image, box: F.resized_crop(
            image.contiguous(), *box[:4], [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True
        ),
        "Pillow resize(box=)": by_pillow,
    }


def timed(calls: dict[str, Callable[[int], Any]], count: int, repeats: int) -> dict[str, list[float]]:
    """Calls per CPU second of every contender, in turn, after one round that warms up."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began_s = time.process_time()
            for index in range(count):
                call(index)
            if turn:
                rates[name].append(count / (time.process_time() - began_s))
    return rates


def on_each(call: Callable[[Any, Any], Any], images: list[Any], others: list[Any]) -> Callable[[int], Any]:
    """`call` on the i-th image and its box or scale."""
    return lambda index: call(images[index], others[index])


def decoder_table(data: list[bytes], boxes: list[View], repeats: int) -> str:
    found = decoders()
    rates = timed({name: on_each(call, data, boxes) for name, call in found.items()}, len(data), repeats)
    pillow = [np.array(Image.open(io.BytesIO(image)).convert("RGB")) for image in data]
    lines = ["| decoder | images per CPU second | boxes with Pillow's bits |", "|---|---|---|"]
    for name, call in found.items():
        same = sum(_same(call(data[i], boxes[i]), pillow[i], boxes[i]) for i in range(len(data)))
        lines.append(f"| {name} | {_spread(rates[name])} | {same} of {len(data)} |")
    return "\n".join([*lines, ""])


def _same(image: Any, whole: Any, box: View) -> bool:
    array = np.asarray(image)
    array = np.moveaxis(array, 0, -1) if array.shape[0] == 3 else array
    wanted = whole[box.top : box.top + box.height, box.left : box.left + box.width]
    if array.shape != wanted.shape:
        array = array[box.top : box.top + box.height, box.left : box.left + box.width]
    return bool(np.array_equal(array, wanted))


def resize_table(images: list[torch.Tensor], boxes: list[View], repeats: int) -> str:
    found = resizes()
    rates = timed({name: on_each(call, images, boxes) for name, call in found.items()}, len(images), repeats)
    first = next(iter(found.values()))
    unflipped = [View(*box[:4], False) for box in boxes]
    lines = [f"| crop and resize to {SIZE} px | views per CPU second | the bits of the first |", "|---|---|---|"]
    for name, call in found.items():
        pairs = zip(images, unflipped, strict=True)
        same = sum(torch.equal(call(image, box), first(image, box)) for image, box in pairs)
        lines.append(f"| {name} | {_spread(rates[name])} | {same} of {len(images)} |")
    return "\n".join([*lines, ""])


def scaled_table(data: list[bytes], repeats: int) -> str:
    """Decoding photographs of several megapixels at a smaller scale."""
    large = []
    for image in data:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        buffer = io.BytesIO()
        picture.resize((picture.width * LARGE, picture.height * LARGE), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        large.append(buffer.getvalue())
    megapixels = np.median([np.prod(jpeg_size(image) or (0, 0)) / 1e6 for image in large])
    calls = {f"1/{k}": on_each(decode, large, [k] * len(large)) for k in (1, 2, 4, 8)}
    rates = timed(calls, len(large), repeats)
    lines = [f"| decoded at, {megapixels:.1f} megapixels (median) | images per CPU second |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_spread(values)} |" for name, values in rates.items()), ""])


def digest_of_views(folder: Path, count: int) -> str:
    """One digest over the digests of two views of up to `count` images of a shard, by the whole pipeline."""
    shards = open_shards(SourceConfig(shards=folder)).shards[:1]
    source = ImageViews(shards, RandomViews(ViewConfig(size=SIZE)))
    total = hashlib.blake2b(digest_size=8)
    for items in view_batches(0, min(count, shards[0].num_samples), [0, 1], 50):
        for pixels in source.batch(items).pixels:
            total.update(pixel_digest(pixels).to_bytes(8, "big", signed=True))
    return total.hexdigest()


def exactness(flags: argparse.Namespace) -> str:
    """The digest of all views in processes with other threads and CPU features."""
    lines = ["| process | digest of all views |", "|---|---|"]
    for change in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "4"}, {"ATEN_CPU_CAPABILITY": "default"}):
        command = [sys.executable, __file__, "--shards", str(flags.shards), "--images", str(flags.images), "--digest"]
        done = subprocess.run(command, env={**os.environ, **change}, capture_output=True, text=True, check=True)
        lines.append(f"| {' '.join(f'{name}={value}' for name, value in change.items())} | {done.stdout.strip()} |")
    return "\n".join(lines)


def header(flags: argparse.Namespace, count: int) -> str:
    return f"""\
# Decoders and resizes, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}
- {count} JPEGs of {flags.shards.name}, boxes of scale 0.2 to 1 at {SIZE} px; {flags.repeats} rounds in turn: median, \
smallest and largest
"""


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    sys.exit(main())

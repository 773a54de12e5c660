"""The teacher's forward in four ways, in turn: as it is, compiled, channels-last patch embedding, and both.

    python benchmarks/bench_teacher.py [--device cpu] [--name vit_small_patch16_224] [--views 8] > table.md
    python benchmarks/bench_teacher.py --device cuda --name vit_large_patch16_224 --views 512 --precision bf16

Random weights, which cost what trained ones do. Keep the table under benchmarks/results/.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.taps import Tap
from tinymim.models.teacher import Teacher
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

WAYS = {"eager": (False, False), "compile": (True, False), "channels-last": (False, True), "both": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="the teacher's forward")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--name", default="vit_small_patch16_224")
    parser.add_argument("--block", type=int, default=9)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    pixels = torch.randint(0, 256, (options.views, 3, 224, 224), dtype=torch.uint8, device=device)
    teachers, tap = {}, Tap("qkv", options.block)
    with TemporaryDirectory() as folder:
        weights = Path(folder, "weights.safetensors")
        save_file(
            timm.create_model(options.name, num_classes=0).state_dict(),
            weights,
            Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata(),
        )
        for way, (compiled, channels_last) in WAYS.items():
            config = TeacherConfig(
                name=options.name,
                weights=str(weights),
                block=options.block,
                precision=options.precision,
                compile=compiled,
            )
            teachers[way] = Teacher(config, [tap]).to(device)
            if channels_last:
                teachers[way].to(memory_format=torch.channels_last)
    times_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats + 1):
        for way, teacher in teachers.items():
            began_s = time.perf_counter()
            images = pixels.contiguous(memory_format=torch.channels_last) if WAYS[way][1] else pixels
            queries = teacher(images)[tap][0]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one compiles
                times_ms[way].append(1000 * (time.perf_counter() - began_s) / options.views)
            if not repeat:
                print(f"{way}: {float(queries.float().abs().mean()):.6f}", file=sys.stderr)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.name} to block {options.block}, {options.precision}, {options.views} views, {name},")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, n = {options.repeats}\n")
    print("| way | ms a view, median | spread |\n|---|---|---|")
    for way, found_ms in times_ms.items():
        print(f"| {way} | {statistics.median(found_ms):.2f} | {min(found_ms):.2f}-{max(found_ms):.2f} |")


if __name__ == "__main__":
    main()

"""FastMIM's claim: what masked pre-training costs an image at 128 px against 224 px, for ViT and Swin.

    python benchmarks/bench_pretrain.py > page.md       # a minute or two

A step is forward and backward pass of a batch through the model of `tinymim pretrain`: painted squares, HOG. Each case
runs in a process of its own, so that its peak of memory is its own. Rounds alternate between the cases.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import date

import torch
from provenance import commit, cores, processor

from tinymim.configs.sections.decoders import LightDecoderConfig, PredictedConfig
from tinymim.configs.sections.masks import PretrainMaskConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.mim import MaskedModel
from tinymim.models.student import build_student
from tinymim.pipeline.masks import mask_orders

SIZES = (128, 224)
MODELS = {
    "ViT-S/16": {"name": "vit_small_patch16_224"},
    "Swin-T, windows of 4 and 7": {"name": "swin_tiny_patch4_window7_224"},
}
BLOCK = 32


def one(model: str, size: int, batch: int, steps: int) -> dict[str, float]:
    """Seconds and CPU seconds an image, and the peak of memory of this process above its start, in MiB."""
    torch.manual_seed(0)
    own = {"args": {"window_size": 4 if size == 128 else 7}} if "swin" in MODELS[model]["name"] else {}
    encoder = build_student(ModelConfig.model_validate({**MODELS[model], "img_size": size, **own}))
    masked = MaskedModel(encoder, size, PretrainMaskConfig(block=BLOCK), PredictedConfig(), LightDecoderConfig())
    side = size // BLOCK
    orders = mask_orders(0, [(str(n), 0) for n in range(batch)], side, side)
    images = torch.randn(batch, 3, size, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    masked(images, orders)[0].backward()  # allocates gradients
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        masked(images, orders)[0].backward()
    count = steps * batch
    return {
        "wall_s": (time.perf_counter() - began) / count,
        "cpu_s": (time.process_time() - began_cpu) / count,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SIZE"), help="measure one case in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(options.one[0], int(options.one[1]), options.batch, options.steps)))
        return
    cases = [(model, size) for model in MODELS for size in SIZES]
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for model, size in cases:
            sizes = ["--batch", str(options.batch), "--steps", str(options.steps)]
            command = [sys.executable, __file__, *sizes, "--one", model, str(size)]
            found[model, size].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"# Masked pre-training at 128 and 224 px, {date.today()}\n")
    print(f"- `python benchmarks/bench_pretrain.py` at {commit()}; {processor()}, {cores()} cores, one thread, fp32")
    print(f"- batches of {options.batch}, {options.steps} steps, {options.rounds} rounds: median (least to most)\n")
    print("| model | pixels | CPU ms an image | against 224 px | MiB above the model, this batch | against 224 px |")
    print("|---|---|---|---|---|---|")
    for model, size in cases:
        cpu = [1000 * each["cpu_s"] for each in found[model, size]]
        mib = [each["mib"] for each in found[model, size]]
        whole_cpu = statistics.median(1000 * each["cpu_s"] for each in found[model, 224])
        whole_mib = statistics.median(each["mib"] for each in found[model, 224])
        print(
            f"| {model} | {size} | {statistics.median(cpu):.0f} ({min(cpu):.0f} to {max(cpu):.0f}) | "
            f"{statistics.median(cpu) / whole_cpu:.2f} | {statistics.median(mib):.0f} | "
            f"{statistics.median(mib) / whole_mib:.2f} |"
        )


if __name__ == "__main__":
    main()

"""The evaluator `throughput`: images per second of a forward pass, parameters, and multiply-adds per image."""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinymim.configs.sections.evaluation import ThroughputEvaluator
from tinymim.models.vit import count_parameters
from tinymim.stages.evaluation.whole import Measured, Whole
from tinymim.stages.run.device import autocast
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import logger


@torch.no_grad()
def run(whole: Whole, config: ThroughputEvaluator) -> Measured:
    """{"throughput_images_per_s", "params_m" and "gmacs" in millions and 10^9 per image, and what was measured}.

    The time of a pass excludes decoding and the copy to the device. Raises Interrupted where a signal asks to stop.
    """
    size, device = whole.recipe.model.img_size, whole.device
    macs = multiply_adds(whole.model, torch.zeros(1, 3, size, size, device=device))
    generator = torch.Generator(device).manual_seed(whole.recipe.run.seed)
    images = torch.randn(config.batch_size, 3, size, size, device=device, generator=generator)
    seconds = []
    for number in range(config.warmup_passes + config.passes):
        if whole.stop.requested:
            raise Interrupted("no evaluation written; the same command starts it from scratch")
        _wait(device)
        start = time.perf_counter()
        with autocast(device, config.precision):
            whole.model(images)
        _wait(device)
        if number >= config.warmup_passes:
            seconds.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    found: Measured = {
        "throughput_images_per_s": config.batch_size / statistics.median(seconds),
        "params_m": count_parameters(whole.model) / 1e6,
        "gmacs": macs / 1e9,
        "throughput_batch_size": config.batch_size,
        "throughput_precision": config.precision,
        "throughput_device": name,
    }
    logger.info(
        f"evaluate: {found['throughput_images_per_s']:,.0f} images/s in {config.precision}, batch {config.batch_size}, "
        f"on {name} (median of {config.passes} passes); {found['params_m']:,.2f} M parameters, "
        f"{found['gmacs']:,.2f} GMACs"
    )
    return found


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a forward pass in convolutions and matrix products, attention included."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter lacks some fused kernels of attention
        model(images)
    return counter.get_total_flops() // 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

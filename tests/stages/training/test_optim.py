"""Schedule, parameter groups and the small tools that both training stages share."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tinymim.configs.errors import RecipeError, UserError
from tinymim.configs.sections.decoders import MaeConfig
from tinymim.configs.sections.loader import OrderConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.optim import OptimConfig
from tinymim.models.mim import masked_autoencoder
from tinymim.models.vit import build_vit
from tinymim.pipeline.order import SampleOrder
from tinymim.stages.run.device import pick_device
from tinymim.stages.training.optim import (
    Schedule,
    make_optimiser,
    make_scaler,
    make_schedule,
    optimiser_step,
    parts_of,
    require_batch,
    seeded,
)


def optim(**fields: Any) -> OptimConfig:
    return OptimConfig.model_validate({"steps": 10} | fields)


# ---------------------------------------------------------------- schedule


def test_tinymims_schedule_at_full_size() -> None:
    """ImageNet, batch 4096, 300 epochs: lr 1.5e-4 x 16 = 2.4e-3, 15 epochs linear, then a cosine to 0."""
    per_epoch = 1_281_167 // 4096
    schedule = make_schedule(OptimConfig(batch_size=4096, epochs=300), per_epoch)
    assert schedule == Schedule(1.5e-4 * 16, 0.0, 15 * per_epoch, 300 * per_epoch)
    for epoch in (0, 1, 7.5, 15, 16, 100, 157.5, 299, 300):
        expected = 2.4e-3 * (epoch / 15 if epoch < 15 else 0.5 * (1 + math.cos(math.pi * (epoch - 15) / 285)))
        assert schedule.lr(round(epoch * per_epoch)) == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert schedule.lr(157 * per_epoch + per_epoch // 2) == pytest.approx(1.2e-3, rel=1e-2)


def test_the_schedule_ends_at_min_lr_and_never_exceeds_its_peak() -> None:
    schedule = make_schedule(optim(batch_size=512, steps=100, base_lr=1e-3, min_lr=1e-5, warmup=0.1), 7)
    rates = [schedule.lr(step) for step in range(101)]
    assert rates[0] == 0.0 and rates[10] == max(rates) == pytest.approx(2e-3) and rates[100] == pytest.approx(1e-5)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_run_without_or_of_nothing_but_warm_up(warmup: float) -> None:
    schedule = make_schedule(optim(batch_size=256, base_lr=1.0, warmup=warmup), 5)
    assert schedule.lr(0) == (1.0 if warmup == 0 else 0.0)
    assert schedule.lr(9) == pytest.approx(0.9 if warmup else 0.5 * (1 + math.cos(0.9 * math.pi)))


@pytest.mark.parametrize("batch_size", [32, 256, 4096])
def test_the_rate_scales_linearly_with_the_batch(batch_size: int) -> None:
    assert make_schedule(optim(batch_size=batch_size), 1).peak_lr == pytest.approx(1.5e-4 * batch_size / 256)


def test_less_than_one_batch_is_refused() -> None:
    for images, lanes, batch, words in (
        (3068, 4, 4096, "--set optim.batch_size=512"),
        (6, 4, 8, "--set optim.batch_size=4"),
        (3, 4, 8, "add images, or lower order.lanes"),
    ):
        order = SampleOrder([images], OrderConfig(lanes=lanes), batch, None)
        with pytest.raises(UserError, match=f"less than one batch(.|\n)*got: {images:,} images.*{batch:,}") as caught:
            require_batch(order, 1)
        assert words in str(caught.value.hint)
    require_batch(SampleOrder([8], OrderConfig(), 8, None), 1)


# ---------------------------------------------------------------- optimiser


def test_no_weight_decay_on_biases_norms_and_tokens() -> None:
    sizes = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
    model = masked_autoencoder(build_vit(ModelConfig.model_validate(sizes | {"num_heads": 2})), 32, MaeConfig())
    optimiser = make_optimiser(model, optim(weight_decay=0.3, betas=(0.9, 0.95)))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)
    for name, parameter in model.named_parameters():
        if name == "encoder.pos_embed":  # fixed
            assert id(parameter) not in decay
            continue
        plain = name.endswith(".bias") or "norm" in name or name in ("encoder.cls_token", "mask_token")
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name
    assert len(decay) == sum(p.requires_grad for p in model.parameters())


def test_a_step_uses_its_rate_and_clips_the_norm() -> None:
    def moved(clip_norm: float | None) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimiser = torch.optim.SGD(model.parameters(), lr=99.0)
        scaler = make_scaler(torch.device("cpu"), "fp32")
        (100.0 * model.weight).sum().backward()
        optimiser_step(model, optimiser, scaler, 0.5, clip_norm)
        assert model.weight.grad is None
        return -float(model.weight.detach())

    assert moved(None) == pytest.approx(50.0)
    assert moved(2.0) == pytest.approx(1.0)


# ---------------------------------------------------------------- randomness, checks


def test_a_step_has_its_own_generator() -> None:
    cpu = torch.device("cpu")
    draws = {step: torch.rand(4, generator=seeded(cpu, 0, step)).tolist() for step in range(3)}
    assert draws[1] == torch.rand(4, generator=seeded(cpu, 0, 1)).tolist()
    assert draws[0] != draws[1] != draws[2]
    assert draws[1] != torch.rand(4, generator=seeded(cpu, 1, 0)).tolist()


@pytest.mark.parametrize("present", [12, 11, 9, 5, 1])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_parts_weigh_every_sample_alike_and_hold_each_once(accumulate: int, present: int) -> None:
    parts = parts_of(12, accumulate, present)
    assert [row for part in parts for row in range(12)[part.rows]] == list(range(present))
    assert all(part.share == pytest.approx(len(range(12)[part.rows]) / 12) and part.share > 0 for part in parts)
    assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) == accumulate or present < 12


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"run\.device"):
        pick_device("cuda:1")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RecipeError, match=r"got: cuda:2\n  expected: cuda:0 to cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_a_mask_that_hides_all_or_nothing_is_refused(ratio: float) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = build_vit(ModelConfig.model_validate(sizes))
    with pytest.raises(RecipeError, match=r"mae\.mask_ratio"):
        masked_autoencoder(encoder, 32, MaeConfig(mask_ratio=ratio))

"""Stochastic depth with handed draws: timm's numbers, whatever part of the batch is computed where."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.models.drop_path import HandedDropPath, replace_drop_path, set_drop_masks
from tinymim.models.student import StudentModel
from tinymim.models.vit import build_vit

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 0}


def vit(taken_over: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.6, **SIZES).train()
    if taken_over:
        replace_drop_path(model)
    return model


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module, places: Tensor, seed: int = 5) -> Tensor:
    paths = [module for module in model.modules() if isinstance(module, HandedDropPath)]
    assert len(paths) == 4  # two in each block but the first, whose rate is 0
    set_drop_masks(paths, torch.Generator().manual_seed(seed), places, 12, CPU)
    out: Tensor = model(images()[places])
    return out


def test_the_draws_are_timms_on_a_cpu() -> None:
    theirs = vit(taken_over=False)
    torch.manual_seed(5)
    wanted = theirs(images())
    assert torch.equal(forward(vit(taken_over=True), torch.arange(12)), wanted)
    assert not torch.equal(wanted, theirs.eval()(images()))


def test_a_sample_drops_the_same_paths_in_any_part_of_its_batch() -> None:
    model = vit(taken_over=True)
    whole = forward(model, torch.arange(12))
    for places in (torch.arange(0, 12, 2), torch.tensor([7, 3]), torch.tensor([11])):
        torch.testing.assert_close(forward(model, places), whole[places], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(forward(model, torch.arange(12), seed=6), whole)


def test_the_mean_over_draws_is_what_goes_in() -> None:
    path = HandedDropPath(0.3).train()
    set_drop_masks([path], torch.Generator().manual_seed(0), torch.arange(20_000), 20_000, CPU)
    out = path(torch.ones(20_000, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02) and torch.equal(out[:, 0], out[:, 1])


def test_nothing_is_dropped_outside_training_and_nothing_saved() -> None:
    model = vit(taken_over=True).eval()
    assert torch.equal(model(images()), vit(taken_over=False).eval()(images()))
    assert model.state_dict().keys() == vit(taken_over=False).state_dict().keys()


def test_a_student_draws_for_all_its_paths() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_classes"}
    student = StudentModel(build_vit(ModelConfig.model_validate(sizes), drop_path=0.5), nn.Identity()).train()
    with pytest.raises(AssertionError, match="no draws"):
        student(images())
    student.draw(torch.Generator().manual_seed(0), torch.arange(12), 12)
    student(images())

"""Masked pre-training: the loss is MAE's formula, and a run is reproduced, resumed and guarded to the bit."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from tinymim.configs.errors import CheckpointError, RecipeError, SourceError, UserError
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.configs.sections.decoders import MaeConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.mim import MaskedModel, masked_autoencoder
from tinymim.models.vit import build_vit
from tinymim.pipeline.masks import mask_orders
from tinymim.stages import pretrain
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.run.interrupt import Interrupted

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
# 5 steps on the CPU; other kernels may round otherwise, hence the tolerance where they are compared.
GOLDEN_LOSSES = [1.087808, 1.083456, 1.071072, 1.062597, 1.056974]


def recipe(shards: Path, folder: Path, **changes: Any) -> PretrainMaeRecipe:
    fields: dict[str, Any] = {
        "stage": "pretrain-mae",
        "source": {"shards": shards},
        "views": {"size": 32, "scaled_decode": False},  # as when the golden numbers were made
        "model": {"name": "vit_tiny_patch16_224", **SIZES},
        "mae": DECODER,
        "optim": {"batch_size": 16, "steps": 5, "base_lr": 0.05, "warmup": 0.2},
        "loader": {"workers": 0},
        "run": {"folder": folder, "device": "cpu", "threads": 1, "log_every": 1},
    }
    return PretrainMaeRecipe.model_validate(fields | changes)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors to the bit; their metadata names different folders."""
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- the model


def small_mae(**config: Any) -> MaskedModel:
    torch.manual_seed(0)
    encoder = build_vit(ModelConfig.model_validate({"name": "vit_tiny_patch16_224", **SIZES}))
    return masked_autoencoder(encoder, 32, MaeConfig.model_validate(DECODER | config))


def reference_target(image: np.ndarray[Any, Any], row: int, column: int, normalised: bool) -> np.ndarray[Any, Any]:
    """One patch of 8 x 8, pixel by pixel, channels last (He et al. 2022: unbiased variance, eps 1e-6)."""
    patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    flat = np.array([patch[c, y, x] for y in range(8) for x in range(8) for c in range(3)])
    if not normalised:
        return flat
    variance = ((flat - flat.mean()) ** 2).sum() / (len(flat) - 1)
    return np.asarray((flat - flat.mean()) / np.sqrt(variance + 1e-6))


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_maes_formula_on_masked_patches_alone(normalised: bool) -> None:
    model = small_mae(norm_pixels=normalised).double()
    images, noise = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16)
    caught: list[torch.Tensor] = []
    model.decoder_pred.register_forward_hook(lambda _m, _args, out: caught.append(out))
    loss = float(model(images, noise)[0].detach())
    errors = []
    for b, image in enumerate(images.numpy()):
        hidden = sorted(range(16), key=noise[b].tolist().__getitem__)[4:]
        for patch in hidden:
            predicted = caught[0][b, 1 + patch].detach().numpy()
            errors.append(((predicted - reference_target(image, patch // 4, patch % 4, normalised)) ** 2).mean())
    assert len(errors) == 3 * 12  # 75 % of 16 patches
    assert loss == pytest.approx(np.mean(errors), rel=1e-12)


def test_units_are_whole_and_must_fit_the_grid() -> None:
    assert small_mae(mask_unit=2, mask_ratio=0.6).num_visible == 8  # of 4 units round(1.6) stay
    with pytest.raises(RecipeError, match=r"mae\.mask_unit does not divide the patch grid"):
        small_mae(mask_unit=3)
    with pytest.raises(RecipeError, match=r"mae\.mask_ratio leaves no patch"):
        small_mae(mask_unit=4)


def test_the_encoder_sees_a_quarter_of_the_patches_and_nothing_of_the_others() -> None:
    model = small_mae().double()
    lengths: list[int] = []
    encoder: Any = model.encoder
    encoder.blocks[0].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    images, noise = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.arange(16.0)[None]
    caught: list[torch.Tensor] = []
    model.decoder_pred.register_forward_hook(lambda _m, _args, out: caught.append(out))
    model(images, noise)  # patches 0..3, the first row, stay visible
    images[:, :, 8:] += 1.0
    model(images, noise)
    assert lengths == [1 + 4, 1 + 4]
    assert torch.equal(caught[0], caught[1])
    images[:, :, :8] += 1.0
    model(images, noise)
    assert not torch.equal(caught[1], caught[2])


def test_the_prediction_of_a_patch_is_compared_with_that_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is restored: a decoder that knew only its position embedding could still paint a picture."""
    model = small_mae(norm_pixels=False)
    picture = torch.linspace(-1, 1, 16)[:, None].expand(16, 192)  # every patch its own grey
    images = picture[:, 0].reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(1, 3, 32, 32)
    monkeypatch.setattr(model, "_predicted", lambda _tokens, _ranks: picture[None])
    assert float(model(images, torch.rand(1, 16))[0].detach()) == 0.0


def test_the_gradient_reaches_every_parameter_that_is_exported() -> None:
    model = small_mae()
    model(torch.randn(2, 3, 32, 32), torch.rand(2, 16))[0].backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
    assert [name for name, p in model.encoder.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_a_model_that_cannot_leave_patches_out_is_refused(drawn_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ConvNeXt cannot leave patches out") as caught:
        pretrain.run(recipe(drawn_shards, tmp_path, model={"name": "convnextv2_atto"}, views={"size": 224}))
    assert "mask.hide: paint" in str(caught.value.hint)


# ---------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def whole(drawn_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain.run(recipe(drawn_shards, folder))
    return folder


def test_golden_losses_of_five_steps(whole: Path) -> None:
    np.testing.assert_allclose(losses(whole), GOLDEN_LOSSES, rtol=1e-4)


def test_the_encoder_loads_into_timm_strictly(whole: Path) -> None:
    tensors = load_file(whole / "encoder.safetensors")
    timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES).load_state_dict(tensors, strict=True)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def signal_in_mask(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process get a signal, once, while the masks of a step are drawn, counted from 0."""
    steps = itertools.count()

    def interrupt(*arguments: Any) -> torch.Tensor:
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return mask_orders(*arguments)

    monkeypatch.setattr(pretrain, "mask_orders", interrupt)


def test_a_run_stopped_at_any_step_resumes_bit_for_bit(
    drawn_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop_at in (1, 3, 4):  # an epoch has 3 steps
        folder = tmp_path / f"run-{stop_at}"
        same = recipe(drawn_shards, folder)
        signal_in_mask(stop_at - 1, signal.SIGTERM, monkeypatch)
        with pytest.raises(Interrupted, match=f"step {stop_at} ") as caught:
            pretrain.run(same)
        assert caught.value.requeue
        assert not (folder / "encoder.safetensors").exists()
        pretrain.run(same)
        assert losses(folder) == losses(whole)
        assert same_tensors(folder / "encoder.safetensors", whole / "encoder.safetensors")


def test_a_state_of_another_recipe_is_refused(drawn_shards: Path, tmp_path: Path) -> None:
    short = {"batch_size": 16, "steps": 1}
    pretrain.run(recipe(drawn_shards, tmp_path, optim=short))
    with pytest.raises(CheckpointError, match=r"another recipe(.|\n)*optim.steps = 1 \(stored(.|\n)*= 2 \(w") as caught:
        pretrain.run(recipe(drawn_shards, tmp_path, optim=short | {"steps": 2}))
    assert "resume=false" in str(caught.value.hint)
    anew = recipe(drawn_shards, tmp_path, optim=short | {"steps": 2}, checkpoint={"resume": False})
    pretrain.run(anew)
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_state_is_refused(drawn_shards: Path, tmp_path: Path, cut: bool) -> None:
    one = recipe(drawn_shards, tmp_path, optim={"batch_size": 16, "steps": 1})
    pretrain.run(one)
    (state,) = tmp_path.glob("state-*.pt")
    raw = bytearray(state.read_bytes())
    raw[len(raw) // 2] ^= 1
    state.write_bytes(raw[: len(raw) // 3] if cut else raw)
    with pytest.raises(CheckpointError, match="damaged"):
        pretrain.run(one)


def test_less_images_than_a_batch_are_refused_before_anything_is_written(drawn_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="less than one batch"):
        pretrain.run(recipe(drawn_shards, folder, optim={"batch_size": 61, "steps": 1}))
    with pytest.raises(SourceError):
        pretrain.run(recipe(tmp_path / "nothing", folder))
    assert not folder.exists()


def test_views_of_another_size_than_the_model_are_refused(drawn_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="size"):
        pretrain.run(recipe(drawn_shards, tmp_path, views={"size": 40}))

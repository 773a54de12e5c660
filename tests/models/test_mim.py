"""Masked image modelling: what is hidden is not seen, and errors count there alone, for every way to hide."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.decoders import LightDecoderConfig, MaeConfig, PredictedConfig
from tinymim.configs.sections.masks import PretrainMaskConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models import backbone, hiding
from tinymim.models.decoder import features
from tinymim.models.hog import HOG_MEAN
from tinymim.models.mim import MaskedModel, masked_autoencoder
from tinymim.models.student import build_student
from tinymim.models.vit import patchify
from tinymim.pipeline.masks import mask_orders

SIZE = 64
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 16}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {"window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
CONV: dict[str, Any] = {"name": "convnextv2_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}
HIERA: dict[str, Any] = {
    "name": "hiera_tiny_224",
    "args": {"stages": [1, 1, 1, 1], "abs_win_pos_embed": True, "global_pos_size": [4, 4]},
    "embed_dim": 8,
    "num_heads": 1,
}
HIDES = get_args(PretrainMaskConfig.model_fields["hide"].annotation)


def model_of(sizes: dict[str, Any], hide: str, block: int, target: str = "hog", **more: Any) -> MaskedModel:
    torch.manual_seed(0)
    encoder = build_student(ModelConfig.model_validate({"img_size": SIZE} | sizes))
    mask = PretrainMaskConfig.model_validate({"hide": hide, "block": block} | more)
    predicted = PredictedConfig.model_validate({"name": target})
    decoder = LightDecoderConfig(dim=16, heads=2, position=hide == "drop")
    model = MaskedModel(encoder, SIZE, mask, predicted, decoder)
    torch.nn.init.xavier_uniform_(model.decoder_pred.weight)  # zeros would depend on no image
    return model


def orders(model: MaskedModel, count: int = 2) -> Tensor:
    return mask_orders(0, [(f"key {n}", 0) for n in range(count)], model.rows, model.rows, model.unit)


CASES = [
    (VIT, "paint", 16),
    (VIT, "paint", 32),
    (VIT, "paint", 8),
    (VIT, "token", 32),
    (VIT, "drop", 16),
    (VIT, "drop", 32),
    (SWIN, "paint", 32),
    (SWIN, "paint", 16),
    (SWIN, "token", 32),
    (SWIN, "token", 16),
    (CONV, "paint", 32),
    (HIERA, "drop", 32),
    (HIERA, "paint", 32),
]


@pytest.mark.parametrize("target", ["hog", "pixels"])
@pytest.mark.parametrize(("sizes", "hide", "block"), CASES)
def test_the_loss_is_the_error_of_hidden_squares(
    sizes: dict[str, Any], hide: str, block: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loop over squares of the law of masks, with the prediction as a picture of numbers for each cell."""
    model = model_of(sizes, hide, block, target)
    images, cell, across = torch.randn(2, 3, SIZE, SIZE), model.cell, SIZE // block
    squares = mask_orders(0, [("key 0", 0), ("key 1", 0)], across, across)
    wanted = features(images, model.target, cell)
    predicted = torch.randn_like(wanted)
    monkeypatch.setattr(model, "_predicted", lambda _tokens, _ranks: predicted)
    errors, held, side = [], [], SIZE // cell
    for b in range(2):
        for square in (squares[b] >= round(0.25 * across**2)).nonzero().flatten().tolist():
            top, left = square // across * block, square % across * block
            cells = [
                y // cell * side + x // cell
                for y in range(top, top + block, cell)
                for x in range(left, left + block, cell)
            ]
            errors += [((predicted[b, n] - wanted[b, n]).double() ** 2).mean() for n in cells]
            held += [wanted[b, n].double() for n in cells]
    assert len(errors) == 2 * round(0.75 * side**2)
    loss, r2 = model(images, orders(model))
    torch.testing.assert_close(loss.double(), torch.stack(errors).mean(), rtol=1e-6, atol=0)
    constant = ((torch.stack(held) - torch.stack(held).mean(0)) ** 2).mean()
    torch.testing.assert_close(r2.double(), 1 - torch.stack(errors).mean() / constant, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sizes", "hide", "block"), CASES)
def test_hidden_pixels_are_not_seen_and_all_parameters_learn(sizes: dict[str, Any], hide: str, block: int) -> None:
    model = model_of(sizes, hide, block).eval()
    images, order = torch.randn(2, 3, SIZE, SIZE), orders(model)
    hidden = (order >= model.num_visible).unflatten(1, (model.rows, model.rows))
    at = hidden.repeat_interleave(model.cell, 1).repeat_interleave(model.cell, 2)[:, None]
    seen = model._encoded(images, order.argsort(1))
    assert torch.equal(seen, model._encoded(torch.where(at, 7.0, images), order.argsort(1)))
    assert not torch.equal(seen, model._encoded(torch.where(at, images, 7.0), order.argsort(1)))
    model(images, order)[0].backward()
    still = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # What pools for a classifier has no part in a loss on the map.
    assert still <= {f"encoder.{name}{end}" for name in ("head.norm.", "norm_head.") for end in ("weight", "bias")}


def test_predictions_of_a_large_cell_are_in_the_order_of_the_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Swin cell of 32 pixels holds 2 x 2 squares of 16; each part of its prediction is compared with its own."""
    model = model_of(SWIN, "paint", 16, "pixels")
    numbers = torch.arange(16.0)  # of squares in raster order
    as_squares = numbers.view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(1, 4, 4)  # cell, its four squares
    width = model.decoder_pred.out_features // 4
    monkeypatch.setattr(model.decoder_pred, "forward", lambda _x: as_squares.repeat_interleave(width, 2))
    found = model._predicted(torch.zeros(1, 4, backbone.final_width(model.encoder)), torch.arange(16)[None])
    assert torch.equal(found[0, :, 0], numbers) and found.shape == (1, 16, width)


def test_histograms_of_a_cell_are_channels_then_rows_then_columns() -> None:
    images = torch.randn(1, 3, SIZE, SIZE)
    large = features(images, PredictedConfig(), 16)  # 2 x 2 cells each
    small = features(images, PredictedConfig(), 8).view(8, 8, 27)
    expected = torch.stack([small[2, 4], small[2, 5], small[3, 4], small[3, 5]], 1)  # [27, 4] of row 1, column 2
    assert torch.equal(large[0, 1 * 4 + 2], expected.flatten())
    pixels = features(images, PredictedConfig(name="pixels", normalise=False), 16)
    assert torch.equal(pixels, patchify(images, 16))


@pytest.mark.parametrize(
    ("sizes", "hide", "block", "message"),
    [
        (SWIN, "drop", 32, "SwinTransformer cannot leave patches out"),
        (CONV, "token", 32, "embeds no patches"),
        (VIT, "drop", 8, "only whole patches can be dropped"),
        (VIT, "token", 8, "no embedded patches that fit mask.block"),
        (VIT, "paint", 4, "HOG needs squares"),
        (VIT, "paint", 48, "mask.block does not divide the image"),
        (VIT, "paint", 64, "mask.ratio leaves no square to see"),
    ],
)
def test_what_cannot_be_hidden_is_refused(sizes: dict[str, Any], hide: str, block: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        model_of(sizes, hide, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_finite_at_extremes(dtype: torch.dtype) -> None:
    model = model_of(VIT, "paint", 16)
    for images in (torch.zeros(1, 3, SIZE, SIZE), torch.full((1, 3, SIZE, SIZE), 100.0)):
        with torch.autocast("cpu", dtype=dtype):
            assert bool(model(images, orders(model, 1))[0].isfinite())


@torch.no_grad()
def test_a_hiera_sees_only_visible_mask_units_in_their_order() -> None:
    """Tokens follow `kept`; all units kept in raster order are the whole image."""
    encoder: Any = model_of(HIERA, "drop", 32).encoder.double().eval()
    images = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    with hiding.seeing(encoder, torch.arange(4)[None]):
        torch.testing.assert_close(encoder.forward_features(images), backbone.tokens_at(encoder, images, None))
    found = []
    for kept in ([3, 0, 2], [0, 2, 3]):
        with hiding.seeing(encoder, torch.tensor([kept])):
            found.append(backbone.tokens_at(encoder, images, None))
    assert torch.equal(found[0], found[1][:, [2, 0, 1]])
    assert "forward_features" not in vars(encoder)
    with pytest.raises(RecipeError, match="only whole patches can be dropped"):
        model_of(HIERA, "drop", 16)


@pytest.mark.parametrize("sizes", [VIT, SWIN], ids=["vit", "swin"])
def test_hog_begins_as_a_constant_and_is_learnt_at_once(sizes: dict[str, Any]) -> None:
    """Bins have a mean above zero. A network that had to learn it would do so by moving all its tokens one way."""
    torch.manual_seed(0)
    encoder = build_student(ModelConfig.model_validate({"img_size": SIZE} | sizes))
    model = MaskedModel(
        encoder, SIZE, PretrainMaskConfig(block=16), PredictedConfig(), LightDecoderConfig(dim=16, heads=2)
    )
    images, order = torch.randn(8, 3, SIZE, SIZE), orders(model, 8)
    ranks = order.argsort(dim=1)
    assert bool((model._predicted(model._encoded(images, ranks), ranks) == HOG_MEAN).all())
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        model(images, order)[0].backward()
        optimiser.step()
    assert model(images, order)[1] > 0.2  # from Xavier's weights and a mean of 0: -0.07 and 0.06


def test_a_masked_autoencoder_has_the_fields_of_its_recipe() -> None:
    encoder = build_student(ModelConfig.model_validate({"img_size": SIZE} | HIERA))
    model = masked_autoencoder(encoder, SIZE, MaeConfig(mask_ratio=0.5, decoder_dim=8, decoder_heads=2))
    assert (model.hide, model.num_visible, model.target.name, model.cell) == ("drop", 2, "pixels", 32)
    assert model.position is not None and model.decoder_pred.out_features == 3 * 32**2

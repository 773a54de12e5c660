"""Tables of position biases in windows of other sizes."""

import pytest
import torch

from tinymim.configs.errors import CheckpointError
from tinymim.models.checkpoints import load_tensors
from tinymim.models.tables import offsets, spread_matrix
from tinymim.models.vit import build_model
from tinymim.tests.models.families import FAMILIES, made


def test_offsets_spread_as_published() -> None:
    """FastMIM's default of 4 to 7 pixels of window: q = 1.7913, and ±1, 2.791, 6."""
    found = offsets(7, 6)
    assert found.tolist() == pytest.approx([-6, -2.7913, -1, 0, 1, 2.7913, 6], abs=1e-4)


@pytest.mark.parametrize(("side", "new"), [(7, 27), (5, 63), (3, 13), (13, 7), (27, 13), (5, 3), (13, 13)])
def test_the_last_offset_is_always_reached(side: int, new: int) -> None:
    """The published search stops at q = 2: from 7 to 27 it needs 3."""
    found = offsets(side, new // 2)
    assert float(found[-1]) == new // 2 == -float(found[0]) and bool((found.diff() > 0).all())
    matrix = spread_matrix(side, new)
    assert matrix.shape == (new, side)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new, dtype=torch.float64))
    for row, column in ((0, 0), (-1, -1), (new // 2, side // 2)):
        assert float(matrix[row, column]) == pytest.approx(1)


@pytest.mark.parametrize(("side", "new"), [(5, 9), (7, 13), (13, 7), (13, 27)])
def test_a_cubic_polynomial_is_reproduced(side: int, new: int) -> None:
    def polynomial(x: torch.Tensor) -> torch.Tensor:
        return 0.3 * x**3 - x**2 + 2 * x - 5

    asked = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64)
    found = spread_matrix(side, new) @ polynomial(offsets(side, new // 2))
    torch.testing.assert_close(found, polynomial(asked), rtol=1e-8, atol=1e-8)


def test_the_same_window_changes_nothing() -> None:
    torch.testing.assert_close(spread_matrix(13, 13), torch.eye(13, dtype=torch.float64))


def resized(family: str, **args: object) -> torch.nn.Module:
    config = FAMILIES[family].config()
    return build_model(config.model_copy(update={"args": config.args | args}))


def test_a_swin_file_of_another_window_is_read() -> None:
    source, target = made("swin"), resized("swin", window_size=4)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    tensors = source.state_dict() | {name: torch.randn(9, 1)}
    load_tensors(target, tensors, "here")
    square = tensors[name].reshape(3, 3).double()
    matrix = spread_matrix(3, 7)
    torch.testing.assert_close(target.state_dict()[name].reshape(7, 7), (matrix @ square @ matrix.T).float())


def test_beits_rows_of_the_class_token_stay() -> None:
    source = made("beit")
    target = build_model(FAMILIES["beit"].config().model_copy(update={"img_size": 128}))
    name = "blocks.0.attn.relative_position_bias_table"
    tensors = source.state_dict() | {name: torch.randn(7 * 7 + 3, 3)}
    load_tensors(target, tensors, "here")
    found = target.state_dict()[name]
    assert found.shape == (15 * 15 + 3, 3)
    torch.testing.assert_close(found[-3:], tensors[name][-3:])
    corners = found[: 15 * 15].reshape(15, 15, 3)[[0, 0, -1, -1, 7], [0, -1, 0, -1, 7]]
    torch.testing.assert_close(corners, tensors[name][:49].reshape(7, 7, 3)[[0, 0, -1, -1, 3], [0, -1, 0, -1, 3]])


def test_tiny_vits_tables_are_pictures_of_absolute_offsets() -> None:
    source, target = made("tiny_vit"), resized("tiny_vit", window_sizes=(2, 4, 8, 4))
    name = "stages.1.blocks.0.attn.attention_biases"
    tensors = source.state_dict() | {name: torch.randn(1, 4)}
    load_tensors(target, tensors, "here")
    picture = torch.nn.functional.interpolate(tensors[name].reshape(1, 1, 2, 2), size=(4, 4), mode="bicubic")
    torch.testing.assert_close(target.state_dict()[name].reshape(4, 4), picture[0, 0])


@pytest.mark.parametrize("shape", [(10, 1), (9, 2), (16, 1)])
def test_a_table_of_another_form_is_refused(shape: tuple[int, int]) -> None:
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(CheckpointError, match=r"other shape or type: layers\.0"):
        load_tensors(resized("swin", window_size=4), made("swin").state_dict() | {name: torch.zeros(shape)}, "here")

"""Heads of a teacher with a coarser grid get the mean of whole squares of a student's patches."""

import pytest
import torch
from torch import nn

from tinymim.configs.sections import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, pool_side, pooled_shapes, shapes_of
from tinymim.models.vit import build_vit


def test_each_square_of_patches_becomes_its_mean_and_prefix_tokens_stay() -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = build_vit(ModelConfig.model_validate(sizes)).eval()
    head = nn.Identity()
    fine, coarse = (
        StudentModel(vit, head)(images := torch.randn(3, 3, 32, 32)),
        StudentModel(vit, head, pools=[2])(images),
    )
    assert fine.shape == (3, 65, 8) and coarse.shape == (3, 17, 8)
    torch.testing.assert_close(coarse[:, 0], fine[:, 0], rtol=0, atol=0)
    picture = fine[:, 1:].double().reshape(3, 8, 8, 8)
    for row in range(4):
        for column in range(4):
            mean = picture[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            torch.testing.assert_close(coarse[:, 1 + 4 * row + column].double(), mean, rtol=1e-5, atol=1e-6)
    assert pooled_shapes(shapes_of(vit), 2) == Shapes(2, 4, 17, 1, (4, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "side"),
    [
        ((8, 8), (4, 4), 2),
        ((4, 4), (4, 4), 1),
        ((12, 6), (4, 2), 3),
        ((8, 8), (3, 3), 1),
        ((8, 4), (4, 4), 1),
        ((4, 4), (8, 8), 1),
    ],
)
def test_only_whole_multiples_of_both_sides_are_pooled(
    student: tuple[int, int], teacher: tuple[int, int], side: int
) -> None:
    shapes = [Shapes(2, 4, 1 + rows * columns, 1, (rows, columns)) for rows, columns in (student, teacher)]
    assert pool_side(*shapes) == side

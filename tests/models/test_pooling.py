"""A student's grid becomes its teacher's: squares of patches by their mean, and a patch to a square of patches."""

import pytest
import torch
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models.student import Fit, StudentModel, build_student, fit_of, fitted_shapes, shapes_of


def test_each_square_of_patches_becomes_its_mean_and_prefix_tokens_stay() -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = build_student(ModelConfig.model_validate(sizes)).eval()
    head = nn.Identity()
    fine, coarse = (
        StudentModel(vit, head)(images := torch.randn(3, 3, 32, 32)),
        StudentModel(vit, head, fits=[Fit(pool=2)])(images),
    )
    assert fine.shape == (3, 65, 8) and coarse.shape == (3, 17, 8)
    torch.testing.assert_close(coarse[:, 0], fine[:, 0], rtol=0, atol=0)
    picture = fine[:, 1:].double().reshape(3, 8, 8, 8)
    for row in range(4):
        for column in range(4):
            mean = picture[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            torch.testing.assert_close(coarse[:, 1 + 4 * row + column].double(), mean, rtol=1e-5, atol=1e-6)
    assert fitted_shapes(shapes_of(vit), Fit(pool=2)) == Shapes(2, 4, 17, 1, (4, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "fit"),
    [
        ((8, 8), (4, 4), Fit(pool=2)),
        ((4, 4), (4, 4), Fit()),
        ((12, 6), (4, 2), Fit(pool=3)),
        ((8, 8), (3, 3), Fit()),
        ((9, 9), (4, 4), Fit()),
        ((8, 4), (4, 4), Fit()),
        ((4, 4), (8, 8), Fit(grow=2)),
        ((2, 3), (6, 9), Fit(grow=3)),
        ((4, 4), (6, 6), Fit()),
    ],
)
def test_only_whole_multiples_of_both_sides_fit(student: tuple[int, int], teacher: tuple[int, int], fit: Fit) -> None:
    own, its = (Shapes(2, 4, 1 + rows * columns, 1, (rows, columns)) for rows, columns in (student, teacher))
    assert fit_of(own, its, [Tap("tokens", 3)]) == fit
    assert fit_of(own, its, [Tap("logits")]) == Fit(pool=fit.pool)  # of the whole view: nothing to grow


def test_a_coarse_patch_becomes_a_square_of_patches_in_its_place() -> None:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = build_student(ModelConfig.model_validate(sizes)).eval()
    model = StudentModel(vit, nn.Identity(), fits=[Fit(grow=2)])
    layer = model.grown["0"]
    assert isinstance(layer, nn.Linear)
    images = torch.randn(3, 3, 32, 32)
    coarse, fine = model.tokens(images), model(images)
    assert fine.shape == (3, 17, 8) and torch.equal(fine[:, 0], coarse[:, 0])
    picture = fine[:, 1:].reshape(3, 4, 4, 8)
    for row in range(4):
        for column in range(4):
            patch, part = coarse[:, 1 + 2 * (row // 2) + column // 2], 2 * (row % 2) + column % 2
            weight, bias = (each.unflatten(0, (4, 8))[part] for each in (layer.weight, layer.bias))
            torch.testing.assert_close(picture[:, row, column], patch @ weight.T + bias)

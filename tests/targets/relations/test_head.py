"""The head of students that learn relations: a qkv projection on the final norm."""

import pytest
import torch

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.vit import build_vit
from tinymim.targets.kinds import make_kind
from tinymim.targets.relations.head import RelationHead
from tinymim.tests.targets.relations.plain import shapes

STUDENT = ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


def student() -> StudentModel:
    vit = build_vit(STUDENT)
    return StudentModel(vit, make_kind(codec_config(), 1).head(shapes_of(vit), shapes(4, 17)))


def test_every_exported_parameter_of_the_student_is_trained() -> None:
    made = student()
    sum(x.square().sum() * (i + 1) for i, x in enumerate(made(torch.randn(2, 3, 32, 32)))).backward()
    idle = [n for n, p in made.vit.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert idle == ["pos_embed"]  # the fixed sine-cosine table


def test_the_head_is_a_qkv_layer_on_the_final_norm_in_the_students_own_heads() -> None:
    made = student().eval()
    assert isinstance(made.head, RelationHead)
    images = torch.randn(2, 3, 32, 32)
    q, _, v = made(images)
    flat = made.head.projection(made.tokens(images))
    assert q.shape == (2, 3, 17, 8)
    torch.testing.assert_close(q[:, 1], flat[..., 8:16])
    torch.testing.assert_close(v[:, 2], flat[..., 48 + 16 :])


def test_a_width_that_the_relation_heads_do_not_divide_is_refused() -> None:
    own = Shapes(3, 8, 17, 1, (4, 4))
    with pytest.raises(RecipeError, match="width 24 cannot be split into 16 relation heads") as caught:
        make_kind(codec_config(), 1).head(own, shapes(16, 17))
    assert caught.value.hint == "the nearest are 16 and 32"

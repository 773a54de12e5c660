"""TinyMIM's own numbers, built from its formulas in float64, beside ours (docs/parity.md says where we differ).

Formulas after Ren et al., "TinyMIM", CVPR 2023, and He et al., "Masked autoencoders", CVPR 2022.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from tinymim.configs.codecs.relations import Relation, SketchCodec
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.sections.optim import OptimConfig
from tinymim.configs.taps import Tap
from tinymim.models.drop_path import HandedDropPath
from tinymim.models.student import StudentModel
from tinymim.models.teacher import Teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_vit
from tinymim.models.weights import load_weights
from tinymim.stages.training.optim import make_optimiser, make_schedule
from tinymim.targets.relations.head import RelationHead
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows
from tinymim.tests import official
from tinymim.tests.targets.relations.plain import relation_loss

Array = npt.NDArray[np.float64]
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24}
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
RELATIONS: tuple[Relation, ...] = ("qk", "vv")
STUDENTS = {  # and the recipe of the teacher's cache, and the teacher's block
    "b": ("imagenet-mae-l-cache", 18),
    "s": ("imagenet-tinymim-b-cache", 12),
    "t": ("imagenet-tinymim-s-cache", 12),
}


def normalised(pixels: Tensor) -> Tensor:
    """ImageNet's mean and deviation, float64."""
    mean = torch.tensor((0.485, 0.456, 0.406), dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), dtype=torch.float64).view(3, 1, 1)
    return (pixels.double() / 255 - mean) / std


def qkv(heads: int, width: int, seed: int, scale: float = 1.0) -> QKV:
    """Float64 projections of two views of seven tokens."""
    generator = torch.Generator().manual_seed(seed)
    return QKV(*scale * torch.randn(3, 2, heads, 7, width, generator=generator, dtype=torch.float64))


def dense(probs: Tensor) -> DenseRows:
    """All rows of a relation as a target."""
    return DenseRows(None, probs, torch.special.entr(probs).sum(-1).mean((1, 2)))


# ---------------------------------------------------------------- relations


def test_a_teachers_relations_are_those_of_the_formula(tmp_path: Path) -> None:
    """Tapped at block 3 of 4: softmax(Q Kᵀ / √d) and softmax(V Vᵀ / √d) of norm1 and qkv of that block."""
    tensors = official.layout(24, 4)
    weights = official.write_training(tmp_path / "checkpoint-299.pth", tensors)
    config = TeacherConfig.model_validate(
        SIZES | {"depth": 4, "num_heads": 4, "block": 3, "weights": str(weights)} | IMAGENET
    )
    tap = Tap("qkv", 3)
    found_qkv = QKV(*Teacher(config, [tap])(PIXELS)[tap])
    _, blocks = official.encode(tensors, normalised(PIXELS), [4] * 4)
    wanted_q, wanted_k, wanted_v = blocks[2]
    for relation, a, b in zip(RELATIONS, (wanted_q, wanted_v), (wanted_k, wanted_v), strict=True):
        found = relation_probs(found_qkv, relation)
        np.testing.assert_allclose(found.numpy(), official.relation(a, b).numpy(), rtol=2e-4, atol=1e-7)


def test_twelve_heads_in_the_last_block_alone_are_a_re_split(tmp_path: Path) -> None:
    """Its student T has 6 heads, and 12 in block 12, whose q, k and v are all that is ever used of it."""
    tensors = official.layout(24, 3)
    weights = official.write_training(tmp_path / "checkpoint-299.pth", tensors)
    config = TeacherConfig.model_validate(
        SIZES | {"depth": 3, "num_heads": 6, "block": 3, "weights": str(weights)} | IMAGENET
    )
    tap = Tap("qkv", 3)
    found_qkv = QKV(*Teacher(config, [tap])(PIXELS)[tap])
    _, blocks = official.encode(tensors, normalised(PIXELS), [6, 6, 12])
    found = relation_probs(found_qkv.resplit(12), "qk")
    np.testing.assert_allclose(found.numpy(), official.relation(*blocks[2][:2]).numpy(), rtol=2e-4, atol=1e-7)


# ---------------------------------------------------------------- loss


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    wanted: Array = powers / powers.sum(-1, keepdims=True)
    return wanted


def its_loss(a: Array, b: Array, teacher: Array) -> tuple[float, Array, Array]:
    """Mean over views, heads and rows of Σ p ln(p / s), s = softmax(a bᵀ / √d); its gradients by a and by b."""
    root = math.sqrt(a.shape[-1])
    student = softmax(np.einsum("bhqd,bhtd->bhqt", a, b) / root)
    rows = student[..., 0].size
    loss = float((teacher * np.log(teacher / student)).sum() / rows)
    by_logits = (student - teacher) / rows
    return loss, np.einsum("bhqt,bhtd->bhqd", by_logits, b) / root, np.einsum("bhqt,bhqd->bhtd", by_logits, a) / root


def test_the_loss_and_its_gradients_are_those_of_the_formula() -> None:
    """QK and VV, weighted 1:1; a student of 3 heads of 8 under a teacher of 4 heads of 16."""
    teacher, student = qkv(4, 16, seed=1), qkv(3, 8, seed=2)
    sides = {name: getattr(student, name).requires_grad_() for name in "qkv"}
    target: Rows = {relation: dense(relation_probs(teacher, relation)) for relation in RELATIONS}
    losses = relation_loss(student.resplit(4), target)
    total = torch.stack(list(losses.values())).sum()
    found = dict(zip("qkv", torch.autograd.grad(total, list(sides.values())), strict=True))

    def split(x: Tensor) -> Array:
        """Channels in the teacher's heads: 24 = 4 x 6."""
        flat = x.detach().numpy().transpose(0, 2, 1, 3).reshape(2, 7, 24)
        array: Array = flat.reshape(2, 7, 4, 6).transpose(0, 2, 1, 3)
        return array

    q, k, v = (split(side) for side in sides.values())
    at, tt, kt = (x.numpy() for x in (teacher.q, teacher.v, teacher.k))
    qk, by_q, by_k = its_loss(q, k, softmax(np.einsum("bhqd,bhtd->bhqt", at, kt) / 4))
    vv, by_rows, by_columns = its_loss(v, v, softmax(np.einsum("bhqd,bhtd->bhqt", tt, tt) / 4))
    assert [losses[relation].item() for relation in RELATIONS] == pytest.approx([qk, vv], rel=1e-12)
    for name, wanted in (("q", by_q), ("k", by_k), ("v", by_rows + by_columns)):
        np.testing.assert_allclose(split(found[name]), wanted, rtol=1e-10, atol=1e-14)


def test_where_its_loss_breaks_ours_does_not() -> None:
    """It takes the logarithm of a softmax, which is 0 where a logit is 104 below the largest: the loss is infinite."""
    teacher, student = qkv(2, 8, seed=1), qkv(2, 8, seed=2, scale=30.0)
    student = QKV(student.q.float(), student.k.float(), student.v.float())
    probs = relation_probs(teacher, "qk").float()
    theirs = torch.nn.functional.kl_div(relation_probs(student, "qk").log(), probs, reduction="none").sum(-1).mean()
    ours = relation_loss(student, {"qk": dense(probs)})["qk"]
    logits = np.einsum("bhqd,bhtd->bhqt", student.q.double().numpy(), student.k.double().numpy()) / math.sqrt(8)
    shifted = logits - logits.max(-1, keepdims=True)
    log_student = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows = probs.double().numpy()
    exact = float((rows * (np.log(rows) - log_student)).sum(-1).mean())
    assert not theirs.isfinite() and ours.item() == pytest.approx(exact, rel=1e-5)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("size", STUDENTS)
def test_the_shipped_recipes_say_what_it_trains_with(size: str) -> None:
    cache_name, block = STUDENTS[size]
    student = load_recipe(Path(f"imagenet-tinymim-{size}"), "train-student")
    cache = load_recipe(Path(cache_name), "cache-teacher")
    assert isinstance(student, TrainStudentRecipe) and isinstance(cache, CacheTeacherRecipe)
    optim = student.optim
    assert (optim.batch_size, optim.epochs, optim.base_lr, optim.min_lr) == (4096, 300, 1.5e-4, 0.0)
    assert (optim.warmup * 300, optim.betas, optim.weight_decay, optim.clip_norm) == (15, (0.9, 0.95), 0.05, None)
    assert student.drop_path == 0.1 and student.ema is None and student.targets.relations is None
    assert set(student.jitter.model_dump().values()) == {0.4}
    views = cache.views
    assert (views.size, views.scale, views.interpolation) == (224, (0.2, 1.0), "bicubic")
    assert views.ratio == pytest.approx((3 / 4, 4 / 3)) and cache.teacher.block == block
    assert isinstance(cache.codec, SketchCodec) and cache.codec.relations == RELATIONS


def test_the_rate_at_every_iteration_is_its_rate() -> None:
    """By the epoch as a fraction: linear over 15 epochs, then half a cosine to 0 at the 300th; 1.5e-4 x 4096 / 256."""
    per_epoch = 1_281_167 // 4096
    schedule = make_schedule(OptimConfig(batch_size=4096, epochs=300), per_epoch)
    for iteration in [0, 1, 2, 311, 312, 4679, 4680, 4681, 10_000, 49_140, 93_598, 93_599]:
        epoch = np.float64(iteration) / per_epoch
        peak = np.float64(1.5e-4) * 4096 / 256
        wanted = peak * epoch / 15 if epoch < 15 else peak * 0.5 * (1 + np.cos(np.pi * (epoch - 15) / (300 - 15)))
        assert schedule.lr(iteration) == pytest.approx(float(wanted), rel=1e-12, abs=1e-20), iteration


def test_parameter_groups_are_its_but_for_the_class_token() -> None:
    """It decays all but biases and 1-D parameters. The class token, [1, 1, C], is an offset too: here not decayed."""
    student = StudentModel(
        build_vit(ModelConfig.model_validate(SIZES | {"depth": 2, "num_heads": 2})), RelationHead(24, 2)
    )
    optimiser = make_optimiser(student, OptimConfig(steps=1))
    assert type(optimiser) is torch.optim.AdamW and optimiser.defaults["eps"] == 1e-8
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    theirs = official.shapes(24, 2)
    differs = []
    for name, parameter in student.vit.named_parameters():
        its = None if name == "pos_embed" else 0.0 if len(theirs[name]) == 1 or name.endswith(".bias") else 0.05
        if decay.get(id(parameter)) != its:
            differs.append(name)
    assert differs == ["cls_token"] and decay[id(student.vit.cls_token)] == 0.0


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("dim", [192, 384, 768])
def test_the_position_embedding_is_its_table(dim: int) -> None:
    """[sin, cos] of column x ω, then of row x ω, ω = 10000^(-4i / C); nothing for the class token; never trained."""
    vit = build_vit(ModelConfig.model_validate({"embed_dim": dim, "depth": 1, "num_heads": 3}))
    omega = 10_000.0 ** (-4.0 * np.arange(dim // 4, dtype=np.float64) / dim)
    row, column = np.divmod(np.arange(196, dtype=np.float64), 14.0)
    parts = [wave(place[:, None] * omega) for place in (column, row) for wave in (np.sin, np.cos)]
    wanted = np.concatenate([np.zeros((1, dim)), np.concatenate(parts, axis=1)])
    assert vit.pos_embed is not None and not vit.pos_embed.requires_grad
    np.testing.assert_allclose(vit.pos_embed[0].numpy(), wanted, rtol=0, atol=1e-6)


def test_drop_path_is_where_it_has_it() -> None:
    """At one rate, not a rising one, on both branches of every block but the last."""
    vit = build_vit(ModelConfig(depth=12, embed_dim=24, num_heads=2), drop_path=0.1)
    StudentModel(vit, RelationHead(24, 2))
    paths = [(block.drop_path1, block.drop_path2) for block in vit.blocks]
    for both in paths[:-1]:
        assert [path.keep_prob for path in both if isinstance(path, HandedDropPath)] == [0.9, 0.9]
    assert len(paths) == 12 and all(isinstance(path, nn.Identity) for path in paths[-1])


@pytest.mark.parametrize(("name", "dim"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_its_checkpoints_and_our_students_hold_the_same_tensors(name: str, dim: int) -> None:
    with torch.device("meta"):
        ours = build_vit(ModelConfig(name=f"vit_{name}_patch16_224")).state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == official.shapes(dim, 12, 16, 224)


def test_its_checkpoint_gives_its_features(tmp_path: Path) -> None:
    tensors = official.layout(24, 3)
    weights = official.write_training(tmp_path / "checkpoint-299.pth", tensors)
    vit = build_vit(ModelConfig.model_validate(SIZES | {"depth": 3, "num_heads": 4})).eval()
    assert load_weights(vit, str(weights)).dropped == ()
    wanted, _ = official.encode(tensors, normalised(PIXELS), [4] * 3)
    with torch.no_grad():
        found = vit.double().forward_features(normalised(PIXELS))
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-9, atol=1e-9)

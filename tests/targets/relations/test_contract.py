"""Relations under every codec keep the contract of target kinds."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped, TargetKind
from tinymim.targets.kinds import make_kind
from tinymim.tests.targets.contract import TargetKindContract

BLOCK, HEADS, TOKENS, WIDTH = 2, 4, 17, 24
TAP = Tap("qkv", BLOCK)


def projection(_tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(3 * WIDTH, WIDTH, generator=generator) / 3, torch.randn(3 * WIDTH, generator=generator) / 3


def teacher(views: int, seed: int = 0) -> Tapped:
    """q, k, v that are a linear layer of x, so that `hidden` can rebuild them."""
    x = torch.randn(views, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    weight, bias = projection(TAP)
    sides = torch.nn.functional.linear(x, weight, bias).chunk(3, dim=-1)
    q, k, v = (side.unflatten(-1, (HEADS, -1)).transpose(1, 2) for side in sides)
    return {TAP: (q, k, v, x)}


def made(fields: dict[str, Any], **targets: Any) -> TargetKind:
    wanted = TargetsConfig(**targets | fields.get("targets", {}))
    fields = {name: value for name, value in fields.items() if name != "targets"}
    kind = make_kind(codec_config(**fields), BLOCK, wanted)
    if not kind.calibration_views:
        return kind
    return make_kind(codec_config(**fields), BLOCK, wanted, kind.calibrate([teacher(32, seed=5)], projection))


class TestRelations(TargetKindContract):
    shapes: ClassVar[Shapes] = Shapes(HEADS, WIDTH // HEADS, TOKENS, 1, (4, 4))
    student: ClassVar[Shapes] = Shapes(3, 4, TOKENS, 1, (4, 4))
    largest: ClassVar[float] = 155.0  # of q and k: logits of 6e4
    cases: ClassVar[Mapping[str, Any]] = {
        "sketch": {"rows": 6},
        "sketch, exact head": {"rows": 6, "head_k": 3, "tail_k": 2},
        "sketch, all rows": {"rows": 99, "tail_k": 4, "relations": ("kk", "qq", "vv", "qk")},
        "sketch, two heads": {"rows": 6, "relation_heads": 2},
        "topk, renormalised": {"rows": 6, "head_k": 4, "tail": "renormalise"},
        "topk, uniform": {"rows": 99, "head_k": 4, "tail": "uniform"},
        "topk, ghost": {"rows": 6, "head_k": 4, "tail": "ghost", "relation_heads": 6},
        "dense": {"name": "dense"},
        "hidden": {"name": "hidden", "bits": 4},
        "hidden, pca": {"name": "hidden", "basis": "pca", "bits": 2},
        "dense, l1 of some rows": {"name": "dense", "targets": {"loss": "l1", "rows": 5}},
        "hidden, mse before the softmax": {"name": "hidden", "bits": 4, "targets": {"before_softmax": True}},
        "hidden, cosine": {"name": "hidden", "bits": 4, "targets": {"loss": "cosine", "relation_heads": 6, "rows": 5}},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "sketch": "50c6fc76bc1cf9fe",
        "sketch, exact head": "40ad895c4d0486bd",
        "sketch, all rows": "9913d1383056bf60",
        "sketch, two heads": "9608d4b38f8735ba",
        "topk, renormalised": "86b7e9d7625bf794",
        "topk, uniform": "badac1acc6f5ada3",
        "topk, ghost": "2f46d6863ee444b7",
        "dense": "9318b7f2e05e7885",
        "dense, l1 of some rows": "9318b7f2e05e7885",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "head_k": (lambda: made({"head_k": TOKENS}).specs(TestRelations.shapes), r"codec\.head_k is too large"),
        "relations": (lambda: made({}, relations=("qq",)), "does not hold the relation qq"),
        "rows": (lambda: made({}, rows=3), r"targets\.rows is not what"),
        "loss of a sketch": (lambda: made({}, loss="mse"), r"targets\.loss mse is not a loss of sampled relations"),
        "loss of vectors": (lambda: made({"name": "dense"}, loss="smooth_l1"), "smooth_l1 is not a loss of relations"),
        "logits of a sketch": (lambda: made({}, before_softmax=True), "hold relations before their softmax"),
        "logits of dense rows": (
            lambda: made({"name": "dense"}, before_softmax=True, loss="l1"),
            "hold relations before their softmax",
        ),
        "kl of logits": (
            lambda: made({"name": "hidden"}, before_softmax=True, loss="kl"),
            "compares relations after their softmax",
        ),
        "relation_heads": (lambda: made({}, relation_heads=2), r"targets\.relation_heads is not what"),
        "student's width": (
            lambda: made({}).head(Shapes(3, 3, TOKENS, 1, (4, 4)), TestRelations.shapes),
            "width 9 cannot be split into 4 relation heads",
        ),
        "teacher's width": (
            lambda: made({"name": "hidden"}, relation_heads=5).parts(TestRelations.shapes),
            "width 24 cannot be split into 5 relation heads",
        ),
        "teacher's width, stored": (
            lambda: made({"relation_heads": 5}).specs(TestRelations.shapes),
            r"width 24 cannot be split into 5 relation heads\n  got: codec\.relation_heads 5",
        ),
    }

    def make(self, case: Any) -> TargetKind:
        return made(case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)

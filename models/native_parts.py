"""Warn where the attention of a teacher with parts of its own meets a student without them.

Attention transfer is reported to hurt students of 4 of 11 families of ViTs, DINOv2 and CLIP among them, unless these
have the family's own parts (arXiv 2605.07191). The report is about attention, so other kinds of target do not warn.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Tap
from tinymim.models import backbone
from tinymim.models.vit import build_model

_FAMILIES: Final = ("dinov2", "dinov3", "clip")
_OF_ATTENTION: Final = ("qkv", "attention")


def missing_parts(student: nn.Module, teacher: Mapping[str, Any], taps: tuple[Tap, ...]) -> str:
    """The warning for a student of a layer; empty where there is none.

    Args:
        student: the student's ViT.
        teacher: the teacher's section of the layer.
        taps: the taps that the layer reads.
    """
    name = str(teacher["name"])
    if not any(tap.kind in _OF_ATTENTION for tap in taps) or not any(family in name.lower() for family in _FAMILIES):
        return ""
    if name.lower().startswith(("hf-hub:", "hf_hub:")):  # would be fetched
        return ""
    sizes = {field: teacher["arch"][field] for field in ModelConfig.model_fields.keys() & teacher["arch"].keys()}
    args = {field: value for field, value in teacher["arch"].items() if field not in sizes}
    with torch.device("meta"):
        native = backbone.native_parts(build_model(ModelConfig(name=name, **{"args": args, **sizes})))
    lacking = sorted(native - backbone.native_parts(student))
    if not lacking:
        return ""
    return (
        f"the student lacks the {', '.join(lacking)} of its teacher {name}, whose attention may then teach it badly "
        f"(docs/targets.md); student.name: {name.partition('.')[0]} with the student's sizes has them"
    )

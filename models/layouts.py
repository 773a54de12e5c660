"""Layouts of weights other than timm's: recognised by their names, and rewritten in timm's.

Each layout is a published one; `docs/parity.md` lists them. Names that belong to no encoder are left out and reported.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from tinymim.models import backbone

Tensors = dict[str, Tensor]
TIMM = "timm's names"
# Wrappers around a model: of DataParallel, torch.compile, training loops, DINO, SimMIM, MAE-Lite, OpenCLIP.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "target_encoder.", "visual.trunk.")
# Tables of indices that are rebuilt with the model.
_INDICES = (
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "attention_bias_idxs",
    "rope_embed.periods",
    "bias_mask",
)


class Rewritten(NamedTuple):
    """Tensors by timm's names, the layout in words, and the names that are no part of an encoder."""

    tensors: Tensors
    layout: str
    dropped: tuple[str, ...]


def rewritten(model: nn.Module, tensors: Tensors) -> Rewritten:
    """Tensors of any known layout by timm's names."""
    tensors = {_without(name, ("module.", "_orig_mod.")): tensor for name, tensor in tensors.items()}
    dropped: set[str] = set()
    found, layout = tensors, TIMM
    patches = next((name for name in tensors if name.endswith("embeddings.patch_embeddings.projection.weight")), None)
    if patches is not None:
        prefix = patches.removesuffix("embeddings.patch_embeddings.projection.weight")
        inside = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        inside |= {name: tensors[name] for name in tensors if name.startswith("classifier.")}
        dropped |= {name for name in tensors if not name.startswith((prefix, "classifier."))}
        found, layout = _from_transformers(inside), "transformers' ViT"
    else:
        found, outside = _unwrapped(model, tensors)
        dropped |= outside
    for name, is_it, convert in _LAYOUTS:
        if is_it(found):
            found, layout = convert(model, found), name if layout == TIMM else f"{layout}, {name}"
    if isinstance(model, Beit) and any(name.endswith(".qkv.bias") for name in found):
        found = _with_biases_apart(found)
        layout = f"{layout}, biases of q and v (those of k do not change attention)"
    indices = {name for name in found if name.endswith(_INDICES)}
    dropped |= indices
    return Rewritten({n: each for n, each in found.items() if n not in indices}, layout, tuple(sorted(dropped)))


def _with_biases_apart(tensors: Tensors) -> Tensors:
    """A ViT's biases of q and v as BEiT has them; k's add the same to all scores of a query, which softmax drops."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".qkv.bias"):
            q, _, v = tensor.chunk(3)
            found |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            found[name] = tensor
    return found


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    while (shorter := next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)) != name:
        name = shorter
    return name


def _unwrapped(model: nn.Module, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """Tensors without the wrappers' prefixes, and the names outside the encoder that is wrapped."""
    wanted, outside = model.state_dict().keys(), set[str]()
    while True:
        prefix = next((p for p in _WRAPPERS if any(name.startswith(p) for name in tensors)), None)
        if prefix is None or any(name.startswith(prefix) for name in wanted):
            return tensors, outside
        outside |= {name for name in tensors if not name.startswith(prefix) and name not in wanted}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name not in outside}


# ---------------------------------------------------------------- transformers

_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _from_transformers(tensors: Tensors) -> Tensors:
    """ViTModel, ViTMAE, DeiT and DINOv2 of transformers: other names, and q, k and v apart."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        found[name] = tensor
    for name in [name for name in found if ".attn.query." in name]:
        sides = [name.replace(".query.", f".{side}.") for side in ("query", "key", "value")]
        if all(side in found for side in sides):
            found[name.replace(".query.", ".qkv.")] = torch.cat([found.pop(side) for side in sides])
    return found


# ---------------------------------------------------------------- repositories


def _from_dinov2(_model: nn.Module, tensors: Tensors) -> Tensors:
    """Blocks in chunks, SwiGLU's names; with registers the class token's position is part of it."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        found[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = tensor
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def _from_dinov3(model: nn.Module, tensors: Tensors) -> Tensors:
    """Other names of registers and layer scales; biases of q and v apart, and none of k, whose mask is not a weight."""
    wanted, found = model.state_dict().keys(), Tensors()
    for name, tensor in tensors.items():
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name.replace("storage_tokens", "reg_token"))
        if not name.endswith(".qkv.bias"):
            found[name] = tensor
            continue
        q, _, v = tensor.chunk(3)
        apart = {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        if apart.keys() <= wanted:
            found |= apart
        elif q.any() or v.any():  # models of timm without biases are for files whose biases are zero
            found[name] = tensor
    return found


def _from_beit(model: nn.Module, tensors: Tensors) -> Tensors:
    """One table of relative positions for all blocks becomes one for each."""
    shared = tensors["rel_pos_bias.relative_position_bias_table"]
    own = {
        f"blocks.{number}.attn.relative_position_bias_table": shared for number in range(len(backbone.widths(model)))
    }
    return {name: each for name, each in tensors.items() if not name.startswith("rel_pos_bias.")} | own


def _from_swin(_model: nn.Module, tensors: Tensors) -> Tensors:
    """Microsoft's stages end with the downsampling with which timm's next stage begins."""

    def next_stage(found: re.Match[str]) -> str:
        return f"layers.{int(found[1]) + 1}.downsample."

    named = {re.sub(r"^layers\.(\d+)\.downsample\.", next_stage, name): each for name, each in tensors.items()}
    return {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name): each for name, each in named.items()}


def _from_tiny_vit(model: nn.Module, tensors: Tensors) -> Tensors:
    """As Swin's, and other names of layers."""
    found = {re.sub(r"^layers\.", "stages.", name): each for name, each in _from_swin(model, tensors).items()}
    named: Tensors = {}
    for name, each in found.items():
        name = name.replace("patch_embed.seq.0.", "patch_embed.conv1.").replace(
            "patch_embed.seq.2.", "patch_embed.conv2."
        )
        name = re.sub(r"\.c\.weight$", ".conv.weight", name)
        named[re.sub(r"^norm_head\.", "head.norm.", name)] = each
    return named


_LAYOUTS: tuple[tuple[str, Callable[[Tensors], bool], Callable[[nn.Module, Tensors], Tensors]], ...] = (
    ("DINOv3's repository", lambda found: "storage_tokens" in found, _from_dinov3),
    (
        "DINOv2's repository",
        lambda found: (
            "register_tokens" in found
            or any(re.match(r"blocks\.\d+\.(\d+\.norm1|mlp\.w12)\.", name) for name in found)
            or ("mask_token" in found and "blocks.0.ls1.gamma" in found)
        ),
        _from_dinov2,
    ),
    ("BEiT's pre-training", lambda found: "rel_pos_bias.relative_position_bias_table" in found, _from_beit),
    ("TinyViT's repository", lambda found: "patch_embed.seq.0.c.weight" in found, _from_tiny_vit),
    (
        "Swin's repository",
        lambda found: "layers.0.downsample.reduction.weight" in found,
        _from_swin,
    ),
)

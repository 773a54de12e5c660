"""The inside of timm models: sizes, parts, tokens. `hiding` and `initialise` change it; no other file reads it.

Widths, strides and tokens are given by *place*, counted from 1 in the order of timm's own `feature_info` and
`forward_intermediates`: a block of a plain ViT, a stage of any other model. A plain ViT is one whose blocks give tokens
of one width, prefix tokens first: timm's ViT, DeiT, BEiT, EVA, DINO, SigLIP, AIMv2. All others give maps, which become
tokens in raster order, without prefix. The functions on blocks, attention and positions are for plain ViTs alone.

Shapes: B image, P prefix token (class token, registers), N patch, T token = P + N, C channel, W row of qkv = 3 x C.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from timm.models import Eva, SwinTransformer, SwinTransformerV2, TinyVit, VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.models.custom import own_shapes

# Prefixes of parameters: the norm over tokens after the last block, and the norm after mean pooling.
FINAL_NORM: Final = "norm."
POOLED_NORM: Final = "fc_norm."
POSITIONS: Final = "pos_embed"  # the name of the position table


PlainViT = VisionTransformer | Eva  # Eva: timm's plain ViT with rotary positions, such as DINOv3

# ---------------------------------------------------------------- sizes


def is_plain(model: nn.Module) -> bool:
    """Whether a model is a plain ViT: every block gives all its tokens, and the first of them may be prefix tokens."""
    found = getattr(model, "forward_intermediates", None)
    gives_prefix = found is not None and "return_prefix_tokens" in inspect.signature(found).parameters
    same = isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList)
    return gives_prefix and same and hasattr(getattr(model, "patch_embed", None), "grid_size")


def widths(model: nn.Module) -> tuple[int, ...]:
    """Channels at every place."""
    return tuple(int(place["num_chs"]) for place in _places(model))


def strides(model: nn.Module) -> tuple[int, ...]:
    """Pixels between neighbouring tokens at every place; for a plain ViT, its patch size."""
    return tuple(int(place["reduction"]) for place in _places(model))


def final_width(model: nn.Module) -> int:
    """Channels of the final tokens, after the model's last norm."""
    if (own := own_shapes(model)) is not None:
        return own.width
    return int(getattr(model, "num_features", 0)) or widths(model)[-1]


def pooled_width(model: nn.Module) -> int:
    """Channels of the embedding that the classifier reads."""
    return int(getattr(model, "head_hidden_size", None) or final_width(model))


def grid(model: nn.Module, img_size: int | None = None, place: int | None = None) -> tuple[int, int]:
    """Rows and columns of tokens.

    Args:
        model: the model.
        img_size: side of the input; a plain ViT has a grid of its own, so it may be left out.
        place: the place, from 1; None for the final tokens.
    """
    timm_model: Any = model
    if is_plain(model):
        rows, columns = timm_model.patch_embed.grid_size
        return int(rows), int(columns)
    assert img_size is not None, "the grid of a model of maps depends on its input"
    side = -(-img_size // strides(model)[-1 if place is None else place - 1])
    return side, side


def cell(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of pixels that an input must be a multiple of; None where any input will do.

    A plain ViT, and a model that starts with patches, leaves the border out otherwise; a pyramid would have a last map
    whose cells are not all as large.
    """
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    own = (int(size[0]), int(size[1])) if isinstance(size, tuple) and len(size) == 2 else None
    if is_plain(model) or not getattr(model, "feature_info", None):
        return own
    last = max(strides(model))
    return last, last


def takes_img_size(model: nn.Module) -> bool:
    """Whether the model is built for one input size, the argument `img_size` of its class."""
    makers = (vars(kind).get("__init__") for kind in type(model).__mro__)
    return any("img_size" in inspect.signature(make).parameters for make in makers if inspect.isfunction(make))


def prefix_tokens(model: nn.Module) -> int:
    """Tokens in front of the patches: class token and registers."""
    if (own := own_shapes(model)) is not None:
        return own.prefix_tokens
    return int(getattr(model, "num_prefix_tokens", 0))


def native_parts(model: nn.Module) -> frozenset[str]:
    """Which parts the model has that the first ViT lacks."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    found = {
        "registers": prefix_tokens(model) > has_class_token(model),
        "LayerScale": not names.isdisjoint({"gamma", "gamma_1"}),  # of timm's plain ViT and of Eva
        "norm before the blocks": isinstance(getattr(model, "norm_pre", None), nn.LayerNorm),  # of CLIP
        "RoPE": getattr(model, "rope", None) is not None,
    }
    return frozenset(part for part, has in found.items() if has)


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token is a class token. Models with registers alone declare it; others have it or no prefix."""
    return bool(getattr(model, "has_class_token", prefix_tokens(model) > 0))


def classes(model: nn.Module) -> int:
    """Classes of the model's classifier; 0 where it has none."""
    return int(getattr(model, "num_classes", 0))


def classifier(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's parameters, as timm names them: "head." of a ViT, "fc." of a ResNet."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def heads(model: nn.Module) -> int | None:
    """Heads of the attention layers; None where there are none, or where they differ."""
    numbers = (getattr(layer, "num_heads", None) for layer in model.modules())
    found = {number for number in numbers if isinstance(number, int)}
    return found.pop() if len(found) == 1 else None


def _places(model: nn.Module) -> list[dict[str, Any]]:
    places: list[dict[str, Any]] | None = getattr(model, "feature_info", None)
    if not places:
        raise RecipeError("timm does not list the model's widths", got=type(model).__name__, expected="a timm model")
    return places


# ---------------------------------------------------------------- parts


def blocks(model: nn.Module) -> nn.Sequential | nn.ModuleList:
    """The blocks of a plain ViT in order. Raises RecipeError for any other model."""
    found = getattr(model, "blocks", None)
    if not is_plain(model) or not isinstance(found, nn.Sequential | nn.ModuleList):
        raise RecipeError(
            "the model has no attention blocks over all its tokens", got=type(model).__name__, expected="a plain ViT"
        )
    return found


def attention(model: nn.Module, block: int) -> nn.Module:
    """The attention layer of a block, counted from 1."""
    layer: nn.Module = blocks(model)[block - 1].attn  # type: ignore[assignment]  # a module's attribute
    return layer


def qkv_projection(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [W, C] and bias [W] (or None) of an attention layer's qkv layer, float32; rows q, k, v, each by head.

    Norms and rotary embeddings that some layers apply to q and k afterwards are not included.

    Raises:
        RecipeError: the attention has no single qkv layer.
    """
    projection = getattr(layer, "qkv", None)
    if not isinstance(projection, nn.Linear):
        raise RecipeError(
            f"the attention layer {type(layer).__name__} has no single qkv layer",
            got=type(projection).__name__,
            expected="Linear",
            hint="use codec.name: sketch, which stores relations as they are",
        )
    bias: Tensor | None = projection.bias
    apart = [getattr(layer, f"{side}_bias", None) for side in "qkv"]  # BEiT and EVA keep biases of their own
    if bias is None and all(isinstance(part, Tensor) for part in apart):
        bias = torch.cat(apart)  # type: ignore[arg-type]
    return projection.weight.detach().float(), None if bias is None else bias.detach().float()


class Positions(NamedTuple):
    """The table [1, prefix + N, C] added to the tokens; with prefix 0, class token and registers have no row."""

    table: nn.Parameter
    prefix: int


def positions(model: nn.Module) -> Positions | None:
    """The position table; None for a model that has only rotary or relative positions."""
    table = getattr(model, POSITIONS, None)
    if table is None:
        return None
    rows, columns = grid(model)
    return Positions(table, table.shape[1] - rows * columns)


# ---------------------------------------------------------------- tokens


def tokens_at(model: nn.Module, images: Tensor, place: int | None) -> Tensor:
    """Tokens [B, T, C] of normalised images [B, 3, S, S] at a place; nothing after it is computed.

    Args:
        model: a timm model.
        images: normalised images.
        place: the place, from 1; None for the tokens after all blocks and the final norm.

    Raises:
        RecipeError: the model has no such place.
    """
    timm_model: Any = model
    if place is None:
        return flat(model, timm_model.forward_features(images))
    check_place(model, place)
    if not is_plain(model):
        return features_and_maps(model, images, [place], whole=False)[1][place].flatten(2).mT
    [found] = timm_model.forward_intermediates(
        images,
        indices=[place - 1],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return torch.cat([found[1], found[0]], dim=1) if prefix_tokens(model) else found


def check_place(model: nn.Module, place: int) -> None:
    """Raises RecipeError where a model has no such place."""
    if not 1 <= place <= len(widths(model)):
        raise RecipeError(
            f"{'block' if is_plain(model) else 'stage'} is outside the model",
            got=place,
            expected=f"1..{len(widths(model))}",
        )


def features_and_maps(
    model: nn.Module, images: Tensor, places: Sequence[int], whole: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """What `forward_features` gives if `whole`, else an empty tensor, and the maps [B, C, rows, columns] by place.

    One pass; without `whole` it ends at the last place.
    """
    timm_model: Any = model
    if not places:
        return timm_model.forward_features(images), {}
    ordered = sorted(set(places))
    found = timm_model.forward_intermediates(
        images,
        indices=[place - 1 for place in ordered],
        stop_early=not whole,
        output_fmt="NCHW",
        intermediates_only=not whole,
    )
    features, maps = found if whole else (images.new_empty(0), found)
    return features, dict(zip(ordered, maps, strict=True))


def flat(model: nn.Module, features: Tensor) -> Tensor:
    """What `forward_features` gives as tokens [B, T, C]: maps in raster order.

    Raises:
        RecipeError: it gives something else.
    """
    if features.ndim == 4:
        return features.flatten(1, 2) if getattr(model, "output_fmt", None) == "NHWC" else features.flatten(2).mT
    if features.ndim != 3:
        raise RecipeError("the model has no tokens", got=f"features {tuple(features.shape)}", expected="tokens or maps")
    return features


def classified(model: nn.Module, features: Tensor, logits: bool) -> Tensor:
    """The classifier's logits [B, L] for what `forward_features` gives, or the embedding [B, C] that it reads."""
    timm_model: Any = model
    found: Tensor = timm_model.forward_head(features, pre_logits=not logits)
    return found.flatten(1)


@contextmanager
def tokens_after(model: nn.Module, block: int) -> Iterator[list[Tensor]]:
    """A list that gets the tokens [B, T, C] after a block, counted from 1, at every forward pass in the context."""
    found: list[Tensor] = []
    handle = blocks(model)[block - 1].register_forward_hook(lambda _module, _args, out: found.append(out))
    try:
        yield found
    finally:
        handle.remove()


# ---------------------------------------------------------------- training


def forget_biases(model: nn.Module) -> None:
    """Make attention layers compute their position biases at every pass.

    TinyViT and LeViT keep them from the first pass in eval mode until `train` is called, so weights that are loaded or
    averaged in between would meet the biases of earlier weights.
    """
    for layer in model.modules():
        if hasattr(layer, "attention_bias_cache"):
            layer.register_forward_pre_hook(_forget)


def _forget(layer: nn.Module, _args: Any) -> None:
    layer.attention_bias_cache = {}  # type: ignore[assignment]  # a dictionary by device


def recompute(model: nn.Module) -> None:
    """Keep no activations inside blocks; the backward pass computes them again. Raises RecipeError without timm's."""
    timm_model: Any = model
    try:
        timm_model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise RecipeError("timm cannot recompute this model's activations", got=type(model).__name__) from error


def layers_below_head(model: nn.Module) -> dict[str, int] | None:
    """By parameter the blocks between it and the head, for layer decay; None: timm's groups are the published ones.

    Blocks count, and a downsampling goes with the last block before it, whose stage it ends. In TinyViT (Wu et al.,
    ECCV 2022) the stem is in the first block's layer, and norm and head in the last block's. In Swin they have layers
    of their own (SimMIM, FastMIM). timm puts a downsampling into a layer of its own, or into that of the next block.
    """
    if not isinstance(model, TinyVit | SwinTransformer | SwinTransformerV2):
        return None
    own = 0 if isinstance(model, TinyVit) else 1  # layers of the stem, and of norm and head
    stages = model.stages if isinstance(model, TinyVit) else model.layers
    found: dict[str, int] = {}
    depths = [len(stage.blocks) for stage in stages]  # type: ignore[arg-type]  # a module's attribute
    total = sum(depths)
    for name, _ in model.named_parameters():
        match name.split("."):
            case ["stages" | "layers", stage, "blocks", block, *_]:
                number = sum(depths[: int(stage)]) + int(block)
            case ["stages" | "layers", stage, "downsample", *_]:
                number = sum(depths[: int(stage)]) - 1
            case ["patch_embed", *_]:
                number = -own
            case _:
                number = total - 1 + own
        found[name] = total - 1 + own - number
    return found

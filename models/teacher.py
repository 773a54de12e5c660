"""The teacher of a recipe: built, loaded, cut, frozen, and described for the manifest."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, RecipeError, first_line
from tinymim.configs.sections import ModelConfig, TeacherConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models.checkpoints import load_weights, tensors_sha256
from tinymim.models.taps import CutTeacher, Tapped, count_tokens, finite_views, require_finite
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, build_model, size_overrides

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """uint8 views [B, 3, S, S] -> the tensors at `taps` (`models/taps.py` has their shapes).

    Args:
        config: the teacher's section of a recipe.
        taps: what it must give, at least one place.

    Raises:
        RecipeError: timm cannot build the model, or it has no such block.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """

    def __init__(self, config: TeacherConfig, taps: Sequence[Tap]) -> None:
        super().__init__()
        model = _with_weights(config)
        self.weights_sha256 = tensors_sha256(model.state_dict())
        # A file says nothing of its pixels' normalisation: ImageNet's is MAE's, DINOv2's and pretrain-mae's.
        cfg: dict[str, Any] = (getattr(model, "pretrained_cfg", None) or {}) if config.weights == "hub" else {}
        self.mean: tuple[float, ...] = tuple(config.mean or cfg.get("mean", IMAGENET_MEAN))
        self.std: tuple[float, ...] = tuple(config.std or cfg.get("std", IMAGENET_STD))
        self.license = str(cfg.get("license") or "unknown") if config.weights == "hub" else "unknown (local file)"
        self.grid, self.prefix_tokens = count_tokens(model)
        self.normalise = Normalise(self.mean, self.std)  # type: ignore[arg-type]  # three floats each
        self.cut = CutTeacher(model, taps).to(_DTYPES[config.precision])
        self.config = config
        self.eval().requires_grad_(False)
        if config.compile:
            self.cut.compile_blocks()

    @torch.no_grad()
    def forward(self, pixels: Tensor, check: bool = True) -> Tapped:
        """What the taps give; with `check`, which waits for the device, RecipeError is raised unless it is finite."""
        images = self.normalise(pixels).to(_DTYPES[self.config.precision])
        cudnn = torch.backends.cudnn
        kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        # By default a convolution in fp32, here the patch embedding, is TF32 on a GPU; products of matrices are not.
        with cudnn.flags(**kept, allow_tf32=self.config.precision != "fp32"):
            tapped: Tapped = self.cut(images)
        if check:
            require_finite(finite_views(tapped))
        return tapped

    def projection(self, tap: Tap) -> tuple[Tensor, Tensor | None]:
        """Weight [W, C] and bias [W] (or None) of a tapped block's qkv layer, float32; rows q, k, v, each by head.

        What happens to q and k behind that layer (norms, rotary embeddings) is not in it.

        Raises:
            RecipeError: the block has no single qkv layer.
        """
        attention = self.cut.attention(tap)
        layer = getattr(attention, "qkv", None)
        if not isinstance(layer, nn.Linear):
            raise RecipeError(
                f"the attention layer {type(attention).__name__} has no single qkv layer",
                got=type(layer).__name__,
                expected="Linear",
                hint="use codec.name: sketch, which stores relations as they are",
            )
        bias: Tensor | None = layer.bias
        apart = [getattr(attention, f"{side}_bias", None) for side in "qkv"]  # BEiT and EVA keep biases of their own
        if bias is None and all(isinstance(part, Tensor) for part in apart):
            bias = torch.cat(apart)  # type: ignore[arg-type]
        return layer.weight.detach().float(), None if bias is None else bias.detach().float()

    def black(self) -> Tapped:
        """What the taps give for one black view."""
        size = self.config.img_size
        black: Tapped = self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.normalise.mean.device))
        return black

    def shapes(self) -> Shapes:
        """Sizes of the tensors of a view, as a forward pass gives them."""
        tap, tensors = list(self.black().items())[-1]
        if tap.kind == "qkv":
            _, heads, tokens, head_dim = tensors[0].shape
        else:
            _, tokens, width = tensors[0].shape
            heads = int(self.cut.attention(tap).num_heads)  # type: ignore[arg-type]
            head_dim = width // heads
        return Shapes(heads, head_dim, tokens, self.prefix_tokens, self.grid)

    def describe(self) -> dict[str, Any]:
        """What identifies the teacher in a manifest: everything about it that changes a number."""
        config = self.config
        return {
            "name": config.name,
            "arch": {"img_size": config.img_size, **size_overrides(config)},
            "weights_sha256": self.weights_sha256,
            "weights_origin": config.weights,
            "license": self.license,
            "precision": config.precision,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _with_weights(config: TeacherConfig) -> nn.Module:
    if config.weights != "hub":
        model = build_model(config)
        load_weights(model, config.weights, unread=("norm.",))  # it is cut in front of the final norm
        return model
    return build_pretrained(config)


def build_pretrained(config: ModelConfig) -> nn.Module:
    """timm's pretrained weights of `config.name`. Raises CheckpointError where they cannot be fetched."""
    # "name.tag" and "hf-hub:owner/name" (or "local-dir:folder") say themselves which weights are meant.
    if not {".", ":"} & set(config.name) and not timm.models.is_model_pretrained(config.name):
        raise CheckpointError(f"timm has no pretrained weights for '{config.name}'", hint="set weights to a file")
    try:
        return build_model(config, pretrained=True)
    except Exception as error:  # the hub client raises many kinds: no network, no such file, no space
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the pretrained weights of '{config.name}' cannot be fetched",
            got=first_line(error),
            hint="check the network, or download them elsewhere and set weights to the file",
        ) from error

"""The teacher of a recipe: built, loaded, cut, frozen, and described for the manifest."""

from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.sections import TeacherConfig
from tinymim.models import backbone
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.taps import CutTeacher, TappedBlock
from tinymim.models.vit import Normalise, size_overrides
from tinymim.models.weights import build_with_weights, stated

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """uint8 views [B, 3, S, S] -> q, k, v of the tapped block, each [B, H, T, D], and its input [B, T, C].

    Raises:
        RecipeError: timm cannot build the model, or it has no such block.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        # It is cut in front of the final norm.
        model = build_with_weights(config, config.weights, unread=(backbone.FINAL_NORM,))
        self.weights_sha256 = tensors_sha256(model.state_dict())
        mean, std, self.license = stated(model, config.weights)
        self.mean, self.std = config.mean or mean, config.std or std
        self.grid, self.prefix_tokens = backbone.grid(model), backbone.prefix_tokens(model)
        self.normalise = Normalise(self.mean, self.std)
        self.cut = CutTeacher(model, config.block).to(_DTYPES[config.precision])
        self.config = config
        self.eval().requires_grad_(False)
        if config.compile:
            self.cut.compile_blocks()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TappedBlock:
        images = self.normalise(pixels).to(_DTYPES[self.config.precision])
        cudnn = torch.backends.cudnn
        kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        # By default a convolution in fp32, here the patch embedding, is TF32 on a GPU; products of matrices are not.
        with cudnn.flags(**kept, allow_tf32=self.config.precision != "fp32"):
            return self.cut(images)  # type: ignore[no-any-return]

    def qkv_projection(self) -> tuple[Tensor, Tensor | None]:
        """`backbone.qkv_projection` of the tapped block."""
        return backbone.qkv_projection(self.cut.attention)

    @torch.no_grad()
    def describe(self) -> dict[str, Any]:
        """The manifest's teacher section: everything about the teacher that changes a number."""
        device = self.normalise.mean.device
        size = self.config.img_size
        q, _, _, _ = self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
        config = self.config
        return {
            "name": config.name,
            "arch": {"img_size": config.img_size, **size_overrides(config)},
            "weights_sha256": self.weights_sha256,
            "weights_origin": config.weights,
            "license": self.license,
            "block": config.block,
            "heads": q.shape[1],
            "head_dim": q.shape[3],
            "tokens": q.shape[2],
            "prefix_tokens": self.prefix_tokens,
            "grid": list(self.grid),
            "precision": config.precision,
            "mean": list(self.mean),
            "std": list(self.std),
        }

"""The teacher of a recipe: build, load, cut, freeze, and describe it for a layer."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import LARGEST, TeacherConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.taps import CutTeacher, Tapped, check_tap, finite_views, require_finite
from tinymim.models.vit import Normalise, build_model, size_overrides
from tinymim.models.weights import build_with_weights, stated

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def taps_of(config: TeacherConfig, taps: Iterable[Tap]) -> list[Tap]:
    """Those of the taps that a teacher has; reads no weights, so a classifier is not among them."""
    found = []
    with torch.device("meta"):
        model = build_model(config)
    for tap in taps:
        with suppress(RecipeError):
            check_tap(model, tap)
            found.append(tap)
    return found


class Teacher(nn.Module):
    """uint8 views [B, 3, S, S] to the tensors at `taps` (`models/taps.py` gives their shapes).

    Args:
        config: the teacher's section of a recipe.
        taps: one or more taps.

    Raises:
        RecipeError: timm cannot build the model, or the model has no such block.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """

    def __init__(self, config: TeacherConfig, taps: Collection[Tap]) -> None:
        super().__init__()
        model = _built(config, taps)
        self._sha256 = {_at_classifier(taps): tensors_sha256(model.state_dict())}
        # A layer's identity is that of a run that writes it alone. Without a tap at the classifier, the model of such
        # a run has none, and may have another last norm: so its tensors are those of another model.
        others = [tap for tap in taps if not _at_classifier([tap])]
        if _at_classifier(taps) and others:
            self._sha256[False] = tensors_sha256(_built(config, others).state_dict())
        self.mean, self.std, _, self.license = stated(model, config, config.weights, config.mean, config.std)
        self._plain = backbone.is_plain(model)
        self.normalise = Normalise(self.mean, self.std)
        self.cut = CutTeacher(model, tuple(taps)).to(_DTYPES[config.precision])
        self.config = config
        self.eval().requires_grad_(False)
        if config.compile:
            self.cut.compile_blocks()

    @torch.no_grad()
    def forward(self, pixels: Tensor, check: bool = True, taps: Collection[Tap] | None = None) -> Tapped:
        """The tensors of some taps, by default of all; nothing after the last of them is computed.

        `check` waits for the device and raises RecipeError unless they are finite.
        """
        images = self.normalise(pixels).to(_DTYPES[self.config.precision])
        cudnn = torch.backends.cudnn
        kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        # By default an fp32 convolution, here the patch embedding, is TF32 on a GPU; matrix products are not.
        with cudnn.flags(**kept, allow_tf32=self.config.precision != "fp32"):
            tapped: Tapped = self.cut(images, taps)
        if check:
            require_finite(finite_views(tapped))
        return tapped

    def projection(self, tap: Tap) -> tuple[Tensor, Tensor | None]:
        """`backbone.qkv_projection` of a tapped block."""
        return backbone.qkv_projection(self.cut.attention(tap))

    def black(self, taps: Collection[Tap] | None = None) -> Tapped:
        """The tensors of some taps, by default of all, for one black view."""
        size = self.config.img_size
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.normalise.mean.device)
        black: Tapped = self(pixels, taps=taps)
        return black

    def shapes(self, taps: Collection[Tap] | None = None) -> Shapes:
        """Sizes of a view's tensors at some taps, by default at all, from a forward pass.

        Of a model that is no plain ViT they are those at the last of the taps, whose tokens have one head.
        """
        model, tapped = self.cut.model, self.black(taps)
        if not self._plain:
            last = max(tapped, key=lambda tap: tap.place or LARGEST)
            grid, width = backbone.grid(model, self.config.img_size, last.place or None), tapped[last][0].shape[-1]
            prefix = tapped[last][1].shape[1] if last.kind == "tokens" else 0
            return Shapes(1, width, grid[0] * grid[1] + prefix, prefix, grid)
        (rows, columns), prefix = backbone.grid(model), backbone.prefix_tokens(model)
        heads, width = backbone.heads(model) or 1, backbone.widths(model)[-1]
        head_dim, tokens = width // heads, rows * columns + prefix
        for tap, tensors in tapped.items():
            if tap.kind in ("qkv", "attention"):
                _, heads, tokens, head_dim = tensors[0].shape
        return Shapes(heads, head_dim, tokens, prefix, (rows, columns))

    def describe(self, taps: Collection[Tap] | None = None) -> dict[str, Any]:
        """The teacher's identity in a layer that reads some taps, by default all: whatever of it changes a number."""
        config = self.config
        return {
            "name": config.name,
            "arch": {"img_size": config.img_size, **size_overrides(config)},
            "weights_sha256": self._sha256[_at_classifier(self.cut.taps if taps is None else taps)],
            "weights_origin": config.weights,
            "license": self.license,
            "precision": config.precision,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _at_classifier(taps: Collection[Tap]) -> bool:
    return any(tap.kind in ("pooled", "logits") for tap in taps)


def _built(config: TeacherConfig, taps: Collection[Tap]) -> nn.Module:
    """The model with its weights; with a classifier if a tap needs it."""
    # The final norm may be absent from the file if everything after the last tap is cut off.
    unread = () if any(tap.place == 0 for tap in taps) else (backbone.FINAL_NORM,)
    return build_with_weights(config, config.weights, unread, _at_classifier(taps))

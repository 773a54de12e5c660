"""The teacher of a recipe: build, load, cut, freeze, and describe it for a layer."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.sections.values import LARGEST
from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone, custom
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.custom import CustomTaps
from tinymim.models.drop_path import HandedDropPath, drop_by, replace_drop_path
from tinymim.models.initialise import set_drop_path
from tinymim.models.taps import CutTeacher, Tapped, check_tap, finite_views, require_finite
from tinymim.models.vit import Normalise, build_model, size_overrides
from tinymim.models.weights import build_with_weights, stated

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def taps_of(config: TeacherConfig, taps: Iterable[Tap]) -> list[Tap]:
    """Those of the taps that a teacher has; reads no weights, so a classifier is not among them."""
    found = []
    with torch.device("meta"):
        model = build_model(config)
    if custom.gives_taps(model):  # it lists none
        return []
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
        model: the model itself, instead of the one that `config` names.

    Raises:
        RecipeError: the model cannot be built, or has no such block.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """

    def __init__(self, config: TeacherConfig, taps: Collection[Tap], model: nn.Module | None = None) -> None:
        super().__init__()
        given = model is not None or config.factory is not None  # then it is one model, whatever its taps
        model = _built(config, taps) if model is None else model
        self._sha256 = {_at_classifier(taps): tensors_sha256(model.state_dict())}
        # A layer's identity is that of a run that writes it alone. Without a tap at the classifier, the model of such
        # a run has none, and may have another last norm: so its tensors are those of another model.
        others = [tap for tap in taps if not _at_classifier([tap])]
        if given:
            self._sha256 = dict.fromkeys((False, True), next(iter(self._sha256.values())))
        elif _at_classifier(taps) and others:
            self._sha256[False] = tensors_sha256(_built(config, others).state_dict())
        self.mean, self.std, _, self.license = stated(model, config, config.weights, config.mean, config.std)
        self._plain = backbone.is_plain(model)
        self._drop_paths = _dropping(model, config.drop_path) if config.drop_path else []
        self.normalise = Normalise(self.mean, self.std)
        custom.require_teacher(model)
        made: CustomTaps | CutTeacher
        made = CustomTaps(model, taps) if custom.gives_taps(model) else CutTeacher(model, tuple(taps))
        self.cut = made.to(_DTYPES[config.precision])
        self.config = config
        self.eval().requires_grad_(False)
        for path in self._drop_paths:
            path.train()  # the only modules that do otherwise than in eval mode
        if config.compile:
            self.cut.compile_blocks()

    @torch.no_grad()
    def forward(
        self,
        pixels: Tensor,
        check: bool = True,
        taps: Collection[Tap] | None = None,
        kept: Tensor | None = None,
        drops: Tensor | None = None,
    ) -> Tapped:
        """The tensors of some taps, by default of all; nothing after the last of them is computed.

        `check` waits for the device and raises RecipeError unless they are finite. With `kept`, int64 [B, M], the
        teacher sees these patches alone. `drops`, float64 [B, `branches`] in [0, 1), decide over its branches: one is
        dropped where its number is at least 1 - `drop_path`.
        """
        assert (drops is not None) == bool(self._drop_paths), "draws are handed out to teachers that drop branches"
        if drops is not None:
            drop_by(self._drop_paths, drops)
        images = self.normalise(pixels).to(_DTYPES[self.config.precision])
        cudnn = torch.backends.cudnn
        others = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        # By default an fp32 convolution, here the patch embedding, is TF32 on a GPU; matrix products are not.
        with cudnn.flags(**others, allow_tf32=self.config.precision != "fp32"):
            tapped: Tapped = self.cut(images, taps, kept)
        if check:
            require_finite(finite_views(tapped))
        return tapped

    def projection(self, tap: Tap) -> tuple[Tensor, Tensor | None]:
        """`backbone.qkv_projection` of a tapped block."""
        return backbone.qkv_projection(self.cut.attention(tap))

    def black(self, taps: Collection[Tap] | None = None, visible: int | None = None) -> Tapped:
        """The tensors of some taps, by default of all, for one black view of all patches, or of the first `visible`."""
        size, device = self.config.img_size, self.normalise.mean.device
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        kept = None if visible is None else torch.arange(visible, device=device)[None]
        drops = torch.zeros(1, self.branches, device=device) if self.branches else None  # none is dropped
        black: Tapped = self(pixels, taps=taps, kept=kept, drops=drops)
        return black

    @property
    def branches(self) -> int:
        """Residual branches of the whole model that it may drop for a view; 0 without `drop_path`."""
        return len(self._drop_paths)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, or of cells of the last map."""
        cut = self.cut
        return cut.shapes.grid if isinstance(cut, CustomTaps) else backbone.grid(cut.model, self.config.img_size)

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        if isinstance(self.cut, CustomTaps):
            return self.cut.shapes.prefix_tokens
        return backbone.prefix_tokens(self.cut.model)

    def shapes(self, taps: Collection[Tap] | None = None, visible: int | None = None) -> Shapes:
        """Sizes of a view's tensors at some taps, by default at all, from a forward pass; `visible` as in `black`.

        Of a timm model that is no plain ViT they are those at the last of the taps, whose tokens have one head.
        """
        model, tapped = self.cut.model, self.black(taps, visible)
        if isinstance(self.cut, CustomTaps):
            return self.cut.shapes
        if not self._plain:
            last = max(tapped, key=lambda tap: tap.place or LARGEST)
            grid, width = backbone.grid(model, self.config.img_size, last.place or None), tapped[last][0].shape[-1]
            prefix = tapped[last][1].shape[1] if last.kind == "tokens" else 0
            return Shapes(1, width, grid[0] * grid[1] + prefix, prefix, grid)
        (rows, columns), prefix = self.grid, self.prefix_tokens
        heads, width = backbone.heads(model) or 1, backbone.widths(model)[-1]
        head_dim, tokens = width // heads, (rows * columns if visible is None else visible) + prefix
        for tap, tensors in tapped.items():
            if tap.kind in ("qkv", "attention"):
                _, heads, tokens, head_dim = tensors[0].shape
        return Shapes(heads, head_dim, tokens, prefix, (rows, columns))

    def describe(self, taps: Collection[Tap] | None = None) -> dict[str, Any]:
        """The teacher's identity in a layer that reads some taps, by default all: whatever of it changes a number."""
        config = self.config
        own = {"factory": config.factory, "args": config.args} if config.factory is not None else size_overrides(config)
        return {
            "name": config.name,
            "arch": {"img_size": config.img_size, **own},
            "weights_sha256": self._sha256[_at_classifier(self.cut.taps if taps is None else taps)],
            "weights_origin": config.weights,
            "license": self.license,
            "precision": config.precision,
            "mean": list(self.mean),
            "std": list(self.std),
        } | ({"drop_path": config.drop_path} if config.drop_path else {})


def _dropping(model: nn.Module, rate: float) -> list[HandedDropPath]:
    """Give a teacher stochastic depth, in all of its blocks, before it is cut. Raises RecipeError where it has none."""
    if not isinstance(model, backbone.PlainViT) or not all(
        hasattr(each, "drop_path1") for each in backbone.blocks(model)
    ):
        raise RecipeError(
            "teacher.drop_path needs a plain ViT, whose blocks have two branches to drop",
            got=type(model).__name__,
            hint="set teacher.drop_path: 0",
        )
    set_drop_path(model, rate)
    return replace_drop_path(model)


def _at_classifier(taps: Collection[Tap]) -> bool:
    return any(tap.kind in ("pooled", "logits") for tap in taps)


def _built(config: TeacherConfig, taps: Collection[Tap]) -> nn.Module:
    """The model with its weights; with a classifier if a tap needs it."""
    # The final norm may be absent from the file if everything after the last tap is cut off.
    unread = () if any(tap.place == 0 for tap in taps) else (backbone.FINAL_NORM,)
    return build_with_weights(config, config.weights, unread, _at_classifier(taps))

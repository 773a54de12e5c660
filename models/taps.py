"""Tensors taken at named places of any timm model (`Tap`), and a teacher that stops right after its last tap.

The qkv tap intercepts the call of scaled dot-product attention. So it gets q and k after their norms and rotary
embeddings, from fused, split and biased qkv layers, without a copy of any model's forward.

Shapes: B view, H head, T token, P prefix token, D head width, C width, L class.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Tap
from tinymim.models import backbone, hiding

Tapped = Mapping[Tap, tuple[Tensor, ...]]
IN_ATTENTION = ("normed", "attention", "qkv")
AT_END = ("tokens", "cls", "pooled", "logits")  # may have place 0
WHOLE_VIEW = ("cls", "pooled", "logits")  # one vector a view, without a grid
KINDS = (*IN_ATTENTION, *AT_END)


class _Done(Exception):
    """Leaves the forward pass after its last tap."""


class _Attention(TorchFunctionMode):
    """Passes q, k and v of attention calls to `found`."""

    def __init__(self, found: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self._found(args[0], args[1], args[2])
        return func(*args, **(kwargs or {}))


class CutTeacher(nn.Module):
    """A teacher cut right after its last tap: nothing after it is computed or kept.

    A tap gives a tuple of tensors, first axis views. In block N:

    - "normed@N": the block's input after its first norm [B, T, C], and its prefix tokens [B, P, C].
    - "attention@N": q and k of attention, each [B, H, T, D], and q of the prefix tokens [B, H, P, D].
    - "qkv@N": q, k and v, each [B, H, T, D], and the input [B, T, C] of their projection.
    - "tokens@N": the tokens [B, T, C] after the block, and its prefix tokens [B, P, C].
    - "cls@N": the class token [B, C] after the block.

    "tokens@0" and "cls@0" are those after the final norm. "pooled@0" is the embedding [B, C] that the classifier reads,
    and "logits@0" is what the classifier gives, [B, L]. A model that is no plain ViT has stages in the place of blocks,
    and only the taps "tokens", "pooled" and "logits".

    Args:
        model: a timm model.
        taps: one or more taps.

    Raises:
        RecipeError: the model has no such block, class token or classifier, or an attention layer that the tap does
            not support.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        super().__init__()
        self._prefix = backbone.prefix_tokens(model)
        for tap in taps:
            check_tap(model, tap)
        self.model = model
        # In the order of the forward pass; the end of the model comes last.
        self.taps = tuple(sorted(set(taps), key=lambda tap: (tap.place == 0, tap.place, KINDS.index(tap.kind))))
        self._plain = backbone.is_plain(model)
        if self.taps[-1].place and self._plain:
            del backbone.blocks(model)[self.taps[-1].place :]

    def attention(self, tap: Tap) -> nn.Module:
        """The attention layer of a tap's block."""
        return backbone.attention(self.model, tap.place)

    def compile_blocks(self) -> None:
        """Compile the blocks that are not tapped: hooks that change with every call would compile them again.

        Raises:
            RecipeError: the model is no plain ViT.
        """
        if not self._plain:
            what = type(self.model).__name__
            raise RecipeError("teacher.compile needs a plain ViT", got=what, hint="set teacher.compile: false")
        tapped = {tap.place for tap in self.taps}
        for number, block in enumerate(backbone.blocks(self.model), start=1):
            if number not in tapped:
                block.compile()

    def forward(self, images: Tensor, taps: Collection[Tap] | None = None, kept: Tensor | None = None) -> Tapped:
        """The tensors of some taps, by default of all, for normalised images [B, 3, S, S].

        With `kept`, int64 [B, M], the model sees these patches alone (`hiding.seeing`), and T is P + M.
        """
        wanted = [tap for tap in self.taps if taps is None or tap in taps]
        if not self._plain:
            with hiding.seeing(self.model, kept):
                return self._of_maps(images, wanted)
        found: dict[Tap, tuple[Tensor, ...]] = {}

        def take(tap: Tap, *tensors: Tensor) -> None:
            found[tap] = tensors
            if len(found) == len(wanted):
                raise _Done

        with ExitStack() as hooks:
            hooks.enter_context(hiding.seeing(self.model, kept))
            for tap in wanted:
                for handle in self._hooked(tap, take) if tap.place else ():
                    hooks.callback(handle.remove)
            try:
                tokens = self.model.forward_features(images)  # type: ignore[operator]
                for tap in wanted:
                    if not tap.place:
                        take(tap, *self._of_features(tap, tokens))
            except _Done:
                return found
        missing = next(tap for tap in wanted if tap not in found)
        raise RecipeError(
            f"the teacher never reached its tap {missing}",
            got=type(self.attention(missing)).__name__,
            expected="a plain ViT, whose blocks call scaled_dot_product_attention",
        )

    def _of_maps(self, images: Tensor, wanted: Sequence[Tap]) -> Tapped:
        """`forward` of a model that is no plain ViT: its stages give maps, which become tokens."""
        found: dict[Tap, tuple[Tensor, ...]] = {}
        places = [tap.place for tap in wanted if tap.place]
        features, maps = backbone.features_and_maps(self.model, images, places, len(places) < len(wanted))
        for tap in wanted:
            if tap.place:
                tokens = maps[tap.place].flatten(2).mT
                found[tap] = (tokens, tokens[:, :0])
            else:
                found[tap] = self._of_features(tap, features)
        return found

    def _hooked(self, tap: Tap, take: Callable[..., None]) -> list[RemovableHandle]:
        """The hooks of a tap inside a block, for one forward pass."""
        if tap.kind in AT_END:
            block = backbone.blocks(self.model)[tap.place - 1]
            return [block.register_forward_hook(lambda _module, _args, out: take(tap, *self._of_features(tap, out)))]
        attention = self.attention(tap)
        if tap.kind == "normed":
            return [
                attention.register_forward_pre_hook(lambda _module, args: take(tap, *self._of_features(tap, args[0])))
            ]

        def found(tokens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
            take(tap, q, k, *((v, tokens) if tap.kind == "qkv" else (q[:, :, : self._prefix],)))

        return _on_attention(attention, found)

    def _of_features(self, tap: Tap, features: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a tap from tokens [B, T, C], or from what `forward_features` gives."""
        if tap.kind in ("pooled", "logits"):
            return (backbone.classified(self.model, features, logits=tap.kind == "logits"),)
        tokens = backbone.flat(self.model, features)
        return (tokens[:, 0],) if tap.kind == "cls" else (tokens, tokens[:, : self._prefix])


def _on_attention(
    attention: nn.Module, found: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> list[RemovableHandle]:
    """Hooks that pass an attention layer's input [B, T, C], and its q, k and v, each [B, H, T, D], to `found`."""
    armed = ExitStack()

    # The mode is on during this attention only, because compiled blocks do not run under a mode.
    def arm(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        armed.enter_context(_Attention(lambda q, k, v: found(args[0], q, k, v)))

    return [
        attention.register_forward_pre_hook(arm),
        attention.register_forward_hook(lambda *_: armed.close(), always_call=True),
    ]


@contextmanager
def inner(model: nn.Module, tap: Tap) -> Iterator[list[Tensor]]:
    """A list that gets a plain ViT's own tensors at a tap inside it, at the forward pass in the context.

    They are the tokens [B, T, C] after a block ("tokens"), or its q, k and v, each [B, H, T, D] ("qkv", "attention").
    Nothing is computed with them here, so that activations can be recomputed without these hooks.
    """
    if tap.kind == "tokens":
        with backbone.tokens_after(model, tap.place) as tokens:
            yield tokens
        return
    found: list[Tensor] = []
    handles = _on_attention(backbone.attention(model, tap.place), lambda _tokens, *sides: found.extend(sides))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def joined(tap: Tap, found: Sequence[Tensor]) -> Tensor:
    """What `inner` found, by token: [B, T, C], or q and k ("attention", 2C channels) with v ("qkv", 3C)."""
    if tap.kind == "tokens":
        return found[0]
    sides = found[: 3 if tap.kind == "qkv" else 2]
    return torch.cat([side.transpose(1, 2).flatten(2) for side in sides], dim=-1)


def check_tap(model: nn.Module, tap: Tap) -> None:
    """Raises RecipeError where the model lacks the place of a tap; makes its attention layer call what taps catch."""
    assert tap.kind in KINDS, f"no model has a tap {tap.kind}"
    depth = len(backbone.widths(model))
    assert not (tap.place and tap.kind in ("pooled", "logits")), f"{tap} is at the end of a model only"
    if not backbone.is_plain(model) and (tap.kind in IN_ATTENTION or (tap.kind == "cls" and tap.place)):
        raise RecipeError(
            f"the tap {tap} needs a plain ViT, whose blocks attend over all tokens",
            got=type(model).__name__,
            hint="its maps have codecs too: features, ff, gram; cls at: pooled; logits",
        )
    if not (0 if tap.kind in AT_END else 1) <= tap.place <= depth:
        raise RecipeError("teacher.block is outside the teacher", got=tap.place, expected=f"1..{depth}")
    if tap.kind in ("attention", "qkv"):
        attention: Any = backbone.attention(model, tap.place)
        if not hasattr(attention, "fused_attn"):
            raise RecipeError(
                f"the {tap.kind} tap does not support the attention layer {type(attention).__name__}",
                hint="use a ViT whose attention calls scaled_dot_product_attention",
            )
        attention.fused_attn = True  # the unfused path has no call to intercept
    if tap.kind == "cls" and not backbone.has_class_token(model):
        raise RecipeError(
            "the teacher has no class token",
            got=f"{backbone.prefix_tokens(model)} prefix tokens",
            expected="a class token",
            hint="set codec.at: pooled, the embedding that its classifier reads",
        )
    if tap.kind == "logits" and not backbone.classes(model):
        raise RecipeError(
            "the teacher has no classifier",
            got="no class",
            expected="a model with a classifier",
            hint="set teacher.weights to a fine-tuned model",
        )


def finite_views(tapped: Tapped) -> Tensor:
    """Bool [B]: whether a view's tapped tensors are finite, and small enough for fp32 products of them to be finite."""
    given = [each for tensors in tapped.values() for each in tensors]
    # By Cauchy-Schwarz, products of rows are finite where norms are. Only fp64, which is for tests, is copied.
    norms = [
        torch.linalg.vector_norm(
            each.float() if each.dtype == torch.float64 else each, dim=tuple(range(1, each.ndim)), dtype=torch.float32
        )
        for each in given
    ]
    return torch.stack(norms).isfinite().all(0)


def require_finite(finite: Tensor) -> None:
    """Raises RecipeError unless all of `finite_views` are true; waits for their device."""
    if not finite.all():
        raise RecipeError(
            "the teacher's tensors are not finite",
            got=f"{int((~finite).sum())} of {len(finite)} views with inf or nan",
            expected="finite tensors",
            hint="set teacher.precision: fp32 or bf16, and check the teacher's weights",
        )

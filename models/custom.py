"""Models of the user's own, which recipes name as `package.module:function` (docs/custom-models.md).

A teacher or student may be a timm ViT. Any other module needs `shapes`, a `tinymim.Shapes`, and one method:

- A teacher has `forward_taps(images, taps)`. It gets normalised images [B, 3, S, S] and the names of taps, such as
  "tokens@12", and returns a mapping from these names to tensors.
- A student has `forward_features(images)`, which returns its final tokens [B, T, C].

Shapes: B view, H head, T token, P prefix token, D head width, C width, L class.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError, first_line
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes, Tap

_PAGE = "docs/custom-models.md has a worked example"


def build(config: ModelConfig) -> nn.Module:
    """The module that the recipe's `factory` returns for its `args`, on the CPU.

    The module of the factory is imported from `sys.path`, then from the working folder.

    Raises:
        RecipeError: the factory cannot be imported, raises, or returns something else than a module.
    """
    factory = _imported(str(config.factory))
    try:
        with torch.device("cpu"):  # also where the caller asks for sizes alone, on meta: a factory may load weights
            model = factory(**config.args)
    except Exception as error:  # the user's code may raise anything
        raise RecipeError(
            f"the factory {config.factory} raised {type(error).__name__}",
            got=first_line(error),
            expected=f"a module for args {config.args}",
            hint="run the same command with --debug for its traceback",
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"the factory {config.factory} returns no module", got=type(model).__name__, expected="torch.nn.Module"
        )
    return model


def _imported(factory: str) -> Callable[..., Any]:
    name, _, function = factory.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file here hides an installed module
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a module of the user may raise anything
        raise RecipeError(
            f"the module of factory {factory} cannot be imported",
            got=f"{type(error).__name__}: {first_line(error)}",
            hint="install its package, or run tinymim in the folder that holds it",
        ) from error
    for part in function.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            raise RecipeError(
                f"{name} has no {function}",
                got=f"factory: {factory}",
                hint=f"did you mean {name}:{near[0]}?" if near else f"define it in {getattr(found, '__file__', name)}",
            )
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"the factory {factory} is no function", got=type(found).__name__, expected="a function")
    return found  # type: ignore[no-any-return]


def own_shapes(model: nn.Module) -> Shapes | None:
    """The sizes that a module states itself; None for a timm model."""
    found = getattr(model, "shapes", None)
    return found if isinstance(found, Shapes) else None


def gives_taps(model: nn.Module) -> bool:
    """Whether a module is a teacher of the user's own, not a timm model."""
    return hasattr(model, "forward_taps")


def require_teacher(model: nn.Module) -> None:
    """Raises RecipeError where a module is neither a teacher of the user's own nor a timm model."""
    if not gives_taps(model) and not hasattr(model, "forward_intermediates"):
        raise RecipeError(
            f"{type(model).__name__} is no teacher",
            got="no forward_taps",
            expected="shapes, a tinymim.Shapes, and forward_taps(images, taps) -> tensors by tap; or a timm ViT",
            hint=_PAGE,
        )


def require_student(model: nn.Module, size: int) -> None:
    """Compare a student's tokens for one black image with its `shapes`.

    Args:
        model: a module of the user's own.
        size: width and height of its images in pixels.

    Raises:
        RecipeError: the module has no `shapes` or no `forward_features`, it fails, or its tokens have other sizes.
    """
    shapes, features = own_shapes(model), getattr(model, "forward_features", None)
    expected = "shapes, a tinymim.Shapes, and forward_features(images) -> tokens [B, T, C]; or a timm ViT"
    if shapes is None or features is None:
        missing = "shapes" if shapes is None else "forward_features"
        raise RecipeError(f"{type(model).__name__} is no student", got=f"no {missing}", expected=expected, hint=_PAGE)
    training = model.training
    model.eval()
    with torch.no_grad():
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        try:
            tokens = features(torch.zeros(1, 3, size, size, device=device))
        except Exception as error:  # the user's code may raise anything
            _raise_failed(model, "forward_features", error)
    model.train(training)
    _require_shape(f"the tokens of {type(model).__name__}", tokens, (1, shapes.tokens, shapes.width))


class WithTaps(nn.Module):
    """Any module as a teacher: a function takes the place of its `forward_taps`."""

    def __init__(
        self, model: nn.Module, taps: Callable[[nn.Module, Tensor, Sequence[str]], Mapping[str, Any]], shapes: Shapes
    ) -> None:
        super().__init__()
        self.model, self.shapes, self._taps = model, shapes, taps
        self.license = getattr(model, "license", None)
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)

    def forward_taps(self, images: Tensor, taps: Sequence[str]) -> Mapping[str, Any]:
        """The tensors of the function, by name of tap."""
        return self._taps(self.model, images, taps)


class CustomTaps(nn.Module):
    """A teacher of the user's own, called like `taps.CutTeacher`.

    Args:
        model: a module with `forward_taps` and `shapes`.
        taps: one or more taps.

    Raises:
        RecipeError: the module has no `shapes`.
    """

    def __init__(self, model: nn.Module, taps: Collection[Tap]) -> None:
        super().__init__()
        shapes = own_shapes(model)
        if shapes is None:
            raise RecipeError(
                f"{type(model).__name__} states no sizes",
                got=f"shapes {getattr(model, 'shapes', None)!r}",
                expected="shapes, a tinymim.Shapes",
                hint=_PAGE,
            )
        self.model, self.shapes, self.taps = model, shapes, tuple(sorted(set(taps)))
        self._forward: Callable[..., Any] = model.forward_taps  # type: ignore[assignment]  # the user's method

    def attention(self, tap: Tap) -> NoReturn:
        """Raises RecipeError: such a teacher has no layer that can be read."""
        raise RecipeError(
            f"{type(self.model).__name__} gives tensors, not the layer behind {tap}",
            hint="use codec.name: sketch, which stores relations as they are",
        )

    def compile_blocks(self) -> None:
        """Compile the whole of `forward_taps`."""
        self._forward = torch.compile(self._forward)

    def forward(
        self, images: Tensor, taps: Collection[Tap] | None = None, kept: Tensor | None = None
    ) -> Mapping[Tap, tuple[Tensor, ...]]:
        """The tensors of some taps, by default of all, for normalised images [B, 3, S, S].

        Raises:
            RecipeError: `kept` is given, since such a teacher sees whole views; `forward_taps` fails, leaves out a tap,
                or a tensor has another shape than its kind has.
        """
        if kept is not None:
            raise RecipeError(
                f"{type(self.model).__name__} cannot run on visible patches alone",
                got="a mask",
                expected="a plain ViT, or one with rotary positions",
                hint="leave the mask out",
            )
        wanted = [tap for tap in self.taps if taps is None or tap in taps]
        try:
            given = self._forward(images, tuple(map(str, wanted)))
        except Exception as error:  # the user's code may raise anything
            if isinstance(error, torch.OutOfMemoryError):
                raise  # a smaller batch may fit
            _raise_failed(self.model, "forward_taps", error)
        if not isinstance(given, Mapping) or any(str(tap) not in given for tap in wanted):
            keys = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            raise RecipeError(
                f"{type(self.model).__name__}.forward_taps does not give the taps of the codec",
                got=keys or "nothing",
                expected=f"a mapping with {', '.join(map(str, wanted))}",
                hint=f"choose a codec whose taps the teacher has; {_PAGE}",
            )
        return {tap: self._checked(tap, given[str(tap)], len(images)) for tap in wanted}

    def _checked(self, tap: Tap, given: Any, views: int) -> tuple[Tensor, ...]:
        """What `CutTeacher` gives at this tap, from what the user's module gives."""
        tensors = (given,) if isinstance(given, Tensor) else tuple(given)
        sizes, name = self.shapes, f"{tap} of {type(self.model).__name__}"
        rows = (views, sizes.tokens, sizes.width)
        by_head = (views, sizes.heads, sizes.tokens, sizes.head_dim)
        if tap.kind in ("qkv", "attention"):
            if len(tensors) != (count := 3 if tap.kind == "qkv" else 2):
                raise RecipeError(f"{name} has another number of tensors", got=len(tensors), expected=count)
            for tensor in tensors:
                _require_shape(name, tensor, by_head)
            # In the place of the projection's input, which only codecs read that read the projection, too.
            unread = tensors[0].new_empty(views, 0)
            return (*tensors, unread if tap.kind == "qkv" else tensors[0][:, :, : sizes.prefix_tokens])
        if tap.kind in ("tokens", "normed"):
            _require_shape(name, tensors[0], rows)
            return tensors[0], tensors[0][:, : sizes.prefix_tokens]
        width = None if tap.kind == "logits" else sizes.width  # the number of classes is the teacher's own
        _require_shape(name, tensors[0], (views, width))
        return tensors[:1]


def _raise_failed(model: nn.Module, method: str, error: Exception) -> NoReturn:
    raise RecipeError(
        f"{type(model).__name__}.{method} raised {type(error).__name__}",
        got=first_line(error),
        hint="run the same command with --debug for its traceback",
    ) from error


def _require_shape(name: str, tensor: Any, wanted: tuple[int | None, ...]) -> None:
    """Raises RecipeError unless `tensor` has the sizes `wanted`; None fits any."""
    got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    if (
        not isinstance(tensor, Tensor)
        or len(got) != len(wanted)
        or any(size not in (None, own) for own, size in zip(tensor.shape, wanted, strict=True))
    ):
        expected = f"({', '.join('any' if size is None else str(size) for size in wanted)})"
        raise RecipeError(f"{name} has another shape than `shapes` states", got=got, expected=expected, hint=_PAGE)

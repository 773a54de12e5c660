"""tinymim: distil a large masked-image-modelling ViT into many small ones, paying for the large one once.

The library is `tinymim.api`. Its names are also here, and are loaded, with torch, at first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymim.api import (
        Batch,
        Loader,
        Shapes,
        TeacherCache,
        TinymimError,
        UserError,
        export,
        open_cache,
        pull,
        push,
        run_recipe,
    )

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Loader",
    "Shapes",
    "TeacherCache",
    "TinymimError",
    "UserError",
    "__version__",
    "export",
    "open_cache",
    "pull",
    "push",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tinymim' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("tinymim.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

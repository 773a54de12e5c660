"""tinymim: distil a large masked-image-modelling ViT into many small ones, paying for the large one once.

The library is `tinymim.api`. Its names are also here. Each is loaded at first use, with torch where it needs it.
"""
# ruff: noqa: F405

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymim.api import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Finding",
    "Loader",
    "RunSummary",
    "Shapes",
    "ShardOptions",
    "TeacherCache",
    "TinymimError",
    "UserError",
    "__version__",
    "cache_copy",
    "cache_info",
    "cache_list",
    "cache_pack",
    "cache_remove",
    "cache_repair",
    "cache_upgrade",
    "cache_verify",
    "compare",
    "demo",
    "doctor",
    "export",
    "live",
    "look",
    "make_shards",
    "open_cache",
    "plan",
    "pull",
    "push",
    "recipe_fields",
    "recipes",
    "run_recipe",
    "views",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tinymim' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("tinymim.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

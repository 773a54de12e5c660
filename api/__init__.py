"""tinymim as a library: the targets of a cache in your own training loop, with the teacher not loaded.

    import timm
    import tinymim

    def main() -> None:
        student = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        cache = tinymim.open_cache("caches/mine")
        loader = cache.loader("shards/mine", batch_size=64)
        head = cache.head("mae", student)
        for batch in loader:
            answers = {"mae": head(student.forward_features(batch.images()))}
            loss = sum(cache.losses(answers, batch).values())

    if __name__ == "__main__":  # the loader's processes import this file
        main()

`tinymim cache info` lists the names of the layers, here `mae`. `tinymim train-student` is made of the same parts. Code
is never loaded from a cache.

Shapes: B view, S pixel, T token, C width.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tinymim.api.cache import TeacherCache, open_cache
    from tinymim.api.jobs import cache_repair, cache_verify, look, plan, run_recipe, views
    from tinymim.api.loader import Batch, Loader
    from tinymim.configs.errors import TinymimError, UserError
    from tinymim.configs.fields import text as recipe_fields
    from tinymim.configs.shipped import texts as recipes
    from tinymim.configs.taps import Shapes
    from tinymim.stages.cache.copy import run as cache_copy
    from tinymim.stages.cache.info import describe as cache_info
    from tinymim.stages.cache.list import run as cache_list
    from tinymim.stages.cache.pack import run as cache_pack
    from tinymim.stages.cache.remove import run as cache_remove
    from tinymim.stages.cache.upgrade import run as cache_upgrade
    from tinymim.stages.compare import run as compare
    from tinymim.stages.demo import run as demo
    from tinymim.stages.doctor import Finding
    from tinymim.stages.doctor import run as doctor
    from tinymim.stages.export import run as export
    from tinymim.stages.hub import pull, push
    from tinymim.stages.live import open_server as live
    from tinymim.stages.make_shards import Options as ShardOptions
    from tinymim.stages.make_shards import run as make_shards
    from tinymim.stages.pages.summary import RunSummary

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

# Where each name is defined. It is imported at first use, so that looking at a cache needs no torch.
_HOMES: Final = {
    "Batch": "api.loader.Batch",
    "Finding": "stages.doctor.Finding",
    "Loader": "api.loader.Loader",
    "RunSummary": "stages.pages.summary.RunSummary",
    "Shapes": "configs.taps.Shapes",
    "ShardOptions": "stages.make_shards.Options",
    "TeacherCache": "api.cache.TeacherCache",
    "TinymimError": "configs.errors.TinymimError",
    "UserError": "configs.errors.UserError",
    "cache_copy": "stages.cache.copy.run",
    "cache_info": "stages.cache.info.describe",
    "cache_list": "stages.cache.list.run",
    "cache_pack": "stages.cache.pack.run",
    "cache_remove": "stages.cache.remove.run",
    "cache_repair": "api.jobs.cache_repair",
    "cache_upgrade": "stages.cache.upgrade.run",
    "cache_verify": "api.jobs.cache_verify",
    "compare": "stages.compare.run",
    "demo": "stages.demo.run",
    "doctor": "stages.doctor.run",
    "export": "stages.export.run",
    "live": "stages.live.open_server",
    "look": "api.jobs.look",
    "make_shards": "stages.make_shards.run",
    "open_cache": "api.cache.open_cache",
    "plan": "api.jobs.plan",
    "pull": "stages.hub.pull",
    "push": "stages.hub.push",
    "recipe_fields": "configs.fields.text",
    "recipes": "configs.shipped.texts",
    "run_recipe": "api.jobs.run_recipe",
    "views": "api.jobs.views",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinymim.api' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"tinymim.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""tinymim as a library: the targets of a cache in your own training loop, with the teacher not loaded.

    import tinymim

    cache = tinymim.open_cache("caches/mine")
    loader = cache.loader("shards/mine", batch_size=64)
    head = cache.head("mae", student)
    for batch in loader:
        answers = {"mae": head(student.forward_features(batch.images()))}
        loss = sum(cache.losses(answers, batch).values())

`tinymim cache info` lists the names of the layers, here `mae`. `tinymim train-student` is made of the same parts. Code
is never loaded from a cache.

Shapes: B view, S pixel, T token, C width.
"""

from tinymim.api.cache import TeacherCache, open_cache
from tinymim.api.jobs import export, pull, push, run_recipe
from tinymim.api.loader import Batch, Loader
from tinymim.configs.errors import TinymimError, UserError
from tinymim.configs.taps import Shapes

__all__ = [
    "Batch",
    "Loader",
    "Shapes",
    "TeacherCache",
    "TinymimError",
    "UserError",
    "export",
    "open_cache",
    "pull",
    "push",
    "run_recipe",
]

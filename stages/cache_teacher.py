"""`tinymim cache-teacher`: run each teacher once over every view and store its targets."""

from torch import nn

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages.units.constants import require_rebuildable
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import prepare


def run(recipe: CacheTeacherRecipe, model: nn.Module | None = None) -> None:
    """Write or complete the recipe's cache; other jobs may do the same at the same time, and a stopped run resumes.

    Args:
        recipe: the cache recipe to run.
        model: the teacher itself, instead of the one that the recipe names; it is changed.

    Raises:
        RecipeError: views, teachers and codecs do not fit one another.
        CacheMismatch: the existing cache was made from another recipe or other data.
        SourceError: bad shards, before anything is written.
        UnitsFailed: some units could not be made; the others are committed.
        Interrupted: stopped by a signal; committed units are safe.
    """
    parts = prepare(recipe if recipe.cluster is None else _on_cpu(recipe), model=model)
    require_rebuildable(parts.kinds, parts.teachers)
    fill(recipe, parts)


def _on_cpu(recipe: CacheTeacherRecipe) -> CacheTeacherRecipe:
    """The recipe for the driver of a cluster, which makes the manifest and needs no GPU."""
    run = recipe.run.model_copy(update={"device": "cpu"})
    here = recipe.changed_teachers(lambda teacher: teacher.model_copy(update={"compile": False}))
    return here.model_copy(update={"run": run})

"""`tinymim cache-teacher`: run the teacher once over every view and store what it says."""

from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.stages.units.constants import require_rebuildable
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import prepare


def run(recipe: CacheTeacherRecipe) -> None:
    """Write or complete the recipe's cache, beside any other jobs that do; a stopped run continues where it was.

    Args:
        recipe: the recipe of the cache.

    Raises:
        RecipeError: sizes that do not fit one another.
        CacheMismatch: the cache there was made by something else.
        SourceError: bad shards, before anything is written.
        UnitsFailed: some units could not be made; the others are committed.
        Interrupted: stopped by a signal; committed units are safe.
    """
    parts = prepare(recipe if recipe.cluster is None else _on_cpu(recipe))
    require_rebuildable(parts.kind, parts.teacher)
    fill(recipe, parts)


def _on_cpu(recipe: CacheTeacherRecipe) -> CacheTeacherRecipe:
    """The recipe as the driver of a cluster wants it, which only has to know what cache will be made."""
    run = recipe.run.model_copy(update={"device": "cpu"})
    return recipe.model_copy(update={"run": run, "teacher": recipe.teacher.model_copy(update={"compile": False})})

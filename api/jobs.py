"""The commands that read recipes, as functions. Each loads its stage, and with it torch, when it runs."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim.configs.errors import RecipeError

if TYPE_CHECKING:
    from tinymim.configs.schema.cache import CacheTeacherRecipe
    from tinymim.configs.schema.recipes import Recipe


def run_recipe(recipe: str | Path, *overrides: str) -> dict[str, Any]:
    """Run a recipe as the command that its `stage:` names.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: fields to set, such as "optim.steps=300", as with `--set`.

    Returns:
        JSON values. For evaluate, finetune and fidelity: the content of the JSON file that they write. For the others:
        `stage`, `folder` (the run folder) and, for cache-teacher, `cache` or `cache_root`. For chain: `steps`, a list
        of these.

    Raises:
        TinymimError: as the command; `str` of it is the message.
    """
    from tinymim.configs.load import load_recipes
    from tinymim.configs.schema.recipes import RECIPES

    [loaded] = load_recipes([Path(recipe)], tuple(RECIPES), overrides)
    from tinymim.stages.run.preflight import preflight

    preflight(loaded)
    report: dict[str, Any] | None = import_module(f"tinymim.stages.{loaded.stage.replace('-', '_')}").run(loaded)
    return _outputs(loaded) if report is None else report


def _outputs(recipe: "Recipe") -> dict[str, Any]:
    """Where the outputs of a recipe are."""
    from tinymim.configs.schema.cache import CacheTeacherRecipe
    from tinymim.configs.schema.chain import ChainRecipe
    from tinymim.stages.run.preflight import load_steps

    if isinstance(recipe, ChainRecipe):
        return {"stage": recipe.stage, "steps": [_outputs(step) for step in load_steps(recipe)]}
    found = {"stage": recipe.stage, "folder": str(recipe.run.folder)}
    if isinstance(recipe, CacheTeacherRecipe):
        places = {"cache": recipe.cache, "cache_root": recipe.cache_root}
        found |= {name: str(place) for name, place in places.items() if place is not None}
    return found


def cache_verify(
    place: str | Path,
    recipe: str | Path | None = None,
    *overrides: str,
    sample: int = 64,
    min_agreement: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Check every byte of a cache; with a recipe also compare records with the teacher's. Writes nothing.

    Args:
        place: the folder or URL of a cache, or of a root that holds exactly one.
        recipe: the recipe that made the cache, a YAML file or the name of a shipped one; None: no teacher runs.
        overrides: fields of the recipe to set, such as "batch_size=8".
        sample: number of records to compute again, spread over the units.
        min_agreement: the smallest share of equal elements that passes, 0 to 1.
        seed: seed of the sample.

    Returns:
        JSON values: `sound`, `findings`, counts and bytes by layer, and with a recipe `deep`, whose `passed` is the
        verdict (None where the bytes are not sound). Damage is data here, not an error.

    Raises:
        RecipeError: the recipe or a number is wrong.
        CacheMismatch: the recipe did not make this cache, or the cache's format is unknown.
        CacheCorrupt: the manifest is damaged, so the rest cannot be checked.
        UserError: there is no cache, no image or no teacher.
    """
    if sample < 1 or not 0 <= min_agreement <= 1:
        got = f"sample {sample}, min_agreement {min_agreement}"
        raise RecipeError("sample or min_agreement is out of range", got=got, expected="at least 1; 0 to 1")
    loaded = None if recipe is None else _cache_recipe(recipe, overrides)
    from tinymim.stages.cache import verify
    from tinymim.stages.run.preflight import require_inputs

    if loaded is not None:
        require_inputs(loaded)
    report = verify.run(place)
    if loaded is not None:
        from tinymim.stages.cache import deep

        report["deep"] = deep.run(loaded, place, sample, min_agreement, seed) if report["sound"] else None
    return report


def cache_repair(recipe: str | Path, *overrides: str) -> dict[str, Any]:
    """Recompute damaged or missing parts of the recipe's cache, and nothing else.

    Args:
        recipe: the recipe that made the cache, a YAML file or the name of a shipped one.
        overrides: fields to set, such as "cache=caches/mine".

    Returns:
        JSON values: what was found, rebuilt, removed and computed again; `left` are findings about other layers.

    Raises:
        CacheMismatch: another recipe made the cache; nothing was changed.
        CacheCorrupt: this recipe cannot recompute the damage.
        UserError: there is no such cache or layer, a writer is active, or as cache-teacher.
        Interrupted: a signal stopped it; the same call continues.
    """
    loaded = _cache_recipe(recipe, overrides)
    from tinymim.stages.run.preflight import preflight

    preflight(loaded)
    from tinymim.stages.cache import repair

    return repair.run(loaded)


def plan(
    *recipes: str | Path,
    overrides: Sequence[str] = (),
    seconds: float = 30.0,
    trainings: int = 1,
    images: int | None = None,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Measure on this machine, and estimate size and time of a cache and of the students that read it.

    Args:
        recipes: one recipe of cache-teacher, and those of train-student that read its cache.
        overrides: fields to set in every recipe that has them, such as "num_views=4".
        seconds: approximate time spent measuring, excluding start-up.
        trainings: number of training runs per student.
        images: number of images of the whole source, if the shards here are only a sample.
        random_weights: measure with a randomly initialised teacher. Times hold; sketch sizes come out too small.

    Returns:
        JSON values: `machine`, `options`, `measured` and `forecast`. Times are in seconds or, where a name ends in
        `_ms`, milliseconds; sizes are in bytes.

    Raises:
        RecipeError: a recipe or number is wrong, or there is not exactly one cache recipe.
        UserError: shards or weights do not exist.
    """
    from tinymim.configs.load import load_recipes
    from tinymim.configs.schema.cache import CacheTeacherRecipe
    from tinymim.configs.schema.train import TrainStudentRecipe

    paths = [Path(recipe) for recipe in recipes]
    loaded = load_recipes(paths, ("cache-teacher", "train-student"), overrides)
    named = [
        (path.name.removesuffix(".yaml"), recipe)
        for path, recipe in zip(paths, loaded, strict=True)
        if isinstance(recipe, CacheTeacherRecipe | TrainStudentRecipe)
    ]
    from tinymim.stages.run.preflight import preflight_plan

    cache, students = preflight_plan(named, random_weights)
    from tinymim.stages import plan as stage

    return stage.run(cache, students, stage.Options(seconds, trainings, images, random_weights))


def views(
    recipe: str | Path, target: str | Path, *overrides: str, images: int = 6, views: int = 8
) -> dict[str, object]:
    """Draw a contact sheet: what teacher and student see of some images.

    Args:
        recipe: a recipe of cache-teacher, pretrain-mae or pretrain.
        target: the page to write, NAME.html; the picture becomes NAME.png.
        overrides: fields to set, such as "views.size=128".
        images: number of images, spread evenly over the shards.
        views: views of each image, from view 0.

    Returns:
        JSON values: `page` and `picture` (files), `law` (in words), `images` and `views` (counts).

    Raises:
        RecipeError: the recipe or a number is wrong, or the target is no page.
        SourceError: bad shards, or no image can be read.
    """
    from tinymim.configs.load import load_recipes
    from tinymim.configs.schema.cache import CacheTeacherRecipe
    from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe

    [loaded] = load_recipes([Path(recipe)], ("cache-teacher", "pretrain-mae", "pretrain"), overrides)
    assert isinstance(loaded, CacheTeacherRecipe | PretrainMaeRecipe | PretrainRecipe)  # `load_recipes` allows no other
    from tinymim.stages import views as stage

    return stage.run(loaded, stage.Options(Path(target), images, views))


def look(
    place: str | Path,
    key: str,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    source: str | Path | None = None,
    students: Sequence[str | Path] = (),
    views: int = 2,
    lines: int = 3,
) -> dict[str, Any]:
    """Draw one image of a cache: its views, its records, the teacher's exact targets and what students answer.

    Args:
        place: the folder or URL of a cache, or of a root that holds exactly one.
        key: the sample key of the image.
        out: the page to write, NAME.html; the picture becomes NAME.png.
        recipe: the recipe that made the cache, for images and teacher.
        overrides: fields of the recipe to set.
        source: the shards, where they are not those of the recipe.
        students: run folders of students whose answers are shown.
        views: most views to show, from the first one.
        lines: most patches of a view to show.

    Returns:
        JSON values: `page` and `picture` (files), `shard`, `views` (indices), `same_pixels`, and `layers` with what is
        shown of each.

    Raises:
        UserError: the cache does not hold the image, or images, teacher or students cannot be read.
        RecipeError: the recipe or a number is wrong, or `out` is no page.
        CacheMismatch: recipe or source are not those of the cache.
    """
    loaded = None if recipe is None else _cache_recipe(recipe, overrides)
    from tinymim.stages import look as stage

    shards = None if source is None else str(source)
    folders = [Path(each) for each in students]
    return stage.run(place, stage.Options(key, Path(out), loaded, shards, folders, views, lines))


def _cache_recipe(recipe: str | Path, overrides: Sequence[str]) -> "CacheTeacherRecipe":
    """The recipe that made a cache."""
    from tinymim.configs.load import load_recipe
    from tinymim.configs.schema.cache import CacheTeacherRecipe

    loaded = load_recipe(Path(recipe), "cache-teacher", overrides)
    assert isinstance(loaded, CacheTeacherRecipe)
    return loaded

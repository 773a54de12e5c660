"""The command `tinymim plan`; no logic. As in cli.py, stages are imported when it runs."""

from typing import Annotated

from cyclopts import Parameter

from tinymim.commands.shared import RecipeArgument, SetOption, print_json, print_text
from tinymim.configs.load import load_recipes
from tinymim.configs.schema import CacheTeacherRecipe, TrainStudentRecipe


def plan(
    recipe: RecipeArgument,
    /,
    *more: RecipeArgument,
    overrides: SetOption = None,
    seconds: float = 30.0,
    trainings: int = 1,
    images: int | None = None,
    price: float = 0.023,
    device_hour: float | None = None,
    random_weights: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure for half a minute, and tell what a cache would cost and save here.

    Name a cache-teacher recipe and the train-student recipes that would read it;
    one kind alone gives its half of the answer. Runs the teacher, the codec, the
    disk, the decoder and the students on some images of the source, and prints for
    the whole run: size of the cache by codec, time of stage one, time of every
    training with the cache and with the teacher beside it, reading and loader
    cores it needs, from how many trainings and epochs the cache pays, what storing
    it costs, and a verdict, which may be "do not cache". Where run.folder holds a
    finished run, forecast and actual stand side by side.

    Reads the recipes, the shards and the teacher's weights; a train-student recipe
    alone also its cache.
    Writes nothing that stays: one unit in a temporary place beside the cache.

    Example: tinymim plan demo-cache demo-wide demo-narrow --seconds 20

    Parameters
    ----------
    overrides
        Set one field in all recipes that have it, e.g. --set num_views=4.
    seconds
        That measuring takes, about; loading and starting come on top.
    trainings
        How often each student will be trained: a search for its settings, say.
    images
        How many the whole source has, where what is at hand is a sample of it.
    price
        Of storing 1 GB (1e9 bytes) for a month.
    device_hour
        Price of an hour of a device; with it the verdict weighs money, too.
    random_weights
        Measure a teacher whose weights are not at hand. Times hold; its sketches come
        out too small, because draws from even rows pack better.
    as_json
        Print JSON instead of text.
    """
    paths = [recipe, *more]
    loaded = load_recipes(paths, ("cache-teacher", "train-student"), overrides or ())
    from tinymim.stages import plan as stage
    from tinymim.stages.pages.plan import format_plan

    named = [
        (path.name.removesuffix(".yaml"), recipe)
        for path, recipe in zip(paths, loaded, strict=True)
        if isinstance(recipe, CacheTeacherRecipe | TrainStudentRecipe)
    ]
    options = stage.Options(seconds, trainings, price, device_hour, images, random_weights)
    result = stage.run(*stage.read_recipes(named), options)
    if as_json:
        print_json(result)
    else:
        print_text(format_plan(result))

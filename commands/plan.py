"""The command `tinymim plan`: flags and help, no logic."""

from typing import Annotated

from cyclopts import Parameter

from tinymim.commands.shared import RecipeArgument, SetOption, print_data


def plan(
    recipe: RecipeArgument,
    /,
    *more: RecipeArgument,
    overrides: SetOption = None,
    seconds: float = 30.0,
    trainings: int = 1,
    images: int | None = None,
    random_weights: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Estimate size and time of a cache and its students on this machine.

    Takes one cache-teacher recipe and the train-student recipes that read its
    cache. Runs teacher, codec, disk, decoder and students on a few images for half
    a minute. Prints for the whole run:
      - size of the cache by codec
      - time of stage one, and of each training run with the cache or with the
        teacher in the loop
      - loader cores needed
      - break-even: number of training runs or epochs from which the cache pays
      - a verdict, which may be "do not cache"

    Reads the recipes, the shards and the teacher's weights.
    Writes one temporary unit beside the cache and removes it.

    Example: tinymim plan demo-cache demo-wide demo-narrow --seconds 20

    Parameters
    ----------
    overrides
        Set one field in every recipe that has it, e.g. --set num_views=4.
    seconds
        Approximate time spent measuring, excluding start-up.
    trainings
        Number of training runs per student, e.g. for a hyperparameter search.
    images
        Number of images of the whole source, if the shards here are only a sample.
    random_weights
        Measure with a randomly initialised teacher. Times hold; sketch sizes come out too small.
    as_json
        Print JSON instead of text.
    """
    from tinymim.api.jobs import plan as measured

    result = measured(
        recipe,
        *more,
        overrides=overrides or (),
        seconds=seconds,
        trainings=trainings,
        images=images,
        random_weights=random_weights,
    )
    from tinymim.stages.pages.plan import format_plan

    print_data(result, format_plan(result), as_json)

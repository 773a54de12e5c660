"""The commands of `tinymim cache`; no logic. As in cli.py, stages are imported by the command that runs them."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tinymim.commands.shared import RecipeArgument, SetOption, print_json, print_text
from tinymim.configs.errors import RecipeError
from tinymim.configs.load import load_recipe
from tinymim.configs.place import parse_place
from tinymim.configs.schema import CacheTeacherRecipe

cache_app = App(
    name="cache",
    help="""Look at caches, check, mend, copy and remove them.

A place is a folder or the URL of one in an object store (s3://bucket/prefix;
credentials from the environment). PATH is a cache, or a root that holds just one.""",
    sort_key=9,
)

PathArgument = Annotated[str, Parameter(name="PATH", help="A cache, or a root that holds just one: a folder or a URL.")]
JsonOption = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]


def _cache_recipe(recipe: Path, overrides: list[str] | None) -> CacheTeacherRecipe:
    loaded = load_recipe(recipe, "cache-teacher", overrides or ())
    assert isinstance(loaded, CacheTeacherRecipe)
    return loaded


@cache_app.command(name="list", sort_key=0)
def cache_list(
    root: Annotated[str, Parameter(name="ROOT", help="Where caches are shared: a folder or a URL.")],
    /,
    *,
    as_json: JsonOption = False,
) -> None:
    """The caches below a root, a line each.

    Reads the manifests and commit records of the caches directly in ROOT, or of
    ROOT itself; writes nothing. A damaged cache is listed with what is wrong.

    Example: tinymim cache list s3://bucket/caches
    """
    from tinymim.stages.cache import list as stage

    place = parse_place(root)
    rows = stage.run(place)
    if as_json:
        print_json(rows)
    else:
        print_text(stage.format_list(rows, place))


@cache_app.command(name="info", sort_key=1)
def cache_info(path: PathArgument, /, *, more_views: int = 10, as_json: JsonOption = False) -> None:
    """What a cache is, how much is there, what it costs, how faithful it is, who made it.

    Reads the manifest, the commit records and their dates of the cache at PATH;
    writes nothing.

    Example: tinymim cache info caches/imagenet-sample --more-views 100

    Parameters
    ----------
    more_views
        Tell the size that so many more views of every image would take.
    """
    from tinymim.stages.cache import info as stage

    if more_views < 1:
        raise RecipeError("--more-views is too small", got=more_views, expected="at least 1")
    info = stage.describe(parse_place(path), more_views)
    if as_json:
        print_json(info)
    else:
        print_text(stage.format_info(info))


@cache_app.command(name="verify", sort_key=2)
def cache_verify(
    path: PathArgument,
    /,
    *,
    deep: Annotated[Path | None, Parameter(name="--deep")] = None,
    overrides: SetOption = None,
    sample: int = 64,
    min_agreement: float = 0.95,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a cache; with --deep also against the teacher.

    Reads all files of the cache at PATH: sizes, digests, decoding, keys, commit
    records, groups, constants, and what belongs to nothing. With --deep also the
    images and teacher of a cache-teacher recipe: a sample of views is drawn,
    rendered and encoded again; box, flip and pixels must be the stored ones, and
    of the codec's elements a share of --min-agreement.
    Writes nothing. Prints all findings; exit code 0 if there are none, else 2.

    Example: tinymim cache verify caches/mine --deep cache.yaml --sample 256

    Parameters
    ----------
    deep
        The recipe that made the cache: a YAML file or the name of a shipped one.
    sample
        Records to make again, spread over the units; with --deep.
    min_agreement
        Least share of equal elements, 0 to 1; with --deep. Other hardware rounds
        a few draws differently, another teacher changes most of them.
    seed
        Another one chooses another sample; with --deep.
    """
    from tinymim.stages.cache import verify as stage

    place = parse_place(path)
    if sample < 1 or not 0 <= min_agreement <= 1:
        got = f"--sample {sample}, --min-agreement {min_agreement}"
        raise RecipeError("--sample or --min-agreement is out of range", got=got, expected="at least 1; 0 to 1")
    if overrides and deep is None:
        raise RecipeError("--set is for the recipe of --deep", hint="add --deep RECIPE")
    recipe = _cache_recipe(deep, overrides) if deep is not None else None
    report = stage.run(place)
    if recipe is not None:
        from tinymim.stages.cache import deep as deep_check

        report["deep"] = deep_check.run(recipe, place, sample, min_agreement, seed) if report["sound"] else None
    if as_json:
        print_json(report)
    else:
        print_text(stage.format_report(report))
    stage.refuse_unsound(report)


@cache_app.command(name="repair", sort_key=3)
def cache_repair(recipe: RecipeArgument, /, *, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Recompute what is damaged or missing in a cache, and nothing else.

    Reads all files of the recipe's cache, the images and the teacher. Refuses a
    recipe that the cache was not made by before it touches anything.
    Writes metadata of groups, the manifest and constants again where they are
    damaged, removes what belongs to nothing and damaged units, and then runs
    cache-teacher for what is missing. The repaired cache has the bytes that it had.

    Example: tinymim cache repair cache.yaml --set cache=caches/mine
    """
    loaded = _cache_recipe(recipe, overrides)
    from tinymim.stages.cache import repair as stage

    report = stage.run(loaded)
    if as_json:
        print_json(report)
    else:
        print_text(stage.format_report(report))


@cache_app.command(name="copy", sort_key=4)
def cache_copy(
    source: Annotated[str, Parameter(name="SRC")],
    target: Annotated[str, Parameter(name="DST")],
    /,
    *,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to a folder or an object store, every byte checked.

    Reads the committed units of SRC and compares every file with its digest.
    Writes DST unit by unit; a stopped copy continues, several at once share the
    work, what is there already stays. The copy has the same bytes. A DST that
    holds another cache is refused.

    Example: tinymim cache copy caches/mine s3://bucket/caches/mine

    Parameters
    ----------
    source
        A cache, or a root that holds just one: a folder or a URL.
    target
        The copy itself (not a root): a new or unfinished one.
    """
    from tinymim.stages.cache import copy as stage

    report = stage.run(parse_place(source), parse_place(target))
    if as_json:
        print_json(report)
    else:
        print_text(stage.format_report(report))


@cache_app.command(name="remove", sort_key=5)
def cache_remove(
    path: Annotated[str, Parameter(name="PATH", help="The cache itself, not a root: a folder or a URL.")],
    /,
    *,
    yes: Annotated[bool, Parameter(name="--yes", negative="")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a cache, and nothing that is not of it.

    Reads the manifest at PATH and lists its files; without --yes it only says what
    would go, and exits with 2. Refuses what is no tinymim cache, and a cache that
    somebody is writing.
    Writes nothing; removes commit records first and the manifest last, so that it
    can be stopped and run again. Files that are not of a cache are named and left.

    Example: tinymim cache remove caches/mine --yes

    Parameters
    ----------
    yes
        Do it.
    """
    from tinymim.stages.cache import remove as stage

    report = stage.run(parse_place(path), yes)
    if as_json:
        print_json(report)
    else:
        print_text(stage.format_report(report))

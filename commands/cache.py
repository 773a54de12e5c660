"""The commands of `tinymim cache`: flags and help, no logic. Each command imports its stage when it runs."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from tinymim.commands.shared import RecipeArgument, SetOption, print_data
from tinymim.configs.errors import RecipeError
from tinymim.configs.place import parse_place

cache_app = App(
    name="cache",
    help="""List, describe, verify, repair, copy, pack and remove caches.

Caches lie in folders or in object stores (s3://bucket/prefix; credentials come
from the environment). PATH is a cache, or a root that holds exactly one. A
packed cache is read like any other. A cache has one layer per target.""",
    sort_key=9,
)

PathArgument = Annotated[
    str, Parameter(name="PATH", help="Folder or URL of a cache, or of a root that holds exactly one.")
]
JsonOption = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]


@cache_app.command(name="list", sort_key=0)
def cache_list(
    root: Annotated[str, Parameter(name="ROOT", help="Folder or URL that holds the caches.")],
    /,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the caches below a root, a line per layer.

    Reads the manifests and the names of files of the caches directly in ROOT, or
    of ROOT itself; writes nothing. A cache that cannot be read is listed with its
    problem.

    Example: tinymim cache list s3://bucket/caches

    """
    from tinymim.stages.cache import list as stage

    rows = stage.run(root)
    print_data(rows, stage.format_list(rows, parse_place(root)), as_json)


@cache_app.command(name="info", sort_key=1)
def cache_info(path: PathArgument, /, *, more_views: int = 10, as_json: JsonOption = False) -> None:
    """Describe a cache: identity, layers, coverage, size, fidelity, authors.

    Reads the manifest, the commit records and their dates; writes nothing. Of a
    cache in format 1 it prints a summary and the line that upgrades it.

    Example: tinymim cache info caches/imagenet-sample --more-views 100

    Parameters
    ----------
    more_views
        Also estimate the size of adding N views per image.
    """
    from tinymim.stages.cache import info as stage

    if more_views < 1:
        raise RecipeError("--more-views is too small", got=more_views, expected="at least 1")
    info = stage.describe(parse_place(path), more_views)
    print_data(info, stage.format_info(info), as_json)


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

    Reads all files of the cache: sizes, digests, decoding, keys, commit records,
    groups, constants, files that belong to nothing, and the layers against one
    another. --deep also reads the images and the teacher: it draws, renders and
    encodes a sample of views of the recipe's layers again. All digests of pixels
    must equal the stored ones, and of the elements of records --min-agreement.
    Writes nothing. Prints all findings. Exit code 0 without findings, else 2.

    Example: tinymim cache verify caches/mine --deep cache.yaml --sample 256

    Parameters
    ----------
    deep
        Recipe that made the cache: a YAML file or the name of a shipped one.
    sample
        Number of records to compute again, spread over the units. Needs --deep.
    min_agreement
        Smallest share of equal elements, 0 to 1. Other hardware rounds a few draws differently. Needs --deep.
    seed
        Seed of the sample. Needs --deep.
    """
    if overrides and deep is None:
        raise RecipeError("--set changes the recipe of --deep", got="--set without --deep", hint="add --deep RECIPE")
    from tinymim.api.jobs import cache_verify as verified

    report = verified(
        parse_place(path), deep, *(overrides or ()), sample=sample, min_agreement=min_agreement, seed=seed
    )
    from tinymim.stages.cache import verify as stage

    print_data(report, stage.format_report(report), as_json)
    stage.refuse_unsound(report)


@cache_app.command(name="repair", sort_key=3)
def cache_repair(recipe: RecipeArgument, /, *, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Recompute damaged or missing parts of a cache, and nothing else.

    Reads all files of the recipe's cache, the images and the teacher. A recipe
    that did not make the cache is refused before anything is touched.
    Writes damaged metadata, manifest, the descriptions of the recipe's layers and
    their constants again, removes stray files and damaged units, then runs
    cache-teacher for the missing units of the view layer and the recipe's layers.
    They get their original bytes. Other layers need their own recipes.

    Example: tinymim cache repair cache.yaml --set cache=caches/mine

    """
    from tinymim.api.jobs import cache_repair as repaired

    report = repaired(recipe, *(overrides or ()))
    from tinymim.stages.cache import repair as stage

    print_data(report, stage.format_report(report), as_json)
    stage.refuse_left(report)


@cache_app.command(name="copy", sort_key=4)
def cache_copy(
    source: Annotated[str, Parameter(name="SRC")],
    target: Annotated[str, Parameter(name="DST")],
    /,
    *,
    layers: Annotated[list[str] | None, Parameter(name="--layer", negative="")] = None,
    to_format: Annotated[Literal[2] | None, Parameter(name="--format")] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to a folder or an object store, checking every byte.

    Reads the committed units of SRC and compares every file with its digest. SRC
    may be a packed cache, which is unpacked.
    Writes DST unit by unit. A stopped copy resumes. Several copies at once share
    the work. Existing units stay. The copy has the same bytes. A DST that holds
    another cache is refused.
    --format 2 upgrades a cache in format 1: records, keys and statistics stay as
    they are, and every unit is read back and compared.

    Example: tinymim cache copy caches/mine s3://bucket/caches/mine

    Parameters
    ----------
    source
        Folder or URL of a cache, or of a root that holds exactly one.
    target
        Folder or URL of the copy itself (not of a root), new or unfinished.
    layers
        Copy this target layer with the view layer, not all of them. May be repeated. An upgraded layer gets this name.
    to_format
        Write this format; needed for a SRC in format 1.
    """
    from tinymim.stages.cache import copy as stage
    from tinymim.stages.cache import upgrade

    if to_format is not None and upgrade.is_old(parse_place(source)):
        if layers and len(layers) > 1:
            raise RecipeError("a cache in format 1 becomes one layer", got=f"--layer {' --layer '.join(layers)}")
        upgraded = upgrade.run(parse_place(source), parse_place(target), layers[0] if layers else None)
        print_data(upgraded, upgrade.format_report(upgraded), as_json)
        return
    report = stage.run(parse_place(source), parse_place(target), layers)
    print_data(report, stage.format_report(report), as_json)


@cache_app.command(name="pack", sort_key=5)
def cache_pack(
    path: PathArgument,
    target: Annotated[str, Parameter(name="DST", help="Folder or URL of the packed cache, new or unfinished.")],
    /,
    *,
    as_json: JsonOption = False,
) -> None:
    """Pack a cache into a few large tars and a card, as for a model hub.

    Reads the committed units and compares every byte with its checksum.
    Writes tars of at most 4 GiB (one file may be larger), their index cache.json
    and the card README.md. Equal caches give equal tars. A stopped pack resumes.
    `cache copy DST elsewhere` unpacks it.

    Example: tinymim cache pack caches/mine packed/mine

    """
    from tinymim.stages.cache import pack as stage

    report = stage.run(parse_place(path), parse_place(target))
    print_data(report, stage.format_report(report), as_json)


@cache_app.command(name="remove", sort_key=6)
def cache_remove(
    path: Annotated[str, Parameter(name="PATH", help="Folder or URL of the cache itself, not of a root.")],
    /,
    *,
    layers: Annotated[list[str] | None, Parameter(name="--layer", negative="")] = None,
    yes: Annotated[bool, Parameter(name="--yes", negative="")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a cache or layers of one, and only files that belong to it.

    Reads the manifest at PATH and lists its files. Without --yes it prints them
    and exits with code 2. Refuses folders that are no tinymim cache, and caches
    with an active writer.
    Writes nothing. Removes commit records first and what describes them last, so a
    stopped removal can be run again. Foreign files are named and left.

    Example: tinymim cache remove caches/mine --layer vit_base-b10-sketch --yes

    Parameters
    ----------
    layers
        Remove this target layer, not the cache. May be repeated.
    yes
        Remove the files.
    """
    from tinymim.stages.cache import remove as stage

    report = stage.run(parse_place(path), yes, layers)
    print_data(report, stage.format_report(report), as_json)

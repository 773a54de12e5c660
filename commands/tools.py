"""The commands outside the usual order: flags and help, no logic. Each command imports its stage when it runs."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from tinymim.commands.shared import RecipeArgument, SetOption, print_data, print_json, print_text
from tinymim.configs import shipped
from tinymim.configs.errors import RecipeError
from tinymim.configs.place import parse_place

tools_app = App()  # cli.py adds its commands to tinymim


@tools_app.command(name="make-shards", sort_key=1)
def make_shards(
    source: Annotated[str, Parameter(name="SRC")],
    target: Annotated[Path, Parameter(name="DST")],
    /,
    *,
    images_per_shard: int = 1000,
    prefix: str = "shard",
    count: int = 2000,
    seed: int = 0,
    resize_short: int = 0,
    quality: int = 95,
    labels: str = "auto",
    prefer: str = "",
    last_dot: bool = False,
    report: Path | None = None,
) -> None:
    """Pack images into webdataset shards with an index, and report what went in.

    Reads SRC: a folder of images, a folder of tars, or the word `drawn` (generated
    textures of ten classes). Links are followed. Class sub-folders give labels,
    and so do .cls members and ImageNet's tar for each class.
    Writes DST: PREFIX-000000.tar, ..., index.members, index.json. Image bytes are
    kept, unless --resize-short shrinks large images; the result is then another
    source, which needs its own caches.
    Reports what was seen, taken and left out and why, classes, sizes, colours,
    and the next commands: on stderr, in index.json, and as a page with --report.
    Prints one line of JSON: num_samples, shards, unreadable.

    Example: tinymim make-shards photos/train shards/train

    Parameters
    ----------
    source
        Folder of images, folder of tars, or `drawn`.
    target
        New or empty folder.
    images_per_shard
        Images per tar.
    prefix
        First part of the tars' names.
    count
        Number of images to draw; only if SRC is `drawn`.
    seed
        Seed of the drawn images; only if SRC is `drawn`.
    resize_short
        Shrink images to this short side in pixels and encode them as JPEG. 0: keep all.
    quality
        JPEG quality of resized images, 1 to 100.
    labels
        `folders`: class sub-folders; `tars`: a tar for each class; `json:FIELD` or `txt`:
        a number or name in KEY.json or KEY.txt; `none`. `auto` reads folders and .cls,
        and stops where the choice is yours.
    prefer
        Ending of the image to take where a sample of a tar has several, e.g. jpg.
    last_dot
        End keys in tars at the last dot: a.1.jpg and a.2.jpg are then two images.
    report
        Also write the report as an HTML page to this file.
    """
    from tinymim.stages import make_shards as stage

    options = stage.Options(
        images_per_shard, prefix, count, seed, resize_short, quality, labels, prefer, last_dot, report
    )
    index = stage.run(source, target, options)
    summary = {
        "num_samples": index["num_samples"],
        "shards": len(index["shards"]),
        "unreadable": len(index["unreadable"]),
    }
    print_text(json.dumps(summary))


@tools_app.command(name="views", sort_key=7)
def show_views(
    recipe: RecipeArgument,
    target: Annotated[Path, Parameter(name="FILE")],
    /,
    *,
    overrides: SetOption = None,
    images: int = 6,
    views: int = 8,
) -> None:
    """Draw a contact sheet: what teacher and student see of some images.

    Shows every view with its box, flip, operations and, in masked pre-training,
    mask.

    Reads a recipe of cache-teacher, pretrain-mae or pretrain, and its shards.
    Writes FILE, a self-contained page, and a picture of the same name, .png.
    Prints JSON: page, picture, law, images, views.

    Example: tinymim views demo-cache views.html --images 4

    Parameters
    ----------
    target
        The page to write, NAME.html; the picture becomes NAME.png.
    images
        Number of images, spread evenly over the shards.
    views
        Views of each image, from view 0.
    """
    from tinymim.api.jobs import views as drawn

    print_json(drawn(recipe, target, *(overrides or ()), images=images, views=views))


@tools_app.command(name="look", sort_key=7)
def look(
    cache: Annotated[str, Parameter(name="CACHE", help="Folder or URL of a cache, or of a root that holds one.")],
    /,
    *,
    key: str,
    out: Path = Path("look.html"),
    recipe: Path | None = None,
    overrides: SetOption = None,
    source: str | None = None,
    students: Annotated[list[Path] | None, Parameter(name="--student", negative="")] = None,
    views: int = 2,
    lines: int = 3,
) -> None:
    """Show one image of a cache: its views, its records, and what students say.

    Draws relations, attention, features, classes: the teacher's exact target, the
    decoded record, and the student's answer beside one another.

    Reads the cache, with --source the images, with --recipe also the teacher, and
    the training states of the students. Compares pixels with the stored digests.
    Writes a self-contained page, and a picture of the same name, .png.
    Prints JSON: page, picture, shard, views, same_pixels, layers.

    Example: tinymim look caches/mine --key cats/001 --recipe cache.yaml

    Parameters
    ----------
    key
        Key of the image: its name in the tar without the ending.
    out
        The page to write, NAME.html; the picture becomes NAME.png.
    recipe
        Recipe that made the cache, for images and teacher: a YAML file or the name of a shipped one.
    source
        Folder or URL of the shards. Default: those of --recipe.
    students
        Run folder of a student, whose answers are shown. May be repeated.
    views
        Most views to show, from the first one.
    lines
        Most patches of a view to show.
    """
    if overrides and recipe is None:
        raise RecipeError("--set changes the recipe of --recipe", got="--set without --recipe")
    from tinymim.api.jobs import look as drawn

    report = drawn(
        parse_place(cache),
        key,
        out,
        recipe=recipe,
        overrides=overrides or (),
        source=source,
        students=students or (),
        views=views,
        lines=lines,
    )
    print_json(report)


@tools_app.command(name="export", sort_key=7)
def export(
    source: Annotated[Path, Parameter(name="RUN")],
    target: Annotated[Path, Parameter(name="FILE")],
    /,
    *,
    to: Literal["mae", "timm", "onnx", "torch-export", "transformers"] = "mae",
) -> None:
    """Export weights for other code: MAE, timm, ONNX, torch.export, Transformers.

    Reads RUN: the run folder of a finished train-student, pretrain-mae or finetune
    (for several students: the folder of one), or a weights file.
    Writes FILE, a new file or folder:
      mae           FILE.pth for main_finetune.py of MAE and TinyMIM
      timm          a folder for timm's local-dir:, like RUN/student
      onnx          FILE.onnx; needs tinymim[onnx]
      torch-export  FILE.pt2 for torch.export.load
      transformers  a folder for Transformers' ViTModel
    Each but mae is loaded again and compared with timm, if its runtime is there.
    Prints JSON about the file: docs/export.md.

    Example: tinymim export runs/mine mine.onnx --to onnx

    Parameters
    ----------
    source
        Run folder or weights file.
    target
        File or folder to write.
    to
        Format of FILE.
    """
    from tinymim.stages import export as stage

    print_json(stage.run(source, target, to))


@tools_app.command(name="recipes", sort_key=8)
def show_recipes(name: Annotated[str | None, Parameter(name="NAME")] = None, /, *, fields: str | None = None) -> None:
    """List the shipped recipes, print one of them, or explain the fields of a recipe.

    Reads the recipes inside the package; writes nothing.

    Example: tinymim recipes demo-teacher > mine.yaml

    Parameters
    ----------
    name
        Print this recipe as YAML. Without it, list all names.
    fields
        Explain every field of the recipe of this command, e.g. train-student, or of `all`.
    """
    if fields is None:
        print_text(shipped.listing() if name is None else shipped.text(name).rstrip("\n"))
        return
    from tinymim.configs import fields as explained

    if name is not None:
        raise RecipeError("NAME and --fields exclude each other", got=f"{name} and --fields {fields}")
    print_text(explained.text(fields).rstrip("\n"))


@tools_app.command(name="demo", sort_key=0)
def demo(*, folder: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Run the whole pipeline on generated images; works offline.

    Reads only the package.
    Writes shards, one cache, two students and report.html into FOLDER, and prints
    the path of the report.

    Example: tinymim demo --folder runs/demo

    Parameters
    ----------
    folder
        Folder for all results.
    seed
        Seed of views, sketches, students and training. Images and teacher stay the same.
    """
    from tinymim.stages import demo as stage

    stage.run(folder, seed)


@tools_app.command(name="live", sort_key=7)
def live(
    *places: Annotated[str, Parameter(name="PLACE", help="Run folders, caches, or folders or URLs of them.")],
    port: int = 8360,
    host: str = "127.0.0.1",
    every: float = 5.0,
) -> None:
    """Serve a web page of running and finished jobs, until Ctrl-C.

    Shows progress and time left, what limits a run, losses, audits and alarms,
    where time goes, the units and writers of a cache, and the age of heartbeats.
    Anyone who can read the folders can open it, also from another machine.

    Reads run folders and caches at the places and up to two folders below, also in
    object stores. Without PLACE, reads runs and caches here. Writes nothing.
    Prints the address of the page.

    Example: tinymim live runs s3://bucket/caches

    Parameters
    ----------
    port
        Port to listen on; 0 takes any free one.
    host
        Address to listen on. The default is reached from this machine alone.
    every
        Seconds between two updates of the page.
    """
    if not 0 <= port < 65536 or not 0.2 <= every <= 3600:
        got = f"--port {port}, --every {every:g}"
        raise RecipeError("--port or --every is out of range", got=got, expected="0 to 65535; 0.2 to 3600")
    from tinymim.stages import live as stage

    stage.run(places, host, port, every)


@tools_app.command(name="doctor", sort_key=8)
def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Check this machine: versions, GPUs, decoders, limits, disk, weights hub.

    Reads the machine and makes one connection to the hub, for 5 seconds at most.
    Compares the pixels that the decoders and operations make with recorded
    digests.
    Writes nothing. Prints one table, and what to do about each finding. Exit code
    0 if nothing failed, also with warnings, such as an unreachable hub; else 2.

    Example: tinymim doctor

    Parameters
    ----------
    as_json
        Print JSON instead of the table.
    """
    from tinymim.stages import doctor as stage

    findings = stage.run()
    print_data(stage.as_json(findings), stage.as_text(findings), as_json)
    stage.refuse_failed(findings)

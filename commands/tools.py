"""The commands that take no recipe; no logic. Stages are imported by the command that runs them."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tinymim.commands.shared import print_json, print_text
from tinymim.configs import shipped
from tinymim.configs.errors import RecipeError

tools_app = App()  # its commands become tinymim's own


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
) -> None:
    """Images -> webdataset shards and an index.

    Reads SRC: a folder of images (class sub-folders give labels, a flat folder
    none), a folder of tars, or the word `drawn`: textures of ten classes.
    Writes DST: PREFIX-000000.tar, ..., index.json. Image bytes are kept as they
    are, unless --resize-short makes large images smaller: that is another source,
    with caches of its own. Unreadable images are listed in the index and left out.
    Prints one line of JSON: num_samples, shards, unreadable.

    Example: tinymim make-shards photos/train shards/train

    Parameters
    ----------
    source
        Folder of images or tars, or `drawn`.
    target
        New or empty folder.
    images_per_shard
        Images in one tar.
    prefix
        First part of the tars' names.
    count
        Images to draw; for SRC = drawn only.
    seed
        Seed of the drawn set; for SRC = drawn only.
    resize_short
        Images with a longer short side are resized to it, in pixels, and encoded
        as JPEG; 0: none.
    quality
        JPEG quality of the resized images, 1 to 100.
    """
    from tinymim.stages import make_shards as stage

    index = stage.run(source, target, stage.Options(images_per_shard, prefix, count, seed, resize_short, quality))
    summary = {
        "num_samples": index["num_samples"],
        "shards": len(index["shards"]),
        "unreadable": len(index["unreadable"]),
    }
    print_text(json.dumps(summary))


@tools_app.command(name="export", sort_key=7)
def export(source: Annotated[Path, Parameter(name="RUN")], target: Annotated[Path, Parameter(name="FILE")], /) -> None:
    """Weights -> a .pth as the code of MAE and TinyMIM reads it.

    Reads RUN: the folder of a finished train-student or pretrain-mae (of several
    students: the folder of one), or a file, such as its student-ema.safetensors.
    Writes FILE, a new .pth for `--finetune` of MAE's and TinyMIM's
    main_finetune.py: float32 tensors under `model`. timm needs no export, it loads
    student.safetensors as it is.
    Prints JSON: file, source, tensors, embed_dim, depth, num_heads.

    Example: tinymim export runs/mine mine.pth

    Parameters
    ----------
    source
        Run folder or weights.
    target
        The file to write.
    """
    from tinymim.stages import export as stage

    print_json(stage.run(source, target))


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
        Print every field of this command's recipe with default and meaning; `all`
        prints the fields of all commands.
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
    """All of it on drawn images: one teacher, one cache, two students, a report.

    Reads nothing but the package; needs no network.
    Writes FOLDER with shards, cache, students and report.html, and prints the
    path of the report.

    Example: tinymim demo --folder runs/demo

    Parameters
    ----------
    folder
        Where everything goes.
    seed
        Seed of views, sketches, students and training; images and teacher stay.
    """
    from tinymim.stages import demo as stage

    stage.run(folder, seed)

"""Commands, flags and error printing; no logic. Stages are imported by the command that runs them: help is instant."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from tinymim import __version__
from tinymim.cli_cache import cache_app
from tinymim.cli_compare import compare
from tinymim.cli_plan import plan
from tinymim.cli_shared import StdoutClosed, print_json, print_text
from tinymim.cli_stages import stages_app
from tinymim.configs import shipped
from tinymim.configs.errors import TinymimError, is_refusal
from tinymim.stages.run.interrupt import Interrupted

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM with all saved, the same command continues
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

app = App(
    name="tinymim",
    version=f"tinymim {__version__}",
    help="""Distil one large masked-image-modelling ViT into many small ones, and pay
for the large one once.

In order of use:
  tinymim demo                      all of it on drawn images, without a network
  tinymim make-shards photos shards      1. images -> shards
  tinymim cache-teacher RECIPE           2. the teacher over every view, once
  tinymim train-student RECIPE           3. as many students as you like
  tinymim evaluate RECIPE                4. k-NN and linear probe
  tinymim finetune RECIPE                   top-1 with a head, end to end
  tinymim fidelity RECIPE                   which codec, before you cache
  tinymim plan RECIPES                      what it costs and saves, before
  tinymim compare RUN RUN                   runs side by side, afterwards
  tinymim export RUN FILE.pth               for MAE's and TinyMIM's own code
  tinymim cache --help                      list, check, mend, copy caches

RECIPE is a YAML file or the name of a shipped recipe (see `tinymim recipes`).""",
    help_format="plaintext",
    help_epilogue="--debug, anywhere on the line: show the traceback of an error.",
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(cache_app)
app.command(stages_app, name="*")
app.command(plan, name="plan", sort_key=7)
app.command(compare, name="compare", sort_key=7)


# ---------------------------------------------------------------- commands


@app.command(name="make-shards", sort_key=1)
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


@app.command(name="export", sort_key=7)
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


@app.command(name="recipes", sort_key=8)
def show_recipes(name: Annotated[str | None, Parameter(name="NAME")] = None, /) -> None:
    """List the shipped recipes, or print one of them.

    Reads the recipes inside the package; writes nothing.

    Example: tinymim recipes demo-teacher > mine.yaml

    Parameters
    ----------
    name
        The recipe whose YAML is printed; without it, all names.
    """
    print_text(shipped.listing() if name is None else shipped.text(name).rstrip("\n"))


@app.command(name="demo", sort_key=0)
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


# ---------------------------------------------------------------- output and errors


def _say(text: str) -> None:
    """A message, to stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; every error becomes a message on stderr and an exit code."""
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], print_error=False, exit_on_error=False)
        return 0
    except StdoutClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes into the pipe at exit
        return EXIT_BROKEN_PIPE
    except Interrupted as interrupted:
        _say(f"interrupted: {interrupted}")
        return EXIT_REQUEUE if interrupted.requeue else EXIT_INTERRUPTED
    except KeyboardInterrupt:
        _say("interrupted: stopped at once; the last saved state is intact")
        return EXIT_INTERRUPTED
    except CycloptsError as error:
        _say(f"error: {error}\n  hint: tinymim --help, or tinymim COMMAND --help, shows what there is")
        return EXIT_USAGE
    except Exception as error:
        if debug:
            _say(traceback.format_exc().rstrip())
        message, code = _explained(error)
        _say(message)
        return code


def _explained(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, TinymimError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and is_refusal(error):
        return f"error: {error.strerror}: {error.filename or 'a file of the run'}", EXIT_USAGE
    hint = "run the same command with --debug for the traceback, and report it"
    return f"internal error: {type(error).__name__}: {error}\n  hint: {hint}", 1


def main() -> None:
    """The entry point of the `tinymim` command."""
    # Threads of an operation that wait for one another sleep instead of spinning: on cores shared with loader workers
    # or other work, spinning cost 3.5x the CPU time (docs/log.md). Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run_command(sys.argv[1:]))

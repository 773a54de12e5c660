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
from tinymim.cli_shared import RecipeArgument, SetOption, StdoutClosed, print_json, print_text
from tinymim.configs.errors import TinymimError, is_refusal
from tinymim.configs.load import load_recipe
from tinymim.configs.schema import (
    CacheTeacherRecipe,
    ChainRecipe,
    EvaluateRecipe,
    FidelityRecipe,
    FinetuneRecipe,
    PretrainMaeRecipe,
    TrainStudentRecipe,
)
from tinymim.stages import recipes
from tinymim.stages.interrupt import Interrupted

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
app.command(plan, name="plan", sort_key=7)
app.command(compare, name="compare", sort_key=7)


def _help(text: str, stage: str) -> str:
    return f"{text}\n\nShipped recipes: {', '.join(recipes.names_for(stage)) or 'none'}."


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


@app.command(
    name="pretrain-mae",
    sort_key=2,
    help=_help(
        """Make a teacher, or a baseline student, from images alone (masked autoencoder).

Reads the shards of `source`.
Writes run.folder: encoder.safetensors (a timm ViT without head), metrics.jsonl,
TensorBoard, the resolved recipe and versions, and state-STEP.pt, from which the
same command continues. On several GPUs with --set workers=N.

Example: tinymim pretrain-mae demo-teacher --set optim.steps=200""",
        "pretrain-mae",
    ),
)
def pretrain_mae(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "pretrain-mae", overrides or ())
    assert isinstance(loaded, PretrainMaeRecipe)
    from tinymim.stages import pretrain_mae as stage

    stage.run(loaded)


@app.command(
    name="cache-teacher",
    sort_key=3,
    help=_help(
        """Run the teacher once over every view and store sketches of its relations.

Reads the shards of `source` and the teacher's weights.
Writes the folder `cache` (docs/cache-format.md) and run.folder. What is committed
stays: a stopped run continues, a larger num_views or more shards add to it,
another teacher or view law is refused.

Example: tinymim cache-teacher imagenet-sample-cache --set num_views=4""",
        "cache-teacher",
    ),
)
def cache_teacher(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "cache-teacher", overrides or ())
    assert isinstance(loaded, CacheTeacherRecipe)
    from tinymim.stages import cache_teacher as stage

    stage.run(loaded)


@app.command(
    name="train-student",
    sort_key=4,
    help=_help(
        """Train one student, or several, from a cache and its images; no teacher needed.

Reads `cache` and the shards of `source`.
Writes run.folder: student.safetensors (loads into timm with strict=True),
trained.json (which tensors were trained), metrics.jsonl, TensorBoard, the
resolved recipe and versions, and state-STEP.pt, from which the same command
continues; of `students` into a folder each; with `audit` audit.jsonl. On several GPUs with --set workers=N.

Example: tinymim train-student imagenet-sample-student --set optim.steps=600""",
        "train-student",
    ),
)
def train_student(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "train-student", overrides or ())
    assert isinstance(loaded, TrainStudentRecipe)
    from tinymim.stages import train_student as stage

    stage.run(loaded)


@app.command(
    name="chain",
    sort_key=6,
    help=_help(
        """Commands one after the other: a teacher's cache, its student, the student's cache, ...

Reads and writes what the recipes of its `steps` do. All of them are read and
checked before the first begins; each step goes on from where it stopped, so the
same command continues the chain.

Example: tinymim chain imagenet-tinymim-chain --set set=[source.shards=shards/mine]""",
        "chain",
    ),
)
def chain(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "chain", overrides or ())
    assert isinstance(loaded, ChainRecipe)
    from tinymim.stages import chain as stage

    stage.run(loaded)


@app.command(
    name="evaluate",
    sort_key=5,
    help=_help(
        """k-NN and linear probe of a frozen encoder on labelled shards.

Reads the shards of `train` and `val`, and `weights`: a file, `hub`, `package:NAME`
or `random`.
Writes run.folder with evaluation.json, and prints the same JSON.

Example: tinymim evaluate tinyimagenet40-eval --set weights=random""",
        "evaluate",
    ),
)
def evaluate(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "evaluate", overrides or ())
    assert isinstance(loaded, EvaluateRecipe)
    from tinymim.stages import evaluate as stage

    print_json(stage.run(loaded))


@app.command(
    name="finetune",
    sort_key=5,
    help=_help(
        """Fine-tune an encoder with a new head on labels: top-1, top-5, confusion.

Reads the shards of `train` and `val`, and `weights`: a file (a student, an
encoder of pretrain-mae, an official MAE .pth, another fine-tuning), `hub`,
`package:NAME`, or `random` for training from scratch. Weights that do not exist
or do not fit are an error that lists missing and unexpected keys.
Writes run.folder: last.safetensors and best.safetensors (by top-1 on `val`),
which load into timm with strict=True, finetuned.json (scores, confusion),
metrics.jsonl, TensorBoard, the resolved recipe and versions, and state-STEP.pt,
from which the same command continues. On several GPUs with --set workers=N.
Prints finetuned.json without history and classes.

Example: tinymim finetune tinyimagenet40-finetune --set optim.epochs=2""",
        "finetune",
    ),
)
def finetune(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "finetune", overrides or ())
    assert isinstance(loaded, FinetuneRecipe)
    from tinymim.stages import finetune as stage

    report = stage.run(loaded)
    if report is not None:
        print_json({name: value for name, value in report.items() if name not in ("history", "classes_of_best")})


@app.command(
    name="fidelity",
    sort_key=6,
    help=_help(
        """Compare codecs: what each does to a student's gradient, and what it costs.

Runs the teacher over some views, encodes them with every codec in `codecs`, and
compares the gradient of the student (at its start, and of the run folder
`student_state` if given) with the one under the dense relation maps: bias with
its standard error, noise ratio (added / image-to-image variance), angle, norm;
bytes per view, time to encode and decode. Choose what you cache by it.
Reads the shards of `source` and the teacher's weights.
Writes run.folder with fidelity.json (per relation and head) and frontier.png,
and prints the tables.

Example: tinymim fidelity imagenet-sample-fidelity --set num_images=16""",
        "fidelity",
    ),
)
def fidelity(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
    loaded = load_recipe(recipe, "fidelity", overrides or ())
    assert isinstance(loaded, FidelityRecipe)
    from tinymim.stages import fidelity as stage

    print_text(stage.run(loaded))


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
    print_text(recipes.listing() if name is None else recipes.text(name).rstrip("\n"))


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

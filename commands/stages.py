"""The commands that take one recipe; no logic. As in cli.py, stages are imported by the command that runs them."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from cyclopts import App
from pydantic import BaseModel

from tinymim.commands.shared import RecipeArgument, SetOption, print_json, print_text
from tinymim.configs import shipped
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

stages_app = App()  # its commands become tinymim's own

R = TypeVar("R", bound=BaseModel)


def _recipe_command(name: str, kind: type[R], *, sort_key: int) -> Callable[[Callable[[R], None]], Callable[[R], None]]:
    """Make a function of a loaded recipe `tinymim NAME RECIPE [--set key=value]`, its docstring the help."""

    def register(run: Callable[[R], None]) -> Callable[[R], None]:
        def command(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
            loaded = load_recipe(recipe, name, overrides or ())
            assert isinstance(loaded, kind)
            run(loaded)

        names = ", ".join(shipped.names_for(name)) or "none"
        text = f"{inspect.getdoc(run)}\n\nShipped recipes: {names}."
        stages_app.command(command, name=name, sort_key=sort_key, help=text)
        return run

    return register


@_recipe_command("pretrain-mae", PretrainMaeRecipe, sort_key=2)
def pretrain_mae(recipe: PretrainMaeRecipe) -> None:
    """Make a teacher, or a baseline student, from images alone (masked autoencoder).

    Reads the shards of `source`.
    Writes run.folder: encoder.safetensors (a timm ViT without head), metrics.jsonl,
    TensorBoard, the resolved recipe and versions, and state-STEP.pt, from which the
    same command continues. On several GPUs with --set workers=N.

    Example: tinymim pretrain-mae demo-teacher --set optim.steps=200
    """
    from tinymim.stages import pretrain_mae as stage

    stage.run(recipe)


@_recipe_command("cache-teacher", CacheTeacherRecipe, sort_key=3)
def cache_teacher(recipe: CacheTeacherRecipe) -> None:
    """Run the teacher once over every view and store sketches of its relations.

    Reads the shards of `source` and the teacher's weights.
    Writes the folder `cache` (docs/cache-format.md) and run.folder. What is committed
    stays: a stopped run continues, a larger num_views or more shards add to it,
    another teacher or view law is refused.

    Example: tinymim cache-teacher imagenet-sample-cache --set num_views=4
    """
    from tinymim.stages import cache_teacher as stage

    stage.run(recipe)


@_recipe_command("train-student", TrainStudentRecipe, sort_key=4)
def train_student(recipe: TrainStudentRecipe) -> None:
    """Train one student, or several, from a cache and its images; no teacher needed.

    Reads `cache` and the shards of `source`.
    Writes run.folder: student.safetensors (loads into timm with strict=True),
    trained.json (which tensors were trained), metrics.jsonl, TensorBoard, the
    resolved recipe and versions, and state-STEP.pt, from which the same command
    continues; of `students` into a folder each; with `audit` audit.jsonl. On several GPUs with --set workers=N.

    Example: tinymim train-student imagenet-sample-student --set optim.steps=600
    """
    from tinymim.stages import train_student as stage

    stage.run(recipe)


@_recipe_command("chain", ChainRecipe, sort_key=6)
def chain(recipe: ChainRecipe) -> None:
    """Commands one after the other: a teacher's cache, its student, the student's cache, ...

    Reads and writes what the recipes of its `steps` do. All of them are read and
    checked before the first begins; each step goes on from where it stopped, so the
    same command continues the chain.

    Example: tinymim chain imagenet-tinymim-chain --set set=[source.shards=shards/mine]
    """
    from tinymim.stages import chain as stage

    stage.run(recipe)


@_recipe_command("evaluate", EvaluateRecipe, sort_key=5)
def evaluate(recipe: EvaluateRecipe) -> None:
    """k-NN and linear probe of a frozen encoder on labelled shards.

    Reads the shards of `train` and `val`, and `weights`: a file, `hub`, `package:NAME`
    or `random`.
    Writes run.folder with evaluation.json, and prints the same JSON.

    Example: tinymim evaluate tinyimagenet40-eval --set weights=random
    """
    from tinymim.stages import evaluate as stage

    print_json(stage.run(recipe))


@_recipe_command("finetune", FinetuneRecipe, sort_key=5)
def finetune(recipe: FinetuneRecipe) -> None:
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

    Example: tinymim finetune tinyimagenet40-finetune --set optim.epochs=2
    """
    from tinymim.stages import finetune as stage

    report = stage.run(recipe)
    if report is not None:
        print_json({name: value for name, value in report.items() if name not in ("history", "classes_of_best")})


@_recipe_command("fidelity", FidelityRecipe, sort_key=6)
def fidelity(recipe: FidelityRecipe) -> None:
    """Compare codecs: what each does to a student's gradient, and what it costs.

    Runs the teacher over some views, encodes them with every codec in `codecs`, and
    compares the gradient of the student (at its start, and of the run folder
    `student_state` if given) with the one under the dense relation maps: bias with
    its standard error, noise ratio (added / image-to-image variance), angle, norm;
    bytes per view, time to encode and decode. Choose what you cache by it.
    Reads the shards of `source` and the teacher's weights.
    Writes run.folder with fidelity.json (per relation and head) and frontier.png,
    and prints the tables.

    Example: tinymim fidelity imagenet-sample-fidelity --set num_images=16
    """
    from tinymim.stages import fidelity as stage

    print_text(stage.run(recipe))

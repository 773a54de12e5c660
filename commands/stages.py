"""The commands that take one recipe: help texts, no logic. Each command imports its stage when it runs."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from cyclopts import App

from tinymim.commands.shared import RecipeArgument, SetOption, print_json, print_text
from tinymim.configs import shipped

if TYPE_CHECKING:
    # At run time by `load_recipe` alone: building the schema takes longer than printing a help.
    from tinymim.configs.schema.cache import CacheTeacherRecipe
    from tinymim.configs.schema.chain import ChainRecipe
    from tinymim.configs.schema.evaluate import EvaluateRecipe
    from tinymim.configs.schema.fidelity import FidelityRecipe
    from tinymim.configs.schema.finetune import FinetuneRecipe
    from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
    from tinymim.configs.schema.recipes import Recipe
    from tinymim.configs.schema.train import TrainStudentRecipe

stages_app = App()  # cli.py adds its commands to tinymim

R = TypeVar("R", bound="Recipe")


def _recipe_command(name: str, *, sort_key: int) -> Callable[[Callable[[R], None]], Callable[[R], None]]:
    """Turn a function of a loaded recipe into `tinymim NAME RECIPE [--set key=value]`; its docstring is the help."""

    def register(run: Callable[[R], None]) -> Callable[[R], None]:
        def command(recipe: RecipeArgument, /, *, overrides: SetOption = None) -> None:
            from tinymim.configs.load import load_recipe

            loaded = load_recipe(recipe, name, overrides or ())
            from tinymim.stages.run.preflight import preflight

            preflight(loaded)
            run(cast("R", loaded))  # `name` decides the kind of recipe

        names = ", ".join(shipped.names_by_stage().get(name, ["none"]))
        text = f"{inspect.getdoc(run)}\n\nShipped recipes: {names}."
        stages_app.command(command, name=name, sort_key=sort_key, help=text)
        return run

    return register


@_recipe_command("pretrain-mae", sort_key=2)
def pretrain_mae(recipe: "PretrainMaeRecipe") -> None:
    """Train a teacher from images alone, as a masked autoencoder.

    Also serves as the baseline of a student.

    Reads the shards of `source`.
    Writes run.folder: encoder.safetensors (a timm ViT without head), the folder
    encoder (the same for timm's local-dir:), metrics.jsonl, TensorBoard, the
    resolved recipe, versions, and state-STEP.pt for resume. The same command
    resumes. --set workers=N trains on N GPUs.

    Example: tinymim pretrain-mae demo-teacher --set optim.steps=200
    """
    from tinymim.stages import pretrain as stage

    stage.run(recipe)


@_recipe_command("pretrain", sort_key=2)
def pretrain(recipe: "PretrainRecipe") -> None:
    """Train any model from images alone, by what it predicts of hidden squares.

    FastMIM, SimMIM and MAE for ViT, Swin, Hiera, PVT, ConvNeXt and others
    (docs/pretrain.md). Hidden patches predict HOG or pixels. To predict a
    teacher's tokens: train-student with `mask`, e.g. tinyimagenet40-masked.

    Reads the shards of `source`.
    Writes run.folder as pretrain-mae does. The same command resumes.
    --set workers=N trains on N GPUs.

    Example: tinymim pretrain tinyimagenet40-fastmim-64 --set optim.steps=200
    """
    from tinymim.stages import pretrain as stage

    stage.run(recipe)


@_recipe_command("cache-teacher", sort_key=3)
def cache_teacher(recipe: "CacheTeacherRecipe") -> None:
    """Run the teacher once over every view and store its targets in a cache.

    Reads the shards of `source` and the teacher's weights.
    Writes `cache` (format: docs/cache-format.md) and run.folder. The same command
    resumes. A larger num_views or more shards add to the cache, and so do further
    layers of any teacher. Another view law is refused, and so is another teacher
    or codec under the name of a layer that is there.

    Example: tinymim cache-teacher imagenet-sample-cache --set num_views=4
    """
    from tinymim.stages import cache_teacher as stage

    stage.run(recipe)


@_recipe_command("train-student", sort_key=4)
def train_student(recipe: "TrainStudentRecipe") -> None:
    """Train one student or several from a cache, without the teacher.

    Reads `cache` and the shards of `source`.
    Writes run.folder, or one folder per student: student.safetensors, the folder
    student (timm loads it as local-dir:RUN/student), trained.json (names of
    trained tensors), metrics.jsonl, TensorBoard, the resolved recipe, versions,
    audit.jsonl if `audit` is set, and state-STEP.pt for resume. The same command
    resumes. --set workers=N trains on N GPUs.

    Example: tinymim train-student imagenet-sample-student --set optim.steps=600

    """
    from tinymim.stages import train_student as stage

    stage.run(recipe)


@_recipe_command("chain", sort_key=6)
def chain(recipe: "ChainRecipe") -> None:
    """Run several commands in order; a student may become the next teacher.

    Reads and writes the files of each step. All recipes are checked before the
    first step starts. Each step resumes, so the same command resumes the chain.

    Example: tinymim chain imagenet-tinymim-chain --set set=[source.shards=mine]
    """
    from tinymim.stages import chain as stage

    stage.run(recipe)


@_recipe_command("evaluate", sort_key=5)
def evaluate(recipe: "EvaluateRecipe") -> None:
    """Evaluate a frozen model: k-NN, linear probe, its own classifier, throughput.

    Reads the shards of `train` and `val` where an evaluator needs them, and
    `weights`: a file, `hub`, `package:NAME` or `random`.
    Writes evaluation.json into run.folder and prints the same JSON.

    Example: tinymim evaluate tinyimagenet40-eval --set weights=random
    """
    from tinymim.stages import evaluate as stage

    print_json(stage.run(recipe))


@_recipe_command("finetune", sort_key=5)
def finetune(recipe: "FinetuneRecipe") -> None:
    """Fine-tune an encoder and a new head on labelled images.

    Reads the shards of `train` and `val`, and `weights`: a file (a student, an
    encoder of pretrain-mae, an official MAE .pth, a fine-tuned model), `hub`,
    `package:NAME`, or `random` to train from scratch. If weights do not fit, the
    error lists missing and unexpected keys.
    Writes run.folder: last.safetensors and best.safetensors (by top-1 on `val`),
    both also as folders that timm loads by local-dir:; finetuned.json (top-1,
    top-5, confusion), metrics.jsonl, TensorBoard, the resolved recipe, versions,
    and state-STEP.pt for resume. The same command resumes. --set workers=N trains
    on N GPUs.
    Prints finetuned.json without history and classes.

    Example: tinymim finetune tinyimagenet40-finetune --set optim.epochs=2
    """
    from tinymim.stages import finetune as stage

    report = stage.run(recipe)
    if report is not None:
        print_json({name: value for name, value in report.items() if name not in ("history", "classes_of_best")})


@_recipe_command("fidelity", sort_key=6)
def fidelity(recipe: "FidelityRecipe") -> None:
    """Compare codecs: their effect on a student's gradient, and their cost.

    Runs the teacher on a few views and encodes them with every codec in `codecs`.
    Compares the student's gradient with the one under dense relations: bias with
    standard error, noise ratio (added / image-to-image variance), angle, norm.
    Also reports bytes per view and the time to encode and decode. `student_state`
    adds a trained student to the untrained one.
    Reads the shards of `source` and the teacher's weights.
    Writes run.folder with fidelity.json (per relation and head) and frontier.png,
    and prints the tables.

    Example: tinymim fidelity imagenet-sample-fidelity --set num_images=16

    """
    from tinymim.stages import fidelity as stage
    from tinymim.stages.pages.fidelity import format_tables

    print_text(format_tables(stage.run(recipe)))

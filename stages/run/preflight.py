"""Check the inputs of a recipe on disk, before the import of torch, which takes seconds.

The stages check all of it again, by the same functions.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinymim.configs.errors import CheckpointError, RecipeError, TinymimError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.chain import ChainRecipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.fidelity import FidelityRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.configs.schema.recipes import Recipe, RunRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import FACTORY, HUB
from tinymim.models.files import RANDOM, weights_file
from tinymim.pipeline.shards import require_shards
from tinymim.pipeline.workers import start_server
from tinymim.stages.run.loggers import require_loggers
from tinymim.storage.catalog import resolve

RANDOM_WEIGHTS_HINT = "{}; or measure with --random-weights"


def preflight(recipe: Recipe) -> None:
    """Refuse a recipe that cannot run, then start the fork server's imports for loader workers.

    Only the first step of a chain is checked, because later steps read the outputs of earlier ones.

    Args:
        recipe: the recipe of the command.

    Raises:
        RecipeError: run.folder cannot be a folder, or a step of a chain is wrong.
        PermissionError: run.folder cannot be written.
        UserError: the package of a logger is not installed.
        SourceError, CheckpointError, UserError, StoreError: from `require_inputs`.
    """
    if isinstance(recipe, ChainRecipe):
        preflight(load_steps(recipe)[0])
        return
    require_loggers(recipe)
    require_inputs(recipe)
    _require_folder(recipe.run.folder)
    _start_workers(recipe)


def require_inputs(recipe: RunRecipe) -> None:
    """Refuse a recipe whose inputs do not exist. Sources in an object store and timm's hub are left to the stage.

    Args:
        recipe: the recipe of the command.

    Raises:
        SourceError: a source folder does not exist or holds no shard.
        CheckpointError: a file of weights, or `student_state`, does not exist.
        UserError: `cache` names no cache, or several.
        StoreError: the object store of a cache refuses or fails.
    """
    match recipe:
        case PretrainMaeRecipe():
            require_shards(recipe.source)
        case PretrainRecipe():
            require_shards(recipe.source)
            if recipe.weights != RANDOM:
                _require_weights(recipe.weights)
        case CacheTeacherRecipe():
            require_shards(recipe.source)
            for teacher in recipe.used_teachers.values():
                _require_weights(teacher.weights)
        case TrainStudentRecipe():
            if recipe.views is None:  # else the cache may not exist yet
                resolve(recipe.cache)
            require_shards(recipe.source)
            for _, layer in recipe.each_layer():
                if layer.teacher is not None:
                    _require_weights(layer.teacher.weights)
            if recipe.audit is not None:
                resolve(recipe.audit.cache)
                require_shards(recipe.audit.source)
                if recipe.audit.knn is not None:
                    require_shards(recipe.audit.knn.train)
                    require_shards(recipe.audit.knn.val)
        case EvaluateRecipe() | FinetuneRecipe():
            for source in (recipe.train, recipe.val):
                if source is not None:
                    require_shards(source)
            if recipe.weights != RANDOM:
                _require_weights(recipe.weights)
            if isinstance(recipe, FinetuneRecipe) and recipe.distil is not None:
                _require_weights(recipe.distil.weights)
        case FidelityRecipe():
            require_shards(recipe.source)
            _require_weights(recipe.teacher.weights)
            if recipe.student_state is not None and next(recipe.student_state.glob("state*.pt"), None) is None:
                raise no_state(recipe.student_state)


def preflight_plan(
    named: Sequence[tuple[str, CacheTeacherRecipe | TrainStudentRecipe]], random_weights: bool
) -> tuple[CacheTeacherRecipe, dict[str, TrainStudentRecipe]]:
    """`preflight` for `tinymim plan`, which needs no cache, and no weights with `random_weights`.

    Returns:
        the cache recipe, and the training recipes by name.

    Raises:
        RecipeError: there is not exactly one cache recipe, or a recipe is named twice.
        SourceError, CheckpointError, StoreError: from `require_inputs`.
    """
    caches = [recipe for _, recipe in named if isinstance(recipe, CacheTeacherRecipe)]
    students = {name: recipe for name, recipe in named if isinstance(recipe, TrainStudentRecipe)}
    if len(caches) != 1:
        got, hint = f"{len(caches)} cache-teacher recipes", "tinymim plan CACHE_RECIPE [STUDENT_RECIPE ...]"
        raise RecipeError("a plan is for one cache", got=got, expected="one", hint=hint)
    if len(students) + 1 < len(named):
        names = ", ".join(name for name, _ in named)
        raise RecipeError("a recipe is named twice", got=names, hint="--trainings N plans for N runs of each student")
    for _, recipe in named:
        require_shards(recipe.source)
    if not random_weights:
        with hinted(CheckpointError, RANDOM_WEIGHTS_HINT):
            looped = [layer.teacher for recipe in students.values() for _, layer in recipe.each_layer()]
            for teacher in (*caches[0].used_teachers.values(), *filter(None, looped)):
                _require_weights(teacher.weights)
    return caches[0], students


def load_steps(chain: ChainRecipe) -> list[Recipe]:
    """The recipes of all steps of a chain. Raises RecipeError where one is wrong."""
    return [load_recipe(step.recipe, step.stage, (*chain.set, *step.set)) for step in chain.steps]


def no_state(folder: Path) -> CheckpointError:
    """The error of a run folder without a training state."""
    return CheckpointError("there is no training state", got=folder, hint="name a run folder of train-student")


@contextmanager
def hinted(kind: type[TinymimError], hint: str) -> Iterator[None]:
    """Give errors of a kind another hint; "{}" in it stands for their own."""
    try:
        yield
    except kind as error:
        raise type(error)(error.what, got=error.got, expected=error.expected, hint=hint.format(error.hint)) from error


def _require_weights(weights: str) -> None:
    if weights not in (HUB, FACTORY):
        weights_file(weights)


def _require_folder(folder: Path) -> None:
    """Raises the errors of making the folder and writing into it, without doing either."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError("run.folder cannot be made", got=f"{existing} is a file", expected="a folder, or nothing yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _start_workers(recipe: RunRecipe) -> None:
    """Start the fork server if the loaders will run in this process."""
    match recipe:
        case CacheTeacherRecipe():
            here = recipe.cluster is None
        case PretrainMaeRecipe() | PretrainRecipe() | TrainStudentRecipe() | FinetuneRecipe():
            here = "RANK" in os.environ or (recipe.workers == 1 and recipe.cluster == "local")
        case _:
            here = True
    if here and recipe.loader.workers:
        start_server(["tinymim.cli"])  # every worker runs the script of the command, which imports it

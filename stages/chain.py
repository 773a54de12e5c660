"""`tinymim chain`: run commands one after the other; each resumes if it was stopped."""

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.chain import ChainRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.configs.schema.recipes import Recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import cache_teacher, finetune, pretrain, train_student
from tinymim.stages.run.preflight import load_steps
from tinymim.stages.run.progress import logger


def run(recipe: ChainRecipe) -> None:
    """Run every step to its end; a step that is done already has nothing to do.

    Args:
        recipe: the chain recipe to run.

    Raises:
        RecipeError: the recipe of a step is wrong; no step has started.
        Interrupted: stopped by a signal; the same command continues.
        TinymimError: raised by a step; the steps before it are done.
    """
    recipes = load_steps(recipe)
    for number, (step, loaded) in enumerate(zip(recipe.steps, recipes, strict=True), start=1):
        logger.info(f"chain {number}/{len(recipes)}: {step.stage} {step.recipe}")
        _run(loaded)


def _run(recipe: Recipe) -> None:
    match recipe:
        case PretrainRecipe() | PretrainMaeRecipe():
            pretrain.run(recipe)
        case CacheTeacherRecipe():
            cache_teacher.run(recipe)
        case TrainStudentRecipe():
            train_student.run(recipe)
        case FinetuneRecipe():
            finetune.run(recipe)
        case _:
            raise AssertionError(recipe.stage)  # the schema allows no other

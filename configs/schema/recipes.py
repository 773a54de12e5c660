"""The table of all recipes, one class per command.

A recipe is a YAML file. Its `stage:` line names the command it is for. Every other key is a field of its class, and
most fields are sections (`configs/sections/`).
"""

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.chain import ChainRecipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.fidelity import FidelityRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.configs.schema.train import TrainStudentRecipe

TrainingRecipe = PretrainMaeRecipe | PretrainRecipe | TrainStudentRecipe | FinetuneRecipe
RunRecipe = (
    PretrainMaeRecipe
    | PretrainRecipe
    | CacheTeacherRecipe
    | TrainStudentRecipe
    | EvaluateRecipe
    | FidelityRecipe
    | FinetuneRecipe
)
Recipe = RunRecipe | ChainRecipe
RECIPES: dict[str, type[Recipe]] = {
    "pretrain-mae": PretrainMaeRecipe,
    "pretrain": PretrainRecipe,
    "cache-teacher": CacheTeacherRecipe,
    "train-student": TrainStudentRecipe,
    "evaluate": EvaluateRecipe,
    "fidelity": FidelityRecipe,
    "finetune": FinetuneRecipe,
    "chain": ChainRecipe,
}

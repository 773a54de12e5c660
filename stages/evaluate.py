"""`tinymim evaluate`: evaluators of a frozen encoder on labelled shards."""

from collections.abc import Callable
from typing import Any, Final

import torch

from tinymim.configs.load import recipe_digest
from tinymim.configs.schema import EvaluateRecipe
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.vit import Normalise
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages.evaluation import knn, linear
from tinymim.stages.evaluation.classes import count_classes
from tinymim.stages.evaluation.encode import Encoder, load_encoder
from tinymim.stages.evaluation.problem import Sets
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.folder import EVALUATION_NAME, RunFolder
from tinymim.stages.run.interrupt import StopFlag
from tinymim.stages.run.owner import owned
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_json_atomic

# By name in a recipe: (encoder, encoded sets, its own section) -> metrics by name.
EVALUATORS: Final[dict[str, Callable[[Encoder, Sets, Any], dict[str, float]]]] = {
    "knn": knn.run,
    "linear": linear.run,
}


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Encode both sets, run the recipe's evaluators, and write `<run.folder>/evaluation.json`.

    Returns:
        The content of the file: metrics (accuracies are shares, not percent), counts, identity of weights and recipe.

    Raises:
        UserError: unlabelled or inconsistent sources; weights that do not exist, fit or download; another run works
            in the run folder.
        Interrupted: stopped by a signal; no evaluation is written.
    """
    # ---- sources
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    train, val = open_shards(recipe.train), open_shards(recipe.val)
    num_classes = count_classes(train, val)

    # ---- frozen encoder
    model, mean, std = load_encoder(recipe)
    law = CentreView(recipe.model.img_size, recipe.resize_ratio)
    normalise = Normalise(mean, std)
    encoder = Encoder(model, normalise, law, recipe.block, recipe.pool, recipe.batch_size, recipe.loader, device)

    # ---- features, once; evaluators
    metrics: dict[str, float] = {}
    with owned([recipe.run.folder]), RunFolder(recipe) as log, StopFlag() as stop:
        sets = Sets(
            encoder.encode(train.shards, stop, "evaluate train"), encoder.encode(val.shards, stop, "evaluate val")
        )
        for config in recipe.evaluators:
            metrics |= EVALUATORS[config.name](encoder, sets, config)
        log.log(0, **metrics)

    # ---- report
    result: dict[str, Any] = {
        **metrics,
        "num_train_images": len(sets.train.labels),
        "num_val_images": len(sets.val.labels),
        "num_classes": num_classes,
        "num_features": sets.train.features.shape[1],
        "unreadable": [
            {"set": name, "key": key, "reason": reason}
            for name, encoded in sets._asdict().items()
            for key, reason in encoded.unreadable
        ],
        "model": recipe.model.model_dump(mode="json", exclude_none=True),
        "weights": recipe.weights,
        "weights_sha256": tensors_sha256(model.state_dict()),
        "block": recipe.block,
        "pool": recipe.pool,
        "mean": list(mean),
        "std": list(std),
        "recipe_digest": recipe_digest(recipe),
    }
    write_json_atomic(recipe.run.folder / EVALUATION_NAME, result)
    logger.info(f"evaluate: wrote {recipe.run.folder / EVALUATION_NAME}")
    return result

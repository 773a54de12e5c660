"""`tinymim evaluate`: evaluators of a frozen model: probes of its features, its classifier, its throughput."""

from collections.abc import Callable
from typing import Any, Final

import torch

from tinymim.configs.load import recipe_digest
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.vit import Normalise
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages.evaluation import classifier, knn, linear, throughput
from tinymim.stages.evaluation.classes import count_classes
from tinymim.stages.evaluation.encode import Encoder, load_encoder
from tinymim.stages.evaluation.problem import Sets
from tinymim.stages.evaluation.whole import Measured, Whole, load_whole
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.folder import EVALUATION_NAME, RunFolder
from tinymim.stages.run.interrupt import StopFlag
from tinymim.stages.run.owner import owned
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_json_atomic

# By name in a recipe. Probes: (encoder, encoded sets, own section) -> metrics by name.
PROBES: Final[dict[str, Callable[[Encoder, Sets, Any], dict[str, float]]]] = {
    "knn": knn.run,
    "linear": linear.run,
}
# Those of the whole model: (model, own section) -> metrics by name.
MEASURES: Final[dict[str, Callable[[Whole, Any], Measured]]] = {
    "classifier": classifier.run,
    "throughput": throughput.run,
}


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Run the recipe's evaluators, and write `<run.folder>/evaluation.json`.

    Probes share one encoding of both sets, and the other evaluators one model with its classifier.

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
    probes = [each for each in recipe.evaluators if each.name in PROBES]
    measures = [each for each in recipe.evaluators if each.name in MEASURES]
    train = open_shards(recipe.train) if recipe.train and probes else None
    judges = any(each.name != "throughput" for each in recipe.evaluators)
    val = open_shards(recipe.val) if recipe.val and judges else None
    num_classes = count_classes(train, val) if train and val else 0

    # ---- frozen models
    loaded = load_encoder(recipe) if probes else None
    loaded_whole = load_whole(recipe) if measures else None
    known = loaded_whole or loaded
    assert known is not None  # the schema wants at least one evaluator
    model, mean, std = known  # with the classifier, where there is one: a file's digest covers it
    metrics: Measured = {}
    counts: dict[str, int] = {}
    unreadable: list[dict[str, str]] = []
    with owned([recipe.run.folder]), RunFolder(recipe) as log, StopFlag() as stop:
        # ---- features, once; probes
        if loaded and train and val:
            law = CentreView(recipe.model.img_size, recipe.resize_ratio)
            normalise = Normalise(mean, std)
            encoder = Encoder(
                loaded[0], normalise, law, recipe.block, recipe.pool, recipe.batch_size, recipe.loader, device
            )
            sets = Sets(
                encoder.encode(train.shards, stop, "evaluate train"), encoder.encode(val.shards, stop, "evaluate val")
            )
            for config in probes:
                metrics |= PROBES[config.name](encoder, sets, config)
            counts |= {f"num_{name}_images": len(encoded.labels) for name, encoded in sets._asdict().items()}
            counts |= {"num_classes": num_classes, "num_features": sets.train.features.shape[1]}
            unreadable = _listed(sets.train.unreadable, "train") + _listed(sets.val.unreadable, "val")

        # ---- the whole model
        if loaded_whole:
            whole = Whole(*loaded_whole, recipe, val, device, stop)
            for config in measures:
                metrics |= MEASURES[config.name](whole, config)
            if val and not loaded:
                counts["num_val_images"] = val.num_samples - len(whole.unreadable)
                unreadable = _listed(whole.unreadable, "val")
        log.log(0, **{name: value for name, value in metrics.items() if isinstance(value, float)})

    # ---- report
    result: dict[str, Any] = {
        **metrics,
        **counts,
        "unreadable": unreadable,
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


def _listed(unreadable: list[tuple[str, str]], name: str) -> list[dict[str, str]]:
    return [{"set": name, "key": key, "reason": reason} for key, reason in unreadable]

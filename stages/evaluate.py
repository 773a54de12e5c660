"""`tinymim evaluate`: k-NN and linear probe of a frozen encoder on labelled shards."""

from typing import Any

import torch

from tinymim.configs.load import recipe_digest
from tinymim.configs.schema import EvaluateRecipe
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.vit import Normalise
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages.evaluation.classes import count_classes
from tinymim.stages.evaluation.encode import encode, load_encoder
from tinymim.stages.evaluation.probes import probe
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.folder import EVALUATION_NAME, RunFolder
from tinymim.stages.run.interrupt import StopFlag
from tinymim.stages.run.progress import say
from tinymim.storage.atomic import write_json_atomic


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Encode both sets, probe, and write `<run.folder>/evaluation.json`.

    Returns:
        what the file holds: accuracies (shares, not percent), counts, and the identity of weights and recipe.

    Raises:
        UserError: unlabelled or inconsistent sources; weights that do not exist, fit or download.
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
    normalise = Normalise(mean, std)
    law = CentreView(recipe.model.img_size, recipe.resize_ratio)

    # ---- features, probes
    with RunFolder(recipe) as log, StopFlag() as stop:
        train_set, val_set = (
            encode(
                model,
                source.shards,
                law,
                normalise,
                block=recipe.block,
                pool=recipe.pool,
                batch_size=recipe.batch_size,
                loader=recipe.loader,
                device=device,
                stop=stop,
                label=f"evaluate {name}",
            )
            for name, source in (("train", train), ("val", val))
        )
        accuracy = probe(train_set, val_set, recipe.knn, recipe.linear, device)
        log.log(0, **accuracy)

    # ---- report
    result: dict[str, Any] = {
        **accuracy,
        "num_train_images": len(train_set.labels),
        "num_val_images": len(val_set.labels),
        "num_classes": num_classes,
        "num_features": train_set.features.shape[1],
        "unreadable": [
            {"set": name, "key": key, "reason": reason}
            for name, encoded in (("train", train_set), ("val", val_set))
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
    say(f"evaluate: wrote {recipe.run.folder / EVALUATION_NAME}")
    return result

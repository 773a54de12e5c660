"""The evaluator `classifier`: accuracy of a model's own classifier, on the set's labels and on ImageNet ReaL's.

Shapes: B image, L class of the classifier, K label.
"""

import json

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.class_map import ABSENT, read_class_map
from tinymim.configs.errors import CheckpointError, SourceError
from tinymim.configs.sections.evaluation import ClassifierEvaluator
from tinymim.configs.sections.models import HUB
from tinymim.models import backbone
from tinymim.models.checkpoints import read_metadata
from tinymim.models.files import weights_file
from tinymim.pipeline.shards import ShardSet, labels_of
from tinymim.stages.evaluation.encode import centre_crops
from tinymim.stages.evaluation.real import RealLabels, real_file
from tinymim.stages.evaluation.whole import Measured, Whole
from tinymim.stages.run.progress import logger

TOPS = (1, 5)


@torch.no_grad()
def run(whole: Whole, config: ClassifierEvaluator) -> Measured:
    """{"classifier_top1", "classifier_top5"} as shares; with ReaL labels also {"real_top1", "real_top5"} and counts.

    An image that ReaL labels have no label for is counted in "real_unjudged" and not judged.

    Raises:
        CheckpointError: the weights have no classifier, or one that numbers its classes differently.
        RecipeError: the class map cannot be read.
        SourceError: labels or the class map do not fit the classifier, the ReaL labels cannot be read or are for other
            images, or no image can be read.
        Interrupted: stopped by a signal.
    """
    val = whole.val
    assert val is not None  # the schema's check
    num_classes = backbone.classes(whole.model)
    if not num_classes:
        raise CheckpointError(
            "the weights have no classifier",
            got=whole.recipe.weights,
            expected="fine-tuned weights, or timm's with a classifier",
            hint="measure features with the evaluators knn and linear",
        )
    class_map = None if config.class_map is None else torch.tensor(read_class_map(config.class_map))
    _check_classes(whole.recipe.weights, val, num_classes, class_map)
    labels = num_classes if class_map is None else len(class_map)
    real = None if config.real_labels is None else RealLabels(real_file(config.real_labels), labels)

    hits = dict.fromkeys(TOPS, 0)
    real_hits = dict.fromkeys(TOPS, 0)
    images = judged = 0
    first_key = ""
    stream = centre_crops(
        val.shards, whole.law, whole.normalise, whole.recipe, whole.device, whole.stop, "evaluate classifier"
    )
    for batch, pixels in stream:
        whole.unreadable += batch.unreadable
        if pixels is None:
            continue
        scores = mapped(whole.model(pixels).float().cpu(), class_map)
        ranked = scores.topk(min(max(TOPS), scores.shape[1]), dim=1).indices
        right = (ranked == batch.labels[:, None]).numpy()
        images += len(batch.keys)
        first_key = first_key or batch.keys[0]
        for top in TOPS:
            hits[top] += int(right[:, :top].any(axis=1).sum())
        for key, row in zip(batch.keys, ranked.tolist(), strict=True):
            if real is not None and (wanted := real.of(key)):
                judged += 1
                for top in TOPS:
                    real_hits[top] += not wanted.isdisjoint(row[:top])
    if not images:
        raise SourceError("no image of val can be read", got=f"{len(whole.unreadable)} unreadable images")
    found: Measured = {f"classifier_top{top}": hits[top] / images for top in TOPS}
    if real is not None:
        if not judged:
            raise SourceError(
                "the ReaL labels name no image of val",
                got=f"{real.file}; val has {first_key}",
                expected="keys such as ILSVRC2012_val_00000001, or an object {image name: labels}",
            )
        found |= {f"real_top{top}": real_hits[top] / judged for top in TOPS}
        found |= {"real_judged": judged, "real_unjudged": images - judged}
        logger.info(f"evaluate: ReaL labels judge {judged:,} images; {images - judged:,} have none and do not count")
    return found


def mapped(logits: Float[Tensor, "B L"], class_map: Int64[Tensor, " K"] | None) -> Float[Tensor, "B K"]:
    """The scores of the labels, y_i = z[map_i], and 0 for a label that the classifier lacks (Wu et al., TinyViT)."""
    if class_map is None:
        return logits
    return torch.where(class_map == ABSENT, 0.0, logits[:, class_map.clamp(min=0)])


def _check_classes(weights: str, val: ShardSet, num_classes: int, class_map: Tensor | None) -> None:
    if class_map is not None and int(class_map.max()) >= num_classes:
        raise SourceError(
            "the class map names a class that the classifier lacks",
            got=int(class_map.max()),
            expected=f"0 to {num_classes - 1}",
        )
    labels = num_classes if class_map is None else len(class_map)
    if (largest := int(np.max(labels_of(val.shards)))) >= labels:
        raise SourceError(
            f"a label of val is beyond the {'classifier' if class_map is None else 'class map'}",
            got=largest,
            expected=f"0 to {labels - 1}",
            hint=None if class_map is not None else "a classifier of other classes needs class_map",
        )
    own = json.loads(read_metadata(*weights_file(weights)).get("classes", "[]")) if weights != HUB else []
    if class_map is None and own and val.classes and list(val.classes) != own:
        raise CheckpointError(
            "the weights and val number their classes differently",
            got=f"val: {', '.join(val.classes[:5])}, ...",
            expected=f"the classes that the file states: {', '.join(map(str, own[:5]))}, ...",
            hint="make val's shards with the class folders of the training set, or give a class_map",
        )

"""Validation during a training run: exact counts over all ranks, the history, and the best weights so far.

Shapes: K class. Rows of a confusion matrix are labels, columns are predictions.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.errors import SourceError
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import CentreView
from tinymim.stages.run.device import autocast
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter
from tinymim.stages.training.ranks import Ranks


class Counts:
    """Sums over validated images: confusion matrix, labels among the top 5, cross-entropy."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.in_top5 = torch.zeros(1, dtype=torch.int64)
        self.losses = torch.zeros(1, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K], labels int64 [B], both on the CPU."""
        num_classes = logits.shape[1]
        best = logits.topk(min(5, num_classes), dim=1).indices
        pairs = torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes**2)
        self.confusion += pairs.view(num_classes, num_classes)
        self.in_top5 += (best == labels[:, None]).sum()
        self.losses += nn.functional.cross_entropy(logits, labels, reduction="sum").double()

    def over(self, ranks: Ranks) -> "Counts":
        """The sums over all ranks, on each of them."""
        whole = Counts(len(self.confusion))
        for name, values in vars(self).items():
            setattr(whole, name, ranks.total(values))
        return whole

    def scores(self) -> dict[str, float]:
        """Accuracies as shares, and the mean cross-entropy."""
        images = int(self.confusion.sum())
        return {
            "top1": int(self.confusion.trace()) / images,
            "top5": int(self.in_top5) / images,
            "loss": float(self.losses) / images,
        }


class Validation:
    """Validates models on a labelled set. Ranks take batches in turn, so each image is counted once.

    Args:
        recipe: the recipe of the run.
        shards: the shards of the labelled set.
        num_classes: K.
        normalise: maps uint8 pixels to the model's input, on the device.
        ranks: the ranks of the run.

    Attributes:
        unreadable: (key, reason) of each image that some rank could not read in the last pass.
    """

    def __init__(
        self, recipe: FinetuneRecipe, shards: Sequence[Shard], num_classes: int, normalise: nn.Module, ranks: Ranks
    ) -> None:
        self._recipe, self._num_classes, self._normalise, self._ranks = recipe, num_classes, normalise, ranks
        law = CentreView(recipe.model.img_size, recipe.validation.resize_ratio)
        self._views = ImageViews(tuple(shards), law)
        self._plan = [
            items
            for unit, shard in enumerate(shards)
            for items in view_batches(unit, shard.num_samples, (0,), recipe.validation.batch_size)
        ]
        self.unreadable: list[tuple[str, str]] = []

    @torch.no_grad()
    def count(
        self, models: Mapping[str, nn.Module], device: torch.device, stop: StopFlag, meter: Meter
    ) -> dict[str, Counts]:
        """Run all models over the set; afterwards each is in the mode (training or not) that it was in.

        Raises:
            Interrupted: some rank was asked to stop. The caller replaces its message by one that states what is saved.
            SourceError: no image can be read.
        """
        ranks, counts = self._ranks, {name: Counts(self._num_classes) for name in models}
        unreadable: list[tuple[str, str]] = []
        training = {name: model.training for name, model in models.items()}
        for model in models.values():
            model.eval()
        own = self._plan[ranks.rank :: ranks.world_size]
        stream = batches(self._views, own, self._recipe.loader, pin_memory=device.type == "cuda")
        rounds, note = -(-len(self._plan) // ranks.world_size), meter.note
        with contextlib.closing(stream):
            for number in range(rounds):
                # Every rank takes part in every round, so that all of them leave at the same one.
                quiet, stays = ranks.least(not stop.requested, not stop.requeue)
                if not quiet:
                    raise Interrupted("validation interrupted", not stays)
                batch = next(stream, None)  # in the last round some ranks have none
                if batch is not None:
                    unreadable += batch.unreadable
                if batch is not None and batch.keys:
                    images = self._normalise(batch.pixels.to(device, non_blocking=True))
                    for name, model in models.items():
                        with autocast(device, self._recipe.precision):
                            logits = model(images)
                        counts[name].add(logits.float().cpu(), batch.labels)
                meter.advance(0, note=f"validating {number + 1:,}/{rounds:,}")
        meter.note = note
        for name, model in models.items():
            model.train(training[name])
        self.unreadable = merged(unreadable, ranks)
        found = {name: each.over(ranks) for name, each in counts.items()}
        if not all(each.confusion.any() for each in found.values()):
            raise SourceError("no image of val can be read", got=self.unreadable[:1])
        return found


def merged(unreadable: Sequence[tuple[str, str]], ranks: Ranks) -> list[tuple[str, str]]:
    """The lists of all ranks as one, sorted by key, each image once."""
    payloads = ranks.gather_bytes(json.dumps(list(unreadable)).encode())
    return sorted({(key, reason) for payload in payloads for key, reason in json.loads(payload)})


class History:
    """Results of a run's validations; part of the training state.

    Attributes:
        entries: one per validation: epoch, step, and the scores of each model.
        best: the entry of the best weights so far, with "of", the model they belong to; None before a validation.
        weights: the best weights, on the CPU; empty on ranks other than 0.
        confusion: int64 [K, K], the confusion matrix of the best weights.
        unreadable: by key, why an image of the training set could not be read.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] = {}
        self.confusion = torch.empty(0, 0, dtype=torch.int64)
        self.unreadable: dict[str, str] = {}

    def add(self, entry: dict[str, Any], of: str, counts: Counts, model: nn.Module | None) -> bool:
        """Add a validation and return whether its weights are the best so far; at ties the first are.

        Args:
            entry: the entry of this validation.
            of: the name of the model that is compared.
            counts: the counts of that model.
            model: the model; None: keep no weights.
        """
        self.entries.append(entry)
        if self.best is not None and self.best[of]["top1"] >= entry[of]["top1"]:
            return False
        self.best, self.confusion = entry | {"of": of}, counts.confusion
        if model is not None:
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return True

    def lacks(self, step: int) -> bool:
        """Whether there is no validation of step `step`."""
        return all(entry["step"] != step for entry in self.entries)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by a state."""
        vars(self).update(state)


def by_class(confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per class: name if known, number of images, top-1 accuracy, predictions by class."""
    rows = []
    for number, row in enumerate(confusion.tolist()):
        images = sum(row)
        predicted = {str(other): count for other, count in enumerate(row) if count}
        entry: dict[str, Any] = {"class": number} | ({"name": names[number]} if number < len(names) else {})
        rows.append(
            entry | {"images": images, "top1": row[number] / images if images else None, "taken_for": predicted}
        )
    return rows

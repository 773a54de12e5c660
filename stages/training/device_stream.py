"""One stream of batches for several students: each device computes targets and images once for all its students."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tinymim.configs.sections.augment import JitterConfig
from tinymim.configs.taps import Shapes
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import Lacking, ViewBatch
from tinymim.pipeline.jitter import jitter
from tinymim.pipeline.records import of_layer
from tinymim.stages.training.optim import seeded
from tinymim.targets.contract import Labels, Target, TargetKind

CPU = torch.device("cpu")

# Maps pixels uint8 [B, 3, S, S], the records' arrays and view keys int64 [B], all on one device, to their targets: one
# for each term of the loss. The last argument states which records are still missing; None: none.
MakeTargets = Callable[[Tensor, Mapping[str, Tensor], Tensor, Lacking | None], tuple[Target, ...]]


def cached_targets(kinds: Mapping[str, tuple[TargetKind, Shapes]]) -> MakeTargets:
    """Targets from the records of a cache.

    Args:
        kinds: by layer, its kind with constants on the device, and its teacher's shapes.
    """
    return lambda _pixels, records, view_keys, _lacking: tuple(
        kind.decode(of_layer(records, layer), view_keys, shapes) for layer, (kind, shapes) in kinds.items()
    )


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, which Triton kernels and CUDA events use; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class DeviceStream:
    """The stream of batches on one device.

    A batch is copied once and its targets computed once. Images are jittered once for all students with the same
    jitter. Nothing here waits for a GPU, so that one GPU computes while the next one gets its work.

    Args:
        device: the device of the students.
        make_targets: computes the targets of views on this device.
        seed: the run's seed; with the step it determines the jitter.
        places: int64 [B], the places of this rank's samples in a step's whole batch.
        batch_size: number of samples in the whole batch.
    """

    def __init__(
        self, device: torch.device, make_targets: MakeTargets, seed: int, places: Tensor, batch_size: int
    ) -> None:
        self.device, self._make_targets = device, make_targets
        self._seed, self._places, self._batch_size = seed, places, batch_size
        self._normalise = Normalise().to(device)
        self._step = 0
        self._rows = slice(0)
        self._pixels, self._keys = torch.empty(0), torch.empty(0)
        self._labels = Labels.hard(torch.empty(0))
        self._records: dict[str, Tensor] = {}
        self._lacking: Lacking | None = None
        self._images: dict[JitterConfig, Tensor] = {}
        self.targets: tuple[Target, ...] = ()

    def take(self, step: int, batch: ViewBatch) -> None:
        """Copy the batch of a step to the device."""
        # The loader pins batches for GPUs, so these copies do not wait.
        self._step = step
        self._pixels = batch.pixels.to(self.device, non_blocking=True)
        self._records = {name: array.to(self.device, non_blocking=True) for name, array in batch.records.items()}
        self._keys = batch.view_keys.to(self.device, non_blocking=True)
        labels = (batch.labels, *batch.partner_labels())
        self._labels = Labels(*(each.to(self.device, non_blocking=True) for each in labels))
        self._lacking = batch.lacking

    def cut(self, rows: slice) -> None:
        """Select a part of the batch and compute its `targets`."""
        self._rows, self._images = rows, {}  # as float32, images take four times the batch: only one part's are kept
        records = {name: array[rows] for name, array in self._records.items()}
        lacking = None if self._lacking is None else self._lacking.cut(rows)
        with current(self.device):
            self.targets = self._make_targets(self._pixels[rows], records, self._keys[rows], lacking)

    @property
    def labels(self) -> Labels:
        """The part's labels; of mixed views those of both images."""
        return Labels(*(each[self._rows] for each in self._labels))

    def images(self, config: JitterConfig) -> Tensor:
        """The part's images with this jitter, normalised float32 [B, 3, S, S]."""
        if config not in self._images:
            # Drawn for the whole batch: a sample's jitter does not depend on the number of ranks or parts.
            generator = seeded(CPU, self._seed, self._step)
            places = self._places[self._rows]
            jittered = jitter(self._pixels[self._rows], config, generator, places, self._batch_size)
            self._images[config] = self._normalise(jittered)
        return self._images[config]

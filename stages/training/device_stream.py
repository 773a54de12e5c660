"""One stream of batches for several students, on one device or on several: what they share is made once per device."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tinymim.configs.sections import JitterConfig
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.jitter import jitter
from tinymim.stages.training.optim import seeded
from tinymim.targets.record import Codec
from tinymim.targets.relations.rows import Target

CPU = torch.device("cpu")


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that kernels and events go to; of a CPU nothing has to be said."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class DeviceStream:
    """The stream as the students of one device see it.

    A batch is copied to the device once, a target unpacked once, and images are jittered once for all students with
    the same jitter. Nothing here waits for a GPU: while one computes, the next one is given its work.

    Args:
        device: where these students are.
        codec: with its constants on that device.
        tokens: of a view.
        seed: of the run; with the step it names the jitter.
        places: int64 [B], where a rank's samples stand in a step's whole batch.
        batch_size: samples of the whole batch.
    """

    def __init__(
        self, device: torch.device, codec: Codec, tokens: int, seed: int, places: Tensor, batch_size: int
    ) -> None:
        self.device, self._codec, self._tokens = device, codec, tokens
        self._seed, self._places, self._batch_size = seed, places, batch_size
        self._normalise = Normalise().to(device)
        self._step = 0
        self._rows = slice(0)
        self._pixels, self._keys = torch.empty(0), torch.empty(0)
        self._records: dict[str, Tensor] = {}
        self._images: dict[JitterConfig, Tensor] = {}
        self.target: Target = {}

    def take(self, step: int, batch: ViewBatch) -> None:
        """Copy the batch of a step here."""
        self._step = step
        self._pixels = batch.pixels.to(self.device, non_blocking=True)
        self._records = {name: array.to(self.device, non_blocking=True) for name, array in batch.records.items()}
        self._keys = batch.view_keys.to(self.device, non_blocking=True)

    def cut(self, rows: slice) -> None:
        """Turn to a part of the batch: unpack its `target`."""
        self._rows, self._images = rows, {}
        records = {name: array[rows] for name, array in self._records.items()}
        with current(self.device):
            self.target = self._codec.decode(records, self._keys[rows], self._tokens)

    def images(self, strengths: JitterConfig) -> Tensor:
        """Normalised float32 [B, 3, S, S] of the part, with jitter of these strengths."""
        if strengths not in self._images:
            generator = seeded(CPU, self._seed, self._step)
            here = self._places[self._rows]
            jittered = jitter(self._pixels[self._rows], strengths, generator, here, self._batch_size)
            self._images[strengths] = self._normalise(jittered)
        return self._images[strengths]

"""What students of one stream share on a device is made once."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.sections.augment import JitterConfig
from tinymim.pipeline.dataset import Lacking, ViewBatch
from tinymim.pipeline.jitter import jitter
from tinymim.stages.training.device_stream import CPU, DeviceStream, current
from tinymim.stages.training.optim import seeded
from tinymim.targets.contract import Target

B, SIZE = 8, 16


class CountingTargets:
    """Makes no targets: remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def __call__(
        self, pixels: Tensor, records: Mapping[str, Tensor], view_keys: Tensor, lacking: Lacking | None
    ) -> tuple[Target, ...]:
        assert torch.equal(pixels, batch().pixels[records["rows"]])
        assert lacking is None
        self.asked.append((records["rows"].tolist(), view_keys.tolist()))
        return ()


def batch() -> ViewBatch:
    pixels = torch.randint(0, 256, (B, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ViewBatch(
        items=np.zeros((B, 3), dtype=np.int64),
        keys=["key"] * B,
        pixels=pixels,
        labels=torch.zeros(B, dtype=torch.int64),
        views=[],
        records={"rows": torch.arange(B)},
        view_keys=torch.arange(B) + 100,
    )


def test_a_target_is_made_once_and_images_are_jittered_once_per_jitter() -> None:
    targets = CountingTargets()
    places = torch.arange(B) * 2 + 1  # as the second of two ranks
    stream = DeviceStream(CPU, targets, 3, places, 2 * B)
    stream.take(7, batch())
    same, other = JitterConfig(), JitterConfig(brightness=0.0)
    for rows in (slice(0, 4), slice(4, 8)):
        stream.cut(rows)
        images = stream.images(same)
        assert stream.images(JitterConfig()) is images
        assert not torch.equal(stream.images(other), images)
        expected = jitter(batch().pixels[rows], same, seeded(CPU, 3, 7), places[rows], 2 * B)
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        torch.testing.assert_close(images, (expected - mean) / std)
    assert targets.asked == [([0, 1, 2, 3], [100, 101, 102, 103]), ([4, 5, 6, 7], [104, 105, 106, 107])]


def test_the_next_step_has_another_jitter() -> None:
    stream = DeviceStream(CPU, CountingTargets(), 3, torch.arange(B), B)
    found = []
    for step in (0, 1):
        stream.take(step, batch())
        stream.cut(slice(0, B))
        found.append(stream.images(JitterConfig()))
    assert not torch.equal(*found)


def test_nothing_has_to_be_said_of_a_cpu() -> None:
    with current(CPU):
        pass

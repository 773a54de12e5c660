"""What students of one stream share on a device is made once."""

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.sections import JitterConfig
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.jitter import jitter
from tinymim.stages.training.device_stream import CPU, DeviceStream, current
from tinymim.stages.training.optim import seeded
from tinymim.targets.relations.rows import Target

B, SIZE, TOKENS = 8, 16, 5


class CountingCodec:
    """Stands for a codec: remembers what it was asked to unpack."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int], int]] = []

    def decode(self, arrays: dict[str, Tensor], keys: Tensor, tokens: int) -> Target:
        self.asked.append((arrays["rows"].tolist(), keys.tolist(), tokens))
        return {}


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


def test_a_target_is_unpacked_once_and_images_are_coloured_once_per_jitter() -> None:
    codec = CountingCodec()
    places = torch.arange(B) * 2 + 1  # as the second of two ranks
    stream = DeviceStream(CPU, codec, TOKENS, 3, places, 2 * B)  # type: ignore[arg-type]
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
    assert codec.asked == [([0, 1, 2, 3], [100, 101, 102, 103], TOKENS), ([4, 5, 6, 7], [104, 105, 106, 107], TOKENS)]


def test_the_next_step_has_other_jitter() -> None:
    stream = DeviceStream(CPU, CountingCodec(), TOKENS, 3, torch.arange(B), B)  # type: ignore[arg-type]
    found = []
    for step in (0, 1):
        stream.take(step, batch())
        stream.cut(slice(0, B))
        found.append(stream.images(JitterConfig()))
    assert not torch.equal(*found)


def test_nothing_has_to_be_said_of_a_cpu() -> None:
    with current(CPU):
        pass

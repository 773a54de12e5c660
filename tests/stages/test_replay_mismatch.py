"""Stage two sees the teacher's pixels or stops: another decoder, another resize, and images decoded smaller."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.configs.errors import CacheMismatch, ViewMismatch
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.decode import decode, environment, render
from tinymim.stages import make_shards, train_student
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.sketched import grow
from tinymim.tests.stages.tiny import losses, student_recipe

FULL = ViewConfig(size=32, scaled_decode=False)
TWO_VIEWS = {VIEWS: [(0, 2)], "a": [(0, 2)]}


def train(root: Path) -> list[float]:
    train_student.run(student_recipe(root, optim={"batch_size": 6, "steps": 4, "base_lr": 0.1}))
    return losses(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs-to-be of many sizes, 40 to 700 pixels, some progressive, some PNG."""
    root = tmp_path_factory.mktemp("sizes")
    source = root / "images"
    source.mkdir()
    for number in range(12):
        side = 40 + 60 * number
        y, x = np.mgrid[:side, : side + 13]
        pixels = np.stack([y * 7 % 256, x * 3 % 256, (x + number) * y % 251], axis=-1).astype(np.uint8)
        fmt, options = ("PNG", {}) if number % 5 == 4 else ("JPEG", {"progressive": number % 3 == 0})
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=fmt, **options)
        (source / f"{number:02d}.{fmt.lower()}").write_bytes(buffer.getvalue())
    make_shards.run(str(source), root / "shards", make_shards.Options(images_per_shard=6))
    return root


def digests_of(root: Path) -> list[int]:
    reader = CacheReader(root / "cache")
    digests = [reader.read_views(info)[DIGEST].ravel() for info in reader.units()]
    return [int(each) for each in np.concatenate(digests)]


def test_images_decoded_smaller_replay_to_the_same_pixels(home: Path) -> None:
    grow(home, TWO_VIEWS)
    assert CacheReader(home / "cache").manifest.views["scaled_decode"] is True
    assert len(train(home)) == 4  # all digests checked


def test_a_cache_from_before_scaled_decoding_replays_and_grows_without_it(home: Path) -> None:
    grow(home, {VIEWS: [(0, 1)], "a": [(0, 1)]}, law=FULL)
    assert "scaled_decode" not in CacheReader(home / "cache").manifest.views  # as such a cache is
    more = {VIEWS: [(1, 1)], "a": [(1, 1)]}
    with pytest.raises(CacheMismatch, match=r"views\.scaled_decode"):
        grow(home, more)
    grow(home, more, law=FULL)
    assert CacheReader(home / "cache").coverage("a").most_views == 2
    assert len(train(home)) == 4


def test_scaled_decoding_is_another_law(home: Path) -> None:
    grow(home, TWO_VIEWS)
    scaled = digests_of(home)
    (home / "cache").rename(home / "scaled")
    grow(home, TWO_VIEWS, law=FULL)
    assert len(scaled) == 24 and 0 < sum(a != b for a, b in zip(scaled, digests_of(home), strict=True)) < 24


def _refused(home: Path) -> ViewMismatch:
    with pytest.raises(ViewMismatch) as caught:
        train(home)
    assert not (home / "run-student" / "student.safetensors").exists()
    return caught.value


def _pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr("tinymim.pipeline.mismatch.environment", lambda: environment() | versions)


def test_another_decoder_is_refused_with_all_that_there_is_to_say(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(home, TWO_VIEWS)

    def another(data: bytes, *how: int) -> torch.Tensor:
        return decode(data, *how) ^ 1  # the last bit, as another inverse DCT would

    monkeypatch.setattr("tinymim.pipeline.dataset.decode", another)
    _pretend(monkeypatch, simplejpeg="99.0", pillow="98.0")
    error = _refused(home)
    text = str(error)
    key = error.what.split("'")[1]
    reader = CacheReader(home / "cache")
    assert any(key in reader.keys(shard) for shard in reader.manifest.shards)
    assert "view 0" in text or "view 1" in text
    got, expected = str(error.got).removeprefix("digest "), str(error.expected).removeprefix("digest ")
    assert len(got) == len(expected) == 8 and got != expected
    stored = {f"{digest:08x}" for digest in digests_of(home)}
    assert expected in stored and got not in stored
    now = environment()
    assert f"simplejpeg {now['simplejpeg']} -> 99.0" in text and f"pillow {now['pillow']} -> 98.0" in text
    assert "torchvision" not in text  # only what differs


def test_another_resize_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(home, TWO_VIEWS)

    def another(image: torch.Tensor, view: Any, size: int, interpolation: str) -> torch.Tensor:
        return render(image, view, size, "bilinear")

    monkeypatch.setattr("tinymim.pipeline.dataset.render", another)
    _pretend(monkeypatch, torch="99.0", canary="0" * 16)
    assert "torch " in str(_refused(home)) and "canary" in str(_refused(home))


def test_the_fallback_decoder_is_no_mismatch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(home, TWO_VIEWS)
    whole = train(home)

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("damaged")

    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)  # Pillow takes over, at every scale
    (home / "run-student").rename(home / "before")
    assert train(home) == whole

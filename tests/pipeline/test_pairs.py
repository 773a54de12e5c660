"""Pairs of the view law: functions of the shard's keys and the view, mixed as stated, decoded once where they meet."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from timm.data.mixup import rand_bbox
from timm.loss import SoftTargetCrossEntropy

from tinymim.configs.errors import CacheMismatch, CheckpointError, SourceError, ViewMismatch
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig, VerifyConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import PairsConfig, ViewConfig
from tinymim.pipeline import dataset, pairs
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import decode
from tinymim.pipeline.joined import join, partners_of_source, places_in_tar
from tinymim.pipeline.loader import batches
from tinymim.pipeline.mismatch import PartnersSeen
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.pairs import Mix, Pairs, mixed, mixed_key, partners_of, soft_labels
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import Shard, ShardSet, open_shards
from tinymim.pipeline.views import RandomViews, view_key
from tinymim.stages import make_shards
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.tests.pipeline.cached import ARRAYS, write_cache

LAW = ViewConfig.model_validate({"size": 32, "seed": 3, "operations": {"rand_augment": "rand-m9"}, "pairs": {}})
GOLDEN = [
    Mix(share=0.5561224489795918, box=(0, 0, 174, 128)),
    Mix(share=0.7421875, box=None),
    Mix(share=0.28515625, box=None),
    Mix(share=0.3710339604591837, box=(0, 10, 151, 209)),
]
GOLDEN_KEY = -4667488905189684466
PLAIN = LAW.model_copy(update={"pairs": None})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 9 images, an odd number, and a cache of three views. Do not write to it."""
    root = tmp_path_factory.mktemp("pairs")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=18, images_per_shard=9))
    write_cache(root / "cache", source_of(root), LAW, {VIEWS: [(0, 3)], "layer": [(0, 3)]})
    return root


def source_of(root: Path, pattern: str = "*.tar") -> ShardSet:
    return open_shards(SourceConfig(shards=root / "shards", pattern=pattern))


def every(shards: Sequence[Shard], views: Sequence[int]) -> npt.NDArray[np.int64]:
    rows = [(u, s, v) for u, shard in enumerate(shards) for s in range(shard.num_samples) for v in views]
    return np.array(rows, np.int64)


Found = dict[tuple[str, int], tuple[bytes, int, str | None, float, int]]


def by_view(*several: ViewBatch) -> Found:
    """By key and view: pixels, view key, partner, share, partner's label."""
    found: Found = {}
    for batch in several:
        assert batch.partners is not None
        labels, shares = batch.partner_labels()
        for row, (key, view) in enumerate(zip(batch.keys, batch.items[:, 2].tolist(), strict=True)):
            about = int(batch.view_keys[row]), batch.partners.keys[row], float(shares[row]), int(labels[row])
            found[key, view] = batch.pixels[row].numpy().tobytes(), *about
    return found


def rewritten(path: Path, images: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in images:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]  # all are files


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_partners_are_an_involution_and_one_of_an_odd_number_stays_alone(count: int) -> None:
    lonely = set()
    for view in range(30):
        partners = partners_of(np.array([view_key(0, f"k{n}", view) for n in range(count)], np.int64))
        assert np.array_equal(partners[partners], np.arange(count))
        own = np.flatnonzero(partners == np.arange(count))
        assert len(own) == count % 2
        lonely |= set(own.tolist())
    assert count != 7 or len(lonely) > 3  # another one in every view


def test_golden_draws_and_keys() -> None:
    law = Pairs(PairsConfig(), 0, 224)
    assert [law.mix(number, 7) for number in range(4)] == GOLDEN
    assert law.mix(7, 3) == law.mix(3, 7)
    assert mixed_key(5, -6) == GOLDEN_KEY and mixed_key(-6, 5) != mixed_key(5, -6)


def test_shares_follow_timms_law() -> None:
    rng = np.random.default_rng(0)
    for fields, alpha in (({"cutmix": 0}, 0.8), ({"cutmix": 0, "mixup": 2.0}, 2.0)):
        law = Pairs(PairsConfig.model_validate(fields), 0, 224)
        drawn = np.sort([mix.share for n in range(4000) if (mix := law.mix(n, -1 - n))])
        assert np.abs(drawn - np.sort(rng.beta(alpha, alpha, 4000))).mean() < 0.02
    np.random.seed(0)  # timm's function uses the global generator
    boxes = [rand_bbox((3, 224, 224), lam) for lam in rng.random(4000)]
    theirs = np.sort([1 - (yh - yl) * (xh - xl) / 224**2 for yl, yh, xl, xh in boxes])
    law = Pairs(PairsConfig(mixup=0), 0, 224)
    drawn = np.sort([mix.share for n in range(4000) if (mix := law.mix(n, -1 - n))])
    assert np.abs(drawn - theirs).mean() < 0.02
    both = Counter(mix.box is None for n in range(4000) if (mix := Pairs(PairsConfig(), 0, 224).mix(n, -1 - n)))
    assert abs(both[True] / 4000 - 0.5) < 0.03
    some = [Pairs(PairsConfig(share=0.25), 0, 224).mix(n, -1 - n) for n in range(4000)]
    assert abs(sum(mix is not None for mix in some) / 4000 - 0.25) < 0.03


def test_pixels_are_rounded_as_stated_and_the_share_is_that_of_the_clipped_box() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    for weight in (0, 1, 100, 128, 255, 256):
        exact = (weight * one.astype(int) + (256 - weight) * other.astype(int) + 128) // 256
        assert np.array_equal(mixed(one, other, Mix(weight / 256, None)), exact)
    assert np.array_equal(mixed(one, one, Mix(100 / 256, None)), one)
    law, clipped = Pairs(PairsConfig(mixup=0), 0, 32), 0
    for number in range(100):
        mix = law.mix(number, 0)
        assert mix is not None and mix.box is not None
        found = mixed(one, np.full_like(one, 7), mix)
        kept = (found == one).all(axis=0) & ~(found == 7).all(axis=0)
        assert abs(kept.mean() - mix.share) < 0.01  # few pixels of noise are grey 7 themselves
        clipped += mix.box[2] != mix.box[3]
    assert clipped > 20


def test_labels_are_mixed_like_pixels() -> None:
    labels, partners = torch.tensor([0, 2, 1, -1]), torch.tensor([1, 2, -1, 0])
    found = soft_labels(labels, partners, torch.tensor([0.25, 0.5, 0.75, 0.0]), 3)
    assert found.tolist() == [[0.25, 0.75, 0], [0, 0, 1], [0, 0.75, 0], [1, 0, 0]]
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    parts = [torch.nn.functional.cross_entropy(logits, each[:2], reduction="none") for each in (labels, partners)]
    expected = (torch.tensor([0.25, 0.5]) * parts[0] + torch.tensor([0.75, 0.5]) * parts[1]).mean()
    torch.testing.assert_close(SoftTargetCrossEntropy()(logits, found[:2]), expected)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mixup": 0, "cutmix": 0}, "nothing is mixed"),
        ({"share": 0}, "nothing is mixed"),
        ({"mixup": 0.01}, "from 0.05 to 4"),
        ({"version": 2}, "Input should be 1"),
    ],
)
def test_laws_that_mix_nothing_are_refused(fields: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PairsConfig.model_validate(fields)


def test_another_law_of_pairs_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_beta", lambda draws, alpha: 0.5)
    with pytest.raises(ViewMismatch, match=r"other pixels here: pairs\n"):
        RandomViews(LAW)
    RandomViews(PLAIN)


# ---------------------------------------------------------------- rendered views


def test_a_mixed_view_is_made_of_the_two_views_of_the_plain_law(made: Path) -> None:
    shards = source_of(made).shards
    items = every(shards, range(3))
    batch, plain = (ImageViews(shards, RandomViews(law), 3).batch(items) for law in (LAW, PLAIN))
    assert batch.partners is not None and plain.partners is None
    single = {(u, k, v): p for (u, _, v), k, p in zip(items.tolist(), plain.keys, plain.pixels.numpy(), strict=True)}
    labels = {key: int(label) for key, label in zip(plain.keys, plain.labels, strict=True)}
    law, alone = Pairs(LAW.pairs or PairsConfig(), 3, 32), 0
    for row, (unit, _, view) in enumerate(items.tolist()):
        key, partner, mix = batch.keys[row], batch.partners.keys[row], batch.partners.mixes[row]
        own = view_key(3, key, view)
        if partner is None:
            alone += 1
            assert mix is None and int(batch.view_keys[row]) == own
            assert np.array_equal(batch.pixels[row], single[unit, key, view])
            continue
        other = view_key(3, partner, view)
        assert mix is not None and mix == law.mix(own, other) and int(batch.view_keys[row]) == mixed_key(own, other)
        expected = mixed(single[unit, key, view], single[unit, partner, view], mix)  # operations come before
        assert np.array_equal(batch.pixels[row], expected) and partner != key
        assert batch.partners.labels[row] == labels[partner]
    assert alone == 2 * 3  # the odd ones


def test_pairs_are_mixed_alike_at_every_size(made: Path) -> None:
    shards, law, large = source_of(made).shards, RandomViews(LAW), RandomViews(LAW).at(48)
    items = every(shards[:1], range(2))
    views = ImageViews(shards, law, 3, further=[large])
    small_alone, large_alone = (ImageViews(shards, each, 3).batch(items) for each in (law, large))
    both, single = views.batch(items), [views.batch(row[None]) for row in items]  # partners in the batch, and apart
    assert by_view(both) == by_view(*single) == by_view(small_alone)
    assert torch.equal(both.at(48), large_alone.pixels)
    assert torch.equal(torch.cat([each.at(48) for each in single]), large_alone.pixels)
    assert torch.equal(both.view_keys, large_alone.view_keys)
    assert both.partners is not None and large_alone.partners is not None
    assert both.partners.keys == large_alone.partners.keys
    np.testing.assert_allclose(both.partners.shares, large_alone.partners.shares, atol=0.06)


def test_keys_order_batches_ranks_workers_and_view_counts_change_no_target(made: Path, tmp_path: Path) -> None:
    source, law = source_of(made), RandomViews(LAW)
    expected = by_view(ImageViews(source.shards, law, 3).batch(every(source.shards, range(3))))
    rng = np.random.default_rng(0)
    for size in (1, 4, 17):  # order and batch size
        items = every(source.shards, range(3))
        items = items[rng.permutation(len(items))]
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        assert by_view(*map(ImageViews(source.shards, law, 3).batch, parts)) == expected
    for together in (1, 3):  # ranks, workers and the number of views
        found: Found = {}
        for rank in range(2):
            config = OrderConfig(lanes=2, views_per_decode=together, views_per_epoch=together, shuffle_units=2)
            order = SampleOrder(source.counts, config, 6, None, rank, 2)
            loaded = batches(
                ImageViews(source.shards, law, 3),
                order.plan(3 * together),
                LoaderConfig(workers=2 * (together == 3)),
                batches_per_entry=together,
            )
            found |= by_view(*loaded)
        assert len(found) == 18 * together and found == {name: expected[name] for name in found}
    single = source_of(made, "*1.tar").shards  # other shards of the source
    assert by_view(ImageViews(single, law, 3).batch(every(single, range(3)))).items() <= expected.items()
    (tmp_path / "shards").mkdir()
    for shard in source.shards:  # the order of keys
        images = members_of(shard.path)
        rewritten(tmp_path / "shards" / shard.name, [images[place] for place in rng.permutation(len(images))])
    moved = source_of(tmp_path).shards
    assert list(moved[0].members().keys) != list(source.shards[0].members().keys)
    assert by_view(ImageViews(moved, law, 3).batch(every(moved, range(3)))) == expected


def test_partners_in_one_batch_share_their_decodes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, decoded = source_of(made).shards[:1], list[bytes]()

    def counted(data: bytes, *rest: int) -> torch.Tensor:
        decoded.append(data)
        return decode(data, *rest)

    monkeypatch.setattr(dataset, "decode", counted)
    views = ImageViews(shards, RandomViews(LAW.model_copy(update={"scaled_decode": False})), 3)
    views.batch(every(shards, [0]))
    assert len(decoded) == 9
    decoded.clear()
    for row in every(shards, [0]):
        views.batch(row[None])
    assert len(decoded) == 9 + 8


# ---------------------------------------------------------------- unreadable partners


@pytest.fixture
def torn(made: Path, tmp_path: Path) -> tuple[ShardSet, str]:
    """The first shard with an image that cannot be decoded, and its key."""
    (tmp_path / "shards").mkdir()
    images = members_of(source_of(made).shards[0].path)
    name = next(name for name, _ in images[4:] if not name.endswith(".cls"))
    rewritten(
        tmp_path / "shards" / "shard-000000.tar", [(each, b"torn" if each == name else data) for each, data in images]
    )
    return source_of(tmp_path), name.split(".")[0]


def test_the_partner_of_an_unreadable_image_stays_unmixed_in_both_stages(torn: tuple[ShardSet, str]) -> None:
    source, key = torn
    items = every(source.shards, range(6))
    law = RandomViews(LAW)
    found = ImageViews(source.shards, law, 3).batch(items)
    assert found.partners is not None and set(found.partners.lost) == {key} and key not in found.keys
    assert {name for name, _ in found.unreadable} == {key}
    assert key not in found.partners.keys
    unmixed = Counter(found.items[[mix is None for mix in found.partners.mixes], 2].tolist())
    # Nine images: the unreadable one's partner, and the odd one; or none of both where it is the odd one itself.
    assert set(unmixed.values()) <= {0, 2} and len(unmixed) >= 4
    some = next(row for row in range(len(found.keys)) if found.partners.mixes[row] is None)
    assert int(found.view_keys[some]) == view_key(3, found.keys[some], int(found.items[some, 2]))
    listed = ImageViews(source.shards, law, 3, {"shard-000000.tar": {key}})
    readable = items[items[:, 1] != list(source.shards[0].members().keys).index(key)]
    assert by_view(listed.batch(readable)) == by_view(found)


def test_an_image_that_is_readable_as_a_partner_only_is_named(made: Path, torn: tuple[ShardSet, str]) -> None:
    source, key = torn
    batch = ImageViews(source.shards, RandomViews(LAW), 3).batch(every(source.shards, range(6)))
    seen = PartnersSeen()
    seen.add(batch.partners)
    seen.require("s.tar", {key: "torn"})
    with pytest.raises(SourceError, match=f"'{key}' of shard s.tar can be read for some views only"):
        seen.require("s.tar", {})
    with pytest.raises(SourceError, match=f"'{batch.keys[0]}' of shard s.tar can be read for some views only"):
        seen.require("s.tar", {key: "torn", batch.keys[0]: "torn"})


# ---------------------------------------------------------------- stage two


def replayed(root: Path, source: ShardSet) -> ReplayedViews:
    reader = CacheReader(root / "cache")
    joined = join(source, reader)
    return ReplayedViews(reader, reader.manifest, joined, {"layer": ARRAYS}, VerifyConfig(first=10**6))


def numbered(items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([items, np.arange(len(items))[:, None]], axis=1)


def test_replayed_views_are_those_of_stage_one(made: Path) -> None:
    source = source_of(made)
    items = every(source.shards, range(3))
    expected = by_view(ImageViews(source.shards, RandomViews(LAW), 3).batch(items))
    assert by_view(replayed(made, source).batch(numbered(items[::-1].copy()))) == expected


@pytest.mark.parametrize("lanes", [1, 2])
def test_partners_stand_next_to_each_other_in_the_order_of_training(made: Path, lanes: int) -> None:
    source, reader = source_of(made), CacheReader(made / "cache")
    joined = join(source, reader)
    partners = partners_of_source(joined, reader, reader.manifest)
    config = OrderConfig(lanes=lanes, shuffle_units=2)
    assert partners is not None
    plain, order = (SampleOrder(joined.counts, config, 18, 3, partners=each) for each in (None, partners))
    for step in range(4):
        items = order.whole_batch(step)
        assert sorted(items.tolist()) == sorted(plain.whole_batch(step).tolist())
        assert items.tolist() != plain.whole_batch(step).tolist()
        rows = {(u, s): row for row, (u, s, _) in enumerate(items.tolist())}
        apart = sum(abs(rows[u, int(partners(u, v)[s])] - row) > 1 for row, (u, s, v) in enumerate(items.tolist()))
        assert apart == 0 if lanes == 1 else apart < 18  # a lane ends within a shard
        batch = replayed(made, source).batch(numbered(items))
        assert batch.partners is not None
        assert [
            None if (p := int(partners(u, v)[s])) == s else batch.keys[rows[u, p]] for u, s, v in items.tolist()
        ] == (batch.partners.keys)
    order.step, resumed = 3, SampleOrder(joined.counts, config, 18, 3, partners=partners)
    resumed.load_state_dict(order.state_dict())
    assert next(resumed.plan(4))[0, :, :3].tolist() == order.whole_batch(3).tolist()
    with pytest.raises(CheckpointError):
        plain.load_state_dict(order.state_dict())


def exchanged(made: Path, root: Path) -> tuple[ShardSet, str, str]:
    """A copy of the shards with the bytes of two partners of view 0 exchanged, and their keys."""
    shards = source_of(made).shards
    batch = ImageViews(shards, RandomViews(LAW), 3).batch(every(shards[:1], [0]))
    assert batch.partners is not None
    mixes = list(zip(batch.keys, batch.partners.keys, batch.partners.mixes, strict=True))
    one, other = next((a, b) for a, b, mix in mixes if b is not None and mix is not None and 0.05 < mix.share < 0.45)
    (root / "shards").mkdir()
    images = members_of(shards[0].path)
    data = {name.split(".")[0]: data for name, data in images if not name.endswith(".cls")}
    data[one], data[other] = data[other], data[one]
    rewritten(
        root / "shards" / shards[0].name,
        [(name, held if name.endswith(".cls") else data[name.split(".")[0]]) for name, held in images],
    )
    (root / "shards" / shards[1].name).write_bytes(shards[1].path.read_bytes())
    return source_of(root), one, other


def test_exchanged_partners_are_refused_by_name(made: Path, tmp_path: Path) -> None:
    source, one, other = exchanged(made, tmp_path)
    with pytest.raises(CacheMismatch, match=r"source\.shard-000000\.tar\.content_hash differs"):
        replayed(made, source)
    stated = {shard.name: shard for shard in source_of(made).shards}  # an index that is older than the shard
    views = replayed(
        made, ShardSet(tuple(replace(each, content_hash=stated[each.name].content_hash) for each in source.shards))
    )
    place = list(views.reader.keys("shard-000000.tar")).index(one)
    with pytest.raises(ViewMismatch, match=f"image '{one}' mixed with '{other}' of shard shard-000000.tar, view 0"):
        views.batch(numbered(np.array([[0, place, 0]])))


def test_a_shard_with_another_list_of_keys_is_refused_by_name(made: Path) -> None:
    shard = source_of(made).shards[0]
    keys = list(shard.members().keys)
    assert places_in_tar(shard, keys, ())[keys[3]] == 3 and places_in_tar(shard, keys[1:], {keys[0]})
    places_in_tar(shard, keys[1:])  # without pairs a further image changes nothing
    with pytest.raises(CacheMismatch, match=f"got: image '{keys[0]}'"):
        places_in_tar(shard, keys[1:], ())
    with pytest.raises(CacheMismatch, match="got: no image 'a'"):
        places_in_tar(shard, keys, {"a"})


def test_a_partner_that_vanished_since_stage_one_is_an_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(made)
    batch = ImageViews(source.shards, RandomViews(LAW), 3).batch(every(source.shards[:1], [0]))
    assert batch.partners is not None
    row = next(row for row, key in enumerate(batch.partners.keys) if key is not None)
    cut = dataset._cut

    def torn(data: bytes, key: str, *rest: object) -> object:
        if key == batch.partners.keys[row]:  # type: ignore[union-attr]
            raise SourceError("image cannot be decoded", got="torn")
        return cut(data, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "_cut", torn)
    with pytest.raises(SourceError, match=f"'{batch.partners.keys[row]}' is in the cache but can no longer be read"):
        replayed(made, source).batch(numbered(np.array([[0, row, 0]])))

"""The view law: golden boxes, torchvision's distribution, and boxes that fit into any image."""

import itertools
import json
import math

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from tinymim.configs.errors import CacheMismatch
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.views import CentreView, RandomViews, View, ViewLaw, law_of, view_key, view_rng

# (seed, key, view, height, width): the boxes that every machine and version must draw.
GOLDEN = {
    (0, "n01440764_10026", 0, 375, 500): View(top=124, left=117, height=239, width=272, flip=False),
    (0, "n01440764_10026", 1, 375, 500): View(top=91, left=50, height=237, width=223, flip=True),
    (1, "n01440764_10026", 0, 375, 500): View(top=54, left=268, height=260, width=209, flip=False),
    (0, "stripes/000000", 0, 80, 80): View(top=16, left=8, height=58, width=68, flip=False),
    (7, "über/bär ñ.v2", 3, 500, 333): View(top=189, left=55, height=277, width=258, flip=True),
    (7, "猫/画像 001", 0, 64, 64): View(top=10, left=9, height=45, width=42, flip=False),
    (123456789, "a.b.c/d.e", 299, 1, 700): View(top=0, left=349, height=1, width=1, flip=True),
    (0, "", 0, 224, 224): View(top=33, left=3, height=168, width=141, flip=False),
    (2**40, "x" * 300, 1, 1000, 30): View(top=480, left=0, height=40, width=30, flip=False),
}


@pytest.mark.parametrize(("case", "expected"), GOLDEN.items(), ids=lambda value: str(value)[:40])
def test_golden_boxes(case: tuple[int, str, int, int, int], expected: View) -> None:
    seed, key, view, height, width = case
    assert RandomViews(ViewConfig(seed=seed))(key, view, height, width) == expected


def test_golden_identities_and_draws() -> None:
    assert view_key(3, "a/é.b", 2) == 3519588910833280692
    assert list(itertools.islice(view_rng(3, "a/é.b", 2), 9)) == [
        0.4244630036651338,
        0.6545611562432846,
        0.42437518677513897,
        0.956834616864812,
        0.1574426330543809,
        0.9139882099457165,
        0.9829470420415731,
        0.7622777413444457,
        0.5155137654728748,
    ]


def test_seed_key_and_view_each_change_the_box_and_order_of_calls_does_not() -> None:
    law = RandomViews(ViewConfig())
    base = law("a", 0, 300, 400)
    others = [law("b", 0, 300, 400), law("a", 1, 300, 400), RandomViews(ViewConfig(seed=1))("a", 0, 300, 400)]
    assert base not in others
    assert law("a", 0, 300, 400) == base


def test_fields_of_the_identity_do_not_run_into_one_another() -> None:
    assert len({view_key(1, "2/x", 3), view_key(1, "x", 23), view_key(12, "x", 3), view_key(1, "3/2/x", 0)}) == 4


def _ks_distance(a: list[float], b: list[float]) -> float:
    """Largest distance between two empirical distribution functions (two-sample Kolmogorov-Smirnov)."""
    pooled = torch.tensor(sorted({*a, *b}), dtype=torch.float64)
    cdf = [
        torch.searchsorted(torch.tensor(sorted(x), dtype=torch.float64), pooled, right=True) / len(x) for x in (a, b)
    ]
    return float((cdf[0] - cdf[1]).abs().max())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (120, 400)])
def test_law_is_torchvisions(height: int, width: int) -> None:
    draws = 4000
    config = ViewConfig()
    law = RandomViews(config)
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(blank, list(config.scale), list(config.ratio)) for _ in range(draws)]
    theirs = [View(top, left, h, w, False) for top, left, h, w in boxes]
    ours = [law(f"image-{i}", 0, height, width) for i in range(draws)]
    # The 1 % point of the two-sample distance is 1.63 x sqrt(2 / 4000) = 0.036; both sides are seeded.
    for statistic in (
        lambda v: v.height * v.width / (height * width),
        lambda v: math.log(v.width / v.height),
        lambda v: v.top / max(1, height - v.height),
        lambda v: v.left / max(1, width - v.width),
    ):
        assert _ks_distance([statistic(v) for v in ours], [statistic(v) for v in theirs]) < 0.036
    assert abs(sum(v.flip for v in ours) / draws - 0.5) < 0.03


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3), (7, 1000), (333, 500), (64, 64)])
def test_boxes_lie_inside_the_image(shape: tuple[int, int]) -> None:
    height, width = shape
    laws: list[ViewLaw] = [
        RandomViews(ViewConfig(scale=(0.01, 1.0))),
        RandomViews(ViewConfig(scale=(1.0, 1.0))),
        CentreView(8, 1.143),
        CentreView(8, "squeeze"),
    ]
    for law, i in itertools.product(laws, range(200)):
        view = law(f"k{i}", i, height, width)
        assert view.top >= 0 and view.left >= 0 and view.height >= 1 and view.width >= 1
        assert view.top + view.height <= height and view.left + view.width <= width


@pytest.mark.parametrize(("shape", "expected"), [((1, 400), (0, 199, 1, 1)), ((400, 1), (199, 0, 1, 1))])
def test_fallback_is_the_largest_central_box(shape: tuple[int, int], expected: tuple[int, ...]) -> None:
    law = RandomViews(ViewConfig(scale=(1.0, 1.0)))
    assert law("thin", 0, *shape)[:4] == expected


def test_fallback_keeps_torchvisions_ratio() -> None:
    config = ViewConfig(scale=(1.0, 1.0))
    blank = torch.empty(1, 100, 400)
    theirs = RandomResizedCrop.get_params(blank, [1.0, 1.0], list(config.ratio))
    assert RandomViews(config)("wide", 0, 100, 400)[:4] == tuple(theirs)


def test_flip_probability_is_kept_at_its_ends() -> None:
    for probability in (0.0, 1.0):
        law = RandomViews(ViewConfig(flip=probability))
        assert {law(str(i), 0, 50, 50).flip for i in range(200)} == {bool(probability)}


def test_centre_view() -> None:
    assert CentreView(224, 256 / 224)("any", 0, 256, 256) == View(16, 16, 224, 224, False)
    assert CentreView(224, 1.0)("any", 0, 300, 500) == View(0, 100, 300, 300, False)
    assert CentreView(224, 1.143)("any", 0, 300, 500) == CentreView(224, 1.143)("other", 7, 300, 500)


# ---------------------------------------------------------------- what a cache stores


def test_the_law_of_a_cache_draws_its_views() -> None:
    config = ViewConfig(size=48, scale=(0.1, 0.9), flip=0.25, seed=7, scaled_decode=True)
    stored = json.loads(json.dumps(config.identity()))
    law = law_of(stored, {})
    assert law.config == config
    assert [law("a", view, 300, 400) for view in range(50)] == [
        RandomViews(config)("a", view, 300, 400) for view in range(50)
    ]
    assert not law_of({name: value for name, value in stored.items() if name != "scaled_decode"}, {}).scaled_decode


def test_a_law_of_another_version_is_refused() -> None:
    with pytest.raises(CacheMismatch, match="a law that this version of tinymim does not have") as caught:
        law_of(ViewConfig().identity() | {"erasing": 0.5}, {})
    assert "erasing" in str(caught.value.got)
